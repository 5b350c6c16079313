"""Counting: the loss by hand and its gradients, tiles and reduced images, what the two images of a
pair must share, what histograms get, and the picture of what is counted."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, call_main, noise, tiny_data
from PIL import Image
from sklearn.linear_model import LogisticRegression
from test_context_prediction import fourier_noise, fringe
from torch import nn

import common
from kernels.views import BatchRandom, denormalize, luminance, normalize
from methods import counting

EXACT = {"rtol": 1e-12, "atol": 1e-12}
M = 10.0


def loss_of(whole, tiles, other, margin=M):
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (whole, tiles, other)]
    return counting.counting_loss(*tensors, margin).item()


def augment(images, seed=0, **flags):
    """What counting shows of images (n, 3, S, S): (n, 5, 3, S / 2, S / 2)."""
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    ((_, function),) = counting.views(arguments("counting", "--size", images.shape[3], *words))
    return function(images, BatchRandom([seed], len(images)))


def photos(n, size=16, seed=0):
    """Colour images with numbers between 0.2 and 0.8."""
    return 0.2 + 0.6 * noise(n, 3, size, size, seed=seed).sigmoid().float()


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """The tiles count 1 + 0 + 2 + 0 and 0 + 1 + 0 + 0: s = (3, 1). Ten is the margin."""
    tiles = [[[1, 0], [0, 1], [2, 0], [0, 0]]]
    assert loss_of([[3, 1]], tiles, [[3, 1]]) == 10  # right, but not different from the other
    assert loss_of([[3, 1]], tiles, [[0, 0]]) == 0  # 9 + 1 = 10: just far enough
    assert loss_of([[3, 1]], tiles, [[1, 1]]) == 6  # 10 - 4
    assert loss_of([[2, 3]], tiles, [[9, 9]]) == 1 + 4
    assert loss_of([[2, 3]], tiles, [[1, 1]], margin=5) == 5 + 1
    both = loss_of([[3, 1], [2, 3]], tiles * 2, [[1, 1], [9, 9]])
    assert both == (6 + 5) / 2


@pytest.mark.parametrize("c", [0.0, 0.2, 1.0, 1.5])
def test_loss_of_constant_counts(c):
    """Counts that are the same c in d features for every picture: 9 d c^2 + max(0, 10 - 9 d c^2).
    Counting nothing costs exactly 10, and no constant costs less."""
    d = 3
    squares = 9 * d * c**2
    found = loss_of([[c] * d], [[[c] * d] * 4], [[c] * d])
    assert found == pytest.approx(squares + max(0, M - squares))
    assert found >= 10 - 1e-12


def test_margin_is_on_the_squared_distance_of_all_features_together():
    """Two features, each 2.5 away: 12.5 is more than 10, though each alone has 6.25."""
    assert loss_of([[0, 0]], [[[0, 0]] * 4], [[2.5, 2.5]]) == 0


def test_gradients():
    """Of the tiles, each has the gradient of their sum. Beyond the margin the other image has none;
    within it, it is pushed away."""
    whole = noise(1, 3).requires_grad_()
    tiles = noise(1, 4, 3, seed=1).requires_grad_()
    for length, active in ((1.0, True), (5.0, False)):
        s = tiles.detach().sum(1)
        other = (s + length * F.normalize(noise(1, 3, seed=2))).requires_grad_()
        whole.grad = tiles.grad = None
        counting.counting_loss(whole, tiles, other, M).backward()
        same = 2 * (whole.detach() - s)
        different = -2 * (other.detach() - s) * active
        torch.testing.assert_close(whole.grad, same, **EXACT)
        torch.testing.assert_close(other.grad, different, **EXACT)
        expected = -(same + different)[:, None].expand(-1, 4, -1)
        torch.testing.assert_close(tiles.grad, expected, **EXACT)


# -------- The views -------------------------------------------------------------------------------


def test_tiles_are_a_partition_in_reading_order():
    x = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6)
    tiles = counting.cut_tiles(x)
    assert tiles.shape == (2, 4, 3, 3, 3)
    expected = [x[..., :3, :3], x[..., :3, 3:], x[..., 3:, :3], x[..., 3:, 3:]]
    for tile, part in zip(tiles.unbind(1), expected):
        assert torch.equal(tile, part)


def test_counts_that_are_sums_over_pixels_add_up():
    """What the loss asks for is possible: the number of bright pixels of the image is that of its
    tiles together."""
    x = (noise(5, 3, 8, 8) > 0).double()
    whole = x.sum((2, 3))
    tiles = counting.cut_tiles(x).sum((3, 4))
    far = whole + 100
    assert counting.counting_loss(whole, tiles, far, M).item() == 0


def test_reduced_images_are_pils():
    """Each of the four filters as PIL applies it to an image; four different results."""
    image = photos(1, 16)[0, 0]
    names = ("BOX", "BILINEAR", "BICUBIC", "LANCZOS")
    found = []
    for matrix, name in zip(counting.reducers(16), names, strict=True):
        ours = matrix @ image @ matrix.T
        theirs = Image.fromarray(image.numpy()).resize((8, 8), Image.Resampling[name])
        np.testing.assert_allclose(ours.numpy(), np.array(theirs), atol=1e-6)
        found.append(ours)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])
    box = F.avg_pool2d(image[None], 2)[0]
    torch.testing.assert_close(found[0], box)


def test_views_are_the_whole_and_its_tiles():
    """Without grey: the tiles are the image, possibly mirrored, and the first picture is that image
    reduced by one of the four filters."""
    x = photos(40)
    shown = denormalize(augment(x, gray=0).flatten(0, 1)).unflatten(0, (-1, 5))
    matrices = counting.reducers(16)[:, None]
    used = set()
    for image, pictures in zip(x, shown):
        tiles = pictures[1:]
        back = torch.cat([torch.cat([*tiles[:2]], 2), torch.cat([*tiles[2:]], 2)], 1)
        mirrored = (back - image.flip(2)).abs().max() < 1e-5
        assert mirrored or (back - image).abs().max() < 1e-5
        reduced = (matrices @ back @ matrices.mT).clamp(0, 1)
        distance = (reduced - pictures[0]).abs().amax((1, 2, 3))
        assert distance.min() < 1e-5
        used.add((bool(mirrored), distance.argmin().item()))
    assert len(used) == 8


def is_grey(shown):
    """(n, 5) bool: which pictures have three equal channels."""
    pictures = denormalize(shown.flatten(0, 1))
    return (pictures - pictures[:, :1]).abs().amax((1, 2, 3)).view(-1, 5) < 1e-5


def test_grey_pictures_show_no_colour_fringes():
    """The shortcut of chromatic aberration: a lens that shows green a little larger than magenta.
    In colour the fringe of a tile tells on which side of the image it was; in grey there is none.
    """
    smooth = F.interpolate(noise(64, 1, 12, 12).sigmoid().float(), (64, 64), mode="bicubic")
    affine = (torch.eye(2, 3) / 1.04).expand(64, -1, -1)
    grid = F.affine_grid(affine, (64, 1, 64, 64), align_corners=False)
    larger = F.grid_sample(smooth, grid, mode="bicubic", align_corners=False)
    lens = torch.cat([smooth, larger, smooth], 1).clamp(0, 1)

    def fringes(gray):
        pictures = denormalize(augment(lens, gray=gray).flatten(0, 1))
        return fringe(pictures.unflatten(0, (-1, 5))[:, 1:])  # (64, 4)

    in_colour = fringes(0)
    right = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(64, -1)
    found = torch.corrcoef(torch.stack([in_colour.flatten(), right.flatten()]))[0, 1]
    assert found > 0.9
    assert fringes(1).abs().max() < 1e-3 * in_colour.abs().max()


REDUCERS = counting.reducers


def told_by_spectrum(kinds, monkeypatch, n=400):
    """The share of pictures, not seen before, of which a logistic regression says rightly whether
    they are an image, reduced by one of the filters `kinds`, or its tile. It knows the mean power
    in each of 11 rings of frequencies alone."""
    matrices = REDUCERS(32)[list(kinds)].repeat(4 // len(kinds), 1, 1)
    monkeypatch.setattr(counting, "reducers", lambda size: matrices)
    noisy = fourier_noise(2 * n, 64, 1.0)[..., :32, :32]  # borders do not meet
    images = 0.5 + 0.12 * noisy.expand(-1, 3, -1, -1)
    pictures = augment(images.clamp(0, 1), gray=1)[:, :2, 0]  # (2 n, 2, 16, 16)
    power = torch.fft.fft2(pictures).abs().square().flatten(2)  # (2 n, 2, 256)

    row = 16 * torch.fft.fftfreq(16)
    ring = (row[:, None].square() + row.square()).sqrt().round().long().flatten()
    rings = F.one_hot(ring).float()[:, 1:]  # (256, 11), without the mean
    numbers = (power @ rings / rings.sum(0)).clamp(min=1e-12).log()  # (2 n, 2, 11)

    is_tile = np.tile([0, 1], n)
    model = LogisticRegression(max_iter=1000)
    model.fit(numbers[:n].flatten(0, 1), is_tile)
    return model.score(numbers[n:].flatten(0, 1), is_tile)


def test_four_filters_hide_which_picture_was_reduced_better_than_one(monkeypatch):
    """The shortcut of the downsampler: a filter leaves its trace in the high frequencies, by which
    a whole image is told from a tile. The mixture makes this harder, but not impossible. 800
    pictures have a standard error of at most 0.018."""
    linear = told_by_spectrum([1], monkeypatch)
    mixed = told_by_spectrum([0, 1, 2, 3], monkeypatch)
    assert linear > 0.95
    assert 0.5 + 4 * 0.018 < mixed < linear - 4 * 0.018


def test_a_pair_shares_grey_and_filter_but_not_the_flip():
    """If one image of a pair were grey and the other in colour, that alone would make their counts
    differ; two thirds of the pairs are grey, whole and tiles alike."""
    shown = augment(photos(600, 4), gray=0.67)
    grey = is_grey(shown)
    assert torch.equal(grey, grey[:, :1].expand(-1, 5))
    pairs = grey[:, 0].view(300, 2)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    # 0.67 of 300: a deviation of 8.1
    assert abs(pairs[:, 0].sum().item() - 201) < 4 * 8.1

    # The same image twice, in colour: equal up to a mirror, so reduced by the same filter.
    image = photos(1).expand(64, -1, -1, -1)
    shown = augment(image, gray=0)
    whole = shown[:, 0].unflatten(0, (32, 2))
    equal = (whole[:, 0] - whole[:, 1]).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (whole[:, 0] - whole[:, 1].flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (equal | mirrored).all() and equal.any() and mirrored.any()
    assert len(whole[:, 0, 0, 0, 0].unique()) > 4


SIX_HUES = torch.tensor(
    [[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]], dtype=torch.float32
)


def one_hue_each(n):
    """Images (n, 3, 16, 16) of rough surfaces, all equally bright. The colour of each is one of six
    hues, and the two of a pair differ."""
    hue = SIX_HUES[torch.arange(n) % 6]
    hue = hue - luminance(hue[:, :, None, None]).flatten(1)  # (n, 3), without brightness
    surface = 0.5 + 0.1 * noise(n, 1, 16, 16).float().tanh()
    return surface + 0.2 * hue[:, :, None, None]


def hue_counts(shown):
    """A histogram in place of a network: the share of the pixels (n, 5, 3, h, w) of which each of
    the six hues is the nearest; a grey pixel has none. (n, 5, 6)."""
    pixels = denormalize(shown.flatten(0, 1)).unflatten(0, (-1, 5))
    colour = pixels - pixels.mean(2, keepdim=True)
    hues = SIX_HUES - SIX_HUES.mean(1, keepdim=True)
    nearest = torch.einsum("npchw,kc->npkhw", colour, hues).argmax(2)
    counted = F.one_hot(nearest, 6) * (colour.abs().amax(2) > 0.02)[..., None]
    return counted.double().mean((2, 3))


def loss_of_counts(phi):
    """The loss of pictures' counts (n, 5, d), as main() puts them together."""
    partner = torch.arange(len(phi)) ^ 1
    return counting.counting_loss(phi[:, 0], phi[:, 1:], phi[partner, 0], M).item()


