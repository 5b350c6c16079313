"""Colorization: the colour space against published values and scikit-image, the bins, targets, weights and loss against values
computed by hand, what the network may see, and one training step for any number of processes."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
from common import Data, Loader, Split, distribute, normalize
from methods import colorization

CPU = torch.device("cpu")
BATCH, SIZE = 6, 16


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def colours(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def bins():
    return colorization.gamut()


# -------- Colour space --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rgb, lab", [
    ((1, 1, 1), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((0.5, 0.5, 0.5), (53.39, 0, 0)), ((1, 0, 0), (53.24, 80.09, 67.20)),
    ((0, 1, 0), (87.73, -86.18, 83.18)), ((0, 0, 1), (32.30, 79.19, -107.86))])
def test_lab_of_well_known_colours(rgb, lab):
    found = colorization.rgb_to_lab(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1)).flatten()
    # The published values have two decimals; matrices and whites in use differ by as much again, with factors up to 500.
    torch.testing.assert_close(found, torch.tensor(lab, dtype=torch.float64), rtol=0, atol=0.02)


def test_dark_colours_are_on_the_linear_pieces():
    x = 0.02  # below 0.04045; its luminance 0.02 / 12.92 is below (6/29)^3, so L = (29/3)^3 times it
    found = colorization.rgb_to_lab(torch.full((1, 3, 1, 1), x, dtype=torch.float64)).flatten()
    assert found[0].item() == pytest.approx((29 / 3) ** 3 * x / 12.92, abs=1e-4)  # rows of the matrix sum to 1 + 1e-6
    assert found[1:].abs().max() < 0.01


def test_lab_is_that_of_scikit_image():
    color = pytest.importorskip("skimage.color")
    x = torch.cat([colours(1, 3, 40, 40), 0.05 * colours(1, 3, 40, 40, seed=1)])
    lab = colorization.rgb_to_lab(x)
    # scikit-image rounds the slopes and thresholds of the linear pieces to four digits: errors below 1e-2 there.
    expected = torch.from_numpy(color.rgb2lab(x.movedim(1, 3).numpy())).movedim(3, 1)
    torch.testing.assert_close(lab, expected, rtol=0, atol=1e-2)
    far = torch.cat([lab[:, :1], 3 * lab[:, 1:]], 1)  # mostly outside sRGB: both clip
    far[:, 2] = torch.minimum(far[:, 2], 199 * (far[:, 0] + 16) / 116)  # but scikit-image also clips Z at 0, before RGB
    for given in (lab, far):
        rgb = torch.from_numpy(color.lab2rgb(given.movedim(1, 3).numpy())).movedim(3, 1)
        torch.testing.assert_close(colorization.lab_to_rgb(given), rgb, rtol=0, atol=1e-3)


def test_lab_to_rgb_is_the_inverse():
    x = torch.cat([colours(1, 3, 30, 30), 0.05 * colours(1, 3, 30, 30, seed=1)])
    # Where sRGB changes from linear to power the two published thresholds leave a step of 1e-7.
    torch.testing.assert_close(colorization.lab_to_rgb(colorization.rgb_to_lab(x)), x, rtol=0, atol=1e-6)


def test_denormalize_is_the_inverse_of_normalize():
    x = colours(2, 3, 4, 4)
    torch.testing.assert_close(colorization.denormalize(normalize(x)), x)


# -------- Bins, targets, weights ----------------------------------------------------------------------------------------

def test_every_colour_is_within_half_a_step_of_a_bin(bins):
    assert bins.shape == (261, 2) and (bins % 10 == 0).all() and (bins == 0).all(1).any()
    edges = (colours(1, 3, 1, 20000, seed=2) * 3 - 1).clamp(0, 1)  # most have a channel at 0 or 1: the border of the gamut
    rgb = (torch.cat([colours(1, 3, 1, 20000), edges], 3) * 255).round() / 255
    ab = colorization.rgb_to_lab(rgb)[0, 1:, 0].T.float()
    distance = (ab - bins[torch.cdist(ab, bins).argmin(1)]).abs().max(1).values
    assert distance.max() <= 5 + 1e-4
    assert len(torch.cdist(ab, bins).argmin(1).unique()) > 250  # and hardly a bin is empty


def test_soft_targets_by_hand(bins):
    ab = torch.tensor([[0.0, 0.0], [3.0, 1.0]]).T.reshape(1, 2, 1, 2)
    nearest, z = colorization.soft_targets(ab, bins)
    assert bins[nearest[0, 0]].tolist() == [0, 0] and bins[nearest[1, 0]].tolist() == [0, 0]
    assert sorted(bins[nearest[0, 1:]].tolist()) == [[-10, 0], [0, -10], [0, 10], [10, 0]]
    e = math.exp(-10**2 / (2 * 5**2))  # the four neighbours, a step away
    torch.testing.assert_close(z[0], torch.tensor([1, e, e, e, e]) / (1 + 4 * e))
    # From (3, 1) the squared distances to (0, 0), (10, 0), (0, 10), (10, 10), (0, -10) are 10, 50, 90, 130, 130.
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
    near = torch.tensor([[0.0, 0.0], [10.0, 0.0]])  # each keeps 1 / (1 + e) of its mass and gives e / (1 + e) to the other
    e = math.exp(-2)
    p = [(1 + 0 * e) / (1 + e), e / (1 + e)]
    w = colorization.class_weights(torch.tensor([5.0, 0.0]), near, 0.0)
    assert w.tolist() == pytest.approx([0.5 / p[0], 0.5 / p[1]])  # without the uniform part all bins matter alike


def test_class_weights_have_mean_one(bins):
    count = torch.zeros(len(bins))
    count[[0, 100, 200]] = torch.tensor([1.0, 1000.0, 10.0])
    w = colorization.class_weights(count, bins, 0.5)
    kernel = torch.exp(-torch.cdist(bins, bins) ** 2 / 50)
    p = (kernel / kernel.sum(0)) @ count / count.sum()
    assert p.sum().item() == pytest.approx(1, abs=1e-5) and (w * p).sum().item() == pytest.approx(1, abs=1e-5)
    assert w.argmin() == 100 and w[0] > w[200] > w[100]
    assert torch.allclose(colorization.class_weights(count, bins, 1.0), torch.ones(len(bins)))


def test_targets_are_every_fourth_pixel(bins):
    x = torch.zeros(1, 3, 8, 8)
    x[0, :, 2, 2], x[0, :, 2, 6], x[0, :, 6, 2] = torch.eye(3)  # red, green, blue; (6, 6) is black
    nearest, _, colourful = colorization.targets(normalize(x), bins)
    assert bins[nearest[:, 0]].tolist() == [[80, 70], [-90, 80], [80, -110], [0, 0]] and colourful.tolist() == [True] * 4


def test_images_without_colour_teach_nothing(bins):
    x = torch.cat([0.5 * torch.ones(1, 3, 8, 8), colours(1, 3, 8, 8).float()])
    nearest, z, colourful = colorization.targets(normalize(x), bins)
    assert colourful.tolist() == [False] * 4 + [True] * 4
    logits = noise(2, len(bins), 2, 2).requires_grad_()
    colorization.colorization_loss(logits, nearest, z, colourful.float()).backward()
    assert not logits.grad[0].any() and (logits.grad[1] != 0).any(0).all()


def test_count_is_that_of_the_whole_batch(bins, processes):
    alone = count()
    assert alone.sum() == 3 * BATCH * (SIZE // 4) ** 2 and (alone > 0).sum() > 50
    for n in (2, 3):
        for each in processes(n, count):
            assert torch.equal(each, alone)


def tiny_data(grey=False):
    images = np.random.default_rng(0).integers(0, 256, (3 * BATCH, 1 if grey else 3, SIZE, SIZE), dtype=np.uint8)
    split = Split(torch.from_numpy(images).expand(-1, 3, -1, -1).contiguous())
    return Data("tiny", split, split, None)


def tiny_loader():
    return Loader(tiny_data().train, colorization.views(SimpleNamespace(size=SIZE, min_crop=0.5)), BATCH, 0, CPU)


def count():
    return colorization.count_colours(tiny_loader(), colorization.gamut())


# -------- Loss and decoding ---------------------------------------------------------------------------------------------

def test_loss_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])).T.reshape(1, 3, 1, 2)
    nearest, z = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    v = torch.tensor([2.0, 3.0])
    by_hand = -(2 * (0.75 * math.log(0.5) + 0.25 * math.log(0.25)) + 3 * math.log(0.8)) / 2
    assert colorization.colorization_loss(logits, nearest, z, v).item() == pytest.approx(by_hand)


def test_loss_is_the_dense_formula_and_passes_gradcheck(bins):
    ab = 40 * noise(2, 2, 3, 3)
    nearest, z = colorization.soft_targets(ab, bins)
    v, z = torch.rand(18).double(), z.double()
    logits = noise(2, len(bins), 3, 3).double().requires_grad_()
    dense = torch.zeros(18, len(bins), dtype=torch.float64).scatter(1, nearest, z)  # Z, (M, Q)
    expected = -(v * (dense * logits.movedim(1, 3).reshape(18, -1).log_softmax(1)).sum(1)).mean()
    found = colorization.colorization_loss(logits, nearest, z, v)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))
    uniform = colorization.colorization_loss(torch.zeros(2, len(bins), 3, 3), nearest, z, torch.ones(18))
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


# -------- Network -------------------------------------------------------------------------------------------------------

def test_network_sees_lightness_alone(bins):
    torch.manual_seed(0)
    model = colorization.Colorizer("resnet14", SIZE, bins).eval()
    lab = torch.cat([40 + 20 * colours(2, 1, SIZE, SIZE), 15 * noise(2, 2, SIZE, SIZE).double().clamp(-1, 1)], 1)
    other = torch.cat([lab[:, :1], -lab[:, 1:]], 1)
    x, y = (normalize(colorization.lab_to_rgb(v).float()) for v in (lab, other))  # well inside sRGB: nothing is clipped
    assert (x - y).abs().max() > 0.5
    # L survives the way through 32-bit RGB with a relative error of 1e-6, which the layers may enlarge a little.
    for network in (model, model.backbone):
        torch.testing.assert_close(network(x), network(y), rtol=1e-3, atol=1e-4)
        assert (network(x) - network(normalize(1 - colorization.denormalize(x)))).abs().max() > 1e-2
    shown = colorization.lightness(x) * torch.tensor(common.STD).view(3, 1, 1) + torch.tensor(common.MEAN).view(3, 1, 1)
    torch.testing.assert_close(shown, (lab[:, :1] / 100).float().expand(-1, 3, -1, -1), rtol=1e-4, atol=1e-5)


def test_saved_backbone_is_the_common_one():
    saved = colorization.backbone("resnet14", SIZE).state_dict()
    common.backbone("resnet14", SIZE).load_state_dict(saved)


@pytest.mark.parametrize("arch, size", [("resnet14", 32), ("resnet18", 16), ("resnet50", 72)])
def test_output_is_a_quarter_of_the_side_and_gradient_reaches_all(arch, size):
    bins = 10 * torch.arange(14.0).view(7, 2)
    model = colorization.Colorizer(arch, size, bins)
    logits = model(noise(2, 3, size, size))
    assert logits.shape == (2, 7, size // 4, size // 4)
    logits[:, 0].square().sum().backward()
    for name, w in model.named_parameters():
        assert w.requires_grad and w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def step():
    """Loss, gradients and class weights of the first training step of this process."""
    bins, loader = colorization.gamut(), tiny_loader()
    torch.manual_seed(0)
    model = colorization.Colorizer("resnet14", SIZE, bins)
    model.weights.copy_(colorization.class_weights(colorization.count_colours(loader, bins), bins, 0.5))
    network = distribute(model, CPU)
    _, (x,) = next(loader(0))
    nearest, z, colourful = colorization.targets(x, bins)
    loss = colorization.colorization_loss(network(x), nearest, z, model.weights[nearest[:, 0]] * colourful)
    loss.backward()
    return loss.detach(), [w.grad for w in model.parameters()], model.weights


def test_step_is_the_same_for_any_number_of_processes(processes):
    loss, gradients, weights = step()
    for n in (2, 3):
        found = processes(n, step)
        assert len({each[0].item() for each in found}) == n  # different images in each process
        torch.testing.assert_close(torch.stack([each[0] for each in found]).mean(), loss, rtol=1e-5, atol=1e-5)
        for _, theirs, w in found:
            assert torch.equal(w, weights)
            for g, expected in zip(theirs, gradients, strict=True):
                # Float32 sums in another order through batch-norms of few values: relative to each tensor's largest entry.
                assert (g - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-6


# -------- Program -------------------------------------------------------------------------------------------------------

def arguments(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["colorization.py", *map(str, flags)])


def test_grey_data_are_refused(monkeypatch, capsys):
    arguments(monkeypatch, "--size", SIZE, "--batch", BATCH)
    monkeypatch.setattr(colorization, "load_data", lambda *_: tiny_data(grey=True))
    with pytest.raises(SystemExit) as error:
        colorization.main()
    assert error.value.code == 1 and "its images are grey" in capsys.readouterr().err


def test_main_weighs_places_by_the_rarity_of_their_colour(monkeypatch):
    """The loss gets w of each place's nearest bin, w from the counts of the first epoch, and 0 where an image has no colour."""
    images = tiny_data().train.images.clone()
    images[::2] = images[::2, :1]  # every second image is grey
    data, seen, loss = Data("tiny", Split(images), Split(images), None), [], colorization.colorization_loss

    def record(name, args, data, loader, model, state):
        run.model, run.loader = model, loader
        return run

    def see(logits, nearest, z, v):
        seen.append((nearest, v))
        return loss(logits, nearest, z, v)

    run = SimpleNamespace(step=0, folder=Path(), log=lambda loss, lr: None, end_epoch=lambda epoch: None, finish=lambda: None)
    arguments(monkeypatch, "--size", SIZE, "--batch", BATCH, "--epochs", 1)
    for name, value in {"load_data": lambda *_: data, "Run": record, "colorization_loss": see,
                        "draw_colorized": lambda *_: None}.items():
        monkeypatch.setattr(colorization, name, value)
    colorization.main()
    bins = run.model.bins
    weights = colorization.class_weights(colorization.count_colours(run.loader, bins), bins, 0.5)
    torch.testing.assert_close(run.model.weights, weights)
    assert len(seen) == 3 and len(weights[seen[0][0][:, 0]].unique()) > 3
    for (nearest, v), (_, (x,)) in zip(seen, run.loader(0), strict=True):
        colourful = torch.tensor([bool((image[0] != image[1]).any()) for image in colorization.denormalize(x).mul(255).round()])
        assert 0 < colourful.sum() < BATCH
        places = len(v) // BATCH
        torch.testing.assert_close(v, weights[nearest[:, 0]] * colourful.repeat_interleave(places))


