"""Watching objects move: labels from the flow of scenes made by hand, the loss by hand, and what
the network may see."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, arguments, call_main, noise, tiny_clips

import common
from common import Data, Loader, Split
from kernels.clips import VideosInMemory
from kernels.views import BatchRandom
from methods import watching_objects_move as watching

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def flags(**changes):
    values = {"low": 0.5, "high": 1.0, "least": 0.02, "noise": 0.0, "seed": 0, "data": "movers"}
    return SimpleNamespace(**values | changes)


def model():
    torch.manual_seed(0)
    return watching.MotionMasks("resnet14", 16)


class Scene(SimpleNamespace):
    """Truth with a flow that is given: flow (n, T - 1, 2, H, W); frames and masks of T frames."""

    def part(self, index):
        return Scene(**{key: value[index] for key, value in vars(self).items()})


def scene(flow, masks=None):
    """A split whose flow is this; frame t of all clips has the grey level t."""
    n, steps, _, height, width = flow.shape
    grey = torch.arange(steps + 1, dtype=torch.uint8).view(1, -1, 1, 1, 1)
    frames = grey.expand(n, -1, 3, height, width)
    if masks is None:
        masks = torch.zeros(n, steps + 1, height, width, dtype=torch.uint8)
    truth = Scene(flow=flow, masks=masks, frames=frames)
    return Split(VideosInMemory(frames.flatten(0, 1), [steps + 1] * n, truth))


def labels_of(flow, **changes):
    """Values 0, 128 or 255 of the labels of one clip, (T - 1, H, W)."""
    found = watching.labelled(scene(flow), flags(**changes)).images.frames
    return found[: flow.shape[1], 0]


# -------- Labels ----------------------------------------------------------------------------------


def test_motion_is_measured_against_the_camera():
    """The camera moves by (3, -2); one pixel moves by (3, 2) more, length sqrt(13) in all, which is
    4 away from the camera."""
    flow = torch.tensor([3.0, -2.0]).view(2, 1, 1).repeat(1, 5, 5)
    flow[:, 1, 2] = torch.tensor([3.0, 2.0])
    found = watching.motion(flow)
    assert found[1, 2] == 4
    assert found.sum() == 4


def test_labels_by_hand():
    """Motions of 0.4, 0.5, 1.0 and 1.1 pixels: background, two unknown ones, object."""
    flow = torch.zeros(1, 1, 2, 4, 4)
    flow[0, 0, 0, 0] = torch.tensor([0.4, 0.5, 1.0, 1.1])
    found = labels_of(flow)
    assert found[0, 0].tolist() == [0, 128, 128, 255]
    assert not found[0, 1:].any()


@pytest.mark.parametrize("camera", [(0.0, 0.0), (2.5, -3.5)])
def test_without_an_object_nothing_is_labelled_and_nothing_counts(camera):
    """A still video, and one in which only the camera moves."""
    flow = torch.tensor(camera).view(1, 1, 2, 1, 1).repeat(1, 3, 1, 8, 8)
    found = labels_of(flow)
    assert not found.any()
    loss, counts = watching.mask_loss(noise(3, 8, 8), found / 255, 0.02)
    assert counts.tolist() == [0, 0, 0]


def test_labels_of_movers_are_nearly_the_exact_masks():
    """With the exact flow; parts of an object that hardly move are missing, nothing is too much."""
    split = tiny_clips().test
    film = watching.labelled(split, flags()).images.frames.unflatten(0, (-1, 22))
    label, exact = film[:, :11, 0], film[:, :11, 1] > 0
    moves = label == 255
    assert exact.any() and torch.equal(exact, split.images.truth.masks[:, :-1] > 0)
    assert not (moves & ~exact).any()
    assert (moves & exact).sum() > 0.8 * exact.sum()
    assert not film[:, :11, 2].any()


def test_errors_of_the_flow_make_wrong_labels_in_blocks():
    """As large as asked for where the grid has its points, equal for a seed; and wrong labels lie
    side by side: most have a wrong neighbour to the right."""
    found = watching.errors((50, 11, 2, 48, 48), torch.Generator().manual_seed(0))
    assert found.shape == (50, 11, 2, 48, 48)
    assert found[..., 0, 0].std().item() == pytest.approx(1, abs=0.1)  # a corner is a grid point

    flow = torch.zeros(1, 40, 2, 48, 48)
    wrong = labels_of(flow, noise=0.7) == 255
    assert 0.01 < wrong.float().mean() < 0.5
    beside = wrong[:, :, :-1] & wrong[:, :, 1:]
    assert beside.sum() > 0.8 * wrong[:, :, :-1].sum()
    assert torch.equal(wrong, labels_of(flow, noise=0.7) == 255)
    assert not torch.equal(wrong, labels_of(flow, noise=0.7, seed=1) == 255)


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """Logits 1 and 3 on object pixels, 2 on a background pixel, any on an unknown one."""
    logits = torch.tensor([[[1.0, 3.0], [2.0, -50.0]]])
    label = torch.tensor([[[1.0, 0.8], [0.1, 0.5]]])
    loss, counts = watching.mask_loss(logits, label, 0.5)
    of_object = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2
    of_background = math.log1p(math.exp(2))
    assert loss.item() == pytest.approx((of_object + of_background) / 2)
    assert counts.tolist() == [1]
    assert watching.mask_loss(logits, label, 0.51)[1].tolist() == [0]


def test_object_and_background_weigh_the_same():
    """One object pixel of 64: the answer "everywhere background" costs as much as "everywhere
    object", and 1/2 everywhere costs log 2."""
    label = torch.zeros(1, 8, 8)
    label[0, 3, 3] = 1
    logits = torch.full((1, 8, 8), 4.0)
    nowhere, _ = watching.mask_loss(-logits, label, 0)
    everywhere, _ = watching.mask_loss(logits, label, 0)
    torch.testing.assert_close(nowhere, everywhere)
    half, _ = watching.mask_loss(0 * logits, label, 0)
    assert half.item() == pytest.approx(math.log(2))


