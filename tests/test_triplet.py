"""Triplet loss with semi-hard negatives: by hand, by the procedure of TensorFlow's code in loops,
against pytorch-metric-learning; and why the hardest negatives draw all images into one point."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import light, noise, short

from methods import triplet
from methods.triplet import triplet_loss

EXACT = {"rtol": 0, "atol": 1e-12}
MARGIN = 0.2


def unit(n, d, seed=0):
    return F.normalize(noise(n, d, seed=seed), dim=1)


def at(*degrees):
    """Points on the unit circle. Two of them have the squared distance 2 - 2 cos of the angle
    between them."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def apart(degrees):
    return 2 - 2 * math.cos(math.radians(degrees))


def loss_and_gradient(z, name, margin=MARGIN, mining="semi-hard"):
    """The gradient of the embeddings before they are normalised."""
    z = z.clone().requires_grad_()
    loss, active = triplet_loss(F.normalize(z, dim=1), name, margin, mining)
    loss.backward()
    return loss.detach(), active.item(), z.grad


def triplets_in_loops(z, name, mining="semi-hard"):
    """(anchor, positive, negative) of every ordered pair of positives, as TensorFlow's code chooses
    them: the nearest negative beyond the positive, or the farthest if there is none."""
    d = torch.cdist(z, z).square()
    found = []
    for a in range(len(z)):
        negatives = [n for n in range(len(z)) if name[n] != name[a]]
        for p in range(len(z)):
            if p == a or name[p] != name[a] or not negatives:
                continue
            beyond = [n for n in negatives if d[a, n] > d[a, p]]
            if mining == "hardest":
                n = min(negatives, key=lambda n: d[a, n])
            elif beyond:
                n = min(beyond, key=lambda n: d[a, n])
            else:
                n = max(negatives, key=lambda n: d[a, n])
            found.append((a, p, n))
    return found


# -------- The loss --------------------------------------------------------------------------------


def test_triplet_loss_by_hand():
    """Anchor and positive at 0 and 30 degrees; negatives at -20, too near to be semi-hard for the
    anchor, at 70, and at 180. Seen from the positive, the negatives are 50, 40 and 150 degrees
    away."""
    name = torch.tensor([0, 0, 1, 2, 3])
    loss, active = triplet_loss(at(0, 30, -20, 70, 180), name, 1.2, "semi-hard")
    of_anchor = apart(30) - apart(70) + 1.2
    of_positive = apart(30) - apart(40) + 1.2
    assert loss.item() == pytest.approx((of_anchor + of_positive) / 2, abs=1e-12)
    assert active == 1
    loss, _ = triplet_loss(at(0, 30, -20, 70, 180), name, 1.2, "hardest")
    of_anchor = apart(30) - apart(20) + 1.2
    assert loss.item() == pytest.approx((of_anchor + of_positive) / 2, abs=1e-12)


def test_margin_is_between_squared_distances():
    """At 60 and 90 degrees: squared 1 and 2, so a margin of 1 is just kept; not squared, it would
    be missed by 0.59."""
    name = torch.tensor([0, 0, 1])
    for margin, expected in ((0.9, 0), (1.0, 0), (1.1, 0.1)):
        loss, _ = triplet_loss(at(0, 60, -90), name, margin, "semi-hard")
        # the positive as an anchor: 60 and 150 degrees, squared 1 and 3.73
        assert loss.item() == pytest.approx(expected / 2, abs=1e-12)


def test_no_negative_beyond_the_positive():
    """Then the farthest one is taken."""
    name = torch.tensor([0, 0, 1, 2])
    loss, _ = triplet_loss(at(0, 120, 40, 60), name, MARGIN, "semi-hard")
    of_anchor = apart(120) - apart(60) + MARGIN
    of_positive = apart(120) - apart(80) + MARGIN
    assert loss.item() == pytest.approx((of_anchor + of_positive) / 2, abs=1e-12)


@pytest.mark.parametrize("mining", ["semi-hard", "hardest"])
def test_the_same_embeddings_cost_the_margin(mining):
    name = torch.arange(5).repeat(2)
    loss, active, gradient = loss_and_gradient(unit(1, 8).expand(10, 8), name, mining=mining)
    assert loss.item() == pytest.approx(MARGIN, abs=1e-12) and active == 1
    assert gradient.isfinite().all()


def test_loss_and_gradient_are_zero_beyond_the_margin():
    name = torch.arange(4).repeat(2)
    loss, active, gradient = loss_and_gradient(torch.eye(4).double().repeat(2, 1), name)
    assert loss == 0 and active == 0 and torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", [[3, 3, 3, 3], [0, 0, 0, 1]])
def test_anchors_without_negatives_or_positives(name):
    """A small batch may hold one label only: 0, and no NaN."""
    loss, active, gradient = loss_and_gradient(unit(4, 3), torch.tensor(name))
    assert loss.isfinite() and gradient.isfinite().all()
    if len(set(name)) == 1:
        assert loss == 0 and active == 0


