"""Results as a study would leave them: several models and seeds on three tasks, failures, ablations, sweeps, pictures.

The numbers are made up (by a formula, not at random). ``python tests/launch/showcase.py FOLDER`` writes them with a
report, to be looked at.
"""

import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from evmamba.launch.report.build import report_from, write_report
from evmamba.launch.store.results import Result, write_result

CLASSES = {
    "classification": [
        "dress",
        "hat",
        "longsleeve",
        "outwear",
        "pants",
        "shirt",
        "shoes",
        "shorts",
        "skirt",
        "t-shirt",
    ],
    "detection": ["platelets", "red blood cell", "white blood cell"],
    "segmentation": ["sky", "tree", "road", "grass", "water", "building", "mountain", "foreground"],
}
HEADS = {"classification": "linear", "detection": "maskrcnn", "segmentation": "upernet"}
# Parameters [M], MACs [G], latency [ms], quality.
MODELS = {
    "efficientvmamba_t": (6.49, 0.81, 4.1, 0.74),
    "efficientvmamba_s": (11.27, 1.34, 4.6, 0.765),
    "efficientvmamba_b": (33.72, 4.0, 7.9, 0.79),
    "vim_tiny": (7.15, 1.5, 8.8, 0.70),
    "resnet18": (11.69, 1.82, 1.9, 0.71),
    "swin_tiny_patch4_window7_224": (28.29, 4.5, 5.8, 0.775),
}
SEEDS = (0, 1, 2)
START = "2026-03-01T10:00:00+00:00"


def origin(seed: int, model: str, task: str) -> dict:
    return {
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": False,
        "config": {"model": {"backbone": model}, "data": {"seed": seed}, "trainer": {"max_epochs": 20}},
        "config_hash": "0123456789ab",
        "seed": seed,
        "versions": {"python": "3.11.7", "evmamba": "0.1.0", "torch": "2.14.1"},
        "device": "NVIDIA H200",
        "precision": "bf16-mixed",
        "nodes": 1,
        "processes": 1,
        "start": START,
        "duration_s": 321.4,
    }


def cost_result(model: str, head: str | None = None) -> Result:
    parameters, macs, latency, _ = MODELS[model.split("-")[0]]
    cost = {"parameters": parameters * 1e6, "macs": macs * 1e9, "macs_plain": macs * 8e8, "batch_size": 64}
    sweeps = {}
    size = [3, 224, 224]
    if head:
        size, grown = ([3, 512, 2048], 21) if head == "upernet" else ([3, 800, 1280], 20)
        cost |= {"parameters": (parameters + 20) * 1e6, "macs": (macs * grown + 150) * 1e9, "batch_size": 1}
    else:
        cost |= {
            "latency_ms_median": latency,
            "latency_ms_p95": latency * 1.07,
            "images_per_s": 30000 / macs**0.7,
            "train_images_per_s": 9000 / macs**0.7,
            "peak_memory_mb": 900 * macs**0.6,
            "peak_memory_kind": "CUDA tensors",
        }
        power = 2.0 if model.startswith("swin") else 1.0
        sweeps["input_size"] = [
            {
                "input_size": side,
                "macs": macs * 1e9 * (side / 224) ** (2 * power),
                "latency_ms_median": latency * max(1.0, (side / 384) ** (2 * power)),
                "peak_memory_mb": 60 * macs * (side / 224) ** 2,
            }
            for side in (224, 384, 512, 768, 1024, 1280, 1536)
        ]
        sweeps["batch_size"] = [
            {
                "batch_size": 2**n,
                "images_per_s": 2**n / (latency * 1e-3 + 2**n * macs**0.7 / 30000),
                "peak_memory_mb": 30 * 2**n,
            }
            for n in range(10)
        ] + [{"batch_size": 1024, "failed": "out of memory"}]
    return Result(
        run=f"cost-{head or 'bare'}-{model}",
        task="cost",
        model=model,
        head=head,
        cost=cost,
        sweeps=sweeps,
        protocol={"input_size": size},
        provenance=origin(0, model, "cost") | {"config": {}},
    )


