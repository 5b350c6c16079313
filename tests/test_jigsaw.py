"""Jigsaw: the permutation set, tiles cut and shuffled against plain slicing, what must not leak between tiles, labels that fit
the tiles, and the training loop for any number of processes."""

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from common import BatchRandom, Data, Loader, Split
from methods import jigsaw

CPU = torch.device("cpu")
BATCH, SIZE, TILE = 6, 36, 8
RECIPE = {"size": SIZE, "tile": TILE, "shift": 2, "gray": 0.0, "min_crop": 1.0}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def P():
    return jigsaw.permutation_set(40)


# -------- Permutations --------------------------------------------------------------------------------------------------

def test_permutations_are_valid_distinct_and_far_apart():
    P = jigsaw.permutation_set(100)
    assert P.shape == (100, 9) and P[0].tolist() == list(range(9))
    assert (P.sort(1).values == torch.arange(9)).all() and len(P.unique(dim=0)) == 100
    distance = (P[:, None] != P).sum(2)[~torch.eye(100, dtype=torch.bool)].float()
    # Two random permutations differ in 8 of 9 places on average, sometimes in 2; the paper's 100 have a mean of 8.08.
    assert distance.mean() >= 8.08 and distance.min() >= 4


def test_next_permutation_is_the_farthest(P):
    every = torch.tensor(list(itertools.islice(itertools.permutations(range(9)), 0, None, 101)))  # a sample of all
    for count in (1, 2, 5, 39):
        total = (every[:, None] != P[:count]).sum((1, 2))
        assert (P[count] != P[:count]).sum() >= total.max()
    assert torch.equal(jigsaw.permutation_set(5), P[:5])  # a smaller set is the beginning of a larger one


# -------- Tiles ---------------------------------------------------------------------------------------------------------

def test_cut_tiles_is_slicing():
    x, generator = noise(2, 3, 20, 20), torch.Generator().manual_seed(1)
    top, left = (torch.randint(0, 13, (2, 9, 3), generator=generator) for _ in range(2))
    tiles = jigsaw.cut_tiles(x, top, left, 8)
    assert tiles.shape == (2, 9, 3, 8, 8)
    for i, k, c in itertools.product(range(2), range(9), range(3)):
        t, r = top[i, k, c], left[i, k, c]
        assert torch.equal(tiles[i, k, c], x[i, c, t:t + 8, r:r + 8])


def coordinates(n):
    """(n, 3, SIZE, SIZE) images whose pixels are the number of their own row * SIZE + column, scaled into [0, 1]."""
    return torch.arange(SIZE * SIZE).div(SIZE * SIZE).view(1, 1, SIZE, SIZE).expand(n, 3, -1, -1)


def puzzles(P, n=64, **changes):
    """Rows and columns (n, 9, 3) where each channel of each tile begins, and the drawn labels."""
    (_, augment), = jigsaw.views(SimpleNamespace(**RECIPE | changes), P)
    x = augment(coordinates(n), Still([7], n))
    x = x * torch.tensor(common.STD).view(3, 1, 1) + torch.tensor(common.MEAN).view(3, 1, 1)
    pixel = (x * SIZE * SIZE).round().long()  # (n, 9, 3, t, t)
    row, column = pixel // SIZE, pixel % SIZE
    i = torch.arange(TILE)
    assert torch.equal(row, row[..., :1, :1] + i[:, None].expand(TILE, TILE))  # tiles are unbroken pieces of the image
    assert torch.equal(column, column[..., :1, :1] + i.expand(TILE, TILE))
    return row[..., 0, 0], column[..., 0, 0], jigsaw.draw_puzzles(Still([7], n), len(P))


class Still(BatchRandom):
    """Random numbers of a batch in which no image is mirrored: the second numbers drawn, those of random_flip, are 1."""
    drawn = 0

    def uniform(self, low=0.0, high=1.0, columns=()):
        self.drawn += 1
        u = super().uniform(low, high, columns)
        return torch.ones_like(u) if self.drawn == 2 else u


def test_tiles_are_shuffled_by_the_labelled_permutation(P):
    row, column, y = puzzles(P)
    tile = row // (SIZE // 3) * 3 + column // (SIZE // 3)  # (n, 9, 3): the cell in which each channel begins
    assert torch.equal(tile, P[y][..., None].expand(-1, -1, 3))
    ordered = tile[:, :, 0].gather(1, P[y].argsort(1))  # undone by the inverse permutation
    assert torch.equal(ordered, torch.arange(9).expand(len(y), 9)) and len(y.unique()) > 25


