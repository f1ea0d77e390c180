"""VMamba-T, the network whose scan EfficientVMamba sets out to make cheaper, on the same trunk and kernels.

Source: VMamba: Visual State Space Model, arXiv 2401.10166, first version (January 2024): every block is
`x + DropPath(SS2D(LayerNorm(x)))`, without an MLP; SS2D scans rows, columns and both reversed over the full map. That
is our trunk with other switches, so its checkpoints are read by the same table of names.
"""

from collections.abc import Sequence

from evmamba.model import EfficientVMamba, FeaturePyramid

DIMS = (96, 192, 384, 768)
DEPTHS = (2, 2, 9, 2)


class VMamba(EfficientVMamba):
    """VMamba image classifier (T by default): `[B, in_chans, H, W] -> [B, num_classes]`, any size from 32x32 up.

    Arguments and errors as of :class:`evmamba.EfficientVMamba`, without its switches.
    """

    def __init__(
        self,
        dims: Sequence[int] = DIMS,
        depths: Sequence[int] = DEPTHS,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(
            dims,
            depths,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            drop_rate=drop_rate,
            global_pool=global_pool,
            scan="ss2d",
            fusion=False,
            layout="E" * len(dims),
        )


class VMambaPyramid(FeaturePyramid):
    """VMamba without classifier: images to maps `[B, C, h, w]` at strides 4, 8, 16, 32, each through its own LayerNorm.

    Arguments and errors as of :class:`evmamba.FeaturePyramid`, without its switches.
    """

    def __init__(
        self,
        dims: Sequence[int] = DIMS,
        depths: Sequence[int] = DEPTHS,
        *,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            dims,
            depths,
            out_indices=out_indices,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            scan="ss2d",
            fusion=False,
            layout="E" * len(dims),
        )
