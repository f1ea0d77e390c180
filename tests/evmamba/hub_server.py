"""A server on this machine that speaks as much of the Hugging Face hub's protocol as a download needs."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What is served, and how.

    Attributes:
        repositories: name -> revision -> file -> content.
        requests: `METHOD path` of everything asked for.
        burst: bytes after which every answer breaks off, though more are announced.
        end: part of every file after which nothing comes, however often it is asked for.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.burst = 1 << 40
        self.end = 1.0
        self.endpoint = ""

    def add(self, repository: str, revision: str, file: str, content: bytes) -> None:
        self.repositories.setdefault(repository, {}).setdefault(revision, {})[file] = content


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub on a free port of this machine; `endpoint` is its address."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_content=False)

        def do_GET(self) -> None:
            self.answer(with_content=True)

        def answer(self, with_content: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                repository, _, revision = path.removeprefix("api/models/").partition("/tree/")
                found = self.find(repository, revision)
                if found is not None:
                    rows = [{"type": "file", "path": name, "size": len(c), "oid": "0"} for name, c in found.items()]
                    self.send(json.dumps(rows).encode(), with_content, {"Content-Type": "application/json"})
                return
            repository, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            found = self.find(repository, revision)
            if found is None:
                return
            if file not in found:
                self.refuse("EntryNotFound")
                return
            content = found[file]
            etag = hashlib.sha256(content).hexdigest()
            commit = revision if len(revision) == len(COMMIT) else COMMIT
            self.send(content, with_content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

        def find(self, repository: str, revision: str) -> dict[str, bytes] | None:
            revisions = hub.repositories.get(repository)
            if revisions is None:
                self.refuse("RepoNotFound")
                return None
            if revision not in revisions:
                self.refuse("RevisionNotFound")
                return None
            return revisions[revision]

        def send(self, content: bytes, with_content: bool, headers: dict[str, str]) -> None:
            start = 0
            if asked := self.headers.get("Range"):
                start = int(asked.removeprefix("bytes=").partition("-")[0])
                headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self.send_response(206 if asked else 200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if with_content:
                self.wfile.write(content[start : min(start + hub.burst, int(hub.end * len(content)))])

        def refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template[template.index("/{repo_id}") :])
