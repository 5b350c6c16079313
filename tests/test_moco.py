"""MoCo: the loss, the queue, the moving average and the split batch-norm against values computed by hand or by plain torch, and
the whole training loop against the paper's procedure on simulated GPUs, for any number of processes."""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import BatchRandom, Data, Loader, Split, all_reduce_sum, backbone, distribute, rank, world
from methods import moco

CPU = torch.device("cpu")
BATCH, GROUP, SIZE, QUEUE, M = 12, 4, 16, 20, 0.9  # three groups; a queue that two batches overrun
ARGUMENTS = ["--batch", BATCH, "--group", GROUP, "--size", SIZE, "--queue", QUEUE, "--m", M, "--epochs", 1, "--lr", 0.1]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def units(n, d, seed=0):
    return F.normalize(noise(n, d, seed=seed), dim=1)


# -------- Loss ------------------------------------------------------------------------------------------------------------

def test_loss_by_hand():
    q, k = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    queue = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    # At tau = 1/2 the logits, positive first, are 2, 0, -2 for the first query and 0, 2, 0 for the second.
    first, second = math.log(1 + math.exp(-2) + math.exp(-4)), math.log(2 + math.exp(2))
    assert moco.info_nce(q, k, queue, 0.5).item() == pytest.approx((first + second) / 2, abs=1e-6)


@pytest.mark.parametrize("K", [1, 7, 4096])
def test_loss_of_a_collapsed_network_is_log_of_the_candidates(K):
    same = torch.tensor([1.0, 0.0])
    assert moco.info_nce(same.expand(3, 2), same.expand(3, 2), same.expand(K, 2), 0.07).item() == pytest.approx(math.log(1 + K))


def test_gradient_reaches_queries_alone():
    q, k, queue = (x.double().requires_grad_() for x in (units(4, 8, seed=1), units(4, 8, seed=2), units(9, 8, seed=3)))
    moco.info_nce(q, k, queue, 0.2).backward()
    assert k.grad is None and queue.grad is None
    # dL/dq_i = (sum over candidates of p_ij c_ij - k_i) / (n tau), where p is the softmax over the candidates
    p = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1).div(0.2).softmax(1)
    torch.testing.assert_close(q.grad, (p[:, :1] * k + p[:, 1:] @ queue - k) / (4 * 0.2))


@pytest.mark.parametrize("tau", [0.07, 0.2])
def test_fused_loss_equals_the_formula(tau):
    q, k, queue = units(5, 128, seed=1), units(5, 128, seed=2), units(50, 128, seed=3)
    plain, fused = q.double().requires_grad_(), q.clone().requires_grad_()
    expected, found = moco.info_nce(plain, k.double(), queue.double(), tau), moco.moco_loss(fused, k, queue, tau)
    (3 * expected).backward()
    (3 * found).backward()
    # Float32: logits up to 1 / tau = 14 with a rounding of 6e-8 each, so relative errors of the probabilities near 1e-6.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)


# -------- Queue and key encoder -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("K, N", [(8, 4), (7, 3), (5, 5)])
def test_queue_is_first_in_first_out(K, N):
    queue, oldest = noise(K, 2, seed=9), torch.zeros((), dtype=torch.long)
    lined_up = list(queue.clone())  # from the oldest to the newest
    for step in range(6):
        keys = noise(N, 2, seed=step)
        moco.enqueue(queue, oldest, keys)
        lined_up = [*lined_up, *keys][-K:]
        assert torch.equal(queue.roll(-int(oldest), 0), torch.stack(lined_up))


def test_moving_average_moves_by_one_minus_m_of_the_difference():
    target, online = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
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
    assert all(torch.equal(t, o) for t, o in zip(target.parameters(), online.parameters()))


# -------- Split batch-norm ------------------------------------------------------------------------------------------------

def test_groups_by_hand():
    def groups(order, size):
        member = moco.group_members(torch.tensor(order), size)
        assert (member.sum(1) == 1).all() and member.shape[1] == member.argmax(1).max() + 1
        return member.argmax(1).tolist()
    assert groups([0, 1, 2, 3, 4, 5], 2) == [0, 0, 1, 1, 2, 2]
    assert groups([5, 0, 3, 2, 1, 4], 2) == [2, 0, 1, 1, 0, 2]  # the image of place 5 is in the last group
    assert groups([0, 1, 2, 3, 4, 5, 6], 3) == [0, 0, 0, 0, 1, 1, 1]  # 7 = 4 + 3
    assert groups([0, 1, 2], 32) == [0, 0, 0]


