"""SimSiam: the loss and the sign of collapse against values computed by hand, which gradients exist, and the whole training
loop against the official code's procedure, for any number of processes."""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import BatchRandom, Data, Loader, Split, backbone
from methods import simsiam

CPU = torch.device("cpu")
BATCH, SIZE, DIM, STEPS, LR, DECAY = 12, 16, 8, 3, 2.0, 1e-2
ARGUMENTS = ["--batch", BATCH, "--size", SIZE, "--dim", DIM, "--epochs", 1, "--lr", LR, "--weight-decay", DECAY]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------- Loss and sign of collapse ---------------------------------------------------------------------------------------

def test_loss_by_hand():
    p, z = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 3.0], [0.0, 1.0], [5.0, 0.0]])
    # The cosines are 0, 1 and 3/5.
    assert simsiam.negative_cosine(p, z).item() == pytest.approx(-1.6 / 3, abs=1e-6)


def test_loss_is_minus_one_if_collapsed_and_depends_on_directions_alone():
    p, z = noise(7, 5, seed=1).double(), noise(7, 5, seed=2).double()
    same = noise(1, 5).double().expand(7, 5)
    assert simsiam.negative_cosine(same, same).item() == pytest.approx(-1, abs=1e-12)
    assert simsiam.negative_cosine(p, -p).item() == pytest.approx(1, abs=1e-12)
    assert simsiam.negative_cosine(3 * p, z / 5).item() == pytest.approx(simsiam.negative_cosine(p, z).item(), rel=1e-12)
    assert simsiam.negative_cosine(p, z).item() == pytest.approx(
        -(p * z).sum(1).div(p.norm(dim=1) * z.norm(dim=1)).mean().item(), rel=1e-12)


def test_gradient_reaches_predictions_alone():
    p, z = noise(4, 5, seed=1).double().requires_grad_(), noise(4, 5, seed=2).double().requires_grad_()
    simsiam.negative_cosine(p, z).backward()
    assert z.grad is None
    # d(-cos) / dp = -(z^ - cos p^) / |p|, where p^ and z^ are the directions; the mean is over 4 rows
    with torch.no_grad():
        length = p.norm(dim=1, keepdim=True)
        u, v = p / length, z / z.norm(dim=1, keepdim=True)
        torch.testing.assert_close(p.grad, -(v - (u * v).sum(1, keepdim=True) * u) / length / 4)


def test_loss_and_gradient_equal_lightlys():
    loss = pytest.importorskip("lightly.loss.negative_cosine_similarity").NegativeCosineSimilarity()
    p, z = noise(6, 5, seed=1).double().requires_grad_(), noise(6, 5, seed=2).double()
    other = p.detach().clone().requires_grad_()
    found, expected = simsiam.negative_cosine(p, z), loss(other, z)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(p.grad, other.grad)


def test_spread_by_hand():
    # Directions +-(1, 0): a standard deviation of 1 in the first dimension and of 0 in the second.
    assert simsiam.spread(torch.tensor([[2.0, 0.0], [-3.0, 0.0]])).item() == pytest.approx(0.5)
    assert simsiam.spread(torch.tensor([[3.0, 4.0]]).expand(5, 2)).item() == pytest.approx(0, abs=1e-6)
    # Gaussian: 1 / sqrt(d). The standard deviation of one dimension is off by about 1 / sqrt(2 N) = 1.6 % of itself, the mean
    # of 64 by 0.2 %, and its bias is -1 / (4 N): 1 % leaves room.
    assert simsiam.spread(noise(2000, 64)).item() == pytest.approx(1 / 8, rel=0.01)


# -------- Model -----------------------------------------------------------------------------------------------------------

def tiny_model():
    torch.manual_seed(0)
    return simsiam.SimSiam("resnet14", SIZE, DIM)


def test_gradient_reaches_every_parameter_but_none_goes_through_z():
    model = tiny_model()
    p1, p2, z1, z2 = model(noise(BATCH, 3, SIZE, SIZE, seed=1), noise(BATCH, 3, SIZE, SIZE, seed=2))
    assert p1.shape == z1.shape == (BATCH, DIM)
    for z in (z1, z2):
        z.retain_grad()
    simsiam.negative_cosine(p1, z2).backward(retain_graph=True)
    assert z1.grad.abs().max() > 0 and z2.grad is None  # view 2 is a constant in the first half of the loss ...
    model.zero_grad()
    z1.grad = None
    simsiam.negative_cosine(p2, z1).backward(retain_graph=True)
    assert z2.grad.abs().max() > 0 and z1.grad is None  # ... and view 1 in the second
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-5, name


