"""methods/eval_geometry.py: its numbers against closed forms, scikit-learn and values by hand; what
is not defined is not a number; the script continues, and leaves networks as they were."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import CPU, call_main, noise, tiny_clips, tiny_data
from PIL import Image
from sklearn import metrics
from sklearn.cluster import KMeans
from torch import nn

import common
import methods.simclr
from common import Split, ViT, backbone, read_lines
from kernels.readers import InMemory
from kernels.views import normalize
from methods.eval_geometry import (
    agreement,
    choose_protocols,
    clusters,
    correlation,
    draw_maps,
    draw_spectrum,
    eigenvalues,
    exponent,
    largest_singular_value,
    lidar,
    map_labels,
    participation,
    path_lengths,
    paths,
    rotated,
    shifted,
    smoothness,
    spectrum,
    table,
    tsne,
    twonn,
)


def rotation(dim, seed=0):
    return torch.linalg.qr(noise(dim, dim, seed=seed))[0]


def flat_sheet(count, dim, seed=0):
    """Uniform points of a cube of `dim` dimensions, anywhere in 24 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, dim, generator=generator, dtype=torch.float64)
    return points @ rotation(24)[:dim]


# -------- The spectrum ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 9), (9, 60)])
def test_eigenvalues_are_those_of_the_covariance(shape):
    x = noise(*shape) + 3
    expected = np.linalg.eigvalsh(np.cov(x.numpy(), rowvar=False))[::-1][: min(shape)]
    np.testing.assert_allclose(eigenvalues(x), expected.clip(0), rtol=1e-9, atol=1e-12)


def test_participation():
    assert participation(torch.tensor([2.0, 2, 2, 2, 0])) == 4
    assert participation(torch.tensor([5.0, 0, 0])) == 1
    assert participation(torch.tensor([3.0, 1.0])) == 16 / 10
    # N samples of an isotropic Gaussian in D dimensions: E[(tr S)^2] / E[tr S^2] for n = N - 1
    dim, n = 40, 399
    expected = dim * (dim + 2 / n) / (dim * (1 + (dim + 1) / n))
    found = participation(eigenvalues(noise(n + 1, dim)))
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("dim", [26, 90, 400])
def test_exponent_of_a_power_law(power, dim):
    values = 7 * torch.arange(1, dim + 1, dtype=torch.float64) ** -power
    assert exponent(values) == pytest.approx(power, rel=1e-9)
    if power < 2:
        with_zeros = torch.cat([values, torch.zeros(50)])  # features that fill a subspace
        assert exponent(with_zeros) == pytest.approx(power, rel=1e-9)


def test_exponent_looks_at_ranks_11_to_100_only():
    values = torch.arange(1, 301, dtype=torch.float64) ** -1.0
    values[:10] *= torch.linspace(9, 2, 10)
    values[100:] *= 0.1
    assert exponent(values) == pytest.approx(1, rel=1e-9)
    assert math.isnan(exponent(values[:25]))  # too few to fit
    assert math.isnan(exponent(torch.zeros(200)))


def test_exponent_of_features_with_such_a_covariance():
    """Columns that are orthogonal and centred, with variances i^-1.5."""
    columns = torch.linalg.qr(torch.cat([torch.ones(300, 1), noise(300, 120)], 1).double())[0]
    x = columns[:, 1:] * torch.arange(1, 121).double() ** -0.75
    assert exponent(eigenvalues(x @ rotation(120))) == pytest.approx(1.5, rel=1e-6)


# -------- Dimension -------------------------------------------------------------------------------


def mean_twonn(sheets):
    """Of four sheets of 600 points. One estimate has a relative deviation of 1.2 / sqrt(points), so
    four times that of the mean are 10 %."""
    return np.mean([twonn(sheet) for sheet in sheets])


@pytest.mark.parametrize("dim, expected", [(1, 1), (2, 2), (5, 4.6)])
def test_twonn_of_a_flat_sheet(dim, expected):
    """The border of a cube lowers it: in five dimensions most points are near it."""
    sheets = [flat_sheet(600, dim, seed) for seed in range(4)]
    assert mean_twonn(sheets) == pytest.approx(expected, rel=0.1)


def test_twonn_of_a_curved_sheet():
    """A sphere, on which the spectrum finds three directions."""
    spheres = [nn.functional.normalize(noise(600, 3, seed=seed), dim=1) for seed in range(4)]
    assert mean_twonn(spheres) == pytest.approx(2, rel=0.1)
    assert participation(eigenvalues(spheres[0])) == pytest.approx(3, abs=0.05)


