"""Proof of published numbers: weights evaluated under their protocol, checkpoints, and others' result files."""

import dataclasses
import json
import math
import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evmamba.checkpoints import read_file
from evmamba.errors import UserError, first_few, first_line
from evmamba.launch.fit.checkpoint_metadata import load_trained_network, load_weights
from evmamba.launch.fit.cli import EvmambaCLI
from evmamba.launch.fit.record import Background, ResultWriter, add_callbacks
from evmamba.launch.report.certificate import Comparison, compare, read_published, recomputed
from evmamba.launch.report.columns import columns_of
from evmamba.launch.report.over_images import kept
from evmamba.launch.report.paper import comparable, paper, published
from evmamba.launch.store.results import FILE_NAME, Result, config_hash, file_hash, now, read_result, write_json
from evmamba.pretrained import fetch, parse_source
from evmamba.pretrained import published as hosted
from evmamba.tasks import TASKS, Task
from evmamba.tasks.backbones import published_weights
from evmamba.tasks.data import TaskDataModule
from evmamba.tasks.module import TaskModule
from evmamba.tasks.record import PublishedProtocol
from evmamba.tasks.training.depth import classifier_of
from evmamba.variants import split_name

CERTIFICATE = "certificate.json"
# Metrics are stored as float32 sums; what was kept of the images is exact.
SAME = 1e-6


@dataclass
class Settings:
    """How to evaluate.

    Attributes:
        output: folder; each verification has one in it.
        device: Lightning's accelerator.
        precision: Lightning's name.
        batch_size: images of a step.
        jobs: loading processes.
        options: more of `evmamba test`'s options as ``option=value``.
        published: see `read_published`; empty: the paper's numbers, where the data is the paper's.
        tolerance: see `Comparison`.
        command: what was typed, for the certificate.
    """

    output: Path
    device: str = "auto"
    precision: str = "32-true"
    batch_size: int = 64
    jobs: int = 2
    options: Sequence[str] = ()
    published: Sequence[str] = ()
    tolerance: float | None = None
    command: str = ""


@dataclass
class Certificate:
    """What was found.

    Attributes:
        facts: weights, data, protocol, versions, command: for people and programs.
        comparisons: one a published number.
        faults: what of a result file does not hold.
    """

    facts: dict[str, Any]
    comparisons: list[Comparison]
    faults: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return not self.faults and all(comparison.agrees for comparison in self.comparisons)

    def write(self, folder: Path) -> Path:
        rows = [
            dataclasses.asdict(one) | {"difference": one.difference, "agrees": one.agrees} for one in self.comparisons
        ]
        path = folder / CERTIFICATE
        write_json(path, self.facts | {"numbers": rows, "faults": self.faults, "agrees": self.agrees})
        return path


def verify_weights(name: str, task: str, data: Path, settings: Settings, source: str | None = None) -> Certificate:
    """Evaluate a classifier's weights as their publisher does.

    Args:
        name: of the network, ours or timm's.
        task: one whose networks are a backbone alone.
        data: folder with validation images of all classes of the weights.
        settings: see `Settings`.
        source: of the weights; None: those that are published under the name.

    Raises:
        UserError: no published weights or number, weights that are of other classes than the data.
    """
    record = TASKS[task]
    if record.pyramid or record.published_protocol is None:
        raise UserError(
            f"backbone weights alone do no {task}; give the whole network with --checkpoint FILE (of evmamba fit)"
        )
    protocol: PublishedProtocol = record.load("published_protocol")(name)
    numbers = _numbers(settings, record, name, record.default_head.key)
    path = fetch(parse_source(source) if source else published_weights(name))
    cli = _built(
        settings,
        name,
        {"class_path": record.module, "init_args": {"backbone": name, "checkpoint": str(path)}},
        {"class_path": record.data, "init_args": {"data_dir": str(data), **protocol.options}},
    )
    _check_comparable(settings, record, cli.datamodule)
    _check_classifier(cli.model, record, path)
    protocol.apply(cli.datamodule)
    where = {"source": source or f"published for {name}", "file": path.name, **_commit(path), "sha256": file_hash(path)}
    return _tested(cli, settings, name, numbers, where, protocol.words)


