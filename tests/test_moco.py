"""MoCo: the loss, the queue, the moving average and the split batch-norm against values computed by
hand or by plain torch, and the training loop against the paper's procedure on simulated GPUs."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    CPU,
    arguments,
    assert_close_states,
    call_main,
    double_precision,
    noise,
    tiny_data,
)
from torch import nn

from common import Loader, backbone
from kernels.collectives import all_reduce_sum, distribute, gather, rank, world
from kernels.views import BatchRandom
from methods import moco

BATCH, GROUP, SIZE, QUEUE, M = 12, 4, 16, 20, 0.9  # three groups; two batches overrun the queue
FLAGS = ["--batch", BATCH, "--group", GROUP, "--size", SIZE, "--queue", QUEUE]
FLAGS += ["--m", M, "--epochs", 1, "--lr", 0.1]


def units(n, d, seed=0):
    return F.normalize(noise(n, d, seed=seed), dim=1)


@functools.cache
def initial_model(version, head_norm):
    torch.manual_seed(0)
    return moco.MoCo("resnet14", SIZE, 8, QUEUE, version, head_norm)


def tiny_model(version="v2", head_norm=True):
    return copy.deepcopy(initial_model(version, head_norm))  # faster than a new one


# -------- Loss ------------------------------------------------------------------------------------


def test_loss_by_hand():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    k = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    queue = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    # At tau = 1/2 the logits, positive first, are 2, 0, -2 for the first query and 0, 2, 0 for the
    # second.
    first = math.log(1 + math.exp(-2) + math.exp(-4))
    second = math.log(2 + math.exp(2))
    found = moco.info_nce(q, k, queue, 0.5).item()
    assert found == pytest.approx((first + second) / 2, abs=1e-6)


@pytest.mark.parametrize("K", [1, 7, 4096])
def test_loss_of_a_collapsed_network_is_log_of_the_candidates(K):
    same = torch.tensor([1.0, 0.0])
    found = moco.info_nce(same.expand(3, 2), same.expand(3, 2), same.expand(K, 2), 0.07)
    assert found.item() == pytest.approx(math.log(1 + K))


def test_gradient_reaches_queries_alone():
    q = units(4, 8, seed=1).requires_grad_()
    k = units(4, 8, seed=2).requires_grad_()
    queue = units(9, 8, seed=3).requires_grad_()
    moco.info_nce(q, k, queue, 0.2).backward()
    assert k.grad is None and queue.grad is None
    # dL/dq_i = (sum over candidates of p_ij c_ij - k_i) / (n tau), p: softmax over the candidates
    p = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1).div(0.2).softmax(1)
    torch.testing.assert_close(q.grad, (p[:, :1] * k + p[:, 1:] @ queue - k) / (4 * 0.2))


@pytest.mark.parametrize("tau", [0.07, 0.2])
def test_fused_loss_equals_the_formula(tau):
    q = units(5, 128, seed=1).float()
    k = units(5, 128, seed=2).float()
    queue = units(50, 128, seed=3).float()
    plain = q.double().requires_grad_()
    fused = q.clone().requires_grad_()
    expected = moco.info_nce(plain, k.double(), queue.double(), tau)
    found = moco.moco_loss(fused, k, queue, tau)
    (3 * expected).backward()
    (3 * found).backward()
    # Float32: logits up to 1 / tau = 14 with a rounding of 6e-8 each, so relative errors of the
    # probabilities near 1e-6.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)


# -------- Queue and key encoder -------------------------------------------------------------------


@pytest.mark.parametrize("K, N", [(8, 4), (7, 3), (5, 5)])
def test_queue_is_first_in_first_out(K, N):
    queue = noise(K, 2, seed=9)
    oldest = torch.zeros((), dtype=torch.long)
    lined_up = list(queue.clone())  # from the oldest to the newest
    for step in range(6):
        keys = noise(N, 2, seed=step)
        moco.enqueue(queue, oldest, keys)
        lined_up = [*lined_up, *keys][-K:]
        assert torch.equal(queue.roll(-int(oldest), 0), torch.stack(lined_up))


def test_moving_average_moves_by_one_minus_m_of_the_difference():
    target, online = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    for i, w in enumerate([*target.parameters(), *online.parameters()]):
        nn.init.constant_(w, i)  # whole numbers, and m = 3/4: exact in float32
    online[1].running_mean.fill_(5)
    before = [w.clone() for w in target.parameters()]
    moco.ema_update(target, online, 0.75)
    for old, new, o in zip(before, target.parameters(), online.parameters()):
        assert torch.equal(new - old, 0.25 * (o - old))
    assert torch.equal(target[1].running_mean, torch.zeros(2))  # buffers are each network's own

    kept = copy.deepcopy(target.state_dict())
    moco.ema_update(target, online, 1)
    assert all(torch.equal(kept[name], value) for name, value in target.state_dict().items())
    moco.ema_update(target, online, 0)
    for t, o in zip(target.parameters(), online.parameters()):
        assert torch.equal(t, o)


# -------- Split batch-norm ------------------------------------------------------------------------


def test_groups_by_hand():
    def groups(order, size):
        member = moco.group_members(torch.tensor(order), size)
        group = member.argmax(1)
        assert (member.sum(1) == 1).all() and member.shape[1] == group.max() + 1
        return group.tolist()

    assert groups([0, 1, 2, 3, 4, 5], 2) == [0, 0, 1, 1, 2, 2]
    # the image of place 5 is in the last group
    assert groups([5, 0, 3, 2, 1, 4], 2) == [2, 0, 1, 1, 0, 2]
    assert groups([0, 1, 2, 3, 4, 5, 6], 3) == [0, 0, 0, 0, 1, 1, 1]  # 7 = 4 + 3
    assert groups([0, 1, 2], 32) == [0, 0, 0]


def split_layer(channels=3):
    layer = nn.BatchNorm2d(channels)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    layer.__class__ = moco.SplitBatchNorm
    return layer


def normalised_apart(layer, x, order, group=GROUP):
    """nn.BatchNorm2d in float64 on each group by itself, brought back to the order of the batch,
    and the mean of the running statistics."""
    y = torch.empty_like(x)
    means = []
    variances = []
    for images in torch.argsort(order).split(group):  # as each GPU gets its own after the shuffle
        plain = nn.BatchNorm2d(x.shape[1], dtype=torch.float64)
        plain.weight = layer.weight
        plain.bias = layer.bias
        y = y.index_copy(0, images, plain(x[images]))
        means.append(plain.running_mean)
        variances.append(plain.running_var)
    return y, torch.stack(means).mean(0), torch.stack(variances).mean(0)


def split_batch_norm(x, weight, order):
    """SplitBatchNorm of this process's share of x: output, gradients of x and of the parameters
    (summed over processes) of (weight * y).sum(), running statistics."""
    share = slice(rank() * BATCH // world(), (rank() + 1) * BATCH // world())
    layer = split_layer()
    x = x[share].clone().requires_grad_()
    moco.set_groups(layer, moco.group_members(order, GROUP)[share])
    y = layer(x)
    (weight[share] * y).sum().backward()
    parameters = [all_reduce_sum(w.grad) for w in (layer.weight, layer.bias)]
    found = [y, x.grad, *parameters, layer.running_mean, layer.running_var]
    return [value.detach() for value in found]


@pytest.mark.parametrize("count", [1, 2, pytest.param(3, marks=pytest.mark.thorough)])
def test_split_batch_norm_normalises_each_group_by_itself(request, count):
    x = 2 * noise(BATCH, 3, 5, 4, dtype=torch.float32) + 1
    weight = noise(BATCH, 3, 5, 4, seed=1, dtype=torch.float32)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    layer = split_layer().double()
    plain = x.double().requires_grad_()
    y, mean, variance = normalised_apart(layer, plain, order)
    (weight * y).sum().backward()
    expected = [y, plain.grad, layer.weight.grad, layer.bias.grad, mean, variance]

    job = (split_batch_norm, x, weight, order)
    if count == 1:
        results = [job[0](*job[1:])]
    else:
        results = request.getfixturevalue("processes")(count, *job)
    found = list(zip(*results))
    # Float32 sums of 80 numbers of size 1 to 10: rounding errors near 1e-6.
    for name, a, b in zip(("output", "input's gradient"), found, expected):
        together = torch.cat(a).double()
        torch.testing.assert_close(together, b.detach(), rtol=1e-5, atol=1e-5, msg=name)
    for a, b in zip(found[2:], expected[2:]):
        for each in a:
            torch.testing.assert_close(each.double(), b.detach(), rtol=1e-5, atol=1e-5)


def whole_groups(x, weight, group):
    """As split_batch_norm, in float64, of groups that lie in one process and follow the batch."""
    share = slice(rank() * BATCH // world(), (rank() + 1) * BATCH // world())
    layer = split_layer().double()
    layer.group_size = group
    x = x[share].clone().requires_grad_()
    y = layer(x)
    (weight[share] * y).sum().backward()
    moco.average_statistics(layer)
    parameters = [all_reduce_sum(w.grad) for w in (layer.weight, layer.bias)]
    found = [y, x.grad, *parameters, layer.running_mean, layer.running_var]
    return [value.detach() for value in found], int(layer.num_batches_tracked)


@pytest.mark.parametrize(
    "count, group", [(1, 4), (2, 3), (2, 6), pytest.param(3, 2, marks=pytest.mark.thorough)]
)
def test_whole_groups_are_normalised_each_by_itself(processes, count, group):
    x = 2 * noise(BATCH, 3, 5, 4) + torch.arange(BATCH).view(BATCH, 1, 1, 1)
    weight = noise(BATCH, 3, 5, 4, seed=1)
    layer = split_layer().double()
    plain = x.clone().requires_grad_()
    y, mean, variance = normalised_apart(layer, plain, torch.arange(BATCH), group)
    (weight * y).sum().backward()

    results, steps = zip(*processes(count, whole_groups, x, weight, group))
    assert set(steps) == {1}
    found = list(zip(*results))
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(torch.cat(found[0]), y.detach(), **exact)
    torch.testing.assert_close(torch.cat(found[1]), plain.grad, **exact)
    expected = [layer.weight.grad, layer.bias.grad, mean, variance]
    for a, b in zip(found[2:], expected):
        for each in a:
            assert torch.equal(each, a[0])
            torch.testing.assert_close(each, b.detach(), **exact)


def there_and_back(x, order):
    n = len(x) // world()
    rows = slice(rank() * n, (rank() + 1) * n)
    moved = moco.shuffle(x[rows], order, rows)
    return moved, gather(moved)[order]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_shuffle_brings_every_image_to_its_place(processes, count):
    """Image i of the batch goes to place order[i]. gather and order bring the keys back."""
    x = noise(BATCH, 3, 5, 4)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    expected = torch.empty_like(x)
    for image, place in zip(x, order):
        expected[place] = image
    moved, back = zip(*processes(count, there_and_back, x, order))
    assert torch.equal(torch.cat(moved), expected)
    assert all(torch.equal(each, x) for each in back)


def messages(group, whole):
    """How often a forward and a backward pass call torch.distributed.all_reduce. (The average of
    the gradients, by DistributedDataParallel, does not.)"""
    calls = []
    plain = dist.all_reduce

    def counted(*args, **options):
        calls.append(args)
        return plain(*args, **options)

    model = moco.MoCo("resnet14", SIZE, 8, QUEUE, "v2", group_size=group if whole else None)
    network = distribute(model, CPU)
    share = slice(rank() * BATCH // 2, (rank() + 1) * BATCH // 2)
    member = None if whole else moco.group_members(torch.arange(BATCH), group)[share]
    x = noise(BATCH, 3, SIZE, SIZE, dtype=torch.float32)[share]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        q, k = network(x, x, member, member)
        forward = len(calls)
        q.square().sum().backward()
    layers = sum(isinstance(m, moco.SplitBatchNorm) for m in model.modules())
    return forward, len(calls) - forward, layers


def test_batch_norm_of_whole_groups_communicates_nothing(processes):
    assert [found[:2] for found in processes(2, messages, 6, True)] == [(0, 0)] * 2
    for forward, backward, layers in processes(2, messages, 4, False):
        # mean and variance of each layer; the sizes of the groups of three modules; in the
        # backward pass, the layers of one of the two encoders
        assert (forward, backward) == (2 * layers + 3, layers)


def test_split_batch_norm_in_eval_mode_is_batch_norm():
    layer = split_layer().eval()
    x = noise(2, 3, 5, 4, dtype=torch.float32)
    layer.running_mean.copy_(noise(3))
    layer.running_var.copy_(noise(3).exp())
    plain = nn.BatchNorm2d(3).eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


def test_distribute_leaves_split_batch_norm_as_it_is(processes):
    assert processes(2, kinds_of_batch_norm) == [{"SplitBatchNorm"}] * 2


def kinds_of_batch_norm():
    network = distribute(tiny_model(), CPU)
    return {type(m).__name__ for m in network.modules() if hasattr(m, "running_mean")}


def test_queries_and_keys_are_normalised_among_different_images():
    """A query depends on its group, which follows the order of the batch; a key on its group after
    the shuffle. What a query and its key have in common are the images that are in both."""
    model = tiny_model()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    member_q = moco.group_members(torch.arange(BATCH), GROUP)
    member_k = moco.group_members(order, GROUP)
    x = noise(BATCH, 3, SIZE, SIZE, dtype=torch.float32)
    q, k = model(x, x, member_q, member_k)
    for i in range(BATCH):
        changed = x.clone()
        changed[i] += 0.5 * noise(3, SIZE, SIZE, seed=1, dtype=torch.float32)
        q_i, k_i = model(changed, changed, member_q, member_k)
        assert torch.equal((q != q_i).any(1), (member_q @ member_q.T)[i] > 0)
        assert torch.equal((k != k_i).any(1), (member_k @ member_k.T)[i] > 0)


def test_initial_keys_are_queries_without_gradient():
    model = tiny_model()
    member = moco.group_members(torch.arange(BATCH), GROUP)
    x = noise(BATCH, 3, SIZE, SIZE, dtype=torch.float32)
    q, k = model(x, x, member, member)
    assert torch.equal(q, k) and not k.requires_grad
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(QUEUE))

    moco.info_nce(F.normalize(q, dim=1), F.normalize(k, dim=1), model.queue, 0.2).backward()
    # batch-norm takes away the mean, and with it what this bias adds
    taken_away = {"projector.0.2.bias"}
    for name, w in model.named_parameters():
        if name.startswith("key_encoder"):
            assert not w.requires_grad and w.grad is None
        elif not w.requires_grad:  # the batch-norm after the head: scale 1, offset 0
            assert name.startswith("projector")
            assert torch.equal(w, torch.full_like(w, name.endswith("weight")))
        elif name not in taken_away:
            assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_saved_backbone_is_the_common_one():
    backbone("resnet14", SIZE).load_state_dict(tiny_model().backbone.state_dict())


# -------- Versions --------------------------------------------------------------------------------

HEADS = {"v1": ["Linear"], "v2": ["Sequential", "Linear", "ReLU", "Linear"]}
EPOCHS = (0, 119, 120, 159, 160, 199)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_heads_of_the_versions(version):
    def kinds(head_norm):
        head = tiny_model(version, head_norm).projector
        return [type(m).__name__ for m in head.modules()]

    assert kinds(False) == HEADS[version]
    assert kinds(True) == ["Sequential", *HEADS[version], "Unflatten", "SplitBatchNorm", "Flatten"]


def test_columns_of_the_papers():
    v1 = arguments("moco", "--recipe", "paper-v1", "--data", "x")
    v2 = arguments("moco", "--recipe", "paper", "--data", "x")
    assert (v1.version, v1.tau) == ("v1", 0.07)
    assert (v2.version, v2.tau) == ("v2", 0.2)
    assert not v1.head_norm and not v2.head_norm and arguments("moco").head_norm

    rates = [moco.learning_rate(epoch * 10, v1, 10) for epoch in EPOCHS]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    rates = [moco.learning_rate(epoch * 10, v2, 10) for epoch in EPOCHS]
    assert rates == pytest.approx([0.015 * (1 + math.cos(math.pi * e / 200)) for e in EPOCHS])


def test_views_of_the_versions(monkeypatch):
    calls = []

    def replace(name):
        def operation(x, rand, **options):
            calls.append((name, options))
            return x

        monkeypatch.setattr(moco, name, operation)

    for name in ("random_flip", "color_jitter", "random_grayscale", "gaussian_blur"):
        replace(name)

    def operations(recipe):
        calls.clear()
        for crop, augment in moco.views(arguments("moco", "--recipe", recipe, "--data", "x")):
            assert (crop.size, crop.scale, crop.ratio) == (224, (0.2, 1.0), (3 / 4, 4 / 3))
            augment(torch.rand(1, 3, 8, 8), BatchRandom([0], 1))
        return calls

    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    grey = ("random_grayscale", {"p": 0.2})
    flip = ("random_flip", {})
    blur = ("gaussian_blur", {"p": 0.5, "sigma": (0.1, 2.0)})
    strong = ("color_jitter", {**jitter, "hue": 0.4})
    mild = ("color_jitter", {**jitter, "hue": 0.1, "p": 0.8})
    assert operations("paper-v1") == 2 * [grey, strong, flip]
    assert operations("paper") == 2 * [mild, grey, blur, flip]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--batch", 64, "--queue", 63), "--queue 63"),
        (("--group", 1), "--group 1"),
        (("--version", "v1", "--blur", 0.5), "--blur 0.5"),
    ],
)
def test_impossible_flags_are_refused(flags, words):
    result = call_main("moco", *flags)
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1


# -------- The training loop -----------------------------------------------------------------------


@pytest.fixture
def in_double(monkeypatch):
    """The test itself computes in float64, as the training does."""
    double_precision(monkeypatch)
    yield
    torch.set_default_dtype(torch.float32)


def ordinary(head):
    """A head with ordinary batch-norm in place of the one over groups."""
    if not any(isinstance(m, moco.SplitBatchNorm) for m in head.modules()):
        return head
    norm = nn.BatchNorm1d(head[2].num_features).requires_grad_(False)
    return nn.Sequential(head[0], norm)


def papers_procedure(flags):
    """The same training as the paper does it, on simulated GPUs: an ordinary network with
    ordinary batch-norm sees the images of one GPU at a time, and the key images are shuffled among
    the GPUs. Returns losses, both encoders and the queue, oldest key first."""
    args = arguments("moco", *flags)
    torch.manual_seed(args.seed)
    model = moco.MoCo(args.arch, SIZE, args.dim, QUEUE, args.version, args.head_norm)
    query = nn.Sequential(backbone(args.arch, SIZE), ordinary(copy.deepcopy(model.projector)))
    query[0].load_state_dict(model.backbone.state_dict())
    key = copy.deepcopy(query)
    queue = model.queue
    losses = []
    weights = query.parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=1e-4)
    loader = Loader(tiny_data(3 * BATCH).train, moco.views(args), BATCH, args.seed, CPU)
    for step, (x1, x2) in loader(0):
        for k, q in zip(key.parameters(), query.parameters()):
            k.data = M * k.data + (1 - M) * q.data

        rng = np.random.default_rng([args.seed, 0, step, 0, 4])
        shuffle = torch.from_numpy(rng.permutation(BATCH))  # image i goes to place shuffle[i]
        with torch.no_grad():
            k = torch.cat([key(images) for images in x2[shuffle.argsort()].split(args.group)])
        k = F.normalize(k[shuffle], dim=1)
        q = F.normalize(torch.cat([query(images) for images in x1.split(args.group)]), dim=1)

        loss = 0.0
        for i in range(BATCH):
            candidates = torch.cat([k[i : i + 1], queue])
            loss -= (candidates @ q[i] / args.tau).log_softmax(0)[0] / BATCH
        losses.append(loss)
        optimizer.param_groups[0]["lr"] = moco.learning_rate(step, args, loader.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat([queue, k])[-QUEUE:]
    return torch.stack(losses).detach(), query, key, queue


# Float64 in another order of summation: differences of 1e-16, which batch-norm among four images,
# some of nearly constant activations, enlarges by up to 300 (1e-5 ** -0.5) a layer, and three steps
# of training add up. A wrong group, image or queue changes the losses by 0.1.
TRAINED = {"rtol": 1e-8, "atol": 1e-8}

thorough = pytest.mark.thorough
V1 = ["--version", "v1", "--tau", 0.07]
CASES = [
    pytest.param(2, [], id="2 processes"),
    pytest.param(2, ["--group", 6], id="2 processes, a group each", marks=thorough),
    pytest.param(1, [*V1, "--no-head-norm"], id="v1", marks=thorough),
    pytest.param(1, ["--no-head-norm"], id="v2, the paper's head", marks=thorough),
    pytest.param(3, [], id="3 processes, a group each", marks=thorough),
    pytest.param(2, [*V1, "--no-head-norm"], id="v1, 2 processes", marks=thorough),
    pytest.param(3, ["--no-head-norm"], id="v2, 3 processes", marks=thorough),
]


@pytest.mark.parametrize("count, flags", CASES)
def test_training_is_the_papers_procedure(train, in_double, count, flags):
    flags = [*FLAGS, *flags]
    losses, query, key, queue = papers_procedure(flags)
    run = train("moco", *flags, world=count, data=tiny_data(3 * BATCH))
    torch.testing.assert_close(run.losses, losses, **TRAINED)

    state = {name.removeprefix("model/"): value for name, value in run.state.items()}
    for beginnings, encoder in ((("backbone", "projector"), query), (("key_encoder",), key)):
        found = []
        for name, value in state.items():
            buffer = "running" in name or "num_batches" in name
            if name.startswith(beginnings) and not buffer:
                found.append(value)
        for value, expected in zip(found, encoder.parameters(), strict=True):
            torch.testing.assert_close(value, expected.detach(), **TRAINED)
    assert state["oldest"] == 3 * BATCH % QUEUE
    torch.testing.assert_close(state["queue"].roll(-int(state["oldest"]), 0), queue, **TRAINED)


GROUPS = [(2, 3), pytest.param(3, 4, marks=thorough), pytest.param(3, 5, marks=thorough)]


@pytest.mark.parametrize("count, group", GROUPS)
def test_groups_do_not_depend_on_the_processes(train, count, group):
    """Whole groups, whose images travel, and in the last case groups across processes: losses,
    weights, queue and running statistics are those of one process. (Views of 32 pixels, because the
    last maps of smaller ones have one pixel, and batch-norm of three numbers enlarges rounding
    errors too much.)"""
    flags = [*FLAGS, "--size", 32, "--group", group]
    alone = train("moco", *flags)
    together = train("moco", *flags, world=count)
    torch.testing.assert_close(together.losses, alone.losses, rtol=1e-9, atol=1e-9)
    assert_close_states(together.state, alone.state, rtol=1e-9, atol=1e-9)
