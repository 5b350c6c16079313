"""BYOL: the loss and the schedule against values computed by hand, which gradients and statistics
exist, and the training loop against the official code's procedure."""

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, call_main, double_precision, noise, tiny_data
from torch import nn

from common import Loader, backbone
from kernels.views import BatchRandom
from methods import byol

BATCH, SIZE, STEPS, LR, DECAY, TAU, TRUST = 12, 16, 3, 40.0, 1e-3, 0.9, 1e-3
FLAGS = ["--batch", BATCH, "--size", SIZE, "--hidden", 24, "--dim", 8, "--epochs", 1, "--warmup", 0]
FLAGS += ["--min-crop", 0.08, "--optimizer", "lars", "--lr", LR, "--weight-decay", DECAY]
FLAGS += ["--tau-base", TAU]


# -------- Loss and schedule -----------------------------------------------------------------------


def test_loss_by_hand():
    p = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    z = torch.tensor([[0.0, 3.0], [0.0, 1.0], [5.0, 0.0]])
    # The cosines are 0, 1 and 3/5, the losses of the three pairs 2, 0 and 4/5.
    assert byol.regression_loss(p, z).item() == pytest.approx(2.8 / 3, abs=1e-6)


def test_loss_is_the_squared_distance_of_directions():
    p = noise(7, 5, seed=1)
    z = noise(7, 5, seed=2)
    u = p / p.norm(dim=1, keepdim=True)
    v = z / z.norm(dim=1, keepdim=True)
    distance = (u - v).square().sum(1).mean().item()
    assert byol.regression_loss(p, z).item() == pytest.approx(distance, rel=1e-12)
    # lengths do not matter
    assert byol.regression_loss(3 * p, z / 5).item() == pytest.approx(distance, rel=1e-12)
    assert byol.regression_loss(p, 2 * p).item() == pytest.approx(0, abs=1e-12)
    assert byol.regression_loss(p, -p).item() == pytest.approx(4, abs=1e-12)


def test_gradient_reaches_predictions_alone():
    p = noise(4, 5, seed=1).requires_grad_()
    z = noise(4, 5, seed=2).requires_grad_()
    byol.regression_loss(p, z).backward()
    assert z.grad is None
    # d(2 - 2 cos) / dp = -2 (v - cos u) / |p|, where u and v are the directions of p and z; the
    # mean is over 4 rows
    with torch.no_grad():
        length = p.norm(dim=1, keepdim=True)
        u = p / length
        v = z / z.norm(dim=1, keepdim=True)
        cosine = (u * v).sum(1, keepdim=True)
        torch.testing.assert_close(p.grad, -2 * (v - cosine * u) / length / 4)


def test_loss_and_gradient_equal_lightlys():
    module = pytest.importorskip("lightly.loss.negative_cosine_similarity")
    p = noise(6, 5, seed=1).requires_grad_()
    z = noise(6, 5, seed=2)
    other = p.detach().clone().requires_grad_()
    found = byol.regression_loss(p, z)
    expected = 2 + 2 * module.NegativeCosineSimilarity()(other, z)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(p.grad, other.grad)


def test_decay_of_the_target_rises_from_its_base_to_one():
    args = SimpleNamespace(tau_base=0.9, epochs=4)
    values = [byol.target_decay(step, args, 10) for step in range(41)]
    assert values[0] == pytest.approx(0.9)
    assert values[10] == pytest.approx(1 - 0.1 * (math.sqrt(0.5) + 1) / 2)  # cos(45 degrees)
    assert values[20] == pytest.approx(0.95)
    assert values[39] < 1 and values[40] == 1
    assert values == sorted(values)


# -------- Model -----------------------------------------------------------------------------------

HEAD = ["Linear", "BatchNorm1d", "ReLU", "Linear"]


@functools.cache
def initial_model(head_norm, stage):
    torch.manual_seed(0)
    return byol.BYOL("resnet14", SIZE, 24, 8, head_norm, stage)


def tiny_model(head_norm=False, stage=None):
    return copy.deepcopy(initial_model(head_norm, stage))  # faster than a new one


def two_views():
    first = noise(BATCH, 3, SIZE, SIZE, seed=1, dtype=torch.float32)
    second = noise(BATCH, 3, SIZE, SIZE, seed=2, dtype=torch.float32)
    return first, 3 + second


