"""Mask targets, the mask loss and pasting against mmdetection's own code."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evmamba.tasks.detection.losses import mask_loss
from evmamba.tasks.detection.masks import mask_targets, paste_masks

from ..golden import per_image

Golden = Callable[[str], dict[str, Tensor]]


def test_targets_and_loss_of_the_mask_head(golden_heads: Golden) -> None:
    data = golden_heads("mask_loss")
    size = data["mask_logits"].shape[-1]
    wanted = torch.empty_like(data["soft_targets"])
    for k, masks in enumerate(per_image(data, "gt_masks")):
        own = data["image"] == k
        boxes, objects = data["proposals"][own], data["assigned"][own]
        shares = mask_targets(masks, boxes, objects, size, threshold=None)
        torch.testing.assert_close(shares, data["soft_targets"][own], rtol=0, atol=1e-9)
        wanted[own] = mask_targets(masks, boxes, objects, size)
    assert torch.equal(wanted, data["targets"].double())

    logits = data["mask_logits"].requires_grad_()
    loss = mask_loss(logits, data["labels"], wanted)
    torch.testing.assert_close(loss, data["loss_mask"].squeeze(), rtol=1e-9, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    every = torch.arange(len(logits))
    torch.testing.assert_close(gradient[every, data["labels"]], data["grad_label_channel"], rtol=0, atol=1e-12)
    gradient[every, data["labels"]] = 0
    assert not gradient.any()


def test_pasted_masks_are_those_of_the_original_to_the_pixel(golden_heads: Golden) -> None:
    data = golden_heads("mask_paste")
    height, width = data["ori_shape"].tolist()
    own = data["mask_logits"].sigmoid()[torch.arange(len(data["labels"])), data["labels"]]
    scale = data["scale_factor"].repeat(2)
    pasted = paste_masks(own, data["boxes_resized"] / scale, (height, width))
    torch.testing.assert_close(pasted, data["soft"], rtol=0, atol=1e-9)
    expected = torch.from_numpy(np.unpackbits(data["masks"].numpy(), axis=-1)[..., :width])
    assert torch.equal((pasted >= 0.5).byte(), expected)
    single = paste_masks(own.float(), (data["boxes_resized"] / scale).float(), (height, width))
    torch.testing.assert_close(single.double(), data["soft"], rtol=0, atol=1e-5)


def test_pasting_keeps_float32_under_mixed_precision_and_an_empty_box_is_nowhere() -> None:
    masks = torch.rand(2, 28, 28)
    boxes = torch.tensor([[3.2, 4.1, 30.7, 25.3], [5.0, 5.0, 5.0, 9.0]])
    plain = paste_masks(masks, boxes, (40, 50))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(paste_masks(masks, boxes, (40, 50)), plain)
    assert plain[0].any()
    assert not plain[1].any()
