"""Weights that others publish: where they are, by the name of their network, and how they come here.

A source is written `hf-hub:USER/REPOSITORY[@REVISION][:FILE]` (a repository of the Hugging Face hub), `https://...`, or
as the path of a file. Downloads are kept, the hub's in its own cache (HF_HOME), others in `torch.hub.get_dir()`.
"""

import functools
import hashlib
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from evmamba.errors import UserError, first_line
from evmamba.files import replacing

HUB = re.compile(r"hf-hub:(?P<repository>[^/@:]+/[^/@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")
WEIGHTS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
DEFAULT_FILE = "model.safetensors"
CHUNK = 1 << 20
TIMEOUT_S = 30


@dataclass(frozen=True)
class Source:
    """Where a file of weights is: on the disk, at a URL, or in a repository of the hub.

    Attributes:
        path: on the disk.
        url: http or https.
        repository: on the hub, `user/name`.
        revision: branch, tag or commit of the repository.
        file: of the repository; None takes model.safetensors, or the only file of weights there is.
    """

    path: Path | None = None
    url: str | None = None
    repository: str | None = None
    revision: str = "main"
    file: str | None = None


@functools.cache
def published() -> dict[str, dict[str, str]]:
    """The table of published weights (`weights.yaml`): name of the network -> repository, revision, file, license."""
    table: dict[str, dict[str, str]] = yaml.safe_load(
        files("evmamba").joinpath("weights.yaml").read_text(encoding="utf-8")
    )
    return table


def hub_cfg(name: str) -> dict[str, str]:
    """What timm's description of a network says about its published weights; nothing where there are none."""
    row = published().get(name)
    if row is None:
        return {}
    return {"hf_hub_id": f"{row['repository']}@{row['revision']}", "hf_hub_filename": row["file"]}


def published_source(variant: str | None) -> Source:
    """The source of a network's published weights.

    Raises:
        UserError: there are none for this network.
    """
    if source := source_of_cfg(hub_cfg(variant or "")):
        return source
    raise UserError(
        f"no published weights are known for {variant or 'this network'}, only for {', '.join(published())}; give a "
        "source in place of True: a file, a URL, or hf-hub:USER/REPOSITORY@REVISION:FILE"
    )


def parse_source(text: str | PathLike[str]) -> Source:
    """Read a source as users write it (see the module's head).

    Raises:
        UserError: it starts with `hf-hub:` and does not go on as it must.
    """
    text = fspath(text)
    if text.startswith("hf-hub:"):
        if not (found := HUB.fullmatch(text)):
            raise UserError(f"'{text}' is no source of weights; write hf-hub:USER/REPOSITORY[@REVISION][:FILE]")
        return Source(repository=found["repository"], revision=found["revision"] or "main", file=found["file"] or None)
    if text.startswith(("http://", "https://")):
        return Source(url=text)
    return Source(path=Path(text))


def source_of_cfg(cfg: Mapping[str, Any]) -> Source | None:
    """The source that timm's description of a network names, in timm's order: file, hub, URL."""
    if cfg.get("file"):
        return Source(path=Path(cfg["file"]))
    if cfg.get("hf_hub_id"):
        repository, _, revision = cfg["hf_hub_id"].partition("@")
        return Source(repository=repository, revision=revision or "main", file=cfg.get("hf_hub_filename"))
    return Source(url=cfg["url"]) if cfg.get("url") else None


def fetch(source: Source, cache_dir: str | PathLike[str] | None = None) -> Path:
    """The file on this machine; it is downloaded if it is not here yet.

    With HF_HUB_OFFLINE set nothing is downloaded.

    Args:
        source: of the file.
        cache_dir: where downloads are kept, in place of the hub's and torch's caches.

    Raises:
        UserError: no network, no such repository, revision or file, a download that breaks off.
    """
    if source.path is not None:
        return source.path
    if source.url is not None:
        return _fetch_url(source.url, Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints"))
    assert source.repository is not None
    repository, revision = source.repository, source.revision
    where = f"{repository} at revision {revision}"
    try:
        file = source.file or _only_file(repository, revision)
        where = f"{file} of {where}"
        kept_in = None if cache_dir is None else fspath(cache_dir)
        return Path(hf_hub_download(repository, file, revision=revision, cache_dir=kept_in))
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no repository {repository}, or it wants you to log in: hf auth login") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        fetched = f"hf download {repository} {source.file or DEFAULT_FILE} --revision {revision}"
        raise UserError(
            f"{where} is not in the cache ({cache_dir or constants.HF_HUB_CACHE}) and {reason}; run `{fetched}` where "
            "there is a network, and give its file as source"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"there is no {where}") from error
    except HFValidationError as error:
        raise UserError(f"'{repository}' cannot be a repository of the hub") from error
    except (HTTPError, OSError) as error:
        raise UserError(f"cannot download {where}: {first_line(error)}") from error


def _only_file(repository: str, revision: str) -> str:
    names = HfApi().list_repo_files(repository, revision=revision)
    found = sorted(name for name in names if name.endswith(WEIGHTS))
    if DEFAULT_FILE in found:
        return DEFAULT_FILE
    if len(found) != 1:
        listed = ", ".join(found[:8]) or "none"
        raise UserError(f"{repository} has {len(found)} files of weights ({listed}); name one: ...:FILE")
    return found[0]


def _fetch_url(url: str, folder: Path) -> Path:
    name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "weights"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if path.is_file():
        return path
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{url} is not in the cache ({folder}) and HF_HUB_OFFLINE is set")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, replacing(path) as partial:
            with partial.open("wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                length, got = answer.headers.get("Content-Length"), file.tell()
            if length is not None and got != int(length):
                raise UserError(f"the download of {url} broke off after {got} of {length} bytes; try again")
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"cannot download {url}: {first_line(error)}") from error
    return path
