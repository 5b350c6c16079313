"""Split-brain autoencoder: the losses and targets against values computed by hand; each half equals
a network of half the width; no path leads from one half into the other."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, Shell, arguments, call_main, light_backbone, noise
from torch import nn
from torchvision.models.resnet import Bottleneck

import common
from common import Data, InMemory, Loader, Split
from kernels.views import denormalize, normalize
from methods import colorization, split_brain

SIZE = 16
LIGHT = functools.partial(light_backbone, make=split_brain.backbone)


def colours(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator)


def random_images(count=12, grey=False, seed=0):
    channels = 1 if grey else 3
    pixels = colours(count, channels, SIZE, SIZE, seed=seed).mul(256).byte()
    split = Split(InMemory(pixels.expand(-1, 3, -1, -1).contiguous()))
    return Data("random", split, split, None)


@pytest.fixture(scope="module")
def bins():
    return split_brain.gamut()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return LIGHT("resnet14", SIZE).eval()


def model(predict="other", counts=(50, 7)):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_brain, "backbone", LIGHT)
        return split_brain.SplitBrain("resnet14", SIZE, counts, predict, torch.zeros(counts[1], 2))


# -------- The losses ------------------------------------------------------------------------------


def test_classification_loss_by_hand():
    """Two places with probabilities 0.5, 0.25, 0.25 and 0.1, 0.1, 0.8."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64)
    logits = p.log().T.reshape(1, 3, 1, 2) + 7
    classes = torch.tensor([[[1, 2]]])
    found = split_brain.classification_loss(logits, classes).item()
    assert found == pytest.approx(-(math.log(0.25) + math.log(0.8)) / 2, rel=1e-12)


def test_regression_loss_by_hand():
    """Half the squared distance of (1, 2) to (4, 6), 5 apart, and 0 for a place that is right; a
    batch twice as large has the same mean."""
    predicted = torch.tensor([[1.0, 5.0], [2.0, 5.0]]).reshape(1, 2, 1, 2)
    target = torch.tensor([[4.0, 5.0], [6.0, 5.0]]).reshape(1, 2, 1, 2)
    assert split_brain.regression_loss(predicted, target) == 25 / 2 / 2
    twice = [part.repeat(2, 1, 1, 1) for part in (predicted, target)]
    assert split_brain.regression_loss(*twice) == 25 / 2 / 2


def test_loss_of_guessing_is_that_of_the_docstring(bins):
    x = normalize(colours(2, 3, SIZE, SIZE))
    total = 0
    for classes, count in zip(split_brain.targets(x, bins, "classification"), (50, len(bins))):
        total += split_brain.classification_loss(torch.zeros(2, count, 4, 4), classes)
    assert total.item() == pytest.approx(math.log(50) + math.log(261), rel=1e-6)
    assert f"{total:.2f}" == "9.48" and "log 261 + log 50 = 9.48" in split_brain.__doc__


# -------- The targets -----------------------------------------------------------------------------


def test_targets_by_hand(bins):
    """White, black, pure red and blue at the four places that are read; grey everywhere else. Their
    L are 100, 0, 53.24 and 32.30, their ab (0, 0), (0, 0), (80, 67) and (79, -108)."""
    x = torch.full((1, 3, 8, 8), 0.5)
    x[0, :, 2, 2] = 1
    x[0, :, 2, 6] = 0
    x[0, :, 6, 2] = torch.tensor([1.0, 0.0, 0.0])
    x[0, :, 6, 6] = torch.tensor([0.0, 0.0, 1.0])
    L, ab = split_brain.targets(normalize(x), bins, "classification")
    assert L.tolist() == [[[49, 0], [26, 16]]]
    assert bins[ab.flatten()].tolist() == [[0, 0], [0, 0], [80, 70], [80, -110]]

    L, ab = split_brain.targets(normalize(x), bins, "regression")
    expected = torch.tensor([50, -50, 3.24, -17.70]).view(1, 1, 2, 2) / 50
    torch.testing.assert_close(L, expected, rtol=0, atol=5e-4)
    expected = torch.tensor([[0, 0, 80.09, 79.19], [0, 0, 67.20, -107.86]]).view(1, 2, 2, 2) / 50
    torch.testing.assert_close(ab, expected, rtol=0, atol=1e-3)