@pytest.mark.parametrize("mining", ["semi-hard", "hardest"])
@pytest.mark.parametrize("dim", [2, 16])
def test_triplets_are_those_of_the_procedure_in_loops(mining, dim):
    """Values and gradients."""
    name = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3, 0, 4])
    z = unit(11, dim, seed=dim)
    found = triplets_in_loops(z, name, mining)
    assert len(found) == 2 + 2 + 6 + 6
    a, p, n = torch.tensor(found).T
    leaf = z.clone().requires_grad_()
    x = F.normalize(leaf, dim=1)
    hinge = (x[a] - x[p]).square().sum(1) - (x[a] - x[n]).square().sum(1) + MARGIN
    expected = hinge.clamp(min=0).mean()
    expected.backward()
    loss, active, gradient = loss_and_gradient(z, name, mining=mining)
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, leaf.grad, **EXACT)
    assert active == pytest.approx((hinge > 0).double().mean().item())


def test_triplet_loss_against_pytorch_metric_learning():
    """Its loss of our triplets, with a mean over all of them; and our triplets with a loss are,
    where a negative is beyond the positive, among those that its miner calls semi-hard."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    name = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3, 0])
    z = unit(10, 4, seed=5)
    squared = distances.LpDistance(power=2)
    theirs = losses.TripletMarginLoss(MARGIN, distance=squared, reducer=reducers.MeanReducer())
    found = triplets_in_loops(z, name)
    leaf = z.clone().requires_grad_()
    expected = theirs(leaf, name, tuple(torch.tensor(found).T))
    expected.backward()
    loss, _, gradient = loss_and_gradient(z, name)
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, leaf.grad, **EXACT)

    miner = miners.TripletMarginMiner(MARGIN, type_of_triplets="semihard", distance=squared)
    semi_hard = set(map(tuple, torch.stack(miner(z, name)).T.tolist()))
    d = torch.cdist(z, z).square()
    ours = {(a, p, n) for a, p, n in found if 0 < d[a, n] - d[a, p] <= MARGIN}
    assert ours and ours <= semi_hard


def test_triplet_loss_symmetries():
    name = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    z = unit(8, 5, seed=1)
    loss, _ = triplet_loss(z, name, MARGIN, "semi-hard")
    turn = torch.linalg.qr(noise(5, 5)).Q
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    same = [(z @ turn, name), (z[order], name[order]), (z, 9 - name)]
    for other, names in same:
        found, _ = triplet_loss(other, names, MARGIN, "semi-hard")
        torch.testing.assert_close(found, loss, **EXACT)


# -------- Why semi-hard ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_hardest_negatives_reward_collapse_and_semi_hard_ones_do_not(seed):
    """Of random embeddings the hardest negatives are nearer than the positives: the loss is above
    the margin, which is what it costs to send all images to one point. A semi-hard negative is
    beyond the positive, so the loss is below the margin."""
    name = torch.arange(32).repeat(2)
    z = unit(64, 8, seed=seed)
    hardest, _ = triplet_loss(z, name, MARGIN, "hardest")
    semi_hard, _ = triplet_loss(z, name, MARGIN, "semi-hard")
    assert hardest > 2 * MARGIN
    assert semi_hard < MARGIN


def test_embeddings_of_a_linear_map_collapse_with_the_hardest_negatives_only():
    """Pairs of noisy copies of random inputs, and a linear map that is trained by each kind of
    negative: the spread of the unit vectors, 1 if they are all over the sphere, is gone with the
    hardest."""
    x = noise(64, 16, seed=7)
    x = torch.cat([x, x]) + 1.5 * noise(128, 16, seed=8) + 1.0  # 1.0: something all share
    name = torch.arange(64).repeat(2)
    spread = {}
    for mining in ("semi-hard", "hardest"):
        w = (noise(16, 4, seed=9) / 4).requires_grad_()
        optimizer = torch.optim.Adam([w], lr=0.03)
        for _ in range(150):
            z = F.normalize(x @ w, dim=1)
            loss, _ = triplet_loss(z, name, MARGIN, mining)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spread[mining] = 1 - z.mean(0).norm().item()
    assert spread["semi-hard"] > 0.5
    assert spread["hardest"] < 0.1


def test_main_gives_the_loss_unit_vectors_and_logs_the_share_of_active_triplets(train, monkeypatch):
    seen = []

    def loss(z, name, margin, mining):
        seen.append((z.detach(), name, margin, mining))
        return triplet_loss(z, name, margin, mining)

    monkeypatch.setattr(triplet, "triplet_loss", loss)
    flags = short("triplet", positives="drawings", margin=0.3, mining="hardest")
    run = train("triplet", *flags, **light("triplet"))
    for z, name, margin, mining in seen:
        torch.testing.assert_close(z.norm(dim=1), torch.ones(24).double(), **EXACT)
        assert torch.equal(name[:12], name[12:]) and torch.equal(name[0:12:2], name[1:12:2])
        assert margin == 0.3 and mining == "hardest"
    assert len(seen) == 4 and all(0 < more["active"] <= 1 for more in run.more)
