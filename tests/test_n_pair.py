"""N-pair loss: by hand, by the formula of TensorFlow's code, against pytorch-metric-learning; and
which image is the positive where several have the same name."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import light, noise, short

from methods import n_pair, simclr
from methods.n_pair import n_pair_loss

EXACT = {"rtol": 0, "atol": 1e-12}
LAMBDA = 0.002


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_n_pair_loss_by_hand():
    """The scores z1_i . z2_j of two pairs: 1 and 0, 2 and 3; the squared norms: 1, 5, 1, 9."""
    z1 = double([1.0, 0.0], [2.0, 1.0])
    z2 = double([1.0, 0.0], [0.0, 3.0])
    name = torch.tensor([0, 1])
    expected = (math.log(1 + math.exp(0 - 1)) + math.log(1 + math.exp(2 - 3))) / 2
    assert n_pair_loss(z1, z2, name, 0).item() == pytest.approx(expected, abs=1e-12)
    penalty = (1 + 5 + 1 + 9) / 4
    found = n_pair_loss(z1, z2, name, 0.1).item()
    assert found == pytest.approx(expected + 0.1 / 2 * penalty, abs=1e-12)


@pytest.mark.parametrize("N", [2, 3, 16])
def test_the_same_embeddings_cost_the_logarithm_of_the_batch(N):
    z = noise(1, 8).expand(N, 8)
    loss = n_pair_loss(z, z, torch.arange(N), 0)
    torch.testing.assert_close(loss.item(), math.log(N), **EXACT)


def test_two_pairs_are_a_softplus():
    z1, z2 = noise(2, 5, seed=1), noise(2, 5, seed=2)
    s = z1 @ z2.T
    expected = F.softplus(torch.stack([s[0, 1] - s[0, 0], s[1, 0] - s[1, 1]])).mean()
    torch.testing.assert_close(n_pair_loss(z1, z2, torch.arange(2), 0), expected, **EXACT)


def test_n_pair_loss_by_the_formula_of_tensorflow():
    """Cross-entropy of the similarity matrix, and a quarter of lambda times the sum of the two mean
    squared norms. In numpy; the sum of the paper's equation, in loops, is the same."""
    N = 6
    z1, z2 = noise(N, 4, seed=1), noise(N, 4, seed=2)
    a, p = z1.numpy(), z2.numpy()
    norms = 0.25 * 0.3 * ((a**2).sum(1).mean() + (p**2).sum(1).mean())
    s = a @ p.T
    entropy = np.mean(np.log(np.exp(s).sum(1)) - np.diag(s))
    found = n_pair_loss(z1, z2, torch.arange(N), 0.3).item()
    assert found == pytest.approx(entropy + norms, abs=1e-12)

    total = 0.0
    for i in range(N):
        total += math.log(1 + sum(math.exp(s[i, j] - s[i, i]) for j in range(N) if j != i))
    assert entropy == pytest.approx(total / N, abs=1e-12)


def test_n_pair_loss_against_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    N = 6
    dot = distances.DotProductSimilarity(normalize_embeddings=False)
    name = torch.arange(N)
    both = torch.cat([noise(N, 4, seed=3), noise(N, 4, seed=4)]).requires_grad_()
    pairs = name, name + N, name[:0], name[:0]
    expected = losses.NPairsLoss(distance=dot)(both, name.repeat(2), pairs)
    (slope,) = torch.autograd.grad(expected, both)
    loss = n_pair_loss(*both.chunk(2), name, 0)
    (gradient,) = torch.autograd.grad(loss, both)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient, slope, **EXACT)


# -------- Several images of one name --------------------------------------------------------------


def test_the_positive_is_the_next_image_of_the_name():
    """In a circle; an image that is alone has itself. Other images of the name are no negatives."""
    name = torch.tensor([5, 2, 5, 7, 5, 2])
    positive = [2, 5, 4, 3, 0, 1]
    z1, z2 = noise(6, 4, seed=5), noise(6, 4, seed=6)
    s = z1 @ z2.T
    total = 0.0
    for i, p in enumerate(positive):
        others = [j for j in range(6) if name[j] != name[i]]
        total += math.log(1 + sum(math.exp(s[i, j] - s[i, p]) for j in others))
    assert n_pair_loss(z1, z2, name, 0).item() == pytest.approx(total / 6, abs=1e-12)


