"""Context prediction: pairs and their labels by geometry, patches against plain slicing, and the
clues that must be gone: edges that continue, the fringes of a lens, brightness."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import arguments, call_main, noise

import common
from common import Data, InMemory, Split, make_views
from kernels.views import BatchRandom
from methods import context_prediction as context

EXACT = {"rtol": 1e-12, "atol": 1e-12}
CLOSE = {"rtol": 0, "atol": 1e-6}
SIZE, PATCH, GAP, JITTER = 48, 12, 4, 1


@pytest.fixture(scope="module")
def matrices():
    return context.resampling(PATCH)


def rand(n, seed=0):
    return BatchRandom([seed], n)


def images(*shape, seed=0):
    return noise(*shape, seed=seed).sigmoid().float()


# -------- Pairs and the loss ----------------------------------------------------------------------


def test_labels_say_where_the_second_patch_lies():
    """By the coordinates of the patches: the eight directions, row by row; both orders of a pair,
    whose labels sum to 7."""
    first, second, places = context.neighbours()
    pairs = dict(zip(zip(first.tolist(), second.tolist()), places.tolist()))
    assert len(pairs) == len(first) == 40
    directions = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
    for i, j in itertools.permutations(range(9), 2):
        step = (j // 3 - i // 3, j % 3 - i % 3)
        assert pairs.get((i, j)) == (directions.index(step) if step in directions else None)
        assert (i, j) not in pairs or pairs[i, j] + pairs[j, i] == 7
    assert [places.tolist().count(y) for y in range(8)] == [4, 6, 4, 6, 6, 4, 6, 4]


def test_loss_by_hand():
    """A guess has log 8; logits that favour the right place by a have log(1 + 7 e^-a)."""
    places = context.neighbours()[2]
    right = F.one_hot(places, 8).double().expand(3, -1, -1)  # (3, 40, 8)

    def check(logits, expected):
        found = context.position_loss(logits, places)
        torch.testing.assert_close(found.item(), expected, **EXACT)

    check(0 * right, math.log(8))
    check(5 * right, math.log1p(7 * math.exp(-5)))
    check(5 * right.flip(2), math.log(7 + math.exp(5)))  # the opposite place: y and 7 - y
    mixed = torch.cat([5 * right[:2], 0 * right[:1]])
    check(mixed, (2 * math.log1p(7 * math.exp(-5)) + math.log(8)) / 3)


# -------- Patches ---------------------------------------------------------------------------------


def test_cut_patches_is_slicing():
    x = images(2, 3, 30, 30)
    corners = torch.randint(0, 19, (2, 9, 2), generator=torch.Generator().manual_seed(1))
    patches = context.cut_patches(x, corners, PATCH)
    assert patches.shape == (2, 9, 3, PATCH, PATCH)
    for i, k in itertools.product(range(2), range(9)):
        top, left = corners[i, k].tolist()
        assert torch.equal(patches[i, k], x[i, :, top : top + PATCH, left : left + PATCH])


def test_gaps_and_jitter_of_the_grid():
    """Of many grids: all within the image and reaching each of its borders; gaps from gap - 2
    jitter to gap + 2 jitter, in both directions; every patch is moved by itself."""
    corners = context.grid_corners(rand(2000), arguments("context_prediction"))
    assert corners.min() == 0 and corners.max() == SIZE - PATCH
    grid = corners.unflatten(1, (3, 3))
    down = grid[:, 1:, :, 0] - grid[:, :-1, :, 0] - PATCH
    right = grid[:, :, 1:, 1] - grid[:, :, :-1, 1] - PATCH
    for gap in (down, right):
        assert gap.min() == GAP - 2 * JITTER > 0 and gap.max() == GAP + 2 * JITTER
        assert gap.double().mean().item() == pytest.approx(GAP, abs=0.05)
    moved = corners - corners[:, :1]
    assert len(moved.unique(dim=0)) > 1000


def test_in_the_papers_column_34_pixels_lie_between_patches():
    args = arguments("context_prediction", "--recipe", "paper", "--data", "emoji")
    assert args.gap - 2 * args.jitter == 34 and context.room(args) >= 0


def edges_that_continue(args):
    """The mean over smooth images of the correlation between the right border of a patch and the
    left border of the next, minus that with the left border of the patch below it: how much better
    the edge tells the neighbour to the right from another one."""
    smooth = F.interpolate(noise(64, 3, 12, 12).float(), (SIZE, SIZE), mode="bicubic")
    corners = context.grid_corners(rand(64), args)
    patches = context.cut_patches(smooth, corners, args.patch)
    edge = patches[:, 0, :, :, -1]
    score = []
    for other in (1, 3):
        both = torch.stack([edge, patches[:, other, :, :, 0]]).flatten(2)
        both = F.normalize(both - both.mean(2, keepdim=True), dim=2)
        score.append(both.prod(0).sum(1).mean())
    return score[0] - score[1]


def test_edges_continue_only_without_gap_and_jitter():
    args = arguments("context_prediction", "--gap", 6, "--jitter", 2, "--patch", 10)
    assert abs(edges_that_continue(args)) < 0.25
    args.gap = args.jitter = 0
    assert edges_that_continue(args) > 0.75


# -------- Resampling ------------------------------------------------------------------------------


def test_resampling_is_resizing_down_and_up(matrices):
    """Against torch's antialiased bicubic, for every side; the last changes nothing."""
    x = images(1, 3, PATCH, PATCH)
    for side in range(1, PATCH + 1):
        matrix = matrices[side - 1]
        small = F.interpolate(x, (side, side), mode="bicubic", antialias=True)
        expected = F.interpolate(small, (PATCH, PATCH), mode="bicubic", antialias=True)
        torch.testing.assert_close(matrix @ x @ matrix.mT, expected, rtol=0, atol=1e-5)
        assert torch.linalg.matrix_rank(matrix) <= side  # no more than that many pixels survive
    torch.testing.assert_close(matrices[-1], torch.eye(PATCH), **CLOSE)


