"""The model card of a published network: what it is, how to use it, how good it is, where it comes from.

Only what is known is said: numbers are those of a result file that tested these weights, never of another network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from evmamba.errors import UserError
from evmamba.launch.store.results import FILE_NAME, Result, read_result, trained_from_scratch
from evmamba.tasks import TASKS

LICENSE = "apache-2.0"
PAPER = "https://arxiv.org/abs/2403.09977"
# A checkpoint's name, and how a result says that it tested these weights.
TESTED_AS = {"best": "best epoch", "last": "last epoch"}


def result_of(checkpoint: Path) -> Result | None:
    """The result that lies in the folder of a checkpoint's run, if it is a test of this very checkpoint."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if not (folder / FILE_NAME).is_file():
            continue
        result = read_result(folder / FILE_NAME)
        weights = str(result.protocol.get("weights") or "")
        name = weights.removeprefix("checkpoint ")
        same = name != weights and Path(name).resolve() == checkpoint.resolve()
        if result.finished and result.metrics and (same or TESTED_AS.get(checkpoint.stem, "?") in weights):
            return result
    return None


def card_of(
    name: str, kind: str, outputs: str, class_names: list[str], result: Result | None, license: str = LICENSE
) -> ModelCard:
    """Write a card.

    Args:
        name: of the repository, for titles and for the lines to paste.
        kind: class of the network, in `evmamba`.
        outputs: what comes out of it.
        class_names: of its outputs; empty where it has none.
        result: a test of these weights; None: there is none.
        license: of the weights, the hub's identifier.
    """
    data = ModelCardData(
        license=license,
        library_name="evmamba",
        tags=["efficientvmamba", "vision", "state-space"],
        pipeline_tag="image-classification" if class_names else "image-feature-extraction",
        model_name=name.rpartition("/")[2] or name,
        eval_results=_evaluations(result) if result else None,
    )
    parts = [
        f"# {name.rpartition('/')[2] or name}",
        _what(kind, outputs, class_names, result),
        _usage(name, kind, result),
    ]
    parts += [_numbers(result), _origin(result)] if result else ["## Numbers\n\nNo test of these weights was given."]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _what(kind: str, outputs: str, class_names: list[str], result: Result | None) -> str:
    model = f" `{result.model}`" if result else ""
    text = f"EfficientVMamba{model} ([paper]({PAPER})), `evmamba.{kind}`: normalised RGB images to {outputs}."
    if class_names:
        shown = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
        text += f"\n\n{len(class_names)} classes: {shown}."
    return text


def _usage(name: str, kind: str, result: Result | None) -> str:
    side = (result.protocol.get("image_size") if result else None) or 224
    return f"""## Use

```python
import evmamba
from PIL import Image
from timm.data import create_transform

model = evmamba.{kind}.from_pretrained("{name}").eval()
transform = create_transform({side}, interpolation="bicubic")  # resize, centre crop, ImageNet's mean and deviation
outputs = model(transform(Image.open("photo.jpg").convert("RGB"))[None])
```"""


def _evaluations(result: Result) -> list[EvalResult]:
    data = str((result.data or {}).get("name") or "unknown")
    return [
        EvalResult(
            task_type=f"image-{result.task}",
            dataset_type=data,
            dataset_name=data,
            metric_type=metric.key,
            metric_name=metric.header,
            metric_value=round(value * metric.scale, metric.digits + 1),
        )
        for metric in TASKS[result.task].metrics_of(result.head)
        if (value := result.metrics.get(metric.key)) is not None
    ]


def _numbers(result: Result) -> str:
    data = result.data or {}
    rows = [
        f"| {metric.header} | {value * metric.scale:.{metric.digits}f} |"
        for metric in TASKS[result.task].metrics_of(result.head)
        if (value := result.metrics.get(metric.key)) is not None
    ]
    on = "Of the whole network that it was trained in, on" if TASKS[result.task].network_at is None else "On"
    where = (
        f"{on} {data.get('val_images')} validation images of {data.get('name')} "
        f"(fingerprint `{data.get('fingerprint')}`)"
    )
    protocol = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.protocol.items())
    return "\n".join([f"## Numbers\n\n{where}; {protocol}.\n", "| metric | |", "|---|---|", *rows])


def _origin(result: Result) -> str:
    origin, training, data = result.provenance, result.training, result.data or {}
    commit = origin.get("git_commit")
    start = {True: "random weights", False: "trained weights", None: None}[trained_from_scratch(result)]
    checkpoint = ((((origin.get("config") or {}).get("model") or {}).get("init_args")) or {}).get("checkpoint")
    facts: Mapping[str, Any] = {
        "training data": f"{data.get('train_images')} images of {data.get('name')}"
        if data.get("train_images")
        else None,
        "began with": f"{start}{f' (`{Path(str(checkpoint)).name}`)' if checkpoint else ''}" if start else None,
        "length": f"{training['epochs']} epochs, {training['steps']} steps" if training.get("steps") else None,
        "seed": origin.get("seed"),
        "device": f"{origin.get('device')}, {origin.get('precision')}",
        "code": f"commit `{commit[:12]}`{' with changes' if origin.get('git_dirty') else ''}" if commit else None,
        "versions": ", ".join(f"{name} {version}" for name, version in (origin.get("versions") or {}).items()),
        "configuration": f"`{origin.get('config_hash')}`",
    }
    lines = [f"- {name}: {text}" for name, text in facts.items() if text not in (None, "")]
    return "## Where it comes from\n\n" + "\n".join(lines)


def read_card_result(path: Path) -> Result:
    """A result file that the user names for the card.

    Raises:
        UserError: it is no result of a finished test.
    """
    result = read_result(path)
    if not result.finished or not result.metrics:
        raise UserError(f"{path}: no result of a finished test, so it says nothing for a model card")
    return result