def test_twonn_by_hand():
    """Ten points on a line, each gap twice the last: r1 is the gap on the left, and r2 the sum of
    the two on the left, or from the second point on the gap on the right."""
    gaps = 2.0 ** np.arange(9)
    x = torch.tensor([0, *np.cumsum(gaps)])[:, None]
    ratios = [3, 2] + 7 * [3 / 2] + [3 / 2]
    log_m = np.log(sorted(ratios)[:9])  # without the largest
    y = -np.log(1 - np.arange(1, 10) / 10)
    assert twonn(x) == pytest.approx(log_m @ y / (log_m @ log_m), rel=1e-12)


def test_twonn_is_invariant_and_counts_equal_features_once():
    x = flat_sheet(400, 3)
    d = twonn(x).item()
    assert twonn(5 * x @ rotation(24, seed=1) + 2) == pytest.approx(d, rel=1e-6)
    assert twonn(torch.cat([x, x[:150], x[:20]])) == d
    assert twonn(x.float()) == pytest.approx(d, rel=1e-3)


def test_twonn_of_near_neighbours_far_from_zero():
    """Where distances by products of matrices are 0 in float32."""
    near = 0.03 * flat_sheet(600, 2)
    x = (100 + near).float()
    assert torch.cdist(x, x).fill_diagonal_(1).min() == 0
    assert twonn(x) == pytest.approx(twonn(near).item(), rel=0.01)


def test_twonn_of_few_images_in_many_dimensions_is_too_low():
    """As its docstring says. One estimate has a deviation of 0.06 times itself, the mean of six a
    sixth of its root."""
    for dim, low, high in ((10, 8.5, 9.9), (20, 14.5, 17.5)):
        found = np.mean([twonn(noise(315, dim, seed=seed)) for seed in range(6)])
        assert low < found < high


def test_twonn_that_is_not_defined():
    assert math.isnan(twonn(torch.ones(50, 4)))
    assert math.isnan(twonn(noise(9, 4)))
    assert math.isnan(twonn(torch.eye(30)))  # all distances are equal: every ratio is 1


def test_the_dimension_of_drawings_is_measured_for_each_artist():
    """Four drawings of each of 300 objects, each near the other three."""
    objects = flat_sheet(300, 8)
    x = objects.repeat_interleave(4, 0) + 0.01 * flat_sheet(1200, 8, seed=1)
    artist = torch.arange(4).repeat(300)
    views = [noise(6, 12, seed=i).float() for i in range(2)]
    together = spectrum(x, None, *views)
    apart = spectrum(x, artist, *views)
    expected = np.mean([twonn(x[artist == i]) for i in range(4)])
    assert apart["twonn"] == pytest.approx(expected) == pytest.approx(7, abs=0.7)
    assert together["twonn"] < 5
    assert apart | {"twonn": 0} == together | {"twonn": 0}


# -------- Columns ---------------------------------------------------------------------------------


def test_correlation():
    x = noise(500, 30)
    assert abs(correlation(x)) < 0.003  # by chance 0.036, which is subtracted
    assert abs(correlation(x * torch.logspace(-3, 3, 30))) < 0.003
    # six pairs of columns; by chance |correlation| is 0.036 with a deviation of 0.027
    few = {"abs": 4 * 0.027 / 6**0.5}
    copies = x[:, :1] * torch.tensor([1.0, -2, 3, 0.1])
    assert correlation(copies) == pytest.approx(1 - 0.036, **few)
    pairs = x[:, [0, 0, 1, 1]]  # two of six correlations are 1, four that of columns 0 and 1
    between = abs(np.corrcoef(x[:, :2].T.numpy())[0, 1])
    assert correlation(pairs) == pytest.approx((2 + 4 * between) / 6 - 0.036, **few)


def test_correlation_without_columns_that_vary():
    dead = torch.zeros(80, 5)
    assert math.isnan(correlation(dead))
    assert math.isnan(correlation(torch.cat([dead, noise(80, 1)], 1)))
    x = noise(80, 6).float()
    assert correlation(torch.cat([dead, x, dead + 3], 1)) == correlation(x)


# -------- LiDAR -----------------------------------------------------------------------------------


def lidar_by_definition(views):
    """Sigma_w^-1/2 Sigma_b Sigma_w^-1/2 and the exponential of the entropy of its eigenvalues, with
    loops and NumPy."""
    q, n, dim = views.shape
    x = views.numpy()
    means = x.mean(0)
    within = np.zeros((dim, dim))
    for i in range(n):
        within += np.cov(x[:, i], rowvar=False) / n
    within += 1e-4 * np.trace(within) / dim * np.eye(dim)
    between = np.cov(means, rowvar=False) - within / q
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    values = np.linalg.eigvalsh(root @ between @ root)
    values = values[values > 1e-12]
    p = values / values.sum()
    return np.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize("n, dim", [(30, 12), (8, 20)])