def test_jitter_is_each_tiles_own_and_stays_in_the_cell(P):
    row, column, _ = puzzles(P)
    cell = SIZE // 3
    for start in (row % cell, column % cell):
        assert start.min() == 0 and start.max() == cell - TILE  # all of the room is used, and no tile leaves its cell
        shift = start - start.min(2, keepdim=True).values
        assert shift.max() == 2  # between channels at most --shift
        across = (start[:, 0] - start[:, 1]).float()  # two tiles of the same puzzle
        assert across.std() > 1
    assert not torch.equal(row % cell, column % cell)
    row, column, _ = puzzles(P, shift=0)
    assert (row == row[..., :1]).all() and (column == column[..., :1]).all()


def test_gray_is_drawn_for_each_puzzle(P):
    (_, augment), = jigsaw.views(SimpleNamespace(**RECIPE | {"gray": 0.3}), P)
    x = augment(torch.rand(400, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), BatchRandom([0], 400))
    x = x * torch.tensor(common.STD).view(3, 1, 1) + torch.tensor(common.MEAN).view(3, 1, 1)
    gray = ((x - x[:, :, :1]).abs().amax((2, 3, 4)) < 1e-5)  # (n, 9)
    assert torch.equal(gray.all(1), gray.any(1))
    assert 85 < gray[:, 0].sum() < 155  # 120 expected, standard deviation 9


def test_standardize_by_hand():
    x = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).view(1, 1, 2, 2) * torch.tensor([1.0, 100.0, 0.0]).view(1, 3, 1, 1)
    found = jigsaw.standardize(x, eps=0.1)
    pattern = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(found[0, 0], pattern / math.sqrt(1.01))
    torch.testing.assert_close(found[0, 1], pattern, rtol=1e-5, atol=1e-5)
    assert not found[0, 2].any()  # a blank tile stays blank


# -------- Network -------------------------------------------------------------------------------------------------------

def test_brightness_and_contrast_of_a_tile_are_unknown_to_the_network():
    torch.manual_seed(0)
    net = jigsaw.backbone("resnet14", 32).eval()
    x = 5 * noise(2, 3, 16, 16)
    same = 4 * x + torch.tensor([3.0, -1.0, 0.0]).view(3, 1, 1)
    # eps is 0.1 against a deviation of 5: relative differences of 0.1^2 / (2 5^2) = 2e-4.
    torch.testing.assert_close(net(x), net(same), rtol=5e-3, atol=1e-3)
    assert (net(x) - net(x.flip(3))).abs().max() > 0.05
    common.backbone("resnet14", 32).load_state_dict(net.state_dict())


def test_last_stage_sees_more_than_one_place_of_a_tile():
    for arch in ("resnet14", "resnet18"):
        net, seen = jigsaw.backbone(arch, 48), []
        net.layer4.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
        net(noise(2, 3, 12, 12))
        assert min(seen[0]) >= 2


def test_tiles_are_encoded_apart_and_joined_in_order():
    torch.manual_seed(0)
    model = jigsaw.Jigsaw("resnet14", SIZE, 16, 10).eval()
    joined = []
    model.fc7.register_forward_pre_hook(lambda module, inputs: joined.append(inputs[0]))
    x = noise(2, 9, 3, 16, 16)
    changed = x.clone()
    changed[0, 4] = noise(3, 16, 16, seed=1)
    shuffled = x[:, [1, 0, *range(2, 9)]]
    for each in (x, changed, shuffled):
        assert model(each).shape == (2, 10)
    h, h_changed, h_shuffled = (j.view(2, 9, 16) for j in joined)
    differ = (h != h_changed).any(2)
    assert differ.nonzero().tolist() == [[0, 4]]
    assert torch.equal(h_shuffled[:, :2], h[:, [1, 0]]) and torch.equal(h_shuffled[:, 2:], h[:, 2:])


