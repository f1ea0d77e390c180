"""Where the project keeps what it can make again."""

import pwd
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.tasks.cache import cache_folder


def test_the_cache_is_where_the_user_says_else_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EVMAMBA_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "evmamba"
    monkeypatch.setenv("EVMAMBA_CACHE", "~/disk")
    assert cache_folder() == tmp_path / "disk"
    assert not cache_folder().exists(), "asking for it must not make it"


@pytest.mark.parametrize("chosen", [None, "~/disk"])
def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, chosen: str | None):
    """As in a container that runs under a number which nobody has there."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("EVMAMBA_CACHE", raising=False)
    if chosen is not None:
        monkeypatch.setenv("EVMAMBA_CACHE", chosen)
    with pytest.raises(UserError, match=r"user \d+ has no home folder .*EVMAMBA_CACHE"):
        cache_folder()
