"""The graph of a benchmark: what starts from what, and how processes share a recipe's global batch."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evmamba.errors import UserError
from evmamba.launch.bench.graph import batch_of, build_graph, placed, tree, with_exported
from evmamba.launch.fit.cli import EvmambaCLI, settings_of
from evmamba.launch.fit.recipes import recipe_of
from evmamba.launch.fit.settings import setting
from evmamba.launch.fit.training import cli_arguments
from evmamba.launch.store.spec import EvaluationSpec, Resources, Spec, TrainingSpec
from evmamba.tasks.embedded import ensure_embedded

from ..handmade import made_spec


def trained(task: str, preset: str, options: dict[str, Any], **changes: Any) -> TrainingSpec:
    head = {"classification": "linear", "detection": "retinanet", "segmentation": "upernet"}[task]
    recipe = recipe_of(task, preset, head, changes["model"])
    own = "data.init_args.batch_size" in options
    return made_spec(task, settings=settings_of(recipe, [*options.items()]), own_batch=own, **changes)


def paper(
    task: str, options: dict[str, Any] | None = None, model: str = "efficientvmamba_t", seed: int = 0
) -> TrainingSpec:
    return trained(task, "paper", options or {}, model=model, seed=seed, device="cuda")


def on(nodes: int, devices: int, spec: TrainingSpec) -> TrainingSpec:
    return placed(spec, Resources(nodes, devices))


def everything(model: str = "efficientvmamba_t", seed: int = 0) -> list[Spec]:
    trainings = [paper(task, model=model, seed=seed) for task in ("classification", "detection", "segmentation")]
    return [made_spec("cost", model, seed), *trainings]


def test_detection_and_segmentation_start_from_the_classification_of_the_same_model_and_seed():
    specs = everything() + everything("efficientvmamba_s") + everything(seed=1)
    graph = build_graph(specs, lambda kind: Resources(1, 8))
    names = {spec.name: spec for spec in graph}
    assert len(names) == 15
    starts = [spec for spec in graph if spec.needs]
    assert [spec.kind for spec in starts] == 3 * ["detection", "segmentation_training", "segmentation_evaluation"]
    for spec in starts:
        before = names[spec.start.run]
        assert (before.model, before.seed) == (spec.model, spec.seed)
        assert (spec.start.hash, spec.start.family) == (before.hash, before.family)
        assert spec.needs == (before.name,)
        assert before.kind == ("segmentation_training" if isinstance(spec, EvaluationSpec) else "classification")
    evaluations = [spec for spec in graph if isinstance(spec, EvaluationSpec)]
    assert all(setting(spec.settings, "model.init_args.multi_scale") for spec in evaluations)


def test_every_trained_network_is_exported_by_an_evaluation_and_its_training_stays_what_it_was():
    graph = build_graph(everything(), lambda kind: Resources(1, 8))
    exported = with_exported(graph)
    assert [spec.name for spec in exported if isinstance(spec, TrainingSpec)] == [
        spec.name for spec in graph if isinstance(spec, TrainingSpec)
    ]
    evaluations = [spec for spec in exported if isinstance(spec, EvaluationSpec)]
    assert [spec.task for spec in evaluations] == ["classification", "detection", "segmentation"]
    assert all(spec.exported and spec.needs == (spec.start.run,) for spec in evaluations)
    assert {placed(spec, Resources(2, 8)).resources for spec in evaluations} == {Resources()}  # one process, always
    seen: set[str] = set()
    for spec in exported:
        assert set(spec.needs) <= seen
        seen.add(spec.name)


def test_the_graph_can_run_in_its_order():
    seen: set[str] = set()
    for spec in build_graph(everything(), lambda kind: Resources(2, 8)):
        assert set(spec.needs) <= seen
        seen.add(spec.name)


def test_a_checkpoint_that_the_user_names_wins():
    specs = [paper("classification"), paper("detection", {"model.init_args.checkpoint": "/w.pth"})]
    assert [spec.needs for spec in build_graph(specs, lambda kind: Resources())] == [(), ()]


def test_another_classification_is_another_detection():
    graphs = [
        build_graph([paper("classification", change), paper("detection")], lambda kind: Resources())
        for change in ({}, {"trainer.max_epochs": 100})
    ]
    assert graphs[0][1].hash != graphs[1][1].hash


@pytest.mark.parametrize(
    ("task", "nodes", "devices", "per_process", "accumulate"),
    [
        ("classification", 1, 8, 256, 1),
        ("classification", 8, 8, 32, 1),
        ("classification", 1, 1, 256, 8),
        ("classification", 1, 3, None, None),
        ("detection", 1, 8, 2, 1),
        ("detection", 2, 8, 1, 1),
        ("detection", 1, 1, 2, 8),
        ("detection", 8, 8, None, None),
        ("segmentation", 1, 4, 2, 2),
    ],
)
def test_processes_share_the_recipes_global_batch(
    task: str, nodes: int, devices: int, per_process: int | None, accumulate: int | None
):
    if per_process is None:
        with pytest.raises(UserError, match=f"{task} has .* which {nodes * devices} processes cannot share"):
            on(nodes, devices, paper(task))
        return
    spec = on(nodes, devices, paper(task))
    batch = batch_of(spec)
    assert (batch.per_process, batch.accumulate, batch.processes) == (per_process, accumulate, nodes * devices)
    assert batch.total == batch.recipe == {"classification": 2048}.get(task, 16)
    assert batch.lr == {"classification": 2e-3, "detection": 1e-4, "segmentation": 6e-5}[task]
    assert spec.hash == on(1, 8, paper(task)).hash  # other resources, the same run


def test_the_shared_batch_is_what_the_trainer_and_the_data_get(tmp_path: Path):
    options = {"data.init_args.data_dir": str(ensure_embedded("segmentation")), "data.init_args.num_workers": 0}
    spec = trained("segmentation", "paper", options, model="efficientvmamba_t", device="cpu")
    cli = EvmambaCLI(cli_arguments(on(1, 1, spec), tmp_path), run=False)
    assert (cli.datamodule.batch_size, cli.trainer.accumulate_grad_batches) == (2, 8)


def test_a_batch_of_the_users_own_is_per_process_and_the_learning_rate_is_said():
    spec = on(8, 8, paper("detection", {"data.init_args.batch_size": 1}))
    assert spec.global_batch == 64
    assert spec.resources.batch_size is None
    assert str(batch_of(spec)) == "64 images a step = 1 x 64 processes (recipe 16), lr 0.0004: x 4, linearly"
    tiny = trained("classification", "tiny", {}, model="resnet18")
    shared = on(1, 2, tiny)
    assert str(batch_of(shared)) == "16 images a step = 8 x 2 processes, the recipe's; lr 0.002"
    assert shared.hash == on(1, 1, tiny).hash == tiny.hash
    own = on(1, 2, trained("classification", "tiny", {"data.init_args.batch_size": 16}, model="resnet18"))
    assert "32 images a step = 16 x 2 processes (recipe 16), lr 0.002: not scaled" in str(batch_of(own))


def test_a_batch_that_no_recipe_names_is_shared_too():
    spec = trained("segmentation", "tiny", {}, model="resnet18")
    del spec.settings["data"]["init_args"]["batch_size"]  # the data module's own then
    assert str(batch_of(on(1, 4, spec))) == "16 images a step = 4 x 4 processes, the recipe's; lr 0.008"


def test_other_processes_share_the_batch_anew():
    spec = on(1, 1, on(8, 8, paper("classification")))
    assert spec == on(1, 1, paper("classification"))


def test_the_suggestion_of_a_refusal_works():
    with pytest.raises(UserError, match=r"--nodes detection=N.*; 16 would do") as raised:
        on(8, 8, paper("detection"))
    assert "--set detection.data.init_args.batch_size=1 is 64 images a step, lr x 4" in str(raised.value)
    on(2, 8, paper("detection"))
    on(8, 8, paper("detection", {"data.init_args.batch_size": 1}))


def test_the_tree_shows_what_waits_for_what():
    graph = build_graph(everything(), lambda kind: Resources(1, 8))
    console = Console(width=100, file=io.StringIO())
    console.print(tree(graph, lambda spec: spec.kind, "report"))
    assert console.file.getvalue().splitlines() == [
        "cost",
        "classification",
        "├── detection",
        "└── segmentation_training",
        "    └── segmentation_evaluation",
        "report",
    ]