def test_gradient_reaches_the_online_network_and_not_the_target():
    model = tiny_model()
    p1, p2, z1, z2 = model(*two_views())
    assert p1.shape == z1.shape == (BATCH, 8) and not z1.requires_grad and not z2.requires_grad
    (byol.regression_loss(p1, z2) + byol.regression_loss(p2, z1)).backward()
    # batch-norm takes away the mean, and with it what these biases add
    without = {"projector.0.bias", "predictor.0.bias"}
    for name, w in model.named_parameters():
        if name.startswith("target"):
            assert not w.requires_grad and w.grad is None
        elif name in without:
            # Zero but for rounding: float32 sums of 12 gradients of at most 1.
            assert w.grad.abs().max() < 1e-5, name
        else:
            assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-5, name


def test_heads_have_one_hidden_batch_norm_and_none_at_the_output():
    model = tiny_model()
    for head in (model.projector, model.predictor, model.target[1]):
        assert [type(m).__name__ for m in head] == HEAD
        assert head[0].bias is not None and head[3].bias is None
    assert len(model.target) == 2  # backbone and projector: no predictor


def test_head_norm_gives_every_dimension_of_both_projections_mean_0_and_variance_1():
    model = tiny_model(head_norm=True)
    assert [type(m).__name__ for m in model.predictor] == HEAD
    for head in (model.projector, model.target[1]):
        assert [type(m).__name__ for m in head] == [*HEAD, "BatchNorm1d"] and not head[4].affine
    projected = []
    model.predictor.register_forward_pre_hook(lambda _, inputs: projected.append(inputs[0]))
    _, _, z1, z2 = model(*two_views())
    assert len(projected) == 2
    for z in (*projected, z1, z2):
        torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
        # eps 1e-5 beside small variances
        torch.testing.assert_close(z.var(0, correction=0), torch.ones(8), atol=0.02, rtol=0)


def test_target_starts_from_weights_of_its_own():
    model = tiny_model()
    online = nn.Sequential(model.backbone, model.projector)
    for (name, t), o in zip(model.target.named_parameters(), online.parameters(), strict=True):
        assert t.shape == o.shape and t is not o
        if t.ndim > 1:
            assert not torch.equal(t, o), name


def test_each_network_and_each_view_has_its_own_batch_statistics():
    model = tiny_model()
    x1, x2 = two_views()
    other = copy.deepcopy(model)
    p1, p2, z1, z2 = model(x1, x2)
    predicting = nn.Sequential(other.backbone, other.projector, other.predictor)
    for network, outputs in ((predicting, (p1, p2)), (other.target, (z1, z2))):
        for x, found in zip((x1, x2), outputs):
            # a pass with one view alone: the other one has no influence
            torch.testing.assert_close(network(x), found)

    # The target's running statistics come from its own activations, two updates, and are not
    # averaged with the online ones.
    for net in (model.backbone, model.target[0]):
        a, b = [net.conv1(x).mean((0, 2, 3)) for x in (x1, x2)]
        found = net.bn1.running_mean
        torch.testing.assert_close(found, 0.09 * a + 0.1 * b, rtol=1e-4, atol=1e-6)
    before = copy.deepcopy(dict(model.target.named_buffers()))
    byol.ema_update(model.target, nn.Sequential(model.backbone, model.projector), 0.5)
    assert all(torch.equal(before[name], b) for name, b in model.target.named_buffers())


def test_views_differ_in_blur_and_solarization(monkeypatch):
    calls = []

    def replace(name):
        def operation(x, rand, **options):
            calls.append((name, options))
            return x

        monkeypatch.setattr(byol, name, operation)

    for name in ("random_flip", "color_jitter", "random_grayscale", "gaussian_blur", "solarize"):
        replace(name)
    for crop, augment in byol.views(arguments("byol", "--recipe", "paper", "--data", "x")):
        assert (crop.size, crop.scale, crop.ratio) == (224, (0.08, 1.0), (3 / 4, 4 / 3))
        augment(torch.rand(1, 3, 8, 8), BatchRandom([0], 1))

    first, second = calls[:5], calls[5:]
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "p": 0.8}
    same = [("random_flip", {}), ("color_jitter", jitter), ("random_grayscale", {"p": 0.2})]
    sigma = (0.1, 2.0)
    assert first[:3] == second[:3] == same
    assert first[3:] == [("gaussian_blur", {"p": 1, "sigma": sigma}), ("solarize", {"p": 0.0})]
    assert second[3:] == [("gaussian_blur", {"p": 0.1, "sigma": sigma}), ("solarize", {"p": 0.2})]