def split_layer(channels=3):
    layer = nn.BatchNorm2d(channels)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    layer.__class__ = moco.SplitBatchNorm
    return layer


def apart(order, group):
    """[(g,), ...]: the images of each group, as each GPU of the paper gets its own after the shuffle."""
    return torch.argsort(order).split(group)


def normalised_apart(layer, x, order):
    """nn.BatchNorm2d in float64 on each group by itself, brought back to the order of the batch, and the running statistics."""
    y, means, variances = torch.empty_like(x), [], []
    for images in apart(order, GROUP):
        plain = nn.BatchNorm2d(x.shape[1], dtype=torch.float64)
        plain.weight, plain.bias = layer.weight, layer.bias
        y = y.index_copy(0, images, plain(x[images]))
        means.append(plain.running_mean)
        variances.append(plain.running_var)
    return y, torch.stack(means).mean(0), torch.stack(variances).mean(0)


def split_batch_norm(x, weight, order):
    """SplitBatchNorm of this process's share of x: output, gradients of x and of the parameters (summed over processes) of
    (weight * y).sum(), running statistics."""
    share = slice(rank() * BATCH // world(), (rank() + 1) * BATCH // world())
    layer, x = split_layer(), x[share].clone().requires_grad_()
    layer.member = moco.group_members(order, GROUP)[share]
    y = layer(x)
    (weight[share] * y).sum().backward()
    parameters = [all_reduce_sum(w.grad) for w in (layer.weight, layer.bias)]
    return [v.detach() for v in (y, x.grad, *parameters, layer.running_mean, layer.running_var)]


@pytest.mark.parametrize("processes_", [1, 2, 3])
def test_split_batch_norm_normalises_each_group_by_itself(processes, processes_):
    x, weight = 2 * noise(BATCH, 3, 5, 4) + 1, noise(BATCH, 3, 5, 4, seed=1)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    layer, plain = split_layer().double(), x.double().requires_grad_()
    y, mean, variance = normalised_apart(layer, plain, order)
    (weight * y).sum().backward()
    expected = [y, plain.grad, layer.weight.grad, layer.bias.grad, mean, variance]
    found = list(zip(*processes(processes_, split_batch_norm, x, weight, order)))
    # Float32 sums of 80 numbers of size 1 to 10: rounding errors near 1e-6.
    for name, a, b in zip(("output", "input's gradient"), found, expected):
        torch.testing.assert_close(torch.cat(a).double(), b.detach(), rtol=1e-5, atol=1e-5, msg=name)
    for a, b in zip(found[2:], expected[2:]):
        for each in a:
            torch.testing.assert_close(each.double(), b.detach(), rtol=1e-5, atol=1e-5)


def test_split_batch_norm_in_eval_mode_is_batch_norm():
    layer, x = split_layer().eval(), noise(2, 3, 5, 4)
    layer.running_mean.copy_(noise(3))
    layer.running_var.copy_(noise(3).exp())
    plain = nn.BatchNorm2d(3).eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


def test_distribute_leaves_split_batch_norm_as_it_is(processes):
    assert processes(2, kinds_of_batch_norm) == [{"SplitBatchNorm"}] * 2


def kinds_of_batch_norm():
    network = distribute(moco.MoCo("resnet14", SIZE, 8, QUEUE, "v2"), CPU)
    return {type(m).__name__ for m in network.modules() if hasattr(m, "running_mean")}


def test_queries_and_keys_are_normalised_among_different_images():
    """What a query or a key depends on is its group, by order for queries and shuffled for keys: so a query and its key have in
    common the images in both groups alone."""
    model = moco.MoCo("resnet14", SIZE, 8, QUEUE, "v2")
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))
    members = moco.group_members(torch.arange(BATCH), GROUP), moco.group_members(order, GROUP)
    x = noise(BATCH, 3, SIZE, SIZE)
    q, k = model(x, x, *members)
    for i in range(BATCH):
        changed = x.clone()
        changed[i] += 0.5 * noise(3, SIZE, SIZE, seed=1)
        q_i, k_i = model(changed, changed, *members)
        for before, after, member in zip((q, k), (q_i, k_i), members):
            assert torch.equal((before != after).any(1), (member @ member.T)[i] > 0)