@pytest.mark.parametrize("gray", [0, 0.67, 1])
def test_counting_colours_pays_in_colour_and_not_in_grey(gray):
    """The shortcut of the colour histogram. Of a colour an image has the same share as each of its
    tiles, so s is four times phi(D x), and the equation does not hold: |phi(D x) - s|^2 = 9 a^2 for
    a count of a. But a partner of another colour is 17 a^2 away, so that with a^2 = 10 / 17 the
    loss is 90 / 17 = 5.3, half of that of counting nothing. If it also knew the reduced picture
    from the tiles, by a trace of the filter, four times that count would make it 0. Of a grey pair
    it counts nothing, and the loss is M."""
    shown = augment(one_hue_each(240), gray=gray)
    grey = is_grey(shown)[:, 0].double().mean().item()
    assert abs(grey - gray) <= 4 * (gray * (1 - gray) / 120) ** 0.5  # of 120 pairs
    share = hue_counts(shown)  # (240, 5, 6)
    a = (10 / 17) ** 0.5
    assert loss_of_counts(a * share) == pytest.approx(grey * M + (1 - grey) * 90 / 17, abs=0.01)
    told = share * torch.tensor([4.0, 1, 1, 1, 1])[:, None]
    assert loss_of_counts(a * told) == pytest.approx(grey * M, abs=0.01)