def test_unknown_pixels_get_no_gradient():
    logits = noise(2, 6, 6).requires_grad_()
    label = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0))
    loss, _ = watching.mask_loss(logits, label, 0)
    loss.sum().backward()
    unknown = (label >= 0.25) & (label <= 0.75)
    assert torch.equal(logits.grad == 0, unknown)
    assert torch.equal(logits.grad < 0, label > 0.75)


def test_overlap_by_hand():
    """4 pixels predicted, 6 exact, 2 both: 2/8. And a frame in which all is right."""
    logits = -torch.ones(2, 4, 4)
    exact = torch.zeros(2, 4, 4)
    logits[0, 0] = 1
    exact[0, 0, :2] = 1
    exact[0, 1] = 1
    logits[1, 2] = exact[1, 2] = 1
    answers = torch.stack([torch.rand(2, 4, 4), exact], 1)
    assert watching.overlap((logits, answers)).item() == pytest.approx((2 / 8 + 1) / 2)


def test_square_in_the_middle_has_the_overlap_of_the_docstring():
    """The number that held_out should be compared with: the best of all sides."""
    exact = tiny_clips().test.images.truth.masks[:, :-1].flatten(0, 1) > 0
    best = 0
    for margin in range(4, 22):
        logits = -torch.ones(exact.shape)
        logits[:, margin:-margin, margin:-margin] = 1
        answers = torch.stack([exact, exact], 1).float()
        best = max(best, watching.overlap((logits, answers)).item())
    assert best == pytest.approx(0.19, abs=0.06)  # twelve of a thousand clips


def test_frames_that_do_not_count_do_not_matter(train):
    """The loss is the mean over the others: frames of still clips beside them change nothing but
    the batch statistics, so a batch with none that moves has the loss 0 and no gradient."""
    still = scene(torch.zeros(12, 11, 2, 48, 48))
    data = Data("still", still, still, still)
    run = train("watching_objects_move", "--size", 16, "--batch", 12, "--epochs", 1, data=data)
    assert run.losses.tolist() == [0]
    assert all(not gradient.any() for gradient in run.gradients[0].values())


def test_loss_is_the_mean_over_the_frames_that_count(train, monkeypatch):
    seen = []
    loss = watching.mask_loss

    def see(*args):
        seen.append(loss(*args))
        return seen[-1]

    monkeypatch.setattr(watching, "mask_loss", see)
    flags = ["--size", 16, "--batch", 12, "--epochs", 1, "--least", 0.1]
    run = train("watching_objects_move", *flags)
    for found, (losses, counts) in zip(run.losses, seen, strict=True):
        chosen = losses[counts > 0]
        assert 0 < len(chosen) < 12
        torch.testing.assert_close(found, chosen.mean().detach())


# -------- The views -------------------------------------------------------------------------------


def test_a_clip_is_a_label_and_its_frame():
    """Frame t has the grey level t; object pixels of its label are its first t + 1 columns."""
    flow = torch.zeros(1, 3, 2, 8, 8)
    for t in range(3):
        flow[0, t, 0, :2, : t + 1] = 5
    split = watching.labelled(scene(flow), flags())
    args = arguments("watching_objects_move", "--size", 8)
    met = set()
    for epoch in range(12):
        _, (x,) = next(Loader(split, watching.plain_views(args, 3), 1, 0, CPU)(epoch))
        t = watching.show([x])["frame"][0, 0, 0, 0].mul(255).round().item()
        assert (x[0, 0, 0] == 1).sum() == 2 * (t + 1)
        met.add(t)
    assert met == {0, 1, 2}  # the last frame has no flow