@pytest.mark.parametrize("name", [[3, 3, 3, 3], [0, 0, 1, 1]])
def test_few_or_no_negatives_give_no_nan(name):
    z1 = noise(4, 3, seed=1).requires_grad_()
    loss = n_pair_loss(z1, noise(4, 3, seed=2), torch.tensor(name), LAMBDA)
    loss.backward()
    assert loss.isfinite() and z1.grad.isfinite().all()


# -------- Invariants ------------------------------------------------------------------------------


def test_n_pair_loss_symmetries_and_gradient():
    N = 6
    z1, z2 = noise(N, 4, seed=1), noise(N, 4, seed=2)
    name = torch.arange(N)
    loss = n_pair_loss(z1, z2, name, LAMBDA)
    turn = torch.linalg.qr(noise(4, 4)).Q
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for a, b in ((z1 @ turn, z2 @ turn), (z1[order], z2[order])):
        torch.testing.assert_close(n_pair_loss(a, b, name, LAMBDA), loss, **EXACT)
    assert (n_pair_loss(z1, z2[order], name, LAMBDA) - loss).abs() > 0.1

    # the same vector added to all positives moves all scores of an anchor alike
    shifted = n_pair_loss(z1, z2 + noise(1, 4, seed=3), name, 0)
    torch.testing.assert_close(shifted, n_pair_loss(z1, z2, name, 0), **EXACT)
    leaves = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    torch.autograd.gradcheck(lambda a, b: n_pair_loss(a, b, name, LAMBDA), leaves)


def test_the_penalty_is_what_keeps_embeddings_from_growing():
    """Of pairs that are already told apart, longer embeddings cost less, unless norms cost."""
    z = torch.eye(4, dtype=torch.float64)
    name = torch.arange(4)
    lengths = (1.0, 3.0, 10.0, 30.0)
    free = [n_pair_loss(r * z, r * z, name, 0).item() for r in lengths]
    held = [n_pair_loss(r * z, r * z, name, LAMBDA).item() for r in lengths]
    assert free == sorted(free, reverse=True)
    assert min(held) == held[1]


def test_with_unit_vectors_and_a_temperature_it_is_simclr_with_fewer_negatives():
    """N - 1 of them, the other second views, where SimCLR has the other first views, too: of pairs
    that are orthogonal to each other, twice as many."""
    tau = 0.05
    N = 5
    axes = torch.eye(2 * N, dtype=torch.float64)
    z1 = axes[:N]
    z2 = F.normalize(z1 + 0.3 * axes[N:], dim=1)
    s = (z1[0] @ z2[0]).item() / tau
    ours = n_pair_loss(z1 / tau**0.5, z2 / tau**0.5, torch.arange(N), 0)
    assert ours.item() == pytest.approx(math.log1p((N - 1) * math.exp(-s)), abs=1e-12)
    expected = math.log1p(2 * (N - 1) * math.exp(-s))
    assert simclr.nt_xent(z1, z2, tau).item() == pytest.approx(expected, abs=1e-12)


def test_main_gives_the_loss_both_views_of_all_images(train, monkeypatch):
    seen = []

    def loss(z1, z2, name, lambda_):
        seen.append((z1.detach(), z2.detach(), name, lambda_))
        return n_pair_loss(z1, z2, name, lambda_)

    monkeypatch.setattr(n_pair, "n_pair_loss", loss)
    flags = [*short("n_pair", positives="drawings"), "--lambda", 0.01]
    train("n_pair", *flags, **light("n_pair"))
    assert len(seen) == 4
    for z1, z2, name, lambda_ in seen:
        assert z1.shape == z2.shape == (12, 32) and z1.norm(dim=1).std() > 0.01
        assert torch.equal(name[0::2], name[1::2]) and lambda_ == 0.01
        assert (z1 - z2).abs().max() > 1e-3