def test_a_third_of_the_patches_is_resampled_to_uniform_areas(matrices):
    """Seen by what becomes of a single bright row: the columns of its matrices."""
    x = torch.zeros(4000, 9, 1, PATCH, PATCH)
    x[..., 0, 0] = 1
    shown = context.resample(x, rand(4000), matrices)[..., 0, :, :].flatten(0, 1)  # (36000, t, t)
    table = matrices[:, :, 0]
    table = table[:, :, None] * table[:, None, :]  # (t, t, t): of each side
    side = torch.cdist(shown.flatten(1), table.flatten(1)).argmin(1) + 1
    share = torch.bincount(side, minlength=PATCH + 1)[1:] / len(side)
    # the area of side k: from (k - 1)^2 to k^2 of t^2, from 100 / 96^2 on
    ends = (torch.arange(PATCH + 1) / PATCH).square().clamp(min=(10 / 96) ** 2)
    expected = ends.diff() / (1 - (10 / 96) ** 2) / 3
    expected[-1] += 2 / 3
    torch.testing.assert_close(share, expected, rtol=0, atol=0.01)


def fourier_noise(n, size, power):
    """Grey images (n, 1, size, size) of mean 0 and deviation 1 whose amplitudes fall with the
    frequency to that power, as those of photographs do."""
    row = torch.fft.fftfreq(size, dtype=torch.float64)
    frequency = (row[:, None].square() + row.square()).sqrt()
    frequency[0, 0] = math.inf  # no mean
    spectrum = torch.fft.fft2(noise(n, 1, size, size)) / frequency**power
    x = torch.fft.ifft2(spectrum).real
    return (x / x.std()).float()


