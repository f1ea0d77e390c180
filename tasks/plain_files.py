"""Text files from anybody, read as plain values. Reading one runs no code, does not wait for a pipe, and takes time and
memory in proportion to the file."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from evmamba.errors import UserError, first_line

# Values of a YAML file with its aliases written out: a few lines of them can stand for billions.
MAX_YAML_VALUES = 1_000_000
# Brackets within brackets of a YAML file: PyYAML's time grows with their square.
MAX_YAML_DEPTH = 100
# A number of a file's schema: more than 64 bits have no meaning anywhere here, and thousands of digits stop arithmetic.
Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


def is_file(path: Path | str) -> bool:
    """Whether there is a file of this name; of a name that cannot be one (too long, a loop of links) there is none."""
    return os.path.isfile(path)  # noqa: PTH113 (Path.is_file raises for such names)


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UserError: there is no such file, or what has that name is none (a folder, a pipe, a device).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: cannot be read (it is not a file)")
        return path.read_bytes()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: see `read_bytes`, or it is no UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(path: Path, *, allow_nan: bool = False) -> Any:
    """What a JSON file holds, strictly by the standard: no NaN, no infinity, no half characters.

    Args:
        path: the file.
        allow_nan: let NaN and infinities pass, as Python writes them, for a caller that says where they stand.

    Raises:
        UserError: see `read_text`, or it is no JSON, cut, or nested too deeply.
    """
    text = read_text(path)
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        if allow_nan and (content := _with_nan(text)) is not None:
            return content
        raise UserError(f"{path}: no valid JSON ({first_line(error)})") from error


def _with_nan(text: str) -> Any:
    """The content if it is JSON but for NaN and infinities, else None."""
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # half characters are refused here
    except (ValueError, RecursionError):
        return None
    return content


class _Shallow(yaml.scanner.Scanner):
    """Refuses brackets nested too deeply when it meets them."""

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        if self.flow_level >= MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_YAML_DEPTH} brackets within each other")
        super().fetch_flow_collection_start(TokenClass)


class _Values(_Shallow, yaml.SafeLoader):
    pass


class _Texts(_Shallow, yaml.BaseLoader):
    pass


def read_yaml(path: Path, *, as_texts: bool = False) -> Any:
    """What a YAML file holds.

    Args:
        path: the file.
        as_texts: leave every value the text that it is (24:00:00 would become a number of seconds).

    Raises:
        UserError: see `read_text`, or it is no YAML, nested too deeply, or too large with its aliases written out.
    """
    try:
        text = (_Texts if as_texts else _Values)(read_text(path))
        try:
            document = text.get_single_node()
            if document is not None and _size(document, {}) > MAX_YAML_VALUES:
                raise UserError(f"{path}: more than {MAX_YAML_VALUES:,} values with its aliases (*name) written out")
            return None if document is None else text.construct_document(document)
        finally:
            text.dispose()
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: no valid YAML ({error.problem or first_line(error)})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 99th of a month, 5000 digits
        raise UserError(f"{path}: no valid YAML ({first_line(error)})") from error


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Values in a node, those of an alias as often as it stands there; infinite for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # until its parts are counted: it is one of them only if it holds itself
        known[id(node)] = 1 + sum(_size(part, known) for part in _parts(node))
    return known[id(node)]


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
