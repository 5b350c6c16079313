"""ColorProxy: hue and chroma against Python's colorsys, the loss by hand, the points and the
read-out of maps at them, and what the network may see."""

import colorsys
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, call_main, light, noise
from torch import nn

from common import Data, InMemory, Loader, Split
from kernels.views import METHOD, BatchRandom, denormalize, normalize
from methods import color_proxy

SIZE = 16
LIGHT = light("color_proxy")["backbone"]


def colours(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator)


def random_data(count=12, grey=False):
    pixels = colours(count, 1 if grey else 3, SIZE, SIZE).mul(256).byte()
    split = Split(InMemory(pixels.expand(-1, 3, -1, -1).contiguous()))
    return Data("random", split, split, None)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(color_proxy, "backbone", LIGHT)
        return color_proxy.ColorProxy("resnet14", SIZE, 16, 8).eval()


# -------- Hue and chroma --------------------------------------------------------------------------


def test_hue_and_chroma_are_those_of_colorsys():
    """All combinations of a few levels: every sextant, its borders, grey, and black."""
    level = torch.linspace(0, 1, 6, dtype=torch.float64)
    rgb = torch.cartesian_prod(level, level, level)
    hue, chroma = color_proxy.hue_and_chroma(rgb[None])
    for (r, g, b), h, c in zip(rgb.tolist(), hue[0].tolist(), chroma[0].tolist(), strict=True):
        expected = colorsys.rgb_to_hsv(r, g, b)
        assert c == pytest.approx(max(r, g, b) - min(r, g, b), abs=1e-12)
        assert h == pytest.approx(expected[0], abs=1e-9), (r, g, b)


def test_to_rgb_is_the_inverse():
    x = 0.3 + 0.4 * colours(2, 3, 5, 5)
    hue, chroma = color_proxy.hue_and_chroma(x.flatten(2).transpose(1, 2))
    shape = (2, 1, 5, 5)
    found = color_proxy.to_rgb(x.mean(1, keepdim=True), hue.view(shape), chroma.view(shape))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


def test_bins_are_the_official_ones():
    """floor(v * 32 * 0.99999): 1 falls into the last bin, and so does a hue just below 1."""
    values = torch.tensor([0, 1 / 64, 1 / 32 + 1e-3, 0.5, 1 - 1e-7, 1])
    assert color_proxy.to_bin(values, 32).tolist() == [0, 0, 1, 15, 31, 31]
    many = colours(1000)
    expected = (many.numpy() * 32 * 0.99999).astype(np.int32)
    assert color_proxy.to_bin(many, 32).tolist() == expected.tolist()


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """Two points, four bins. Hue 0.6 is in bin 2, 0.1 in bin 0; chroma 0.5 in bin 1, 0.8 in bin 3.
    """
    p_hue = torch.tensor([[0.1, 0.2, 0.5, 0.2], [0.25, 0.25, 0.25, 0.25]])
    p_chroma = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.2, 0.2, 0.2, 0.4]])
    hue = torch.tensor([[0.6, 0.1]])
    chroma = torch.tensor([[0.45, 0.8]])
    logits = p_hue.log()[None] + 3, p_chroma.log()[None] - 2
    of_hue, of_chroma = color_proxy.color_losses(*logits, hue, chroma)
    by_hand = -(0.45 * math.log(0.5) + 0.8 * math.log(0.25)) / 2
    assert of_hue.item() == pytest.approx(by_hand, rel=1e-6)
    assert of_chroma.item() == pytest.approx(-(math.log(0.6) + math.log(0.4)) / 2, rel=1e-6)


