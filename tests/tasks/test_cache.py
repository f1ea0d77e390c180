"""Where the project keeps what it can make again."""

from pathlib import Path

import pytest

from evmamba.tasks.cache import cache_folder


def test_the_cache_is_where_the_user_says_else_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EVMAMBA_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "evmamba"
    monkeypatch.setenv("EVMAMBA_CACHE", "~/disk")
    assert cache_folder() == tmp_path / "disk"
    assert not cache_folder().exists(), "asking for it must not make it"
