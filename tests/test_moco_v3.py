"""MoCo v3: the loss and the schedule against values computed by hand, which weights move, in what a
ViT and a ResNet differ, and the training loop against the official code's procedure."""

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, call_main, double_precision, noise, tiny_data
from torch import nn

from common import Loader
from kernels.infonce import bank_loss, clip_loss
from methods import moco_v3

BATCH, SIZE, STEPS, M, TRUST = 12, 16, 3, 0.9, 1e-3
FLAGS = ["--batch", BATCH, "--size", SIZE, "--hidden", 24, "--dim", 8, "--epochs", 1]
FLAGS += ["--warmup", 0, "--m", M]
RESNET = [*FLAGS, "--arch", "resnet14"]
VIT = [*FLAGS, "--arch", "vit_micro"]
BOTH = pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
PATCHES = ("backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias")
thorough = pytest.mark.thorough


def units(n, d, seed=0):
    return F.normalize(noise(n, d, seed=seed), dim=1)


# -------- The loss and the schedule ---------------------------------------------------------------


def test_loss_by_hand():
    """Two queries of a process, three keys of all processes, tau = 1/2: the factor 2 tau is 1."""
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    k = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    # The logits are 0, 2, -2 and 2, 0, 0; the own keys are the second and the third.
    first = math.log(1 + math.exp(-2) + math.exp(-4))
    second = math.log(2 + math.exp(2))
    found = moco_v3.ctr(q, k, torch.tensor([1, 2]), 0.5).item()
    assert found == pytest.approx((first + second) / 2, abs=1e-6)


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_both_directions_of_a_collapsed_network_cost_4_tau_log_n(tau):
    N = 7
    same = units(1, 3).expand(N, 3)
    found = 2 * moco_v3.ctr(same, same, torch.arange(N), tau)
    assert found.item() == pytest.approx(4 * tau * math.log(N))


@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_gradient_reaches_queries_alone_and_has_no_factor_of_the_temperature(tau):
    """dL/dq_i = 2 / n (sum over j of p_ij k_j - k_i), p: the softmax over the N keys. Without the
    factor 2 tau in the loss it would be 1 / (2 tau) times this."""
    q = units(4, 8, seed=1).requires_grad_()
    k = units(12, 8, seed=2).requires_grad_()
    own = torch.arange(4, 8)
    moco_v3.ctr(q, k, own, tau).backward()
    assert k.grad is None
    with torch.no_grad():
        p = (q @ k.T / tau).softmax(1)
        torch.testing.assert_close(q.grad, 2 / 4 * (p @ k - k[own]))


def test_loss_is_the_mean_over_the_rows_of_the_processes():
    """Three processes with four queries each, and keys in the order of the processes; a process
    that took the rows 0 to 3 for its own would find another value."""
    q = units(12, 8, seed=1)
    k = units(12, 8, seed=2)
    own = torch.arange(12)
    parts = [moco_v3.ctr(a, k, i, 0.2) for a, i in zip(q.split(4), own.split(4))]
    torch.testing.assert_close(torch.stack(parts).mean(), moco_v3.ctr(q, k, own, 0.2))
    assert (parts[1] - moco_v3.ctr(q[4:8], k, own[:4], 0.2)).abs() > 0.01


def test_fused_loss_equals_the_formula():
    """The second of three processes. Float32 against float64: logits of up to 5 are rounded by
    3e-7."""
    q = units(4, 8, seed=1).float()
    k = units(12, 8, seed=2).float()
    own = torch.arange(4, 8)
    plain = q.double().requires_grad_()
    fused = q.clone().requires_grad_()
    expected = moco_v3.ctr(plain, k.double(), own, 0.2)
    found = fused_ctr(fused, k, own, 0.2)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused.grad.double(), plain.grad, rtol=1e-5, atol=1e-6)


def fused_ctr(q, k, own, tau):
    return 2 * tau * bank_loss(q, k, own, tau)


