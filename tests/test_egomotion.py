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
    """Guessing costs log C for each axis. Logits that favour the class 2 to the right by 3, and a
    class downwards that is wrong by 1."""
    zeros = torch.zeros(3, 6, 2, 7, dtype=torch.float64)
    classes = torch.tensor([2, 5]).expand(3, 6, 2)
    assert egomotion.motion_loss(zeros, classes).item() == pytest.approx(2 * math.log(7))
    logits = zeros.clone()
    logits[:, :, 0, 2] = 3
    logits[:, :, 1, 0] = 1
    right = math.log(6 + math.exp(3)) - 3
    down = math.log(6 + math.e)
    found = egomotion.motion_loss(logits, classes).item()
    assert found == pytest.approx(right + down, rel=1e-12)


def test_guessing_has_the_loss_of_the_docstring():
    assert "2 log C, 3.892 for C = 7" in egomotion.__doc__
    assert 2 * math.log(arguments("egomotion").classes) == pytest.approx(3.892, abs=5e-4)


def test_loss_is_the_mean_over_clips_and_pairs():
    logits = noise(4, 3, 2, 7)
    classes = torch.arange(24).view(4, 3, 2) % 7
    whole = egomotion.motion_loss(logits, classes)
    for dim in (0, 1):
        parts = zip(logits.split(1, dim), classes.split(1, dim))
        by_part = torch.stack([egomotion.motion_loss(*part) for part in parts])
        torch.testing.assert_close(whole, by_part.mean(), **EXACT)


def test_no_axis_has_a_gradient_from_the_other():
    """Each has a softmax of its own: what one answers changes nothing for the other."""
    logits = noise(4, 1, 2, 5).requires_grad_()
    classes = torch.tensor([[[0, 1]], [[2, 3]], [[4, 0]], [[1, 1]]])
    egomotion.motion_loss(logits, classes).backward()
    alone = torch.softmax(logits[:, :, 0], 2) - F.one_hot(classes[:, :, 0], 5)
    torch.testing.assert_close(logits.grad[:, :, 0], alone.detach() / 4, **EXACT)


def test_accuracy_is_the_mean_of_both_axes():
    classes = torch.tensor([[[1, 2]], [[3, 0]]])
    logits = F.one_hot(classes, 5).float()
    assert egomotion.accuracy(logits, classes) == 1
    assert egomotion.accuracy(logits, torch.tensor([[[1, 0]], [[0, 0]]])) == 0.5


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
    """In whole frames of 48 pixels: what frame i shows at p + s frame j shows at p, for pairs in
    either order and in mirrors. The background, which is most of a frame, fits within some grey
    levels; with the opposite motion, that of the mirror, or the other axis, it does not fit."""
    data = tiny_clips()
    flags = ("--size", 48, "--crop", 1)
    args = arguments("egomotion", *flags)
    loader = Loader(data.train, [plain_views(monkeypatch, *flags)], 24, 0, CPU)
    _, (x,) = next(loader(0))
    mirrored = egomotion.draw_mirrored(loader.random(0, 0, 0, AUGMENT))
    assert 4 < mirrored.sum() < 20
    camera = data.train.images.truth.camera[loader.index]
    motions = egomotion.moved(camera, mirrored, args)  # (24, 12, 2)

    frames = denormalize(x.flatten(0, 1)).unflatten(0, (24, 4))
    for number, (i, j) in enumerate(egomotion.pairs(4)):
        if i + j != 3:  # four of the twelve pairs: 0 and 3, 1 and 2, in either order
            continue
        motion = motions[:, number]
        errors = []
        for candidate in (motion, -motion, motion * torch.tensor([-1, 1]), motion.flip(1)):
            expected, known = shifted(frames[:, i], candidate)
            difference = (expected - frames[:, j]).abs().mean(1, keepdim=True)
            difference[~known] = math.nan
            errors.append(difference.flatten(1).nanmedian(1).values)
        right, *wrong = torch.stack(errors)
        assert right.median() < 0.01
        for other in wrong:
            assert other.median() > 3 * right.median()


def test_motion_by_hand():
    """Two frames with a stride of 2: twice the camera's motion forwards, the opposite backwards. In
    a mirror it is the same downwards and the opposite to the right."""
    args = arguments("egomotion", "--frames", 2)
    assert egomotion.pairs(2).tolist() == [[0, 1], [1, 0]]
    camera = torch.tensor([[1.5, -3.0]]).repeat(2, 1)
    found = egomotion.moved(camera, torch.tensor([False, True]), args)
    assert found.tolist() == [[[3, -6], [-3, 6]], [[-3, -6], [3, 6]]]


