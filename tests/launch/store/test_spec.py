"""Specs: what decides a run is in its hash and nothing else, and a file that is no spec is refused with its name."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from evmamba.errors import UserError
from evmamba.launch.store import spec as store
from evmamba.launch.store.spec import (
    SPEC_FILE,
    BaseSpec,
    CostSpec,
    EvaluationSpec,
    Resources,
    Spec,
    Start,
    Timing,
    TrainingSpec,
    read_spec,
)

from ..handmade import made_spec

SETTINGS = {"model": {"init_args": {"backbone": "resnet18"}}, "data": {"init_args": {"seed": 0, "image_size": 64}}}


def training(task: str = "segmentation", **changes: Any) -> TrainingSpec:
    return made_spec(task, **({"settings": SETTINGS} | changes))


def evaluation(of: TrainingSpec, **changes: Any) -> EvaluationSpec:
    return EvaluationSpec(
        task=of.task,
        model=of.model,
        head=of.head,
        seed=of.seed,
        device="cpu",
        start=Start.of(of),
        needs=(of.name,),
        **({"settings": of.settings} | changes),
    )


def written(folder: Path, document: Any) -> Path:
    (folder / SPEC_FILE).write_text(document if isinstance(document, str) else json.dumps(document))
    return folder / SPEC_FILE


@pytest.mark.parametrize(
    "spec",
    [
        CostSpec(model="resnet18", seed=1, device="cuda", timing=Timing(input_sizes=(224, 512)), suite="resolution"),
        training(test_scales=(0.5, 2.0), resources=Resources(2, 8, "ddp", 4, 2), suite="main").after(
            training("classification")
        ),
        evaluation(training(test=False)),
    ],
    ids=["cost", "training", "evaluation"],
)
def test_a_spec_comes_back_from_its_file(tmp_path: Path, spec: Spec):
    spec.write(tmp_path)
    again = read_spec(tmp_path / SPEC_FILE)
    assert again == spec
    assert type(again) is type(spec)
    assert (again.hash, again.family, again.name) == (spec.hash, spec.family, spec.name)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model": "resnet50"},
        {"head": "fcn"},
        {"device": "cuda"},
        {"settings": SETTINGS | {"trainer": {"max_steps": 3}}},
        {"data_fingerprint": "f00d"},
        {"global_batch": 64},
        {"test_scales": (2.0,)},
        {"test": False},
        {"start": Start("other", "1", "2")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_a_run_is_in_its_hash(change: dict):
    assert training(**change).hash != training().hash


@pytest.mark.parametrize(
    "change",
    [
        {"needs": ("other",)},
        {"resources": Resources(nodes=8, devices=8, strategy="deepspeed_stage_1", batch_size=2)},
        {"suite": "main"},
        {"recipe": "/elsewhere/tiny.yaml"},
        {"own_batch": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_where_and_why_a_run_is_run_is_not_in_its_hash(change: dict):
    assert training(**change).hash == training().hash


def test_a_hash_follows_the_run_that_it_starts_from_and_the_family_that_runs_family():
    one, other = training("classification"), training("classification", seed=1)
    assert one.family == other.family
    assert training().after(one).hash != training().after(other).hash
    assert training().after(one).family == training().after(other).family
    edited = training("classification", settings={"trainer": {"max_steps": 3}})
    assert training().after(edited).family != training().after(one).family
    assert evaluation(training()).family != evaluation(training(test_scales=(2.0,))).family


def test_runs_that_differ_in_their_seeds_alone_are_of_one_family():
    seeded = {"settings": SETTINGS | {"data": {"init_args": {"seed": 1, "image_size": 64}}}, "seed": 1}
    assert training(**seeded).hash != training().hash
    assert training(**seeded).family == training().family
    other = {"settings": SETTINGS | {"data": {"init_args": {"seed": 1, "image_size": 96}}}, "seed": 1}
    assert training(**other).family != training().family
    assert SETTINGS["data"]["init_args"]["seed"] == 0


def test_a_field_that_is_added_later_changes_no_hash_as_long_as_it_has_its_default():
    """As the next version would define the classes, by the same rules."""

    class LaterTiming(Timing, frozen=True, kw_only=True):
        repeats: int = 3

    class LaterSpec(CostSpec, frozen=True, kw_only=True, tag="cost"):
        timing: LaterTiming = LaterTiming()
        fan: str | None = None

    now = CostSpec(model="resnet18", seed=0, device="cpu", timing=Timing(timed_steps=1))
    later = LaterSpec(model="resnet18", seed=0, device="cpu", timing=LaterTiming(timed_steps=1))
    assert later.hash == now.hash
    assert structs.replace(later, fan="off").hash != now.hash
    assert structs.replace(later, timing=LaterTiming(timed_steps=1, repeats=4)).hash != now.hash
    assert msgspec.convert(msgspec.to_builtins(now), LaterSpec) == later  # and it reads what this version wrote


def test_a_new_version_repeats_every_run(monkeypatch: pytest.MonkeyPatch):
    before = training().hash
    monkeypatch.setattr(store.metadata, "version", lambda name: "99.0")
    assert training().hash != before


def test_names_say_what_a_run_does():
    fit = training(test=False)
    names = [spec.name.rpartition("-")[0] for spec in (made_spec("cost"), training(), fit, evaluation(fit))]
    assert names == [
        "cost-resnet18",
        "segmentation-resnet18",
        "segmentation_training-resnet18",
        "segmentation_evaluation-resnet18",
    ]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": "tuning"}, "'tuning'"),
        ({"model": 3}, r"Expected `str`, got `int` - at `\$.model`"),
        ({"resources": {"nodes": "2"}}, r"Expected `int`, got `str` - at `\$.resources.nodes`"),
        ({"resources": {"hosts": 2}}, "unknown field `hosts`"),
        ({"arguments": []}, "unknown field `arguments`"),
        ({"timing": {}}, "unknown field `timing`"),  # of a cost run
        ({"start": {"run": "a"}}, "missing required field `hash`"),
    ],
)
def test_a_wrong_spec_is_named_with_what_is_wrong(tmp_path: Path, changes: dict, complaint: str):
    document = msgspec.to_builtins(training()) | changes
    with pytest.raises(UserError, match=f"{SPEC_FILE}: no spec of this version of evmamba .*{complaint}") as raised:
        read_spec(written(tmp_path, document))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["kind", "model", "settings", "task"])
def test_a_missing_field_is_named(tmp_path: Path, name: str):
    document = msgspec.to_builtins(training())
    del document[name]
    with pytest.raises(UserError, match=f"{SPEC_FILE}: .*missing required field `{name}`"):
        read_spec(written(tmp_path, document))


def test_a_file_that_is_missing_or_torn_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=f"{SPEC_FILE}: cannot be read"):
        read_spec(tmp_path / SPEC_FILE)
    with pytest.raises(UserError, match=f"{SPEC_FILE}: no valid JSON"):
        read_spec(written(tmp_path, '{"kind": "tra'))


def test_no_field_of_a_spec_is_without_a_word_on_it():
    for kind in (CostSpec, TrainingSpec, EvaluationSpec):
        said = "".join(base.__doc__ or "" for base in kind.__mro__ if issubclass(base, BaseSpec))
        assert [field.name for field in structs.fields(kind) if f"        {field.name}: " not in said] == []