def test_traces_of_compression_are_blurred_where_patches_are_resampled():
    """Images with and without a grid of blocks of 8 pixels, as JPEG leaves it. Second differences
    tell the patches of one from those of the other if they are left alone (two thirds are), and
    much worse if they are resampled. 0.5 is a guess; 576 patches have a standard error of 0.017."""
    args = arguments("context_prediction", "--size", 96, "--patch", 24)
    matrices = context.resampling(24)
    plain = fourier_noise(64, 96, 1.5)
    blocks = F.interpolate(noise(64, 1, 12, 12, seed=3).float(), scale_factor=8)  # nearest

    def roughness(x, p):
        patches = context.cut_patches(x, context.grid_corners(rand(64), args), 24)
        patches = context.resample(patches, rand(64, 1), matrices, p)
        return patches.diff(n=2, dim=4).square().mean((2, 3, 4)).flatten()

    def told(p):
        """How often a patch with blocks is rougher than one without."""
        rougher = roughness(plain + 0.3 * blocks, p)[:, None] > roughness(plain, p)
        return rougher.double().mean().item()

    left_alone = told(0)
    assert left_alone > 0.95
    assert told(1) - 0.5 < (left_alone - 0.5) / 3
    assert told(1) + 4 * 0.017 < told(1 / 3) < left_alone - 4 * 0.017


# -------- Colours ---------------------------------------------------------------------------------


def test_projection_is_that_of_the_paper():
    """B = I - a a' / (a' a) with a = (-1, 2, -1); grey stays, and to do it twice is to do it once.
    """
    a = np.array([-1.0, 2.0, -1.0])
    B = np.eye(3) - np.outer(a, a) / (a @ a)
    x = noise(2, 3, 4, 4)
    expected = torch.einsum("cd,ndhw->nchw", torch.from_numpy(B), x)
    found = context.project_colors(x)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(context.project_colors(found), found, **EXACT)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(context.project_colors(grey), grey, **EXACT)


def test_dropped_channels_are_gone():
    """One channel of each patch is as it was; the others do not depend on what they were, and are
    noise of 1/100 of its deviation around its mean. Which one is drawn for each patch."""
    x = images(40, 9, 3, PATCH, PATCH)
    y = context.drop_colors(x, rand(40))
    same = (x == y).flatten(3).all(3)  # (40, 9, 3)
    assert (same.sum(2) == 1).all()
    share = same.flatten(0, 1).float().mean(0)
    assert (share - 1 / 3).abs().max() < 0.1
    assert (same.float().argmax(2) != same[:, :1].float().argmax(2)).any(1).all()

    other = torch.where(same[..., None, None], x, images(40, 9, 3, PATCH, PATCH, seed=9))
    assert torch.equal(context.drop_colors(other, rand(40)), y)
    kept = x[same]  # (360, t, t)
    dropped = y[~same].unflatten(0, (-1, 2)) - kept.mean((1, 2))[:, None, None, None]
    ratio = dropped.std((2, 3)) / kept.std((1, 2))[:, None]
    assert ratio.mean().item() == pytest.approx(0.01, abs=2e-4)
    assert abs(dropped.mean() / dropped.std()) < 0.02
    mine = F.normalize((kept - kept.mean((1, 2), keepdim=True)).flatten(1), dim=1)
    theirs = F.normalize(dropped.flatten(2), dim=2)
    assert (theirs @ mine[:, :, None]).mean().abs() < 0.02  # no correlation with the source


def fringe(patches):
    """How far green lies to the right of magenta, in pixels, in each of the patches, by the slope:
    a colour that is moved by d differs from the others by -d times their derivative."""
    r, g, b = patches.unbind(2)
    magenta = (r + b) / 2
    slope = (magenta[..., 2:] - magenta[..., :-2]) / 2
    difference = (g - magenta)[..., 1:-1]
    return -(slope * difference).mean((2, 3)) / slope.square().mean((2, 3))


