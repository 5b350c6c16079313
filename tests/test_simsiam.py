"""SimSiam: the loss and the sign of collapse against values computed by hand, which gradients
exist, and the whole training loop against the official code's procedure."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, double_precision, noise, tiny_data
from torch import nn

from common import Loader
from kernels.views import BatchRandom
from methods import simsiam

BATCH, SIZE, DIM, STEPS = 12, 16, 8, 3
LR, DECAY = 2.0, 1e-2
FLAGS = f"""--batch {BATCH} --size {SIZE} --dim {DIM} --epochs 1 --lr {LR}
            --weight-decay {DECAY}""".split()


# -------- Loss and sign of collapse ---------------------------------------------------------------


def test_loss_by_hand():
    p = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    z = torch.tensor([[0.0, 3.0], [0.0, 1.0], [5.0, 0.0]])
    # The cosines are 0, 1 and 3/5.
    assert simsiam.negative_cosine(p, z).item() == pytest.approx(-1.6 / 3, abs=1e-6)


def test_loss_is_minus_one_if_collapsed_and_depends_on_directions_alone():
    p = noise(7, 5, seed=1)
    z = noise(7, 5, seed=2)
    same = noise(1, 5).expand(7, 5)
    assert simsiam.negative_cosine(same, same).item() == pytest.approx(-1, abs=1e-12)
    assert simsiam.negative_cosine(p, -p).item() == pytest.approx(1, abs=1e-12)
    cosines = (p * z).sum(1) / (p.norm(dim=1) * z.norm(dim=1))
    expected = pytest.approx(-cosines.mean().item(), rel=1e-12)
    assert simsiam.negative_cosine(p, z).item() == expected
    assert simsiam.negative_cosine(3 * p, z / 5).item() == expected


def test_gradient_reaches_predictions_alone():
    p = noise(4, 5, seed=1).requires_grad_()
    z = noise(4, 5, seed=2).requires_grad_()
    simsiam.negative_cosine(p, z).backward()
    assert z.grad is None
    # d(-cos) / dp = -(v - cos u) / |p|, where u and v are the directions of p and z; the mean is
    # over 4 rows
    with torch.no_grad():
        length = p.norm(dim=1, keepdim=True)
        u = p / length
        v = z / z.norm(dim=1, keepdim=True)
        cosine = (u * v).sum(1, keepdim=True)
        torch.testing.assert_close(p.grad, -(v - cosine * u) / length / 4)


def test_loss_and_gradient_equal_lightlys():
    lightly = pytest.importorskip("lightly.loss.negative_cosine_similarity")
    p = noise(6, 5, seed=1).requires_grad_()
    z = noise(6, 5, seed=2)
    other = p.detach().clone().requires_grad_()
    loss = simsiam.negative_cosine(p, z)
    expected = lightly.NegativeCosineSimilarity()(other, z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(p.grad, other.grad)


def test_spread_by_hand():
    # Directions +-(1, 0): a deviation of 1 in the first dimension and of 0 in the second.
    opposite = torch.tensor([[2.0, 0.0], [-3.0, 0.0]])
    assert simsiam.spread(opposite).item() == pytest.approx(0.5)
    same = torch.tensor([[3.0, 4.0]]).expand(5, 2)
    assert simsiam.spread(same).item() == pytest.approx(0, abs=1e-6)
    # Gaussian: 1 / sqrt(d). The deviation of one dimension is off by about 1 / sqrt(2 N) = 1.6 % of
    # itself, the mean of 64 by 0.2 %, and its bias is -1 / (4 N): 1 % leaves room.
    assert simsiam.spread(noise(2000, 64)).item() == pytest.approx(1 / 8, rel=0.01)


# -------- Model and views -------------------------------------------------------------------------


def tiny_model():
    torch.manual_seed(0)
    return simsiam.SimSiam("resnet14", SIZE, DIM)


def two_views():
    """Two batches (N, 3, H, W) with different statistics."""
    x1 = noise(BATCH, 3, SIZE, SIZE, seed=1, dtype=torch.float32)
    return x1, 3 + noise(BATCH, 3, SIZE, SIZE, seed=2, dtype=torch.float32)


def test_gradient_reaches_every_parameter_but_none_goes_through_z():
    model = tiny_model()
    p1, p2, z1, z2 = model(*two_views())
    assert p1.shape == z1.shape == (BATCH, DIM)
    z1.retain_grad()
    z2.retain_grad()
    # View 2 is a constant in the first half of the loss ...
    simsiam.negative_cosine(p1, z2).backward(retain_graph=True)
    assert z1.grad.abs().max() > 0 and z2.grad is None
    # ... and view 1 in the second.
    model.zero_grad()
    z1.grad = None
    simsiam.negative_cosine(p2, z1).backward(retain_graph=True)
    assert z2.grad.abs().max() > 0 and z1.grad is None
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-5, name


def test_heads_are_the_official_ones():
    model = tiny_model()
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert not list(model.projector[-1].parameters())
    assert all(layer.bias is None for layer in model.projector[::3])
    kinds = [type(layer).__name__ for layer in model.predictor]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    first, last = model.predictor[0], model.predictor[3]
    assert first.weight.shape == (DIM // 4, DIM) and first.bias is None
    assert last.weight.shape == (DIM, DIM // 4) and last.bias is not None


def test_each_view_has_its_own_batch_statistics():
    model = tiny_model()
    alone = copy.deepcopy(model)
    p1, p2, z1, z2 = model(*two_views())
    for x, p, z in zip(two_views(), (p1, p2), (z1, z2)):
        # a pass with one view alone: the other one has no influence
        expected = alone.projector(alone.backbone(x))
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(p, alone.predictor(expected))
        # The output is normalised, each dimension to mean 0 and variance 1 but for batch-norm's
        # epsilon of 1e-5.
        torch.testing.assert_close(z.mean(0), torch.zeros(DIM), rtol=0, atol=1e-5)
        assert (z.var(0, correction=0) <= 1).all()


def test_views_follow_one_recipe(monkeypatch):
    calls = []

    def record(operation):
        return lambda x, rand, **options: calls.append((operation, options)) or x

    for operation in ("random_flip", "color_jitter", "random_grayscale", "gaussian_blur"):
        monkeypatch.setattr(simsiam, operation, record(operation))

    for crop, augment in simsiam.views(arguments("simsiam", "--size", 32, "--blur", 0.5)):
        assert (crop.size, crop.scale, crop.ratio) == (32, (0.2, 1.0), (3 / 4, 4 / 3))
        augment(torch.rand(1, 3, 8, 8), BatchRandom([0], 1))
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}
    blur = {"p": 0.5, "sigma": (0.1, 2.0)}
    each = [("color_jitter", jitter), ("random_grayscale", {"p": 0.2}), ("gaussian_blur", blur)]
    assert calls == 2 * [*each, ("random_flip", {})]


def test_blur_of_views_too_small_for_it_is_refused(capsys):
    with pytest.raises(SystemExit):
        arguments("simsiam", "--size", 19, "--blur", 0.5)
    assert "--blur 0.5: views of 19 pixels are too small" in capsys.readouterr().err
    arguments("simsiam", "--size", 20, "--blur", 0.5)
    arguments("simsiam", "--size", 19)


# -------- The training loop -----------------------------------------------------------------------


@pytest.fixture
def double(monkeypatch):
    """Float64 everywhere, as `train` has it, for the procedure that it is compared with."""
    double_precision(monkeypatch)
    yield
    torch.set_default_dtype(torch.float32)


def official_procedure():
    """The same training by the official code's formulas, all images in one process, ordinary
    batch-norm. Returns losses, the spread of z1 at each step, and the weights at the end."""
    args = arguments("simsiam", *FLAGS)
    torch.manual_seed(args.seed)
    model = simsiam.SimSiam(args.arch, SIZE, DIM)  # for its initial weights
    encoder = nn.Sequential(model.backbone, model.projector)
    predictor = model.predictor
    weights = [*encoder.parameters(), *predictor.parameters()]
    fixed = len(list(encoder.parameters()))  # the first weight whose rate does not fall
    momenta = [torch.zeros_like(w) for w in weights]
    loader = Loader(tiny_data(STEPS * BATCH).train, simsiam.views(args), BATCH, 0, CPU)
    cosine = nn.CosineSimilarity(dim=1)
    losses = []
    spreads = []
    for step, (x1, x2) in loader(0):
        z1 = encoder(x1)
        z2 = encoder(x2)
        p1 = predictor(z1)
        p2 = predictor(z2)
        losses.append(-(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) * 0.5)
        spreads.append(F.normalize(z1.detach(), dim=1).var(0, correction=0).sqrt().mean())
        gradients = torch.autograd.grad(losses[-1], weights)
        with torch.no_grad():
            for i, (w, g, m) in enumerate(zip(weights, gradients, momenta)):
                m.copy_(0.9 * m + g + DECAY * w)
                fall = 1 if i >= fixed else (1 + math.cos(math.pi * step / STEPS)) / 2
                w -= LR * BATCH / 256 * fall * m
    return torch.stack(losses).detach(), torch.stack(spreads), model.state_dict()


THOROUGH = [pytest.param(world, marks=pytest.mark.thorough) for world in (2, 3)]


@pytest.mark.parametrize("world", [1, *THOROUGH])
def test_training_is_the_official_procedure(world, train, double):
    """Error: float64 in another order of summation, 1e-16, which batch-norm of twelve images may
    enlarge a hundredfold in each layer. A decayed rate of the predictor, another statistic or
    another image changes the values by 1e-3."""
    losses, spreads, expected = official_procedure()
    result = train("simsiam", *FLAGS, world=world, data=tiny_data(STEPS * BATCH))
    torch.testing.assert_close(result.losses, losses, rtol=1e-9, atol=1e-9)
    # the spread is over the whole batch, in whatever process it is computed
    found = torch.stack([more["spread"] for more in result.more])
    torch.testing.assert_close(found, spreads, rtol=1e-9, atol=1e-9)
    for name, value in expected.items():
        found = result.state[f"model/{name}"]
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9, msg=name)