def test_label_and_frame_get_the_same_crop_and_flip():
    """A white square before black, whose label is the square itself, is still its label, up to
    rounding at its edges."""
    frames = torch.zeros(16, 2, 3, 48, 48, dtype=torch.uint8)
    frames[:, :, :, 10:22, 5:20] = 255
    loader = Loader(
        Split(VideosInMemory(frames.flatten(0, 1), [2] * 16)),
        watching.views(arguments("watching_objects_move", "--size", 48), 1),
        16, 0, CPU,
    )  # fmt: skip
    _, (x,) = next(loader(0))
    shown = watching.show([x])
    bright = shown["frame"].mean(1) > 0.25  # colours make the square darker
    wrong = bright != (shown["label"][:, 0] > 0.5)
    assert wrong.float().mean() < 0.01
    assert len({tuple(mask.flatten().nonzero().flatten().tolist()) for mask in bright}) == 16
    assert (x[:, 0] >= 0).all() and (x[:, 0] <= 1).all()  # not normalised


def test_colours_change_the_frame_alone():
    ((_, augment),) = watching.views(arguments("watching_objects_move"), 1)
    picture = torch.rand(6, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = augment(picture.repeat(1, 2, 1, 1, 1), BatchRandom([0], 6))
    flipped = picture.flip(4)[:, 0]
    same = (x[:, 0] == picture[:, 0]).flatten(1).all(1) | (x[:, 0] == flipped).flatten(1).all(1)
    assert same.all()
    frame = watching.show([x])["frame"]
    assert (frame - x[:, 0]).abs().amax((1, 2, 3)).min() > 0.01


# -------- The network -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_network_sees_the_frame_alone(arch):
    torch.manual_seed(0)
    network = watching.MotionMasks(arch, 32).eval()
    x = noise(2, 2, 3, 32, 32).float()
    logits, answers = network(x)
    assert logits.shape == (2, 16, 16) and answers.shape == (2, 2, 16, 16)
    other = x.clone()
    other[:, 0] += 1
    again, changed = network(other)
    assert torch.equal(again, logits)
    torch.testing.assert_close(changed, answers + 1, rtol=1e-5, atol=1e-5)
    other = x.clone()
    other[:, 1] += noise(2, 3, 32, 32, seed=1).float()
    assert not torch.equal(network(other)[0], logits)


def test_measuring_the_last_map_leaves_the_network_as_it_was():
    network = model()
    assert network.training and network.mask.in_features == 128 * 1
    mean = network.backbone.bn1.running_mean
    assert not mean.any()


def test_saved_backbone_is_the_common_one():
    common.backbone("resnet14", 16).load_state_dict(model().backbone.state_dict())


# -------- Program ---------------------------------------------------------------------------------


def test_videos_without_flow_are_refused(tmp_path):
    split = Split(VideosInMemory(torch.zeros(24, 3, 8, 8, dtype=torch.uint8), [4] * 6))
    out = ("--batch", 6, "--out", tmp_path / "run")
    found = call_main("watching_objects_move", *out, data=Data("plain", split, split, None))
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: --data movers: the flow of these videos is not known")
    assert not (tmp_path / "run").exists()


def test_thresholds_in_the_wrong_order_are_refused():
    found = call_main("watching_objects_move", "--low", 2, "--high", 1)
    assert found.code == 1
    assert found.err == "error: --low 2, --high 1: choose a --low of at most --high\n"


def test_picture_shows_frames_labels_predicted_and_exact_masks(tmp_path, monkeypatch):
    drawn = SimpleNamespace()
    monkeypatch.setattr(
        watching,
        "save_grid",
        lambda path, rows, columns, note: vars(drawn).update(rows=rows, columns=columns),
    )
    args = arguments("watching_objects_move", "--size", 16)
    split = watching.labelled(tiny_clips().test, args)
    plain = watching.plain_views(args, 11)
    run = SimpleNamespace(name="watching", args=args, device=CPU, model=model())
    watching.draw_masks(tmp_path / "masks.png", run, split, plain)
    assert drawn.columns == ["frame", "label", "predicted", "exact"] and len(drawn.rows) == 8
    for frame, label, predicted, exact in drawn.rows:
        assert frame.shape == (3, 16, 16) and exact.shape == (3, 8, 8)
        assert ((label - exact).abs() < 0.6).float().mean() > 0.9
        assert 0 < predicted.min() and predicted.max() < 1
    assert run.model.training
