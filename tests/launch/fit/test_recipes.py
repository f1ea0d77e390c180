"""Recipes are found by the names that people type, in the repository and out of it."""

from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch.fit.recipes import CONF, find_recipe, recipes


@pytest.mark.parametrize(
    "name", ["conf/detection/tiny.yaml", "./conf/detection/tiny.yaml", "detection/tiny.yaml", "detection/tiny"]
)
def test_a_packaged_recipe_has_one_file_under_all_its_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == CONF / "detection" / "tiny.yaml"


def test_a_file_on_disk_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "detection").mkdir(parents=True)
    own = tmp_path / "conf" / "detection" / "tiny.yaml"
    own.write_text("trainer: {}\n")
    assert find_recipe("conf/detection/tiny.yaml").resolve() == own


def test_the_names_that_are_listed_are_found():
    assert recipes()
    assert all(find_recipe(name).is_file() for name in recipes())


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"did you mean conf/segmentation/small\.yaml"):
        find_recipe("conf/segmentation/smal.yaml")