def test_lidar_is_its_definition(n, dim):
    views = noise(1, n, dim, seed=1) + 0.5 * noise(5, n, dim) @ noise(dim, dim, seed=2)
    assert lidar(views) == pytest.approx(lidar_by_definition(views), rel=1e-6)
    assert 1 <= lidar(views) <= min(n - 1, dim)
    assert lidar(1000 * views @ rotation(dim)) == pytest.approx(lidar(views).item(), rel=1e-6)


def test_lidar_counts_the_directions_that_tell_images_apart():
    """Images differ along three directions, views along all: the others do not count."""
    images = torch.cat([noise(200, 3), torch.zeros(200, 13)], 1)
    views = images + 0.01 * noise(6, 200, 16, seed=1)
    assert lidar(views) == pytest.approx(3, abs=0.05)
    # unlike a rank of the features, it ignores how large a direction is
    scales = torch.tensor([9.0, 1, 1 / 9, *[1.0] * 13])
    assert lidar(views * scales) == pytest.approx(3, abs=0.1)
    assert participation(eigenvalues(views[0] * scales)) < 1.1


@pytest.mark.parametrize("q, by_means", [(8, 100), (50, 39)])
def test_lidar_is_not_that_of_the_noise_of_the_means(q, by_means):
    """Images differ along 20 of 192 directions, as much as their views do. Without W / q the mean
    of q views adds 1 / q to the eigenvalues of all directions."""
    images = torch.cat([noise(600, 20), torch.zeros(600, 172)], 1).float()
    views = images + noise(q, 600, 192, seed=1).float()
    found = lidar(views)
    assert found == pytest.approx({8: 39, 50: 24}[q], abs=2)
    eigenvalues_of_means = [1 + 1 / q] * 20 + [1 / q] * 172
    p = np.array(eigenvalues_of_means) / sum(eigenvalues_of_means)
    assert np.exp(-(p * np.log(p)).sum()) > 0.95 * by_means > 1.5 * found


def test_lidar_without_information_about_images_is_high():
    """Half of the directions are a little above the noise that is subtracted, by chance."""
    found = [lidar(noise(q, 300, 60)) for q in (4, 16)]
    assert all(20 < value < 40 for value in found)


def test_lidar_of_views_that_are_equal():
    assert math.isnan(lidar(noise(1, 20, 5).expand(4, 20, 5)))
    assert math.isnan(lidar(torch.ones(3, 20, 5)))


# -------- Smoothness ------------------------------------------------------------------------------


def linear(out=7, side=4, seed=0):
    """A linear map of images, without a bias."""
    layer = nn.Linear(3 * side**2, out, bias=False)
    layer.weight.data = noise(out, 3 * side**2, seed=seed).float()
    return nn.Sequential(nn.Flatten(), layer), layer.weight.detach()


def test_largest_singular_value_of_a_linear_map():
    network, weight = linear()
    x = noise(5, 3, 4, 4).float()
    top = torch.linalg.svdvals(weight)[0]
    found = largest_singular_value(network, x, rounds=300)
    torch.testing.assert_close(found, top.expand(5), rtol=1e-4, atol=0)
    few = largest_singular_value(network, x, rounds=3)
    assert (few < found).all() and (few > 0.5 * found).all()  # from below
    assert not largest_singular_value(lambda x: 0 * x.flatten(1), x, rounds=3).any()


LARGER = pytest.param("resnet14", marks=pytest.mark.thorough)


@pytest.mark.parametrize("arch", ["vit_micro", LARGER])
def test_largest_singular_value_is_that_of_the_jacobian_of_each_image(arch):
    torch.manual_seed(0)
    net = backbone(arch, 8).eval()
    x = noise(2, 3, 8, 8).float()
    found = largest_singular_value(net, x, rounds=40)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x[None])[0], x[1])
    top = torch.linalg.svdvals(jacobian.flatten(1))[0]
    assert found[1].item() == pytest.approx(top.item(), rel=0.01)