def test_counting_brightness_pays_in_grey_too():
    """Nothing is done about histograms of brightness: for dark and bright images in pairs they have
    the loss that those of colours have in colour."""
    surface = 0.1 * noise(240, 1, 16, 16).float().tanh()
    level = torch.tensor([0.3, 0.7]).repeat(120).view(-1, 1, 1, 1)
    shown = augment((level + surface).expand(-1, 3, -1, -1), gray=1)
    bright = denormalize(shown.flatten(0, 1)).mean(1).unflatten(0, (-1, 5)) > 0.5
    share = torch.stack([bright, ~bright], 2).double().mean((3, 4))
    assert loss_of_counts((10 / 17) ** 0.5 * share) == pytest.approx(90 / 17, abs=0.01)


def test_of_pair():
    values = torch.tensor([3.0, 5.0, 7.0, 9.0, 11.0])
    assert counting.of_pair(values).tolist() == [3, 3, 7, 7, 11]


def test_pictures_show_the_whole_and_the_tiles():
    shown = counting.show([augment(photos(2))])
    assert list(shown) == ["whole", "tile 1", "tile 2", "tile 3", "tile 4"]
    assert all(images.shape == (2, 3, 8, 8) for images in shown.values())


# -------- The network -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_counts_are_never_negative_and_gradient_reaches_all(arch):
    torch.manual_seed(0)
    model = counting.Counter(arch, 16, 32, 12)
    x = noise(20, 3, 8, 8, dtype=torch.float32)
    phi = model(x)
    assert phi.shape == (20, 12) and phi.min() == 0 and phi.max() > 0
    phi = phi.unflatten(0, (4, 5))
    other = phi[:, 0].roll(1, 0)
    counting.counting_loss(phi[:, 0], phi[:, 1:], other, M).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_last_stage_sees_four_places_of_a_tile():
    """So more than the centres of its filters get a gradient from tiles of 16 pixels."""
    places = []
    for net in (counting.backbone("resnet14", 32), common.backbone("resnet14", 32)):
        net.layer4.register_forward_hook(lambda layer, inputs, y: places.append(y.shape[2:]))
        net(noise(2, 3, 16, 16, dtype=torch.float32))
    assert places == [(2, 2), (1, 1)]


