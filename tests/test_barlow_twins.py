"""Barlow Twins: the loss against values computed by hand, its invariances, the optimiser, which
gradients exist, and the whole training loop against the paper's procedure."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import CPU, arguments, double_precision, noise, tiny_data
from torch import nn

from common import Loader
from kernels.views import BatchRandom
from methods import barlow_twins

BATCH, SIZE, DIM, STEPS = 12, 16, 8, 3
LR, SHARE, DECAY, LAMBDA = 40.0, 0.01, 1e-3, 0.0051
TRUST = 1e-3  # of LARS
FLAGS = f"""--batch {BATCH} --size {SIZE} --dim {DIM} --epochs 1 --warmup 0 --lr {LR}
            --bias-lr {SHARE} --weight-decay {DECAY} --lambda {LAMBDA}""".split()


def loss_of(z1, z2):
    """The loss of projections (N, D), normalised by the layer that the model has for it."""
    normalize = nn.BatchNorm1d(z1.shape[1], affine=False, dtype=torch.float64)
    return barlow_twins.barlow_twins(normalize(z1).T @ normalize(z2) / len(z1), LAMBDA)


def loss_of_correlations(c):
    """Eq. 1 in loops."""
    total = 0
    for i in range(len(c)):
        for j in range(len(c)):
            total = total + ((1 - c[i, j]) ** 2 if i == j else LAMBDA * c[i, j] ** 2)
    return total


# -------- Loss ------------------------------------------------------------------------------------


def test_loss_by_hand():
    c = torch.tensor([[0.5, 0.1, 0.0], [-0.2, 1.0, 0.3], [0.0, 0.0, -1.0]])
    # Diagonal: 0.25 + 0 + 4; elsewhere: 0.01 + 0.04 + 0.09.
    assert barlow_twins.barlow_twins(c, 0.1).item() == pytest.approx(4.25 + 0.1 * 0.14, rel=1e-6)
    assert barlow_twins.barlow_twins(torch.eye(3), 0.1).item() == 0
    # All dimensions constant, then all dimensions the same.
    assert barlow_twins.barlow_twins(torch.zeros(3, 3), 0.1).item() == 3
    assert barlow_twins.barlow_twins(torch.ones(3, 3), 0.1).item() == pytest.approx(0.1 * 6)


def test_gradient_by_hand():
    c = noise(4, 4).requires_grad_()
    barlow_twins.barlow_twins(c, 0.1).backward()
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(c.grad, identity * 2 * (c - 1) + (1 - identity) * 0.2 * c)


def test_loss_equals_the_formula_on_correlations():
    z1 = noise(50, 4, seed=1)
    z2 = noise(50, 4, seed=2)
    # Pearson's correlation of dimension i of view 1 with dimension j of view 2
    c = np.corrcoef(z1.T, z2.T)[:4, 4:]
    # The layer adds 1e-5 to variances of about 1, which makes correlations smaller by about 1e-5
    # of themselves.
    assert loss_of(z1, z2).item() == pytest.approx(loss_of_correlations(c), rel=1e-4)


def test_invariances():
    z1 = noise(50, 4, seed=1)
    z2 = noise(50, 4, seed=2)
    value = loss_of(z1, z2).item()
    flip = torch.tensor([-1.0, 1, 1, 1])
    # The views may change places, and a dimension its sign in both views, but not in one alone.
    assert loss_of(z2, z1).item() == pytest.approx(value, rel=1e-12)
    assert loss_of(flip * z1, flip * z2).item() == pytest.approx(value, rel=1e-12)
    assert abs(loss_of(flip * z1, z2).item() - value) > 0.01
    # Scale and offset do not matter, but for the 1e-5 above.
    assert loss_of(1000 * z1 + 5, 1000 * z2).item() == pytest.approx(value, rel=1e-4)
    # Equal views cost only what is off the diagonal; collapsed ones cost D.
    off_diagonal = np.square(np.corrcoef(z1.T)).sum() - 4
    assert loss_of(z1, z1).item() == pytest.approx(LAMBDA * off_diagonal, rel=1e-4)
    assert loss_of(torch.ones_like(z1), z2).item() == 4


def test_loss_and_gradient_equal_lightlys():
    lightly = pytest.importorskip("lightly.loss.barlow_twins_loss")
    ours = [noise(20, 6, seed=seed).requires_grad_() for seed in (1, 2)]
    theirs = [z.detach().clone().requires_grad_() for z in ours]
    loss = loss_of(*ours)
    expected = lightly.BarlowTwinsLoss(lambda_param=LAMBDA)(*theirs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    for z, other in zip(ours, theirs):
        torch.testing.assert_close(z.grad, other.grad)


# -------- Optimiser -------------------------------------------------------------------------------


def test_lars_by_hand():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    b = nn.Parameter(torch.tensor([2.0]))
    optimizer = barlow_twins.LARS([w, b], lr=10.0, weight_decay=0.5)
    w.grad = torch.tensor([[0.0, 1.0]])
    b.grad = torch.tensor([0.1])
    optimizer.step()
    # w: gradient + decay (1.5, 3), norm of w 5: step of 10 x 0.001 x 5 in that direction.
    # b: 10 x 0.1, no decay.
    direction = torch.tensor([[1.5, 3.0]]) / math.hypot(1.5, 3)
    torch.testing.assert_close(w.detach(), torch.tensor([[3.0, 4.0]]) - 0.05 * direction)
    torch.testing.assert_close(b.detach(), torch.tensor([1.0]))
    # The new rate multiplies the whole buffer, 0.9 x 0.1.
    optimizer.param_groups[0]["lr"] = 1.0
    b.grad = torch.tensor([0.0])
    optimizer.step()
    torch.testing.assert_close(b.detach(), torch.tensor([0.91]))


def test_lars_leaves_zero_weights_and_gradients_to_plain_sgd_and_frozen_ones_alone():
    zero = nn.Parameter(torch.zeros(2, 2))
    still = nn.Parameter(torch.ones(2, 2))
    frozen = nn.Parameter(torch.ones(2, 2))
    optimizer = barlow_twins.LARS([zero, still, frozen], lr=1.0, weight_decay=0.0)
    zero.grad = torch.full((2, 2), 0.25)
    still.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(zero.detach(), torch.full((2, 2), -0.25))
    assert torch.equal(still.detach(), torch.ones(2, 2))
    assert torch.equal(frozen.detach(), torch.ones(2, 2)) and frozen not in optimizer.state


# -------- Model and views -------------------------------------------------------------------------


def tiny_model():
    torch.manual_seed(0)
    return barlow_twins.BarlowTwins("resnet14", SIZE, DIM)


def two_views():
    """Two batches (N, 3, H, W) with different statistics."""
    x1 = noise(BATCH, 3, SIZE, SIZE, seed=1, dtype=torch.float32)
    return x1, 3 + noise(BATCH, 3, SIZE, SIZE, seed=2, dtype=torch.float32)


def test_projector_has_three_layers_and_outputs_are_normalised_over_the_batch():
    model = tiny_model()
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert all(layer.bias is None for layer in model.projector[::3])
    assert all(layer.out_features == DIM for layer in model.projector[::3])
    assert not list(model.normalize.parameters())
    alone = copy.deepcopy(model)
    for x, z in zip(two_views(), model(*two_views())):
        # a pass with one view alone: the other one has no influence
        raw = alone.projector(alone.backbone(x))
        expected = (raw - raw.mean(0)) / (raw.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_every_parameter():
    model = tiny_model()
    z1, z2 = model(*two_views())
    barlow_twins.barlow_twins(z1.T @ z2 / BATCH, LAMBDA).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-5, name


def test_views_differ_in_blur_and_solarization(monkeypatch):
    calls = []

    def record(operation):
        return lambda x, rand, **options: calls.append((operation, options)) or x

    for operation in ("random_flip", "color_jitter", "random_grayscale", "gaussian_blur"):
        monkeypatch.setattr(barlow_twins, operation, record(operation))
    monkeypatch.setattr(barlow_twins, "solarize", record("solarize"))

    args = arguments("barlow_twins", "--size", 32, "--blur1", 1, "--blur2", 0.1)
    for crop, augment in barlow_twins.views(args):
        assert (crop.size, crop.scale, crop.ratio) == (32, (0.08, 1.0), (3 / 4, 4 / 3))
        augment(torch.rand(1, 3, 8, 8), BatchRandom([0], 1))
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8}
    both = [("random_flip", {}), ("color_jitter", jitter), ("random_grayscale", {"p": 0.2})]
    sigma = (0.1, 2.0)
    first = [("gaussian_blur", {"p": 1, "sigma": sigma}), ("solarize", {"p": 0.0})]
    second = [("gaussian_blur", {"p": 0.1, "sigma": sigma}), ("solarize", {"p": 0.2})]
    assert calls == both + first + both + second


@pytest.mark.parametrize("flag", ["--blur1", "--blur2"])
def test_blur_of_views_too_small_for_it_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        arguments("barlow_twins", "--size", 19, flag, 0.1)
    assert "views of 19 pixels are too small to blur" in capsys.readouterr().err
    arguments("barlow_twins", "--size", 20, flag, 0.1)
    arguments("barlow_twins", "--size", 19)


# -------- The training loop -----------------------------------------------------------------------


@pytest.fixture
def double(monkeypatch):
    """Float64 everywhere, as `train` has it, for the procedure that it is compared with."""
    double_precision(monkeypatch)
    yield
    torch.set_default_dtype(torch.float32)


def papers_procedure():
    """The same training by the paper's formulas (Eq. 1 and 2), all images in one process. Returns
    losses and the weights at the end."""
    args = arguments("barlow_twins", *FLAGS)
    torch.manual_seed(args.seed)
    model = barlow_twins.BarlowTwins(args.arch, SIZE, DIM)  # for its initial weights
    network = nn.Sequential(model.backbone, model.projector)
    weights = list(network.parameters())
    momenta = [torch.zeros_like(w) for w in weights]
    loader = Loader(tiny_data(STEPS * BATCH).train, barlow_twins.views(args), BATCH, 0, CPU)
    losses = []
    for step, views in loader(0):
        normalized = []
        for x in views:
            z = network(x)
            normalized.append((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt())
        c = torch.einsum("bi,bj->ij", *normalized) / BATCH
        losses.append(loss_of_correlations(c))
        gradients = torch.autograd.grad(losses[-1], weights)
        with torch.no_grad():
            for w, g, m in zip(weights, gradients, momenta):
                lr = LR * BATCH / 256 * (1 + math.cos(math.pi * step / STEPS)) / 2
                if w.ndim > 1:
                    g = g + DECAY * w
                    g = g * TRUST * w.norm() / g.norm()
                else:
                    lr *= SHARE
                m.copy_(0.9 * m + g)
                w -= lr * m
    return torch.stack(losses).detach(), model.state_dict()


THOROUGH = [pytest.param(world, marks=pytest.mark.thorough) for world in (2, 3)]


@pytest.mark.parametrize("world", [1, *THOROUGH])
def test_training_is_the_papers_procedure(world, train, double):
    """Error: float64 in another order of summation, 1e-16, which batch-norm of twelve images may
    enlarge a hundredfold in each layer. Statistics of a part of the batch or a gradient scaled by
    the number of processes change the values by 1e-3."""
    losses, expected = papers_procedure()
    result = train("barlow_twins", *FLAGS, world=world, data=tiny_data(STEPS * BATCH))
    torch.testing.assert_close(result.losses, losses, rtol=1e-9, atol=1e-9)
    for name, value in expected.items():
        if not name.startswith("normalize"):  # buffers that are never used
            found = result.state[f"model/{name}"]
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9, msg=name)
    assert all(len(more) == 1 for more in result.more)  # the rate; the loss says the rest
