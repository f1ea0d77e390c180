"""The named benchmarks of `evmamba bench --suite`: which networks meet which heads, and what else is measured.

A suite says what is compared, not on what: every one runs on the embedded data, on small real data or on the paper's
(`--preset tiny | small | paper`). Within a suite all networks of a task get the same data, recipe, images
per step and number of steps; only the paper's own recipes for T, S and B differ, in the decoder's width (but not among
peers) and in B's images per step on ImageNet.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evmamba.errors import UserError
from evmamba.launch.report.paper import OURS, paper
from evmamba.tasks import TASKS
from evmamba.tasks.classification import TASK as CLASSIFICATION

# Others' networks from 2 to 29 M parameters, by timm's names (Vim: plain, with a simple pyramid).
PEERS = (
    "vmamba_tiny",
    "vmamba_narrow",
    "vim_tiny",
    "efficientvim_m1",
    "efficientvim_m2",
    "resnet18",
    "resnet50",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "mobilenetv4_conv_medium",
    "mobilenetv4_hybrid_medium",
    "efficientnet_b0",
    "regnety_004",
    "regnety_008",
    "pvt_v2_b0",
    "pvt_v2_b1",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "convnext_tiny",
    "mambaout_femto",
    "mambaout_kobe",
    "mambaout_tiny",
    "fastvit_t8",
    "fastvit_t12",
    "repvit_m0_9",
    "repvit_m1_0",
    "starnet_s1",
    "starnet_s4",
    "efficientvit_b0",
    "efficientvit_b1",
)
# One switch at a time, then from the plain scan of the full map to the published network (as table 5 does).
ABLATED = (
    "efficientvmamba_t",
    "efficientvmamba_t-ss2d",
    "efficientvmamba_t-nofusion",
    "efficientvmamba_t-eeee",
    "efficientvmamba_t-iiee",
    "efficientvmamba_t-iiii",
    "efficientvmamba_t-step1",
    "efficientvmamba_t-step4",
    "efficientvmamba_t-ss2d-nofusion-eeee",
    "efficientvmamba_t-nofusion-eeee",
)
# They have three stages, with maps at strides 16, 32 and 64 only: suites compare them as classifiers. Table 3 has
# EfficientViT-M4 on RetinaNet, and does not say how it is adapted.
WITHOUT_PYRAMID = ("efficientvit_m4", "efficientvim_m1", "efficientvim_m2")


@dataclass(frozen=True)
class Entry:
    """One training: a backbone under a head. `schedule` is 1x or 3x where a detector has both, else None."""

    model: str
    task: str
    head: str
    schedule: str | None = None


@dataclass(frozen=True)
class Suite:
    """What a benchmark compares.

    Attributes:
        what: one line.
        models: in the order of the table's rows; each has its cost measured.
        tasks: which tasks; None: all that have embedded data.
        trained: the models that are trained; None: all of them.
        paper_tables: train exactly what the paper's tables list, in place of every model under every head.
        whole: count backbones with their heads as a whole too.
        input_sizes: sides in pixels of a sweep of the cost.
        test_scales: a network whose task is scalable is tested at these multiples of its training size.
        equal: heads are as wide for all (`Task.equal`), where the paper's recipes differ.
        multi_scale: tests are as thorough as the tasks' records say: segmentation with several scales and flips too.
        preset: the recipes on real data, unless the benchmark is told others.
    """

    what: str
    models: tuple[str, ...]
    tasks: tuple[str, ...] | None = None
    trained: tuple[str, ...] | None = None
    paper_tables: bool = False
    whole: bool = False
    equal: bool = False
    input_sizes: tuple[int, ...] = ()
    test_scales: tuple[float, ...] = ()
    multi_scale: bool = False
    preset: str = "small"


def paper_entries() -> list[Entry]:
    """The rows of the paper's tables whose network exists here, each once, and the trainings that they start from."""
    entries = [
        Entry(row["model"], table["task"], table["head"], table.get("schedule"))
        for table in paper()["tables"]
        for row in table["rows"]
        if "model" in row and row["model"] not in WITHOUT_PYRAMID
    ]
    bases = [
        Entry(entry.model, start, TASKS[start].default_head.key)
        for entry in entries
        if (start := TASKS[entry.task].starts_from)
    ]
    return list(dict.fromkeys([*entries, *bases]))


def _paper_models() -> tuple[str, ...]:
    names = dict.fromkeys([*OURS, *(entry.model for entry in paper_entries())])
    return tuple(names)


SUITES = {
    "main": Suite("EfficientVMamba T, S and B on three tasks", OURS, whole=True),
    "peers": Suite("EfficientVMamba and the light networks it competes with", OURS + PEERS, whole=True, equal=True),
    "ablations": Suite("scan, fusion, layout and atrous step, one switch each", ABLATED, tasks=(CLASSIFICATION.name,)),
    "resolution": Suite(
        "cost from 224 to 1536 pixels, and one training tested at other sizes",
        (*OURS, "efficientvmamba_t-ss2d", "vmamba_tiny", "vim_tiny", "resnet50", "swin_tiny_patch4_window7_224"),
        tasks=(CLASSIFICATION.name,),
        trained=("efficientvmamba_t",),
        input_sizes=(224, 384, 512, 768, 1024, 1280, 1536),
        test_scales=(0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0),
    ),
    "paper": Suite(
        "all that the paper's tables list and that exists here, with the paper's heads and schedules",
        _paper_models(),
        paper_tables=True,
        whole=True,
        multi_scale=True,
        preset="paper",
    ),
}


def entries_of(
    suite: Suite | None, models: Sequence[str], tasks: Iterable[str], heads: Mapping[str, Sequence[str]]
) -> list[Entry]:
    """The trainings of a suite, or of a benchmark without one, for these models and tasks.

    Args:
        suite: None: every model under every head.
        models: what the benchmark was told to compare, or the suite's own.
        tasks: likewise.
        heads: by task; of one that is not there its default head, or with `paper_tables` those of the tables.

    Raises:
        UserError: `paper_tables` has no row for these models and tasks.
    """
    tasks = tuple(tasks)
    if suite is not None and suite.paper_tables:
        wanted = [
            entry
            for entry in paper_entries()
            if entry.model in models and entry.task in tasks and entry.head in heads.get(entry.task, [entry.head])
        ]
        if not wanted:
            raise UserError(f"the paper's tables have nothing on {', '.join(models)} for {', '.join(tasks)}")
        order = list(TASKS)
        return sorted(wanted, key=lambda entry: (models.index(entry.model), order.index(entry.task)))
    trained = models if suite is None or suite.trained is None or tuple(models) != suite.models else suite.trained
    return [
        Entry(model, task.name, head)
        for model in trained
        for task in TASKS.values()
        if task.name in tasks and not (suite and task.pyramid and model in WITHOUT_PYRAMID)
        for head in dict.fromkeys(heads.get(task.name) or [task.default_head.key])
    ]