def test_the_fringes_of_a_lens_are_gone():
    """A lens that shows green a little larger than magenta: its fringe tells in which column of the
    grid a patch was. Projection removes it, and dropping leaves nothing to compare."""
    smooth = F.interpolate(noise(64, 1, 16, 16).float(), (96, 96), mode="bicubic")

    def seen(scale):
        affine = torch.eye(2, 3)[None] / scale
        grid = F.affine_grid(affine.expand(64, -1, -1), (64, 1, 96, 96), align_corners=False)
        return F.grid_sample(smooth, grid, mode="bicubic", align_corners=False)

    lens = torch.cat([seen(1), seen(1.02), seen(1)], 1)[:, :, 24:72, 24:72]
    corners = context.grid_corners(rand(64), arguments("context_prediction"))
    patches = context.cut_patches(lens, corners, PATCH)

    def correlation(patches):
        """Of the fringe with the patch's horizontal place."""
        place = corners[:, :, 1].float()
        return torch.corrcoef(torch.stack([fringe(patches).flatten(), place.flatten()]))[0, 1]

    assert correlation(patches) > 0.9
    projected = context.project_colors(patches)
    torch.testing.assert_close(projected[:, :, 1], projected[:, :, 0], **CLOSE)  # no fringe at all
    assert abs(correlation(context.drop_colors(patches, rand(64)))) < 0.15


@pytest.mark.parametrize("color", ["project", "drop"])
def test_views_are_nine_patches(matrices, color):
    """Without resampling and without colour there is nothing to take away: plain slices."""
    args = arguments("context_prediction", "--color", color, "--min-crop", 1)
    pixels = (255 * images(5, 1, SIZE, SIZE)).byte().expand(-1, 3, -1, -1)
    (x,) = make_views(pixels, context.views(args, torch.eye(PATCH).expand(PATCH, -1, -1)))
    assert x.shape == (5, 9, 3, PATCH, PATCH)
    corners = context.grid_corners(BatchRandom([0, 0, 2], 5), args)
    expected = context.cut_patches(pixels / 255, corners, PATCH)
    shown = torch.stack(list(context.show([x]).values()), 1)
    assert list(context.show([x])) == [f"patch {i}" for i in range(9)]
    if color == "project":
        torch.testing.assert_close(shown, expected, rtol=0, atol=1e-5)
    else:
        one = (shown - expected).abs().flatten(3).max(3).values < 1e-5
        assert (one.sum(2) == 1).all()
    (resampled,) = make_views(pixels, context.views(args, matrices))
    changed = (resampled != x).flatten(2).any(2).double().mean()
    assert 0.1 < changed < 0.6


# -------- The network -----------------------------------------------------------------------------


def test_brightness_and_contrast_of_a_patch_are_gone():
    x = images(4, 3, PATCH, PATCH)
    y = context.standardize(x)
    torch.testing.assert_close(y.mean((2, 3)), torch.zeros(4, 3), **CLOSE)
    variance = x.var((2, 3), correction=0).mean(1)
    square = y.square().mean((1, 2, 3))
    torch.testing.assert_close(square, variance / (variance + 0.01), rtol=1e-4, atol=0)
    torch.testing.assert_close(context.standardize(x + 3), y, rtol=0, atol=1e-5)
    torch.testing.assert_close(context.standardize(7 * x, eps=0), context.standardize(x, eps=0))
    flat = context.standardize(torch.full((1, 3, PATCH, PATCH), 0.7))
    assert not flat.any()