def verify_checkpoint(path: Path, data: Path, settings: Settings) -> Certificate:
    """Test a checkpoint of `evmamba fit` or `bench` on data, under the options that it was trained with.

    Raises:
        UserError: see `load_trained_network`; data of other classes; no published number.
    """
    trained = load_trained_network(path)
    record = TASKS[trained.task]
    arguments = {k: v for k, v in trained.model["init_args"].items() if k not in ("num_classes", "checkpoint")}
    own = {"data_dir": str(data)}
    numbers = _numbers(settings, record, trained.backbone, record.head_in(arguments).key, trained.epochs)
    cli = _built(
        settings,
        path.stem,
        trained.model | {"init_args": arguments},
        {"class_path": record.data, "init_args": trained.data | own},
    )
    if list(cli.datamodule.class_names) != trained.class_names:
        odd = sorted({*cli.datamodule.class_names} ^ {*trained.class_names})
        raise UserError(
            f"{data} has other classes than {path} was trained for ({first_few(odd) or 'in another order'})"
        )
    _check_comparable(settings, record, cli.datamodule)
    load_weights(path, cli.model, trained.module.state_dict())  # --set may have changed how it is tested
    where = {"source": str(path), "sha256": file_hash(path)}
    changed = f", but {', '.join(settings.options)}" if settings.options else ""
    return _tested(cli, settings, trained.backbone, numbers, where, f"as it was trained{changed}")


def verify_result(path: Path, settings: Settings, data: Path | None = None) -> Certificate:
    """Check somebody's result file: its form, the hashes in it, and its metrics from what was kept of every image.

    Args:
        path: ``result.json``; the files that it names lie beside it.
        settings: its published numbers and tolerance count.
        data: the data that it says it is of, to compare fingerprints.

    Raises:
        UserError: no result file at all, or one without a test.
    """
    result = read_result(path)
    if not result.finished or result.task not in TASKS or not result.metrics:
        raise UserError(f"{path}: no result of a finished test")
    record = TASKS[result.task]
    faults = []
    origin = result.provenance
    if "config" in origin and config_hash(origin["config"]) != origin.get("config_hash"):
        faults.append("the configuration is not the one that config_hash is of")
    for name, digest in (result.details.get("sha256") or {}).items():
        file = path.parent / name
        if not file.is_file():
            faults.append(f"{name} is named and missing")
        elif file_hash(file) != digest:
            faults.append(f"{name} is not the file that the run wrote (SHA-256)")
    images = None if faults else kept(result)
    checked: list[str] = []
    rescored: dict[str, float] = {}
    if images is None:
        faults = faults or ["nothing was kept of the images: metrics cannot be computed again"]
    else:
        again = {metric: recomputed(images, metric) for metric in images.metrics}
        checked = [m for m, value in again.items() if math.isnan(value) or result.metrics.get(m) is not None]
        faults += _differing(result, {metric: again[metric] for metric in checked}, "the images")
    against = "what was kept of every image"
    if data is not None:
        module = _data_of(path, result, record, data)
        now, claimed = module.description()["fingerprint"], (result.data or {}).get("fingerprint")
        if now != claimed:
            faults.append(f"the result is of other data (fingerprint {claimed}) than {data} ({now})")
        elif images is not None and record.rescore is not None:
            rescored = record.load("rescore")(path.parent, module, images)
            faults += _differing(result, rescored, "the kept predictions")
            against = "the kept predictions and the data's labels"
    if images is not None:
        shown = [c.key for c in columns_of(record.name, result.head) if result.metrics.get(c.key) is not None]
        unproven = [metric for metric in shown if metric not in checked and metric not in rescored]
        faults += [f"{metric}: nothing was kept to compute it again" for metric in unproven]
    numbers = {}
    head = result.head or record.default_head.key
    ours = split_name(result.model)[0] in hosted() and published(result.model, record.name, head)
    if settings.published or (ours and comparable(record.name, result.data or {})):
        numbers = _numbers(settings, record, result.model, head, result.training.get("epochs"))
    facts = _facts(result, settings) | {
        "file": {"name": str(path), "sha256": file_hash(path)},
        "recomputed": f"{', '.join(checked)} from {against}" if checked else "nothing",
    }
    return Certificate(facts, compare(result, images, numbers, settings.tolerance, bool(settings.published)), faults)


def _built(settings: Settings, name: str, model: Mapping[str, Any], data: Mapping[str, Any]) -> EvmambaCLI:
    own = {
        "trainer.accelerator": settings.device,
        "trainer.devices": 1,
        "trainer.precision": settings.precision,
        "trainer.logger": "false",
        "trainer.default_root_dir": settings.output / name,
        "trainer.enable_model_summary": "false",
        "data.init_args.batch_size": settings.batch_size,
        "data.init_args.num_workers": settings.jobs,
    }
    arguments = [f"--model={json.dumps(model)}", f"--data={json.dumps(data)}"]
    arguments += [f"--{option}={value}" for option, value in own.items()]
    return EvmambaCLI([*arguments, *(f"--{option}" for option in settings.options)], run=False)


def _tested(
    cli: EvmambaCLI,
    settings: Settings,
    name: str,
    numbers: Mapping[str, str],
    weights: Mapping[str, Any],
    protocol: str,
) -> Certificate:
    folder = Path(cli.trainer.default_root_dir)
    background = Background(f"verify-{name}", cli.plain_config(), str(weights["source"]))
    add_callbacks(cli.trainer, ResultWriter(folder, background))
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    result = read_result(folder / FILE_NAME)
    facts = _facts(result, settings) | {"weights": dict(weights), "protocol": protocol}
    certificate = Certificate(
        facts, compare(result, kept(result), numbers, settings.tolerance, bool(settings.published))
    )
    certificate.write(folder)
    return certificate


