"""Lifted structure: Eq. 3 and Eq. 4 by hand, the official layer step by step with its gradient,
pytorch-metric-learning, and the bound."""

import math

import numpy as np
import pytest
import torch
from conftest import arguments, light, noise, short

from methods import lifted_structure
from methods.lifted_structure import lifted_loss

EXACT = {"rtol": 0, "atol": 1e-12}
MARGIN = 1.0
EITHER = pytest.mark.parametrize("smooth", [True, False])


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def loss_and_gradient(z, name, margin=MARGIN, smooth=True):
    z = z.clone().requires_grad_()
    loss = lifted_loss(z, name, margin, smooth)
    loss.backward()
    return loss.detach(), z.grad


def test_both_equations_by_hand():
    """On a line: the pair at 0 and 1, negatives at -2 and 1.5. D between the pair is 1; the
    negatives are 2 and 1.5 away from the first, 3 and 0.5 from the second."""
    z = double([0.0], [1.0], [-2.0], [1.5])
    name = torch.tensor([0, 0, 1, 2])
    inside = [1 - 2, 1 - 1.5, 1 - 3, 1 - 0.5]
    J = max(inside) + 1
    assert lifted_loss(z, name, 1.0, False).item() == pytest.approx(J**2 / 2, abs=1e-12)
    J = math.log(sum(map(math.exp, inside))) + 1
    assert lifted_loss(z, name, 1.0, True).item() == pytest.approx(J**2 / 2, abs=1e-12)


def official_layer(x, label, margin):
    """What lifted_struct_similarity_softmax_layer.cpp computes, loop by loop: the loss, and the
    gradient that it builds by hand."""
    N = len(x)
    D = np.sqrt(((x[:, None] - x) ** 2).sum(2))
    gradient = np.zeros_like(x)
    loss = 0.0
    pairs = 0
    for i in range(N):
        for j in range(i + 1, N):
            if label[i] != label[j]:
                continue
            # the negatives of i, then those of j
            met = [(i, k) for k in range(N) if label[k] != label[i]]
            met += [(j, k) for k in range(N) if label[k] != label[j]]
            inside = np.array([margin - D[pair] for pair in met])
            weight = np.exp(inside - inside.max())
            J = max(0.0, np.log(weight.sum()) + inside.max() + D[i, j])
            loss += J**2
            pairs += 1

            pull = 2 * J * (x[i] - x[j]) / D[i, j]
            gradient[i] += pull
            gradient[j] -= pull
            for (a, k), w in zip(met, weight / weight.sum()):
                push = -2 * J * w * (x[a] - x[k]) / D[a, k]
                gradient[a] += push
                gradient[k] -= push
    return loss / pairs / 2, gradient / pairs / 2


@pytest.mark.parametrize("name", [[0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 1, 1, 2, 2, 0]])
def test_smooth_loss_is_that_of_the_official_layer(name):
    z = 0.7 * noise(8, 3, seed=1)
    loss, gradient = loss_and_gradient(z, torch.tensor(name))
    expected, slope = official_layer(z.numpy(), name, MARGIN)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(gradient, torch.from_numpy(slope), **EXACT)


