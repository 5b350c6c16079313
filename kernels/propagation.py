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


def mean_region(predicted, truth):
    """The mean J of all frames after the first, a number. Masks (n, T, H, W) bool."""
    both = [masks[:, 1:].flatten(0, 1) for masks in (predicted, truth)]
    return region(*both).mean().item()


def as_masks(values, side):
    """Values (n, T, g, g) -> masks (n, T, side, side) bool."""
    wide = F.interpolate(values, (side, side), mode="bilinear")
    ends = wide.amax((2, 3), True) + wide.amin((2, 3), True)
    return wide > ends / 2  # above the middle between the two ends


def visible(clips, most):
    """The first `most` Clips (kernels/movers.py) whose first frame shows much of the emoji."""
    area = (clips.masks[:, 0] > 0).sum((1, 2))
    return clips.part((area >= 100).nonzero()[:most, 0])


def carry(f, first, frames, temperature):
    """Copies a value of each place along clips. f (n, T, P, d); first (n, P): values in the first
    frame. Returns (n, T, P). As in the training of methods/video_colorization.py, a frame has
    `frames` - 1 references: the first frame and the latest ones."""
    values = [first]
    for t in range(1, f.shape[1]):
        references = [0, *range(max(1, t - frames + 2), t)]
        scores = f[:, t] @ f[:, references].flatten(1, 2).mT  # (n, P, R)
        known = torch.cat([values[i] for i in references], 1)  # (n, R)
        attention = (scores / temperature).softmax(2)
        values.append((attention @ known[:, :, None])[:, :, 0])
    return torch.stack(values, 1)
