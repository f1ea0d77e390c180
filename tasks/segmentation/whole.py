"""Whole segmentors, as the paper counts them: at 512 x 2048 pixels, for ADE20K's classes."""

from torch import Tensor, nn

from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.segmentation.upernet import UPerNet
from evmamba.tasks.whole import WholeNetwork

# Input and classes of the paper's table 4.
SIZE, CLASSES = (512, 2048), 150


def whole_network(head: str, backbone: str, decoder_channels: int = 256) -> WholeNetwork:
    """Build UPerNet on a backbone; a prediction is counted, without the head that only training uses."""
    model = UPerNet(build_backbone(backbone, features_only=True), CLASSES, decoder_channels)
    also = {"macs_with_auxiliary_head": WithAuxiliary(model)}
    return WholeNetwork(model, model, lambda image: (image[None],), SIZE, CLASSES, also_counted=also)


class WithAuxiliary(nn.Module):
    """UPerNet with the head that only training uses; the network's parameters contain it."""

    def __init__(self, network: UPerNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.forward_with_auxiliary(image)
