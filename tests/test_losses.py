"""SimCLR's NT-Xent and LARS, RotNet's rotation loss: values worked out by hand, what must not change them, and their limits."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common import BatchRandom
from methods import rotnet, simclr
from methods.simclr import LARS, nt_xent

EXACT = {"rtol": 0, "atol": 1e-12}  # float64: a few roundings of 1e-16 at values up to about 100


def unit(n, d, seed=0, dtype=torch.float64):
    """(n, d), L2-normalised random rows."""
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1).to(dtype)


# -------- SimCLR: NT-Xent ---------------------------------------------------------------------------------------------

def test_nt_xent_by_hand():
    """Two images in the plane: views at 0 and 90 degrees of the first, at 180 and 90 degrees of the second."""
    z1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    z2 = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    # With tau = 1/2, row by row, the exponents s_ik / tau of (the positive; the two negatives):
    #   z1[0]: (0; -2, 0)    z1[1]: (0; -2, 0)    z2[0]: (0; 0, 2)    z2[1]: (0; 0, 2)
    rows = [math.log(2 + math.exp(-2))] * 2 + [math.log(2 + math.exp(2))] * 2
    torch.testing.assert_close(nt_xent(z1, z2, 0.5).item(), sum(rows) / 4, **EXACT)


@pytest.mark.parametrize("N", [2, 3, 16])
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_nt_xent_of_collapsed_and_of_perfect_embeddings(N, tau):
    same = unit(1, 8).expand(N, 8)
    torch.testing.assert_close(nt_xent(same, same, tau).item(), math.log(2 * N - 1), **EXACT)
    perfect = torch.eye(N, dtype=torch.float64)  # s = 1 with the other view, 0 with every other image
    torch.testing.assert_close(nt_xent(perfect, perfect, tau).item(), math.log1p((2 * N - 2) * math.exp(-1 / tau)), **EXACT)


def test_nt_xent_of_one_image_is_zero():
    """The positive is then the only candidate, however far away; so there is nothing to learn either."""
    z1, z2 = unit(1, 8, 1).requires_grad_(), unit(1, 8, 2)
    loss = nt_xent(z1, z2, 0.1)
    loss.backward()
    assert loss.item() == 0 and z1.grad.abs().max() == 0


def test_nt_xent_is_the_cross_entropy_of_the_official_layout():
    """The official code lays the logits out in blocks, [ab, aa] for the anchors a and [ba, bb] for b, and puts a large negative
    number on the diagonals of aa and bb; its sum of the two directions is twice the paper's mean over 2N."""
    N, tau = 5, 0.3
    a, b = unit(N, 7, 1), unit(N, 7, 2)
    mask = torch.eye(N, dtype=torch.float64) * 1e9
    labels = torch.arange(N)
    both = (F.cross_entropy(torch.cat([a @ b.T / tau, a @ a.T / tau - mask], 1), labels)
            + F.cross_entropy(torch.cat([b @ a.T / tau, b @ b.T / tau - mask], 1), labels))
    torch.testing.assert_close(2 * nt_xent(a, b, tau), both, **EXACT)


def test_nt_xent_by_the_sum_of_equation_1():
    """Eq. 1 as it is printed: loops over i and k, exp and log, no softmax."""
    N, tau = 4, 0.2
    z1, z2 = unit(N, 6, 3), unit(N, 6, 4)
    z, total = torch.cat([z1, z2]), 0.0
    for i in range(2 * N):
        j = (i + N) % (2 * N)
        below = sum(torch.exp(z[i] @ z[k] / tau) for k in range(2 * N) if k != i)
        total -= torch.log(torch.exp(z[i] @ z[j] / tau) / below)
    torch.testing.assert_close(nt_xent(z1, z2, tau), total / (2 * N), **EXACT)


def test_nt_xent_symmetries():
    """Swapping the views, reordering the images and turning all embeddings together change nothing; reordering the images of
    one view alone destroys the pairs."""
    z1, z2 = unit(6, 5, 1), unit(6, 5, 2)
    loss, order = nt_xent(z1, z2, 0.1), torch.tensor([3, 0, 5, 1, 4, 2])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    for same in (nt_xent(z2, z1, 0.1), nt_xent(z1[order], z2[order], 0.1), nt_xent(z1 @ turn, z2 @ turn, 0.1)):
        torch.testing.assert_close(same, loss, **EXACT)
    assert (nt_xent(z1, z2[order], 0.1) - loss).abs() > 0.1


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5])
def test_nt_xent_prefers_aligned_over_random_over_misaligned(tau):
    z = unit(32, 16, 1)
    aligned, random, misaligned = nt_xent(z, z, tau), nt_xent(z, unit(32, 16, 2), tau), nt_xent(z, -z, tau)
    assert aligned < random < misaligned


