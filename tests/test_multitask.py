"""Multi-task SSL: each task's loss by hand, heads that do not disturb each other, the lasso, and
what the views must not give away."""

import itertools
import math

import pytest
import torch
from conftest import (
    CPU,
    Recorder,
    arguments,
    assert_close_states,
    call_main,
    light,
    noise,
    short,
    tiny_clips,
    tiny_data,
)

from common import Loader, Split
from kernels.clips import VideosInMemory, rendered
from kernels.views import BatchRandom, denormalize, normalize
from methods import multitask

EXACT = {"rtol": 1e-12, "atol": 1e-12}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ALL = list(multitask.TASKS)
LIGHT = light("multitask")
STRIDE = 11  # of labelled clips of 12 frames


def model(heads, tasks=ALL):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask, "backbone", LIGHT["backbone"])
        return multitask.MultiTask("resnet14", 16, tasks, heads, 8)


def random_views(tasks=ALL, n=4, seed=0):
    """What the network is shown, without meaning. The left half moves, the right half rests."""
    shapes = {task: (n, 2, 3, 16, 16) for task in ALL} | {"position": (n, 9, 3, 4, 4)}
    shown = {task: noise(*shapes[task], seed=seed).float() for task in ALL}
    label = (torch.arange(16) < 8).float().expand(n, 3, 16, 16)
    shown["motion"][:, 1] = normalize(label)
    return [shown[task] for task in tasks]


def task_losses(network, views):
    return [multitask.TASKS[t](*out)[0] for t, out in zip(network.tasks, network(*views))]


def pictures(*shape, seed=0):
    return noise(*shape, seed=seed).sigmoid().float()


def views_of(*flags, stride=STRIDE):
    return multitask.views(arguments("multitask", *flags), stride)


# -------- The losses ------------------------------------------------------------------------------


def test_position_by_hand():
    """Equal logits: log 8. Logits that favour the right place by 2 in the first image, and a wrong
    one by 2 in the second."""
    zeros = torch.zeros(2, 8, 8, dtype=torch.float64)
    assert multitask.position(zeros, None)[0].item() == pytest.approx(math.log(8))
    logits = zeros.clone()
    logits[0] = 2 * torch.eye(8)
    logits[1] = 2 * torch.eye(8).roll(1, 0)
    loss, score = multitask.position(logits, None)
    total = math.log(math.exp(2) + 7)
    assert loss.item() == pytest.approx(((total - 2) + total) / 2, rel=1e-12)
    assert score == 0.5


def test_colours_by_hand():
    """Grey is in the middle; red and blue minus grey, in steps of 0.1; the ends of the scale."""
    colours = torch.tensor([[0.5, 0.5, 0.5], [1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0]])
    found = multitask.colour_classes(colours.T.reshape(1, 3, 1, 5))[0, 0]
    # red: grey 0.299, so red - grey = 0.70 and blue - grey = -0.30; blue: grey 0.114, so -0.11 and
    # 0.89, cut to 0.7; green: grey 0.587, so -0.59 twice; yellow: grey 0.886, so 0.11 and -0.89
    steps = [(0, 0), (7, -3), (-1, 7), (-6, -6), (1, -7)]
    assert found.tolist() == [15 * (red + 7) + blue + 7 for red, blue in steps]


def test_colour_loss_by_hand():
    """The mean over places; the answer is the colour of single pixels, 2, 6, 10, ..."""
    picture = torch.full((1, 3, 8, 8), 0.5)
    picture[0, :, 2, 6] = torch.tensor([1.0, 0, 0])  # the only pixel that is read and not grey
    picture[0, :, 3, 3] = torch.tensor([0, 1.0, 0])
    logits = torch.zeros(1, 225, 2, 2)
    assert multitask.colour(logits, picture)[0].item() == pytest.approx(math.log(225))
    grey, red = 15 * 7 + 7, 15 * 14 + 4
    logits[0, grey] = 3
    loss, score = multitask.colour(logits, picture)
    total = math.log(math.exp(3) + 224)
    assert loss.item() == pytest.approx(total - 3 * 3 / 4, rel=1e-6)
    assert score == 0.75
    logits[0, red, 0, 1] = 4
    assert multitask.colour(logits, picture)[1] == 1


