"""Barlow Twins: the loss against values computed by hand, its invariances, the optimiser, which gradients exist, and the whole
training loop against the paper's procedure, for any number of processes: the statistics are those of the global batch."""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common import BatchRandom, Data, Loader, Split, backbone
from methods import barlow_twins

CPU = torch.device("cpu")
BATCH, SIZE, DIM, STEPS, LR, SHARE, DECAY, LAMB, TRUST = 12, 16, 8, 3, 40.0, 0.01, 1e-3, 0.0051, 1e-3
ARGUMENTS = ["--batch", BATCH, "--size", SIZE, "--dim", DIM, "--epochs", 1, "--warmup", 0, "--lr", LR, "--bias-lr", SHARE,
             "--weight-decay", DECAY, "--lambda", LAMB]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(z1, z2, lamb=LAMB):
    """The loss of projections (N, D) in float64, normalised by the layer that the model has for it."""
    normalize = nn.BatchNorm1d(z1.shape[1], affine=False, dtype=torch.float64)
    return barlow_twins.barlow_twins(normalize(z1).T @ normalize(z2) / len(z1), lamb)


# -------- Loss ------------------------------------------------------------------------------------------------------------

def test_loss_by_hand():
    c = torch.tensor([[0.5, 0.1, 0.0], [-0.2, 1.0, 0.3], [0.0, 0.0, -1.0]])
    # Diagonal: 0.25 + 0 + 4; elsewhere: 0.01 + 0.04 + 0.09.
    assert barlow_twins.barlow_twins(c, 0.1).item() == pytest.approx(4.25 + 0.1 * 0.14, rel=1e-6)
    assert barlow_twins.barlow_twins(torch.eye(3), 0.1).item() == 0
    assert barlow_twins.barlow_twins(torch.zeros(3, 3), 0.1).item() == 3  # all dimensions constant
    assert barlow_twins.barlow_twins(torch.ones(3, 3), 0.1).item() == pytest.approx(0.1 * 6)  # all dimensions the same


def test_gradient_by_hand():
    c = noise(4, 4).double().requires_grad_()
    barlow_twins.barlow_twins(c, 0.1).backward()
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(c.grad, identity * 2 * (c - 1) + (1 - identity) * 0.2 * c)


def test_loss_equals_the_formula_on_correlations():
    z1, z2 = noise(50, 4, seed=1).double(), noise(50, 4, seed=2).double()
    c = np.corrcoef(z1.T, z2.T)[:4, 4:]  # Pearson's correlation of dimension i of view 1 with dimension j of view 2
    expected = sum((1 - c[i, j]) ** 2 if i == j else LAMB * c[i, j] ** 2 for i in range(4) for j in range(4))
    # The layer adds 1e-5 to variances of about 1, which makes correlations smaller by about 1e-5 of themselves.
    assert loss_of(z1, z2).item() == pytest.approx(expected, rel=1e-4)


def test_invariances():
    z1, z2 = noise(50, 4, seed=1).double(), noise(50, 4, seed=2).double()
    value, flip = loss_of(z1, z2).item(), torch.tensor([-1.0, 1, 1, 1])
    assert loss_of(z2, z1).item() == pytest.approx(value, rel=1e-12)  # the views may change places
    assert loss_of(flip * z1, flip * z2).item() == pytest.approx(value, rel=1e-12)
    assert abs(loss_of(flip * z1, z2).item() - value) > 0.01  # the sign of a dimension in one view alone matters
    assert loss_of(1000 * z1 + 5, 1000 * z2).item() == pytest.approx(value, rel=1e-4)  # see above for 1e-5
    assert loss_of(z1, z1).item() == pytest.approx(LAMB * sum(c ** 2 for c in np.corrcoef(z1.T).ravel()) - 4 * LAMB, rel=1e-4)
    assert loss_of(torch.ones(50, 4, dtype=torch.float64), z2).item() == 4  # collapsed: D


