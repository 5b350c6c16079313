"""K-means features (Coates, Lee, Ng 2011) against plain loops, closed forms and a toy data set."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, noise

from common import load_data
from kernels.kmeans import KMeansFeatures, fit_kmeans, normalized_patches, triangle, whitening
from kernels.views import normalize


def test_patch_by_hand():
    """A patch of 18 zeros, 54 ones and 36 threes: mean 1.5, squared deviations 40.5 + 13.5 + 81."""
    values = torch.cat([torch.zeros(18), torch.ones(54), torch.full((36,), 3.0)])
    patch = normalized_patches(values.view(1, 3, 6, 6))
    assert patch.shape == (1, 1, 108)
    scale = (135 / 107 + 10) ** 0.5
    torch.testing.assert_close(patch[0, 0], (values - 1.5) / scale)
    assert (normalized_patches(torch.full((1, 3, 8, 8), 200.0)) == 0).all()  # flat, not 0 / 0


def test_patches_are_in_reading_order():
    x = 255 * torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    found = normalized_patches(x)
    assert found.shape == (2, 3 * 4, 108)
    for place, (top, left) in enumerate(np.ndindex(3, 4)):
        patch = x[1, :, top : top + 6, left : left + 6].flatten()
        expected = (patch - patch.mean()) / (patch.var() + 10).sqrt()
        torch.testing.assert_close(found[1, place], expected)


def test_whitening():
    """A direction of variance D gets D / (D + 0.1); ZCA does not rotate."""
    mixing = torch.diag(torch.tensor([3.0, 1.0, 0.1]))
    rotation = torch.linalg.qr(noise(3, 3, dtype=torch.float32)).Q
    x = noise(5000, 3, dtype=torch.float32)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    x = x @ mixing @ rotation.T + 7
    mean, matrix = whitening(x)
    torch.testing.assert_close(matrix, matrix.T)
    white = (x - mean) @ matrix
    variances = torch.tensor([9.0, 1.0, 0.01])
    expected = rotation @ torch.diag(variances / (variances + 0.1)) @ rotation.T
    torch.testing.assert_close(torch.cov(white.T), expected, atol=1e-3, rtol=0)


def test_triangle():
    distance = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert triangle(distance).tolist() == [[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(triangle(distance + 5), triangle(distance))


def test_features_by_loops():
    """10 pixels give 5 x 5 positions: the quarters have 3 x 3, 3 x 2, 2 x 3 and 2 x 2 of them."""
    network = KMeansFeatures(noise(108), noise(108, 108), noise(4, 108)).double()
    x = torch.rand(3, 3, 10, 10, generator=torch.Generator().manual_seed(0)).double()
    found = network(normalize(x))
    assert found.shape == (3, 16)

    patches = normalized_patches(255 * x)[2].view(5, 5, 108)
    sums = torch.zeros(2, 2, 4, dtype=torch.float64)
    for row, column in np.ndindex(5, 5):
        white = (patches[row, column] - network.mean) @ network.matrix
        d = (white - network.centroids).norm(dim=1)
        sums[int(row >= 3), int(column >= 3)] += (d.mean() - d).clamp(min=0)
    torch.testing.assert_close(found[2], sums.flatten())
    share = (found > 0).double().mean()
    assert 0.2 < share <= 1 and (found >= 0).all()


def test_large_images_are_averaged():
    network = KMeansFeatures(noise(108), noise(108, 108), noise(4, 108)).double()
    x = noise(1, 3, 32, 32)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(network(large), network(x))


def test_fit_finds_kinds_of_patches_and_depends_on_its_seed_alone():
    """Images of stripes, in two directions, with little noise: a centroid is near every patch."""
    stripes = (torch.arange(12) // 2 % 2).float().expand(12, 12)
    kinds = torch.stack([stripes, stripes.T])[torch.arange(20) % 2]
    x = kinds[:, None] + 0.01 * noise(20, 3, 12, 12, dtype=torch.float32)
    vectors = normalize(x).flatten(1)
    mean, matrix, centroids = fit_kmeans(vectors, 0)
    assert (mean.shape, matrix.shape, centroids.shape) == ((108,), (108, 108), (256, 108))
    for one, other in zip(fit_kmeans(vectors, 0), (mean, matrix, centroids)):
        assert torch.equal(one, other)
    assert not torch.equal(fit_kmeans(vectors, 1)[2], centroids)

    patches = normalized_patches(255 * x).flatten(0, 1)
    white = (patches - mean) @ matrix
    nearest = torch.cdist(white, centroids).min(1).values
    spread = (white - white.mean(0)).norm(dim=1)
    assert nearest.square().mean() < 0.5 * spread.square().mean()


@pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (0.3, 0.5, 0.7), (1.0, 1.0, 1.0)])
def test_equal_patches_count_once(colour):
    """All patches of even images of one colour are equal, but for rounding."""
    x = torch.tensor(colour).view(1, 3, 1, 1).expand(4, 3, 32, 32)
    assert fit_kmeans(normalize(x).flatten(1), 0)[2].shape == (1, 108)


def fit_drawings(path):
    """Of drawings with even backgrounds, many of whose patches are equal."""
    images = load_data("emoji", "data", CPU).bank.images.part(torch.arange(0, 3000, 30)).pixels
    torch.save(fit_kmeans(normalize(images.float() / 255).flatten(1), 0), path)


@pytest.mark.thorough
def test_fit_does_not_depend_on_the_number_of_threads(tmp_path):
    """Of torch, of NumPy's products of matrices, and of scikit-learn, each with its own threads."""
    code = "import sys, test_kmeans; test_kmeans.fit_drawings(sys.argv[1])"
    fits = []
    for count in ("1", "2"):
        env = os.environ | {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
        command = [sys.executable, "-c", code, str(tmp_path / f"{count}.pt")]
        subprocess.run(command, env=env | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, check=True)
        fits.append(torch.load(tmp_path / f"{count}.pt"))
    for one, two in zip(*fits, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_fewer_patches_than_centroids():
    x = normalize(torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    network = KMeansFeatures(*fit_kmeans(x.flatten(1), 0))
    found = network(x)
    # one position: it lies in the first quarter, the others are empty
    assert found.shape == (5, 20) and found.isfinite().all()
    assert (found[:, 5:] == 0).all() and (found[:, :5].amax(1) > 0).all()
    # Each patch is a centroid: of the square of their distance, 0, only rounding is left, a few eps
    # of the squares that cancel, and its root is far larger.
    squares = 2 * network.centroids.square().sum(1).max().item()
    limit = (4 * torch.finfo(torch.float32).eps * squares) ** 0.5
    found = torch.cat([network(x[:3]), network(x[3:])]) - found
    assert found.abs().max() < limit < 0.05