def training_result(task: str, model: str, seed: int, quality: float) -> Result:
    value = quality * (1.0 + 0.012 * math.sin(7 * seed + len(model)))
    metrics = {
        "classification": {"top1": value, "top5": min(0.99, value + 0.18)},
        "detection": {
            f"{m}{k}": value * f * (0.92 if m else 1.0)
            for m in ("", "mask_")
            for k, f in (("AP", 0.6), ("AP50", 0.9), ("AP75", 0.65))
        },
        "segmentation": {"mIoU": value * 0.7, "mIoU_ms": value * 0.715, "pixel_acc": value},
    }[task]
    names = CLASSES[task]
    share = [value * (0.6 + 0.4 * math.cos(k)) for k in range(len(names))]
    key = {"classification": "accuracy", "detection": "AP", "segmentation": "IoU"}[task]
    details: dict = {"per_class": {name: {key: share[k], "images": 30 + k} for k, name in enumerate(names)}}
    if task != "detection":
        count = len(names)
        details["confusion"] = [
            [round(100 * share[r]) if r == c else round(100 * (1 - share[r]) / (count - 1)) for c in range(count)]
            for r in range(count)
        ]
    return Result(
        run=f"{task}-{model}-{seed}",
        task=task,
        model=model,
        head=HEADS[task],
        data={
            "name": f"small_{task}",
            "split": "val",
            "train_images": 1000,
            "val_images": 340,
            "num_classes": len(names),
            "fingerprint": "2edb9c46b9db7425",
        },
        metrics=metrics,
        cost={"parameters": MODELS[model.split("-")[0]][0] * 1e6},
        protocol={"weights": "last epoch", "test_time_augmentation": "none", "eval_batch_size": 1},
        training={
            "steps": 2000,
            "epochs": 20,
            "images": 64000,
            "seconds": 300.5,
            "images_per_s": 950.2,
            "curve": [
                [10 * n, 2.5 * math.exp(-n / 60) + 1 - value + 0.05 * math.sin(n * (seed + 2))] for n in range(200)
            ],
            "validation": [[200 * n, {"top1": value * (1 - math.exp(-n / 3))}] for n in range(1, 11)],
        },
        sweeps={
            "input_size": [
                {"input_size": s, "top1": value - 0.2 * abs(math.log(s / 224))} for s in (112, 160, 224, 320, 448)
            ]
        }
        if task == "classification" and seed == 0
        else {},
        details=details,
        provenance=origin(seed, model, task),
    )


def draw_gallery(result: Result, folder: Path) -> None:
    (folder / "gallery").mkdir(parents=True)
    for n, name in enumerate(("000", "001", "002", "worst_000")):
        wide = result.task != "classification"
        picture = Image.new("RGB", (960 if wide else 320, 340), (210, 220, 200))
        pen = ImageDraw.Draw(picture)
        for k in range(2 if wide else 1):
            pen.rectangle((40 + 480 * k, 60 + 10 * n, 240 + 480 * k, 260), outline=(180, 40, 30), width=4)
        pen.text((12, 12), f"{result.model} {name}", fill="black")
        picture.save(folder / "gallery" / f"{name}.jpg")
    result.gallery = sorted(f"gallery/{path.name}" for path in (folder / "gallery").iterdir())


def write_showcase(folder: Path) -> None:
    """Write about a hundred results."""
    results: list[Result] = []
    for model, numbers in MODELS.items():
        results.append(cost_result(model))
        results += [cost_result(model, head) for head in ("maskrcnn", "upernet")]
        for task in HEADS:
            results += [training_result(task, model, seed, numbers[3]) for seed in SEEDS]
    for result in results:
        if (result.model, result.task) == ("vim_tiny", "detection"):
            result.status, result.reason = "failed", "OutOfMemoryError: CUDA out of memory (see run.log)"
            result.metrics, result.details, result.training = {}, {}, {}
    for tags, loss in (("ss2d", -0.004), ("nofusion", 0.02), ("eeee", 0.015)):
        model = f"efficientvmamba_t-{tags}"
        results.append(cost_result(model))
        results += [training_result("classification", model, seed, 0.74 - loss) for seed in SEEDS]
    for result in results:
        target = folder / "runs" / result.run
        if result.finished and result.task != "cost" and result.provenance["seed"] == 0 and "-" not in result.model:
            draw_gallery(result, target)
        write_result(result, target)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_showcase(root)
    print(*write_report(report_from([root]), root), sep="\n")