def test_paths():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    steps = {name: list(found) for name, found in paths(images).items()}
    assert {name: len(found) for name, found in steps.items()} == {
        "rotation": 16,
        "shift": 9,
        "brightness": 17,
    }
    for found in steps.values():
        torch.testing.assert_close(found[0], images, rtol=0, atol=1e-5)
        assert all(step.shape == images.shape for step in found)
        assert all(0 <= step.min() and step.max() <= 1 for step in found)
    assert torch.equal(steps["shift"][-1][..., 8:], images[..., :-8])  # a quarter of the side
    assert torch.equal(steps["shift"][-1][..., :8], images[..., :1].expand(-1, -1, -1, 8))
    assert torch.equal(steps["brightness"][-1], images / 2)


def test_turns_and_shifts():
    image = torch.zeros(1, 3, 9, 9)
    image[..., 1, 4] = 1  # above the centre
    assert rotated(image, 90)[0, 0].nonzero().tolist() == [[4, 1]]  # to the left
    assert shifted(image, 3)[0, 0].nonzero().tolist() == [[1, 7]]
    white = torch.ones(1, 3, 9, 9)
    torch.testing.assert_close(rotated(white, 30), white)  # no black corners
    assert torch.equal(shifted(white, 5), white)


def test_path_lengths():
    line = torch.arange(5.0)[:, None, None] * torch.tensor([[3.0, 4], [0, 1]])  # (5, 2, 2)
    assert [part.tolist() for part in path_lengths(line)] == [[20, 4], [1, 1]]
    angle = torch.linspace(0, math.pi, 1001)
    half = torch.stack([angle.cos(), angle.sin()], 1)[:, None]
    length, ratio = path_lengths(half)
    assert length.item() == pytest.approx(math.pi, rel=1e-4)
    assert ratio.item() == pytest.approx(math.pi / 2, rel=1e-4)
    corner = torch.tensor([[0.0, 0], [3, 0], [3, 4]])[:, None]
    assert path_lengths(corner)[1].item() == pytest.approx(7 / 5)
    length, ratio = path_lengths(torch.ones(4, 3, 2))
    assert not length.any() and ratio.isnan().all()


def test_smoothness_of_a_linear_network():
    """The path of the brightness is straight; scaling the features changes nothing; the network
    that returns its input has Lipschitz number 1."""
    images = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    itself = smoothness(nn.Flatten(), images)
    assert itself["lipschitz"] == pytest.approx(1, rel=1e-5)
    network, weight = linear()
    found = smoothness(network, images)
    assert found["brightness"] == pytest.approx(1, rel=1e-5)
    assert found["rotation"] > 1.01 and found["shift"] > 1.05  # not straight
    moved = (normalize(images) - normalize(images / 2)).flatten(1).norm(dim=1).median()
    exact = moved / torch.pdist(normalize(images).flatten(1)).mean()
    assert itself["brightness_path"] == pytest.approx(exact.item(), rel=1e-4)

    x = normalize(images).flatten(1)
    top = torch.linalg.svdvals(weight)[0]
    distances = [torch.pdist(h).mean() for h in (x, x @ weight.T)]
    exact = top * distances[0] / distances[1]
    assert 0.9 * exact < found["lipschitz"] < 1.0001 * exact
    network[1].weight.data *= 100
    scaled = smoothness(network, images)
    assert scaled.pop("singular_value") == pytest.approx(100 * found.pop("singular_value").item())
    for name, value in found.items():
        assert scaled[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_smoothness_of_a_constant_network_is_not_defined():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = smoothness(lambda_network(lambda x: 0 * x.flatten(1)[:, :4] + 1), images)
    assert found.pop("singular_value") == 0
    assert all(value.isnan() for value in found.values()) and len(found) == 7


def test_short_paths_need_not_be_straight():
    """Columns of pixels are equal but for a little noise, so a shift changes nearly nothing; what
    it changes has no direction."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 1, generator=generator)
    images = images + 1e-3 * torch.rand(6, 3, 16, 16, generator=generator)
    found = smoothness(nn.Flatten(), images)
    assert found["shift"] > 2 and found["shift_path"] < 0.03
    assert found["brightness"] == pytest.approx(1, rel=1e-4) and found["brightness_path"] > 0.3


def lambda_network(function):
    network = nn.Module()
    network.forward = function
    return network.eval()


def test_batch_norm_is_left_as_it_was():
    """Its statistics are used, and not renewed, so that each image is treated by itself."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()
    network[1].running_var.fill_(2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smoothness(network, images)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    alone = largest_singular_value(network, images[:1], rounds=10)
    together = largest_singular_value(network, images, rounds=10)
    assert alone == pytest.approx(together[:1], rel=1e-4)


# -------- Clusters --------------------------------------------------------------------------------


def test_agreement_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    found = np.array([5, 5, 2, 2, 2, 2, 7, 5])
    scores = agreement(found, labels)
    assert scores["accuracy"] == pytest.approx(6 / 8)  # 5 -> 0, 2 -> 1, 7 -> 2

    # mutual information over the mean entropy; adjusted Rand index from pairs
    def entropy(*counts):
        p = np.array(counts) / 8
        return -(p * np.log(p)).sum()

    mutual = entropy(3, 3, 2) + entropy(3, 4, 1) - entropy(2, 1, 3, 1, 1)
    nmi = 2 * mutual / (entropy(3, 3, 2) + entropy(3, 4, 1))
    assert scores["nmi"] == pytest.approx(nmi)
    both, first, second, total = 1 + 3, 3 + 3 + 1, 3 + 6, 28
    chance = first * second / total
    assert scores["ari"] == pytest.approx((both - chance) / ((first + second) / 2 - chance))
    assert scores["ami"] == metrics.adjusted_mutual_info_score(labels, found)


def test_accuracy_is_the_best_of_all_assignments():
    rng = np.random.default_rng(0)
    for clusters_ in (3, 4, 6):
        labels = rng.integers(0, 4, 60)
        found = rng.integers(0, clusters_, 60)
        best = 0
        for order in itertools.permutations(range(max(4, clusters_)), clusters_):
            best = max(best, (np.array(order)[found] == labels).mean())
        assert agreement(found, labels)["accuracy"] == pytest.approx(best)


def test_agreement_of_equal_renamed_and_random_clusters():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 2000)
    renamed = np.array([3, 0, 4, 1, 2])[labels]
    assert all(v == pytest.approx(1) for v in agreement(renamed, labels).values())
    by_chance = agreement(rng.integers(0, 60, 2000), labels)
    assert abs(by_chance["ami"]) < 0.01 and abs(by_chance["ari"]) < 0.01
    # why the adjusted one is needed: mutual information by chance is (60 - 1) (5 - 1) / 2 N
    by_entropy = (59 * 4 / 4000) / ((math.log(60) + math.log(5)) / 2)
    assert by_chance["nmi"] == pytest.approx(by_entropy, rel=0.2)


def blobs(classes=3, each=12):
    """Features in directions that differ by class, with lengths that mean nothing."""
    labels = torch.arange(classes).repeat_interleave(each)
    x = 5 * torch.eye(6)[labels] + 0.05 * noise(len(labels), 6).float()
    lengths = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)) + 0.01
    return x * lengths, labels