def test_every_step_of_lightness_is_a_class(bins):
    """A step is 2 wide: 0 to 2 is class 0, 98 to 100 class 49."""
    L = torch.arange(0.5, 100).view(100, 1, 1, 1).expand(-1, -1, 4, 4)
    x = colorization.lab_to_rgb(torch.cat([L, 0 * L, 0 * L], 1))
    found, _ = split_brain.targets(normalize(x), bins, "classification")
    assert found.flatten().tolist() == [step // 2 for step in range(100)]


def test_classes_of_colours_are_the_nearest_bins_of_colorization(bins):
    x = normalize(colours(3, 3, SIZE, SIZE))
    _, ab = split_brain.targets(x, bins, "classification")
    nearest, _, _ = colorization.targets(x, bins)
    assert torch.equal(ab.flatten(), nearest[:, 0])


# -------- The halves ------------------------------------------------------------------------------


def half_network(channels_in):
    """A resnet14 of half the width, as common.backbone would build it."""
    net = common.ResNet(Bottleneck, [1, 1, 1, 1])
    stem = nn.Conv2d(channels_in, 16, 3, 2, 1, bias=False)
    common.rebuild(net, stem, 12, strides=(1, 2, 2, 1))
    net.fc = nn.Identity()
    return net.eval()


@pytest.mark.parametrize("half", [0, 1])
def test_each_half_is_a_network_of_half_the_width(net, half, monkeypatch):
    """With the half's weights it gives the half's features, of L (twice), or of ab."""
    monkeypatch.setattr(common, "ResNet", Shell)
    alone = half_network(2)
    own = {}
    for key, value in net.state_dict().items():
        own[key] = value.chunk(2)[half] if value.ndim else value
    alone.load_state_dict(own)
    x = normalize(colours(3, 3, SIZE, SIZE))
    lab = (colorization.rgb_to_lab(denormalize(x)) - torch.tensor([50, 0, 0]).view(3, 1, 1)) / 50
    seen = (lab[:, [0, 0]], lab[:, 1:])[half]
    torch.testing.assert_close(net(x).chunk(2, dim=1)[half], alone(seen), rtol=1e-4, atol=1e-5)


def test_half_the_weights_of_the_whole_network(net):
    """But for the first layer, which sees four channels in place of three."""
    whole = light_backbone("resnet14", SIZE)
    assert net.out_dim == whole.out_dim
    for (name, split), (_, full) in zip(net.named_modules(), whole.named_modules(), strict=True):
        if isinstance(split, nn.Conv2d) and name != "conv1":
            assert 2 * split.weight.numel() == full.weight.numel(), name
    assert net.conv1.weight.shape == (32, 2, 3, 3)


def test_initial_weights_are_those_of_half_the_width(net):
    """He's deviation for the 48 outputs of a half in layer2, by 9 pixels; both halves differ."""
    weight = net.layer2[0].conv2.weight  # (48, 24, 3, 3)
    assert weight.shape == (48, 24, 3, 3)
    expected = math.sqrt(2 / (24 * 9))
    for half in weight.chunk(2):
        # 5184 numbers: the deviation is known to one part in a hundred
        assert half.std().item() == pytest.approx(expected, rel=0.04)
    assert not torch.equal(*weight.chunk(2))


def gradients_of_inputs(network):
    """How much each prediction depends on what the halves see: {prediction: (of L, of ab)}."""
    network.eval()
    given = noise(2, 4, SIZE, SIZE, dtype=torch.float32).requires_grad_()
    network.backbone.conv1.register_forward_pre_hook(lambda layer, inputs: (given,))
    found = {}
    for name, predicted in zip(("L", "ab"), network(torch.zeros(2, 3, SIZE, SIZE))):
        (grad,) = torch.autograd.grad(predicted.square().sum(), given, retain_graph=True)
        found[name] = tuple(part.abs().max().item() for part in grad.chunk(2, dim=1))
    return found


@pytest.mark.parametrize("predict", ["other", "own"])
def test_no_path_leads_from_one_half_into_the_other(predict):
    """The prediction of ab has no gradient in ab, that of L none in L; the plain autoencoder's are
    the other way round. Not small: exactly 0."""
    found = gradients_of_inputs(model(predict))
    if predict == "own":
        found = {"ab": found["L"], "L": found["ab"]}
    assert found["ab"][0] > 0 and found["ab"][1] == 0
    assert found["L"][0] == 0 and found["L"][1] > 0


@pytest.mark.parametrize("layer", ["layer1", "layer3"])
def test_one_whole_convolution_would_be_a_path(layer):
    """What the split is for: a single convolution that sees all channels shows each half what it is
    to predict."""
    network = model()
    block = getattr(network.backbone, layer)[0]
    block.conv2 = nn.Conv2d(block.conv2.in_channels, block.conv2.out_channels, 3, padding=1)
    block.downsample[0].stride = block.conv2.stride
    found = gradients_of_inputs(network)
    assert all(value > 0 for values in found.values() for value in values)


def test_each_loss_trains_one_half():
    network = model()
    _, predicted_ab = network(normalize(colours(4, 3, SIZE, SIZE)))
    split_brain.classification_loss(predicted_ab, torch.ones(4, 4, 4, dtype=torch.long)).backward()
    for name, w in network.backbone.named_parameters():
        sees_L, sees_ab = w.grad.chunk(2)
        assert sees_L.abs().max() > 0 and not sees_ab.any(), name


def test_features_are_those_of_both_halves(net):
    """Other colours of the same lightness change the second half of the features alone, another
    lightness the first half alone."""
    L = 40 + 20 * colours(2, 1, SIZE, SIZE)
    ab = 15 * noise(2, 2, SIZE, SIZE, dtype=torch.float32).clamp(-1, 1)  # inside sRGB

    def features(L, ab):
        x = normalize(colorization.lab_to_rgb(torch.cat([L, ab], 1)))
        return net(x).chunk(2, dim=1)

    first, second = features(L, ab)
    other_first, other_second = features(L, -ab)
    # L survives the way through 32-bit RGB with a relative error of 1e-6
    torch.testing.assert_close(first, other_first, rtol=1e-3, atol=1e-4)
    assert (second - other_second).abs().max() > 1e-2
    other_first, other_second = features(100 - L, ab)
    torch.testing.assert_close(second, other_second, rtol=1e-3, atol=1e-4)
    assert (first - other_first).abs().max() > 1e-2


@pytest.mark.parametrize(
    "arch, size",
    [
        ("resnet14", 32),
        pytest.param("resnet18", 16, marks=pytest.mark.thorough),
        pytest.param("resnet50", 36, marks=pytest.mark.thorough),
    ],
)
def test_gradient_reaches_everything(arch, size):
    network = split_brain.SplitBrain(arch, size, (50, 7), "other", torch.zeros(7, 2))
    L, ab = network(noise(2, 3, size, size, dtype=torch.float32))
    assert L.shape == (2, 50, size // 4, size // 4) and ab.shape == (2, 7, size // 4, size // 4)
    (L[:, 0].square().sum() + ab[:, 0].square().sum()).backward()
    for name, w in network.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


# -------- Program ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, predict", [("classification", "other"), ("regression", "own")])
def test_main_minimises_the_sum_of_both_losses(train, monkeypatch, loss, predict):
    """What the loss of a half is given as a target comes from the images of the step."""
    seen = []
    real = split_brain.LOSSES[loss]

    def see(predicted, target):
        seen.append((predicted.shape, target, real(predicted, target)))
        return seen[-1][-1]

    monkeypatch.setitem(split_brain.LOSSES, loss, see)
    data = random_images()
    flags = ["--size", SIZE, "--batch", 6, "--epochs", 1, "--loss", loss, "--predict", predict]
    run = train("split_brain", *flags, data=data, double=False)
    loader = Loader(data.train, split_brain.views(run.args), 6, 0, CPU)
    assert len(run.losses) == 2 and len(seen) == 4
    for step, (x,) in loader(0):
        expected = split_brain.targets(x, run.state["model/bins"], loss)
        both = seen[2 * step : 2 * step + 2]
        for (shape, target, _), part, count in zip(both, expected, ((1, 50), (2, 261))):
            assert torch.equal(target, part)
            assert shape == (6, count[loss == "classification"], 4, 4)
        parts = [part.detach() for _, _, part in both]
        assert run.losses[step] == sum(parts)
        assert [run.more[step]["loss_L"], run.more[step]["loss_ab"]] == parts


def test_grey_data_are_refused(tmp_path):
    flags = ("--size", SIZE, "--batch", 6, "--out", tmp_path / "run")
    found = call_main("split_brain", *flags, data=random_images(grey=True))
    assert found.code == 1 and found.err.count("\n") == 1
    assert "all images are grey" in found.err and not (tmp_path / "run").exists()


def test_many_processes_do_not_add_their_traces_of_colour_up(monkeypatch, capsys):
    """Images whose channels differ by 3 of 255, as compression leaves them, in two processes."""
    x = torch.full((2, 3, SIZE, SIZE), 0.5)
    x[:, 0] += 3 / 255
    monkeypatch.setattr(split_brain, "gather", lambda chroma: torch.cat([chroma, chroma]))
    with pytest.raises(SystemExit):
        split_brain.refuse_grey(lambda epoch: [(0, [normalize(x)])])
    assert "all images are grey" in capsys.readouterr().err
    x[1, 0] += 3 / 255
    split_brain.refuse_grey(lambda epoch: [(0, [normalize(x)])])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--size", 30), "--size 30: choose a multiple of 4"),
        (("--arch", "vit_micro"), "invalid choice: 'vit_micro'"),
        (("--loss", "l1"), "invalid choice: 'l1'"),
        (("--temperature", 0), "--temperature 0: choose more than 0"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("split_brain", *flags)
    text = capsys.readouterr().err
    assert error.value.code == 1 and words in text and text.count("\n") == 1


def test_views_picture_shows_what_each_half_sees():
    x = colours(2, 3, SIZE, SIZE)
    first, second = split_brain.show([normalize(x)]).values()
    assert (first - first[:, :1]).abs().max() < 1 / 255  # grey
    L = colorization.rgb_to_lab(x)[:, :1]
    torch.testing.assert_close(colorization.rgb_to_lab(first)[:, :1], L, rtol=0, atol=0.05)
    pale = x * 0.1 + 0.45  # so pale that sRGB can show it at another lightness
    _, second = split_brain.show([normalize(pale)]).values()
    found, expected = colorization.rgb_to_lab(second), colorization.rgb_to_lab(pale)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=0, atol=0.05)
    assert (found[:, 0] - 60).abs().max() < 0.05


class Knows(nn.Module):
    """Predicts the truth of the images that it is shown."""

    def __init__(self, loss, bins):
        super().__init__()
        self.loss = loss
        self.bins = bins

    def forward(self, x):
        L, ab = split_brain.targets(x, self.bins, self.loss)
        if self.loss == "regression":
            return L, ab
        logits = []
        for classes, count in ((L, 50), (ab, len(self.bins))):
            logits.append(99 * nn.functional.one_hot(classes, count).movedim(3, 1).float())
        return logits


@pytest.mark.parametrize("loss", ["classification", "regression"])
def test_picture_shows_what_is_predicted(tmp_path, monkeypatch, loss, bins):
    """A network that knows the truth: the columns are equal, to the width of a class."""
    drawn = SimpleNamespace()
    monkeypatch.setattr(
        split_brain,
        "save_grid",
        lambda path, rows, columns, note: vars(drawn).update(rows=rows, columns=columns),
    )
    args = arguments("split_brain", "--size", SIZE, "--loss", loss)
    data = random_images()
    run = SimpleNamespace(
        name="split_brain", data=data, args=args, device=CPU, model=Knows(loss, bins)
    )
    split_brain.draw_predicted(tmp_path / "predicted.png", run)
    assert drawn.columns == ["image", "L", "predicted ab", "ab", "predicted L"]
    assert len(drawn.rows) == 12 and run.model.training
    columns = [torch.stack(column) for column in zip(*drawn.rows)]
    _, lightness, predicted_colours, true_colours, predicted_lightness = columns
    L = colorization.rgb_to_lab(lightness[:, :, 2::4, 2::4])[:, 0]
    found = colorization.rgb_to_lab(predicted_lightness)[:, 0]
    width = 1.05 if loss == "classification" else 0.05
    assert (found - L).abs().max() <= width
    difference = (predicted_colours - true_colours[:, :, 2::4, 2::4]).abs()
    assert difference.mean() < (0.05 if loss == "classification" else 1e-3)