def test_initial_keys_are_queries_without_gradient():
    torch.manual_seed(0)
    model = moco.MoCo("resnet14", SIZE, 8, QUEUE, "v2")
    member, x = moco.group_members(torch.arange(BATCH), GROUP), noise(BATCH, 3, SIZE, SIZE)
    q, k = model(x, x, member, member)
    assert torch.equal(q, k) and not k.requires_grad
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(QUEUE))
    moco.info_nce(F.normalize(q, dim=1), F.normalize(k, dim=1), model.queue, 0.2).backward()
    taken_away = {"projector.0.2.bias"}  # batch-norm takes away the mean, and with it what this bias adds
    for name, w in model.named_parameters():
        if name.startswith("key_encoder"):
            assert not w.requires_grad and w.grad is None
        elif not w.requires_grad:  # without scale and offset
            assert name.startswith("projector") and torch.equal(w, torch.full_like(w, name.endswith("weight")))
        elif name not in taken_away:
            assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_saved_backbone_is_the_common_one():
    saved = moco.MoCo("resnet14", SIZE, 8, QUEUE, "v1").backbone.state_dict()
    backbone("resnet14", SIZE).load_state_dict(saved)


# -------- Recipes ---------------------------------------------------------------------------------------------------------

def arguments(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["moco.py", *map(str, flags)])
    return moco.get_args()


def test_recipes_differ_in_head_temperature_schedule_and_views(monkeypatch):
    v1, v2 = (arguments(monkeypatch, "--recipe", recipe, "--lr", 0.03, "--epochs", 200) for recipe in ("v1", "v2"))
    assert (v1.tau, v2.tau) == (0.07, 0.2) and arguments(monkeypatch, "--recipe", "v1", "--tau", 0.1).tau == 0.1
    kinds = [[type(m).__name__ for m in moco.MoCo("resnet14", SIZE, 8, QUEUE, recipe, norm).projector.modules()]
             for norm in (False, True) for recipe in ("v1", "v2")]
    papers = [["Linear"], ["Sequential", "Linear", "ReLU", "Linear"]]
    assert kinds == papers + [["Sequential", *head, "Unflatten", "SplitBatchNorm", "Flatten"] for head in papers]
    assert v1.head_norm and not arguments(monkeypatch, "--no-head-norm").head_norm
    rates = [[moco.learning_rate(epoch * 10, args, 10) for epoch in (0, 119, 120, 159, 160, 199)] for args in (v1, v2)]
    assert rates[0] == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    assert rates[1] == pytest.approx([0.015 * (1 + math.cos(math.pi * epoch / 200)) for epoch in (0, 119, 120, 159, 160, 199)])

    calls = []
    for name in ("random_flip", "color_jitter", "random_grayscale", "gaussian_blur"):
        monkeypatch.setattr(moco, name, lambda x, rand, name=name, **options: calls.append((name, options)) or x)
    v2.blur = 0.5
    for args in (v1, v2):
        for crop, augment in moco.views(args):
            assert crop.scale == (0.2, 1.0)
            augment(torch.rand(1, 3, 8, 8), BatchRandom([0], 1))
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    grey, flip = ("random_grayscale", {"p": 0.2}), ("random_flip", {})
    assert calls == 2 * [grey, ("color_jitter", {**jitter, "hue": 0.4}), flip] + 2 * [
        ("color_jitter", {**jitter, "hue": 0.1, "p": 0.8}), grey, ("gaussian_blur", {"p": 0.5, "sigma": (0.1, 2.0)}), flip]


@pytest.mark.parametrize("flags, words", [(("--batch", 64, "--queue", 63), "--queue 63"), (("--group", 1), "--group 1")])
def test_impossible_flags_are_refused(monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments(monkeypatch, *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err


# -------- The training loop -----------------------------------------------------------------------------------------------

def tiny_data():
    images = np.random.default_rng(0).integers(0, 256, (3 * BATCH, 3, SIZE, SIZE), dtype=np.uint8)  # three steps
    split = Split(torch.from_numpy(images))
    return Data("tiny", split, split, None)


normalize, group_members, make, to_float = moco.normalize, moco.group_members, moco.MoCo, torch.Tensor.float


def train(recipe, norm):
    """The losses of this process and the model's state after main() on tiny data, all in float64; nothing is evaluated or
    written."""
    def record(name, args, data, loader, model, state, collapse):
        assert name == "moco" and collapse == pytest.approx(math.log(1 + QUEUE))
        run.model = model
        return run

    run = SimpleNamespace(step=0, losses=[], end_epoch=lambda epoch: None, finish=lambda: None)
    run.log = lambda loss, lr: run.losses.append(loss.detach())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moco.py", "--recipe", recipe, f"--{norm}head-norm", *map(str, ARGUMENTS)])
        patch.setattr(moco, "load_data", lambda name, root, device: tiny_data())
        patch.setattr(moco, "normalize", lambda x: normalize(x).double())
        patch.setattr(moco, "group_members", lambda order, size: group_members(order, size).double())
        patch.setattr(moco, "MoCo", lambda *options: make(*options).double())
        patch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))
        patch.setattr(moco, "Run", record)
        moco.main()
    return torch.stack(run.losses), run.model.state_dict()


