"""K-means features of images, a baseline that learns from small patches in seconds.
Coates, Lee, Ng, AISTATS 2011. https://proceedings.mlr.press/v15/coates11a.html

    patch       6x6 pixels of three colours with values 0 to 255, (p - mean) / sqrt(variance + 10)
    whitening   w = P (p - mean of all patches), P = V diag(1 / sqrt(D + 0.1)) V^T, where V D V^T is
                the covariance of the patches: strong directions get about the same variance, weak
                ones, D below 0.1 and mostly noise, stay small
    centroids   c_1 ... c_K, K = 256, by k-means of 50 patches of each of up to 1,000 images
    features    f_k = max(0, mean over j of d_j - d_k), d_k = ||w - c_k||: centroid k answers if it
                is nearer than the average; f summed over all patches of each quarter of the image

So an image has 4 K = 1,024 features (resnet14: 768). Images of more than 32 pixels are averaged to
32 first. (Paper: k-means of 400,000 patches at once, K up to 4,000. Here: scikit-learn's
mini-batches.) Of equal patches one is kept, and the fit is in float64: otherwise rounding decides
which patches go together, and another number of threads moves a linear probe by a point.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kernels.views import denormalize

PATCH = 6  # side, pixels
PER_IMAGE = 50  # patches for the fit
CENTROIDS = 256
# In results.jsonl, in place of a hash of the weights.
ABOUT = (
    f"{CENTROIDS} centroids of {PER_IMAGE} patches of each of up to 1,000 images, equal ones once, "
    f"{PATCH}x{PATCH} pixels"
)


def normalized_patches(x):
    """All patches of images (n, 3, H, W) with values 0 to 255: (n, L, 108), in reading order, each
    as channel, row, column."""
    x = F.unfold(x, PATCH).transpose(1, 2)
    x = x - x.mean(2, keepdim=True)
    return x / (x.var(2, keepdim=True) + 10).sqrt()


def whitening(patches):
    """(M, 108) -> their mean (108,) and the matrix P (108, 108)."""
    variance, directions = torch.linalg.eigh(torch.cov(patches.T))
    scale = (variance + 0.1).rsqrt()
    return patches.mean(0), (directions * scale) @ directions.T


def fit_kmeans(x, seed):
    """Normalised images of at most 32 pixels, averaged as forward() does it, as vectors (N, 3 S S)
    -> mean, P and centroids (K, 108), float32 on the CPU. The seed chooses the patches and the
    first centroids."""
    from sklearn.cluster import MiniBatchKMeans  # here, so --help need not wait for it

    side = math.isqrt(x.shape[1] // 3)
    rng = np.random.default_rng(seed)
    patches = []
    for image in x.cpu().double().view(-1, 1, 3, side, side):
        found = normalized_patches(255 * denormalize(image))[0]  # (L, 108)
        some = torch.from_numpy(rng.permutation(len(found))[:PER_IMAGE])
        patches.append(found[some])
    patches = torch.cat(patches)

    mean, matrix = whitening(patches)
    # Patches that are equal but for rounding, as of an even background, count once: only rounding
    # would tell apart two centroids at their place.
    white = (patches.round(decimals=4).unique(dim=0) - mean) @ matrix
    kmeans = MiniBatchKMeans(min(CENTROIDS, len(white)), random_state=seed, n_init=1)
    centroids = torch.from_numpy(kmeans.fit(white.numpy()).cluster_centers_)
    return mean.float(), matrix.float(), centroids.float()


def triangle(distance):
    """Distances to centroids (..., K) -> answers f (..., K)."""
    return (distance.mean(-1, keepdim=True) - distance).clamp(min=0)


class KMeansFeatures(nn.Module):
    """Normalised images (n, 3, S, S) -> (n, 4 K): upper left, upper right, lower left, lower right
    quarter."""

    def __init__(self, mean, matrix, centroids):
        super().__init__()
        # Parameters, so that kernels/cost.py counts them.
        self.mean = nn.Parameter(mean, requires_grad=False)
        self.matrix = nn.Parameter(matrix, requires_grad=False)
        self.centroids = nn.Parameter(centroids, requires_grad=False)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, min(32, x.shape[2]))
        x = 255 * denormalize(x)
        # A few images at a time: the distances of all would need much memory.
        return torch.cat([self.quarters(few) for few in x.split(8)])

    def quarters(self, x):
        white = (normalized_patches(x) - self.mean) @ self.matrix  # (n, L, 108)
        squares = white.square().sum(2, keepdim=True) + self.centroids.square().sum(1)
        squares = squares - 2 * white @ self.centroids.T  # (n, L, K)
        answers = triangle(squares.clamp(min=0).sqrt())

        side = x.shape[2] - PATCH + 1
        sums = []
        for half in answers.unflatten(1, (side, side)).tensor_split(2, 1):
            sums += [quarter.sum((1, 2)) for quarter in half.tensor_split(2, 2)]  # (n, K)
        return torch.cat(sums, 1)