def test_patches_meet_only_in_pairs():
    """The logits of a pair depend on its two patches alone, and on their order."""
    torch.manual_seed(0)
    model = context.ContextPrediction("resnet14", SIZE, 16).eval()
    x = images(1, 9, 3, PATCH, PATCH)
    logits = model(x)
    assert logits.shape == (1, 40, 8)
    first, second, _ = context.neighbours()
    for patch in range(9):
        other = x.clone()
        other[:, patch] = images(1, 3, PATCH, PATCH, seed=5)
        changed = (model(other) - logits).abs().amax(2)[0] > 1e-6
        assert torch.equal(changed, (first == patch) | (second == patch))
    swapped = x[:, [1, 0, *range(2, 9)]]  # pair 0 is (0, 1), the first of patch 1 is (1, 0)
    back = (first == 1).nonzero()[0, 0]
    torch.testing.assert_close(model(swapped)[:, 0], logits[:, back], rtol=1e-4, atol=1e-5)
    assert (logits[:, 0] - logits[:, back]).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_gradient_reaches_every_parameter(arch):
    model = context.ContextPrediction(arch, SIZE, 16)
    logits = model(noise(4, 9, 3, PATCH, PATCH, dtype=torch.float32))
    context.position_loss(logits, model.places).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_saved_backbone_is_the_common_one():
    saved = context.backbone("resnet14", SIZE).state_dict()
    common.backbone("resnet14", SIZE).load_state_dict(saved)


# -------- Training --------------------------------------------------------------------------------


@pytest.mark.thorough
def test_loss_falls_where_the_place_is_written_into_the_patches(train):
    """Images that grow brighter from the centre on: the slope in a patch says where it lies."""
    row, column = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    bowl = ((row - 11.5).square() + (column - 11.5).square()) / 300
    pixels = (255 * bowl.clamp(0, 1)).byte().expand(48, 3, -1, -1).contiguous()
    split = Split(InMemory(pixels))
    flags = ["--size", 24, "--patch", 6, "--gap", 2, "--jitter", 0, "--min-crop", 1, "--dim", 32]
    flags += ["--batch", 24, "--epochs", 20, "--warmup", 0, "--lr", 0.5]
    run = train("context_prediction", *flags, data=Data("bowl", split, split, None), double=False)
    assert run.losses[0] > 1.9 and run.losses[-1] < 1.2


def test_the_picture_compares_with_the_network_before_training(monkeypatch, tmp_path):
    """Also in a run that was continued: what stands there as untrained is untrained."""
    weights = []
    shown = []
    embed = context.embed

    def listen(network, x):
        weights.append(next(network.parameters()).detach().clone())
        return embed(network, x)

    def see(path, rows, columns, note=""):
        shown.append((rows, columns))

    monkeypatch.setattr(context, "embed", listen)
    monkeypatch.setattr(context, "save_grid", see)
    results = {"knn20": 50.0, "knn200": 40.0, "linear": 60.0}
    monkeypatch.setattr(common, "evaluate", lambda *args, **options: dict(results))
    for name in ("draw_views", "draw_curve", "draw_neighbours"):
        monkeypatch.setattr(common, name, lambda *args: None)
    flags = ["--size", 16, "--patch", 4, "--gap", 1, "--jitter", 0, "--dim", 16, "--batch", 12]
    flags += ["--epochs", 1, "--workers", 0, "--out", tmp_path / "run"]
    for _ in range(2):
        found = call_main("context_prediction", *flags)
        assert found.code == 0, found.err
    trained, untrained, trained_again, untrained_again = weights
    assert torch.equal(untrained, untrained_again) and torch.equal(trained, trained_again)
    assert not torch.equal(trained, untrained)
    saved = torch.load(tmp_path / "run" / "untrained.pt", weights_only=True)
    assert torch.equal(saved["conv1.weight"], untrained)

    rows, columns = shown[0]
    assert len(rows) == 10 and columns[0] == "patch" and len(columns) == 9
    for patch, *others in rows:
        assert patch.shape == (3, 4, 4) and 0 <= patch.min() and patch.max() <= 1
        assert len(others) == 8 and patch.std() > 0.01  # none is blank


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--jitter", 2), "--jitter 2: choose less than half of --gap 4"),
        (("--patch", 14), "--size 48: choose at least 52, for three patches of --patch 14"),
        (("--gap", 0), "--gap 0: choose at least 1"),
        (("--patch", 1), "--patch 1: choose at least 2"),
        (("--arch", "vit_micro", "--patch", 10), "--patch 10: choose a multiple of 4"),
        (("--color", "grey"), "--color: invalid choice: 'grey'"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("context_prediction", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err
