"""What several subcommands need."""

import argparse
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from evmamba.errors import UserError
from evmamba.launch.commands.parser import Parser
from evmamba.tasks import TASKS, Task

if TYPE_CHECKING:
    from evmamba.launch.bench.plan import BenchOptions


# Keys of a cluster's YAML, which are options too.
CLUSTER_OPTIONS = {
    "account": "to charge",
    "partition": "or several, with commas",
    "qos": "quality of service",
    "time": "limit, e.g. 24:00:00, or classification=2-00:00:00",
    "nodes": "number of nodes (default: 1)",
    "gpus_per_node": "one process each (default: 1); 0 for none",
    "gres": "the GPUs in the cluster's own words instead, e.g. gpu:a100:8",
    "tasks_per_node": "processes per node (default: one per GPU)",
    "cpus_per_task": "cores per process, loading included",
    "mem": "memory per node, e.g. 200G; 0 is all",
    "exclusive": "true: no other job on the nodes (default: for cost runs)",
    "gpus_per_task": "1: ask for GPUs by the process, where a site wants that",
    "numa": "true: every process on cores and memory of its own",
    "strategy": "ddp, deepspeed_stage_1, ... (default: DDP)",
    "interface": "network interface between nodes, e.g. ib0",
    "container": "command before python, e.g. 'apptainer exec --nv evmamba.sif'",
    "apptainer": "image for Apptainer in place of a command",
    "pyxis": "image for srun --container-image (NVIDIA's pyxis)",
    "mounts": "a folder for the image, or /here:/there; may be repeated",
    "python": "interpreter (default: this one, in a container: python)",
    "environment": "a shell line before the run, e.g. 'module load cuda'; may be repeated",
    "sbatch": "another option of sbatch, e.g. --sbatch=--constraint=a100; may be repeated",
    "srun": "another option of srun, e.g. --srun=--cpu-bind=cores; may be repeated",
    "chain": "jobs for each training, one after the other, where requeueing is forbidden",
    "array": "trainings that differ by their seed as one array job, so many at once",
    "max_jobs": "jobs of this benchmark at once; the others are submitted when one has ended",
    "warning": "seconds before the time limit at which a training saves (default: 90, or what its checkpoints need)",
}


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def need_extra() -> None:
    """The training libraries are an extra; without them say so before an ImportError does."""
    try:
        metadata.version("lightning")
    except metadata.PackageNotFoundError:
        raise UserError(
            "training and reports need more libraries; in evmamba's folder: pip install '.[tasks]'"
        ) from None


def add_bench_options(parser: Parser) -> None:
    """The options that say what a benchmark is made of, wherever it runs; `bench_options` reads them."""
    parser.add_argument(
        "--suite", help="main, peers, ablations, resolution or paper: a comparison that says what is not given here"
    )
    parser.add_argument("--backbones", help="names, with commas (default: efficientvmamba_t, or the suite's)")
    for task in TASKS:
        parser.add_argument(f"--{task}", metavar="DIR", help=f"data folder for {task}")
    parser.add_argument("--tasks", help="which tasks, with commas (default: those with a folder, else all, embedded)")
    for option, record in _head_options().items():
        keys = ", ".join(head.key for head in record.heads)
        parser.add_argument(
            f"--{option}", help=f"with commas: {keys} (default: {record.default_head.key}, or the suite's)"
        )
    parser.add_argument(
        "--preset", help="tiny, small, finetune or paper (default: small with a data folder, tiny without)"
    )
    parser.add_argument("--output", type=Path, default=Path("bench"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--seeds", "--seed", default="0", help="with commas: every training once with each (default: %(default)s)"
    )
    parser.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="N",
        help="also every network's own best of N trials (learning rate, decay, drop path) on held-out training images",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--precision",
        help="Lightning's name, e.g. 32-true, bf16-mixed (default: bf16-mixed on a GPU, else the recipe's)",
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="start every training from the weights published for its backbone"
    )
    parser.add_argument(
        "--exported",
        action="store_true",
        help="test trained networks as ONNX files too, float32 and INT8: accuracy, size and latency in onnxruntime",
    )
    parser.add_argument(
        "--logger",
        action="append",
        default=[],
        metavar="NAME",
        help="log trainings there too: wandb, mlflow, comet or trackio; may be repeated",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[TASK.]OPTION=VALUE",
        help="override a recipe, e.g. trainer.max_epochs=3 or detection.data.init_args.batch_size=4; may be repeated",
    )


def _numbers(text: str, option: str) -> list[int]:
    if not all(name.isdecimal() for name in names(text)):
        raise UserError(f"{option} {text}: write whole numbers with commas between them, e.g. {option} 0,1,2")
    return [int(name) for name in names(text)]


def _head_options() -> dict[str, Task]:
    """Options that choose heads (``detectors``) -> the task that has them."""
    return {f"{task.head_option}s": task for task in TASKS.values() if task.head_option}


def bench_options(given: argparse.Namespace) -> "BenchOptions":
    from evmamba.launch.bench.plan import BenchOptions

    return BenchOptions(
        output=given.output,
        suite=given.suite,
        backbones=names(given.backbones) if given.backbones is not None else None,
        tasks=names(given.tasks) if given.tasks is not None else None,
        data={task: folder for task in TASKS if (folder := getattr(given, task)) is not None},
        heads={
            task.name: names(value)
            for option, task in _head_options().items()
            if (value := getattr(given, option)) is not None
        },
        preset=given.preset,
        seeds=_numbers(given.seeds, "--seeds"),
        device=given.device,
        precision=given.precision,
        pretrained=given.pretrained,
        exported=given.exported,
        overrides=given.set,
        loggers=given.logger,
        search=given.search,
    )


def add_cluster_options(parser: Parser) -> None:
    """The options that say what jobs ask of a cluster; `cluster_options` reads them."""
    group = parser.add_argument_group("cluster")
    group.add_argument("--cluster", type=Path, metavar="FILE", help="YAML file; its keys are these options")
    for key, what in CLUSTER_OPTIONS.items():
        name = f"--{key.replace('_', '-')}"
        group.add_argument(name, action="append", dest=f"job_{key}", metavar="[KIND=]VALUE", help=what)


def cluster_options(given: argparse.Namespace) -> dict[str, list[str]]:
    """Key of a cluster's YAML -> values as given."""
    return {key: values for key in CLUSTER_OPTIONS if (values := getattr(given, f"job_{key}"))}