def test_permutation_loss_by_hand():
    """Two puzzles, three permutations. Odds of 1 : 2 : 3 give the second log 3, equal odds log 3 always: so the mean is it."""
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]], dtype=torch.float64).log().requires_grad_()
    loss = jigsaw.permutation_loss(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(loss, torch.tensor(3.0, dtype=torch.float64).log())
    loss.backward()  # (softmax - onehot) / n
    gradient = torch.tensor([[1 / 6, 1 / 3 - 1, 1 / 2], [1 / 3, 1 / 3, 1 / 3 - 1]], dtype=torch.float64) / 2
    torch.testing.assert_close(logits.grad, gradient)


@pytest.mark.parametrize("arch, tile", [("resnet14", 8), ("resnet18", 12)])
def test_gradient_reaches_every_parameter(arch, tile):
    model = jigsaw.Jigsaw(arch, SIZE, 8, 5)
    jigsaw.permutation_loss(model(noise(6, 9, 3, tile, tile)), torch.arange(6) % 5).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


# -------- The training loop ---------------------------------------------------------------------------------------------

def tiny_data():
    images = np.random.default_rng(0).integers(0, 256, (2 * BATCH, 3, SIZE, SIZE), dtype=np.uint8)  # two steps
    split = Split(torch.from_numpy(images))
    return Data("tiny", split, split, None)


def arguments(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["jigsaw.py", *map(str, flags)])


def train(lr=0.01):
    """The losses of this process and the model's state after main() on tiny data; nothing is evaluated or written."""
    def record(name, args, data, loader, model, state, collapse):
        run.model = model
        return run

    run = SimpleNamespace(step=0, losses=[], end_epoch=lambda epoch: None, finish=lambda: None)
    run.log = lambda loss, lr: run.losses.append(loss.detach())
    with pytest.MonkeyPatch.context() as patch:
        arguments(patch, "--batch", BATCH, "--size", SIZE, "--tile", TILE, "--perms", 5, "--dim", 8, "--epochs", 2, "--lr", lr)
        patch.setattr(jigsaw, "load_data", lambda name, root, device: tiny_data())
        patch.setattr(jigsaw, "Run", record)
        jigsaw.main()
    return torch.stack(run.losses), run.model.state_dict()


def test_training_is_the_same_for_any_number_of_processes(processes):
    losses, state = train()
    assert len(losses) == 4 and not torch.equal(losses, train(lr=0)[0])
    for n in (2, 3):
        found = processes(n, train)
        assert len({each[0][0].item() for each in found}) == n  # different images in each process
        # Float32 in another order of summation, through batch-norms among few values and four steps of training.
        torch.testing.assert_close(torch.stack([each[0] for each in found]).mean(0), losses, rtol=1e-3, atol=1e-3)
        for name, value in state.items():
            assert torch.equal(found[0][1][name], found[-1][1][name]), name  # the processes agree to the last bit
            torch.testing.assert_close(found[0][1][name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_main_asks_for_the_permutation_that_it_shows(monkeypatch):
    """The labels that the loss gets are those of the tiles that were cut, in both epochs."""
    cut_tiles, loss, shown, asked = jigsaw.cut_tiles, jigsaw.permutation_loss, [], []

    def see_tiles(x, top, left, tile):
        shown.append(top[..., 0] // (SIZE // 3) * 3 + left[..., 0] // (SIZE // 3))
        return cut_tiles(x, top, left, tile)

    def see_labels(logits, y):
        asked.append(jigsaw.permutation_set(5)[y])
        return loss(logits, y)

    monkeypatch.setattr(jigsaw, "cut_tiles", see_tiles)
    monkeypatch.setattr(jigsaw, "permutation_loss", see_labels)
    train()
    assert len(shown) == 4 and all(torch.equal(*both) for both in zip(shown, asked, strict=True))


def test_labels_of_the_loop_are_those_of_the_views(monkeypatch, P):
    """In every step of every epoch, resumed or not, also where each process has but a share of the batch."""
    args, seen, cut_tiles = SimpleNamespace(**RECIPE), {}, jigsaw.cut_tiles

    def spy(x, top, left, tile):
        seen.update(top=top[..., 0], left=left[..., 0])
        return cut_tiles(x, top, left, tile)

    monkeypatch.setattr(jigsaw, "cut_tiles", spy)
    for process, of in ((0, 1), (0, 2), (1, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(common, "rank", lambda process=process: process)
            patch.setattr(common, "world", lambda of=of: of)
            loader = Loader(tiny_data().train, jigsaw.views(args, P), BATCH, 3, CPU)
            for epoch, done in ((0, 0), (1, 0), (1, 3)):
                for step, _ in loader(epoch, done):
                    y = jigsaw.draw_puzzles(loader.random(epoch, step % loader.steps, 0, 2), len(P))
                    tile = seen["top"] // (SIZE // 3) * 3 + seen["left"] // (SIZE // 3)
                    assert len(y) == BATCH // of and torch.equal(tile, P[y])


@pytest.mark.parametrize("flags, words", [
    (("--tile", 20), "--tile 20: with --shift 1, a cell of 16 pixels"), (("--perms", 1), "--perms 1: choose 2 to 5000")])
def test_impossible_flags_are_refused(monkeypatch, capsys, flags, words):
    arguments(monkeypatch, *flags)
    with pytest.raises(SystemExit) as error:
        jigsaw.get_args()
    assert error.value.code == 1 and words in capsys.readouterr().err
