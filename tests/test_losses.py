"""SimCLR's NT-Xent, LARS and schedule: values worked out by hand, what must not change them, and
their limits. (Each other method has a test file of its own.)"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import noise

from methods import simclr
from methods.simclr import LARS, nt_xent

EXACT = {"rtol": 0, "atol": 1e-12}  # float64: a few roundings of 1e-16 at values up to about 100


def unit(n, d, seed=0, dtype=torch.float64):
    """(n, d), L2-normalised random rows."""
    return F.normalize(noise(n, d, seed=seed), dim=1).to(dtype)


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# -------- NT-Xent ---------------------------------------------------------------------------------


def test_nt_xent_by_hand():
    """Two images in the plane: views at 0 and 90 degrees of the first, at 180 and 90 degrees of the
    second."""
    z1 = double([1.0, 0.0], [-1.0, 0.0])
    z2 = double([0.0, 1.0], [0.0, 1.0])
    # With tau = 1/2, row by row, the exponents s_ik / tau of (the positive; the two negatives):
    #   z1[0]: (0; -2, 0)    z1[1]: (0; -2, 0)    z2[0]: (0; 0, 2)    z2[1]: (0; 0, 2)
    rows = [math.log(2 + math.exp(-2))] * 2 + [math.log(2 + math.exp(2))] * 2
    torch.testing.assert_close(nt_xent(z1, z2, 0.5).item(), sum(rows) / 4, **EXACT)


@pytest.mark.parametrize("N", [2, 3, 16])
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_nt_xent_of_collapsed_and_of_perfect_embeddings(N, tau):
    same = unit(1, 8).expand(N, 8)
    torch.testing.assert_close(nt_xent(same, same, tau).item(), math.log(2 * N - 1), **EXACT)
    # s = 1 with the other view, 0 with every other image
    perfect = torch.eye(N, dtype=torch.float64)
    expected = math.log1p((2 * N - 2) * math.exp(-1 / tau))
    torch.testing.assert_close(nt_xent(perfect, perfect, tau).item(), expected, **EXACT)


def test_nt_xent_of_one_image_is_zero():
    """The positive is then the only candidate, however far away; so nothing can be learned."""
    z1 = unit(1, 8, 1).requires_grad_()
    loss = nt_xent(z1, unit(1, 8, 2), 0.1)
    loss.backward()
    assert loss.item() == 0 and z1.grad.abs().max() == 0


def test_nt_xent_is_the_cross_entropy_of_the_official_layout():
    """The official code lays the logits out in blocks, [ab, aa] for the anchors a and [ba, bb] for
    b, and puts a large negative number on the diagonals of aa and bb; its sum of the two directions
    is twice the paper's mean over 2N."""
    N, tau = 5, 0.3
    a = unit(N, 7, 1)
    b = unit(N, 7, 2)
    mask = torch.eye(N, dtype=torch.float64) * 1e9
    labels = torch.arange(N)
    of_a = torch.cat([a @ b.T / tau, a @ a.T / tau - mask], 1)
    of_b = torch.cat([b @ a.T / tau, b @ b.T / tau - mask], 1)
    both = F.cross_entropy(of_a, labels) + F.cross_entropy(of_b, labels)
    torch.testing.assert_close(2 * nt_xent(a, b, tau), both, **EXACT)


def test_nt_xent_by_the_sum_of_equation_1():
    """Eq. 1 as it is printed: loops over i and k, exp and log, no softmax."""
    N, tau = 4, 0.2
    z1 = unit(N, 6, 3)
    z2 = unit(N, 6, 4)
    z = torch.cat([z1, z2])
    total = 0.0
    for i in range(2 * N):
        j = (i + N) % (2 * N)
        below = sum(torch.exp(z[i] @ z[k] / tau) for k in range(2 * N) if k != i)
        total -= torch.log(torch.exp(z[i] @ z[j] / tau) / below)
    torch.testing.assert_close(nt_xent(z1, z2, tau), total / (2 * N), **EXACT)


