"""Egomotion: the loss by hand, the motion of the camera against the pixels that are shown, and the
classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, call_main, noise, short, tiny_clips, tiny_data

from common import Loader
from kernels.clips import VideosInMemory
from kernels.views import AUGMENT, BatchRandom, denormalize
from methods import egomotion

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def model(classes=7):
    torch.manual_seed(0)
    return egomotion.Egomotion("resnet14", 16, 32, classes)


def plain_views(monkeypatch, *flags):
    """The views of these flags without changes of colour."""
    monkeypatch.setattr(egomotion, "color_jitter", lambda x, *_: x)
    ((clip_crop, augment),) = egomotion.views(arguments("egomotion", *flags))
    return clip_crop, augment


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """Guessing costs log C for each axis. Logits that favour the class 2 to the right by a, and a
    class downwards that is wrong by b."""
    zeros = torch.zeros(3, 2, 7, dtype=torch.float64)
    classes = torch.tensor([[2, 5]]).expand(3, 2)
    assert egomotion.motion_loss(zeros, classes).item() == pytest.approx(2 * math.log(7))
    logits = zeros.clone()
    logits[:, 0, 2] = 3
    logits[:, 1, 0] = 1
    right = math.log(6 + math.exp(3)) - 3
    down = math.log(6 + math.e)
    found = egomotion.motion_loss(logits, classes).item()
    assert found == pytest.approx(right + down, rel=1e-12)


def test_guessing_has_the_loss_of_the_docstring():
    assert "2 log C, 3.892 for C = 7" in egomotion.__doc__
    assert 2 * math.log(arguments("egomotion").classes) == pytest.approx(3.892, abs=5e-4)


def test_loss_is_the_mean_over_clips():
    logits = noise(6, 2, 7)
    classes = torch.arange(12).view(6, 2) % 7
    parts = [egomotion.motion_loss(a, b) for a, b in zip(logits.split(1), classes.split(1))]
    torch.testing.assert_close(
        egomotion.motion_loss(logits, classes), torch.stack(parts).mean(), **EXACT
    )


def test_no_axis_has_a_gradient_from_the_other():
    """Each has a softmax of its own: what one answers changes nothing for the other."""
    logits = noise(4, 2, 5).requires_grad_()
    classes = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]])
    egomotion.motion_loss(logits, classes).backward()
    alone = torch.softmax(logits[:, 0], 1) - F.one_hot(classes[:, 0], 5)
    torch.testing.assert_close(logits.grad[:, 0], alone.detach() / 4, **EXACT)


def test_accuracy_is_the_mean_of_both_axes():
    classes = torch.tensor([[1, 2], [3, 0]])
    logits = F.one_hot(classes, 5).float()
    assert egomotion.accuracy(logits, classes) == 1
    assert egomotion.accuracy(logits, torch.tensor([[1, 0], [0, 0]])) == 0.5


# -------- The motion of the camera ----------------------------------------------------------------


def shifted(x, motion):
    """Frames x (n, 3, H, W), as a camera sees them that has moved by motion (n, 2), and which of
    the pixels it can know, (n, 1, H, W)."""
    n, _, H, W = x.shape
    theta = torch.eye(2, 3).repeat(n, 1, 1)
    theta[:, :, 2] = 2 * motion / torch.tensor([W, H])
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    known = (grid.abs() <= 1 - 2 / W).all(3)[:, None]
    return F.grid_sample(x, grid, align_corners=False), known


def test_the_motion_is_that_of_the_pixels(monkeypatch):
    """In whole frames of 48 pixels: what the first frame shows at p + s the second shows at p, for
    pairs in either order and in mirrors. The background, which is most of a frame, fits within some
    grey levels; with the opposite motion, or that of the other axis, it does not fit."""
    data = tiny_clips()
    flags = ("--size", 48, "--crop", 1)
    args = arguments("egomotion", *flags)
    loader = Loader(data.train, [plain_views(monkeypatch, *flags)], 24, 0, CPU)
    kinds = set()
    for epoch in range(3):
        _, (x,) = next(loader(epoch))
        rand = loader.random(epoch, 0, 0, AUGMENT)
        camera = data.train.images.truth.camera[loader.index]
        motion = egomotion.moved(camera, rand, args)
        _, *order = egomotion.draw_pairs(loader.random(epoch, 0, 0, AUGMENT), args)
        kinds |= set(zip(*[part.tolist() for part in order]))

        first, second = denormalize(x[:, 0]), denormalize(x[:, 1])
        errors = []
        for candidate in (motion, -motion, motion * torch.tensor([-1, 1]), motion.flip(1)):
            expected, known = shifted(first, candidate)
            difference = (expected - second).abs().mean(1, keepdim=True)
            difference[~known] = math.nan
            errors.append(difference.flatten(1).nanmedian(1).values)
        right, *wrong = torch.stack(errors)
        assert right.median() < 0.01
        for other in wrong:
            assert other.median() > 3 * right.median()
    assert len(kinds) == 4  # both orders, mirrored or not


def test_motion_by_hand(monkeypatch):
    """Two frames forwards, as they are: twice the camera's motion. Backwards: the opposite. In a
    mirror: the same downwards, the opposite to the right."""
    camera = torch.tensor([[1.5, -3.0]]).repeat(4, 1)
    gap = torch.tensor([2, 2, 2, 1])
    backwards = torch.tensor([False, True, False, True])
    mirrored = torch.tensor([False, False, True, True])
    monkeypatch.setattr(egomotion, "draw_pairs", lambda *_: (gap, backwards, mirrored))
    found = egomotion.moved(camera, None, None)
    assert found.tolist() == [[3, -6], [-3, 6], [-3, -6], [1.5, 3]]


def test_frames_are_those_that_are_drawn(monkeypatch):
    """Frames of the grey level t / 10: the first and the one `gap` later, or in the other order.
    All distances occur."""
    clip_crop, augment = plain_views(monkeypatch, "--distance", 3)
    assert clip_crop.frames == 4
    grey = torch.arange(4) / 10
    x = grey.view(1, 4, 1, 1, 1).expand(64, 4, 3, 8, 8)
    shown = denormalize(augment(x, BatchRandom([0], 64)).flatten(0, 1)).mean((1, 2, 3))
    args = arguments("egomotion", "--distance", 3)
    gap, backwards, _ = egomotion.draw_pairs(BatchRandom([0], 64), args)
    assert sorted(set(gap.tolist())) == [1, 2, 3] and 20 < backwards.sum() < 44
    pairs = (10 * shown).round().int().view(64, 2).tolist()
    expected = [[g, 0] if b else [0, g] for g, b in zip(gap.tolist(), backwards.tolist())]
    assert pairs == expected


def test_both_frames_have_the_same_colours():
    """Of a clip of one picture, both frames are equal."""
    ((_, augment),) = egomotion.views(arguments("egomotion"))
    picture = torch.rand(6, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = augment(picture.repeat(1, 5, 1, 1, 1), BatchRandom([0], 6))
    assert x.shape == (6, 2, 3, 32, 32)
    torch.testing.assert_close(x[:, 0], x[:, 1])


def test_all_crops_have_one_size():
    """A pixel of the view is the same number of pixels of the frame, in every clip."""
    ((clip_crop, _),) = egomotion.views(arguments("egomotion"))
    boxes = clip_crop.crop.boxes(BatchRandom([0], 200).uniform(columns=(22,)).numpy(), 48, 48)
    assert (boxes[:, 2:] == 40).all()
    assert set(boxes[:, 0]) == set(boxes[:, 1]) == set(range(9))


# -------- The classes -----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [7, 8])
def test_classes_are_equally_frequent_among_pairs(classes):
    args = arguments("egomotion", "--classes", classes)
    camera = 7 * torch.rand(5000, 2, generator=torch.Generator().manual_seed(0)) - 3.5
    bounds = egomotion.class_bounds(camera, args)
    motions = egomotion.moved(camera, BatchRandom([0], 5000), args)
    found = egomotion.to_classes(motions, bounds)
    for axis in (0, 1):
        counts = found[:, axis].bincount(minlength=classes)
        assert len(counts) == classes
        assert (counts / 5000 - 1 / classes).abs().max() < 0.015


def test_opposite_motions_have_opposite_classes():
    """Two equal frames are in the class in the middle."""
    camera = 7 * torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) - 3.5
    bounds = egomotion.class_bounds(camera, arguments("egomotion"))
    torch.testing.assert_close(bounds, -bounds.flip(1), rtol=0, atol=0)
    motions = 8 * noise(500, 2, seed=1).float()  # none is exactly a bound
    found = egomotion.to_classes(motions, bounds)
    assert torch.equal(egomotion.to_classes(-motions, bounds), 6 - found)
    assert egomotion.to_classes(torch.zeros(1, 2), bounds).tolist() == [[3, 3]]


def test_classes_by_hand():
    bounds = torch.tensor([[-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    motions = torch.tensor([[-5.0, 0.5], [1.5, 1.5], [3.0, -0.5]])
    assert egomotion.to_classes(motions, bounds).tolist() == [[0, 2], [2, 3], [3, 1]]


# -------- The network -----------------------------------------------------------------------------


def test_both_frames_go_through_one_network():
    """Its maps of a frame do not depend on the place of the frame, and the logits do."""
    network = model().eval()
    x = noise(2, 2, 3, 16, 16).float()
    seen = []
    network.top.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    logits = network(x)
    swapped = network(x.flip(1))
    assert logits.shape == (2, 2, 7)
    D = network.backbone.out_dim
    torch.testing.assert_close(seen[0][:, :D], seen[1][:, D:])
    assert (logits - swapped).abs().max() > 1e-4


def test_the_mean_of_the_map_is_the_feature():
    for arch in ("resnet14", "vit_micro"):
        net = egomotion.backbone(arch, 16).eval()
        x = noise(2, 3, 16, 16).float()
        torch.testing.assert_close(egomotion.last_map(net, x).mean((2, 3)), net(x))


# -------- What is refused -------------------------------------------------------------------------


def test_data_without_the_motion_of_the_camera(tmp_path):
    """Before anything is written."""
    reader = VideosInMemory(torch.zeros(96, 3, 16, 16).byte(), [12] * 8)
    videos = tiny_clips().train._replace(images=reader)
    for split in (videos, tiny_data().train):
        data = tiny_clips()._replace(train=split)
        found = call_main("egomotion", "--data", "bunny", "--out", tmp_path / "run", data=data)
        assert found.code == 1
        words = "error: --data bunny: how its camera moves is not known; choose --data movers"
        assert found.err.strip() == words
    assert not list(tmp_path.iterdir())


def test_frames_that_are_too_far_apart(tmp_path):
    """A clip that is too short would show its last frame again, where the camera rests."""
    flags = [*short("egomotion"), "--out", tmp_path / "run"]
    found = call_main("egomotion", *flags, "--distance", 12)
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: --distance 12: a clip has 12 frames; choose 1 to 11")
    assert not list(tmp_path.iterdir())
