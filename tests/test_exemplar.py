"""Exemplar-CNN: which patches become classes, the transformations against colorsys, numpy and plain
slicing, and that a class is one patch from the first step to the last."""

import colorsys
import math

import numpy as np
import pytest
import torch
from conftest import CPU, arguments, call_main, light, noise, tiny_data, write_images

import common
from common import Data, InMemory, Split, make_views
from kernels.views import BatchRandom, denormalize
from methods import exemplar

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SEEDS = 24
FLAGS = ("--size", 16, "--seeds", SEEDS, "--batch", 12)


class Given:
    """Random numbers that are given: each call of uniform returns the next."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low=0.0, high=1.0, columns=()):
        return self.values.pop(0)


def logs(*factors):
    """What log_uniform makes these factors of, for one image."""
    return torch.tensor([factors], dtype=torch.float64).log()


def unchanged(x, *others):
    return x


def colours(*shape, seed=0):
    return noise(*shape, seed=seed).sigmoid()


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """A network that guesses has log P; one that favours the right class of P by a has
    log(1 + (P - 1) e^-a). A mean over the images."""
    label = torch.tensor([3, 0, 7])
    right = torch.eye(8, dtype=torch.float64)[label]  # (3, 8)

    def check(logits, expected):
        torch.testing.assert_close(exemplar.exemplar_loss(logits, label).item(), expected, **EXACT)

    check(0 * right, math.log(8))
    check(4 * right, math.log1p(7 * math.exp(-4)))
    mixed = 4 * right
    mixed[1] = 0
    assert f"{math.log(exemplar.SETTINGS['seeds'][0]):.2f} for 2,000 seeds" in exemplar.__doc__
    check(mixed, (2 * math.log1p(7 * math.exp(-4)) + math.log(8)) / 3)


# -------- Seed patches ----------------------------------------------------------------------------


def test_gradient_energy_by_hand():
    """A ramp of 0.1 per pixel to the right and 0.2 down has the squared gradient 0.05."""
    row, column = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    ramp = (0.2 * row + 0.1 * column).expand(3, 6, 6)
    flat = torch.full((3, 6, 6), 0.7)
    board = ((row + column) % 2).expand(3, 6, 6)  # 1 from each pixel to the next, both ways
    energy = exemplar.gradient_energy(torch.stack([ramp, flat, board]))
    assert energy.tolist() == pytest.approx([0.05, 0, 2], abs=1e-6)


def test_patches_are_drawn_in_proportion_to_their_energy():
    """Of three with energies 1, 2 and 5, two at a time: i is drawn first with probability e_i / 8,
    then j with e_j / (8 - e_i). 4,000 draws have a standard error below 0.008."""
    energy = torch.tensor([1.0, 2.0, 5.0])
    found = torch.zeros(3, 3)
    for seed in range(4000):
        first, second = exemplar.draw_by_energy(energy, 2, BatchRandom([seed], 3))
        found[first, second] += 1 / 4000
    expected = (energy / 8)[:, None] * energy / (8 - energy)[:, None]
    assert (found - expected.fill_diagonal_(0)).abs().max() < 4 * 0.008
    assert not found.diagonal().any()


def test_a_seed_without_resizing_is_a_slice_and_its_margin_repeats_the_border():
    """Images of 20 pixels, seeds of 10, margins of 6."""
    x = colours(2, 3, 20, 20).float()
    u = torch.tensor([[0.0, 0.0, 0.999], [0.0, 0.5, 0.5]], dtype=torch.float64)
    windows = exemplar.cut_windows(x, u, 0.5, 10)
    assert windows.shape == (2, 3, 22, 22) and exemplar.window_side(10) == 22
    torch.testing.assert_close(windows[0, :, 6:16, 6:16], x[0, :, :10, 10:], rtol=0, atol=1e-6)
    torch.testing.assert_close(windows[1, :, 6:16, 6:16], x[1, :, 5:15, 5:15], rtol=0, atol=1e-6)
    # the second lies 5 pixels from each border, one less than its margin
    torch.testing.assert_close(windows[1, :, 1:21, 1:21], x[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(windows[1, :, 0], windows[1, :, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(windows[0, :, 6:16, 16:], x[0, :, :10, -1:].expand(-1, -1, 6))


def test_sides_of_seeds_go_from_the_smallest_to_the_whole_image():
    x = colours(1, 3, 20, 20).float()
    whole = exemplar.cut_windows(x, torch.tensor([[1.0, 0.3, 0.8]]), 0.5, 20)  # side 20: no place
    torch.testing.assert_close(whole[:, :, 12:32, 12:32], x, rtol=0, atol=1e-6)
    # a seed of 20 pixels, made of 10: the same picture as the resized slice
    small = exemplar.cut_windows(x, torch.tensor([[0.0, 0.0, 0.0]]), 0.5, 20)
    coarse = torch.nn.functional.avg_pool2d(small[:, :, 12:32, 12:32], 2)
    assert (coarse - x[:, :, :10, :10]).abs().mean() < 0.05
    assert (coarse - x[:, :, 10:, 10:]).abs().mean() > 0.15


def half_flat():
    """48 images, every second one flat, each flat one of another colour."""
    pixels = 255 * colours(48, 3, 32, 32)
    pixels[::2] = pixels[::2, :, :1, :1]
    split = Split(InMemory(pixels.byte()))
    return Data("half flat", split, split, None)


def test_flat_patches_become_no_classes(monkeypatch):
    """They could not be told apart by what they show: with the gradient's weights there are none
    among the seeds, without about half are flat."""
    args = arguments("exemplar", *FLAGS)

    def flat_seeds():
        windows = exemplar.seed_windows(half_flat().train, args, CPU)
        assert windows.shape == (SEEDS, 3, 36, 36) and windows.dtype == torch.uint8
        return (windows == windows[:, :, :1, :1]).flatten(1).all(1).sum()

    assert flat_seeds() == 0
    monkeypatch.setattr(exemplar, "gradient_energy", lambda x: torch.ones(len(x)))
    assert 6 <= flat_seeds() <= 18


def test_there_are_as_many_seeds_as_asked_for_and_all_differ():
    """Also more than images, and where the last batch of images is incomplete."""
    for seeds, batch in ((24, 24), (60, 10), (14, 13)):
        args = arguments("exemplar", "--size", 16, "--seeds", seeds, "--batch", batch)
        windows = exemplar.seed_windows(tiny_data().train, args, CPU)
        assert len(windows) == seeds == len(windows.unique(dim=0))


def test_seeds_of_image_files(tmp_path):
    """As those of the same images in memory, but for the rounding of two ways to resize."""
    folder = write_images(tmp_path / "images", 24)
    args = arguments("exemplar", *FLAGS, "--workers", 0)
    files = common.load_data(str(folder), "", CPU).train
    found = exemplar.seed_windows(files, args, CPU).int()
    in_memory = exemplar.seed_windows(tiny_data().train, args, CPU).int()
    same = (found[:, None] - in_memory).abs().flatten(2).amax(2) <= 3
    assert same.any(1).sum() >= 20  # a few draws may fall the other way


# -------- Transformations -------------------------------------------------------------------------


def warped(x, shift=(0, 0), scale=1, angle=0.0, size=10):
    """Windows x as warp() shows them with these parameters."""
    given = [torch.tensor([shift]), logs(scale)[:, 0], torch.tensor([angle])]
    return exemplar.warp(x, Given(*given), size)


def test_places_turns_and_scales_of_a_patch():
    """Windows of 22 pixels around seeds of 10."""
    x = colours(1, 3, 22, 22)
    middle = x[:, :, 6:16, 6:16]
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(warped(x), middle, **close)
    right_and_up = warped(x, shift=(0.2, -0.2))
    torch.testing.assert_close(right_and_up, x[:, :, 4:14, 8:18], **close)
    # a quarter, of which only 20 degrees are ever used: the patch turns counter-clockwise
    torch.testing.assert_close(warped(x, angle=math.pi / 2), middle.rot90(1, (2, 3)), **close)
    # a frame of twice the side meets pixels at their corners: means of four
    twice = torch.nn.functional.avg_pool2d(x[:, :, 1:21, 1:21], 2)
    torch.testing.assert_close(warped(x, scale=2), twice, **close)


def test_no_patch_reaches_beyond_its_window(monkeypatch):
    """Not even at the largest shift, scale and angle; at a little more it would."""
    reach = []
    affine_grid = exemplar.F.affine_grid

    def see(*args, **options):
        grid = affine_grid(*args, **options)
        reach.append(grid.abs().max().item())
        return grid

    monkeypatch.setattr(exemplar.F, "affine_grid", see)
    for size in (16, 32, 96):
        x = colours(1, 3, exemplar.window_side(size), exemplar.window_side(size))
        for sign in (1, -1):
            warped(x, (0.2, 0.2), 1.4, sign * exemplar.ANGLE, size)
    assert 0.93 < max(reach) <= 1


def test_first_contrast_acts_along_the_principal_components():
    """Factors of 1 change nothing. Others multiply the coordinates of every pixel's distance from
    the mean: by numpy, one pixel at a time."""
    windows = (255 * colours(3, 3, 8, 8)).byte()
    mean, directions = exemplar.principal_colours(windows)
    pixels = windows.permute(0, 2, 3, 1).reshape(-1, 3).double() / 255
    assert mean.flatten().tolist() == pytest.approx(pixels.mean(0).tolist(), abs=1e-6)
    variance = np.cov(pixels.T.numpy(), bias=True)
    along = directions.double().numpy() @ variance @ directions.double().numpy().T
    np.testing.assert_allclose(along, np.diag(np.linalg.eigvalsh(variance)), rtol=0, atol=1e-6)

    mean, directions = mean.double(), directions.double()
    x = 0.3 + 0.4 * colours(1, 3, 4, 5)  # so that nothing is clipped
    same = exemplar.contrast_of_components(x, Given(logs(1, 1, 1)), mean, directions)
    torch.testing.assert_close(same, x, rtol=0, atol=1e-6)
    factors = np.array([0.6, 1.2, 0.8])
    found = exemplar.contrast_of_components(x, Given(logs(*factors)), mean, directions)
    basis = directions.numpy()
    centre = mean.flatten().numpy()
    for i in range(4):
        for j in range(5):
            coordinates = basis @ (x[0, :, i, j].numpy() - centre)
            expected = centre + basis.T @ (factors * coordinates)
            np.testing.assert_allclose(found[0, :, i, j].numpy(), expected, rtol=0, atol=1e-6)


def by_colorsys(pixel, power, factor, offset):
    """A pixel (r, g, b) after contrast 2."""
    h, *both = colorsys.rgb_to_hsv(*pixel)
    both = [c**p * f + o for c, p, f, o in zip(both, power, factor, offset)]
    return colorsys.hsv_to_rgb(h, *[min(max(c, 0), 1) for c in both])


@pytest.mark.parametrize(
    "power, factor, offset",
    [
        ((1, 1), (1, 1), (0, 0)),
        ((0.25, 4), (0.7, 1.4), (0.1, -0.1)),
        ((4, 0.25), (1.4, 0.7), (-0.1, 0.1)),
        ((0.5, 2), (1.1, 0.9), (0.05, -0.02)),
    ],
)
def test_second_contrast_is_that_of_colorsys(power, factor, offset):
    """With black, white, grey and a pure colour among the pixels: powers of 0, and no hue."""
    x = colours(1, 3, 4, 6)
    x[0, :, 0, 0] = 0
    x[0, :, 0, 1] = 1
    x[0, :, 0, 2] = 0.4
    x[0, :, 0, 3] = torch.tensor([0.0, 1.0, 0.0])
    given = Given(logs(*power), logs(*factor), torch.tensor([offset], dtype=torch.float64))
    found = exemplar.contrast_of_saturation_and_value(x, given)
    pixels = x[0].permute(1, 2, 0).reshape(-1, 3).tolist()
    expected = torch.tensor([by_colorsys(pixel, power, factor, offset) for pixel in pixels])
    found = found[0].permute(1, 2, 0).reshape(-1, 3).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("hue, offset", [(0.97, 0.1), (0.03, -0.1), (0.4, 0.05)])
def test_the_hue_turns_around_the_circle_as_in_colorsys(monkeypatch, hue, offset):
    """All copies are turned by the offset that was drawn, between -0.1 and 0.1; 0.97 + 0.1 = 0.07.
    Grey has no hue and stays."""
    pixel = colorsys.hsv_to_rgb(hue, 0.6, 0.8)
    windows = torch.tensor(pixel).view(1, 3, 1, 1).expand(1, 3, 36, 36).clone()
    windows[:, :, :, 20:] = 0.5
    drawn = []

    class Drawn:
        def uniform(self, low=0.0, high=1.0, columns=()):
            drawn.append((low, high))
            return torch.tensor([offset])

    for name in ("contrast_of_components", "contrast_of_saturation_and_value"):
        monkeypatch.setattr(exemplar, name, unchanged)
    monkeypatch.setattr(exemplar, "warp", lambda x, rand, size: x[:, :, 10:26, 10:26])
    ((_, augment), *_) = exemplar.views(arguments("exemplar", *FLAGS), None, None)
    shown = denormalize(augment(windows, Drawn()))[0]
    assert drawn == [(-0.1, 0.1)]
    expected = torch.tensor(colorsys.hsv_to_rgb((hue + offset) % 1, 0.6, 0.8))
    torch.testing.assert_close(shown[:, 8, 4], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(shown[:, 8, 12], torch.full((3,), 0.5), rtol=0, atol=1e-5)


def copies_of(windows, seed=0, **patches):
    """Copies of windows, as the network sees them: (copies, n, 3, 16, 16) in [0, 1]."""
    args = arguments("exemplar", *FLAGS, "--copies", 6)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            patch.setattr(exemplar, name, value)
        transformed = exemplar.views(args, *exemplar.principal_colours(windows))
        shown = make_views(windows, transformed, seed)
    return denormalize(torch.stack(shown))


NO_COLOUR = {
    "contrast_of_components": unchanged,
    "contrast_of_saturation_and_value": unchanged,
    "shift_hue": unchanged,
}


@pytest.fixture(scope="module")
def windows():
    return exemplar.seed_windows(tiny_data().train, arguments("exemplar", *FLAGS), CPU)


def test_copies_differ_from_each_other_and_without_transformations_they_are_the_seed(windows):
    shown = copies_of(windows)
    assert shown.isfinite().all() and 0 <= shown.min() and shown.max() <= 1
    for i in range(6):
        assert (shown[i] - shown[i - 1]).abs().mean((1, 2, 3)).min() > 0.01

    centre = {"warp": lambda x, rand, size: x[:, :, 10:26, 10:26]}
    same = copies_of(windows, **NO_COLOUR, **centre)
    seeds = windows[:, :, 10:26, 10:26] / 255
    torch.testing.assert_close(same, seeds.expand_as(same), rtol=0, atol=1e-6)


def named_by_mean_colour(windows, **patches):
    """The share of copies whose mean colour is nearest to that of their own seed."""
    shown = copies_of(windows, **patches).mean((3, 4))  # (6, SEEDS, 3)
    seeds = (windows[:, :, 10:26, 10:26] / 255).mean((2, 3))
    nearest = torch.cdist(shown, seeds.expand(6, -1, -1)).argmin(2)
    return (nearest == torch.arange(SEEDS)).double().mean()


def test_the_mean_colour_gives_the_class_away_only_without_changes_of_colour():
    """Seeds that are rough surfaces, each of its own colour: without changes of colour nearly every
    copy is named by its mean colour alone, with them few are (a guess: 4 %)."""
    surfaces = 0.8 * colours(SEEDS, 3, 1, 1) + 0.2 * colours(SEEDS, 3, 36, 36, seed=1)
    windows = (255 * surfaces).byte()
    assert named_by_mean_colour(windows, **NO_COLOUR) > 0.95
    assert named_by_mean_colour(windows) < 0.25


# -------- Training --------------------------------------------------------------------------------


def test_a_class_is_the_same_patch_in_all_epochs(train, monkeypatch, windows):
    """Each image that the network gets shows, but for its transformation, which is taken away in
    this test, the seed patch that the loss is told. All classes are met once in an epoch."""
    seen = []
    told = []
    forward = exemplar.Exemplar.forward
    loss = exemplar.exemplar_loss

    def see(model, x):
        seen.append(denormalize(x))
        return forward(model, x)

    def listen(logits, label):
        assert logits.shape == (36, SEEDS)
        told.append(label)
        return loss(logits, label)

    monkeypatch.setattr(exemplar.Exemplar, "forward", see)
    flags = [*FLAGS, "--copies", 3, "--epochs", 2]
    patches = dict(NO_COLOUR, exemplar_loss=listen)
    patches["warp"] = lambda x, rand, size: x[:, :, 10:26, 10:26]
    train("exemplar", *flags, double=False, **patches)
    assert len(seen) == 4
    seeds = windows[:, :, 10:26, 10:26] / 255
    for x, label in zip(seen, told):
        torch.testing.assert_close(x, seeds[label], rtol=0, atol=1e-6)
    for epoch in (told[:2], told[2:]):
        assert sorted(torch.cat(epoch).tolist()) == sorted(3 * [*range(SEEDS)])


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_gradient_reaches_every_parameter(arch):
    model = exemplar.Exemplar(arch, 16, SEEDS)
    logits = model(noise(8, 3, 16, 16, dtype=torch.float32))
    assert logits.shape == (8, SEEDS)
    exemplar.exemplar_loss(logits, torch.arange(8)).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--seeds", 1), "--seeds 1: choose at least 2"),
        (("--size", 1), "--size 1: choose at least 2"),  # one pixel has no neighbour: no gradient
        (("--min-seed", 0), "--min-seed 0: choose at least 0.1 and at most 1"),
        (("--copies", 0), "--copies 0: choose at least 1"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("exemplar", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err


def test_a_batch_larger_than_the_seeds_is_refused(tmp_path):
    found = call_main("exemplar", *FLAGS, "--seeds", 8, "--out", tmp_path / "run")
    assert found.code == 1 and not (tmp_path / "run").exists()
    assert found.err == "error: --batch 12: choose at most 8, the number of --seeds\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--seeds", 97), "--seeds 97: choose at most 96, 4 for each image, which is how many squ"),
        (("--seeds", 25, "--min-seed", 1), "--seeds 25: choose at most 24, 1 for each image"),
        (("--seeds", 217, "--min-seed", 0.3), "--seeds 217: choose at most 216, 9 for each image"),
        (("--seeds", 60, "--batch", 30), "--batch 30: choose 2 to 24, the number of images"),
    ],
)
def test_more_than_the_images_hold_is_refused_before_the_search(tmp_path, flags, words):
    """Of 24 images. Four squares with half of the side lie side by side in an image, nine of 0.3
    of it; a square with all of it is the image."""

    def searched(*args):
        raise AssertionError("the search has begun")

    flags = [*FLAGS, *flags, "--out", tmp_path / "run"]
    found = call_main("exemplar", *flags, cut_windows=searched)
    assert found.code == 1 and words in found.err and found.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_picture_shows_the_seed_without_margins_and_its_copies(tmp_path, monkeypatch):
    """Copies that are not transformed are the seed that comes first."""
    drawn = {}

    def see(path, rows, columns, note=""):
        drawn[path.name] = rows, columns

    results = {"knn20": 50.0, "knn200": 40.0, "linear": 60.0}
    monkeypatch.setattr(common, "evaluate", lambda *args, **options: dict(results))
    monkeypatch.setattr(common, "save_grid", see)
    for name in ("draw_curve", "draw_neighbours"):
        monkeypatch.setattr(common, name, lambda *args: None)
    flags = [*FLAGS, "--copies", 2, "--epochs", 1, "--warmup", 0, "--workers", 0]
    patches = light("exemplar") | NO_COLOUR
    patches["warp"] = lambda x, rand, size: x[:, :, 10:26, 10:26]
    found = call_main("exemplar", *flags, "--out", tmp_path / "run", **patches)
    assert found.code == 0, found.err
    rows, columns = drawn["views.png"]
    assert columns == ["image", "copy 1", "copy 2"] and len(rows) == 8
    for seed, *copies in rows:
        for copy in copies:
            torch.testing.assert_close(copy, seed, rtol=0, atol=1e-6)
