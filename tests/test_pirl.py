"""PIRL: the loss by hand and against the official code in numpy, the memory bank, who is drawn as
another image, and what the transformed views show."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, light, noise

from common import InMemory, Loader, Split
from kernels.views import BatchRandom, denormalize
from methods import pirl

EXACT = {"rtol": 1e-12, "atol": 1e-12}
FLAGS = ["--size", 16, "--batch", 12, "--epochs", 2, "--warmup", 0, "--dim", 16]
FLAGS += ["--puzzle", 24, "--tile", 6, "--negatives", 8]


def units(n, d, seed=0):
    return F.normalize(noise(n, d, seed=seed), dim=1)


def model(transform="jigsaw", images=20, **options):
    torch.manual_seed(0)
    kinds = pirl.kinds(arguments("pirl", "--transform", transform))
    return pirl.PIRL("resnet14", 16, 8, images, kinds, **options)


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """M = 10, K = 2, Z = 5. Image: P is 4/5 for itself, 1/5 and 2/5 for the others; K / M = 1/5, so
    p = 4/5, 1/2, 2/3. Puzzle: 1/5, 1/5, 1/5, so p = 1/2, 1/2, 1/2. Weights 3/4 and 1/4."""
    of_image = torch.tensor([[4.0, 1.0, 2.0]], dtype=torch.float64).log()
    of_puzzle = torch.zeros(1, 3, dtype=torch.float64)
    Z = torch.tensor(5.0).double()
    found = pirl.pirl_loss(of_image, [of_puzzle], Z, 10, 0.25)
    expected = -0.75 * math.log(4 / 5 * 1 / 2 * 1 / 3) - 0.25 * math.log(1 / 8)
    torch.testing.assert_close(found.item(), expected, **EXACT)


def test_softmax_loss_by_hand():
    """The default: no Z. Image: exp(s) is 4 for itself, 1 and 2 for the others, so 4/7. Puzzle: all
    the same, so 1/3. Weights 3/4 and 1/4."""
    of_image = torch.tensor([[4.0, 1.0, 2.0]], dtype=torch.float64).log()
    of_puzzle = torch.full((1, 3), 5.0, dtype=torch.float64)
    found = pirl.pirl_loss(of_image, [of_puzzle], None, 10, 0.25)
    expected = -0.75 * math.log(4 / 7) - 0.25 * math.log(1 / 3)
    torch.testing.assert_close(found.item(), expected, **EXACT)


def test_two_transformations_share_the_weight():
    logits = [noise(4, 6, seed=s) for s in range(3)]
    Z = torch.tensor(9.0).double()

    def loss(transformed, weight):
        return pirl.pirl_loss(logits[0], transformed, Z, 30, weight)

    both = loss(logits[1:], 0.6)
    each = [loss([one], 0.6) for one in logits[1:]]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2, **EXACT)
    torch.testing.assert_close(loss(logits[1:], 0), pirl.nce_loss(logits[0], Z, 30), **EXACT)
    torch.testing.assert_close(loss([logits[2]], 1), pirl.nce_loss(logits[2], Z, 30), **EXACT)


def official(outputs, y, memory, idx, T, weights, loss_type, momentum=0.5):
    """NCELossWithMemory of vissl, in numpy: the outputs are [of patches, of images], the second one
    moves the memory. loss_type "nce": Z is estimated from the first; "cross_entropy": the classes
    are the columns of idx, of which the first is right. Returns the loss, its gradients, Z and the
    new memory. idx (B, K + 1): the first column is y."""
    eps = np.finfo("float32").eps
    B, K = len(y), idx.shape[1] - 1
    n = len(memory)
    Z = None
    loss = 0
    grads = []
    for x, weight in zip(outputs, weights):
        rows = memory[idx]
        out = np.exp(np.einsum("bkd,bd->bk", rows, x) / T)
        if loss_type == "cross_entropy":
            share = out / out.sum(1, keepdims=True)
            loss += -weight * np.log(share[:, 0]).mean()
            share[:, 0] -= 1
            grads.append(weight * np.einsum("bk,bkd->bd", share / B / T, rows))
            continue
        Z = out.mean() * n if Z is None else Z
        out = out / Z
        level = K / n
        loss += -weight * np.log(out[:, 0] / (out[:, 0] + level + eps)).sum() / B
        loss += -weight * np.log(level / (out[:, 1:] + level + eps)).sum() / B
        grad = 1 / (out + level + eps) / B
        grad[:, 0] -= 1 / out[:, 0] / B
        grads.append(weight * np.einsum("bk,bkd->bd", grad * out / T, rows))
    memory = memory.copy()
    rows = memory[y] * momentum + outputs[1] * (1 - momentum)
    memory[y] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return loss, grads, Z, memory


@pytest.mark.parametrize("loss_type", ["nce", "cross_entropy"])
def test_loss_and_bank_are_those_of_the_official_code(loss_type):
    """With others that are no image of the batch. In NCE their eps of 1.2e-7 beside K / M = 0.2
    changes a logarithm by up to 6e-7, and there are nine of them in each term."""
    M, d, tau = 40, 16, 0.07
    bank = units(M, d)
    g = units(6, d, seed=1).requires_grad_()
    f = units(6, d, seed=2).requires_grad_()
    index = torch.tensor([3, 39, 0, 17, 5, 8])
    others = torch.tensor([1, 2, 30, 31, 32, 33, 20, 9])
    idx = torch.cat([index[:, None], others.expand(6, -1)], 1).numpy()
    outputs = [v.detach().numpy() for v in (g, f)]
    found = official(outputs, index.numpy(), bank.numpy(), idx, tau, (0.3, 0.7), loss_type)
    loss, grads, Z, memory = found

    logits = [pirl.compare(v, bank, index, others, tau) for v in (f, g)]
    value, slope = EXACT, EXACT
    if loss_type == "nce":
        torch.testing.assert_close((M * logits[1].detach().exp().mean()).item(), Z, **EXACT)
        Z = torch.tensor(Z)
        value = {"rtol": 0, "atol": 6e-6}
        slope = {"rtol": 1e-5, "atol": 1e-5}
    ours = pirl.pirl_loss(logits[0], logits[1:], Z, M, 0.3)
    ours.backward()
    torch.testing.assert_close(ours.item(), loss, **value)
    for v, grad in zip((g, f), grads):
        torch.testing.assert_close(v.grad, torch.from_numpy(grad), **slope)
    pirl.update_bank(bank, index, f.detach(), 0.5)
    torch.testing.assert_close(bank, torch.from_numpy(memory), **EXACT)


def test_the_constant_stands_for_the_papers_sum_over_the_others():
    """Eq. 3: h = exp(s) / (exp(s) + sum of exp over the others). If Z is M times the mean over the
    others, as here, h of the own image is the same number."""
    logits = noise(1, 9)
    M = 50
    Z = M * logits[:, 1:].exp().mean()
    h = logits[0].softmax(0)[0]
    others = F.softplus(logits[:, 1:] - torch.log(Z * 8 / M)).sum()
    found = pirl.nce_loss(logits, Z, M)
    torch.testing.assert_close(found, -h.log() + others, **EXACT)


# -------- The others ------------------------------------------------------------------------------


def test_an_image_is_never_its_own_negative():
    """Where it was drawn, it adds nothing: the loss is that without this column, up to K, and no
    gradient flows from there."""
    bank = units(10, 4)
    v = units(3, 4, seed=1).requires_grad_()
    index = torch.tensor([7, 2, 5])
    others = torch.tensor([0, 2, 9, 7])
    logits = pirl.compare(v, bank, index, others, 0.2)
    for i in range(3):
        for k in range(4):
            expected = (v[i] * bank[others[k]]).sum() / 0.2
            if others[k] == index[i]:
                assert logits[i, 1 + k] == -math.inf
            else:
                torch.testing.assert_close(logits[i, 1 + k], expected, **EXACT)

    Z = torch.tensor(8.0).double()
    loss = pirl.nce_loss(logits, Z, 10)
    by_hand = 0
    for row in logits.detach():
        h = torch.sigmoid(row - math.log(8 * 4 / 10))
        kept = h[1:][row[1:] > -math.inf]
        by_hand = by_hand - h[0].log() - torch.log1p(-kept).sum()
    torch.testing.assert_close(loss.detach(), by_hand / 3, **EXACT)

    softmax = pirl.info_nce(logits)
    by_hand = 0
    for row in logits.detach():
        kept = row[row > -math.inf].exp()
        by_hand = by_hand - torch.log(kept[0] / kept.sum())
    torch.testing.assert_close(softmax.detach(), by_hand / 3, **EXACT)
    (loss + softmax).backward()
    assert v.grad.isfinite().all()


def test_others_are_all_images_equally_often():
    others = pirl.draw_others(BatchRandom([1], 4), 90_000, 10)
    count = others.bincount(minlength=10)
    assert len(count) == 10 and (count - 9000).abs().max() < 450  # standard deviation 90


# -------- The bank --------------------------------------------------------------------------------


def bank_and_z(network):
    return network.bank.clone(), network.Z.clone()


@pytest.mark.parametrize("kind", ["softmax", "nce"])
def test_the_bank_learns_from_images_alone_after_the_loss(train, monkeypatch, kind):
    """Every logit is that of the bank before the step; the loss is the one that --loss names, NCE
    with the Z of the first step; the rows of the batch move towards f, not towards g; all others
    stay."""
    seen = []
    logits = []
    forward = pirl.PIRL.forward
    compare = pirl.compare

    def see(network, shown):
        embeddings = forward(network, shown)
        seen.append([v.detach() for v in embeddings])
        return embeddings

    def ask(v, bank, index, others, tau):
        seen[-1] += [bank.clone(), index]
        logits.append(compare(v, bank, index, others, tau))
        return logits[-1]

    monkeypatch.setattr(pirl.PIRL, "forward", see)
    monkeypatch.setattr(pirl, "compare", ask)
    flags = [*FLAGS, "--loss", kind, "--weight", 0.3]
    run = train("pirl", *flags, spy=bank_and_z, **light("pirl"))
    banks = [bank for bank, _ in run.looks]
    assert len(banks) == 5 == len(seen) + 1
    for (f, g, bank, index, *_), before, after in zip(seen, banks, banks[1:]):
        assert torch.equal(bank, before)
        changed = (before != after).any(1).nonzero()[:, 0]
        assert changed.tolist() == index.sort().values.tolist()
        rows = F.normalize(0.5 * before[index] + 0.5 * f, dim=1)
        torch.testing.assert_close(after[index], rows, **EXACT)
        assert (f - g).abs().max() > 0.1
    Z = [z.item() for _, z in run.looks]
    assert Z[0] == 1 != Z[1] and Z[1:] == [Z[1]] * 4
    first = torch.cat(logits[:2]).detach().exp().mean().item()
    assert Z[1] == pytest.approx(24 * first, rel=1e-12)

    for step, found in enumerate(run.losses):
        loss = 0
        for weight, s in zip((0.7, 0.3), logits[2 * step :]):
            if kind == "softmax":
                terms = torch.logsumexp(s, 1) - s[:, 0]
            else:
                P = s.exp() / Z[1]
                h = P / (P + 8 / 24)
                terms = -h[:, 0].log() - (1 - h[:, 1:]).log().sum(1)
            loss = loss + weight * terms.mean().item()
        assert found.item() == pytest.approx(loss, rel=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["softmax", "nce"])
def test_both_transformations_are_the_same_on_two_processes(train, kind):
    flags = [*FLAGS, "--transform", "both", "--loss", kind]
    alone = train("pirl", *flags, **light("pirl"))
    together = train("pirl", *flags, world=2, **light("pirl"))
    torch.testing.assert_close(together.losses, alone.losses, rtol=1e-9, atol=1e-9)
    for key in ("model/bank", "model/Z"):
        torch.testing.assert_close(together.state[key], alone.state[key], rtol=1e-9, atol=1e-9)


# -------- The network -----------------------------------------------------------------------------


def test_patches_are_encoded_apart_and_joined_in_order():
    """A puzzle in another order has another embedding, by the last projection alone: the network is
    asked to make both close to the image."""
    net = model(head_norm=False).eval()
    joined = []
    head = net.heads["jigsaw"][0]
    head.join.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0].view(2, 9, 8)))
    x = noise(2, 3, 16, 16, dtype=torch.float32)
    tiles = noise(2, 9, 3, 8, 8, seed=1, dtype=torch.float32)
    order = torch.tensor([3, 1, 0, 8, 7, 2, 6, 5, 4])
    image, puzzle = net([x, tiles])
    _, shuffled = net([x, tiles[:, order]])
    assert image.shape == puzzle.shape == (2, 8)
    torch.testing.assert_close(joined[1], joined[0][:, order], rtol=1e-5, atol=1e-5)
    assert (puzzle - shuffled).abs().max() > 1e-3


@pytest.mark.parametrize("transform", ["jigsaw", "rotation", "both"])
def test_gradient_reaches_every_parameter_and_not_the_bank(transform):
    net = model(transform)
    x = noise(6, 3, 16, 16, dtype=torch.float32)
    shown = {"jigsaw": [noise(6, 9, 3, 8, 8, dtype=torch.float32)], "rotation": [x.flip(3)]}
    shown["both"] = shown["jigsaw"] + shown["rotation"]
    index = torch.arange(6)
    others = torch.arange(10, 18)
    embeddings = net([x, *shown[transform]])
    logits = [pirl.compare(v, net.bank, index, others, 0.1) for v in embeddings]
    pirl.pirl_loss(logits[0], logits[1:], torch.tensor(40.0), 20, 0.5).backward()
    for name, w in net.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name
    assert net.bank.grad is None and not net.bank.requires_grad
    assert {"bank", "Z"} <= set(net.state_dict())


# -------- The views -------------------------------------------------------------------------------


class Still(BatchRandom):
    """Random numbers with which no image is mirrored or grey and no colour changes: the first draws
    of an augmentation, those before the transformation, are answered so."""

    drawn = 0

    def uniform(self, low=0.0, high=1.0, columns=()):
        self.drawn += 1
        u = super().uniform(low, high, columns)
        if self.drawn > 8:
            return u
        # flip; jitter: whether, order, three factors, hue; grey
        return {1: 1.0, 4: 1.0, 5: 1.0, 6: 1.0, 7: 0.0, 8: 1.0}.get(self.drawn, 0.5) + 0 * u


def augmented(x, place, *flags, seed=7):
    args = arguments("pirl", "--puzzle", 36, "--tile", 8, *flags)
    _, augment = pirl.views(args)[place]
    return denormalize(augment(x, Still([seed], len(x))))


def numbered(n, side):
    """Images whose pixels are their own number, row * side + column, scaled into [0, 1]."""
    x = torch.arange(side * side) / (side * side)
    return x.view(1, 1, side, side).expand(n, 3, -1, -1)


def test_puzzles_are_all_nine_cells_in_any_order_each_at_a_random_place():
    n, side, cell, tile = 200, 36, 12, 8
    x = augmented(numbered(n, side), 1)  # (n, 9, 3, t, t)
    assert x.shape == (n, 9, 3, tile, tile)
    pixel = (x * side * side).round().long()
    row = pixel // side
    column = pixel % side

    # unbroken pieces of the image, the same of all channels
    i = torch.arange(tile)
    assert torch.equal(row, row[:, :, :1, :1, :1] + i[:, None].expand(3, tile, tile))
    assert torch.equal(column, column[:, :, :1, :1, :1] + i.expand(3, tile, tile))

    top, left = row[:, :, 0, 0, 0], column[:, :, 0, 0, 0]  # (n, 9)
    order = top // cell * 3 + left // cell
    assert torch.equal(order.sort(1).values, torch.arange(9).expand(n, 9))
    assert len(order.unique(dim=0)) > 195  # any of 9! orders, not a fixed set
    for place in range(9):
        assert order[:, place].bincount(minlength=9).min() > 5  # 22 expected
    for start in (top % cell, left % cell):
        assert start.min() == 0 and start.max() == cell - tile  # none leaves its cell
        assert start.float().std(1).mean() > 1  # each its own


def test_turned_views_are_the_four_exact_turns():
    x = noise(80, 3, 6, 6, dtype=torch.float32).sigmoid()
    turned = augmented(x, 1, "--transform", "rotation")
    every = torch.stack([torch.rot90(x, k, dims=(2, 3)) for k in range(4)])
    same = (every - turned).abs().amax((2, 3, 4)) < 1e-5  # (4, 80)
    assert same.sum(0).eq(1).all() and same.sum(1).min() > 8  # 20 expected


def test_an_image_and_its_transformed_versions_are_different_crops():
    args = arguments("pirl", "--transform", "both")
    image, puzzle, turned = [crop for crop, _ in pirl.views(args)]
    assert image.scale == turned.scale == (0.2, 1.0) and image.size == turned.size == 32
    assert puzzle.scale == (0.6, 1.0) and puzzle.size == 48
    split = Split(InMemory(torch.randint(256, (8, 3, 48, 48), dtype=torch.uint8)))
    loader = Loader(split, pirl.views(args), 8, 0, CPU)
    _, (a, tiles, b) = next(loader(0))
    assert a.shape == b.shape == (8, 3, 32, 32) and tiles.shape == (8, 9, 3, 12, 12)
    turns = torch.stack([torch.rot90(b, k, dims=(2, 3)) for k in range(4)])
    assert (turns - a).abs().amax((2, 3, 4)).min() > 0.1


def test_pictures_show_the_puzzle_in_the_order_of_its_places():
    args = arguments("pirl", "--transform", "both", "--tile", 4)
    x = noise(2, 3, 16, 16, dtype=torch.float32)
    tiles = noise(2, 9, 3, 4, 4, dtype=torch.float32)
    shown = pirl.show(args, [x, tiles, x.flip(3)])
    assert list(shown) == ["view", "puzzle", "turned"]
    puzzle = shown["puzzle"]
    assert puzzle.shape == (2, 3, 12, 12)
    for place in range(9):
        top, left = 4 * (place // 3), 4 * (place % 3)
        found = puzzle[:, :, top : top + 4, left : left + 4]
        torch.testing.assert_close(found, denormalize(tiles[:, place]))


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--tile", 17), "--tile 17: a cell of --puzzle 48 has 16 pixels"),
        (("--arch", "vit_micro", "--tile", 7), "--tile 7: choose a multiple of"),
        (("--weight", 1.1), "--weight 1.1: choose at least 0 and at most 1"),
        (("--negatives", 0), "--negatives 0: choose at least 1"),
        (("--transform", "blur"), "--transform: invalid choice: 'blur'"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("pirl", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--recipe", "cifar10", "--arch", "vit_small", "--size", 224),
        ("--transform", "rotation", "--puzzle", 24),
    ],
)
def test_turned_views_need_no_tiles(flags):
    """Sides of a puzzle that could not be are no reason to refuse where none is shown. With
    --transform both they are."""
    assert arguments("pirl", *flags).transform == "rotation"
    with pytest.raises(SystemExit):
        arguments("pirl", *flags, "--transform", "both")