def test_heads_are_the_official_ones():
    model = tiny_model()
    kinds = [type(m).__name__ for m in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert not list(model.projector[-1].parameters()) and all(m.bias is None for m in model.projector[::3])
    assert [type(m).__name__ for m in model.predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert model.predictor[0].weight.shape == (DIM // 4, DIM) and model.predictor[3].weight.shape == (DIM, DIM // 4)
    assert model.predictor[0].bias is None and model.predictor[3].bias is not None


def test_each_view_has_its_own_batch_statistics():
    model = tiny_model()
    x1, x2 = noise(BATCH, 3, SIZE, SIZE, seed=1), 3 + noise(BATCH, 3, SIZE, SIZE, seed=2)
    alone = copy.deepcopy(model)
    for x, p, z in zip((x1, x2), *(lambda p1, p2, z1, z2: ((p1, p2), (z1, z2)))(*model(x1, x2))):
        found = alone.projector(alone.backbone(x))  # a pass with one view alone: the other one has no influence
        torch.testing.assert_close(found, z)
        torch.testing.assert_close(alone.predictor(found), p)
        # The output is normalised, each dimension to mean 0 and variance 1 but for batch-norm's epsilon of 1e-5.
        torch.testing.assert_close(z.mean(0), torch.zeros(DIM), rtol=0, atol=1e-5)
        assert (z.var(0, correction=0) <= 1).all()


def test_saved_backbone_is_the_common_one():
    backbone("resnet14", SIZE).load_state_dict(tiny_model().backbone.state_dict())


def test_views_follow_one_recipe(monkeypatch):
    calls = []
    for name in ("random_flip", "color_jitter", "random_grayscale", "gaussian_blur"):
        monkeypatch.setattr(simsiam, name, lambda x, rand, name=name, **options: calls.append((name, options)) or x)
    for crop, augment in simsiam.views(arguments("--blur", 0.5)):
        assert (crop.size, crop.scale, crop.ratio) == (SIZE, (0.2, 1.0), (3 / 4, 4 / 3))
        augment(torch.rand(1, 3, 8, 8), BatchRandom([0], 1))
    assert calls == 2 * [
        ("color_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}),
        ("random_grayscale", {"p": 0.2}), ("gaussian_blur", {"p": 0.5, "sigma": (0.1, 2.0)}), ("random_flip", {})]


# -------- The training loop -----------------------------------------------------------------------------------------------

def arguments(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["simsiam.py", *map(str, [*ARGUMENTS, *flags])])
        return simsiam.get_args()


def tiny_data():
    images = np.random.default_rng(0).integers(0, 256, (STEPS * BATCH, 3, SIZE, SIZE), dtype=np.uint8)
    split = Split(torch.from_numpy(images))
    return Data("tiny", split, split, None)


def double(x):
    """What replaces normalize: views in float64, for a network in float64."""
    return normalize(x).double()


normalize = simsiam.normalize


def train():
    """The losses of this process, the model's state after main() on tiny data, the network in float64, and what it printed;
    nothing is evaluated or written."""
    def record(name, args, data, loader, model, state, collapse):
        assert name == "simsiam" and set(state) == {"optimizer"} and collapse == -1
        run.model = model
        return run

    run, printed = SimpleNamespace(step=0, losses=[], end_epoch=lambda epoch: None, finish=lambda: None), []
    run.log, run.bar = lambda loss, lr: run.losses.append(loss.detach()), SimpleNamespace(write=printed.append)
    make = simsiam.SimSiam
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["simsiam.py", *map(str, ARGUMENTS)])
        patch.setattr(simsiam, "load_data", lambda name, root, device: tiny_data())
        patch.setattr(simsiam, "normalize", double)
        patch.setattr(simsiam, "SimSiam", lambda *options: make(*options).double())
        patch.setattr(simsiam, "Run", record)
        simsiam.main()
    return torch.stack(run.losses), run.model.state_dict(), printed


def official_procedure():
    """The same training by the official code's formulas, all images in one process, ordinary batch-norm, everything in float64.
    Returns losses, the model's state, and the spread of the last z1."""
    args = arguments()
    torch.manual_seed(args.seed)
    model = simsiam.SimSiam(args.arch, SIZE, DIM).double()  # for its initial weights
    encoder, predictor = nn.Sequential(model.backbone, model.projector), model.predictor
    weights, losses = [*encoder.parameters(), *predictor.parameters()], []
    momenta, fixed = [torch.zeros_like(w) for w in weights], len(list(encoder.parameters()))
    for step, views in Loader(tiny_data().train, simsiam.views(args), BATCH, args.seed, CPU)(0):
        z1, z2 = (encoder(x.double()) for x in views)
        p1, p2 = predictor(z1), predictor(z2)
        cosine = nn.CosineSimilarity(dim=1)
        losses.append(-(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) * 0.5)
        gradients = torch.autograd.grad(losses[-1], weights)
        with torch.no_grad():
            for i, (w, g, m) in enumerate(zip(weights, gradients, momenta)):
                m.copy_(0.9 * m + g + DECAY * w)
                lr = LR * BATCH / 256 * (1 if i >= fixed else (1 + math.cos(math.pi * step / STEPS)) / 2)
                w -= lr * m
    spread = F.normalize(z1.detach(), dim=1).var(0, correction=0).sqrt().mean()
    return torch.stack(losses).detach(), model.state_dict(), spread


# The network is in float64, but the loss and its gradient with respect to p in float32: relative errors of 6e-8, which
# batch-norm of twelve images may enlarge a hundredfold, and three steps add up. A decayed rate of the predictor, another
# statistic or another image changes the values by 1e-3.
TRAINED = {"rtol": 1e-5, "atol": 1e-5}


def test_training_is_the_official_procedure_on_any_number_of_processes(processes):
    losses, expected, spread = official_procedure()
    for count in (1, 2, 3):
        results = processes(count, train)
        torch.testing.assert_close(torch.stack([found for found, *_ in results]).mean(0).double(), losses, **TRAINED)
        for _, state, _ in results:
            for name, value in state.items():
                assert torch.equal(value, results[0][1][name]), name  # the processes agree to the last bit
                torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{count} {name}: {m}", **TRAINED)
        # Of the whole batch, by process 0 alone.
        assert [printed for *_, printed in results[1:]] == [[]] * (count - 1)
        assert results[0][2] == [f"standard deviation of z / |z|: {spread:.4f}; spread evenly {DIM ** -0.5:.4f}, collapsed 0"]
