"""What `fit` does in a folder where a training was before: continue it, refuse it, call it finished, or begin anew."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from evmamba.errors import UserError, first_few
from evmamba.files import write_text
from evmamba.tasks.plain_files import read_yaml
from evmamba.tasks.training import slurm_job
from evmamba.tasks.training.agreed_start import Continuation
from evmamba.tasks.training.checkpoint_files import candidates, newest_whole

CONFIG_FILE = "config.yaml"
# What a training leaves in its folder, and --fresh moves away.
LEFT_BEHIND = ("checkpoints", CONFIG_FILE, "metrics.csv", "tensorboard", "result.json", "gallery", "hpc_ckpt_*.ckpt")
# Options that do not change what is computed (a name ending in "_" stands for all that begin so).
IGNORED_OPTIONS = (
    "ckpt_path",
    "config",
    "timeout",
    "weights_only",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.num_nodes",
    "trainer.num_sanity_val_steps",
    "trainer.plugins",
    "trainer.profiler",
    "trainer.strategy",
    "data.init_args.num_workers",
    "data.init_args.eval_batch_size",
)
# Options that somebody may have good reason to change on the way; the training is then not quite the same.
WARNED_OPTIONS = (
    "trainer.accumulate_grad_batches",
    "trainer.callbacks",
    "trainer.check_val_every_n_epoch",
    "trainer.limit_val_batches",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.min_epochs",
    "trainer.min_steps",
    "trainer.val_check_interval",
    "data.init_args.batch_size",
    "data.init_args.data_dir",
)


def find_continuation(root: Path, config: Mapping[str, Any]) -> Continuation:
    """Look for a training in `root` that the same command began, and say in one line what is found.

    Torn checkpoints are skipped with a warning and get the ending ``.torn``. One process does this for all.

    Args:
        root: the run's folder.
        config: plain configuration of the training that is to run.

    Raises:
        UserError: the training there had other options, or no checkpoint of it is whole.
    """
    found = candidates(root)
    if not found:
        return Continuation()
    checkpoint, torn = newest_whole(found)
    if checkpoint is None:
        raise UserError(
            f"no checkpoint in {root} is whole ({', '.join(path.name for path in torn)}); --fresh begins anew "
            "and keeps them aside"
        )
    for path in torn:
        rank_zero_warn(f"{path} is torn; continuing from {checkpoint.path} instead")
        path.rename(path.with_name(f"{path.name}.torn"))
    compare_configs(root / CONFIG_FILE, config)
    if checkpoint.ended is not None and _limits(config) == {k: checkpoint.ended.get(k) for k in _limits(config)}:
        rank_zero_info(f"training in {root} is finished ({checkpoint.step} steps); --fresh begins anew")
        return Continuation(checkpoint.path, finished=True, step=checkpoint.step)
    rank_zero_info(f"continuing the training in {root} from {checkpoint.path.name}, step {checkpoint.step}")
    return Continuation(checkpoint.path, step=checkpoint.step)


def _limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are set; Lightning puts in 1000 epochs and -1 steps for the others."""
    limits = {name: config["trainer"].get(name) for name in ("max_epochs", "max_steps")}
    return {name: value for name, value in limits.items() if value not in (None, -1)}


def compare_configs(path: Path, config: Mapping[str, Any]) -> None:
    """Compare the configuration that a training was begun with (`path`) with the one of now.

    Raises:
        UserError: options differ that make it another training. One that the earlier configuration could not name, as
            it is of a later version, is warned about.
    """
    if not path.is_file():
        return
    before = dict(_flat(read_yaml(path)))
    now = dict(_flat(config))
    keys = [key for key in before.keys() | now.keys() if not _matches(key, IGNORED_OPTIONS)]
    differing = sorted(key for key in keys if before.get(key) != now.get(key))
    added = {key for key in differing if key not in before and not _parents(key) & before.keys()}
    refused = [key for key in differing if not _matches(key, WARNED_OPTIONS) and key not in added]
    if refused:
        changes = first_few((f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in refused), 4)
        raise UserError(
            f"{path.parent} holds a training with other options ({changes}); give the same ones to continue it, "
            "another --trainer.default_root_dir, or --fresh to begin anew"
        )
    warned = [key for key in differing if _matches(key, WARNED_OPTIONS) or key in added]
    if warned:
        changes = ", ".join(
            f"{key} is {now[key]!r} and was no option then"
            if key in added
            else f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in warned
        )
        rank_zero_warn(f"options changed since the training began: {changes}")


def _parents(key: str) -> set[str]:
    """The groups that an option is in: one that was null, or empty, is named as if it were an option."""
    parts = key.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _matches(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name if name.endswith("_") else f"{name}.") for name in names)


def write_config(root: Path, text: str) -> None:
    """Keep the configuration of the training that begins or continues now."""
    write_text(root / CONFIG_FILE, text)


def is_restarted() -> bool:
    """Whether SLURM has started this job before: a ``--fresh`` in its script was meant for that first time."""
    return slurm_job.restarts() > 0


def move_aside(root: Path) -> None:
    """Move what an earlier training left into ``root/earlier-N``; nothing is deleted. One process does it for all."""
    left = [path for pattern in LEFT_BEHIND for path in root.glob(pattern)]
    if not left:
        return
    number = 1
    while (aside := root / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    rank_zero_info(f"the earlier training was moved to {aside}")