def test_size_must_be_a_multiple_of_four(monkeypatch, capsys):
    arguments(monkeypatch, "--size", 30)
    with pytest.raises(SystemExit):
        colorization.get_args()
    assert "--size 30: choose a multiple of 4" in capsys.readouterr().err


@pytest.mark.parametrize("in_memory", [True, False])
def test_picture_shows_grey_prediction_and_truth(tmp_path, in_memory):
    class Red(nn.Module):
        bins = torch.tensor([[0.0, 0.0], [80.0, 70.0]])

        def forward(self, x):  # sure of red everywhere
            return torch.tensor([0.0, 50.0]).view(1, 2, 1, 1).expand(len(x), 2, 4, 4)

    x = tiny_data().train.images
    if not in_memory:
        for i, image in enumerate(x):
            large = image.movedim(0, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
            Image.fromarray(large.numpy()).save(tmp_path / f"{i:02}.png")
    split = Split(x if in_memory else sorted(tmp_path.glob("*.png")))
    run = SimpleNamespace(data=Data("tiny", split, split, None), args=SimpleNamespace(size=SIZE, temperature=0.38, seed=0),
                          device=CPU, model=Red())
    colorization.draw_colorized(tmp_path / "colorized.png", run)
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "colorized.png"))).permute(2, 0, 1)
    rows = picture.view(3, 3, 72, 12, 72)[:, :, 4:68, :, 4:68]  # (channel, row, y, column, x): cells of 64 in frames of 4
    channels = rows.int()
    assert (channels[:, 0] - channels[:1, 0]).abs().max() <= 1  # grey, but for the rounding of the published matrix and white
    assert (channels[0, 1] - channels[1:, 1].float().mean(0)).mean() > 50  # coloured red
    if in_memory:
        shown = rows[:, 2, ::4, :, ::4].movedim(2, 0)  # (12, 3, SIZE, SIZE): different ones of the images
        assert (shown[:, None] == x).flatten(2).all(2).sum(1).tolist() == [1] * 12 and len(shown.unique(dim=0)) == 12
    assert run.model.training