def test_grey_teaches_no_hue():
    """Chroma 0 is bin 0, and the hue's loss and gradient are exactly 0."""
    rgb = colours(2, 5, 1).expand(-1, -1, 3)
    hue, chroma = color_proxy.hue_and_chroma(rgb)
    assert not chroma.any() and not color_proxy.to_bin(chroma, 32).any()
    logits = noise(2, 5, 32, dtype=torch.float32).requires_grad_()
    of_hue, of_chroma = color_proxy.color_losses(logits, logits, hue, chroma)
    assert of_hue == 0 and of_chroma > 0
    (grad,) = torch.autograd.grad(of_hue, logits)
    assert not grad.any()

    # Without the weight grey would be taught as red, the hue of bin 0.
    unweighted, _ = color_proxy.color_losses(logits, logits, hue, torch.ones_like(chroma))
    (grad,) = torch.autograd.grad(unweighted, logits)
    assert (grad[..., 0] < 0).all() and (grad[..., 1:] > 0).all()


def test_loss_of_guessing():
    logits = torch.zeros(3, 7, 32)
    hue, chroma = colours(2, 3, 7)
    of_hue, of_chroma = color_proxy.color_losses(logits, logits, hue, chroma)
    assert of_chroma.item() == pytest.approx(math.log(32), rel=1e-6)
    assert of_hue.item() == pytest.approx(chroma.mean().item() * math.log(32), rel=1e-5)
    assert f"{math.log(32):.2f} for 32 bins" in color_proxy.__doc__


def test_loss_is_the_official_formula():
    """colorize_hypercolumn.py in numpy: mean(5 chroma CE(hue)) + mean(CE(chroma))."""
    z_hue, z_chroma = noise(6, 32).numpy(), noise(6, 32, seed=1).numpy()
    hue, chroma = colours(2, 6).double().numpy()

    def cross_entropy(labels, logits):
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -log_p[np.arange(len(labels)), labels]

    each_hue = 5 * chroma * cross_entropy((hue * 32 * 0.99999).astype(int), z_hue)
    each_chroma = cross_entropy((chroma * 32 * 0.99999).astype(int), z_chroma)
    given = [torch.from_numpy(array).unflatten(0, (2, 3)) for array in (z_hue, z_chroma)]
    values = [torch.from_numpy(array).unflatten(0, (2, 3)) for array in (hue, chroma)]
    of_hue, of_chroma = color_proxy.color_losses(*given, *values)
    assert (of_chroma + 5 * of_hue).item() == pytest.approx(each_hue.mean() + each_chroma.mean())


# -------- The points ------------------------------------------------------------------------------


def test_points_keep_the_border_and_reach_the_rest():
    args = arguments("color_proxy", "--size", SIZE, "--border", 3, "--points", 200)
    points = color_proxy.draw_points(BatchRandom([0], 5), args)
    assert points.shape == (5, 200, 2) and points.dtype == torch.int64
    assert points.min() == 3 and points.max() == SIZE - 4
    assert len(points[0].unique(dim=0)) > 60  # of 100 pixels
    assert not torch.equal(points[0], points[1])


def test_colours_are_those_of_the_points():
    """Row first, then column; checked with an image of another height than width."""
    x = colours(2, 3, 4, 6)
    points = torch.tensor([[[1, 5], [3, 0]], [[0, 2], [2, 4]]])
    found = color_proxy.colours_at(normalize(x), points)
    for image in range(2):
        for p in range(2):
            row, column = points[image, p]
            torch.testing.assert_close(found[image, p], x[image, :, row, column])


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_read_out_is_that_of_the_enlarged_map(side):
    """Enlarging the whole map by bilinear interpolation, then reading the pixel."""
    feature_map = noise(2, 5, side, side)
    points = torch.randint(16, (2, 30, 2), generator=torch.Generator().manual_seed(0))
    found = color_proxy.read_out(feature_map, points, 16)
    large = F.interpolate(feature_map, (16, 16), mode="bilinear", align_corners=False)
    expected = torch.stack([m[:, p[:, 0], p[:, 1]].T for m, p in zip(large, points)])
    torch.testing.assert_close(found, expected)


