"""Tracked patches: tracks of scenes made by hand and of exact poses, the loss and the choice of
negatives by hand and against the official code's rule, and what the views must not give away."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, call_main, noise, tiny_clips

from common import Data, Loader, Split
from kernels.clips import VideosInMemory
from kernels.collectives import rank, world
from kernels.views import BatchRandom
from methods import tracking_triplet as tracking

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def unit(*shape, seed=0):
    return F.normalize(noise(*shape, seed=seed), dim=-1)


def blob(steps, top=4, left=4, side=3, size=16, camera=(0.0, 0.0)):
    """The flow of one square that is moved by each of the steps (x, y) before a background that
    the camera moves: (1, len(steps), 2, size, size)."""
    flow = torch.tensor(camera).view(1, 1, 2, 1, 1).repeat(1, len(steps), 1, size, size)
    for t, (x, y) in enumerate(steps):
        flow[0, t, :, top : top + side, left : left + side] = torch.tensor([x, y]).view(2, 1, 1)
        left += int(x)
        top += int(y)
    return flow


# -------- Tracks ----------------------------------------------------------------------------------


def test_track_by_hand():
    """The middle of the square, at (5.5, 5.5), goes where the square goes: it rests for a step."""
    steps = [(2.0, 1.0), (0.0, 0.0), (3.0, -2.0)]
    places, found = tracking.follow(blob(steps), 0.5)
    expected = [[5.5, 5.5], [7.5, 6.5], [7.5, 6.5], [10.5, 4.5]]
    assert places.tolist() == [expected] and found.tolist() == [True]


def test_what_moves_is_found_against_the_camera():
    """A square that rests in the frame while the camera pans is followed, the background is not."""
    places, found = tracking.follow(blob([(0.0, 0.0)] * 3, camera=(2.0, -1.0)), 0.5)
    assert places[0].tolist() == [[5.5, 5.5]] * 4 and found.tolist() == [True]


def test_the_first_place_is_on_the_thing():
    """The mean place of a ring is its hole."""
    flow = blob([(1.0, 0.0)], side=7)
    flow[0, 0, :, 5:10, 5:10] = 0
    places, _ = tracking.follow(flow, 0.5)
    column, row = places[0, 0].long().tolist()
    assert flow[0, 0, 0, row, column] == 1
    assert places[0, 1].tolist() == [column + 1.5, row + 0.5]


@pytest.mark.parametrize(
    "flow",
    [
        blob([(0.0, 0.0)] * 2),
        torch.full((1, 2, 2, 16, 16), 3.0),
        blob([(4.0, 0.0)] * 3),
        blob([(0.0, -3.0)] * 2),
    ],
    ids=["still", "camera alone", "leaves at the right", "leaves at the top"],
)
def test_no_track(flow):
    _, found = tracking.follow(flow, 0.5)
    assert found.tolist() == [False]


def test_a_thing_that_leaves_and_comes_back_gives_no_track():
    flow = blob([(0.0, -6.0), (0.0, 6.0)])
    flow[0, 1, 1] = 6  # wherever it is
    places, found = tracking.follow(flow, 0.5)
    assert places[0, 2].tolist() == places[0, 0].tolist()
    assert found.tolist() == [False]


def test_tracks_of_movers_follow_the_exact_poses():
    """The first place, moved as the pose of the object moves, is the last one up to a pixel in most
    clips; nearly all end on the object."""
    truth = tiny_clips().train.images.truth
    places, found = tracking.follow(truth.flow, 0.5)
    assert found.float().mean() > 0.9
    begin, end = truth.pose[:, 0, 0], truth.pose[:, -1, 0]  # (n, 4)
    turn = end[:, 2] - begin[:, 2]
    growth = end[:, 3] / begin[:, 3]
    x, y = (places[:, 0] - begin[:, :2]).unbind(1)
    expected = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], 1)
    expected = end[:, :2] + growth[:, None] * expected
    error = (places[:, -1] - expected).norm(dim=1)[found]
    assert error.median() < 0.5 and error.quantile(0.8) < 2

    column, row = places[:, -1].long().clamp(0, 47).unbind(1)
    on_object = truth.masks[torch.arange(len(truth.masks)), -1, row, column] > 0
    assert on_object[found].float().mean() > 0.85


def test_boxes_are_moved_into_the_frame():
    pixel = torch.arange(100, dtype=torch.uint8).view(1, 1, 10, 10)
    frames = pixel.repeat(4, 3, 1, 1)
    places = torch.tensor([[5.0, 6.0], [0.5, 9.5], [9.9, 0.0], [5.5, 4.5]])
    found = tracking.cut(frames, places, 4)
    assert found.shape == (4, 3, 4, 4)
    assert found[:, 0, 0, 0].tolist() == [43, 60, 6, 24]
    assert torch.equal(found[0], frames[0, :, 4:8, 3:7])
    assert torch.equal(found[1, 2], pixel[0, 0, 6:10, 0:4])


def test_pairs_are_the_patches_at_both_ends():
    """Three clips, of which the second has no track; each clip has its own grey levels."""
    flow = torch.cat([blob([(2.0, 1.0)] * 2), blob([(0.0, 0.0)] * 2), blob([(3.0, 0.0)] * 2)])
    frames = torch.randint(0, 256, (3, 3, 3, 16, 16), dtype=torch.uint8)

    class Truth(SimpleNamespace):
        def part(self, index):
            return Truth(**{key: value[index] for key, value in vars(self).items()})

    truth = Truth(flow=flow, frames=frames)
    split = Split(VideosInMemory(frames.flatten(0, 1), [3] * 3, truth))
    args = arguments("tracking_triplet", "--patch", 4)
    mined = tracking.mine(split, args).images
    pairs = mined.frames.unflatten(0, (-1, 2))
    assert mined.lengths.tolist() == [2, 2]
    first = tracking.cut(frames[[0, 2], 0], torch.tensor([[5.5, 5.5]] * 2), 4)
    last = tracking.cut(frames[[0, 2], 2], torch.tensor([[9.5, 7.5], [11.5, 5.5]]), 4)
    assert torch.equal(pairs[:, 0], first) and torch.equal(pairs[:, 1], last)


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """Cosines: 0.6 with the positive, 0 and 0.8 with the negatives, M = 0.5. Terms: max(0, 0.4 - 1
    + 0.5) = 0 and 0.4 - 0.2 + 0.5 = 0.7."""
    a = torch.tensor([[1.0, 0.0]])
    p = torch.tensor([[0.6, 0.8]])
    n = torch.tensor([[[0.0, 1.0], [0.8, -0.6]]])
    assert tracking.ranking_loss(a, p, n, 0.5).item() == pytest.approx(0.35)


def test_equal_embeddings_have_the_loss_of_the_margin():
    z = unit(1, 8).expand(6, -1)
    found = tracking.ranking_loss(z, z, z[:, None].expand(-1, 4, -1), 0.5)
    assert found.item() == pytest.approx(0.5, abs=1e-12)


def test_triplets_that_satisfy_the_margin_give_no_gradient():
    z = torch.eye(4, dtype=torch.float64).requires_grad_()
    anchor, positive, negative = z[:1], z[:1], z[1:2, None]  # D: 0 and 1
    loss = tracking.ranking_loss(anchor, positive, negative, 0.9)
    loss.backward()
    assert loss.item() == 0 and not z.grad.any()


def official(z, margin, count):
    """The Caffe layer with hard_ratio 1, in plain loops: for each pair the `count` patches of other
    tracks with the smallest distance to its first patch, among those with a loss; both patches of
    the pair as anchors; divided by 2 count pairs. Returns the loss, and the negatives."""
    n = len(z) // 2
    total = 0
    chosen = []
    for i in range(n):
        near = []
        for j in range(2 * n):
            if j % n != i and max(0, -z[i] @ z[i + n] + z[i] @ z[j] + margin) > 0:
                near.append((-(z[i] @ z[j]).item(), j))
        near = [j for _, j in sorted(near)[:count]]
        chosen.append(near)
        for j in near:
            total += max(0, -z[i] @ z[i + n] + z[i] @ z[j] + margin)
            total += max(0, -z[i] @ z[i + n] + z[i + n] @ z[j] + margin)
    return total / (2 * count * n), chosen


def test_loss_and_gradient_of_the_official_layer():
    """With its negatives, which both patches of a track share."""
    z = unit(12, 5).requires_grad_()
    expected, chosen = official(z, 1.0, 3)
    assert all(len(near) == 3 for near in chosen)
    (gradient,) = torch.autograd.grad(expected, z)

    indices = torch.tensor(chosen).repeat(2, 1)
    found = tracking.ranking_loss(z, z.roll(6, 0), z[indices], 1.0)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], gradient, **EXACT)

    own = torch.arange(6)
    hardest = tracking.hardest_negatives(z[:6], z, own, 3)
    assert hardest.tolist() == chosen


def test_hard_negatives_have_the_largest_loss_and_are_of_other_tracks():
    """For rows 2 and 3 of four tracks, as the second of two processes has them."""
    z = unit(8, 5)
    own = torch.tensor([2, 3, 2, 3])
    anchor = z[[2, 3, 6, 7]]
    found = tracking.hardest_negatives(anchor, z, own, 2)
    for a, track, rows in zip(anchor, own.tolist(), found.tolist()):
        others = [j for j in range(8) if j % 4 != track]
        expected = sorted(others, key=lambda j: -(a @ z[j]).item())[:2]
        assert rows == expected


def test_random_negatives_are_of_other_tracks_and_all_alike():
    u = torch.arange(6000).add(0.5).div(6000).view(1, -1).repeat(2, 1)
    found = tracking.random_negatives(u, torch.tensor([0, 2]), 4)
    for track, rows in zip((0, 2), found):
        counts = rows.bincount(minlength=8)
        assert counts.tolist() == [0 if row % 4 == track else 1000 for row in range(8)]
    largest = torch.tensor([[math.nextafter(1.0, 0.0)]]).float().clamp(max=1 - 2**-24)
    for tracks in (2, 50, 64, 4096):
        last = tracking.random_negatives(largest, torch.tensor([0]), tracks)
        assert last.item() == 2 * tracks - 1


def test_right_order_by_hand():
    """Two tracks. Anchors 0 and 2 (track 0) are equal; 1 and 3 (track 1) are at right angles."""
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [-0.8, 0.6]])
    # anchor 0 and 2: both negatives farther: 4 right of 4. Anchor 1: positive 0, negatives 0.6
    # twice: wrong. Anchor 3: positive 0, negatives -0.8 twice: right.
    assert tracking.right_order(z).item() == pytest.approx(6 / 8)
    assert tracking.right_order(torch.ones(6, 2)).item() == 0.5


def share_of_rows(z):
    """right_order of this process's rows of two batches of tracks, z: (2N, d)."""
    first, last = z.chunk(2)
    here = [part.chunk(world())[rank()] for part in (first, last)]
    return tracking.right_order(torch.cat(here)).item()