@pytest.mark.parametrize("share", [0, 2])
def test_impossible_crops_are_refused_in_one_sentence(share):
    result = call_main("byol", *FLAGS, "--min-crop", share)
    assert result.code == 1
    assert f"--min-crop {share}" in result.err and result.err.count("\n") == 1


# -------- A middle layer as target ----------------------------------------------------------------

STAGES = pytest.mark.parametrize("stage", [1, 2, 3, 4])


def stage_outputs(net, stage, x):
    """What a stage of the whole network makes of x, averaged over places; seen by a hook."""
    seen = []
    hook = getattr(net, f"layer{stage}").register_forward_hook(lambda *args: seen.append(args[2]))
    net(x)
    hook.remove()
    return seen[0].mean((2, 3))


@STAGES
def test_middle_target_is_the_stage_with_mean_0_and_variance_1(stage):
    """Of each view by itself; in the target's own network; without gradient. The prediction has as
    many dimensions."""
    model = tiny_model(stage=stage)
    torch.manual_seed(1)
    whole = backbone("resnet14", SIZE)
    # The order is that of the layers; those behind the stage keep their values.
    for t, w in zip(model.target.parameters(), whole.parameters()):
        w.data.copy_(t)
    x1, x2 = two_views()
    p1, p2, z1, z2 = model(x1, x2)
    for x, p, z in ((x1, p1, z1), (x2, p2, z2)):
        h = stage_outputs(whole, stage, x).detach()
        expected = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-3)
        assert p.shape == z.shape and not z.requires_grad

    loss = byol.regression_loss(p1, z2) + byol.regression_loss(p2, z1)
    loss.backward()
    for name, w in model.named_parameters():
        assert (w.grad is None) == name.startswith("target"), name


def test_last_stage_is_the_representation():
    """And the layers are the network's own, not copies, so the target can follow them."""
    net = tiny_model().backbone
    part = byol.up_to(net, 4)
    x, _ = two_views()
    torch.testing.assert_close(part.eval()(x), net.eval()(x))
    for stage in (1, 2, 3, 4):
        layers = [f"layer{i}" for i in range(1, stage + 1)]
        wanted = tuple(f"{name}." for name in ("conv1", "bn1", *layers))
        own = [w for name, w in net.named_parameters() if name.startswith(wanted)]
        found = byol.up_to(net, stage).parameters()
        assert all(a is b for a, b in zip(found, own, strict=True))


@pytest.mark.parametrize(
    "arch, stage, width",
    [("resnet18", 3, 256), pytest.param("resnet50", 1, 256, marks=pytest.mark.thorough)],
)
def test_predictor_is_as_wide_as_the_stage(arch, stage, width):
    with torch.device("meta"):
        model = byol.BYOL(arch, 32, 24, 8, False, stage)
        x = torch.zeros(2, 3, 32, 32)
        p1, _, _, z2 = model(x, x)
    assert p1.shape == z2.shape == (2, width)


@STAGES
def test_batch_norm_of_the_target_makes_one_answer_for_all_images_useless(stage):
    """The best constant prediction is the mean direction of the targets and costs 2 - 2 |mean|.
    Outputs of a stage are positive, so their directions have much in common: without the
    batch-norm the constant alone more than halves the loss of 2."""
    model = tiny_model(stage=stage)
    x, _ = two_views()

    def best_constant(t):
        mean = F.normalize(t, dim=1).mean(0, keepdim=True)
        loss = byol.regression_loss(mean.expand_as(t), t).item()
        assert loss == pytest.approx(2 - 2 * mean.norm().item(), abs=1e-5)
        return loss

    layers, norm = model.target
    h = layers(x)
    assert best_constant(h) < 1
    assert best_constant(norm(h)) > 1.5


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--target", "mid", "--arch", "vit_micro"), "--target mid needs the stages of a ResNet"),
        (("--target", "mid", "--stage", 5), "--stage 5"),
        (("--stage", 2), "--stage 2 is only used with --target mid: add it, or leave"),
    ],
)
def test_stages_that_do_not_exist_are_refused(flags, words):
    result = call_main("byol", *flags)
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1


# -------- The training loop -----------------------------------------------------------------------


@pytest.fixture
def in_double(monkeypatch):
    """The test itself computes in float64, as the training does."""
    double_precision(monkeypatch)
    yield
    torch.set_default_dtype(torch.float32)


