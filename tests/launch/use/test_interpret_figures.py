"""Pictures of what a network does: every token of a path is joined once, and captions say what is shown."""

import itertools

import numpy as np
import torch
from matplotlib.collections import LineCollection
from PIL import Image

from evmamba.interpret import StepMap
from evmamba.kernels.paths import scan_paths
from evmamba.launch.use.interpret_figures import draw_activation, draw_receptive_field, draw_scan, draw_steps

IMAGE = Image.new("RGB", (60, 40), "teal")


def test_a_path_joins_its_tokens_in_order_and_leaves_padding_out():
    groups = torch.from_numpy(np.asarray(scan_paths(3, 5, "es2d")))
    assert (groups < 0).any()  # odd sides: groups of unequal length
    figure = draw_scan(IMAGE, groups, 3, 5, "four groups")
    drawn = set()
    for axis, path in zip(figure.axes, groups.tolist(), strict=True):
        tokens = [p for p in path if p >= 0]
        (lines,) = [part for part in axis.collections if isinstance(part, LineCollection)]
        joined = [[(int(y) * 5 + int(x)) for x, y in segment] for segment in lines.get_segments()]
        assert joined == [list(pair) for pair in itertools.pairwise(tokens)]
        assert f"{len(tokens)} tokens" in axis.get_title()
        drawn |= set(tokens)
    assert drawn == set(range(15))


def test_every_layer_has_a_panel_and_a_scale_of_its_own():
    maps = [StepMap(f"layer {k}", torch.rand(4, 6) * 10**k) for k in range(2)]
    figure = draw_steps(IMAGE, maps)
    shown = {axis.get_title(): axis.images[0] for axis in figure.axes if axis.get_title()}
    assert list(shown) == ["image", "layer 0\n4 x 6", "layer 1\n4 x 6"]
    limits = [shown[f"layer {k}\n4 x 6"].get_clim()[1] for k in range(2)]
    assert limits == [float(layer.steps.max()) for layer in maps]


def test_captions_say_what_is_shown():
    field = torch.zeros(8, 8)
    field[4, 4] = 1.0
    title = draw_receptive_field(field, {0.5: 0.125}, 3).axes[0].get_title()
    assert "mean of 3 images" in title
    assert "50% in 12.5% of the image" in title
    assert "one image" in draw_receptive_field(field, {0.5: 0.125}, 1).axes[0].get_title()
    figure = draw_activation(IMAGE, torch.rand(2, 3), "ant", 0.875)
    assert figure.get_suptitle() == "class activation (Grad-CAM): ant, probability 87.5%"
    assert len(figure.axes) == 2