def test_nt_xent_gradient_pulls_views_together_and_pushes_images_apart():
    """With s_ij as the variables, dL/ds is negative for pairs of views, positive for all others, and sums to 0 over a row of
    the softmax: checked by the derivative along the direction that moves z1[0] towards another embedding."""
    z1, z2 = unit(4, 6, 5).requires_grad_(), unit(4, 6, 6).requires_grad_()
    nt_xent(z1, z2, 0.2).backward()
    assert (z1.grad[0] @ z2[0]) < 0  # towards its other view: the loss falls
    similarity = (z1[0] @ torch.cat([z1[1:], z2[1:]]).T).detach()
    nearest = torch.cat([z1[1:], z2[1:]])[similarity.argmax()]
    assert (z1.grad[0] @ nearest) > 0  # towards the most similar other image: it rises
    torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.2), (z1.detach().requires_grad_(), z2.detach().requires_grad_()))


@pytest.mark.parametrize("other", ["equal", "random", "opposite"])
def test_nt_xent_at_temperature_001_in_float32(other):
    """Logits reach 100, and exp(100) is beyond float32: only a shifted softmax survives. Error: a logit of 100 has a rounding
    of 100 * 2^-24 = 6e-6 in float32, plus that of its scalar product, 16 terms of at most 1 / 0.01 each: 1e-4 in all."""
    z1 = unit(64, 16, 1, torch.float32)
    z2 = {"equal": z1.clone(), "random": unit(64, 16, 2, torch.float32), "opposite": -z1}[other]
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b = (z.to(dtype, copy=True).requires_grad_() for z in (z1, z2))
        loss = nt_xent(a, b, 0.01)
        loss.backward()
        found.append((loss, a.grad, b.grad))
    for single, double in zip(*found):
        assert single.isfinite().all()
        # a gradient entry is at most 1/(2N tau) = 0.8 times probabilities of that relative error
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    if other != "equal":
        assert found[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_nt_xent_against_pytorch_metric_learning(tau):
    """An independent implementation: NTXentLoss with the labels 0..N-1 twice, whose mean runs over the same 2N pairs."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    found = []
    for function in (lambda a, b: nt_xent(a, b, tau),
                     lambda a, b: losses.NTXentLoss(temperature=tau)(torch.cat([a, b]), torch.arange(8).repeat(2))):
        a, b = unit(8, 6, 1).requires_grad_(), unit(8, 6, 2).requires_grad_()
        loss = function(a, b)
        loss.backward()
        found.append((loss, a.grad, b.grad))
    # It normalises again, which removes the part of the gradient along z: so does projecting ours.
    loss, *grads = found[0]
    torch.testing.assert_close(loss, found[1][0], rtol=0, atol=1e-6)  # it adds a tiny float32 number to the denominator
    for z, ours, theirs in zip((unit(8, 6, 1), unit(8, 6, 2)), grads, found[1][1:]):
        torch.testing.assert_close(ours - (ours * z).sum(1, keepdim=True) * z, theirs, rtol=0, atol=1e-6)


# -------- RotNet ------------------------------------------------------------------------------------------------------

def test_rotation_loss_by_hand():
    """Chance is log 4; logits that favour the right turn by a, of all four turns, give log(1 + 3 e^-a); the wrong one by a,
    log(3 + e^a)."""
    right, n = torch.arange(4).repeat(3), 3
    logits = F.one_hot(right, 4).double()  # (12, 4)
    value = rotnet.rotation_loss
    torch.testing.assert_close(value(torch.zeros(4 * n, 4, dtype=torch.float64)).item(), math.log(4), **EXACT)
    torch.testing.assert_close(value(5 * logits).item(), math.log1p(3 * math.exp(-5)), **EXACT)
    torch.testing.assert_close(value(5 * logits.roll(1, 1)).item(), math.log(3 + math.exp(5)), **EXACT)
    torch.testing.assert_close(value(5 * logits + 7).item(), value(5 * logits).item(), **EXACT)  # a shift of all logits


def test_rotation_loss_is_the_mean_over_images():
    logits = torch.randn(4 * 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_image = [rotnet.rotation_loss(logits[4 * i:4 * i + 4]) for i in range(6)]
    torch.testing.assert_close(rotnet.rotation_loss(logits), torch.stack(by_image).mean(), **EXACT)


def turned(image, seed):
    """What rotnet shows of one image of side 8: (4, 3, 8, 8), and whether it was flipped before."""
    (_, augment), = rotnet.views(SimpleNamespace(size=8, min_crop=0.5))
    random = BatchRandom([seed], 1)
    flipped = (BatchRandom([seed], 1).uniform() < 0.5).item()
    return augment(image[None], random)[0], flipped


def test_views_are_turned_counter_clockwise_after_the_flip():
    """A bright top-left corner goes down the left side, along the bottom and up the right: 0, 90, 180, 270 degrees counter-
    clockwise. Of a flipped image it starts at the right; turning first and then flipping would send it the other way."""
    image = torch.zeros(3, 8, 8)
    image[:, 0, 0] = 1
    corners = [(0, 0), (7, 0), (7, 7), (0, 7)]  # counter-clockwise from the top left
    seen = set()
    for seed in range(8):
        views, flipped = turned(image, seed)
        begin = 3 if flipped else 0
        for turn, view in enumerate(views):
            row, column = divmod(view[0].argmax().item(), 8)
            assert (row, column) == corners[(begin + turn) % 4]
        seen.add(flipped)
    assert seen == {False, True}


def test_four_turns_are_the_identity_and_leave_no_trace():
    """Exact turns: the pixels of each are the same numbers, and turning once more leads to the next."""
    views, _ = turned(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)), 0)
    for turn in range(4):
        assert torch.equal(torch.rot90(views[turn], 1, (1, 2)), views[(turn + 1) % 4])
        assert torch.equal(views[turn].flatten().sort().values, views[0].flatten().sort().values)


def test_a_flip_after_the_turn_would_swap_90_and_270():
    """Why views() flips first: flip(rot90(x)) = rot270(flip(x)), so a flip after the turn gives 90 degrees of one image and 270
    of its mirror image the same pixels under different labels."""
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.rot90(x, 1, (1, 2)).flip(2), torch.rot90(x.flip(2), 3, (1, 2)))
    assert not torch.equal(torch.rot90(x, 1, (1, 2)).flip(2), torch.rot90(x.flip(2), 1, (1, 2)))


def test_rotnet_learns_every_turn_of_every_image_in_one_batch():
    """(n, 4, ...).flatten(0, 1), as main() does, meets the labels 0 1 2 3 0 1 2 3: checked with a network that reads off where
    the bright corner is, so that its loss is that of perfect logits."""
    images = torch.zeros(5, 3, 8, 8)
    images[:, :, 0, 0] = 1
    (_, augment), = rotnet.views(SimpleNamespace(size=8, min_crop=0.5))

    class NoFlip:
        def uniform(self):
            return torch.ones(5)

    x = augment(images, NoFlip()).flatten(0, 1)  # (20, 3, 8, 8)
    corners = torch.stack([x[:, 0, 0, 0], x[:, 0, 7, 0], x[:, 0, 7, 7], x[:, 0, 0, 7]], 1)  # (20, 4)
    assert rotnet.rotation_loss(100 * (corners == corners.max(1, keepdim=True).values).float()) < 1e-6


# -------- LARS and the schedule ---------------------------------------------------------------------------------------

def test_lars_step_by_hand():
    """w = (3, 4) as a matrix has norm 5; g = (0, 1) with weight decay 0.5 gives u = (1.5, 3), norm sqrt(11.25). The step is
    lr * trust * 5 / |u| * u, of length lr * trust * 5; the second adds 0.9 of the first."""
    w = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    optimizer = LARS([w], lr=2.0, weight_decay=0.5, trust=0.001)
    w.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    optimizer.step()
    first = 2.0 * 0.001 * 5 / math.sqrt(11.25) * torch.tensor([[1.5, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), torch.tensor([[3.0, 4.0]], dtype=torch.float64) - first, **EXACT)
    torch.testing.assert_close(first.norm().item(), 2.0 * 0.001 * 5, **EXACT)
    before = w.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0  # the rate multiplies the gradient before it enters the buffer, so this still moves
    optimizer.step()
    torch.testing.assert_close(w.detach(), before - 0.9 * first, **EXACT)


def test_lars_leaves_biases_and_batch_norm_to_plain_sgd():
    """No weight decay and no trust ratio for vectors: exactly lr * g, then with momentum 0.9."""
    b = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    optimizer = LARS([b], lr=0.1, weight_decay=0.5)
    b.grad = torch.tensor([0.0, 1.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(b.tolist(), [3.0, 3.9], **EXACT)
    optimizer.step()
    torch.testing.assert_close(b.tolist(), [3.0, 3.9 - 0.09 - 0.1], **EXACT)


def test_lars_of_zero_weights_or_gradients():
    """A ratio of norms that does not exist is replaced by 1, as in the official code: no NaN, and zero weights can leave 0."""
    w = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    still = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = LARS([w, still], lr=0.1, weight_decay=0.0)
    w.grad, still.grad = torch.ones(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), -0.1, dtype=torch.float64), **EXACT)
    assert torch.equal(still, torch.ones_like(still))


def test_lars_follows_the_official_rule():
    """Twenty steps of changing rate on a small network against a transcription, in scalars, of the classic-momentum branch of
    google-research/simclr lars_optimizer.py (eeta = 0.001, exclusions: biases and batch-norm)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(),
                              torch.nn.Linear(4 * 36, 5)).double()
    optimizer = LARS(net.parameters(), lr=0.0, weight_decay=0.01)
    excluded = {"0.bias", "1.weight", "1.bias", "4.bias"}  # the layers by name, as the official code excludes them
    expected = {name: p.detach().flatten().tolist() for name, p in net.named_parameters()}
    velocity = {name: [0.0] * len(values) for name, values in expected.items()}
    for step in range(20):
        rate = 0.5 * (step + 1)
        optimizer.param_groups[0]["lr"] = rate
        x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
        net.zero_grad()
        F.cross_entropy(net(x), torch.arange(6) % 5).backward()
        for name, p in net.named_parameters():
            theta, v, grad, scale = expected[name], velocity[name], p.grad.flatten().tolist(), rate
            if name not in excluded:
                grad = [g + 0.01 * t for g, t in zip(grad, theta)]
                w_norm, g_norm = (math.sqrt(sum(a * a for a in values)) for values in (theta, grad))
                scale = rate * (0.001 * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0)
            velocity[name] = [0.9 * a + scale * g for a, g in zip(v, grad)]
            expected[name] = [t - a for t, a in zip(theta, velocity[name])]
        optimizer.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach().flatten().tolist(), expected[name], rtol=1e-10, atol=1e-12)


