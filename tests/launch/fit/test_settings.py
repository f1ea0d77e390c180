"""Settings: no more and no less than what a run was told beyond the defaults."""

import json

import pytest

from evmamba.launch.fit import settings as module
from evmamba.launch.fit.cli import EvmambaCLI, settings_of
from evmamba.launch.fit.recipes import find_recipe, recipes
from evmamba.launch.fit.settings import beyond_defaults, changed, defaults_of, setting

CLASSIFIER = "evmamba.tasks.classification.ClassificationModule"


class ParsedOnly(EvmambaCLI):
    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def whole(*arguments: str) -> dict:
    config = ParsedOnly(arguments, run=False).plain_config()
    return json.loads(json.dumps({part: config[part] for part in ("model", "data", "trainer")}))


@pytest.mark.parametrize("name", recipes())
def test_settings_make_the_whole_configuration_again(name: str):
    recipe = find_recipe(name)
    settings = settings_of(recipe)
    again = whole(*(f"--{part}={json.dumps(value)}" for part, value in settings.items()))
    assert again == whole(f"--config={recipe}")
    assert beyond_defaults(again) == settings


def test_what_has_its_default_is_left_out_wherever_it_was_written():
    plain = settings_of(find_recipe("classification/tiny"))
    usual = [("model.init_args.mixup", 0.0), ("model.init_args.optimizer.eps", 1e-8), ("trainer.max_epochs", None)]
    assert settings_of(find_recipe("classification/tiny"), usual) == plain
    unusual = settings_of(find_recipe("classification/tiny"), [("model.init_args.optimizer.eps", 1e-6)])
    assert unusual["model"]["init_args"]["optimizer"]["eps"] == 1e-6


def test_an_option_that_comes_later_is_in_no_settings_until_it_is_used(monkeypatch: pytest.MonkeyPatch):
    before = settings_of(find_recipe("classification/tiny"))
    config = whole(f"--config={find_recipe('classification/tiny')}")
    later = defaults_of(CLASSIFIER) | {"distillation": None}
    monkeypatch.setattr(module, "defaults_of", lambda path: later if path == CLASSIFIER else defaults_of(path))
    config["model"]["init_args"]["distillation"] = None
    assert beyond_defaults(config) == before
    config["model"]["init_args"]["distillation"] = "teacher.pth"
    assert beyond_defaults(config) != before


def test_an_option_has_the_told_value_or_its_default():
    settings = settings_of(find_recipe("segmentation/small"), [("model.init_args.optimizer.lr", 0.5)])
    assert setting(settings, "model.init_args.optimizer.lr") == 0.5
    assert setting(settings, "model.init_args.optimizer.eps") == 1e-8
    assert setting(settings, "data.init_args.crop_size") == 192
    assert setting(settings, "data.init_args.flip") == 0.5
    assert setting(settings, "trainer.accumulate_grad_batches") == 1
    assert setting(settings, "trainer.check_val_every_n_epoch") is None  # told so: the default is 1
    assert setting(settings, "data.init_args.no_such_option") is None


def test_a_change_leaves_the_settings_that_it_is_made_from():
    settings = {"model": {"class_path": CLASSIFIER}}
    assert changed(settings, "model.init_args.optimizer.lr", 1.0) == {
        "model": {"class_path": CLASSIFIER, "init_args": {"optimizer": {"lr": 1.0}}}
    }
    assert settings == {"model": {"class_path": CLASSIFIER}}
