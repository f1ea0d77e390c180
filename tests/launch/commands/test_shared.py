"""What several subcommands need."""

from importlib import metadata

import pytest

from evmamba.errors import UserError
from evmamba.launch.commands.shared import names, need_extra


@pytest.mark.parametrize(("text", "found"), [("a, b,", ["a", "b"]), ("a", ["a"]), (" , ", [])])
def test_lists_are_written_with_commas(text: str, found: list[str]):
    assert names(text) == found


def test_a_missing_training_library_is_told_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch):
    need_extra()

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(UserError, match=r"pip install '\.\[tasks\]'"):
        need_extra()