def test_gradient_flows_through_the_points_alone():
    feature_map = noise(1, 2, 16, 16).requires_grad_()
    points = torch.tensor([[[3, 4], [10, 12]]])
    color_proxy.read_out(feature_map, points, 16).sum().backward()
    # a map of the image's size is read at the pixel itself, up to rounding
    read = feature_map.grad[0].abs().amax(0) > 1e-6
    assert read.nonzero().tolist() == points[0].tolist()


# -------- The network -----------------------------------------------------------------------------


def test_network_sees_grey_alone(model):
    """Colours may be exchanged between channels: their mean is the same. The shortcut that this
    prevents: with colours in the input, as common.backbone gets them, the features differ."""
    x = colours(2, 3, SIZE, SIZE)
    exchanged = x[:, [2, 0, 1]]
    points = torch.tensor([[[3, 4], [10, 12]]]).expand(2, -1, -1)
    for network in (model.backbone, lambda x: torch.cat(model(x, points), 2)):
        found, expected = network(normalize(exchanged)), network(normalize(x))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert (network(normalize(1 - x)) - expected).abs().max() > 1e-2

    (shown,) = color_proxy.show([normalize(x)]).values()
    expected = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-6)

    hooks = model.backbone.conv1._forward_pre_hooks
    kept = dict(hooks)
    hooks.clear()
    try:
        found, expected = model.backbone(normalize(exchanged)), model.backbone(normalize(x))
        assert (found - expected).abs().max() > 1e-2
    finally:
        hooks.update(kept)


@pytest.mark.parametrize(
    "arch, size",
    [("resnet14", 32), ("vit_micro", 16), pytest.param("resnet18", 16, marks=pytest.mark.thorough)],
)
def test_output_and_gradients(arch, size):
    network = color_proxy.ColorProxy(arch, size, 16, 8)
    points = torch.tensor([[[3, 4], [10, 12], [5, 5]]]).expand(4, -1, -1)
    hue, chroma = network(noise(4, 3, size, size, dtype=torch.float32), points)
    assert hue.shape == chroma.shape == (4, 3, 8)
    (hue[..., 0].square().sum() + chroma[..., 1].square().sum()).backward()
    for name, w in network.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_hypercolumn_has_maps_of_all_depths(model):
    """Of which each is brought to the same scale: one that is a thousand times larger changes
    nothing in training, because of the batch-norm after it."""
    assert model.head[0].num_features == 96 + 192 + 384 + 768
    norm = nn.BatchNorm1d(4)
    x = noise(50, 4, dtype=torch.float32)
    scale = torch.tensor([1, 1000, 1, 1])
    torch.testing.assert_close(norm(x * scale), norm(x), rtol=1e-4, atol=1e-4)


# -------- Decoding --------------------------------------------------------------------------------


def test_estimates_are_means_and_the_hue_goes_round():
    """Of hues 1/8 and 7/8 in equal parts (bins 0 and 3 of 4) the mean is 0 or 1, not 1/2."""
    p = torch.tensor([[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0, 0.5, 0.5, 0]])
    hue, chroma = color_proxy.point_estimates((p + 1e-9).log(), (p + 1e-9).log())
    assert min(hue[0].item(), 1 - hue[0].item()) < 1e-4
    assert hue[1:].tolist() == pytest.approx([3 / 8, 1 / 2], abs=1e-4)
    assert chroma.tolist() == pytest.approx([1 / 2, 3 / 8, 1 / 2], abs=1e-4)


# -------- Program ---------------------------------------------------------------------------------