# -------- Program ---------------------------------------------------------------------------------


def test_main_compares_each_image_with_its_partner(train, monkeypatch):
    """phi(D y) of image 2k is phi(D x) of image 2k + 1, and the other way round."""
    seen = []
    loss = counting.counting_loss

    def see(whole, tiles, other, margin):
        seen.append((whole, tiles, other, margin))
        return loss(whole, tiles, other, margin)

    monkeypatch.setattr(counting, "counting_loss", see)
    flags = ["--size", 16, "--batch", 12, "--epochs", 1, "--hidden", 16, "--dim", 8, "--margin", 7]
    train("counting", *flags)
    for whole, tiles, other, margin in seen:
        assert whole.shape == (12, 8) and tiles.shape == (12, 4, 8) and margin == 7
        partner = [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]
        assert torch.equal(other, whole[partner])
    assert len(seen) == 2


class Brightness(nn.Module):
    """Counts the brightness of the left half and of the right half, and one constant."""

    def forward(self, x):
        x = denormalize(x).mean(1)
        half = x.shape[2] // 2
        left = x[..., :half].mean((1, 2))
        return torch.stack([left, x[..., half:].mean((1, 2)), 1 + 0 * left], 1)


def test_picture_shows_where_a_feature_counts_most(tmp_path, monkeypatch):
    drawn = SimpleNamespace()

    def save(path, rows, columns, note):
        vars(drawn).update(path=path, rows=rows, columns=columns, note=note)

    monkeypatch.setattr(counting, "save_grid", save)
    data = tiny_data(24, 12)
    args = arguments("counting", "--size", 16, "--workers", 0)
    run = SimpleNamespace(name="counting", data=data, args=args, device=CPU, model=Brightness())
    counting.draw_counts(tmp_path / "counts.png", run, shown=2)

    assert drawn.columns == ["fewest", "most", "2"] and drawn.rows.shape[:2] == (2, 3)
    images = data.test.images.pixels / 255
    small = F.interpolate(images, (8, 8), mode="bicubic", antialias=True).clamp(0, 1)
    counts = Brightness()(normalize(small))  # (12, 3)
    features = counts.std(0).argsort(descending=True)[:2]
    for row, feature in zip(drawn.rows, features):
        order = counts[:, feature].argsort()
        for picture, place in zip(row, [order[0], order[-1], order[-2]]):
            assert torch.equal(picture, images[place])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--size", 33), "--size 33: choose an even number"),
        (("--size", 2), "--size 2: choose at least 4"),
        (("--size", 6, "--arch", "vit_micro"), "--size 6: choose 8, the next multiple of 8"),
        (("--size", 33, "--arch", "vit_micro"), "--size 33: choose 40, the next multiple of 8"),
        (("--size", 56, "--arch", "vit_micro"), "--size 56: choose 64, the next multiple of 16"),
        (("--margin", 0), "--margin 0: choose more than 0"),
        (("--gray", 1.2), "--gray 1.2: choose at least 0 and at most 1"),
        (("--batch", 9), "--batch 9: choose a multiple of 2, for pairs of images"),
    ],
)
def test_impossible_flags_are_refused(tmp_path, flags, words):
    found = call_main("counting", *flags, "--out", tmp_path / "run")
    assert found.code == 1 and words in found.err and found.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_size_that_is_proposed_for_a_vit_is_accepted(capsys):
    """Each even size up to 224 is accepted, or refused with one that is, the next larger."""
    accepted = set()
    proposed = {}
    for size in range(4, 226, 2):
        try:
            arguments("counting", "--size", size, "--arch", "vit_micro")
            accepted.add(size)
        except SystemExit:
            words = capsys.readouterr().err
            proposed[size] = int(re.search(r"choose (\d+)", words)[1])
    assert {8, 48, 64, 96, 128, 224} <= accepted and len(proposed) > 80
    for size, other in proposed.items():
        assert other == min(fits for fits in accepted if fits > size)


def test_counting_nothing_is_the_reference(train):
    """A network whose last layer is dead has the loss M, at every step, and no gradient: the trap
    of this task."""
    Counter = counting.Counter

    def dead(*args):
        model = Counter(*args)
        nn.init.zeros_(model.head[-2].weight)
        nn.init.constant_(model.head[-2].bias, -1)
        return model

    flags = ["--size", 16, "--batch", 12, "--epochs", 1, "--hidden", 16, "--dim", 8, "--margin", 7]
    run = train("counting", *flags, Counter=dead)
    assert run.losses.tolist() == [7, 7]
    assert not any(gradient.any() for step in run.gradients for gradient in step.values())