def test_loss_is_fused_unless_on_a_cpu(monkeypatch):
    """What the fused loss is given, and that the factor 2 tau is applied to it."""
    seen = []
    monkeypatch.setattr(moco_v3, "bank_loss", lambda *arguments: seen.append(arguments) or 7.0)
    on_cpu = units(3, 4), units(9, 4), torch.tensor([4, 0, 8]), 0.2
    assert moco_v3.ctr(*on_cpu).shape == () and not seen
    elsewhere = *[x.to("meta") for x in on_cpu[:3]], 0.2
    assert moco_v3.ctr(*elsewhere) == 2 * 0.2 * 7.0
    assert seen == [elsewhere]


def test_loss_of_symmetric_cosines_is_the_fused_clip_loss():
    """clip_loss is the mean of two softmaxes, over the keys and over the queries. If the matrix of
    cosines is symmetric, they are the same."""
    q = units(6, 8, seed=1)
    own = torch.arange(6)
    expected = 2 * 0.2 * clip_loss(q, q, 1 / 0.2)
    torch.testing.assert_close(moco_v3.ctr(q, q, own, 0.2), expected)


def test_momentum_rises_from_its_base_to_one():
    args = SimpleNamespace(m=0.99, epochs=4)
    values = [moco_v3.momentum(step, args, 10) for step in range(41)]
    assert values[0] == pytest.approx(0.99)
    assert values[10] == pytest.approx(1 - 0.01 * (1 + math.sqrt(0.5)) / 2)  # cos(45 degrees)
    assert values[20] == pytest.approx(0.995)
    assert values[39] < 1 and values[40] == 1
    assert values == sorted(values)


# -------- The network -----------------------------------------------------------------------------


@functools.cache
def initial_model(arch, train_patches):
    torch.manual_seed(0)
    return moco_v3.MoCoV3(arch, SIZE, 24, 8, train_patches)


def tiny_model(arch, train_patches=False):
    return copy.deepcopy(initial_model(arch, train_patches))  # faster than a new one


def two_views():
    first = noise(BATCH, 3, SIZE, SIZE, seed=1, dtype=torch.float32)
    second = noise(BATCH, 3, SIZE, SIZE, seed=2, dtype=torch.float32)
    return first, 3 + second


def kinds(head):
    return [type(layer).__name__ for layer in head]


HIDDEN = ["Linear", "BatchNorm1d", "ReLU"]


@pytest.mark.parametrize("arch, hidden", [("resnet14", 1), ("vit_micro", 2)])
def test_heads_are_the_official_ones(arch, hidden):
    """builder.py: linear layers without bias, batch-norm at the end without scale and offset, but
    none in the predictor of a ResNet."""
    model = tiny_model(arch)
    assert kinds(model.projector) == [*hidden * HIDDEN, "Linear", "BatchNorm1d"]
    last = ["BatchNorm1d"] if arch == "vit_micro" else []
    assert kinds(model.predictor) == [*HIDDEN, "Linear", *last]
    for head in (model.projector, model.predictor):
        assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
        assert head[1].affine
    assert not model.projector[-1].affine
    assert arch == "resnet14" or not model.predictor[-1].affine
    assert len(model.key_encoder) == 2  # backbone and projector: no predictor


@BOTH
def test_keys_start_as_projections_without_gradient(arch):
    """Queries pass the predictor, keys do not. The gradient reaches all that is trained: not the
    key encoder, not the patch projection of a ViT."""
    model = tiny_model(arch)
    x1, x2 = two_views()
    q1, q2, k1, k2 = model(x1, x2)
    assert q1.shape == k1.shape == (BATCH, 8) and not k1.requires_grad and not k2.requires_grad
    other = tiny_model(arch)
    for x, q, k in ((x1, q1, k1), (x2, q2, k2)):
        z = other.projector(other.backbone(x))
        torch.testing.assert_close(k, z.detach())
        torch.testing.assert_close(q, other.predictor(z))

    own = torch.arange(BATCH)
    q1, q2, k1, k2 = [F.normalize(z, dim=1) for z in (q1, q2, k1, k2)]
    (moco_v3.ctr(q1, k2, own, 0.2) + moco_v3.ctr(q2, k1, own, 0.2)).backward()
    for name, w in model.named_parameters():
        if name.startswith("key_encoder") or name in PATCHES:
            assert not w.requires_grad and w.grad is None, name
        else:
            assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-7, name


