"""Context encoder: the losses by hand and against the official code's gradients, the holes, what
the networks may see, the two steps of main(), and what a painter that copies the boundary gets."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, light, noise
from PIL import Image
from test_context_prediction import fourier_noise
from torch import nn

from common import Data, InMemory, Split
from kernels.views import BatchRandom, denormalize, normalize
from methods import context_encoder

SIZE = 16
LIGHT = light("context_encoder")["backbone"]


def colours(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator)


def build(size=SIZE, side=SIZE, bottleneck=8, width=2):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_encoder, "backbone", LIGHT)
        return context_encoder.ContextEncoder("resnet14", size, side, bottleneck, width)


def view_of(count=4, *flags):
    """What augment() makes of random images: (count, 4, SIZE, SIZE)."""
    args = arguments("context_encoder", "--size", SIZE, *flags)
    ((_, augment),) = context_encoder.views(args)
    return augment(colours(count, 3, SIZE, SIZE), BatchRandom([0], count))


# -------- The losses ------------------------------------------------------------------------------


def test_reconstruction_loss_by_hand():
    """One pixel of three channels is 1 off in each, with weight 10, one is 2 off with weight 1, two
    are right: (3 * 10 + 3 * 4) / 12."""
    x = torch.zeros(1, 3, 2, 2)
    y = torch.zeros(1, 3, 2, 2)
    y[..., 0, 0] = 1
    y[..., 1, 1] = -2
    w = torch.tensor([[10.0, 7.0], [7.0, 1.0]]).view(1, 1, 2, 2)
    assert context_encoder.reconstruction_loss(y, x, w) == (3 * 10 + 3 * 4) / 12


def test_losses_are_those_of_the_probabilities():
    real, fake = noise(5), noise(5, seed=1)
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    found = context_encoder.discriminator_loss(real, fake)
    expected = -d_real.log().mean() - (1 - d_fake).log().mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(context_encoder.adversarial_loss(fake), -d_fake.log().mean())
    # a discriminator that guesses
    zeros = torch.zeros(3)
    assert context_encoder.discriminator_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    # sure of itself: no overflow, and the one that is deceived pays
    sure = torch.full((3,), 200.0)
    assert context_encoder.discriminator_loss(sure, -sure) == 0
    assert context_encoder.discriminator_loss(-sure, sure) == 400
    assert context_encoder.adversarial_loss(-sure) == 200


def official_gradient(y, x, d_fake, wtl2, overlap):
    """train.lua, fGx, in numpy: what netG:backward is given. MSECriterion is a mean over all
    numbers; the gradient of the adversary arrives as that of BCECriterion at its output d_fake,
    here passed through a discriminator that is the sigmoid of the mean of its input."""
    n = len(y)
    numbers = y[0].size
    side = y.shape[2]
    df_do = -1 / d_fake / n  # BCE with the label 1
    df_dg = (df_do * d_fake * (1 - d_fake)).reshape(n, 1, 1, 1) / numbers * np.ones_like(y)
    l2 = 2 * (y - x) / y.size
    weights = np.full_like(y, 10 * wtl2)
    weights[:, :, overlap : side - overlap, overlap : side - overlap] = wtl2
    return (1 - wtl2) * df_dg + weights * l2


def test_gradient_is_the_official_one():
    """Of the centre version with overlap: the sum of both losses, at the painted square."""
    x, y = noise(3, 3, 8, 8).tanh(), noise(3, 3, 8, 8, seed=1).tanh().requires_grad_()
    overlap, a = 2, 0.001
    fake = y.mean((1, 2, 3))
    hidden = context_encoder.central_hole(3, 16, overlap).double()
    hidden = context_encoder.region(hidden, 8)
    w = hidden + 10 * (1 - hidden)
    loss = (1 - a) * context_encoder.reconstruction_loss(y, x, w)
    loss = loss + a * context_encoder.adversarial_loss(fake)
    (found,) = torch.autograd.grad(loss, y)
    d_fake = fake.detach().sigmoid().numpy()
    expected = official_gradient(y.detach().numpy(), x.numpy(), d_fake, 1 - a, overlap)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-10, atol=1e-14)


# -------- The holes -------------------------------------------------------------------------------


def test_central_hole_is_a_quarter_less_the_overlap():
    hidden = context_encoder.central_hole(2, 128, 0)
    assert hidden.mean() == 0.25 and hidden[:, :, 32:96, 32:96].all()
    hidden = context_encoder.central_hole(2, 128, 4)  # as published
    assert hidden.sum() == 2 * 56**2 and hidden[:, :, 36:92, 36:92].all()
    square = context_encoder.region(hidden, 64)
    assert square.shape == (2, 1, 64, 64) and square.sum() == hidden.sum()
    assert not square[:, :, :4].any() and not square[:, :, :, -4:].any()


@pytest.mark.parametrize("size", [16, 32, 64])
def test_random_holes_cover_a_quarter(size):
    """Exactly; each image has its own; every pixel is hidden at times, none always."""
    hidden = context_encoder.random_holes(BatchRandom([1], 200), 200, size, 8)
    assert hidden.shape == (200, 1, size, size)
    assert ((hidden == 0) | (hidden == 1)).all()
    assert (hidden.mean((1, 2, 3)) == 0.25).all()
    assert len(hidden.flatten(1).unique(dim=0)) == 200
    often = hidden.mean(0)
    # 0.25 with a deviation of sqrt(0.25 * 0.75 / 200) = 0.03
    assert 0.05 < often.min() and often.max() < 0.5


def test_random_holes_are_regions():
    """Not single pixels: of the neighbours of a hidden pixel most are hidden, too. Of pixels chosen
    one by one a quarter would be. With a finer pattern there are fewer."""
    share = {}
    for cells in (4, 8, 32):
        hidden = context_encoder.random_holes(BatchRandom([1], 50), 50, 32, cells)
        both = hidden[..., 1:] * hidden[..., :-1]
        share[cells] = (both.sum() / hidden[..., 1:].sum()).item()
    assert share[4] > share[8] > 0.75 > share[32]


class Given:
    """In place of random numbers: a pattern, and a box that starts at 0."""

    def __init__(self, pattern):
        self.pattern = pattern

    def uniform(self, columns):
        return torch.zeros(len(self.pattern), 2) if columns == (2,) else self.pattern


def test_random_holes_are_the_least_of_a_bicubic_pattern():
    """As in the official code: few random numbers, enlarged by bicubic interpolation, as PIL does.
    """
    numbers = colours(3, 1, 9, 9)
    hidden = context_encoder.random_holes(Given(numbers), 3, 32, 8)
    for pattern, own in zip(numbers[:, 0, :8, :8], hidden[:, 0]):
        picture = Image.fromarray(pattern.numpy())
        large = np.array(picture.resize((32, 32), Image.Resampling.BICUBIC))
        large = torch.from_numpy(large)
        quarter = large.flatten().kthvalue(256).values
        clear = (large - quarter).abs() > 1e-5
        assert clear.sum() > 1000
        assert torch.equal(own[clear] > 0, large[clear] < quarter)


# -------- What the networks see -------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["random", "center"])
def test_hidden_pixels_leave_no_trace(mask):
    """Whatever is hidden, the network sees the mean colour; with other hidden pixels it paints the
    same, with other visible ones it does not."""
    view = view_of(4, "--mask", mask)
    hidden = view[:, 3:]
    seen = context_encoder.with_holes(view)
    assert not seen[hidden.expand_as(seen) > 0].any()
    mean_colour = denormalize(torch.zeros(1, 3, 1, 1)).flatten() * 255
    torch.testing.assert_close(mean_colour, torch.tensor([123.675, 116.28, 103.53]))

    model = build().eval()
    other = noise(4, 3, SIZE, SIZE, dtype=torch.float32)
    elsewhere = torch.cat([torch.lerp(view[:, :3], other, hidden), hidden], 1)
    assert (elsewhere - view).abs().max() > 1
    painted = model(context_encoder.with_holes(view))
    assert torch.equal(painted, model(context_encoder.with_holes(elsewhere)))
    elsewhere = torch.cat([torch.lerp(view[:, :3], other, 1 - hidden), hidden], 1)
    assert not torch.equal(painted, model(context_encoder.with_holes(elsewhere)))


def test_a_central_hole_has_a_fixed_border_and_random_ones_have_none():
    """The shortcut of which the paper warns: features may latch on to the border of a hole that is
    always in the same place. Over 200 images each pixel is hidden always or never if the hole is in
    the centre, but now and then if the holes are random."""
    centre = view_of(200, "--mask", "center")[:, 3:].mean(0)
    assert ((centre == 0) | (centre == 1)).all() and 0 < centre.mean() < 1
    random = view_of(200, "--mask", "random")[:, 3:].mean(0)
    assert 0 < random.min() and random.max() < 1


@pytest.mark.parametrize(
    "size, side, channels",
    [(128, 64, [512, 256, 128, 64]), (128, 128, [512, 256, 128, 64, 64]), (32, 16, [512, 256])],
)
def test_widths_are_the_published_ones(size, side, channels):
    """At 4, 8, 16, 32 (and 64) pixels, for the square in the centre and for the whole image."""
    assert context_encoder.widths(side, 64) == channels
    with torch.device("meta"):
        discriminator = context_encoder.Discriminator(side, 64)
        assert discriminator(torch.zeros(2, 3, side, side)).shape == (2,)
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [*channels[::-1], 1]
    norms = [m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(channels) - 1  # none after the first convolution


@pytest.mark.parametrize(
    "arch, size, side",
    [
        ("resnet14", 32, 32),
        ("resnet14", 32, 16),
        ("vit_micro", 16, 16),
        pytest.param("resnet18", 16, 8, marks=pytest.mark.thorough),
        pytest.param("resnet50", 128, 64, marks=pytest.mark.thorough),
    ],
)
def test_painted_square_and_gradients(arch, size, side):
    """Its side, its range, and a gradient in every weight; each of the discriminator's, too."""
    model = context_encoder.ContextEncoder(arch, size, side, 8, 2)
    y = model(noise(2, 3, size, size, dtype=torch.float32))
    assert y.shape == (2, 3, side, side) and y.abs().max() <= 1
    discriminator = context_encoder.Discriminator(side, 2)
    (y.square().sum() + discriminator(y).square().sum()).backward()
    for network in (model, discriminator):
        for name, w in network.named_parameters():
            assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_map_is_that_of_the_feature():
    for net in (LIGHT("resnet14", 32), context_encoder.backbone("vit_micro", 32)):
        x = noise(2, 3, 32, 32, dtype=torch.float32)
        found = context_encoder.last_map(net.eval(), x)
        torch.testing.assert_close(found.mean((2, 3)), net(x))


