"""Object detection and instance segmentation: COCO data, torchvision's and transformers' detectors, COCO AP."""

from evmamba.tasks.record import Embedded, Head, Metric, Task, imported_when_asked_for

_HERE = "evmamba.tasks.detection"
_BOXES_AND_MASKS = (
    *(Metric(key, f"box {key}") for key in ("AP", "AP50", "AP75")),
    *(Metric(f"mask_{key}", f"mask {key}") for key in ("AP", "AP50", "AP75")),
)

TASK = Task(
    name="detection",
    module=f"{_HERE}.DetectionModule",
    data=f"{_HERE}.DetectionData",
    heads=(
        Head("retinanet", "RetinaNet"),
        Head("maskrcnn", "Mask R-CNN", _BOXES_AND_MASKS, schedules={"1x": 12, "3x": 36}),
        Head("fasterrcnn", "Faster R-CNN"),
        Head("rtdetrv2", "RT-DETRv2"),
        Head("dfine", "D-FINE"),
    ),
    head_option="detector",
    metrics=tuple(Metric(key, key) for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")),
    per_image=f"{_HERE}.per_image:Matches",
    class_metric="AP",
    rescore=f"{_HERE}.rescore:rescore",
    trained_side="model.init_args.min_size",
    trained_aspect=4 / 3,  # photographs as they are
    protocol_options=("min_size", "max_size", "rules"),
    recipes="evmamba.conf:detection",
    paper_recipe="coco_{head}_{variant}",
    starts_from="classification",
    pyramid=True,
    backbone_at="detector.backbone.body",
    outputs="its boxes depend on sorting and suppression that runtimes do differently",
    whole=f"{_HERE}.whole:whole_network",
    predictor=f"{_HERE}.predictor:DetectionPredictor",
    prediction_writer=f"{_HERE}.predictions:DetectionPredictions",
    check=f"{_HERE}.check:CHECK",
    embedded=Embedded("evmamba.tasks.embedded.seabed:write_detection", train=280, val=60, version=2),
)
__getattr__ = imported_when_asked_for(__name__, DetectionData="data", DetectionModule="module")