def test_clusters_of_separate_classes():
    x, labels = blobs()
    found = clusters(x, labels)
    scores = ("nmi", "ami", "ari", "accuracy")
    assert set(found) == {f"{s}{k}{d}" for s in scores for k in ("", "_3k") for d in ("", "_std")}
    assert found["ami_3k"] < 100 and found["accuracy_3k"] < 100  # three clusters per class
    assert found["nmi"] <= 100 and found["accuracy"] >= 60
    assert clusters(x, labels) == found  # the seeds are fixed
    assert clusters(7 * x, labels) == pytest.approx(found)


def test_mean_and_deviation_of_five_seeds():
    x = noise(60, 8).float()
    labels = torch.arange(60) % 4
    unit = nn.functional.normalize(x, dim=1).numpy()
    scores = []
    for seed in range(5):
        found = KMeans(4, n_init=1, random_state=seed).fit_predict(unit)
        scores.append(100 * metrics.adjusted_rand_score(labels, found))
    result = clusters(x, labels)
    assert result["ari"] == pytest.approx(np.mean(scores))
    assert result["ari_std"] == pytest.approx(np.std(scores, ddof=1)) and result["ari_std"] > 0


def test_clusters_with_a_class_of_one_image():
    x, labels = blobs()
    labels[0] = 3  # among the images of class 0
    found = clusters(x, labels)
    assert all(math.isfinite(value) for value in found.values())
    assert 60 <= found["accuracy"] < 100 and 0 < found["ami"] < 100
    alone = agreement(np.array([0, 0, 0, 1, 1, 2]), np.array([4, 4, 4, 5, 5, 6]))
    assert all(value == pytest.approx(1) for value in alone.values())
    missed = agreement(np.array([0, 0, 0, 1, 1, 1]), np.array([4, 4, 4, 5, 5, 6]))
    assert missed["accuracy"] == pytest.approx(5 / 6)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_clusters_of_equal_features():
    labels = torch.tensor([0] * 12 + [1] * 6)
    found = clusters(torch.ones(18, 4), labels)
    assert found["nmi"] == found["ami"] == found["ari"] == 0
    assert found["accuracy"] == pytest.approx(100 * 12 / 18)  # one cluster, the larger class


