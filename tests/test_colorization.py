"""Colorization: the colour space against published values and scikit-image; the bins, targets,
weights and loss against values computed by hand; what the network may see."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, arguments, call_main, noise
from PIL import Image
from torch import nn

import common
from common import Data, Files, InMemory, Loader, Split
from kernels.views import denormalize, normalize
from methods import colorization

BATCH, SIZE = 6, 16


def colours(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def bins():
    return colorization.gamut()


# -------- Colour space ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rgb, lab",
    [
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((0.5, 0.5, 0.5), (53.39, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_of_well_known_colours(rgb, lab):
    x = torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1)
    found = colorization.rgb_to_lab(x).flatten()
    # The published values have two decimals; matrices and whites in use differ by as much again,
    # with factors up to 500.
    torch.testing.assert_close(found, torch.tensor(lab, dtype=torch.float64), rtol=0, atol=0.02)


def test_dark_colours_are_on_the_linear_pieces():
    # below 0.04045; its luminance 0.02 / 12.92 is below (6/29)^3, so L = (29/3)^3 times it
    x = 0.02
    found = colorization.rgb_to_lab(torch.full((1, 3, 1, 1), x, dtype=torch.float64)).flatten()
    # the rows of the matrix sum to 1 + 1e-6
    assert found[0].item() == pytest.approx((29 / 3) ** 3 * x / 12.92, abs=1e-4)
    assert found[1:].abs().max() < 0.01


def test_lab_is_that_of_scikit_image():
    color = pytest.importorskip("skimage.color")
    x = torch.cat([colours(1, 3, 40, 40), 0.05 * colours(1, 3, 40, 40, seed=1)])
    lab = colorization.rgb_to_lab(x)
    # scikit-image rounds the slopes and thresholds of the linear pieces to four digits: errors
    # below 1e-2 there.
    expected = torch.from_numpy(color.rgb2lab(x.movedim(1, 3).numpy())).movedim(3, 1)
    torch.testing.assert_close(lab, expected, rtol=0, atol=1e-2)
    far = torch.cat([lab[:, :1], 3 * lab[:, 1:]], 1)  # mostly outside sRGB: both clip
    # but scikit-image also clips Z at 0, before RGB
    far[:, 2] = torch.minimum(far[:, 2], 199 * (far[:, 0] + 16) / 116)
    for given in (lab, far):
        rgb = torch.from_numpy(color.lab2rgb(given.movedim(1, 3).numpy())).movedim(3, 1)
        torch.testing.assert_close(colorization.lab_to_rgb(given), rgb, rtol=0, atol=1e-3)


def test_lab_to_rgb_is_the_inverse():
    x = torch.cat([colours(1, 3, 30, 30), 0.05 * colours(1, 3, 30, 30, seed=1)])
    there_and_back = colorization.lab_to_rgb(colorization.rgb_to_lab(x))
    # Where sRGB changes from linear to power the two published thresholds leave a step of 1e-7.
    torch.testing.assert_close(there_and_back, x, rtol=0, atol=1e-6)


# -------- Bins, targets, weights ------------------------------------------------------------------


def test_every_colour_is_within_half_a_step_of_a_bin(bins):
    assert bins.shape == (261, 2) and (bins % 10 == 0).all() and (bins == 0).all(1).any()
    # most have a channel at 0 or 1: the border of the gamut
    edges = (colours(1, 3, 1, 20000, seed=2) * 3 - 1).clamp(0, 1)
    rgb = (torch.cat([colours(1, 3, 1, 20000), edges], 3) * 255).round() / 255
    ab = colorization.rgb_to_lab(rgb)[0, 1:, 0].T.float()
    nearest = torch.cdist(ab, bins).argmin(1)
    assert (ab - bins[nearest]).abs().max() <= 5 + 1e-4
    assert len(nearest.unique()) > 250  # and hardly a bin is empty


def test_soft_targets_by_hand(bins):
    ab = torch.tensor([[0.0, 0.0], [3.0, 1.0]]).T.reshape(1, 2, 1, 2)
    nearest, z = colorization.soft_targets(ab, bins)
    assert bins[nearest[0, 0]].tolist() == [0, 0] and bins[nearest[1, 0]].tolist() == [0, 0]
    assert sorted(bins[nearest[0, 1:]].tolist()) == [[-10, 0], [0, -10], [0, 10], [10, 0]]
    e = math.exp(-(10**2) / (2 * 5**2))  # the four neighbours, a step away
    torch.testing.assert_close(z[0], torch.tensor([1, e, e, e, e]) / (1 + 4 * e))

    # From (3, 1) the squared distances to (0, 0), (10, 0), (0, 10), (10, 10), (0, -10) are 10, 50,
    # 90, 130, 130.
    near = {tuple(q): w for q, w in zip(bins[nearest[1]].tolist(), z[1].tolist())}
    weight = [math.exp(-d / 50) for d in (10, 50, 90, 130)]
    assert near[10, 0] / near[0, 0] == pytest.approx(weight[1] / weight[0], rel=1e-4)
    assert near[0, 10] / near[0, 0] == pytest.approx(weight[2] / weight[0], rel=1e-4)
    assert z.sum(1).tolist() == pytest.approx([1, 1]) and (z.diff(dim=1) <= 1e-6).all()


def test_class_weights_by_hand():
    apart = torch.tensor([[0.0, 0.0], [1000.0, 0.0]])  # so far that nothing is smoothed
    w = colorization.class_weights(torch.tensor([9.0, 1.0]), apart, 0.5)
    raw = [1 / (0.45 + 0.25), 1 / (0.05 + 0.25)]
    mean = 0.9 * raw[0] + 0.1 * raw[1]
    assert w.tolist() == pytest.approx([raw[0] / mean, raw[1] / mean])

    # Each keeps 1 / (1 + e) of its mass and gives e / (1 + e) to the other.
    near = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    e = math.exp(-2)
    p = [1 / (1 + e), e / (1 + e)]
    w = colorization.class_weights(torch.tensor([5.0, 0.0]), near, 0.0)
    # without the uniform part all bins matter alike
    assert w.tolist() == pytest.approx([0.5 / p[0], 0.5 / p[1]])


def test_class_weights_have_mean_one(bins):
    count = torch.zeros(len(bins))
    count[[0, 100, 200]] = torch.tensor([1.0, 1000.0, 10.0])
    w = colorization.class_weights(count, bins, 0.5)
    kernel = torch.exp(-(torch.cdist(bins, bins) ** 2) / 50)
    p = (kernel / kernel.sum(0)) @ count / count.sum()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert (w * p).sum().item() == pytest.approx(1, abs=1e-5)
    assert w.argmin() == 100 and w[0] > w[200] > w[100]
    assert torch.allclose(colorization.class_weights(count, bins, 1.0), torch.ones(len(bins)))


def test_targets_are_every_fourth_pixel(bins):
    x = torch.zeros(1, 3, 8, 8)
    # red, green, blue; (6, 6) is black
    x[0, :, 2, 2], x[0, :, 2, 6], x[0, :, 6, 2] = torch.eye(3)
    nearest, _, colourful = colorization.targets(normalize(x), bins)
    assert bins[nearest[:, 0]].tolist() == [[80, 70], [-90, 80], [80, -110], [0, 0]]
    assert colourful.tolist() == [True] * 4


def test_images_without_colour_teach_nothing(bins):
    x = torch.cat([0.5 * torch.ones(1, 3, 8, 8), colours(1, 3, 8, 8).float()])
    nearest, z, colourful = colorization.targets(normalize(x), bins)
    assert colourful.tolist() == [False] * 4 + [True] * 4
    logits = noise(2, len(bins), 2, 2, dtype=torch.float32).requires_grad_()
    colorization.colorization_loss(logits, nearest, z, colourful.float()).backward()
    assert not logits.grad[0].any() and (logits.grad[1] != 0).any(0).all()


def random_data(grey=False, every_second_grey=False):
    shape = (3 * BATCH, 1 if grey else 3, SIZE, SIZE)  # three steps
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = torch.from_numpy(images).repeat(1, 3 if grey else 1, 1, 1)
    if every_second_grey:
        images[::2] = images[::2, :1]
    split = Split(InMemory(images))
    return Data("random", split, split, None)


def count_here(bins):
    """The counts of this process, in the 3 steps of the first epoch."""
    views = colorization.views(arguments("colorization", "--size", SIZE))
    return colorization.count_colours(Loader(random_data().train, views, BATCH, 0, CPU), bins)


@pytest.mark.parametrize("world", [2, 3])
def test_count_is_that_of_the_whole_batch(bins, monkeypatch, world):
    """Each process counts its own rows, and the parts are summed."""
    alone = count_here(bins)
    assert alone.sum() == 3 * BATCH * (SIZE // 4) ** 2 and (alone > 0).sum() > 50

    parts = []
    monkeypatch.setattr("kernels.views.world", lambda: world)
    monkeypatch.setattr(colorization, "all_reduce_sum", lambda x: parts.append(x) or alone)
    for process in range(world):
        monkeypatch.setattr("kernels.views.rank", lambda process=process: process)
        assert torch.equal(count_here(bins), alone)
    assert len(parts) == world and torch.equal(sum(parts), alone)
    assert all(part.sum() == alone.sum() / world for part in parts)


# -------- Loss and decoding -----------------------------------------------------------------------


def test_loss_by_hand():
    zhat = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    logits = torch.log(zhat).T.reshape(1, 3, 1, 2)
    nearest = torch.tensor([[0, 1], [2, 0]])
    z = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    v = torch.tensor([2.0, 3.0])
    first = 0.75 * math.log(0.5) + 0.25 * math.log(0.25)
    by_hand = -(2 * first + 3 * math.log(0.8)) / 2
    found = colorization.colorization_loss(logits, nearest, z, v)
    assert found.item() == pytest.approx(by_hand)


def test_loss_is_the_dense_formula(bins):
    nearest, z = colorization.soft_targets(40 * noise(2, 2, 3, 3).float(), bins)
    z = z.double()
    v = colours(18)
    logits = noise(2, len(bins), 3, 3).requires_grad_()
    found = colorization.colorization_loss(logits, nearest, z, v)

    dense = torch.zeros(18, len(bins), dtype=torch.float64).scatter(1, nearest, z)  # Z, (M, Q)
    log_zhat = logits.movedim(1, 3).reshape(18, -1).log_softmax(1)
    expected = -(v * (dense * log_zhat).sum(1)).mean()
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient)

    ones = torch.ones(18)
    uniform = colorization.colorization_loss(torch.zeros(2, len(bins), 3, 3), nearest, z, ones)
    assert uniform.item() == pytest.approx(math.log(len(bins)), rel=1e-6)


def test_annealed_mean_goes_from_mode_to_mean():
    bins = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 20.0]])
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).view(1, 3, 1, 1)

    def decode(T):
        return colorization.annealed_mean(logits, bins, T).flatten().tolist()

    assert decode(1e-3) == pytest.approx([0, 0], abs=1e-6)
    assert decode(1) == pytest.approx([3, 4])
    a, b, c = (v ** (1 / 0.38) for v in (0.5, 0.3, 0.2))
    assert decode(0.38) == pytest.approx([10 * b / (a + b + c), 20 * c / (a + b + c)])


# -------- Network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_network_sees_lightness_alone(bins, arch):
    torch.manual_seed(0)
    model = colorization.Colorizer(arch, SIZE, bins).eval()
    L = 40 + 20 * colours(2, 1, SIZE, SIZE)
    ab = 15 * noise(2, 2, SIZE, SIZE).clamp(-1, 1)  # well inside sRGB: nothing is clipped
    x = normalize(colorization.lab_to_rgb(torch.cat([L, ab], 1)).float())
    y = normalize(colorization.lab_to_rgb(torch.cat([L, -ab], 1)).float())
    inverted = normalize(1 - denormalize(x))
    assert (x - y).abs().max() > 0.5
    # L survives the way through 32-bit RGB with a relative error of 1e-6, which the layers may
    # enlarge a little.
    for network in (model, model.backbone):
        torch.testing.assert_close(network(x), network(y), rtol=1e-3, atol=1e-4)
        assert (network(x) - network(inverted)).abs().max() > 1e-2

    (shown,) = colorization.show([x]).values()
    torch.testing.assert_close(shown, (L / 100).float().expand(-1, 3, -1, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_saved_backbone_is_the_common_one(arch):
    saved = colorization.backbone(arch, SIZE).state_dict()
    common.backbone(arch, SIZE).load_state_dict(saved)


@pytest.mark.parametrize(
    "arch, size",
    [
        ("resnet14", 32),
        ("vit_micro", 32),
        ("resnet18", 16),
        pytest.param("resnet50", 72, marks=pytest.mark.thorough),
        pytest.param("vit_mini", 96, marks=pytest.mark.thorough),
    ],
)
def test_output_is_a_quarter_of_the_side_and_gradient_reaches_all(arch, size):
    model = colorization.Colorizer(arch, size, 10 * torch.arange(14.0).view(7, 2))
    logits = model(noise(2, 3, size, size, dtype=torch.float32))
    assert logits.shape == (2, 7, size // 4, size // 4)
    logits[:, 0].square().sum().backward()
    for name, w in model.named_parameters():
        assert w.requires_grad and w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_maps_of_a_resnet_are_its_stages():
    net = colorization.backbone("resnet14", 32).eval()
    x = noise(2, 3, 32, 32, dtype=torch.float32)
    maps = list(colorization.feature_maps(net, x))
    assert [part.shape[1] for part in maps] == [96, 192, 384, 768]
    assert [part.shape[2] for part in maps] == [8, 4, 2, 2]
    torch.testing.assert_close(maps[-1].mean((2, 3)), net(x))


def test_maps_of_a_vision_transformer_end_with_the_feature():
    """Patches in their places, after blocks 1, 3, 4 and 6 of 6; their mean in the last map is the
    feature that is evaluated."""
    net = colorization.backbone("vit_mini", 32).eval()
    x = noise(2, 3, 32, 32, dtype=torch.float32)
    maps = list(colorization.feature_maps(net, x))
    assert [part.shape for part in maps] == [(2, 128, 8, 8)] * 4
    torch.testing.assert_close(maps[-1].mean((2, 3)), net(x))
    tokens = net.norm(net.blocks[:3](net.embed(x)))
    torch.testing.assert_close(maps[1][:, :, 2, 5], tokens[:, 1 + 2 * 8 + 5])


# -------- Program ---------------------------------------------------------------------------------


def test_main_weighs_places_by_the_rarity_of_their_colour(train, monkeypatch, bins):
    """The loss gets w of each place's nearest bin, w from the counts of the first epoch, and 0
    where an image has no colour."""
    seen = []
    loss = colorization.colorization_loss

    def see(logits, nearest, z, v):
        seen.append((nearest, v))
        return loss(logits, nearest, z, v)

    monkeypatch.setattr(colorization, "colorization_loss", see)
    data = random_data(every_second_grey=True)
    flags = ["--size", SIZE, "--batch", BATCH, "--epochs", 1]
    run = train("colorization", *flags, data=data, double=False)
    assert torch.equal(run.state["model/bins"], bins)

    loader = Loader(data.train, colorization.views(run.args), BATCH, run.args.seed, CPU)
    count = colorization.count_colours(loader, bins)
    weights = colorization.class_weights(count, bins, 0.5)
    torch.testing.assert_close(run.state["model/weights"], weights)
    assert len(seen) == 3 and len(weights[seen[0][0][:, 0]].unique()) > 3
    for (nearest, v), (_, (x,)) in zip(seen, loader(0), strict=True):
        pixels = denormalize(x).mul(255).round()
        colourful = (pixels[:, 0] != pixels[:, 1]).flatten(1).any(1)  # (BATCH,)
        assert 0 < colourful.sum() < BATCH
        places = len(v) // BATCH
        expected = weights[nearest[:, 0]] * colourful.repeat_interleave(places)
        torch.testing.assert_close(v, expected)


def test_grey_data_are_refused(tmp_path):
    flags = ("--size", SIZE, "--batch", BATCH, "--out", tmp_path / "run")
    found = call_main("colorization", *flags, data=random_data(grey=True))
    assert found.code == 1 and found.err.count("\n") == 1
    assert "all images are grey" in found.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--size", 30), "--size 30: choose a multiple of 4"),
        (("--size", 52, "--arch", "vit_micro"), "--size 52: choose a multiple of 8"),
        (("--temperature", 0), "--temperature 0: choose more than 0"),
        (("--lambda", 1.5), "--lambda 1.5: choose at least 0 and at most 1"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("colorization", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err


class Red(nn.Module):
    """Sure of red everywhere."""

    bins = torch.tensor([[0.0, 0.0], [80.0, 70.0]])

    def forward(self, x):
        return torch.tensor([0.0, 50.0]).view(1, 2, 1, 1).expand(len(x), 2, 4, 4)


@pytest.mark.parametrize("in_memory", [True, False])
def test_picture_shows_truth_lightness_and_prediction(tmp_path, monkeypatch, in_memory):
    pixels = random_data().train.images.pixels
    reader = InMemory(pixels)
    if not in_memory:
        for i, image in enumerate(pixels):
            large = image.movedim(0, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
            Image.fromarray(large.numpy()).save(tmp_path / f"{i:02}.png")
        reader = Files(sorted(tmp_path.glob("*.png")))

    drawn = SimpleNamespace()
    monkeypatch.setattr(
        colorization,
        "save_grid",
        lambda path, rows, columns, note: vars(drawn).update(rows=rows, columns=columns, note=note),
    )
    split = Split(reader)
    args = arguments("colorization", "--size", SIZE)
    data = Data("random", split, split, None)
    run = SimpleNamespace(name="colorization", data=data, args=args, device=CPU, model=Red())
    colorization.draw_colorized(tmp_path / "colorized.png", run)

    assert drawn.columns == ["image", "lightness", "coloured"] and len(drawn.rows) == 12
    shown, grey, coloured = (torch.stack(column) for column in zip(*drawn.rows))  # (12, 3, h, w)
    # grey, but for the rounding of the published matrix and white
    assert (grey - grey[:, :1]).abs().max() < 1 / 255
    assert (coloured[:, 0] - coloured[:, 1:].mean(1)).mean() > 50 / 255  # red
    L = colorization.rgb_to_lab(shown)[:, 0]
    torch.testing.assert_close(colorization.rgb_to_lab(grey)[:, 0], L, rtol=0, atol=0.05)
    if in_memory:  # different ones of the images
        whole = shown.mul(255).round().byte()
        assert (whole[:, None] == pixels).flatten(2).all(2).sum(1).tolist() == [1] * 12
        assert len(whole.unique(dim=0)) == 12
    assert run.model.training


def test_picture_of_a_process_has_twelve_images(tmp_path, monkeypatch):
    """Process 0 of 3 draws for all: it is not short of images because it has a share of a batch."""
    rows = []
    monkeypatch.setattr("kernels.views.world", lambda: 3)
    monkeypatch.setattr(colorization, "world", lambda: 3)
    monkeypatch.setattr(colorization, "save_grid", lambda path, shown, *_, **__: rows.extend(shown))
    pixels = random_data().train.images.pixels.repeat(2, 1, 1, 1)  # 36
    split = Split(InMemory(pixels))
    args = arguments("colorization", "--size", SIZE)
    data = Data("random", split, split, None)
    run = SimpleNamespace(name="colorization", data=data, args=args, device=CPU, model=Red())
    colorization.draw_colorized(tmp_path / "colorized.png", run)
    assert len(rows) == 12