def test_nt_xent_symmetries():
    """Swapping the views, reordering the images and turning all embeddings together change nothing;
    reordering the images of one view alone destroys the pairs."""
    z1 = unit(6, 5, 1)
    z2 = unit(6, 5, 2)
    loss = nt_xent(z1, z2, 0.1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turn = torch.linalg.qr(noise(5, 5)).Q
    for a, b in ((z2, z1), (z1[order], z2[order]), (z1 @ turn, z2 @ turn)):
        torch.testing.assert_close(nt_xent(a, b, 0.1), loss, **EXACT)
    assert (nt_xent(z1, z2[order], 0.1) - loss).abs() > 0.1


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5])
def test_nt_xent_prefers_aligned_over_random_over_misaligned(tau):
    z = unit(32, 16, 1)
    assert nt_xent(z, z, tau) < nt_xent(z, unit(32, 16, 2), tau) < nt_xent(z, -z, tau)


def test_nt_xent_gradient_pulls_views_together_and_pushes_images_apart():
    """With s_ij as the variables, dL/ds is negative for pairs of views, positive for all others,
    and sums to 0 over a row of the softmax: checked by the derivative along the direction that
    moves z1[0] towards another embedding."""
    z1 = unit(4, 6, 5).requires_grad_()
    z2 = unit(4, 6, 6).requires_grad_()
    nt_xent(z1, z2, 0.2).backward()
    assert (z1.grad[0] @ z2[0]) < 0  # towards its other view: the loss falls
    others = torch.cat([z1[1:], z2[1:]])
    nearest = others[(z1[0] @ others.T).argmax()]
    assert (z1.grad[0] @ nearest) > 0  # towards the most similar other image: it rises
    torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.2), (z1, z2))


@pytest.mark.parametrize("other", ["equal", "random", "opposite"])
def test_nt_xent_at_temperature_001_in_float32(other):
    """Logits reach 100, and exp(100) is beyond float32: only a shifted softmax survives. Error: a
    logit of 100 has a rounding of 100 * 2^-24 = 6e-6 in float32, plus that of its scalar product,
    16 terms of at most 1 / 0.01 each: 1e-4 in all."""
    z1 = unit(64, 16, 1, torch.float32)
    z2 = {"equal": z1.clone(), "random": unit(64, 16, 2, torch.float32), "opposite": -z1}[other]
    found = []
    for dtype in (torch.float32, torch.float64):
        a, b = [z.to(dtype, copy=True).requires_grad_() for z in (z1, z2)]
        loss = nt_xent(a, b, 0.01)
        loss.backward()
        found.append((loss, a.grad, b.grad))
    for single, exact in zip(*found):
        assert single.isfinite().all()
        # a gradient entry is at most 1/(2N tau) = 0.8 times probabilities of that relative error
        torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)
    if other != "equal":
        assert found[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_nt_xent_against_pytorch_metric_learning(tau):
    """An independent implementation: NTXentLoss with the labels 0..N-1 twice, whose mean runs over
    the same 2N pairs."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    labels = torch.arange(8).repeat(2)

    def theirs(a, b):
        return losses.NTXentLoss(temperature=tau)(torch.cat([a, b]), labels)

    found = []
    for function in (lambda a, b: nt_xent(a, b, tau), theirs):
        a = unit(8, 6, 1).requires_grad_()
        b = unit(8, 6, 2).requires_grad_()
        loss = function(a, b)
        loss.backward()
        found.append((loss, a.grad, b.grad))
    # It adds a tiny float32 number to the denominator.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
    # It normalises again, which removes the part of the gradient along z: so does projecting ours.
    for seed in (1, 2):
        z = unit(8, 6, seed)
        ours = found[0][seed] - (found[0][seed] * z).sum(1, keepdim=True) * z
        torch.testing.assert_close(ours, found[1][seed], rtol=0, atol=1e-6)


# -------- LARS ------------------------------------------------------------------------------------


def test_lars_step_by_hand():
    """w = (3, 4) as a matrix has norm 5; g = (0, 1) with weight decay 0.5 gives u = (1.5, 3), norm
    sqrt(11.25). The step is lr * trust * 5 / |u| * u, of length lr * trust * 5; the second adds 0.9
    of the first."""
    w = double([3.0, 4.0]).requires_grad_()
    optimizer = LARS([w], lr=2.0, weight_decay=0.5, trust=0.001)
    w.grad = double([0.0, 1.0])
    optimizer.step()
    first = 2.0 * 0.001 * 5 / math.sqrt(11.25) * double([1.5, 3.0])
    torch.testing.assert_close(w.detach(), double([3.0, 4.0]) - first, **EXACT)
    torch.testing.assert_close(first.norm().item(), 2.0 * 0.001 * 5, **EXACT)
    before = w.detach().clone()
    # The rate multiplies the gradient before it enters the buffer, so this still moves.
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(w.detach(), before - 0.9 * first, **EXACT)


def test_lars_leaves_biases_and_batch_norm_to_plain_sgd():
    """No weight decay and no trust ratio for vectors: exactly lr * g, then with momentum 0.9."""
    b = double(3.0, 4.0).requires_grad_()
    optimizer = LARS([b], lr=0.1, weight_decay=0.5)
    b.grad = double(0.0, 1.0)
    optimizer.step()
    torch.testing.assert_close(b.tolist(), [3.0, 3.9], **EXACT)
    optimizer.step()
    torch.testing.assert_close(b.tolist(), [3.0, 3.9 - 0.09 - 0.1], **EXACT)


def test_lars_of_zero_weights_or_gradients():
    """A ratio of norms that does not exist is replaced by 1, as in the official code: no NaN, and
    zero weights can leave 0."""
    w = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    still = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = LARS([w, still], lr=0.1, weight_decay=0.0)
    w.grad = torch.ones(2, 2, dtype=torch.float64)
    still.grad = torch.zeros(2, 2, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(w.detach(), double([-0.1, -0.1], [-0.1, -0.1]), **EXACT)
    assert torch.equal(still, torch.ones_like(still))


def test_lars_follows_the_official_rule():
    """Twenty steps of changing rate on a small network against a transcription, in scalars, of the
    classic-momentum branch of google-research/simclr lars_optimizer.py (eeta = 0.001, exclusions:
    biases and batch-norm)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 36, 5),
    ).double()
    optimizer = LARS(net.parameters(), lr=0.0, weight_decay=0.01)
    excluded = {"0.bias", "1.weight", "1.bias", "4.bias"}  # by name, as in the official code
    expected = {name: p.detach().flatten().tolist() for name, p in net.named_parameters()}
    velocity = {name: [0.0] * len(values) for name, values in expected.items()}

    for step in range(20):
        rate = 0.5 * (step + 1)
        optimizer.param_groups[0]["lr"] = rate
        x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
        net.zero_grad()
        F.cross_entropy(net(x), torch.arange(6) % 5).backward()
        for name, p in net.named_parameters():
            theta = expected[name]
            grad = p.grad.flatten().tolist()
            scale = rate
            if name not in excluded:
                grad = [g + 0.01 * t for g, t in zip(grad, theta)]
                w_norm = math.sqrt(sum(t * t for t in theta))
                g_norm = math.sqrt(sum(g * g for g in grad))
                scale = rate * (0.001 * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0)
            velocity[name] = [0.9 * v + scale * g for v, g in zip(velocity[name], grad)]
            expected[name] = [t - v for t, v in zip(theta, velocity[name])]
        optimizer.step()
        for name, p in net.named_parameters():
            found = p.detach().flatten().tolist()
            torch.testing.assert_close(found, expected[name], rtol=1e-10, atol=1e-12)


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