def ordinary(head):
    """A head with ordinary batch-norm in place of the one over groups."""
    if not any(isinstance(m, moco.SplitBatchNorm) for m in head.modules()):
        return head
    return nn.Sequential(head[0], nn.BatchNorm1d(head[2].num_features).requires_grad_(False))


def papers_procedure(recipe, norm):
    """The same training as the paper does it, on three simulated GPUs, in float64: an ordinary network with ordinary batch-norm
    sees a GPU's images at a time, and the key images are shuffled among the GPUs. Returns losses, both encoders' parameters and
    the queue."""
    with pytest.MonkeyPatch.context() as patch:
        args = arguments(patch, "--recipe", recipe, f"--{norm}head-norm", *ARGUMENTS)
    torch.manual_seed(args.seed)
    model = moco.MoCo(args.arch, SIZE, 128, QUEUE, recipe, args.head_norm)  # for its initial weights and queue
    query = nn.Sequential(backbone(args.arch, SIZE), ordinary(copy.deepcopy(model.projector))).double()
    query[0].load_state_dict(model.backbone.state_dict())
    key, queue, losses = copy.deepcopy(query), model.queue.double(), []
    optimizer = torch.optim.SGD(query.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loader = Loader(tiny_data().train, moco.views(args), BATCH, args.seed, CPU)
    for step, views in loader(0):
        x1, x2 = (x.double() for x in views)
        for k, q in zip(key.parameters(), query.parameters()):
            k.data = M * k.data + (1 - M) * q.data
        shuffle = torch.from_numpy(np.random.default_rng([args.seed, 0, step, 0, 4]).permutation(BATCH))
        to_gpus = torch.argsort(shuffle)
        with torch.no_grad():
            k = torch.cat([key(images) for images in x2[to_gpus].split(GROUP)])
        k = F.normalize(k[shuffle], dim=1)  # image i went to place shuffle[i]
        q = F.normalize(torch.cat([query(images) for images in x1.split(GROUP)]), dim=1)
        candidates = [torch.cat([k[i:i + 1], queue]) for i in range(BATCH)]
        losses.append(-sum((c @ q[i] / args.tau).log_softmax(0)[0] for i, c in enumerate(candidates)) / BATCH)
        optimizer.param_groups[0]["lr"] = moco.learning_rate(step, args, loader.steps)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        queue = torch.cat([queue, k])[-QUEUE:]
    return torch.stack(losses).detach(), list(query.parameters()), list(key.parameters()), queue


# Float64 in another order of summation: differences of 1e-16, which batch-norm among four images, some of nearly constant
# activations, enlarges by up to 300 (1e-5 ** -0.5) a layer, and three steps of training add up. In float32 the same grew from
# 1e-7 to 6e-3. A wrong group, image or queue changes the losses by 0.1.
TRAINED = {"rtol": 1e-8, "atol": 1e-8}


@pytest.mark.parametrize("recipe, norm", [("v1", "no-"), ("v2", "no-"), ("v2", "")])  # "": with batch-norm after the head
def test_training_is_the_papers_procedure_on_any_number_of_processes(processes, recipe, norm):
    losses, query, key, queue = papers_procedure(recipe, norm)
    alone = None  # the state after training in one process
    for count in (1, 2, 3):
        results = processes(count, train, recipe, norm)
        torch.testing.assert_close(torch.stack([found for found, _ in results]).mean(0), losses, **TRAINED)
        for _, state in results:
            for name, value in state.items():  # the processes agree to the last bit
                assert torch.equal(value, results[0][1][name]), name
        state = results[0][1]
        encoder = [state[name] for name in state if name.startswith(("backbone", "projector")) and "running" not in name
                   and "num_batches" not in name]
        keys = [state[name] for name in state if name.startswith("key_encoder") and "running" not in name
                and "num_batches" not in name]
        for found, expected in [*zip(encoder, query, strict=True), *zip(keys, key, strict=True)]:
            torch.testing.assert_close(found, expected.detach(), **TRAINED)
        assert state["oldest"] == 3 * BATCH % QUEUE
        torch.testing.assert_close(state["queue"].roll(-int(state["oldest"]), 0), queue, **TRAINED)
        alone = alone or state
        for name in state:
            torch.testing.assert_close(state[name], alone[name], msg=name, **TRAINED)