def test_a_view_has_batch_statistics_of_its_own():
    model = tiny_model("resnet14")
    x1, x2 = two_views()
    first, _, key, _ = model(x1, x2)
    again, _, same_key, _ = model(x1, x2 + 1)
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(same_key, key)


def test_vit_starts_with_the_official_values():
    """vits.py: Q, K and V are three matrices for Xavier's bound, sqrt(6 / (D + D)); of one matrix
    it would be sqrt(6 / (3 D + D)). The class token is close to 0, positions are fixed."""
    net = tiny_model("vit_micro").backbone
    bound = math.sqrt(6 / (2 * net.out_dim))
    for block in net.blocks:
        for weight in block.attn["qkv"].weight.chunk(3):
            assert 0.98 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert block.attn["qkv"].bias.abs().max() == 0
    assert 0 < net.cls_token.abs().max() < 1e-5
    assert "pos_embed" not in dict(net.named_parameters())

    side = net.first_layer.stride[0]
    bound = math.sqrt(6 / (3 * side**2 + net.out_dim))
    assert 0.98 * bound < net.first_layer.weight.abs().max() <= bound


def test_columns_of_the_paper():
    vit = arguments("moco_v3", "--recipe", "paper", "--data", "x")
    assert (vit.optimizer, vit.lr, vit.weight_decay, vit.tau) == ("adamw", 1.5e-4, 0.1, 0.2)
    assert (vit.epochs, vit.warmup, vit.min_crop, vit.train_patches) == (300, 40, 0.08, False)
    resnet = arguments("moco_v3", "--recipe", "paper-resnet", "--data", "x")
    assert (resnet.optimizer, resnet.lr, resnet.weight_decay) == ("lars", 0.6, 1e-6)
    assert (resnet.epochs, resnet.warmup, resnet.min_crop, resnet.tau) == (100, 10, 0.2, 1.0)
    for args in (vit, resnet):
        assert (args.batch, args.m, args.hidden, args.dim) == (4096, 0.99, 4096, 256)
        assert (args.blur1, args.blur2) == (1, 0.1)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--arch", "resnet18", "--train-patches"), "--train-patches needs a vision transformer"),
        (("--tau", 0), "--tau 0"),
        (("--m", 1.5), "--m 1.5"),
    ],
)
def test_impossible_flags_are_refused(flags, words):
    result = call_main("moco_v3", *flags)
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1


# -------- The training loop -----------------------------------------------------------------------


def weights_of(model):
    """A spy: copies of all parameters before and after each step."""
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def test_patch_projection_stays_random_unless_it_is_trained(train):
    """Frozen, it stays the same to the last bit, in the key encoder too, while all else that is
    trained moves. Trained, its largest gradient is recorded."""
    data = tiny_data(STEPS * BATCH)
    for flags, moves in (([], False), (["--train-patches"], True)):
        run = train("moco_v3", *VIT, *flags, data=data, double=False, spy=weights_of)
        for name, w in run.looks[0].items():
            patches = "patch_embed" in name
            assert torch.equal(w, run.looks[-1][name]) == (patches and not moves), name
        assert [("first_gradient" in more) for more in run.more] == STEPS * [moves]
    for more, gradients in zip(run.more, run.gradients):
        assert more["first_gradient"] == gradients[PATCHES[0]].abs().max() > 0


@pytest.fixture
def in_double(monkeypatch):
    """The test itself computes in float64, as the training does."""
    double_precision(monkeypatch)
    yield
    torch.set_default_dtype(torch.float32)


def official_loss(q, k, T):
    logits = torch.einsum("nc,mc->nm", F.normalize(q, dim=1), F.normalize(k, dim=1)) / T
    return nn.CrossEntropyLoss()(logits, torch.arange(len(q))) * (2 * T)


def lars_step(weights, gradients, momenta, lr, decay):
    for w, g, mu in zip(weights, gradients, momenta):
        if w.ndim > 1:
            g = g + decay * w
            g = g * TRUST * w.norm() / g.norm()
        mu.copy_(0.9 * mu + g)
        w -= lr * mu


