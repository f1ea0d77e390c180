"""Semantic segmentation: UPerNet on a feature pyramid, data in ADE20K's layout, mean IoU over the data set."""

from evmamba.tasks.record import Embedded, Head, Metric, Option, Task, imported_when_asked_for

_HERE = "evmamba.tasks.segmentation"

TASK = Task(
    name="segmentation",
    module=f"{_HERE}.SegmentationModule",
    data=f"{_HERE}.SegmentationData",
    heads=(Head("upernet", "UPerNet"),),
    metrics=(Metric("mIoU", "mIoU (%)"), Metric("mIoU_ms", "mIoU ms (%)", optional=True)),
    class_metric="IoU",
    per_image=f"{_HERE}.per_image:Overlaps",
    trained_side="data.init_args.crop_size",
    protocol_options=("inference",),
    recipes="evmamba.conf:segmentation",
    paper_recipe="ade20k_{head}_{variant}",
    starts_from="classification",
    pyramid=True,
    backbone_at="network.backbone",
    network_at="network",
    outputs="class scores at stride 4",
    thorough={"multi_scale": True},
    whole=f"{_HERE}.whole:whole_network",
    whole_options=("decoder_channels",),
    equal={"decoder_channels": 512},
    predictor=f"{_HERE}.predictor:SegmentationPredictor",
    prediction_writer=f"{_HERE}.predictions:SegmentationPredictions",
    check=f"{_HERE}.check:CHECK",
    check_options=(
        Option("num_classes", "count", "where no classes.txt names them"),
        Option("ignore_label", "number", "label that counts nowhere, e.g. 255"),
        Option("reduce_zero_label", "bool", "whether classes are numbered from 1 and 0 is ignored"),
    ),
    embedded=Embedded("evmamba.tasks.embedded.landscapes:write_segmentation", train=200, val=50, version=2),
)
__getattr__ = imported_when_asked_for(__name__, SegmentationData="data", SegmentationModule="module")
