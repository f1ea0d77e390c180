"""Classification: cross-entropy with mixup and cutmix, top-1 and top-5."""

import functools
from typing import Any, ClassVar

import torch
from PIL import Image
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from evmamba.errors import UserError
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.classification.gallery import draw_prediction
from evmamba.tasks.classification.per_image import Right
from evmamba.tasks.evaluation import Evaluation
from evmamba.tasks.module import TaskModule
from evmamba.tasks.per_image import PER_IMAGE_FILE
from evmamba.tasks.training.optim import DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE, OptimizerConfig, ScheduleConfig

# A larger matrix would make result files of many megabytes that nobody reads.
MAX_CONFUSION_CLASSES = 200


class ClassificationModule(TaskModule):
    """A backbone with its classifier.

    Metrics, fractions in [0, 1]: ``top1``; ``top5``, the right class among the five most probable (among all of them,
    hence 1, with five classes or fewer); ``loss``, the plain cross-entropy in nats without smoothing. ``details``:
    ``per_class`` {class: accuracy, images} and, up to 200 classes, ``confusion`` [true][predicted] counts.

    Args:
        backbone: one of our models or any timm model by name.
        num_classes: linked to the data's by the command line.
        checkpoint: weights to start from, as of `build_backbone`: a file, a URL, `hf-hub:USER/REPOSITORY`, or
            `pretrained` for the published ones; a classifier for another number of classes is left out.
        drop_path_rate: stochastic depth.
        label_smoothing: part of the target spread over all classes.
        mixup: alpha of mixup; 0 switches it off.
        cutmix: alpha of cutmix; 0 switches it off. With both, one of them is drawn for each batch, evenly.
        mix_prob: how often a batch is mixed at all.
        optimizer: see OptimizerConfig.
        schedule: see ScheduleConfig.

    Raises:
        UserError: options out of range, or what `build_backbone` raises.
    """

    task: ClassVar[str] = "classification"

    def __init__(
        self,
        backbone: str = "efficientvmamba_t",
        num_classes: int = 1000,
        checkpoint: str | None = None,
        drop_path_rate: float = 0.0,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        schedule: ScheduleConfig = DEFAULT_SCHEDULE,
    ) -> None:
        super().__init__(optimizer, schedule)
        if num_classes < 2:
            raise UserError(f"model.num_classes must be at least 2, not {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing must be in [0, 1), not {label_smoothing}")
        self.num_classes = num_classes
        self.network = build_backbone(
            backbone,
            features_only=False,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
            checkpoint=checkpoint,
        )
        self.mix = (
            Mixup(mixup, cutmix, prob=mix_prob, label_smoothing=label_smoothing, num_classes=num_classes)
            if mixup > 0 or cutmix > 0
            else None
        )
        self.mixed_loss = SoftTargetCrossEntropy()
        self.plain_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.metrics = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
                "confusion": MulticlassConfusionMatrix(num_classes),
            },
            compute_groups=False,
        )
        self.mean_loss = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, num_classes]."""
        return self.network(images)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.trainer.strategy.root_device.type != "mps":  # which has no float64
            # Adds up float32 losses exactly, in whatever order processes and batches bring them.
            self.mean_loss.set_dtype(torch.float64)

    def on_fit_start(self) -> None:
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", 0)
        if self.mix is not None and batch_size % 2:
            raise UserError(f"mixup and cutmix need an even data.batch_size, not {batch_size}")

    def training_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch["image"], batch["label"]
        if self.mix is not None and len(images) % 2 == 0:  # odd only where the whole epoch is one short batch
            images, targets = self.mix(images, labels)
            return self.mixed_loss(self(images).float(), targets), {}
        return self.plain_loss(self(images).float(), labels), {}

    def evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        logits, labels = self(batch["image"]).float(), batch["label"]
        self.metrics.update(logits, labels)
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.mean_loss.update(losses)
        if stage == "test":
            first = logits.argmax(1) == labels
            among = (logits.topk(min(5, self.num_classes), dim=1).indices == labels[:, None]).any(1)
            for path, right in zip(batch["path"], torch.stack([first, among], 1).tolist(), strict=True):
                self.keep(path, tuple(right))
            cases = zip(batch["path"], logits.softmax(1), labels.tolist(), losses.tolist(), strict=True)
            for path, scores, label, loss in cases:
                draw = functools.partial(self._draw, path, scores, label)
                self.gallery.offer(draw, loss if int(scores.argmax()) != label else 0.0)

    def _draw(self, path: str, scores: Tensor, label: int) -> Image.Image:
        predicted = int(scores.argmax())
        image = self.trainer.datamodule.read_image(path)  # type: ignore[attr-defined]
        return draw_prediction(image, self.class_names[predicted], float(scores[predicted]), self.class_names[label])

    def evaluation_end(self, stage: str) -> Evaluation:
        values: dict[str, Tensor] = self.metrics.compute()
        loss = self.mean_loss.compute()
        self.metrics.reset()
        self.mean_loss.reset()
        confusion = values.pop("confusion")
        images = confusion.sum(1)
        accuracy = confusion.diag() / images.clamp(min=1)
        details: dict[str, Any] = {
            "per_class": {
                name: {"accuracy": round(float(accuracy[k]), 6) if images[k] else None, "images": int(images[k])}
                for k, name in enumerate(self.class_names)
            }
        }
        if self.num_classes <= MAX_CONFUSION_CLASSES:
            details["confusion"] = confusion.tolist()
        # Beyond six digits float32 logits depend on which images share a batch, and so on the number of processes.
        found = self.kept() if stage == "test" else None
        files = {} if found is None else {PER_IMAGE_FILE: Right.of(found).write}
        return Evaluation({**values, "loss": round(float(loss), 6)}, details, files=files)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return ``path``, ``label`` (class names), ``score`` of it, and ``probabilities`` [B, num_classes]."""
        if batch.get("ignore", False):
            return {"path": [], "label": [], "score": [], "probabilities": torch.empty(0, self.num_classes)}
        probabilities = self(batch["image"]).float().softmax(1).cpu()
        scores, labels = probabilities.max(1)
        return {
            "path": batch["path"],
            "label": [self.class_names[k] for k in labels.tolist()],
            "score": scores.tolist(),
            "probabilities": probabilities,
        }

    @property
    def class_names(self) -> list[str]:
        """The data's class names, or the numbers where no data module is attached."""
        names = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
        return names or [str(k) for k in range(self.num_classes)]
