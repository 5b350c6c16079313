"""Jigsaw: the permutation set, tiles cut and shuffled against plain slicing, what must not leak
between tiles, and labels that fit the tiles."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import CPU, arguments, noise

import common
from common import Data, InMemory, Loader, Split
from kernels.views import AUGMENT, BatchRandom, denormalize
from methods import jigsaw

BATCH, SIZE, TILE = 6, 36, 8
CELL = SIZE // 3
FLAGS = ("--size", SIZE, "--tile", TILE)


def settings(*flags):
    """Tiles in colour, of the whole image, with shifts of up to 2."""
    return arguments("jigsaw", *FLAGS, "--shift", 2, "--gray", 0, "--min-crop", 1, *flags)


@pytest.fixture(scope="module")
def P():
    return jigsaw.permutation_set(100)


# -------- Permutations ----------------------------------------------------------------------------


def test_permutations_are_valid_distinct_and_far_apart(P):
    assert P.shape == (100, 9) and P[0].tolist() == list(range(9))
    assert (P.sort(1).values == torch.arange(9)).all() and len(P.unique(dim=0)) == 100
    distance = (P[:, None] != P).sum(2)[~torch.eye(100, dtype=torch.bool)].float()
    # Two random permutations differ in 8 of 9 places on average, sometimes in 2; the paper's 100
    # have a mean of 8.08.
    assert distance.mean() >= 8.08 and distance.min() >= 4


def test_next_permutation_is_the_farthest(P):
    sample = itertools.islice(itertools.permutations(range(9)), 0, None, 1009)  # of all
    sample = torch.tensor(list(sample))
    for count in (1, 2, 5, 39):
        total = (sample[:, None] != P[:count]).sum((1, 2))
        assert (P[count] != P[:count]).sum() >= total.max()
    # a smaller set is the beginning of a larger one
    assert torch.equal(jigsaw.permutation_set(5), P[:5])


# -------- Tiles -----------------------------------------------------------------------------------


def test_cut_tiles_is_slicing():
    x = noise(2, 3, 20, 20)
    generator = torch.Generator().manual_seed(1)
    top = torch.randint(0, 13, (2, 9, 3), generator=generator)
    left = torch.randint(0, 13, (2, 9, 3), generator=generator)
    tiles = jigsaw.cut_tiles(x, top, left, 8)
    assert tiles.shape == (2, 9, 3, 8, 8)
    for i, k, c in itertools.product(range(2), range(9), range(3)):
        t = top[i, k, c]
        r = left[i, k, c]
        assert torch.equal(tiles[i, k, c], x[i, c, t : t + 8, r : r + 8])


class Still(BatchRandom):
    """Random numbers of a batch in which no image is mirrored: the second numbers drawn, those of
    random_flip, are 1."""

    drawn = 0

    def uniform(self, low=0.0, high=1.0, columns=()):
        self.drawn += 1
        u = super().uniform(low, high, columns)
        return torch.ones_like(u) if self.drawn == 2 else u


def puzzles(P, *flags, n=64):
    """Rows and columns (n, 9, 3) where each channel of each tile begins, and the drawn labels."""
    ((_, augment),) = jigsaw.views(settings(*flags), P)
    # images whose pixels are their own number, row * SIZE + column, scaled into [0, 1]
    x = torch.arange(SIZE * SIZE).div(SIZE * SIZE).view(1, 1, SIZE, SIZE).expand(n, 3, -1, -1)
    x = denormalize(augment(x, Still([7], n)))  # (n, 9, 3, t, t)
    pixel = (x * SIZE * SIZE).round().long()
    row = pixel // SIZE
    column = pixel % SIZE

    # tiles are unbroken pieces of the image
    i = torch.arange(TILE)
    assert torch.equal(row, row[..., :1, :1] + i[:, None].expand(TILE, TILE))
    assert torch.equal(column, column[..., :1, :1] + i.expand(TILE, TILE))
    return row[..., 0, 0], column[..., 0, 0], jigsaw.draw_puzzles(Still([7], n), len(P))


def test_tiles_are_shuffled_by_the_labelled_permutation(P):
    row, column, y = puzzles(P)
    tile = row // CELL * 3 + column // CELL  # (n, 9, 3): the cell in which each channel begins
    assert torch.equal(tile, P[y][..., None].expand(-1, -1, 3))
    ordered = tile[:, :, 0].gather(1, P[y].argsort(1))  # undone by the inverse permutation
    assert torch.equal(ordered, torch.arange(9).expand(len(y), 9)) and len(y.unique()) > 35


def test_jitter_is_each_tiles_own_and_stays_in_the_cell(P):
    row, column, _ = puzzles(P)
    for start in (row % CELL, column % CELL):
        # all of the room is used, and no tile leaves its cell
        assert start.min() == 0 and start.max() == CELL - TILE
        shift = start - start.min(2, keepdim=True).values
        assert shift.max() == 2  # between channels at most --shift
        across = (start[:, 0] - start[:, 1]).float()  # two tiles of the same puzzle
        assert across.std() > 1
    assert not torch.equal(row % CELL, column % CELL)
    row, column, _ = puzzles(P, "--shift", 0)
    assert (row == row[..., :1]).all() and (column == column[..., :1]).all()


def test_gray_is_drawn_for_each_puzzle(P):
    ((_, augment),) = jigsaw.views(settings("--gray", 0.3), P)
    colours = noise(400, 3, SIZE, SIZE, dtype=torch.float32).sigmoid()
    x = denormalize(augment(colours, BatchRandom([0], 400)))  # (n, 9, 3, t, t)
    gray = (x - x[:, :, :1]).abs().amax((2, 3, 4)) < 1e-5  # (n, 9)
    assert torch.equal(gray.all(1), gray.any(1))
    assert 85 < gray[:, 0].sum() < 155  # 120 expected, standard deviation 9


def test_pictures_show_the_tiles_in_their_places(P):
    ((_, augment),) = jigsaw.views(settings(), P)
    x = augment(noise(2, 3, SIZE, SIZE, dtype=torch.float32).sigmoid(), BatchRandom([0], 2))
    shown = jigsaw.show([x])
    assert list(shown) == [f"place {place}" for place in range(1, 10)]
    assert torch.equal(torch.stack(list(shown.values()), 1), denormalize(x))


def test_standardize_by_hand():
    pattern = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    scale = torch.tensor([1.0, 100.0, 0.0]).view(1, 3, 1, 1)
    found = jigsaw.standardize((pattern + 2) * scale, eps=0.1)
    torch.testing.assert_close(found[0, 0], pattern / math.sqrt(1.01))
    torch.testing.assert_close(found[0, 1], pattern, rtol=1e-5, atol=1e-5)
    assert not found[0, 2].any()  # a blank tile stays blank


# -------- Network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_brightness_and_contrast_of_a_tile_are_unknown_to_the_network(arch):
    torch.manual_seed(0)
    net = jigsaw.backbone(arch, 32).eval()
    x = 5 * noise(2, 3, 16, 16, dtype=torch.float32)
    same = 4 * x + torch.tensor([3.0, -1.0, 0.0]).view(3, 1, 1)
    # eps is 0.1 against a deviation of 5: relative differences of 0.1^2 / (2 5^2) = 2e-4.
    torch.testing.assert_close(net(x), net(same), rtol=5e-3, atol=1e-3)
    assert (net(x) - net(x.flip(3))).abs().max() > 0.05
    common.backbone(arch, 32).load_state_dict(net.state_dict())


@pytest.mark.parametrize("arch", ["resnet14", "resnet18"])
def test_last_stage_sees_more_than_one_place_of_a_tile(arch):
    net = jigsaw.backbone(arch, 48)
    seen = []
    net.layer4.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:]))
    net(noise(2, 3, 12, 12, dtype=torch.float32))
    assert min(seen[0]) >= 2


def test_tiles_are_encoded_apart_and_joined_in_order():
    torch.manual_seed(0)
    model = jigsaw.Jigsaw("resnet14", SIZE, 16, 10).eval()
    joined = []
    model.fc7.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0].view(2, 9, 16)))
    x = noise(2, 9, 3, 16, 16, dtype=torch.float32)
    changed = x.clone()
    changed[0, 4] = noise(3, 16, 16, seed=1)
    shuffled = x[:, [1, 0, *range(2, 9)]]
    for tiles in (x, changed, shuffled):
        assert model(tiles).shape == (2, 10)
    h, h_changed, h_shuffled = joined
    assert (h != h_changed).any(2).nonzero().tolist() == [[0, 4]]
    assert torch.equal(h_shuffled[:, :2], h[:, [1, 0]])
    assert torch.equal(h_shuffled[:, 2:], h[:, 2:])


def test_permutation_loss_by_hand():
    """Two puzzles, three permutations. Odds of 1 : 2 : 3 give the second log 3, equal odds log 3
    always: so the mean is it."""
    odds = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    logits = odds.log().requires_grad_()
    loss = jigsaw.permutation_loss(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(loss.item(), math.log(3))
    loss.backward()  # (softmax - onehot) / n
    gradient = torch.tensor([[1 / 6, 1 / 3 - 1, 1 / 2], [1 / 3, 1 / 3, 1 / 3 - 1]]).double() / 2
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-6, atol=1e-7)


SIZES = [
    ("resnet14", SIZE, 8),
    ("vit_micro", 48, 12),
    pytest.param("resnet18", SIZE, 12, marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("arch, size, tile", SIZES)
def test_gradient_reaches_every_parameter(arch, size, tile):
    model = jigsaw.Jigsaw(arch, size, 8, 5)
    logits = model(noise(4, 9, 3, tile, tile, dtype=torch.float32))
    jigsaw.permutation_loss(logits, torch.arange(4)).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


# -------- The training loop -----------------------------------------------------------------------


def random_images():
    shape = (2 * BATCH, 3, SIZE, SIZE)  # two steps
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    split = Split(InMemory(torch.from_numpy(images)))
    return Data("random", split, split, None)


def tiles_shown(top, left):
    """Corners (n, 9, 3) -> (n, 9): the tile at each place."""
    return top[..., 0] // CELL * 3 + left[..., 0] // CELL


def test_main_asks_for_the_permutation_that_it_shows(train, monkeypatch):
    """The labels that the loss gets are those of the tiles that were cut, in both epochs."""
    P = jigsaw.permutation_set(5)
    cut_tiles = jigsaw.cut_tiles
    loss = jigsaw.permutation_loss
    shown = []
    asked = []

    def see_tiles(x, top, left, tile):
        shown.append(tiles_shown(top, left))
        return cut_tiles(x, top, left, tile)

    def see_labels(logits, y):
        asked.append(P[y])
        return loss(logits, y)

    monkeypatch.setattr(jigsaw, "cut_tiles", see_tiles)
    monkeypatch.setattr(jigsaw, "permutation_loss", see_labels)
    flags = [*FLAGS, "--perms", 5, "--dim", 8, "--batch", BATCH, "--epochs", 2]
    train("jigsaw", *flags, data=random_images(), double=False)
    assert len(shown) == 4 and all(map(torch.equal, shown, asked))


@pytest.mark.parametrize("process, world", [(0, 1), (0, 2), (1, 2)])
def test_labels_of_the_loop_are_those_of_the_views(monkeypatch, P, process, world):
    """In every step of every epoch, resumed or not, also where each process has but a share of the
    batch."""
    cut_tiles = jigsaw.cut_tiles
    shown = []

    def see_tiles(x, top, left, tile):
        shown.append(tiles_shown(top, left))
        return cut_tiles(x, top, left, tile)

    monkeypatch.setattr(jigsaw, "cut_tiles", see_tiles)
    monkeypatch.setattr("kernels.views.rank", lambda: process)
    monkeypatch.setattr("kernels.views.world", lambda: world)
    loader = Loader(random_images().train, jigsaw.views(settings(), P), BATCH, 3, CPU)
    for epoch, done in ((0, 0), (1, 0), (1, 3)):
        for step, _ in loader(epoch, done):
            rand = loader.random(epoch, step % loader.steps, 0, AUGMENT)
            y = jigsaw.draw_puzzles(rand, len(P))
            assert len(y) == BATCH // world and torch.equal(shown[-1], P[y])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--tile", 20), "--tile 20: with --shift 1, a cell of 16 pixels"),
        (("--perms", 1), "--perms 1: choose at least 2 and at most 5000"),
        (("--arch", "vit_micro", "--tile", 10), "--tile 10: choose a multiple of 4"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("jigsaw", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err


def test_the_default_tile_fits_a_vision_transformer():
    assert arguments("jigsaw", "--arch", "vit_micro").tile == 12