def test_main_reads_colours_where_it_reads_the_maps(train, monkeypatch):
    """The loss of each step gets the colours of its images at its points, and weighs the hue."""
    seen = []
    real = color_proxy.color_losses
    forward = color_proxy.ColorProxy.forward

    def see(*args):
        seen[-1] += args[2:]
        seen[-1] += real(*args)
        return seen[-1][-2:]

    def look(model, x, points):
        seen.append([points])
        return forward(model, x, points)

    monkeypatch.setattr(color_proxy, "color_losses", see)
    monkeypatch.setattr(color_proxy.ColorProxy, "forward", look)
    monkeypatch.setattr(color_proxy, "draw_colorized", lambda *args: None)
    data = random_data()
    flags = ["--size", SIZE, "--batch", 6, "--epochs", 1, "--hidden", 8, "--hue-weight", 3]
    run = train("color_proxy", *flags, data=data, double=False, backbone=LIGHT)
    loader = Loader(data.train, color_proxy.views(run.args), 6, 0, CPU)
    assert len(seen) == len(run.losses) == 2
    for step, (x,) in loader(0):
        points, hue, chroma, of_hue, of_chroma = seen[step]
        expected = color_proxy.draw_points(loader.random(0, step, 0, METHOD), run.args)
        assert torch.equal(points, expected)
        rgb = denormalize(x)
        for image in range(6):
            row, column = points[image].unbind(1)
            own = rgb[image, :, row, column].T[None]
            for value, right in zip((hue, chroma), color_proxy.hue_and_chroma(own), strict=True):
                torch.testing.assert_close(value[image], right[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(run.losses[step], (of_chroma + 3 * of_hue).detach())


def test_weight_decay_is_on_the_matrices_of_the_head(train, monkeypatch):
    monkeypatch.setattr(color_proxy, "draw_colorized", lambda *args: None)
    flags = ["--size", SIZE, "--batch", 12, "--epochs", 1, "--hidden", 8, "--weight-decay", 0.1]
    state = train("color_proxy", *flags, data=random_data(), backbone=LIGHT).state
    decays = [state[f"optimizer/param_groups/{group}/weight_decay"] for group in (0, 1)]
    first = [key for key in state if key.startswith("optimizer/param_groups/0/params")]
    assert decays == [0.1, 0] and len(first) == 2  # the two linear layers


def test_grey_data_are_refused(tmp_path):
    flags = ("--size", SIZE, "--batch", 6, "--out", tmp_path / "run")
    found = call_main("color_proxy", *flags, data=random_data(grey=True))
    assert found.code == 1 and found.err.count("\n") == 1
    assert "all images are grey" in found.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--border", 16), "--border 16: choose at most 15"),
        (("--size", 52, "--arch", "vit_micro"), "--size 52: choose a multiple of 8"),
        (("--size", 1, "--border", 0), "--size 1: choose at least 2"),
        (("--bins", 1), "--bins 1: choose at least 2"),
        (("--points", 0), "--points 0: choose at least 1"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("color_proxy", *flags)
    text = capsys.readouterr().err
    assert error.value.code == 1 and words in text and text.count("\n") == 1


class Knows(nn.Module):
    """Sure of the true colour of every point: 64 bins."""

    def forward(self, x, points):
        logits = []
        for values in color_proxy.hue_and_chroma(color_proxy.colours_at(x, points)):
            logits.append(99.0 * F.one_hot(color_proxy.to_bin(values, 64), 64))
        return logits


def test_picture_shows_what_is_predicted(tmp_path, monkeypatch):
    """A network that knows the truth paints the images, to the width of a bin."""
    drawn = SimpleNamespace()
    monkeypatch.setattr(
        color_proxy,
        "save_grid",
        lambda path, rows, columns, note: vars(drawn).update(rows=rows, columns=columns),
    )
    args = arguments("color_proxy", "--size", SIZE)
    run = SimpleNamespace(name="color_proxy", data=random_data(), args=args, device=CPU)
    run.model = Knows()
    color_proxy.draw_colorized(tmp_path / "colorized.png", run)
    assert drawn.columns == ["image", "grey", "coloured"] and len(drawn.rows) == 12
    image, level, coloured = (torch.stack(column) for column in zip(*drawn.rows))
    assert torch.equal(level, image.mean(1, keepdim=True).expand_as(image))
    # half a bin of the chroma is 1/128, half a bin of the hue 6/128 of a channel's range
    assert (coloured - image).abs().max() < 0.06 and run.model.training