def test_lars_ignores_the_scale_of_the_loss_for_matrices_only():
    steps = []
    for scale in (1.0, 8.0):
        w = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
        b = torch.ones(3, dtype=torch.float64, requires_grad=True)
        optimizer = LARS([w, b], lr=1.0, weight_decay=0.0)
        w.grad = scale * torch.arange(6, dtype=torch.float64).view(2, 3)
        b.grad = scale * torch.ones(3, dtype=torch.float64)
        optimizer.step()
        steps.append((1 - w.detach(), 1 - b.detach()))
    torch.testing.assert_close(steps[0][0], steps[1][0], **EXACT)
    torch.testing.assert_close(8 * steps[0][1], steps[1][1], **EXACT)


def test_simclr_trains_all_but_the_offset_of_the_last_batch_norm():
    model = simclr.SimCLR("resnet14", 32, 16)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["projector.4.bias"]
    assert model(torch.randn(4, 3, 32, 32)).shape == (4, 16)


@pytest.mark.parametrize("method", [simclr, rotnet])
def test_learning_rate(method):
    """Base x batch / 256 at its peak, a straight line up to it, half of it in the middle of the descent, 0 at the end."""
    args, steps = SimpleNamespace(lr=0.3, batch=1024, warmup=2, epochs=10), 5
    rate = [method.learning_rate(step, args, steps) for step in range(51)]
    peak = 0.3 * 1024 / 256
    torch.testing.assert_close(rate[:10], [peak * (step + 1) / 10 for step in range(10)])
    torch.testing.assert_close([rate[10], rate[20], rate[30], rate[50]],
                               [peak, peak * (1 + math.cos(math.pi / 4)) / 2, peak / 2, 0.0])
    assert max(rate) == peak and all(a > b for a, b in zip(rate[10:], rate[11:]))


@pytest.mark.parametrize("warmup, first", [(0, 1.0), (0.5, 1 / 2), (1, 1 / 4)])
def test_learning_rate_of_short_or_no_warm_up(warmup, first):
    args = SimpleNamespace(lr=1.0, batch=256, warmup=warmup, epochs=3)
    assert simclr.learning_rate(0, args, 4) == pytest.approx(first)
    assert simclr.learning_rate(12, args, 4) == pytest.approx(0, abs=1e-12)
