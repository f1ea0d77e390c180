"""Files name no modules but those that the user has named."""

import pytest

from evmamba.errors import UserError
from evmamba.tasks import trust as trust_module
from evmamba.tasks.trust import check_trusted, named_by_user, trust, trusted


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch):
    monkeypatch.setattr(trust_module, "_trusted", dict.fromkeys(trust_module.ALWAYS))


@pytest.mark.parametrize(
    ("args", "modules"),
    [
        (["--model", "my_task.Module"], ["my_task"]),
        (["--model=my_task.module.Module"], ["my_task"]),
        (["--backbones", "my_networks:my_net,resnet18"], ["my_networks"]),
        (['--trainer.callbacks={"class_path": "mine.Callback"}'], ["mine"]),
        # Files and numbers name nothing, and Python's own modules nobody has to name.
        (["--config", "evil.yaml"], []),
        (["--config=evil.yaml", "--data.init_args.data_dir", "../evil.d/x.y"], []),
        (["--ckpt_path", "last.ckpt", "--model.init_args.lr=1e-3", "--trainer.precision", "bf16-mixed"], []),
        (["--model", "os.system"], []),
    ],
)
def test_what_stands_in_options_is_named(args, modules):
    assert named_by_user(args) == modules


def test_only_named_modules_are_trusted():
    check_trusted("evmamba.tasks.detection.DetectionModule", "a recipe")
    with pytest.raises(UserError, match=r"a recipe names 'mine\.Module'.*--import mine"):
        check_trusted("mine.Module", "a recipe")
    trust(["mine"])
    check_trusted("mine.Module", "a recipe")
    with pytest.raises(UserError, match="minefield"):
        check_trusted("minefield.Module", "a recipe")
    assert trusted()[-1] == "mine"


@pytest.mark.parametrize("name", ["", "os", "os.path", "a-b", "a..b", "../x"])
def test_what_is_no_module_of_ones_own_cannot_be_trusted(name):
    with pytest.raises(UserError, match="--import"):
        trust([name])


@pytest.mark.parametrize("name", ["os.system", "torch.hub.load"])
def test_what_cannot_be_allowed_gets_no_advice_to_allow_it(name):
    assert "--import" not in str(trust_module.refusal(name, "the recipe"))


def test_classes_and_backbones_of_settings_are_found_wherever_they_stand():
    settings = {
        "model": {"class_path": "mine.Module", "init_args": {"backbone": "nets:small", "class_path": 3}},
        "trainer": {
            "callbacks": [{"class_path": "evmamba.tasks.training.callbacks.LastCheckpoint"}, {"class_path": "os.X"}]
        },
        "data": {"init_args": {"data_dir": "a.b", "backbone": "resnet18"}},
    }
    found = ["mine.Module", "nets", "evmamba.tasks.training.callbacks.LastCheckpoint", "os.X"]
    assert trust_module.named_in(settings) == found
    assert trust_module.modules_in(settings) == ["mine", "nets", "evmamba"]
