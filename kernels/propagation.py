"""Masks that are carried along a video: how they are compared with the true ones, and how values of
places become masks. Shared by methods/video_colorization.py and methods/eval_video.py.
"""

import torch
import torch.nn.functional as F


def share(part, whole):
    """How much of each mask `whole` (N, H, W) its `part` covers, (N,); 1 if the mask is empty."""
    total = whole.sum((1, 2))
    return torch.where(total > 0, part.sum((1, 2)) / total, 1.0)


def region(predicted, truth):
    """J of each frame, (N,): intersection over union, 1 if both are empty. Masks (N, H, W) bool.
    The 2017 DAVIS challenge, https://arxiv.org/abs/1704.00675"""
    shared = predicted & truth
    return share(shared, predicted | truth)


def as_masks(values, side):
    """Values (n, T, g, g) -> masks (n, T, side, side) bool."""
    wide = F.interpolate(values, (side, side), mode="bilinear")
    ends = wide.amax((2, 3), True) + wide.amin((2, 3), True)
    return wide > ends / 2  # above the middle between the two ends


def visible(clips, most):
    """The first `most` Clips (kernels/movers.py) whose first frame shows much of the emoji."""
    area = (clips.masks[:, 0] > 0).sum((1, 2))
    return clips.part((area >= 100).nonzero()[:most, 0])