# -------- Network and schedule --------------------------------------------------------------------


def test_simclr_trains_all_but_the_offset_of_the_last_batch_norm():
    model = simclr.SimCLR("resnet14", 32, 16)
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert fixed == ["projector.4.bias"]
    assert model(torch.randn(4, 3, 32, 32)).shape == (4, 16)


def test_learning_rate():
    """Base x batch / 256 at its peak, a straight line up to it, half of it in the middle of the
    descent, 0 at the end. (Other files hold copies of this function.)"""
    args = SimpleNamespace(lr=0.3, batch=1024, warmup=2, epochs=10)
    rate = [simclr.learning_rate(step, args, 5) for step in range(51)]
    peak = 0.3 * 1024 / 256
    torch.testing.assert_close(rate[:10], [peak * (step + 1) / 10 for step in range(10)])
    expected = [peak, peak * (1 + math.cos(math.pi / 4)) / 2, peak / 2, 0.0]
    torch.testing.assert_close([rate[10], rate[20], rate[30], rate[50]], expected)
    assert max(rate) == peak and all(a > b for a, b in zip(rate[10:], rate[11:]))


@pytest.mark.parametrize("warmup, first", [(0, 1.0), (0.5, 1 / 2), (1, 1 / 4)])
def test_learning_rate_of_short_or_no_warm_up(warmup, first):
    args = SimpleNamespace(lr=1.0, batch=256, warmup=warmup, epochs=3)
    assert simclr.learning_rate(0, args, 4) == pytest.approx(first)
    assert simclr.learning_rate(12, args, 4) == pytest.approx(0, abs=1e-12)