def test_smooth_loss_against_pytorch_metric_learning():
    """Its mean over ordered pairs, each with half of the square, is ours, if it is told not to
    normalise the embeddings."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    plain = distances.LpDistance(normalize_embeddings=False)
    theirs = losses.LiftedStructureLoss(neg_margin=MARGIN, pos_margin=0, distance=plain)
    name = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])
    z = 0.7 * noise(8, 3, seed=2)
    leaf = z.clone().requires_grad_()
    expected = theirs(leaf, name)
    expected.backward()
    loss, gradient = loss_and_gradient(z, name)
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, leaf.grad, **EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_the_smooth_loss_bounds_the_other_from_above(seed):
    """log(sum of exp) is at least the maximum, and at most log(count) more."""
    z = noise(10, 3, seed=seed)
    name = torch.arange(5).repeat(2)
    hard = lifted_loss(z, name, MARGIN, False)
    assert hard < lifted_loss(z, name, MARGIN, True)
    # 16 negatives of each pair
    assert lifted_loss(z, name, MARGIN, True) < lifted_loss(z, name, MARGIN + math.log(16), False)


@EITHER
def test_a_larger_margin_moves_every_pair_by_the_difference(smooth):
    """J_ij + c: from three margins, of which the squares have the second difference c^2."""
    z = noise(8, 3, seed=3)
    name = torch.arange(4).repeat(2)
    low, middle, high = [lifted_loss(z, name, margin, smooth) for margin in (5.0, 6.0, 7.0)]
    torch.testing.assert_close((high - 2 * middle + low).item(), 1.0, rtol=0, atol=1e-9)


@EITHER
def test_classes_far_apart_have_no_loss(smooth):
    """Squaring without max(0, ...) would draw them together again."""
    z = 40 * torch.eye(4, dtype=torch.float64).repeat(2, 1) + 0.01 * noise(8, 4)
    loss, gradient = loss_and_gradient(z, torch.arange(4).repeat(2), smooth=smooth)
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(gradient))


def test_only_the_nearest_negative_moves_without_the_bound():
    """In Eq. 3 the others have no gradient at all, in Eq. 4 all negatives have one."""
    z = double([0.0, 0.0], [1.0, 0.2], [0.0, 1.5], [-2.0, 0.5], [1.0, -1.0])
    name = torch.tensor([0, 0, 1, 2, 3])
    _, hard = loss_and_gradient(z, name, smooth=False)
    _, soft = loss_and_gradient(z, name, smooth=True)
    assert (hard.norm(dim=1) > 0).tolist() == [True, True, False, False, True]
    assert (soft.norm(dim=1) > 0).all()


@EITHER
@pytest.mark.parametrize("name", [[4, 4, 4, 4], [0, 0, 1, 1]])
def test_no_negatives_and_equal_points_give_no_nan(smooth, name):
    """A small batch may hold one label only; and two views may be sent to the same point. There is
    no NaN on the way back either, where masked_fill would hide it."""
    z = double([1.0, 2.0]).repeat(4, 1)
    with torch.autograd.set_detect_anomaly(True):
        loss, gradient = loss_and_gradient(z, torch.tensor(name), smooth=smooth)
    assert loss.isfinite() and gradient.isfinite().all()
    if len(set(name)) == 1:
        assert loss == 0
    else:
        J = MARGIN + (math.log(4) if smooth else 0)
        assert loss.item() == pytest.approx(J**2 / 2, abs=1e-12)


@EITHER
def test_the_loss_of_a_collapsed_network(smooth):
    """Of a batch of 6 images: what curve.png shows as a line, and the default's number by hand."""
    args = arguments("lifted_structure", "--batch", 6, "--margin", 0.7)
    args.smooth = smooth
    J = 0.7 + (math.log(20) if smooth else 0)
    loss = lifted_loss(double([1.0, 2.0]).repeat(12, 1), torch.arange(6).repeat(2), 0.7, smooth)
    assert loss.item() == pytest.approx(J**2 / 2, abs=1e-12)
    assert lifted_structure.loss_of_collapse(args) == pytest.approx(J**2 / 2)
    at_the_defaults = lifted_structure.loss_of_collapse(arguments("lifted_structure"))
    assert at_the_defaults == pytest.approx((1 + math.log(1020)) ** 2 / 2)


@EITHER
def test_symmetries_and_gradient(smooth):
    z = noise(8, 3, seed=4)
    name = torch.arange(4).repeat(2)
    loss = lifted_loss(z, name, MARGIN, smooth)
    turn = torch.linalg.qr(noise(3, 3)).Q
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for other, names in ((z @ turn + 2, name), (z[order], name[order]), (z, 9 - name)):
        torch.testing.assert_close(lifted_loss(other, names, MARGIN, smooth), loss, **EXACT)
    leaf = z.clone().requires_grad_()
    torch.autograd.gradcheck(lambda x: lifted_loss(x, name, MARGIN, smooth), leaf)


def test_main_gives_the_loss_both_views_of_all_images(train, monkeypatch):
    seen = []

    def loss(z, name, margin, smooth):
        seen.append((z.detach(), name, margin, smooth))
        return lifted_loss(z, name, margin, smooth)

    monkeypatch.setattr(lifted_structure, "lifted_loss", loss)
    flags = [*short("lifted_structure", positives="drawings", margin=0.7), "--no-smooth"]
    train("lifted_structure", *flags, **light("lifted_structure"))
    assert len(seen) == 4
    for z, name, margin, smooth in seen:
        assert z.shape == (24, 32) and z.norm(dim=1).std() > 0.01  # not normalised
        assert torch.equal(name[:12], name[12:]) and torch.equal(name[0:12:2], name[1:12:2])
        assert margin == 0.7 and smooth is False