def test_all_ordered_pairs_are_asked_for():
    args = arguments("egomotion")
    table = egomotion.pairs(args.frames)
    assert len({tuple(pair) for pair in table.tolist()}) == len(table) == 12
    steps = egomotion.moved(torch.ones(1, 2), torch.tensor([False]), args)[0, :, 0]
    assert sorted(steps.tolist()) == [-6, -4, -4, -2, -2, -2, 2, 2, 2, 4, 4, 6]


def test_frames_are_shown_in_their_order(monkeypatch):
    """Half of the clips are mirrored, and all frames of these: columns of the grey levels x / 8."""
    _, augment = plain_views(monkeypatch)
    time = torch.arange(4).view(1, 4, 1, 1, 1) / 100
    x = (torch.arange(8) / 8 + time).expand(32, 4, 3, 8, 8)
    shown = denormalize(augment(x, BatchRandom([0], 32)).flatten(0, 1)).unflatten(0, (32, 4))
    mirrored = egomotion.draw_mirrored(BatchRandom([0], 32))
    assert 8 < mirrored.sum() < 24
    expected = torch.where(mirrored.view(-1, 1, 1, 1, 1), x.flip(4), x)
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-5)


def test_all_frames_have_the_same_colours():
    """Of a clip of one picture, all frames are equal."""
    ((_, augment),) = egomotion.views(arguments("egomotion"))
    picture = torch.rand(6, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = augment(picture.repeat(1, 4, 1, 1, 1), BatchRandom([0], 6))
    assert x.shape == (6, 4, 3, 32, 32)
    torch.testing.assert_close(x, x[:, :1].expand_as(x))


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
    u = torch.rand(6000, 2, generator=torch.Generator().manual_seed(0))
    camera = 7 * u - 3.5
    bounds = egomotion.class_bounds(camera[:3000], args)
    mirrored = egomotion.draw_mirrored(BatchRandom([0], 3000))
    motions = egomotion.moved(camera[3000:], mirrored, args)  # of others
    found = egomotion.to_classes(motions, bounds)
    assert found.shape == (3000, 12, 2)
    for axis in (0, 1):
        counts = found[:, :, axis].flatten().bincount(minlength=classes)
        assert len(counts) == classes
        assert (counts / counts.sum() - 1 / classes).abs().max() < 0.01


def test_opposite_motions_have_opposite_classes():
    """Where nothing has moved it is the class in the middle."""
    camera = 7 * torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) - 3.5
    bounds = egomotion.class_bounds(camera, arguments("egomotion"))
    torch.testing.assert_close(bounds, -bounds.flip(1), rtol=0, atol=0)
    motions = 8 * noise(500, 1, 2, seed=1).float()  # none is exactly a bound
    found = egomotion.to_classes(motions, bounds)
    assert torch.equal(egomotion.to_classes(-motions, bounds), 6 - found)
    assert egomotion.to_classes(torch.zeros(1, 1, 2), bounds).tolist() == [[[3, 3]]]


def test_classes_by_hand():
    bounds = torch.tensor([[-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    motions = torch.tensor([[[-5.0, 0.5], [1.5, 1.5], [3.0, -0.5]]])
    assert egomotion.to_classes(motions, bounds).tolist() == [[[0, 2], [2, 3], [3, 1]]]


# -------- The network -----------------------------------------------------------------------------


def test_logits_of_a_pair_depend_on_its_frames_and_their_order():
    """And on nothing else. All frames go through one network: exchanging two frames exchanges the
    logits of their pairs."""
    network = model().eval()
    x = noise(2, 3, 3, 16, 16).float()
    before = network(x)
    assert before.shape == (2, 6, 2, 7)
    table = egomotion.pairs(3)
    for frame in range(3):
        other = x.clone()
        other[0, frame] += noise(3, 16, 16, seed=1).float()
        changed = ((network(other) - before).abs() > 1e-6).flatten(2).any(2)  # (2, 6)
        assert torch.equal(changed[0], (table == frame).any(1))
        assert not changed[1].any()

    order = torch.tensor([1, 0, 2])
    exchanged = network(x[:, order])
    same = (order[table][:, None] == table).all(2).int().argmax(1)  # (6,): this pair was there
    torch.testing.assert_close(exchanged, before[:, same])
    assert (exchanged - before).abs().max() > 1e-4


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


def test_a_camera_that_stands_still(tmp_path):
    flags = ["--data", "tripod", "--out", tmp_path / "run"]
    found = call_main("egomotion", *flags, data=tiny_clips())
    assert found.code == 1
    words = "error: --data tripod: its camera stands still; choose --data movers"
    assert found.err.strip() == words
    assert not list(tmp_path.iterdir())


def test_clips_that_are_too_short(tmp_path):
    flags = [*short("egomotion"), "--out", tmp_path / "run"]
    found = call_main("egomotion", *flags, "--frames", 5, "--stride", 3)
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: clips of 13 frames are asked for, and 24 of 24 videos have")
    assert not list(tmp_path.iterdir())
