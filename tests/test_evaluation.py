"""The evaluation: kNN, linear probe, retrieval and collapse panel against values computed by hand
or by scikit-learn. It leaves a network as it was, and gives the same for any number of
processes."""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, noise, tiny_data
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import common
from common import (
    Data,
    InMemory,
    Split,
    across_drawings,
    backbone,
    collapse_panel,
    evaluate,
    features,
    fit_logistic,
    knn,
    linear_classifier,
    linear_probe,
    load_data,
    pixels,
    retrieval,
)
from kernels.views import normalize

# percent: four standard deviations of 2,000 guesses among ten classes
CHANCE = 4 * 100 * math.sqrt(0.1 * 0.9 / 2000)


def at_angles(*degrees):
    """Unit vectors (n, 2): the cosine of two is that of the angle between them."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def normal(n, dim, seed):
    return noise(n, dim, seed=seed, dtype=torch.float32)


def random_labels(n, classes, seed):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def clusters(n, dim, classes, seed, spread=1.0):
    """Features (n, dim) around one centre per class, and labels."""
    labels = random_labels(n, classes, seed)
    return normal(classes, dim, 99)[labels] + spread * normal(n, dim, seed + 1), labels


# -------- kNN -------------------------------------------------------------------------------------


def test_knn_weighs_by_exp_of_cosine_over_temperature():
    # One neighbour of label 0 at cosine 1, two of label 1 at cosine s: label 0 wins if
    # exp(1 / 0.07) > 2 exp(s / 0.07), that is, if s < 1 - 0.07 ln 2 = 0.95148. The fourth is at
    # cosine -1.
    def won_by(s, k, **options):
        angle = math.degrees(math.acos(s))
        bank = at_angles(0.0, angle, -angle, 180.0)
        labels = torch.tensor([0, 1, 1, 2])
        query = at_angles(0.0)
        return [knn(bank, labels, query, torch.tensor([y]), k, **options) for y in range(3)]

    assert won_by(0.950, 3) == [100, 0, 0]
    assert won_by(0.953, 3) == [0, 100, 0]
    # exp(-1 / 0.07) of a vote changes nothing
    assert won_by(0.950, 4) == [100, 0, 0]
    assert won_by(0.953, 4) == [0, 100, 0]
    assert won_by(0.953, 1) == [100, 0, 0]
    # a large temperature: the majority; a small one: the nearest, and no overflow
    assert won_by(0.5, 3, temperature=1e4) == [0, 100, 0]
    assert won_by(0.998, 3, temperature=1e-3) == [100, 0, 0]

    bank = at_angles(0.0, 90.0, 180.0, 270.0)
    queries = at_angles(10.0, 80.0, 190.0, 300.0, 5.0)
    assert knn(bank, torch.arange(4), queries, torch.tensor([0, 1, 2, 3, 1]), 1) == 80


def test_knn_on_separable_features_on_noise_and_on_itself():
    x, labels = clusters(1000, 16, 10, seed=0, spread=0.1)
    test, test_labels = clusters(700, 16, 10, seed=7, spread=0.1)  # 700: more than a block of 512
    assert knn(x, labels, test, test_labels, 20) == 100
    assert knn(x, labels, x, labels, 20) == 100
    x = normal(2000, 16, 0)
    labels = random_labels(2000, 10, 1)
    for k in (20, 200):
        found = knn(x, labels, normal(2000, 16, 2), random_labels(2000, 10, 3), k)
        assert abs(found - 10) < CHANCE
    assert knn(x, labels, x, labels, 1) == 100  # the nearest of each is itself


def test_knn_depends_on_directions_only_and_accepts_a_k_beyond_the_bank():
    x, labels = clusters(300, 16, 5, seed=0, spread=2.0)
    test, test_labels = clusters(300, 16, 5, seed=7, spread=2.0)
    found = knn(x, labels, test, test_labels, 20)
    assert 30 < found < 95  # hard enough that a change would show
    turn = torch.linalg.qr(normal(16, 16, 5))[0]
    lengths = normal(300, 1, 6).exp()
    assert knn(lengths * x @ turn, labels, test @ turn, test_labels, 20) == found
    # k beyond the bank: everyone votes
    all_of_50 = knn(x[:50], labels[:50], test, test_labels, 50)
    assert knn(x[:50], labels[:50], test, test_labels, 200) == all_of_50
    share = 100 * (test_labels == labels[0]).double().mean().item()
    assert knn(x[:1], labels[:1], test, test_labels, 200) == share


# -------- Linear probe ----------------------------------------------------------------------------


def test_directions_of_fewer_images_than_features():
    """Those in which images differ; all others have a variance of 0."""
    x = noise(5, 40, dtype=torch.float32)
    x = x - x.mean(0)  # 5 images around 0 differ along 4 directions
    variance, rotation = common.principal_directions(x)
    assert rotation.shape == (40, 4)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(4))
    torch.testing.assert_close(x @ rotation @ rotation.T, x)
    torch.testing.assert_close((x @ rotation).square().mean(0), variance)


def test_probe_of_few_images_ignores_columns_that_are_zero():
    """Added to the features, they make the images fewer than the features. What the probe learns
    must not depend on which of the two ways to the directions is taken."""
    labels, test_labels = random_labels(60, 3, 0), random_labels(500, 3, 1)
    centers = normal(3, 20, 2)
    bank, test = centers[labels] + normal(60, 20, 3), centers[test_labels] + normal(500, 20, 4)
    padded = [F.pad(x, (0, 100)) for x in (bank, test)]
    found = common.linear_classifier(padded[0], labels)(padded[1])
    assert torch.equal(found, common.linear_classifier(bank, labels)(test))


def test_probe_of_features_that_are_all_equal():
    """One answer for all, however few images there are: the most frequent class."""
    labels = torch.tensor([0, 1, 1, 1, 2] * 4)
    for width in (3, 30):
        x = torch.ones(20, width)
        assert linear_probe(x.clone(), labels, x.clone(), labels) == 60


def test_probe_on_one_hot_features_and_on_random_labels():
    labels = random_labels(300, 7, 0)
    test_labels = random_labels(200, 7, 1)
    x = F.one_hot(labels).float()
    assert linear_probe(x, labels, F.one_hot(test_labels).float(), test_labels) == 100
    bank = normal(2000, 32, 0), random_labels(2000, 10, 1)
    test = normal(2000, 32, 2), random_labels(2000, 10, 3)
    assert abs(linear_probe(*bank, *test) - 10) < CHANCE


def copied(sets):
    """linear_probe overwrites the features."""
    return [part.clone() for part in sets]


def by_sklearn(x, y, decay):
    """scikit-learn minimises C * sum of losses + ||w||^2 / 2; ours is the mean of losses +
    decay / 2 ||w||^2."""
    solver = LogisticRegression(C=1 / (len(x) * decay), tol=1e-9, max_iter=10_000)
    return solver.fit(x.double().numpy(), y.numpy())


@pytest.mark.parametrize("decay", [1.0, 0.01, 1e-3])
def test_logistic_regression_is_that_of_scikit_learn_and_has_converged(decay):
    x, y = clusters(600, 24, 5, seed=0, spread=2.5)
    x = x @ torch.diag(torch.logspace(-2, 1, 24))  # columns of very different size ...
    x = (x - x.mean(0)) @ torch.linalg.eigh(torch.cov(x.T))[1]  # ... and decorrelated, as in probes
    variance = x.square().mean(0)
    weight, bias = fit_logistic(x, y, variance, decay, torch.zeros(5, 24), torch.zeros(5))

    w = weight.double().requires_grad_()
    b = bias.double().requires_grad_()
    loss = F.cross_entropy(F.linear(x.double(), w, b), y) + decay / 2 * w.square().sum()
    loss.backward()
    scale = (0.1 * variance + decay).rsqrt()  # the solver's coordinates are w / scale
    # the solver stops at 1e-4; the logits are in float32, whose mean over the images adds less than
    # 1e-5
    assert (w.grad * scale).abs().max() < 1.1e-4 and b.grad.abs().max() < 1.1e-4

    # In the solver's coordinates the curvature is of the order of 1, at the least a tenth where few
    # images are in doubt. So its gradient of 1e-4 means an error of 1e-3 at most, in units of the
    # logits that a column of usual size contributes.
    theirs = by_sklearn(x, y, decay)
    assert ((weight - torch.from_numpy(theirs.coef_)) / scale).abs().max() < 1e-3
    ours = F.linear(x, weight, bias).softmax(1).numpy()
    assert np.abs(ours - theirs.predict_proba(x.double().numpy())).max() < 1e-3


def recorded_fits(monkeypatch):
    """The decay and the labels of the rows of each call of fit_logistic, which runs as ever."""
    calls = []

    def fit(x, y, variance, decay, *start, rows=None):
        calls.append((decay, y if rows is None else y[rows]))
        return fit_logistic(x, y, variance, decay, *start, rows=rows)

    monkeypatch.setattr(common, "fit_logistic", fit)
    return calls


def test_probe_is_scikit_learns_with_the_decay_chosen_on_the_bank(monkeypatch):
    x, y = clusters(800, 30, 6, seed=0, spread=3.0)
    test, test_y = clusters(1000, 30, 6, seed=7, spread=3.0)
    calls = recorded_fits(monkeypatch)
    found = linear_probe(x.clone(), y, test.clone(), test_y)
    # from strong to weak; then one of them again, for all of the bank
    *tried, chosen = [decay for decay, _ in calls]
    assert len(tried) > 2 and tried == sorted(tried, reverse=True) and chosen in tried
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    x = (x - mean) / std
    test = (test - mean) / std
    theirs = 100 * by_sklearn(x, y, chosen).score(test.numpy(), test_y.numpy())
    # one of 1,000 images, where two classes tie within 1e-3
    assert 40 < found < 95 and abs(found - theirs) <= 0.1

    # the choice, by scikit-learn's loss on the same fifth of the bank: it falls up to the one
    # chosen, then rises
    held = np.isin(np.arange(800), np.random.default_rng(0).permutation(800)[:160])
    losses = []
    for decay in tried:
        fitted = by_sklearn(x[~held], y[~held], decay)
        losses.append(log_loss(y[held], fitted.predict_proba(x[held].double().numpy())))
    assert losses[:-1] == sorted(losses[:-1], reverse=True)
    assert losses[-1] > losses[-2] and chosen == tried[-2]


def test_probe_does_not_take_the_majority_for_an_answer():
    # 80 % of one class. A strong decay leaves only the bias, which always says that class, and a
    # little less decay changes nothing: the search must go on. The centres are 3 standard
    # deviations from the best border: 99 % and more are right.
    def two_classes(n):
        y = (torch.arange(n) % 5 == 0).long()
        return 6 * y[:, None] * torch.tensor([[1.0, 0.0]]) + normal(n, 2, n), y

    assert linear_probe(*two_classes(1000), *two_classes(500)) > 98.5


def test_probe_does_not_split_groups(monkeypatch):
    calls = recorded_fits(monkeypatch)
    labels = torch.arange(80) % 20  # here the label names the group, of four images each
    sets = normal(80, 8, 0), labels, normal(20, 8, 1), torch.arange(20)
    linear_probe(*copied(sets), groups=1000 - labels)
    fitted = [labels for _, labels in calls]
    for part in fitted[:-1]:  # a fifth of the groups is held out, whole
        assert sorted(part.bincount(minlength=20).tolist()) == [0] * 4 + [4] * 16
    assert len(fitted[-1]) == 80  # at last, all of the bank
    calls.clear()
    linear_probe(*copied(sets))
    counts = [len(labels) for _, labels in calls]
    assert counts == [64] * (len(calls) - 1) + [80]


def test_probe_ignores_scale_and_offset_and_survives_degenerate_features():
    x, y = clusters(300, 12, 4, 0, spread=2.0)
    test, test_y = clusters(200, 12, 4, 7, spread=2.0)

    def probe(x, test):
        return linear_probe(x.clone(), y, test.clone(), test_y)

    found = probe(x, test)

    scale = normal(1, 12, 5).exp()
    offset = 10 * normal(1, 12, 6)
    moved = probe(x * scale + offset, test * scale + offset)
    assert abs(moved - found) <= 0.5  # one of 200 images
    constant = torch.ones(300, 3)
    with_constants = probe(torch.cat([x, constant], 1), torch.cat([test, constant[:200]], 1))
    assert abs(with_constants - found) <= 0.5
    wide = normal(300, 400, 8)  # more dimensions than images
    assert probe(torch.cat([5 * x, wide], 1), torch.cat([5 * test, wide[:200]], 1)) > 25
    assert 0 <= probe(constant, constant[:200]) <= 100  # collapsed


# -------- Retrieval and collapse panel ------------------------------------------------------------


def test_retrieval_across_drawings():
    # Emoji A by artists 0 and 1 at 0 and 10 degrees, B at 5 and 90. By other artists:
    #     A0 sees A1, B1 and finds A1;            A1 sees A0, B0 and finds B0, wrong;
    #     B0 sees A1, B1 and finds A1, wrong;     B1 sees A0, B0 and finds B0.
    x = at_angles(0.0, 10.0, 5.0, 90.0)
    emoji = torch.tensor([0, 0, 1, 1])
    drawing = torch.tensor([0, 1, 0, 1])
    assert retrieval(x, emoji, drawing, 1) == 50
    assert retrieval(x, emoji, drawing, 2) == 100
    lengths = torch.tensor([[5.0], [1.0], [0.1], [3.0]])
    assert retrieval(x * lengths, emoji, drawing, 1) == 50  # cosine
    # 600 emoji by two artists, alike up to a little noise: all are found. By chance: one in 600.
    emoji = torch.arange(1200) // 2
    drawing = torch.arange(1200) % 2
    x = normal(600, 32, 0)[emoji]
    assert retrieval(x + 0.1 * normal(1200, 32, 1), emoji, drawing, 1) == 100
    assert retrieval(normal(1200, 32, 2), emoji, drawing, 1) < 1


def test_retrieval_from_fewer_images_than_asked_for():
    """An image is no neighbour of itself, and none by its own artist is one, though k is larger."""
    x = at_angles(0.0, 10.0, 50.0, 90.0)
    drawing = torch.tensor([0, 1, 2, 2])
    assert across_drawings(x, drawing, 5).tolist() == [[1, 2], [0, 2], [1, 0], [1, 0]]
    assert retrieval(x, torch.arange(4), drawing, 5) == 0
    assert retrieval(x, torch.tensor([0, 0, 1, 1]), drawing, 5) == 50
    assert across_drawings(x, torch.zeros(4, dtype=torch.long), 5).shape == (4, 0)


def test_rankme():
    def rankme(x):
        return collapse_panel(x, x[:5], x[:5])["rankme"]

    orthonormal = torch.linalg.qr(normal(1000, 64, 0))[0]
    assert rankme(orthonormal) == pytest.approx(64, abs=5e-3)
    assert rankme(normal(1000, 1, 1) @ normal(1, 64, 2)) == pytest.approx(1, abs=5e-4)
    gaussian = normal(1000, 64, 3)
    assert rankme(gaussian) == pytest.approx(63.5, abs=0.1)
    assert rankme(1000 * gaussian) == pytest.approx(rankme(gaussian), abs=1e-3)
    # singular values 3 and 1: p = 3/4, 1/4, exp(entropy) = (4/3)^(3/4) 4^(1/4) = 1.7548
    two = orthonormal[:, :2] * torch.tensor([3.0, 1.0])
    assert rankme(two) == pytest.approx(1.7548, abs=1e-4)
    assert rankme(normal(40, 64, 4)) <= 40 + 1e-3  # at most the number of images


def test_uniformity_alignment_and_spread():
    x = at_angles(0.0, 90.0, 180.0)
    panel = collapse_panel(x, 7 * x, x)
    # squared distances 2, 2 and 4 of the three pairs
    uniformity = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert panel["uniformity"] == pytest.approx(uniformity, rel=1e-5)
    assert panel["alignment"] == pytest.approx(0, abs=1e-12)
    # columns 1, 0, -1 and 0, 1, 0: standard deviations 1 and 1/sqrt(3)
    assert panel["feature_std"] == pytest.approx((1 + 3**-0.5) / 2, rel=1e-5)
    assert panel["feature_std_isotropic"] == pytest.approx(2**-0.5)
    # 60 degrees apart: squared distance 2 - 2 cos 60 = 1; opposite: 4; together: 0
    panel = collapse_panel(x, x, at_angles(60.0, 270.0, 180.0))
    assert panel["alignment"] == pytest.approx(5 / 3, rel=1e-5)
    sphere = normal(3000, 50, 0)
    panel = collapse_panel(sphere, sphere, sphere)
    assert panel["feature_std"] == pytest.approx(50**-0.5, rel=0.01)


def test_collapsed_features():
    same = torch.ones(100, 8) * torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 1.0, 1.0, -1.0])
    expected = {"feature_std": 0, "rankme": 1, "alignment": 0, "uniformity": 0}
    expected["feature_std_isotropic"] = 8**-0.5
    assert collapse_panel(same, same, same) == pytest.approx(expected, abs=1e-4)
    dead = collapse_panel(0 * same, 0 * same, 0 * same)
    assert all(math.isfinite(value) for value in dead.values())


# -------- The whole of it -------------------------------------------------------------------------

PANEL = {"feature_std", "feature_std_isotropic", "rankme", "alignment", "uniformity"}
KNN = {"knn20", "knn200"}
RETRIEVAL = {"retrieval1", "retrieval5"}
ACCURACIES = {*KNN, "linear", *RETRIEVAL}


def some_emoji(bank, test):
    """The emoji, cut to the first images of both splits."""
    data = load_data("emoji", "unused", CPU)

    def cut(split, n):
        images, *numbers = split
        return Split(InMemory(images.pixels[:n].clone()), *[part[:n].clone() for part in numbers])

    train = cut(data.train, bank)
    return Data("emoji", train, train, cut(data.test, test))


def test_features_are_in_index_order_and_resized():
    index = torch.arange(600)  # more than two blocks of 256
    colour = torch.stack([index % 256, index // 256, 0 * index], 1).to(torch.uint8)[
        :, :, None, None
    ]
    expected = normalize(colour / 255).expand(-1, -1, 4, 4).flatten(1)
    for side in (4, 7):
        images = InMemory(colour.expand(-1, -1, side, side).contiguous())
        x, readable = features(pixels(4), Split(images), 4, CPU)
        assert x.shape == (600, 3 * 4 * 4) and x.dtype == torch.float32 and readable.all()
        # of values up to 2.6: float32 in resizing
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    # Frames that are 4 pixels wide and 2 high become squares, too.
    frames = InMemory(colour.expand(-1, -1, 2, 4).contiguous())
    x, _ = features(pixels(4), Split(frames), 4, CPU)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_returns_everything_and_leaves_the_network_alone(training):
    data = some_emoji(160, 80)
    torch.manual_seed(0)
    network = backbone("resnet14", 16).train(training)
    network(torch.randn(8, 3, 16, 16))  # so that batch-norm has met something
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = evaluate(network, data, 16, CPU)
    assert set(found) == ACCURACIES | PANEL
    assert all(math.isfinite(value) for value in found.values())
    assert all(0 <= found[name] <= 100 for name in ACCURACIES)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(module.training == training for module in network.modules())
    assert all(w.grad is None and w.requires_grad for w in network.parameters())

    assert evaluate(network, data, 16, CPU) == found  # nothing in it is random
    quick = evaluate(network, data, 16, CPU, only_knn=True)
    assert quick == {name: found[name] for name in KNN | RETRIEVAL}
    unlabelled = Data("some", Split(data.train.images), Split(data.train.images), None)
    assert set(evaluate(network, unlabelled, 16, CPU)) == PANEL
    assert evaluate(network, unlabelled, 16, CPU, only_knn=True) == {}


def test_probe_of_evaluate_keeps_the_drawings_of_an_emoji_together(monkeypatch):
    seen = []

    def probe(bank, bank_labels, test, test_labels, groups):
        seen.append(groups)
        return 0.0

    monkeypatch.setattr(common, "linear_probe", probe)
    data = some_emoji(40, 8)
    evaluate(pixels(8), data, 8, CPU)
    assert torch.equal(seen[0], data.bank.emoji)


def evaluated(sizes):
    """The evaluation, and the features, in this process."""
    data = some_emoji(*sizes)
    torch.manual_seed(0)
    network = backbone("resnet14", 16)
    return evaluate(network, data, 16, CPU), features(network, data.bank, 16, CPU)[0]


def test_evaluation_does_not_depend_on_the_number_of_processes(processes):
    expected, x = evaluated((203, 96))
    for world in (2, 3):  # 203 images do not divide
        results = processes(world, evaluated, (203, 96))
        # A convolution may add its products in another order in a batch of other size: a few
        # roundings of 6e-8 in each of ten layers. Accuracies are counts, and the same.
        torch.testing.assert_close(results[0][1], x, rtol=1e-4, atol=1e-5)
        assert all(features is None for _, features in results[1:])  # one process is enough
        for found, _ in results:
            assert all(found[name] == expected[name] for name in ACCURACIES)
            assert found == pytest.approx(expected, rel=1e-4)


# -------- The classifier of the linear probe ------------------------------------------------------


def blobs(count, seed, dim=6, classes=3):
    labels = torch.arange(count) % classes
    return 0.8 * noise(count, dim, seed=seed).float() + labels[:, None], labels


@pytest.mark.parametrize("case", ["constant", "one class", "four images", "float16"])
def test_classifier_of_degenerate_features(case):
    """The most frequent label, the only label, one image that chooses the decay, halves."""
    bank, labels = blobs(30, 1)
    test, truth = blobs(50, 2)
    if case == "constant":
        bank, test = torch.ones_like(bank), torch.ones_like(test)
        labels = (torch.arange(30) % 5 == 0).long()  # 24 of 30 are 0
        truth = torch.zeros_like(truth)
    elif case == "one class":
        labels, truth = labels * 0, truth * 0
    elif case == "four images":
        bank, labels = bank[:4], labels[:4]
    else:
        bank, test = bank.half(), test.half()
    found = linear_classifier(bank, labels)(test)
    right = (found == truth).double().mean().item()
    if case in ("constant", "one class"):
        assert right == 1
    elif case == "float16":
        assert 0.4 < right < 1
    assert set(found.tolist()) <= set(labels.tolist())


@pytest.mark.parametrize(("count", "held"), [(2, 1), (4, 1), (5, 1), (9, 1), (10, 2)])
def test_the_decay_is_chosen_on_a_fifth_of_the_images_at_least_one(count, held, monkeypatch):
    calls = recorded_fits(monkeypatch)
    linear_classifier(*blobs(count, 1))
    sizes = [len(labels) for _, labels in calls]
    assert sizes[:-1] == [count - held] * (len(sizes) - 1) and sizes[-1] == count
    assert len(sizes) > 2  # the loss was a number: the search did not end with the first decay


def test_classifier_of_a_single_group_takes_the_strongest_decay(monkeypatch):
    calls = recorded_fits(monkeypatch)
    bank, labels = blobs(6, 1)
    answer = linear_classifier(bank, labels, groups=torch.zeros(6))(blobs(8, 2)[0])
    decay, rows = calls[-1]
    assert decay == 10 and len(rows) == 6  # all of them are fitted
    assert len(answer) == 8


def test_classifier_of_fewer_images_than_features():
    """Many features of an untrained network are 0 for all images. Of this covariance LAPACK finds
    no eigenvalues in float32."""
    data = tiny_data(40, 16)
    torch.manual_seed(3)
    net = backbone("resnet14", 16).to(memory_format=torch.channels_last)
    bank, _ = features(net, data.bank, 16, CPU)
    test, _ = features(net, data.test, 16, CPU)
    kept = data.bank.drawing != 0
    bank, labels, groups = bank[kept], data.bank.labels[kept], data.bank.emoji[kept]
    assert linear_probe(bank, labels, test, data.test.labels, groups) > 30


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["bank", "test"])
def test_features_that_are_not_finite_are_refused(value, where, capsys):
    """Those of one image are enough."""
    data = some_emoji(16, 8)

    class Spoiled(torch.nn.Flatten):
        def forward(self, x):
            h = super().forward(x).clone()
            if len(h) == {"bank": len(data.bank.images), "test": len(data.test.images)}[where]:
                h[3, 5] = value
            return h

    with pytest.raises(SystemExit):
        evaluate(Spoiled(), data, 8, CPU, only_knn=True)
    error = capsys.readouterr().err
    assert error.startswith("error: some features are infinite or not a number")
    assert error.count("\n") == 1


def test_features_beyond_float16_are_refused_where_it_holds_them(capsys):
    """70,000 is a number in float32 and infinite in float16, which large matrices have."""

    class Large(torch.nn.Flatten):
        def forward(self, x):
            return super().forward(x) * 0 + 70_000

    images = some_emoji(16, 8).bank.images

    class Many:  # as many as have more than 2^27 numbers; only the first ones are looked at
        def __len__(self):
            return 1 << 20

        def whole(self, indices, *how):
            return images.whole(indices[:16], *how)

    x, _ = features(Large(), Split(images), 8, CPU)
    assert (x == 70_000).all()
    with pytest.raises(SystemExit):
        features(Large(), Split(Many()), 8, CPU)
    assert "some features are infinite" in capsys.readouterr().err


def test_results_lock_their_folder_and_write_json(tmp_path):
    """Numbers of numpy and torch become Python's, what is not defined becomes null."""
    args = SimpleNamespace(out=str(tmp_path / "out"), argv=[])
    results = common.Results("eval_x", args, CPU)
    assert str(os.getpid()) in (tmp_path / "out" / ".lock").read_text()
    candidate = common.Candidate("a", None, "tiny", 8, {})
    parts = {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": [math.nan, {"d": math.inf}]}
    found = results.measure("x", candidate, lambda: parts)
    assert found == {"a": 0.5, "b": 2.0, "c": [None, {"d": None}]}
    text = results.path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert results.measure("x", candidate, None) == found
    del results
    assert common.Results("eval_x", args, CPU).rows[0]["result"] == found
