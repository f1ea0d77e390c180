"""Which anchor or proposal learns which object, and how boxes are encoded, as in mmdetection."""

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou

# What takes no part at all; torchvision's Matcher has -1 for the background and -2 for between the thresholds.
OUTSIDE = -3


class OverlapMatcher(Matcher):
    """Every prior gets the object that it overlaps most, if enough; then every object gets the priors nearest to it.

    The second step differs from torchvision's: a prior gets the object whose best prior it is, even where it overlaps
    another one more (of several the last), and an object that no prior reaches by `least` gets none.

    Args:
        positive: overlap (intersection over union) from which on a prior has an object.
        negative: overlap below which it is background.
        least: overlap that the second step asks for; None leaves that step out.
    """

    def __init__(self, positive: float, negative: float, least: float | None) -> None:
        super().__init__(positive, negative, allow_low_quality_matches=least is not None)
        self.least = least

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        assert self.least is not None
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        objects, priors = torch.where((match_quality_matrix == best) & (best >= self.least))
        last = torch.full_like(matches, -1).scatter_reduce_(0, priors, objects, "amax")
        torch.where(last >= 0, last, matches, out=matches)


class TwoSidedBoxCoder(BoxCoder):
    """torchvision's coder, but the decoded sides are bounded below as well: a factor of 1000 / 16 either way."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Decode.

        Args:
            rel_codes: [n, 4 k], k predictions for every box.
            boxes: [n, 4], x1 y1 x2 y2.

        Returns:
            [n, 4 k].
        """
        codes = rel_codes.unflatten(1, (-1, 4)) / rel_codes.new_tensor(self.weights)
        corners = boxes.to(codes.dtype)[:, None].unflatten(-1, (2, 2))
        sides = corners[..., 1, :] - corners[..., 0, :]
        centres = (corners[..., 0, :] + corners[..., 1, :]) / 2 + codes[..., :2] * sides
        half = sides * codes[..., 2:].clamp(-self.bbox_xform_clip, self.bbox_xform_clip).exp() / 2
        return torch.cat([centres - half, centres + half], dim=-1).flatten(1)


def assign(boxes: Tensor, priors: Tensor, matcher: Matcher, counting: Tensor | None = None) -> Tensor:
    """Assign objects to priors.

    Args:
        boxes: [m, 4] of one image; m may be 0, which makes everything background.
        priors: [n, 4], anchors or proposals.
        matcher: the rule.
        counting: bool [n], priors that take part; None for all.

    Returns:
        int64 [n]: a box's index, -1 background, -2 between the thresholds, `OUTSIDE`.
    """
    taking_part = priors if counting is None else priors[counting]
    if len(boxes) and len(taking_part):
        matches = matcher(box_iou(boxes, taking_part))
    else:
        matches = torch.full((len(taking_part),), Matcher.BELOW_LOW_THRESHOLD, device=priors.device)
    if counting is None:
        return matches
    return torch.full((len(priors),), OUTSIDE, device=priors.device).masked_scatter_(counting, matches)