def test_exemplar_by_hand():
    """Unit vectors in the plane, by their angles; the other image is the next one."""
    angles = torch.tensor([[0.0, 0], [100, 40], [180, 150]], dtype=torch.float64).deg2rad()
    z = torch.stack([angles.cos(), angles.sin()], 2)  # (3, 2, 2)
    loss, score = multitask.exemplar(z, None)

    def cos(degrees):
        return math.cos(math.radians(degrees))

    first = cos(40) - cos(0) + 0.5
    second = cos(50) - cos(60) + 0.5  # the other one is nearer
    third = 0  # 30 degrees to the own copy, 180 to the other
    assert loss.item() == pytest.approx((first + second + third) / 3, abs=1e-12)
    assert score.item() == pytest.approx(2 / 3)
    assert multitask.exemplar(torch.ones(3, 2, 2), None)[0] == 0.5  # collapsed: the margin


def test_exemplar_does_not_see_lengths():
    z = noise(5, 2, 7)
    longer = z * noise(5, 2, 1, seed=1).exp()
    expected = multitask.exemplar(z, None)[0]
    torch.testing.assert_close(multitask.exemplar(longer, None)[0], expected, **EXACT)


def test_motion_by_hand():
    """Four places: one moves and counts eight times, one rests, two are unknown: they have no loss
    and no gradient."""
    label = torch.tensor([[1.0, 0.0], [0.5, 0.3]], dtype=torch.float64)
    picture = label.kron(torch.ones(4, 4)).expand(1, 3, 8, 8)
    logits = torch.tensor([[[[2.0, 1.0], [-3, 9]]]], dtype=torch.float64, requires_grad=True)
    loss, score = multitask.motion(logits, picture)
    expected = (8 * math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert score == 0.5  # both are said to move, one does
    loss.backward()
    assert (logits.grad[0, 0, 1] == 0).all() and (logits.grad[0, 0, 0] != 0).all()


def test_scores_of_all_tasks():
    network = model("naive").eval()
    outputs = network(*random_views())
    found = multitask.scores(ALL, outputs)
    expected = [multitask.TASKS[task](*output)[1] for task, output in zip(ALL, outputs)]
    assert found.tolist() == [score.item() for score in expected]


def test_held_out_scores_are_kept_by_task(train, monkeypatch):
    """Of the tasks that are trained, each by its name; no mean of them."""
    kept = []
    monkeypatch.setattr(Recorder, "end_epoch", lambda self, epoch, **more: kept.append(more))
    flags = short("multitask", epochs=1, tasks="colour,position")
    train("multitask", *flags, data=tiny_data(), double=False, **LIGHT)
    (found,) = kept
    assert list(found) == ["held_out_colour", "held_out_position"]
    assert all(0 <= value <= 1 for value in found.values())


def test_total_is_the_sum_and_the_penalty():
    losses = [torch.tensor(2.0), torch.tensor(0.5)]
    alpha = torch.tensor([[0.6, -0.8], [1.0, 0.0]])
    assert multitask.total_loss(losses, alpha, 0.0) == 2.5
    assert multitask.total_loss(losses, alpha, 0.1).item() == pytest.approx(2.5 + 0.1 * 2.4)


def test_the_run_sums_its_tasks(train):
    flags = [*short("multitask", epochs=1), "--heads", "lasso", "--lasso", 0.25]
    run = train("multitask", *flags, **LIGHT)
    # at first all stages are read alike: rows of four times 1/2
    penalty = run.losses[0] - sum(run.more[0][task] for task in ALL)
    assert penalty.item() == pytest.approx(0.25 * 4 * 2, rel=1e-9)
    assert run.more[0]["stages"].item() == pytest.approx(4, rel=1e-9)


# -------- Heads and trunk -------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["naive", "lasso"])
def test_a_task_teaches_the_trunk_and_its_own_head_alone(heads):
    network = model(heads)
    losses = task_losses(network, random_views())
    for row, (task, loss) in enumerate(zip(ALL, losses)):
        network.zero_grad()
        loss.backward(retain_graph=True)
        for other in ALL:
            gradients = [p.grad for p in network.heads[other].parameters()]
            taught = any(g is not None and g.abs().max() > 0 for g in gradients)
            assert taught == (other == task), (task, other)
        assert network.backbone.conv1.weight.grad.abs().max() > 0
        if heads == "lasso":
            rows = network.raw_alpha.grad.abs().amax(1) > 0
            assert rows.nonzero()[:, 0].tolist() == [row]


def test_one_stage_alone_is_the_naive_head():
    """The lasso with alpha 1 for the last stage and the same weights elsewhere."""
    lasso = model("lasso").eval()
    naive = model("naive").eval()
    weights = {k.replace("units.3", "units.0"): v for k, v in lasso.state_dict().items()
               if not k.startswith(("units.0", "units.1", "units.2"))}  # fmt: skip
    naive.load_state_dict(weights | {"raw_alpha": naive.raw_alpha})
    views = random_views()
    with torch.no_grad():
        mixed = lasso(*views)
        lasso.raw_alpha.copy_(torch.eye(4)[3].expand(4, 4))
        for (found, _), (expected, _), (other, _) in zip(lasso(*views), naive(*views), mixed):
            torch.testing.assert_close(found, expected, **CLOSE)
            assert (found - other).abs().max() > 1e-3


def test_the_length_of_alpha_says_nothing():
    network = model("lasso").eval()
    views = random_views()
    with torch.no_grad():
        network.raw_alpha.copy_(noise(4, 4))
        before = task_losses(network, views)
        network.raw_alpha.mul_(10)
        after = task_losses(network, views)
    torch.testing.assert_close(torch.stack(after), torch.stack(before), **CLOSE)
    torch.testing.assert_close(network.alpha().norm(dim=1), torch.ones(4))


def test_penalty_shrinks_alpha_to_one_stage():
    """By the penalty alone every row ends in its largest entry; the others stay within a step or
    two of 0."""
    network = model("lasso", ["colour"])
    start = torch.tensor([[0.5, -1.5, 0.6, -0.1]])
    network.raw_alpha.data.copy_(start)
    rate = 0.01
    optimizer = torch.optim.SGD([network.raw_alpha], lr=rate)
    for _ in range(600):
        optimizer.zero_grad()
        multitask.total_loss([], network.alpha(), 1.0).backward()
        optimizer.step()
    alpha = network.alpha()[0]
    assert alpha[1] < -0.99
    assert (alpha[[0, 2, 3]].abs() < 2 * rate).all()


def test_position_joins_the_middle_patch_with_each_neighbour():
    """The logits of neighbour k depend on patch k and the middle, on no other."""
    network = model("naive", ["position"]).eval()
    (x,) = random_views(["position"], n=1)
    with torch.no_grad():
        ((before, _),) = network(x)
        for patch in range(9):
            other = x.clone()
            other[:, patch] += 1
            changed = (network(other)[0][0] != before).any(2)[0]
            expected = list(range(8)) if patch == 4 else [patch - (patch > 4)]
            assert changed.nonzero()[:, 0].tolist() == expected


def test_the_answer_is_not_seen():
    """Other colours and labels change no output, only the answers."""
    network = model("naive").eval()
    views = random_views()
    changed = [x.clone() for x in views]
    changed[1][:, 1] += 1
    changed[3][:, 1] += 1
    with torch.no_grad():
        outputs = zip(ALL, network(*views), network(*changed))
        for task, (found, answer), (expected, other) in outputs:
            assert torch.equal(found, expected)
            assert torch.equal(answer, other) == (task not in multitask.DENSE)


# -------- The views -------------------------------------------------------------------------------


def test_harmonised_patches_have_equal_channels():
    ((_, grey),) = views_of("--tasks", "position", stride=0)
    ((_, coloured),) = views_of("--tasks", "position", "--no-harmonize", stride=0)
    x = pictures(12, 3, 48, 48)
    found = denormalize(grey(x, BatchRandom([0], 12)).flatten(0, 1))
    assert found.shape == (108, 3, 12, 12)
    torch.testing.assert_close(found, found[:, :1].expand_as(found), **CLOSE)
    assert (found.std((2, 3)) > 0.01).all()

    found = denormalize(coloured(x, BatchRandom([0], 12)).flatten(0, 1))
    kept = found.std((2, 3)) > 0.01  # (108, 3)
    assert (kept.sum(1) == 1).all() and (kept.sum(0) > 20).all()
    means = found.mean((2, 3))
    torch.testing.assert_close(means, means[:, :1].expand_as(means), **CLOSE)


def test_colour_and_position_look_alike():
    """Harmonised: what the network sees of either is grey in three channels."""
    (_, patches), (_, images) = views_of("--tasks", "position,colour", stride=0)
    for augment in (patches, images):
        seen = denormalize(augment(pictures(2, 3, 48, 48), BatchRandom([0], 2))[:, 0])
        torch.testing.assert_close(seen[:, 0], seen[:, 2], **CLOSE)


def test_patches_lie_in_their_cells():
    """Red tells the column and green the row of a pixel. Offsets go from 0 to 3 in both
    directions, each patch its own."""
    args = arguments("multitask", "--no-harmonize")
    row = torch.arange(48.0).view(48, 1).expand(48, 48)
    x = torch.stack([row.T, row, row])[None].repeat(50, 1, 1, 1)
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask, "keep_one_channel", lambda x, rand: x)
        shown = multitask.view_position(x, BatchRandom([0], 50), args)
    columns, rows = shown[:, :, 0], shown[:, :, 1]
    for k in range(9):
        right = columns[:, k, 0, 0] - 16 * (k % 3)
        down = rows[:, k, 0, 0] - 16 * (k // 3)
        for moved in (right, down):
            assert set(moved.tolist()) == {0, 1, 2, 3}
        assert (right != down).any()
    assert (columns[..., 1] - columns[..., 0] == 1).all()


def test_distortions():
    """Without a shift, scale and angle, the image itself, in other colours; each image of the batch
    by its own numbers, and two copies of an image differ."""
    x = pictures(4, 3, 16, 16)

    class Still(BatchRandom):
        def uniform(self, low=0.0, high=1.0, columns=()):
            """The largest scale; all others in the middle."""
            value = 1.0 if (low, high) == (0.5, 1.0) else (low + high) / 2
            return torch.full((self.batch, *columns), value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask, "color_jitter", lambda x, *_: x)
        torch.testing.assert_close(multitask.distort(x, Still([0], 4)), x, **CLOSE)
        same = x[:1].repeat(4, 1, 1, 1)
        moved = multitask.distort(same, BatchRandom([0], 4))
        assert all((a - b).abs().mean() > 0.01 for a, b in itertools.combinations(moved, 2))
    copies = multitask.view_exemplar(x, BatchRandom([0], 4), None)
    assert copies.shape == (4, 2, 3, 16, 16)
    assert ((copies[:, 0] - copies[:, 1]).abs().mean((1, 2, 3)) > 0.01).all()


def test_label_and_frame_are_flipped_alike():
    """Half of them; the frame comes first."""
    x = torch.zeros(40, 2, 3, 8, 8)
    x[:, 0, :, 2, 1] = 1  # label
    x[:, 1, :, 2, 1] = 0.7  # frame
    shown = multitask.view_motion(x, BatchRandom([0], 40), None)
    frame, label = shown.unbind(1)
    torch.testing.assert_close(frame, 0.7 * label)
    flipped = label[:, 0, 2, 6].sum()
    assert 10 < flipped < 30 and label[:, 0, 2, 1].sum() == 40 - flipped


# -------- Labels from motion ----------------------------------------------------------------------


def test_the_cameras_motion_is_no_motion():
    flow = torch.tensor([3.0, -2.0]).view(2, 1, 1).repeat(5, 1, 8, 8).view(1, 5, 2, 8, 8)
    assert (multitask.motion_labels(flow, 0.5, 1.0) == 0).all()
    flow[:, :, 0, :3, :3] += 2.0  # moves
    flow[:, :, 1, 5, 5] += 0.7  # unknown
    flow[:, :, 1, 6, 6] += 0.3  # rests
    labels = multitask.motion_labels(flow, 0.5, 1.0)[0, 0]
    assert (labels[:3, :3] == 1).all() and labels[5, 5] == 0.5
    assert labels.sum() == 9.5


def test_labels_of_movers_are_objects():
    """What is said to move is in the exact mask of the same frame, and most of the mask moves."""
    split = tiny_clips().train
    film = multitask.labelled(split, arguments("multitask")).images
    assert film.lengths.tolist() == [22] * 24
    pictures = film.frames.view(24, 22, 3, 48, 48)
    labels, frames = pictures.split(11, 1)
    assert torch.equal(frames, split.images.frames.view(24, 12, 3, 48, 48)[:, :-1])
    masks = split.images.truth.masks[:, :-1] > 0
    assert set(labels.unique().tolist()) == {0, 127, 255}
    moves = labels[:, :, 0] == 255
    assert (moves & ~masks).sum() == 0
    assert (moves & masks).sum() > 0.5 * masks.sum()


def test_one_pixel_in_twelve_moves_and_shows_an_object():
    """As the docstrings say, here and of watching_objects_move: in all 1,000 clips 8.0 % move and
    8.5 % are of objects."""
    truth = rendered("test", 100, CPU)[0].truth
    moves = multitask.motion_labels(truth.flow, 0.5, 1.0) == 1
    for pixels in (moves, truth.masks > 0):
        assert 0.065 < pixels.float().mean() < 0.105


def test_scores_without_knowledge():
    """As the docstring of `scores` says: of the grey class, and of "everything moves"."""
    args = arguments("multitask", "--tasks", "colour,motion")
    split = multitask.labelled(Split(rendered("test", 100, CPU)[0]), args)
    _, shown = next(Loader(split, multitask.views(args, STRIDE), 100, 0, CPU)(0))
    picture, label = [denormalize(x[:, -1]) for x in shown]
    logits = torch.zeros(100, 225, 8, 8)
    logits[:, 15 * 7 + 7] = 1
    assert multitask.colour(logits, picture)[1].item() == pytest.approx(2 / 5, abs=0.06)
    found = multitask.motion(torch.ones(100, 1, 8, 8), label)[1].item()
    assert found == pytest.approx(1 / 12, abs=0.02)


def test_every_task_sees_frames_and_motion_its_label():
    """Through the loader: labels are red here, frames blue."""
    frames = torch.zeros(8 * 22, 3, 48, 48, dtype=torch.uint8).view(8, 22, 3, 48, 48)
    frames[:, :11, 0] = 255
    frames[:, 11:, 2] = 255
    reader = VideosInMemory(frames.flatten(0, 1), [22] * 8)
    split = tiny_clips().train._replace(images=reader)
    args = arguments("multitask")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask, "color_jitter", lambda x, *_: x)
        loader = Loader(split, multitask.views(args, STRIDE), 8, 0, "cpu")
        _, shown = next(loader(0))
    position, colour, exemplar, motion = [denormalize(x.flatten(0, 1)) for x in shown]
    blue = torch.tensor([0, 0, 1.0])
    for x in (exemplar, colour[1::2], motion[::2]):
        torch.testing.assert_close(x.mean((2, 3)), blue.expand(len(x), 3), **CLOSE)
    torch.testing.assert_close(position.mean(), torch.tensor(0.114), rtol=0, atol=1e-3)
    red = torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(motion[1::2].mean((2, 3)), red.expand(8, 3), **CLOSE)