def _facts(result: Result, settings: Settings) -> dict[str, Any]:
    data = {
        key: value
        for key, value in (result.data or {}).items()
        if key in ("name", "split", "val_images", "test_images", "num_classes", "fingerprint")
    }
    origin = result.provenance
    return {
        "network": f"{result.model}, {result.task} {result.head or ''}".rstrip(),
        "data": data,
        "device": f"{origin.get('device')}, {origin.get('precision')}",
        "versions": origin.get("versions", {}) | ({"commit": c[:12]} if (c := origin.get("git_commit")) else {}),
        "date": now().date().isoformat(),
        "command": settings.command,
    }


def _numbers(settings: Settings, task: Task, model: str, head: str, epochs: float | None = None) -> dict[str, str]:
    """Published numbers as printed: given ones, or for the paper's own networks the paper's after as many epochs."""
    if settings.published:
        return read_published(settings.published, task.name, head)
    record = task.head(head)
    schedule = record.schedule_of(epochs)
    row = published(model, task.name, head, schedule)
    # The paper quotes others' networks too; timm has other weights for them.
    if row is None or split_name(model)[0] not in hosted():
        raise UserError(
            f"no published number of {model} ({task.name}, {head}) is known here; give it as printed: "
            f"--published {task.metrics_of(head)[0].key}=NUMBER"
        )
    if record.schedules and schedule is None:
        lengths = " or ".join(map(str, record.schedules.values()))
        raise UserError(
            f"the paper has {record.name} after {lengths} epochs, and this one does not say that it was trained for so "
            f"many; give its number as printed: --published {task.metrics_of(head)[0].key}=NUMBER"
        )
    known = {metric.key for metric in task.metrics_of(head)}
    return {key: str(value) for key, value in row.numbers.items() if key in known}


def _check_comparable(settings: Settings, task: Task, data: TaskDataModule) -> None:
    described = data.description()
    if settings.published or comparable(task.name, described):
        return
    reference = paper()["data"][task.name]
    raise UserError(
        f"the paper's numbers are of {reference['name']} ({reference['num_classes']} classes, "
        f"{reference['val_images']} validation images), and {data.root} has {described['num_classes']} and "
        f"{described['val_images']}: give the number known for it with --published {task.metrics[0].key}=NUMBER"
    )


def _check_classifier(module: TaskModule, task: Task, path: Path) -> None:
    """Loading leaves a classifier for other classes out, and a random one would be tested."""
    network = module.get_submodule(task.backbone_at)
    content = read_file(path)
    nested = [value for value in content.values() if isinstance(value, Mapping)]
    tensors = [v for part in (content, *nested) for v in part.values() if isinstance(v, torch.Tensor)]
    for name in classifier_of(network):
        own = network.get_parameter(name).detach().cpu()
        if not any(own.shape == t.shape and torch.equal(own, t.to(own.dtype)) for t in tensors):
            raise UserError(f"the weights in {path} have no classifier for the data's {module.num_classes} classes")


def _commit(path: Path) -> dict[str, str]:
    """The commit of the hub that a file of its cache is of."""
    parts = path.parts
    return {"commit": parts[parts.index("snapshots") + 1]} if "snapshots" in parts[:-1] else {}


def _differing(result: Result, again: Mapping[str, float], source: str) -> list[str]:
    """Metrics of a result that are others than those computed again; undefined ones are NaN, and negative there."""
    faults = []
    for metric, value in again.items():
        stored = result.metrics.get(metric)
        claimed = math.nan if stored is None or stored < 0 else stored
        undefined = math.isnan(value) or value < 0
        if not (abs(claimed - value) <= SAME or (math.isnan(claimed) and undefined)):
            faults.append(f"{metric} is {claimed:.6f}, computed again from {source} it is {value:.6f}")
    return faults


def _data_of(path: Path, result: Result, task: Task, folder: Path) -> TaskDataModule:
    """The data module of a result's own options, on a folder.

    Raises:
        UserError: what the module says of the folder; options that it has not.
    """
    config = result.provenance.get("config") or {}
    try:
        arguments = dict((config.get("data") or {}).get("init_args") or {})
        arguments.pop("staging_dir", None)  # a folder of the machine that it ran on
        return pydoc.locate(task.data)(**(arguments | {"data_dir": str(folder)}))  # type: ignore[operator]
    except UserError:
        raise
    except Exception as error:  # of a stranger's options anything may come
        raise UserError(f"{path}: its options of the data are none of this evmamba ({first_line(error)})") from error
