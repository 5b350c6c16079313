"""RotNet: the rotation loss by hand, and the four turns of every image."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import arguments, noise

from kernels.views import BatchRandom
from methods import rotnet

EXACT = {"rtol": 1e-12, "atol": 1e-12}
CORNERS = [(0, 0), (7, 0), (7, 7), (0, 7)]  # row and column, counter-clockwise from the top left


def augment(images, rand):
    """What rotnet shows of images of side 8: (n, 4, 3, 8, 8)."""
    ((_, function),) = rotnet.views(arguments("rotnet", "--size", 8))
    return function(images, rand)


def bright_corner(n):
    """(n, 3, 8, 8): black, but for the top left pixel."""
    images = torch.zeros(n, 3, 8, 8)
    images[:, :, 0, 0] = 1
    return images


# -------- The loss --------------------------------------------------------------------------------


def test_rotation_loss_by_hand():
    """Chance is log 4. Logits that favour the right turn by a, of all four turns, give
    log(1 + 3 e^-a); the wrong one by a, log(3 + e^a)."""
    right = torch.arange(4).repeat(3)
    logits = F.one_hot(right, 4).double()  # (12, 4)

    def check(logits, expected):
        torch.testing.assert_close(rotnet.rotation_loss(logits).item(), expected, **EXACT)

    check(torch.zeros(12, 4, dtype=torch.float64), math.log(4))
    check(5 * logits, math.log1p(3 * math.exp(-5)))
    check(5 * logits.roll(1, 1), math.log(3 + math.exp(5)))
    check(5 * logits + 7, rotnet.rotation_loss(5 * logits).item())  # a shift of all logits


def test_rotation_loss_is_the_mean_over_images():
    logits = noise(4 * 6, 4)
    by_image = [rotnet.rotation_loss(four) for four in logits.split(4)]
    torch.testing.assert_close(rotnet.rotation_loss(logits), torch.stack(by_image).mean(), **EXACT)


# -------- The views -------------------------------------------------------------------------------


def test_views_are_turned_counter_clockwise_after_the_flip():
    """A bright top-left corner goes down the left side, along the bottom and up the right: 0, 90,
    180, 270 degrees counter-clockwise. Of a flipped image it starts at the right; turning first and
    then flipping would send it the other way."""
    seen = set()
    for seed in range(8):
        flipped = (BatchRandom([seed], 1).uniform() < 0.5).item()
        turns = augment(bright_corner(1), BatchRandom([seed], 1))[0]  # (4, 3, 8, 8)
        begin = 3 if flipped else 0
        for turn, view in enumerate(turns):
            corner = divmod(view[0].argmax().item(), 8)
            assert corner == CORNERS[(begin + turn) % 4]
        seen.add(flipped)
    assert seen == {False, True}


def test_four_turns_are_the_identity_and_leave_no_trace():
    """Exact turns: each has the same pixels, and turning once more leads to the next."""
    image = noise(1, 3, 8, 8).sigmoid().float()
    turns = augment(image, BatchRandom([0], 1))[0]
    for turn in range(4):
        assert torch.equal(torch.rot90(turns[turn], 1, (1, 2)), turns[(turn + 1) % 4])
        assert torch.equal(turns[turn].flatten().sort().values, turns[0].flatten().sort().values)


def test_a_flip_after_the_turn_would_swap_90_and_270():
    """Why views() flips first: flip(rot90(x)) = rot270(flip(x)), so a flip after the turn gives 90
    degrees of one image and 270 of its mirror image the same pixels under different labels."""
    x = noise(3, 8, 8)
    flip_after = torch.rot90(x, 1, (1, 2)).flip(2)
    assert torch.equal(flip_after, torch.rot90(x.flip(2), 3, (1, 2)))
    assert not torch.equal(flip_after, torch.rot90(x.flip(2), 1, (1, 2)))


class NoFlip:
    def uniform(self):
        return torch.ones(5)


def test_every_turn_of_every_image_is_in_one_batch():
    """(n, 4, ...).flatten(0, 1), as main() does, meets the labels 0 1 2 3 0 1 2 3: checked with a
    network that reads off where the bright corner is, so its logits are perfect."""
    x = augment(bright_corner(5), NoFlip()).flatten(0, 1)  # (20, 3, 8, 8)
    brightness = torch.stack([x[:, 0, row, column] for row, column in CORNERS], 1)  # (20, 4)
    logits = 100 * (brightness == brightness.max(1, keepdim=True).values).float()
    assert rotnet.rotation_loss(logits) < 1e-6


def test_main_shows_all_turns_and_asks_for_them(train, monkeypatch):
    """The network of main() gets four times the batch, in the order of the labels."""
    shown = []
    forward = rotnet.RotNet.forward

    def see(model, x):
        shown.append(x)
        return forward(model, x)

    monkeypatch.setattr(rotnet.RotNet, "forward", see)
    run = train("rotnet", "--size", 8, "--batch", 12, "--epochs", 1, double=False)
    first = run.shown.flatten(0, 1)  # of the first 8 images
    assert len(shown) == len(run.losses) == 2 and len(shown[0]) == 4 * 12
    assert torch.equal(shown[0][: len(first)], first)
    for turn in range(4):
        assert torch.equal(torch.rot90(shown[0][0::4], turn, (2, 3)), shown[0][turn::4])


# -------- The network -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_gradient_reaches_every_parameter(arch):
    model = rotnet.RotNet(arch, 16)
    logits = model(noise(8, 3, 16, 16, dtype=torch.float32))
    assert logits.shape == (8, 4)
    rotnet.rotation_loss(logits).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_pictures_show_the_four_turns():
    x = augment(noise(2, 3, 8, 8).sigmoid().float(), BatchRandom([0], 2))
    shown = rotnet.show([x])
    assert list(shown) == ["0°", "90°", "180°", "270°"]
    for turn, images in enumerate(shown.values()):
        assert torch.equal(torch.rot90(shown["0°"], turn, (2, 3)), images)
        assert 0 <= images.min() and images.max() <= 1