def adamw_step(weights, gradients, moments, step, lr, decay):
    """Loshchilov and Hutter 2019, Algorithm 2, with weight decay on all parameters."""
    for w, g, (first, second) in zip(weights, gradients, moments):
        first.copy_(0.9 * first + 0.1 * g)
        second.copy_(0.999 * second + 0.001 * g.square())
        a = first / (1 - 0.9 ** (step + 1))
        b = second / (1 - 0.999 ** (step + 1))
        w -= lr * decay * w
        w -= lr * a / (b.sqrt() + 1e-8)


def official_procedure(flags):
    """The same training by the official code's formulas and in its order, with all images in one
    process: queries, then the moving average, then keys. Returns losses and the model's state."""
    args = arguments("moco_v3", *flags)
    torch.manual_seed(args.seed)
    model = moco_v3.MoCoV3(args.arch, SIZE, args.hidden, args.dim)  # initial weights
    base = nn.Sequential(model.backbone, model.projector)
    weights = [w for w in (*base.parameters(), *model.predictor.parameters()) if w.requires_grad]
    momenta = [torch.zeros_like(w) for w in weights]
    squares = [torch.zeros_like(w) for w in weights]
    losses = []
    loader = Loader(tiny_data(STEPS * BATCH).train, moco_v3.views(args), BATCH, args.seed, CPU)
    for step, (x1, x2) in loader(0):
        q1 = model.predictor(base(x1))
        q2 = model.predictor(base(x2))
        cosine = (1 + math.cos(math.pi * step / STEPS)) / 2
        m = 1 - cosine * (1 - M)
        with torch.no_grad():
            for b, k in zip(base.parameters(), model.key_encoder.parameters(), strict=True):
                k.copy_(k * m + b * (1 - m))
            k1 = model.key_encoder(x1)
            k2 = model.key_encoder(x2)
        losses.append(official_loss(q1, k2, args.tau) + official_loss(q2, k1, args.tau))
        gradients = torch.autograd.grad(losses[-1], weights)
        lr = args.lr * BATCH / 256 * cosine
        with torch.no_grad():
            if args.optimizer == "lars":
                lars_step(weights, gradients, momenta, lr, args.weight_decay)
            else:
                moments = zip(momenta, squares)
                adamw_step(weights, gradients, moments, step, lr, args.weight_decay)
    return torch.stack(losses).detach(), model.state_dict()


# Float64, summed in another order, which batch-norm of twelve images may enlarge a hundredfold, and
# three steps add up. Another key, statistic or image changes the values by 1e-3.
TRAINED = {"rtol": 1e-8, "atol": 1e-8}

LARS = [*RESNET, "--optimizer", "lars", "--lr", 40, "--weight-decay", 1e-3, "--tau", 1]
ADAMW = [*VIT, "--optimizer", "adamw", "--lr", 0.1]
CASES = [
    pytest.param(1, LARS, id="resnet, lars"),
    pytest.param(1, ADAMW, id="vit, adamw"),
    pytest.param(2, LARS, id="resnet, lars, 2 processes", marks=thorough),
    pytest.param(3, ADAMW, id="vit, adamw, 3 processes", marks=thorough),
]


@pytest.mark.parametrize("count, flags", CASES)
def test_training_is_the_official_procedure(train, in_double, count, flags):
    losses, expected = official_procedure(flags)
    run = train("moco_v3", *flags, world=count, data=tiny_data(STEPS * BATCH))
    torch.testing.assert_close(run.losses, losses, **TRAINED)
    for name, value in expected.items():
        found = run.state[f"model/{name}"]
        torch.testing.assert_close(found, value, msg=lambda m, name=name: f"{name}: {m}", **TRAINED)


@thorough
@pytest.mark.parametrize("count", [2, 3])
def test_vit_does_not_depend_on_the_number_of_processes(train, count):
    """(The default network is tested in test_distributed.py.)"""
    data = tiny_data(STEPS * BATCH)
    alone = train("moco_v3", *VIT, "--train-patches", data=data)
    together = train("moco_v3", *VIT, "--train-patches", world=count, data=data)
    torch.testing.assert_close(together.losses, alone.losses, rtol=1e-9, atol=1e-9)
    for name, value in alone.state.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(together.state[name], value, rtol=1e-8, atol=1e-8)