def test_right_order_does_not_depend_on_the_number_of_processes(processes):
    z = unit(16, 3)
    alone = tracking.right_order(z).item()
    assert processes(2, share_of_rows, z) == [alone, alone]
    parts = torch.stack(z.chunk(2)).chunk(2, 1)  # of each process its own negatives alone
    assert any(tracking.right_order(part.flatten(0, 1)).item() != alone for part in parts)


# -------- The views -------------------------------------------------------------------------------


def test_patches_of_a_track_have_their_own_crops_flips_and_colours():
    """All patches are the same picture: if the two views of a pair had more in common than views of
    two pairs, this would tell which belong together. So the order is a matter of chance, while a
    view and its copy are in the right order. The rank of a positive among the others is uniform:
    a standard deviation of 0.29, and 0.29 / sqrt(512) = 0.013 for the mean of 8 batches of 64."""
    picture = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    frames = picture.expand(128, -1, -1, -1)
    args = arguments("tracking_triplet")
    loader = Loader(Split(VideosInMemory(frames, [2] * 64)), tracking.views(args), 64, 0, CPU)

    def order(x1, x2):
        pixels = torch.cat([x1, x2]).flatten(1)
        return tracking.right_order(F.normalize(pixels - pixels.mean(0), dim=1)).item()

    batches = [next(loader(epoch))[1] for epoch in range(8)]
    shares = [order(x1, x2) for x1, x2 in batches]
    assert sum(shares) / 8 == pytest.approx(0.5, abs=3 * 0.013)
    assert order(batches[0][0], batches[0][0]) > 0.99