def official_procedure(flags):
    """The same training by the official code's formulas, all images in one process, with ordinary
    batch-norm; with --optimizer sgd its steps in place of LARS's. Returns losses and the state of
    the model."""
    args = arguments("byol", *flags)
    torch.manual_seed(args.seed)
    stage = args.stage if args.target == "mid" else None
    model = byol.BYOL(args.arch, SIZE, args.hidden, args.dim, args.head_norm, stage)
    online = nn.Sequential(model.backbone, model.projector)
    followed = list(online.parameters())
    if stage:
        names = ("conv1", "bn1", *[f"layer{i}" for i in range(1, stage + 1)])
        followed = [w for name in names for w in getattr(model.backbone, name).parameters()]
    weights = [*online.parameters(), *model.predictor.parameters()]
    momenta = [torch.zeros_like(w) for w in weights]
    losses = []
    loader = Loader(tiny_data(STEPS * BATCH).train, byol.views(args), BATCH, args.seed, CPU)
    for step, (x1, x2) in loader(0):
        p1, p2 = [F.normalize(model.predictor(online(x)), dim=1) for x in (x1, x2)]
        z1, z2 = [F.normalize(model.target(x).detach(), dim=1) for x in (x1, x2)]
        losses.append(((p1 - z2).square().sum(1) + (p2 - z1).square().sum(1)).mean())
        gradients = torch.autograd.grad(losses[-1], weights)
        cosine = (1 + math.cos(math.pi * step / STEPS)) / 2
        with torch.no_grad():
            for w, g, m in zip(weights, gradients, momenta):
                if args.optimizer == "sgd":
                    g = g + DECAY * w
                elif w.ndim > 1:
                    g = g + DECAY * w
                    g = g * TRUST * w.norm() / g.norm()
                m.copy_(0.9 * m + g)
                w -= args.lr * BATCH / 256 * cosine * m
            tau = 1 - (1 - TAU) * cosine
            for xi, theta in zip(model.target.parameters(), followed, strict=True):
                xi += (1 - tau) * (theta - xi)
    return torch.stack(losses).detach(), model.state_dict()


# Float64, summed in another order, which batch-norm of twelve images may enlarge a hundredfold, and
# three steps add up. Another target, statistic or image changes the values by 1e-3.
TRAINED = {"rtol": 1e-8, "atol": 1e-8}

thorough = pytest.mark.thorough
SGD = ["--optimizer", "sgd", "--lr", 0.4, "--head-norm"]
CASES = [
    pytest.param(1, [], id="lars"),
    pytest.param(1, SGD, id="sgd", marks=thorough),
    pytest.param(1, ["--target", "mid", "--stage", 2], id="middle layer"),
    pytest.param(2, [*SGD, "--target", "mid"], id="middle layer, 2 processes", marks=thorough),
    pytest.param(2, [], id="lars, 2 processes", marks=thorough),
    pytest.param(3, SGD, id="sgd, 3 processes", marks=thorough),
]


@pytest.mark.parametrize("count, flags", CASES)
def test_training_is_the_official_procedure(train, in_double, count, flags):
    flags = [*FLAGS, *flags]
    losses, expected = official_procedure(flags)
    run = train("byol", *flags, world=count, data=tiny_data(STEPS * BATCH))
    torch.testing.assert_close(run.losses, losses, **TRAINED)
    for name, value in expected.items():
        found = run.state[f"model/{name}"]
        torch.testing.assert_close(found, value, msg=lambda m, name=name: f"{name}: {m}", **TRAINED)


def weights_of(model):
    """A spy: copies of all parameters before and after each step."""
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def test_random_target_never_moves_and_the_online_network_learns_to_predict_it(train):
    flags = [*FLAGS, "--target", "random", "--epochs", 3, "--lr", 400]
    data = tiny_data(STEPS * BATCH)
    run = train("byol", *flags, data=data, double=False, spy=weights_of)
    for name, w in run.looks[0].items():
        assert torch.equal(w, run.looks[-1][name]) == name.startswith("target"), name
    assert run.losses[-STEPS:].mean() < run.losses[:STEPS].mean() - 0.2


def test_middle_layer_stays_random_if_the_momentum_is_1(train):
    flags = [*FLAGS, "--target", "mid", "--tau-base", 1]
    run = train("byol", *flags, data=tiny_data(STEPS * BATCH), double=False, spy=weights_of)
    for name, w in run.looks[0].items():
        assert torch.equal(w, run.looks[-1][name]) == name.startswith("target"), name
