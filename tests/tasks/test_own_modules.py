"""Modules of the user's own."""

import sys
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.tasks.own_modules import import_own


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_module_of_the_working_directory_is_found_after_the_installed_ones(here: Path):
    (here / "own_module_of_this_test.py").write_text("VALUE = 3\n")
    (here / "json.py").write_text("raise RuntimeError\n")
    import_own("own_module_of_this_test", "it is needed")
    import_own("json", "it is needed")
    assert sys.modules.pop("own_module_of_this_test").VALUE == 3
    assert sys.path[-1] == str(here)


def test_a_missing_module_is_one_line_and_says_who_needs_it():
    with pytest.raises(UserError, match=r"no module 'no_such_module' in .* or installed; --import names it"):
        import_own("no_such_module", "--import names it")


def test_what_a_users_module_lacks_itself_keeps_its_traceback(here: Path):
    (here / "broken_module_of_this_test.py").write_text("import another_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="another_that_is_missing"):
        import_own("broken_module_of_this_test", "it is needed")
