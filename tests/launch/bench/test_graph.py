"""The graph of a benchmark: what starts from what, and how processes share a recipe's global batch."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from evmamba.errors import UserError
from evmamba.launch.bench.graph import batch_of, build_graph, share_batch, tree
from evmamba.launch.fit.recipes import recipe_of
from evmamba.launch.store.spec import Resources, RunSpec


def paper(task: str, *arguments: str, model: str = "efficientvmamba_t", seed: int = 0) -> RunSpec:
    head = {"classification": "linear", "detection": "retinanet", "segmentation": "upernet"}[task]
    recipe = str(recipe_of(task, "paper", head, model))
    return RunSpec(task, model, head, seed, "cuda", None, recipe=recipe, arguments=list(arguments))


def on(nodes: int, devices: int, spec: RunSpec) -> RunSpec:
    spec = replace(spec, resources=Resources(nodes, devices))
    share_batch(spec)
    return spec


def everything(model: str = "efficientvmamba_t", seed: int = 0) -> list[RunSpec]:
    trainings = [paper(task, model=model, seed=seed) for task in ("classification", "detection", "segmentation")]
    return [RunSpec("cost", model, None, seed, "cuda", None), *trainings]


def test_detection_and_segmentation_start_from_the_classification_of_the_same_model_and_seed():
    specs = everything() + everything("efficientvmamba_s") + everything(seed=1)
    graph = build_graph(specs, lambda kind: Resources(1, 8))
    names = {spec.name: spec for spec in graph}
    assert len(names) == 15
    starts = [(spec.task, spec.stage, spec) for spec in graph if spec.init_from]
    assert [(task, stage) for task, stage, _ in starts] == 3 * [
        ("detection", "fit_test"),
        ("segmentation", "fit"),
        ("segmentation", "test"),
    ]
    for task, stage, spec in starts:
        before = names[spec.init_from]
        assert (before.model, before.seed) == (spec.model, spec.seed)
        assert spec.init_hash == before.hash
        assert spec.needs == [before.name]
        assert before.task == ("segmentation" if stage == "test" else "classification"), task
    evaluations = [spec for spec in graph if spec.stage == "test"]
    assert all(spec.arguments[-1] == "--model.init_args.multi_scale=true" for spec in evaluations)


def test_the_graph_can_run_in_its_order_and_leaves_the_plan_as_it_was():
    specs = everything()
    before = [spec.hash for spec in specs]
    seen: set[str] = set()
    for spec in build_graph(specs, lambda kind: Resources(2, 8)):
        assert set(spec.needs) <= seen
        seen.add(spec.name)
    assert [spec.hash for spec in specs] == before
    assert all(spec.needs == [] for spec in specs)


def test_a_checkpoint_that_the_user_names_wins():
    specs = [paper("classification"), paper("detection", "--model.init_args.checkpoint=/w.pth")]
    assert [spec.needs for spec in build_graph(specs, lambda kind: Resources())] == [[], []]


def test_another_classification_is_another_detection():
    graphs = [
        build_graph([paper("classification", *change), paper("detection")], lambda kind: Resources())
        for change in ((), ("--trainer.max_epochs=100",))
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


def test_the_shared_batch_is_what_the_trainer_and_the_data_get():
    from evmamba.launch.fit.cli import EvmambaCLI
    from evmamba.launch.fit.training import cli_arguments
    from evmamba.tasks.embedded import ensure_embedded

    data = f"--data.init_args.data_dir={ensure_embedded('segmentation')}"
    spec = on(1, 1, paper("segmentation", data, "--data.init_args.num_workers=0"))
    spec.device = "cpu"
    cli = EvmambaCLI(cli_arguments(spec, Path("/tmp")), run=False)
    assert (cli.datamodule.batch_size, cli.trainer.accumulate_grad_batches) == (2, 8)


def test_a_batch_of_the_users_own_is_per_process_and_the_learning_rate_is_said():
    spec = on(8, 8, paper("detection", "--data.init_args.batch_size=1"))
    assert spec.global_batch == 64
    assert spec.resources.batch_size is None
    assert str(batch_of(spec)) == "64 images a step = 1 x 64 processes (recipe 16), lr 0.0004: x 4, linearly"
    tiny = RunSpec("classification", "resnet18", "linear", 0, "cpu", None, recipe="conf/classification/tiny.yaml")
    tiny.recipe = str(recipe_of("classification", "tiny", "linear", "resnet18"))
    shared = on(1, 2, tiny)
    assert str(batch_of(shared)) == "16 images a step = 8 x 2 processes, the recipe's; lr 0.002"
    assert shared.hash == on(1, 1, tiny).hash == tiny.hash
    own = on(1, 2, replace(tiny, arguments=["--data.init_args.batch_size=16"]))
    assert "32 images a step = 16 x 2 processes (recipe 16), lr 0.002: not scaled" in str(batch_of(own))


def test_the_suggestion_of_a_refusal_works():
    with pytest.raises(UserError, match=r"--nodes detection=N.*; 16 would do") as raised:
        on(8, 8, paper("detection"))
    assert "--set detection.data.init_args.batch_size=1 is 64 images a step, lr x 4" in str(raised.value)
    on(2, 8, paper("detection"))
    on(8, 8, paper("detection", "--data.init_args.batch_size=1"))


def test_the_tree_shows_what_waits_for_what():
    graph = build_graph(everything(), lambda kind: Resources(1, 8))
    console = Console(width=100, file=io.StringIO())
    console.print(tree(graph, lambda spec: f"{spec.task} {spec.stage}", "report"))
    assert console.file.getvalue().splitlines() == [
        "cost fit_test",
        "classification fit_test",
        "├── detection fit_test",
        "└── segmentation fit",
        "    └── segmentation test",
        "report",
    ]