def test_loss_and_gradient_equal_lightlys():
    loss = pytest.importorskip("lightly.loss.barlow_twins_loss").BarlowTwinsLoss(lambda_param=LAMB)
    pair = [noise(20, 6, seed=seed).double().requires_grad_() for seed in (1, 2)]
    other = [z.detach().clone().requires_grad_() for z in pair]
    found, expected = loss_of(*pair), loss(*other)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    expected.backward()
    for z, o in zip(pair, other):
        torch.testing.assert_close(z.grad, o.grad)


# -------- Optimiser -------------------------------------------------------------------------------------------------------

def test_lars_by_hand():
    w, b = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([2.0]))
    optimizer = barlow_twins.LARS([w, b], lr=10.0, weight_decay=0.5)
    w.grad, b.grad = torch.tensor([[0.0, 1.0]]), torch.tensor([0.1])
    optimizer.step()
    # w: gradient + decay (1.5, 3), norm of w 5: step of 10 x 0.001 x 5 in that direction. b: 10 x 0.1, no decay.
    direction = torch.tensor([[1.5, 3.0]]) / math.hypot(1.5, 3)
    torch.testing.assert_close(w.detach(), torch.tensor([[3.0, 4.0]]) - 0.05 * direction)
    torch.testing.assert_close(b.detach(), torch.tensor([1.0]))
    optimizer.param_groups[0]["lr"] = 1.0
    b.grad = torch.tensor([0.0])
    optimizer.step()  # the new rate multiplies the whole buffer, 0.9 x 0.1
    torch.testing.assert_close(b.detach(), torch.tensor([0.91]))


def test_lars_leaves_zero_weights_and_gradients_to_plain_sgd():
    w, v = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = barlow_twins.LARS([w, v], lr=1.0, weight_decay=0.0)
    w.grad, v.grad = torch.full((2, 2), 0.25), torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(w.detach(), torch.full((2, 2), -0.25)) and torch.equal(v.detach(), torch.ones(2, 2))


# -------- Model -----------------------------------------------------------------------------------------------------------

def tiny_model():
    torch.manual_seed(0)
    return barlow_twins.BarlowTwins("resnet14", SIZE, DIM)


def test_projector_has_three_layers_and_outputs_are_normalised_over_the_batch():
    model = tiny_model()
    assert [type(m).__name__ for m in model.projector] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert all(m.bias is None and m.out_features == DIM for m in model.projector[::3])
    assert not list(model.normalize.parameters())
    x1, x2 = noise(BATCH, 3, SIZE, SIZE, seed=1), 3 + noise(BATCH, 3, SIZE, SIZE, seed=2)
    alone = copy.deepcopy(model)
    for x, z in zip((x1, x2), model(x1, x2)):
        raw = alone.projector(alone.backbone(x))  # a pass with one view alone: the other one has no influence
        torch.testing.assert_close(z, (raw - raw.mean(0)) / (raw.var(0, correction=0) + 1e-5).sqrt(), rtol=1e-4, atol=1e-4)


def test_gradient_reaches_every_parameter():
    model = tiny_model()
    z1, z2 = model(noise(BATCH, 3, SIZE, SIZE, seed=1), noise(BATCH, 3, SIZE, SIZE, seed=2))
    barlow_twins.barlow_twins(z1.T @ z2 / BATCH, LAMB).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-5, name


def test_saved_backbone_is_the_common_one():
    backbone("resnet14", SIZE).load_state_dict(tiny_model().backbone.state_dict())