def test_initial_weights_of_decoder_and_discriminator():
    model = build(bottleneck=64, width=8)
    for network in (model.decoder, context_encoder.Discriminator(SIZE, 16)):
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                assert module.bias is None
                count = module.weight.numel()
                # the deviation of `count` numbers is known to 1 / sqrt(2 count)
                assert abs(module.weight.std() / 0.02 - 1) < 4 / (2 * count) ** 0.5
            if isinstance(module, nn.BatchNorm2d):
                assert not module.bias.any() and 0.001 < module.weight.std() < 0.05


# -------- Program ---------------------------------------------------------------------------------


def random_data(count=12):
    pixels = colours(count, 3, SIZE, SIZE).mul(256).byte()
    split = Split(InMemory(pixels))
    return Data("random", split, split, None)


SMALL = ["--size", SIZE, "--batch", 6, "--bottleneck", 8, "--width", 2, "--warmup", 0]


def watch(monkeypatch, *names):
    """Replaces functions of the file by themselves; what they are given is kept: {name: calls}."""
    calls = {}
    for name in names:
        real = getattr(context_encoder, name)
        calls[name] = []

        def see(*args, real=real, kept=calls[name]):
            kept.append([arg.detach().clone() for arg in args])
            return real(*args)

        monkeypatch.setattr(context_encoder, name, see)
    return calls