# -------- Maps ------------------------------------------------------------------------------------


def test_tsne_keeps_neighbours_and_is_the_same_each_time():
    x, labels = blobs(each=10)
    points = np.array(tsne(x)["points"])
    assert points.shape == (30, 2)
    assert tsne(x)["points"] == points.tolist()
    distances = np.linalg.norm(points[:, None] - points, axis=2) + np.diag([1e9] * 30)
    assert (labels[distances.argmin(1)] == labels).all()


def test_tsne_of_equal_features_has_no_points():
    assert tsne(torch.ones(20, 3)) == {"points": []}
    lengths = torch.arange(1.0, 21)[:, None]
    assert tsne(lengths * torch.tensor([[3.0, 4]])) == {"points": []}  # of length 1 they are equal


# -------- The script ------------------------------------------------------------------------------

DATA = tiny_data(40, 64)
PROTOCOLS = ("clusters", "spectrum", "lidar", "smoothness", "tsne")


SETTINGS = {  # what each result depends on, besides the network and the images
    "clusters": {"clusters_per_class": [1, 3], "seeds": 5},
    "spectrum": {},
    "lidar": {"views": 2},
    "smoothness": {"probes": 4, "rounds": 10},
    "tsne": {},
}


def write_run(folder, network=None, arch="vit_micro"):
    """A finished run of an untrained network."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    network = network or backbone(arch, 8)
    saved = {"method": "simclr", "arch": arch, "size": 8, "data": "emoji"}
    torch.save({**saved, "weights": network.state_dict()}, folder / "backbone.pt")
    line = {"method": "simclr", "settings": {"data": "emoji", "seed": 3}}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return network


def skip(*args):
    """In place of a picture, which takes a second."""


def run_script(*flags, **patches):
    flags = ["--views", 2, "--probes", 4, "--workers", 0, *flags]
    found = call_main("eval_geometry", *flags, data=DATA, **patches)
    found.rows = read_lines(flags[flags.index("--out") + 1] / "results.jsonl")
    return found


def test_script(tmp_path):
    """All protocols: a line per protocol and network, tables, pictures; then nothing is measured
    again."""
    run = tmp_path / "simclr-emoji-0"
    net = write_run(run)
    out = tmp_path / "out"
    before = {name: value.clone() for name, value in net.state_dict().items()}
    looked_at = []

    def watch(args):
        looked_at.extend(common.candidates(args))
        return looked_at

    found = run_script(run, "--out", out, candidates=watch, draw_spectrum=skip)
    assert found.code == 0, found.err
    names = ["raw pixels, 8 px", "untrained vit_micro, 8 px", "simclr-emoji-0"]
    places = [(row["network"], row["protocol"]) for row in found.rows]
    assert places == list(itertools.product(names, PROTOCOLS))

    # the networks are as they were, to the last bit
    after = looked_at[2].network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not looked_at[2].network.training
    for candidate in looked_at:
        assert all(p.grad is None for p in candidate.network.parameters())

    for row in found.rows:
        assert row["settings"] == {"size": 8, "images": 64, **SETTINGS[row["protocol"]]}
        for name, value in row["result"].items():
            assert value is None or isinstance(value, list | float), name
    measured = {place: row["result"] for place, row in zip(places, found.rows)}
    pixels = measured["raw pixels, 8 px", "smoothness"]
    assert pixels["brightness"] == pytest.approx(1, abs=1e-4)
    assert len(measured["simclr-emoji-0", "tsne"]["points"]) == 64
    result = measured["simclr-emoji-0", "spectrum"]
    assert sum(result["shares"]) == pytest.approx(1, abs=1e-6)

    # RankMe, alignment and uniformity are those of every run
    unlabelled = DATA._replace(test=None, bank=DATA.test._replace(labels=None))
    net.to(memory_format=torch.channels_last)
    expected = common.evaluate(net, unlabelled, 8, CPU)
    assert {name: result[name] for name in expected} == expected and "uniformity" in expected

    for name in ("tsne-tiny-category.png", "tsne-tiny-artist.png"):
        assert name in found.out
        picture = np.asarray(Image.open(out / name).convert("RGB"))
        assert min(picture.shape[:2]) > 200 and picture.std() > 5
    lines = [line for line in found.out.splitlines() if line.startswith("simclr-emoji-0  ")]
    shown = (
        f"{measured['simclr-emoji-0', 'clusters']['nmi']:.1f} ± ",
        f"{result['participation']:.4g}",
        f"{measured['simclr-emoji-0', 'smoothness']['lipschitz']:.4g}",
    )
    lines.pop(2)
    assert len(lines) == 3 and all(word in line for word, line in zip(shown, lines))

    again = run_script(run, "--out", out, draw_spectrum=skip, draw_maps=skip)
    assert again.code == 0 and again.out.count(": already measured") == 15
    assert again.out.splitlines()[-25:] == found.out.splitlines()[-25:]

    # other probes: only the smoothness is measured again
    flags = [run, "--out", out, "--probes", 5]
    more = run_script(*flags, draw_spectrum=skip, draw_maps=skip)
    assert more.code == 0 and more.out.count(": already measured") == 12
    assert [row["protocol"] for row in more.rows[15:]] == ["smoothness"] * 3


def split(labels, count=12):
    images = InMemory(torch.zeros(count, 3, 8, 8, dtype=torch.uint8))
    return Split(images, None if labels is None else torch.tensor(labels))


def test_what_can_be_measured_on_which_data(capsys):
    every = PROTOCOLS
    assert choose_protocols("x", split([0, 1] * 6), "all") == every
    assert choose_protocols("x", split([0, 1] * 6), "tsne") == ("tsne",)
    for labels, classes in ((None, 0), ([4] * 12, 1), ([0, 1, 2, 3, 4, 5] * 2, 6)):
        assert choose_protocols("x", split(labels), "all") == ("spectrum", "lidar", "smoothness")
        out = capsys.readouterr().out
        assert out.startswith("left out: clusters and tsne on x need labels of two or more classes")
        assert f"12 images of {classes} classes" in out
        assert choose_protocols("x", split(labels), "smoothness") == ("smoothness",)
        with pytest.raises(SystemExit):
            choose_protocols("x", split(labels), "clusters")
        assert "error: clusters and tsne on x need labels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        choose_protocols("x", split([0, 1] * 4, 8), "all")
    assert "x: 8 images to evaluate" in capsys.readouterr().err


class Scaled(ViT):
    """A network whose features are all equal, or not numbers."""

    factor = 0.0

    def forward(self, x, u=None):
        return 1 + self.factor * super().forward(x, u)


def test_a_network_that_has_collapsed(tmp_path, monkeypatch):
    """Every number is defined, or said not to be; the file is JSON that others can read. (Clusters,
    maps and paths of equal features are above.)"""
    monkeypatch.setattr(methods.simclr, "backbone", lambda arch, size: Scaled(arch, size))
    write_run(tmp_path / "a", Scaled("vit_micro", 8))
    out = tmp_path / "out"
    looked_at = []

    def watch(args):
        found = common.candidates(args)
        looked_at.append((found[2].network, copy.deepcopy(found[2].network.state_dict())))
        return found

    found = run_script(tmp_path / "a", "--out", out, "--only", "spectrum", candidates=watch)
    # Nor do rounding errors around the one answer count as features.
    monkeypatch.setattr(Scaled, "factor", 1e-7)
    for name in ("lidar", "smoothness"):
        flags = [tmp_path / "a", "--out", tmp_path / name, "--only", name]
        alone = run_script(*flags, candidates=watch)
        for column, value in alone.rows[-1]["result"].items():
            assert value is None or column == "singular_value" and value == 0
    monkeypatch.setattr(Scaled, "factor", 0.0)
    for network, before in looked_at:  # it, too, is left as it was
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert len(looked_at) == 3
    assert found.code == 0, found.err
    text = (out / "results.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    result = found.rows[-1]["result"]
    undefined = ("exponent", "participation", "twonn", "correlation")
    assert all(result[name] is None for name in undefined)
    assert result["rankme"] == pytest.approx(1, abs=1e-3)
    assert result["uniformity"] == 0 and not any(result["shares"])
    (line,) = [line for line in found.out.splitlines() if line.startswith("a  ")]
    assert line.split().count("-") == 4
    assert (out / "spectrum-tiny.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("name", "word", "count"),
    [
        ("emoji", "category", 9),
        ("emoji", "artist", 4),
        ("tripod", "category", 9),  # its clips are those of movers
        ("bunny", "category", 4),  # numbers: it has subjects, not categories
        ("folder/emoji", "category", 4),  # a user's own images: numbers
    ],
)
def test_a_map_has_one_colour_per_label(name, word, count, tmp_path, drawn):
    """And its points have those of the labels that the legend names."""
    part = split([0, 1, 2, 3] * 3)._replace(drawing=torch.tensor([3, 0, 2] * 4))
    ways = {word: rest for word, *rest in map_labels(name, part)}
    numbers, names = ways[word]
    assert len(names) == count
    points = [[float(i), 0.0] for i in range(12)]
    draw_maps(tmp_path / "x.png", {"a": {"points": points}}, numbers, names, word)
    (figure,) = drawn
    assert f"one colour per {word}" in figure.get_suptitle()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [str(name) for name in names]
    colours = [tuple(handle.get_facecolor()[0]) for handle in legend.legend_handles]
    expected = part.drawing if word == "artist" else part.labels
    shown = figure.axes[0].collections[0].get_facecolors()
    assert [tuple(colour) for colour in shown] == [colours[i] for i in expected]


def test_the_spectrum_is_drawn_on_logarithmic_axes(tmp_path, drawn):
    shares = [0.5, 0.25, 0.25]
    draw_spectrum(tmp_path / "x.png", {"a": {"shares": shares, "exponent": 1.23456}})
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert axes.lines[0].get_ydata().tolist() == shares
    assert axes.lines[0].get_label() == "a: 1.235"


def test_films_go_through_the_script(tmp_path):
    """Clips as tripod has them: the names of their labels are in another file."""
    write_run(tmp_path / "a")
    flags = [tmp_path / "a", "--data", "tripod", "--views", 2, "--probes", 4, "--workers", 0]
    found = call_main("eval_geometry", *flags, "--out", tmp_path / "film", data=tiny_clips(60, 60))
    assert found.code == 0, found.err
    rows = read_lines(tmp_path / "film" / "results.jsonl")
    assert {row["protocol"] for row in rows} == set(PROTOCOLS)
    assert (tmp_path / "film" / "tsne-tiny-category.png").stat().st_size > 5000


def test_images_without_labels_have_no_clusters(tmp_path):
    write_run(tmp_path / "a")
    unlabelled = DATA._replace(test=None, bank=DATA.bank._replace(labels=None))
    flags = [tmp_path / "a", "--views", 2, "--probes", 4, "--workers", 0, "--out", tmp_path / "b"]
    found = call_main("eval_geometry", *flags, data=unlabelled, draw_spectrum=skip)
    assert found.code == 0, found.err
    assert "left out: clusters and tsne" in found.out
    rows = read_lines(tmp_path / "b" / "results.jsonl")
    assert {row["protocol"] for row in rows} == {"spectrum", "lidar", "smoothness"}


def test_features_that_are_not_numbers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(methods.simclr, "backbone", lambda arch, size: Scaled(arch, size))
    monkeypatch.setattr(Scaled, "factor", math.nan)
    write_run(tmp_path / "a", Scaled("vit_micro", 8))
    found = run_script(tmp_path / "a", "--out", tmp_path / "out", "--only", "smoothness")
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: some features are infinite or not a number")


def test_a_resnet_stays_as_it_was_and_a_kill_costs_one_measurement(tmp_path):
    """To the last bit, batch-norm's statistics too."""
    net = write_run(tmp_path / "a", arch="resnet14")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    looked_at = []

    def only_the_run(args):
        looked_at[:] = common.candidates(args)[-1:]
        return looked_at

    def killed(*args):
        raise InterruptedError

    flags = [tmp_path / "a", "--out", tmp_path / "out"]
    patches = {"candidates": only_the_run, "draw_spectrum": skip, "draw_maps": skip}
    with pytest.raises(InterruptedError):
        run_script(*flags, smoothness=killed, **patches)
    found = run_script(*flags, **patches)
    assert found.code == 0 and found.out.count(": already measured") == 3
    assert [row["protocol"] for row in found.rows] == list(PROTOCOLS)
    network = looked_at[0].network
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert not network.training and all(p.grad is None for p in network.parameters())


def test_several_processes_are_refused(tmp_path):
    write_run(tmp_path / "a")
    found = run_script(tmp_path / "a", "--out", tmp_path / "out", world=lambda: 2)
    assert found.code == 1 and "start it with python instead of torchrun" in found.err


def test_table():
    results = {
        "a": {"nmi": 12.34, "nmi_std": 0.56, "twonn": None, "rankme": 345.678},
        "a long name": {"nmi": 1.0, "nmi_std": 0.0, "twonn": 0.0123456, "rankme": 2.0},
    }
    lines = table(results, ("nmi", "twonn", "rankme")).splitlines()
    assert lines[0].split() == ["nmi", "twonn", "rankme"]
    assert lines[1].split() == ["a", "12.3", "±", "0.6", "-", "345.7"]
    assert lines[2].split()[-5:] == ["1.0", "±", "0.0", "0.01235", "2"]
    assert len({len(line) for line in lines}) == 1
