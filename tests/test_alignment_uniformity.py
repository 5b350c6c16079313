"""Alignment and uniformity: both losses by hand, against the official code and at their limits,
what each alone would do, and pairs that are on two processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import arguments, light, noise

import common
from kernels.collectives import gather, rank, world
from kernels.views import BatchRandom
from methods import alignment_uniformity
from methods.alignment_uniformity import alignment_loss, uniformity_loss

EXACT = {"rtol": 1e-12, "atol": 1e-12}
FLAGS = ["--size", 16, "--batch", 12, "--epochs", 1, "--warmup", 0, "--hidden", 16, "--dim", 8]
NAME = "alignment_uniformity"


def units(n, d, seed=0):
    return F.normalize(noise(n, d, seed=seed), dim=1)


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# -------- Alignment -------------------------------------------------------------------------------


def test_alignment_by_hand():
    """At the same point, at a right angle and opposite: distances 0, sqrt 2 and 2."""
    z1 = double([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    z2 = double([1.0, 0.0], [0.0, 1.0], [0.0, -1.0])
    for alpha in (1, 2, 3):
        expected = (math.sqrt(2) ** alpha + 2**alpha) / 3
        torch.testing.assert_close(alignment_loss(z1, z2, alpha).item(), expected, **EXACT)


def test_alignment_of_equal_views_is_0_and_has_a_finite_gradient():
    for alpha in (1, 2):
        z = units(5, 4).requires_grad_()
        loss = alignment_loss(z, units(5, 4), alpha)
        loss.backward()
        assert loss == 0 and not z.grad.any()


def test_gradient_of_the_alignment():
    """With alpha = 2: 2 (z1 - z2) / N for the first view, the opposite for the second."""
    z1 = units(5, 4).requires_grad_()
    z2 = units(5, 4, seed=1).requires_grad_()
    alignment_loss(z1, z2, 2).backward()
    torch.testing.assert_close(z1.grad, 2 * (z1 - z2).detach() / 5, **EXACT)
    torch.testing.assert_close(z2.grad, -z1.grad, **EXACT)


# -------- Uniformity ------------------------------------------------------------------------------


def test_uniformity_by_hand():
    """Three points of a circle at 0, 90 and 180 degrees: squared distances 2, 2 and 4."""
    z = double([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0])
    expected = math.log((2 * math.exp(-2 * 0.7) + math.exp(-4 * 0.7)) / 3)
    torch.testing.assert_close(uniformity_loss(z, 0.7).item(), expected, **EXACT)


@pytest.mark.parametrize("t", [0.5, 2.0, 5.0])
def test_limits_of_the_uniformity(t):
    """All points the same: 0. Two opposite points: -4 t. Random points of many dimensions, whose
    squared distances are 2 with a deviation of 2 / sqrt(d): -2 t + 2 t^2 / d."""
    assert uniformity_loss(units(1, 8).expand(6, 8), t) == 0
    opposite = torch.cat([units(1, 8), -units(1, 8)])
    torch.testing.assert_close(uniformity_loss(opposite, t).item(), -4 * t, **EXACT)
    many = uniformity_loss(units(1000, 256), t).item()
    # 500,000 pairs: the mean of the squared distance is known to 2 / sqrt(256) / sqrt(1000)
    assert many == pytest.approx(-2 * t + 2 * t**2 / 256, abs=0.01 * t)


def test_uniformity_does_not_change_if_the_sphere_is_turned_or_the_rows_are_exchanged():
    z = units(20, 6)
    rotation, _ = torch.linalg.qr(noise(6, 6, seed=3))
    loss = uniformity_loss(z, 2)
    torch.testing.assert_close(uniformity_loss(z @ rotation, 2), loss, **EXACT)
    torch.testing.assert_close(uniformity_loss(z.flip(0), 2), loss, **EXACT)


def official(x, y, align_w, alpha, unif_w, t):
    """main.py and align_uniform/__init__.py, with the pairs written out in a loop."""
    align = (x - y).norm(p=2, dim=1).pow(alpha).mean()
    unif = 0
    for view in (x, y):
        energies = []
        for i in range(len(view)):
            for j in range(i):
                energies.append((-t * (view[i] - view[j]).norm().square()).exp())
        unif = unif + torch.stack(energies).mean().log() / 2
    return align_w * align + unif_w * unif


def test_value_and_gradient_are_those_of_the_official_loss():
    ours = [units(7, 5, seed=s).requires_grad_() for s in (0, 1)]
    theirs = [units(7, 5, seed=s).requires_grad_() for s in (0, 1)]
    uniformity = (uniformity_loss(ours[0], 3) + uniformity_loss(ours[1], 3)) / 2
    loss = 0.7 * alignment_loss(*ours, 1.5) + 1.3 * uniformity
    expected = official(*theirs, 0.7, 1.5, 1.3, 3)
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, **EXACT)


# -------- What each loss alone would do -----------------------------------------------------------


def optimise(align_weight, uniform_weight, steps=300):
    """Free points, two views of each of 16 images on a sphere of three dimensions."""
    z1, z2 = [noise(16, 3, seed=s).requires_grad_() for s in (1, 2)]
    optimizer = torch.optim.Adam([z1, z2], lr=0.05)
    for _ in range(steps):
        u1, u2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        alignment = alignment_loss(u1, u2, 2)
        uniformity = (uniformity_loss(u1, 2) + uniformity_loss(u2, 2)) / 2
        loss = align_weight * alignment + uniform_weight * uniformity
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return alignment.item(), uniformity.item()


def test_each_loss_alone_leaves_the_other_as_it_is_and_both_together_are_met():
    """Uniformity alone spreads the points and tells nothing of the views; together the views agree
    and the points are as far apart as without the alignment."""
    before_alignment, before_uniformity = optimise(1, 1, steps=1)
    alone_alignment, alone_uniformity = optimise(0, 1)
    alignment, uniformity = optimise(1, 1)
    assert alone_uniformity < before_uniformity - 0.2
    assert alone_alignment > 0.5
    assert alignment < 0.01
    assert uniformity < alone_uniformity + 0.02


def test_a_network_without_uniformity_collapses_and_one_with_it_does_not(train):
    """Twelve steps at a high rate: alignment alone brings different images together."""
    flags = [*FLAGS, "--epochs", 6, "--lr", 4, "--batch", 12]

    def spread(weight):
        run = train(NAME, *flags, "--uniform-weight", weight, double=False, **light(NAME))
        return [more["uniformity"].item() for more in run.more]

    alone = spread(0)
    both = spread(1)
    assert max(alone[0], both[0]) < -1
    assert alone[-1] > -0.2
    assert both[-1] < -1


# -------- The training loop -----------------------------------------------------------------------


def own_pairs_only(x, y):
    """The loss of two processes, of all pairs; and the mean of what each has among its own rows."""
    n = len(x) // world()
    rows = slice(rank() * n, (rank() + 1) * n)
    x, y = x[rows].requires_grad_(), y[rows].requires_grad_()
    z1, z2 = gather(x), gather(y)
    loss = alignment_loss(z1, z2, 2) + (uniformity_loss(z1, 2) + uniformity_loss(z2, 2)) / 2
    loss.backward()
    return loss.detach(), x.grad / world(), uniformity_loss(x.detach(), 2)


def test_pairs_of_images_on_two_processes_repel_each_other(processes):
    x, y = units(6, 4), units(6, 4, seed=1)
    losses, grads, own = zip(*processes(2, own_pairs_only, x, y))
    whole = x.clone().requires_grad_()
    loss = alignment_loss(whole, y, 2) + (uniformity_loss(whole, 2) + uniformity_loss(y, 2)) / 2
    loss.backward()
    for found in losses:
        torch.testing.assert_close(found, loss.detach(), **EXACT)
    torch.testing.assert_close(torch.cat(grads), whole.grad, **EXACT)
    # without the pairs between the processes the value would be another
    assert (torch.stack(own).mean() - uniformity_loss(x, 2)).abs() > 1e-3


def test_main_weighs_both_and_logs_them(train):
    flags = [*FLAGS, "--align-weight", 3, "--uniform-weight", 0.5, "--alpha", 1]
    run = train(NAME, *flags, **light(NAME))
    for loss, more in zip(run.losses, run.more):
        expected = 3 * more["alignment"] + 0.5 * more["uniformity"]
        torch.testing.assert_close(loss, expected, **EXACT)
        assert -8 < more["uniformity"] < 0 < more["alignment"] < 2


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_gradient_reaches_every_parameter(arch):
    model = alignment_uniformity.Projected(arch, 16, 32, 8)
    z = F.normalize(model(noise(8, 3, 16, 16, dtype=torch.float32)), dim=1)
    z1, z2 = z.chunk(2)
    (alignment_loss(z1, z2, 2) + uniformity_loss(z1, 2) + uniformity_loss(z2, 2)).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_the_panel_of_common_measures_the_same():
    """What every run prints about its features: alignment with alpha = 2, uniformity with t = 2."""
    x1, x2 = 3 * units(9, 5), units(9, 5, seed=1)
    panel = common.collapse_panel(x1, x1, x2)
    assert panel["alignment"] == pytest.approx(alignment_loss(x1 / 3, x2, 2).item(), abs=1e-6)
    assert panel["uniformity"] == pytest.approx(uniformity_loss(x1 / 3, 2).item(), abs=1e-6)


def test_views_are_two_different_draws():
    (crop1, augment1), (crop2, augment2) = alignment_uniformity.views(arguments(NAME))
    assert crop1 == crop2 and crop1.scale == (0.08, 1.0)
    x = noise(4, 3, 8, 8, dtype=torch.float32).sigmoid()
    assert torch.equal(augment1(x, BatchRandom([0], 4)), augment2(x, BatchRandom([0], 4)))
    assert not torch.equal(augment1(x, BatchRandom([0], 4)), augment2(x, BatchRandom([1], 4)))


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--t", 0), "--t 0: choose more than 0"),
        (("--alpha", 0.5), "--alpha 0.5: choose at least 1"),
        (("--dim", 1), "--dim 1: choose at least 2"),
        (("--align-weight", -1), "--align-weight -1: choose at least 0"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments(NAME, *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err