# -------- Choices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", ["", "position,colours", "colour,colour", "position,,colour"])
def test_unknown_tasks_are_refused(tasks):
    found = call_main("multitask", "--tasks", tasks)
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith(f"error: --tasks {tasks}: choose some of position,colour,")


def test_other_choices_that_do_not_fit(tmp_path):
    for flags, words in (
        (["--size", 30], "--size 30: choose a multiple of 4"),
        (["--low", 2], "--low 2, --high 1: choose a --low of at most"),
        (["--arch", "vit_micro", "--patch", 10], "--patch 10: choose a multiple of 4"),
        (["--lasso", 5], "--lasso 5: only --heads lasso has a penalty"),
    ):
        found = call_main("multitask", *flags)
        assert found.code == 1 and found.err.startswith(f"error: {words}")


def test_motion_needs_flow(tmp_path):
    """In one sentence, before anything is written; the other tasks learn from images, too."""
    folder = tmp_path / "run"
    found = call_main("multitask", *short("multitask"), "--out", folder, data=tiny_data())
    assert found.code == 1 and "motion needs the flow of movers or tripod" in found.err
    assert found.err.count("\n") == 1 and not folder.exists()


def test_three_tasks_learn_from_images(train):
    run = train("multitask", *short("multitask", epochs=1, tasks="position,colour,exemplar"),
                data=tiny_data(), double=False, **LIGHT)  # fmt: skip
    assert run.losses.isfinite().all() and "motion" not in run.more[0]


def test_the_order_of_heads_follows_the_tasks():
    network = model("lasso", ["motion", "position"])
    assert list(network.heads) == ["motion", "position"] and network.raw_alpha.shape == (2, 4)
    outputs = network(*random_views(["motion", "position"]))
    assert [y.shape for y, _ in outputs] == [(4, 1, 4, 4), (4, 8, 8)]


@pytest.mark.thorough
def test_lasso_does_not_depend_on_the_number_of_processes(train):
    flags = [*short("multitask"), "--heads", "lasso", "--no-harmonize"]
    alone = train("multitask", *flags, **LIGHT)
    together = train("multitask", *flags, world=2, **LIGHT)
    same = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(together.losses, alone.losses, **same)
    assert_close_states(together.state, alone.state, **same)
    assert alone.state["model/raw_alpha"].unique().numel() > 1  # it was trained
