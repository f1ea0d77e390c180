"""Image classification on folders of classes."""

from evmamba.tasks.record import Embedded, Head, Metric, Task, imported_when_asked_for

_HERE = "evmamba.tasks.classification"

TASK = Task(
    name="classification",
    module=f"{_HERE}.ClassificationModule",
    data=f"{_HERE}.ClassificationData",
    heads=(Head("linear", "linear"),),
    metrics=(Metric("top1", "top-1 (%)"), Metric("top5", "top-5 (%)")),
    class_metric="accuracy",
    per_image=f"{_HERE}.per_image:Right",
    trained_side="data.init_args.image_size",
    published_protocol=f"{_HERE}.published:published_protocol",
    protocol_options=("image_size",),
    recipes="evmamba.conf:classification",
    paper_recipe="imagenet_{variant}",
    backbone_at="network",
    network_at="network",
    outputs="logits",
    scalable=True,
    predictor=f"{_HERE}.predictor:ClassificationPredictor",
    prediction_writer=f"{_HERE}.predictions:ClassificationPredictions",
    check=f"{_HERE}.check:CHECK",
    embedded=Embedded("evmamba.tasks.embedded.signs:write_classification", train=600, val=200, version=2),
)
__getattr__ = imported_when_asked_for(__name__, ClassificationData="data", ClassificationModule="module")
