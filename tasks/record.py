"""What the rest of the house knows of a task: plain data, and references that are imported when used."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evmamba.errors import UserError, unknown_name


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation that tables show.

    Attributes:
        key: its name in `Evaluation.metrics`.
        header: as printed, with the unit.
        scale: from the stored value to the printed unit.
        digits: behind the point.
        better: which end is the good one.
        optional: left out of tables where nobody has it.
    """

    key: str
    header: str
    scale: float = 100.0
    digits: int = 1
    better: Literal["max", "min"] = "max"
    optional: bool = False


@dataclass(frozen=True)
class Head:
    """What stands on the backbone.

    Attributes:
        key: in options, results and names of runs; no two tasks have the same.
        name: as printed.
        metrics: where they are not the task's own.
        schedules: the paper's names of training schedules -> epochs, where a head has several; the first is the
            default.
    """

    key: str
    name: str
    metrics: tuple[Metric, ...] = ()
    schedules: Mapping[str, int] = field(default_factory=dict)

    def schedule_of(self, epochs: float | None) -> str | None:
        """Return the paper's name of the schedule of so many epochs; None if it has none of that length."""
        return next((name for name, length in self.schedules.items() if length == epochs), None)


@dataclass(frozen=True)
class Embedded:
    """A data set that is drawn on first use.

    Attributes:
        write: reference of ``function(folder, train=..., val=...)`` that writes it into an empty folder.
        train: number of training images.
        val: number of validation images.
        version: raise it when a drawn pixel or a label changes.
    """

    write: str
    train: int
    val: int
    version: int = 1


@dataclass(frozen=True)
class Option:
    """An option of a task's data check, by the name that the data module has for it."""

    name: str
    kind: Literal["number", "count", "bool"]
    what: str


@dataclass(frozen=True)
class PublishedProtocol:
    """How weights that are published for a backbone are evaluated.

    Attributes:
        options: arguments of the task's data module.
        apply: gives such a module what no argument says.
        words: for people.
    """

    options: Mapping[str, Any]
    apply: Callable[[Any], None]
    words: str


@dataclass(frozen=True)
class Task:
    """A task. References are written ``package.module:name`` and imported by `load`.

    Attributes:
        name: in options, results, names of runs and folders of recipes.
        module: class path of the `TaskModule`, as recipes name it. Its arguments are `backbone`, `num_classes` and
            `checkpoint`, and what else it likes.
        data: class path of the `TaskDataModule`.
        heads: what may stand on the backbone; the first is the default.
        head_option: the module's argument that chooses among several.
        metrics: in the order of the table's columns; the first is plotted.
        class_metric: the number in ``details["per_class"][name]`` that tells how good a class is; None: there is none.
        per_image: reference of the `PerImage` that a test leaves as ``per_image.npz``; None: it leaves none.
        rescore: reference of ``function(folder, data, images) -> metrics``: those of what a test kept in its
            result's folder, against the data's own labels; None where it keeps no predictions.
        trained_side: the option that says the side of training images [pixels]; of several the largest counts.
        trained_aspect: their long side by their short one: 1 for square crops.
        published_protocol: reference of ``function(backbone) -> PublishedProtocol``; None where a backbone's weights
            alone cannot be evaluated.
        protocol_options: arguments of module or data that say how an image becomes a prediction (its size, say).
        recipes: ``package:folder`` of ``tiny.yaml`` (embedded data), ``small.yaml`` (small real data) and the paper's.
        paper_recipe: name of the paper's recipes there, with ``{head}`` and ``{variant}``; None: the paper has none.
        starts_from: the task whose trained backbone this one starts from.
        pyramid: whether the head stands on feature maps at several strides, not on the backbone's own classifier.
        backbone_at: where the module has its backbone.
        network_at: where it has the network to be exported as a whole; None: that is not exported.
        outputs: what comes out of that network, or why it is not exported.
        thorough: arguments of the module for a more expensive test, done where a suite or a cluster's graph wants it.
        scalable: whether a trained network can be tested at other sizes, by the data's `image_size` and
            `evaluated_at`.
        whole: reference of ``function(head, backbone, **options) -> WholeNetwork``, to count both together.
        whole_options: arguments of the module that it takes from the paper's recipe.
        equal: arguments of the module that all networks of a comparison share where the paper's recipes differ in them.
        predictor: reference of a `Predictor`, for `evmamba predict IMAGES`.
        prediction_writer: reference of a callback made with a folder, for `evmamba predict --config`.
        check: reference of a `Check`, for `evmamba data check`.
        check_options: its options.
        embedded: the drawn data set.
        cluster: what a training wants of a cluster without a word about it (keys of a cluster's YAML).
    """

    name: str
    module: str
    data: str
    heads: tuple[Head, ...]
    metrics: tuple[Metric, ...]
    recipes: str
    backbone_at: str
    head_option: str | None = None
    class_metric: str | None = None
    per_image: str | None = None
    rescore: str | None = None
    trained_side: str | None = None
    trained_aspect: float = 1.0
    published_protocol: str | None = None
    protocol_options: tuple[str, ...] = ()
    paper_recipe: str | None = None
    starts_from: str | None = None
    pyramid: bool = False
    network_at: str | None = None
    outputs: str = "its outputs are not described"
    thorough: Mapping[str, Any] = field(default_factory=dict)
    scalable: bool = False
    whole: str | None = None
    whole_options: tuple[str, ...] = ()
    equal: Mapping[str, Any] = field(default_factory=dict)
    predictor: str | None = None
    prediction_writer: str | None = None
    check: str | None = None
    check_options: tuple[Option, ...] = ()
    embedded: Embedded | None = None
    cluster: Mapping[str, Any] = field(default_factory=dict)

    @property
    def default_head(self) -> Head:
        return self.heads[0]

    def head(self, key: str) -> Head:
        """Return a head by its key.

        Raises:
            UserError: the task has no such head.
        """
        for head in self.heads:
            if head.key == key:
                return head
        raise unknown_name(f"head of {self.name}", key, (head.key for head in self.heads))

    def head_in(self, arguments: Mapping[str, Any]) -> Head:
        """Return the head that the module's arguments choose.

        Raises:
            UserError: the task has no such head.
        """
        key = arguments.get(self.head_option) if self.head_option else None
        return self.default_head if key is None else self.head(key)

    def metrics_of(self, head: str | None) -> tuple[Metric, ...]:
        """Return the metrics that a head has, in the order of the table's columns; None stands for the default head."""
        return (self.default_head if head is None else self.head(head)).metrics or self.metrics

    def load(self, part: str) -> Any:
        """Import what a reference names.

        Args:
            part: the attribute that holds the reference, e.g. ``"predictor"``.

        Raises:
            UserError: the task has no such part.
        """
        reference = getattr(self, part)
        if reference is None:
            raise UserError(f"the task {self.name} has no {part.replace('_', ' ')} (its record leaves it out)")
        return load(reference)


def load(reference: str) -> Any:
    """Import ``package.module:name``."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def imported_when_asked_for(package: str, **homes: str) -> Callable[[str], Any]:
    """Return a package's ``__getattr__`` for classes that are not imported with it, so that its record stays light.

    Args:
        package: its ``__name__``.
        homes: name of a class -> the package's module that holds it.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return load(f"{package}.{homes[name]}:{name}")

    return find