def test_views_differ_in_blur_and_solarization(monkeypatch):
    calls = []
    for name in ("random_flip", "color_jitter", "random_grayscale", "gaussian_blur", "solarize"):
        monkeypatch.setattr(barlow_twins, name, lambda x, rand, name=name, **options: calls.append((name, options)) or x)
    for crop, augment in barlow_twins.views(arguments("--blur", 1, 0.1)):
        assert (crop.size, crop.scale, crop.ratio) == (SIZE, (0.08, 1.0), (3 / 4, 4 / 3))
        augment(torch.rand(1, 3, 8, 8), BatchRandom([0], 1))
    first, second = calls[:5], calls[5:]
    assert first[:3] == second[:3] == [
        ("random_flip", {}), ("color_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8}),
        ("random_grayscale", {"p": 0.2})]
    assert first[3:] == [("gaussian_blur", {"p": 1, "sigma": (0.1, 2.0)}), ("solarize", {"p": 0.0})]
    assert second[3:] == [("gaussian_blur", {"p": 0.1, "sigma": (0.1, 2.0)}), ("solarize", {"p": 0.2})]


# -------- The training loop -----------------------------------------------------------------------------------------------

def arguments(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["barlow_twins.py", *map(str, [*ARGUMENTS, *flags])])
        return barlow_twins.get_args()


def tiny_data():
    images = np.random.default_rng(0).integers(0, 256, (STEPS * BATCH, 3, SIZE, SIZE), dtype=np.uint8)
    split = Split(torch.from_numpy(images))
    return Data("tiny", split, split, None)


def double(x):
    """What replaces normalize: views in float64, for a network in float64."""
    return normalize(x).double()


normalize = barlow_twins.normalize


def double_model(*options):
    model = make(*options).double()
    model.normalize.float()  # its input is
    return model


make = barlow_twins.BarlowTwins


def train():
    """The losses of this process and the model's state after main() on tiny data, the network in float64; nothing is evaluated
    or written."""
    def record(name, args, data, loader, model, state, collapse):
        assert name == "barlow_twins" and set(state) == {"optimizer"} and collapse == DIM
        run.model = model
        return run

    run = SimpleNamespace(step=0, losses=[], end_epoch=lambda epoch: None, finish=lambda: None)
    run.log = lambda loss, lr: run.losses.append(loss.detach())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["barlow_twins.py", *map(str, ARGUMENTS)])
        patch.setattr(barlow_twins, "load_data", lambda name, root, device: tiny_data())
        patch.setattr(barlow_twins, "normalize", double)
        patch.setattr(barlow_twins, "BarlowTwins", double_model)
        patch.setattr(barlow_twins, "Run", record)
        barlow_twins.main()
    return torch.stack(run.losses), run.model.state_dict()


def papers_procedure():
    """The same training by the paper's formulas (Eq. 1 and 2), all images in one process, everything in float64. Returns losses
    and the model's state."""
    args = arguments()
    torch.manual_seed(args.seed)
    model = barlow_twins.BarlowTwins(args.arch, SIZE, DIM).double()  # for its initial weights
    network, losses = nn.Sequential(model.backbone, model.projector), []
    weights = list(network.parameters())
    momenta = [torch.zeros_like(w) for w in weights]
    for step, views in Loader(tiny_data().train, barlow_twins.views(args), BATCH, args.seed, CPU)(0):
        a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (network(x.double()) for x in views))
        c = torch.einsum("bi,bj->ij", a, b) / BATCH
        losses.append(sum((1 - c[i, j]) ** 2 if i == j else LAMB * c[i, j] ** 2 for i in range(DIM) for j in range(DIM)))
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


# The network is in float64, but what follows the projector in float32: relative errors of 6e-8, which batch-norm of twelve
# images may enlarge a hundredfold, and three steps add up. Statistics of a part of the batch or a gradient scaled by the number
# of processes change the values by 1e-3.
TRAINED = {"rtol": 1e-5, "atol": 1e-5}


def test_training_is_the_papers_procedure_on_any_number_of_processes(processes):
    losses, expected = papers_procedure()
    for count in (1, 2, 3):
        results = processes(count, train)
        for found, state in results:
            assert torch.equal(found, results[0][0])  # every process has the loss of the global batch
            torch.testing.assert_close(found.double(), losses, **TRAINED)
            for name, value in state.items():
                assert torch.equal(value, results[0][1][name]), name  # the processes agree to the last bit
                if not name.startswith("normalize"):  # those buffers are never used, and the other procedure has none
                    torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{count} {n}: {m}", **TRAINED)