@pytest.mark.parametrize("mask, side", [("random", SIZE), ("center", SIZE // 2)])
def test_main_weighs_and_shows_the_region(train, monkeypatch, mask, side):
    """What is painted is compared with the region in [-1, 1]; the weights are 1 in the hole and
    elsewhere 1 (random) or 10 (the overlap). Loss = (1 - a) L_rec + a L_adv."""
    names = ("reconstruction_loss", "adversarial_loss", "discriminator_loss")
    calls = watch(monkeypatch, *names)
    flags = [*SMALL, "--epochs", 1, "--mask", mask, "--overlap", 1, "--adv-weight", 0.25]
    run = train("context_encoder", *flags, data=random_data(), double=False, backbone=LIGHT)
    assert all(len(calls[name]) == 2 for name in names)
    y, x, w = calls["reconstruction_loss"][0]
    view = run.shown
    expected = context_encoder.region(2 * denormalize(view[:, :3]) - 1, side)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    hidden = context_encoder.region(view[:, 3:], side)
    visible = 1.0 if mask == "random" else 10.0
    assert torch.equal(w, torch.where(hidden > 0, 1.0, visible)) and hidden.any()

    (fake,) = calls["adversarial_loss"][0]
    loss = 0.75 * (w * (x - y) ** 2).mean() + 0.25 * F.softplus(-fake).mean()
    torch.testing.assert_close(run.losses[0], loss)
    real, fake = calls["discriminator_loss"][0]
    parts = run.more[0]
    expected = F.softplus(-real).mean() + F.softplus(fake).mean()
    torch.testing.assert_close(parts["discriminator"], expected)
    assert len(real) == len(fake) == 6 and set(parts) >= {"reconstruction", "adversarial"}


def test_two_optimisers_with_ten_times_the_rate(train):
    """As published: Adam with beta1 = 0.5 for both, the discriminator's rate a tenth. 0.256 per 256
    images are 0.012 for a batch of 12."""
    flags = [*SMALL, "--epochs", 1, "--batch", 12, "--lr", 0.256]
    state = train("context_encoder", *flags, data=random_data(), backbone=LIGHT).state
    for prefix, rate in (("optimizer", 0.012), ("discriminator_optimizer", 0.0012)):
        assert state[f"{prefix}/param_groups/0/lr"] == pytest.approx(rate)
        assert state[f"{prefix}/param_groups/0/betas/0"] == 0.5
        assert state[f"{prefix}/state/0/step"] == 1


def discriminator_after_a_step(train, monkeypatch, adv_weight):
    """The discriminator of a run of one step, with the gradients that are left in it."""
    made = []

    class Kept(context_encoder.Discriminator):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(context_encoder, "Discriminator", Kept)
        flags = [*SMALL, "--epochs", 1, "--d-share", 0, "--adv-weight", adv_weight]
        train("context_encoder", *flags, data=random_data(6), double=False, backbone=LIGHT)
    return made[0]


def test_the_loss_of_the_encoder_does_not_train_the_discriminator(train, monkeypatch):
    """Its gradients are the same whatever that loss weighs; without the adversarial loss it has
    none."""
    few, many, none = [
        discriminator_after_a_step(train, monkeypatch, weight) for weight in (0.25, 0.75, 0)
    ]
    for a, b, c in zip(few.parameters(), many.parameters(), none.parameters(), strict=True):
        assert a.grad.abs().max() > 0 and torch.equal(a.grad, b.grad)
        assert torch.equal(a, b) and torch.equal(a, c) and c.grad is None


def test_a_discriminator_learns_to_tell_them_apart():
    """Painted images are flat, real ones are not: after a few steps its loss is well below that of
    guessing, 2 log 2, and the adversarial loss above log 2."""
    torch.manual_seed(0)
    discriminator = context_encoder.Discriminator(SIZE, 4)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3, betas=(0.5, 0.999))
    for step in range(30):
        x = 2 * colours(16, 3, SIZE, SIZE, seed=step) - 1
        flat = 0.2 * (2 * colours(16, 3, 1, 1, seed=step) - 1).expand_as(x)
        loss = context_encoder.discriminator_loss(discriminator(x), discriminator(flat))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < math.log(2) < context_encoder.adversarial_loss(discriminator(flat))


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--size", 48), "--size 48: choose 16, 32, 64"),
        (("--size", 8), "--size 8: choose 16, 32, 64"),
        (("--overlap", 8), "--overlap 8: choose at most 7"),
        (("--adv-weight", 1), "--adv-weight 1: choose at least 0 and less than 1"),
        (("--mask", "all"), "invalid choice: 'all'"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("context_encoder", *flags)
    text = capsys.readouterr().err
    assert error.value.code == 1 and words in text and text.count("\n") == 1


class Red(nn.Module):
    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, x):
        red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
        return red.expand(len(x), 3, self.side, self.side)


@pytest.mark.parametrize("mask, side", [("random", SIZE), ("center", SIZE // 2)])
def test_picture_fills_the_holes_alone(tmp_path, monkeypatch, mask, side):
    drawn = SimpleNamespace()
    monkeypatch.setattr(
        context_encoder,
        "save_grid",
        lambda path, rows, columns, note: vars(drawn).update(rows=rows, columns=columns),
    )
    args = arguments("context_encoder", "--size", SIZE, "--mask", mask)
    run = SimpleNamespace(name="c", data=random_data(24), args=args, device=CPU, model=Red(side))
    context_encoder.draw_inpainted(tmp_path / "inpainted.png", run)
    assert drawn.columns == ["image", "seen", "filled"] and len(drawn.rows) == 12
    image, seen, filled = (torch.stack(column) for column in zip(*drawn.rows))
    grey = denormalize(torch.zeros(1, 3, 1, 1))
    hidden = ((seen - grey).abs().amax(1, keepdim=True) < 1e-6).expand_as(seen)
    share = 0.25 if mask == "random" else (SIZE // 2 - 2) ** 2 / SIZE**2
    assert hidden.float().mean() == pytest.approx(share, abs=1e-3)
    torch.testing.assert_close(image[~hidden], filled[~hidden], rtol=0, atol=1e-6)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand_as(seen)
    torch.testing.assert_close(filled[hidden], red[hidden])
    assert run.model.training


def test_views_picture_shows_the_holes():
    view = view_of(2)
    target, seen = context_encoder.show([view]).values()
    hidden = view[:, 3:].expand_as(seen) > 0
    assert torch.equal(normalize(target), normalize(denormalize(view[:, :3])))
    torch.testing.assert_close(seen[~hidden], target[~hidden])
    assert normalize(seen)[hidden].abs().max() < 1e-6 and hidden.any()


# -------- The shortcut: copying from the boundary -------------------------------------------------


def copied(x):
    """What the network sees (n, 3, S, S), the holes filled with the nearest pixels that are seen. A
    hole is where all three channels are exactly the mean colour, 0."""
    side = torch.arange(x.shape[3], dtype=torch.float32)
    place = torch.cartesian_prod(side, side)  # (S S, 2)
    distance = torch.cdist(place, place)
    images = []
    for image in x.flatten(2):  # (3, S S)
        hole = (image == 0).all(0)
        nearest = distance.masked_fill(hole, math.inf).argmin(1)
        images.append(image[:, nearest])
    return torch.stack(images).view_as(x)


class Copying(nn.Module):
    """In place of the encoder and decoder: repeats the boundary of the hole."""

    def __init__(self, arch, size, side, bottleneck, width):
        super().__init__()
        self.side = side
        self.nothing = nn.Parameter(torch.zeros(()))  # so that there is something to train

    def forward(self, x):
        painted = context_encoder.region(2 * denormalize(copied(x)) - 1, self.side)
        return painted + self.nothing


def smooth_data(count=24):
    """Grey images of 32 pixels, in which neighbours are alike."""
    pixels = (128 + 30 * fourier_noise(count, 32, 2.0)).clamp(0, 255).expand(-1, 3, -1, -1)
    split = Split(InMemory(pixels.byte()))
    return Data("smooth", split, split, None)


def test_copying_from_the_boundary_paints_only_what_is_near_it(train, monkeypatch):
    """Pixel after pixel the same as the nearest one that is seen: such a painting is right in the
    border that overlaps, good in the first ring of the hole, and of no use in its middle, where it
    is hardly better than one colour. There the loss asks for more than the boundary. Rings of the
    region of 16 x 16 pixels, the border first: 2 of overlap, then 6."""
    calls = watch(monkeypatch, "reconstruction_loss")
    flags = ["--size", 32, "--batch", 24, "--epochs", 1, "--warmup", 0, "--min-crop", 1]
    flags += ["--mask", "center", "--overlap", 2, "--adv-weight", 0, "--width", 2]
    data = smooth_data()
    train("context_encoder", *flags, data=data, double=False, ContextEncoder=Copying)

    (y, x, w), *_ = calls["reconstruction_loss"]
    place = torch.arange(16)
    from_edge = torch.minimum(place, 15 - place)
    ring = torch.minimum(from_edge[:, None], from_edge)  # (16, 16)

    share = []  # of the loss of one colour, the mean of all images
    for k in range(8):
        loss = (w * (x - y).square())[..., ring == k].mean()
        flat = (w * x.square())[..., ring == k].mean()
        share.append((loss / flat).item())
    assert max(share[:2]) < 1e-10
    assert 0.01 < share[2] < 0.15
    assert share[2:] == sorted(share[2:]) and share[7] > 0.8


def test_random_holes_are_too_wide_to_be_filled_from_their_boundary():
    """The share of the error of one colour that remains where holes are filled with the nearest
    pixels that are seen. Of pixels that are hidden one by one each has a neighbour: hardly any
    error remains. The holes of the default leave more than twice as much, wider holes twice as much
    again."""
    x = fourier_noise(24, 32, 2.0).expand(-1, 3, -1, -1)

    def remains(cells):
        hidden = context_encoder.random_holes(BatchRandom([0], 24), 24, 32, cells)
        view = torch.cat([x, hidden], 1)
        painted = copied(context_encoder.with_holes(view))
        return ((hidden * (painted - x).square()).sum() / (hidden * x.square()).sum()).item()

    default = arguments("context_encoder").cells
    assert remains(32) < 0.08
    assert remains(4) > 2 * remains(default) > 4 * remains(32)


class Off(Copying):
    """Paints what is right, plus `error` (side, side)."""

    error = None

    def forward(self, x):
        return super().forward(x) + self.error


@pytest.mark.parametrize("weight", [1, 10])
def test_a_painting_that_does_not_meet_its_surroundings_costs_most(train, monkeypatch, weight):
    """Images of one colour each, painted right but for 0.1. Of the 8 x 8 pixels of the region 28
    are the overlap and 36 the hole. An error in the border costs weight * 0.01 * 28 / 64, one in
    the hole 0.01 * 36 / 64: with the published weight of 10 a seam counts 7.8 times as much."""
    one_colour = colours(6, 3, 1, 1).mul(256).byte().expand(-1, -1, SIZE, SIZE)
    split = Split(InMemory(one_colour.clone()))
    data = Data("one colour", split, split, None)
    flags = [*SMALL, "--epochs", 1, "--mask", "center", "--overlap", 1, "--adv-weight", 0]
    if weight != 10:
        flags += ["--overlap-weight", weight]

    def loss_of(error):
        monkeypatch.setattr(Off, "error", error)
        run = train("context_encoder", *flags, data=data, double=False, ContextEncoder=Off)
        return run.losses[0].item()

    inside = torch.zeros(8, 8)
    inside[1:-1, 1:-1] = 0.1
    assert loss_of(0.1 - inside) == pytest.approx(weight * 0.01 * 28 / 64, rel=1e-4)
    assert loss_of(inside) == pytest.approx(0.01 * 36 / 64, rel=1e-4)