def test_first_and_last_patch_are_shown_in_this_order():
    first, last = tracking.views(arguments("tracking_triplet", "--strength", 0, "--grey", 0))
    x = torch.rand(5, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = [view[1](x, BatchRandom([0], 5)) for view in (first, last)]
    shown = tracking.show(shown)
    for part, name in enumerate(("first", "last")):
        same = (shown[name] - x[:, part]).abs().amax((1, 2, 3)) < 1e-5
        turned = (shown[name] - x[:, part].flip(3)).abs().amax((1, 2, 3)) < 1e-5
        assert (same | turned).all()


# -------- The network and the program -------------------------------------------------------------


def test_network_gives_unit_vectors_first_patches_first():
    torch.manual_seed(0)
    network = tracking.TrackingTriplet("resnet14", 16, 32, 8).eval()
    x1, x2 = noise(2, 5, 3, 16, 16).float()
    z = network(x1, x2)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(network(x2, x1), z.roll(5, 0))


def test_negatives_are_random_first_and_the_hardest_later(train, monkeypatch):
    seen = []
    for name in ("random_negatives", "hardest_negatives"):
        real = getattr(tracking, name)

        def see(*args, name=name, real=real):
            seen.append((name, real(*args)))
            return seen[-1][1]

        monkeypatch.setattr(tracking, name, see)
    flags = ["--size", 16, "--patch", 4, "--batch", 12, "--epochs", 2]
    flags += ["--hard", 1, "--hard-from", 1]
    train("tracking_triplet", *flags)
    random = [rows for name, rows in seen if name == "random_negatives"]
    hardest = [rows for name, rows in seen if name == "hardest_negatives"]
    assert [tuple(rows.shape) for rows in random] == [(12, 4)] * 2 + [(12, 3)] * 2
    assert [tuple(rows.shape) for rows in hardest] == [(24, 0)] * 2 + [(24, 1)] * 2
    assert not torch.equal(random[0], random[1])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--patch", 49), "--patch 49: choose at most 48, the side of a frame"),
        (("--speed", 99), "--speed 99: nothing moves so fast; choose a lower speed"),
        (("--hard", 5), "--hard 5: choose at most 4, the negatives of an anchor"),
        (("--batch", 3, "--negatives", 5), "--negatives 5: choose at most 4, the patches of other"),
    ],
)
def test_impossible_flags_are_refused(tmp_path, flags, words):
    found = call_main("tracking_triplet", *flags, "--out", tmp_path / "run")
    assert found.code == 1 and found.err.startswith(f"error: {words}")
    assert found.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_videos_without_flow_are_refused(tmp_path):
    split = Split(VideosInMemory(torch.zeros(24, 3, 8, 8, dtype=torch.uint8), [4] * 6))
    out = ("--batch", 6, "--out", tmp_path / "run")
    found = call_main("tracking_triplet", *out, data=Data("plain", split, split, None))
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: --data movers: the flow of these videos is not known")
    assert not (tmp_path / "run").exists()
