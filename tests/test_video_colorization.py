"""Video colorization: the loss by hand, against its definition and without the reimplementation's
second softmax; k-means against scikit-learn; what the network may see; the picture."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, call_main, light, noise, tiny_clips
from sklearn.cluster import KMeans
from torch import nn

from common import Data, Split
from kernels.clips import VideosInMemory
from kernels.movers import load_movers, render
from kernels.propagation import visible
from kernels.views import BatchRandom, denormalize, normalize
from methods import video_colorization
from methods.video_colorization import (
    Palette,
    accuracy,
    colours_of,
    copied,
    copy_loss,
    k_means,
    lab_to_rgb,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZE = 16


def classes(*shape, count=4, seed=0):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


def model(arch="resnet14", size=SIZE, cell=4):
    torch.manual_seed(0)
    palette = Palette(torch.tensor([[0.0, 0.0], [60.0, 40.0], [-60.0, 40.0]]), cell)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_colorization, "backbone", light("video_colorization")["backbone"])
        return video_colorization.VideoColorizer(arch, size, palette, 8)


def clip(L, ab):
    """Normalised clips of these L (n, T, 1, H, W) and ab (n, T, 2, H, W)."""
    lab = torch.cat([L, ab], 2)
    return normalize(lab_to_rgb(lab.flatten(0, 1)).float()).unflatten(0, L.shape[:2])


def lightness_and_colours(n=2, frames=3, size=SIZE):
    """Well inside sRGB: nothing is clipped."""
    generator = torch.Generator().manual_seed(0)
    L = 40 + 20 * torch.rand(n, frames, 1, size, size, generator=generator, dtype=torch.float64)
    return L, 15 * noise(n, frames, 2, size, size).clamp(-1, 1)


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """Attention of 0.5, 0.3, 0.2 on references of the classes 0, 1, 1: the distribution (0.5, 0.5).
    The second place attends to 0.1, 0.2, 0.7: (0.1, 0.9)."""
    scores = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]], dtype=torch.float64).log() + 3
    references = torch.tensor([[0, 1, 1]])
    loss = copy_loss(scores, references, torch.tensor([[1, 0]]))
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2, rel=1e-12)
    loss = copy_loss(scores, references, torch.tensor([[1, 1]]))
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.9)) / 2, rel=1e-12)


def test_loss_and_its_gradient_are_those_of_the_definition():
    """- log y[c], with y = A onehot(c), where every class is in the references."""
    scores = (3 * noise(2, 5, 12)).requires_grad_()
    references = torch.arange(12).remainder(4).expand(2, 12)
    target = classes(2, 5)
    loss = copy_loss(scores, references, target)
    (gradient,) = torch.autograd.grad(loss, scores)

    A = scores.exp() / scores.exp().sum(2, keepdim=True)
    y = A @ F.one_hot(references, 4).double()
    expected = -y.gather(2, target[:, :, None]).log().mean()
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0], **EXACT)


def test_attention_is_a_distribution_over_the_references():
    """Not over the targets: a number added to all scores of one target place changes nothing, one
    that is added to a reference does."""
    scores = noise(2, 5, 12)
    references, target = classes(2, 12), classes(2, 5, seed=1)
    total = copied(scores, torch.ones(2, 12, 1, dtype=torch.float64))
    torch.testing.assert_close(total, torch.ones(2, 5, 1, dtype=torch.float64), **EXACT)

    loss = copy_loss(scores, references, target)
    by_target = copy_loss(scores + noise(2, 5, 1, seed=2), references, target)
    torch.testing.assert_close(by_target, loss, **EXACT)
    by_reference = copy_loss(scores + noise(2, 1, 12, seed=2), references, target)
    assert (by_reference - loss).abs() > 1e-3


def test_same_features_everywhere_copy_how_often_the_references_show_a_class():
    references = torch.tensor([[0, 0, 0, 1, 1, 2]])
    scores = torch.full((1, 4, 6), 2.5, dtype=torch.float64)
    y = copied(scores, F.one_hot(references, 3).double())
    assert y[0, 0].tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    target = torch.tensor([[0, 1, 2, 2]])
    expected = -(math.log(3 / 6) + math.log(2 / 6) + 2 * math.log(1 / 6)) / 4
    assert copy_loss(scores, references, target).item() == pytest.approx(expected, rel=1e-12)
    assert accuracy(scores, references, target, 3).item() == 0.25  # class 0 everywhere


def test_one_colour_costs_nothing_and_sharp_features_copy_exactly():
    """The loss of a right copy goes to 0. Fed to a softmax, y would leave log(1 + 15 / e) = 1.88 of
    16 classes, as in the reimplementation."""
    one = torch.zeros(2, 9, dtype=torch.int64)
    assert copy_loss(noise(2, 9, 9), one, one).item() == pytest.approx(0, abs=1e-12)

    references = torch.arange(16)[None]
    f = 10 * F.one_hot(references, 16).double()
    scores = f @ f.mT  # the target is the reference
    assert copy_loss(scores, references, references).item() < 1e-12
    assert accuracy(scores, references, references, 16).item() == 1
    y = copied(scores, F.one_hot(references, 16).double())
    torch.testing.assert_close(y, F.one_hot(references, 16).double())
    doubled = F.cross_entropy(y[0], references[0]).item()
    assert doubled == pytest.approx(math.log(1 + 15 / math.e), abs=1e-6)


def test_a_colour_that_no_reference_has_teaches_nothing():
    """It counts as 0 in the mean over the places, and its scores get no gradient; all is finite,
    also where the scores are far apart."""
    scores = noise(1, 2, 3)
    scores[0, 0, 0] = 300.0
    scores.requires_grad_()
    references = torch.tensor([[0, 1, 1]])
    loss = copy_loss(scores, references, torch.tensor([[1, 7]]))
    known = copy_loss(scores[:, :1], references, torch.tensor([[1]]))
    torch.testing.assert_close(loss, known / 2, **EXACT)
    loss.backward()
    assert scores.grad.isfinite().all() and not scores.grad[0, 1].any()
    assert scores.grad[0, 0, 0] == pytest.approx(0.5, abs=1e-6)
    assert accuracy(scores, references, torch.tensor([[7, 7]]), 8).item() == 0


def test_loss_is_the_mean_over_clips():
    scores, references, target = noise(6, 5, 12), classes(6, 12), classes(6, 5, count=6)
    parts = zip(scores.split(1), references.split(1), target.split(1))
    by_clip = torch.stack([copy_loss(*part) for part in parts])
    torch.testing.assert_close(copy_loss(scores, references, target), by_clip.mean(), **EXACT)


# -------- Colours and their classes ---------------------------------------------------------------


def test_k_means_is_that_of_scikit_learn():
    points = torch.cat([noise(150, 2, seed=s) + 4 * noise(1, 2, seed=s + 50) for s in range(8)])
    begin = k_means(points, 6, 0, rounds=0)
    assert (torch.cdist(begin, points).amin(1) < 1e-6).all()  # points
    found = k_means(points, 6, 0, rounds=12)
    solver = KMeans(6, init=begin.numpy(), n_init=1, max_iter=12, tol=0, algorithm="lloyd")
    expected = torch.from_numpy(solver.fit(points.numpy()).cluster_centers_)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(k_means(points, 6, 1, rounds=0), begin)


def test_first_centres_are_far_apart():
    """k-means++: of 16 tight groups, one of which has nearly all points, it begins in most."""
    group = torch.arange(16).repeat_interleave(torch.tensor([2000] + [10] * 15))
    points = 100.0 * F.one_hot(group, 16) + 0.01 * noise(2150, 16).float()
    for seed in range(5):
        begin = k_means(points, 16, seed, rounds=0)
        assert len(begin.argmax(1).unique()) == 16


def test_fewer_colours_than_classes():
    points = torch.tensor([[0.0, 0.0], [50.0, 50.0]]).repeat(20, 1)
    centres = k_means(points, 5, 0)
    assert centres.shape == (5, 2) and centres.isfinite().all()
    assert torch.cdist(points, centres).amin(1).max() < 1e-3


def test_colour_of_a_place_is_that_of_the_mean_of_its_pixels():
    """In reading order; half of the pixels of one place are red, half blue."""
    x = torch.full((1, 2, 3, 8, 12), 0.5)
    x[0, 1, :, 4:8, 8:10] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    x[0, 1, :, 4:8, 10:12] = torch.tensor([0.0, 0.0, 1.0])[:, None, None]
    ab = colours_of(normalize(x), 4)
    assert ab.shape == (1, 2, 6, 2)
    mean = torch.tensor([0.5, 0.0, 0.5]).view(1, 3, 1, 1)
    expected = video_colorization.rgb_to_lab(mean)[0, 1:, 0, 0]
    torch.testing.assert_close(ab[0, 1, 5], expected, rtol=1e-3, atol=1e-2)
    grey = ab.flatten(0, 2)[torch.arange(12) != 11]
    assert grey.abs().max() < 0.05


def test_palette_gives_the_nearest_centre_of_each_place():
    L = torch.full((1, 2, 1, 8, 8), 50.0)
    ab = torch.zeros(1, 2, 2, 8, 8)
    ab[0, 1, :, :4, 4:] = torch.tensor([50.0, 30.0])[:, None, None]
    ab[0, 1, :, 4:, :4] = torch.tensor([-35.0, 30.0])[:, None, None]
    found = model(size=8).palette(clip(L, ab))
    assert found.tolist() == [[[0, 0, 0, 0], [0, 1, 2, 0]]]


# -------- The network -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_no_colour_reaches_the_features(arch):
    """What the first layer sees has three equal channels. Other colours of the same lightness give
    the same features, of another lightness others."""
    network = model(arch).eval()
    seen = []
    network.backbone.first_layer.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    L, ab = lightness_and_colours()
    f = network.places(clip(L, ab))
    assert f.shape == (2, 3, 16, 8)
    shown = denormalize(seen[0])
    torch.testing.assert_close(shown, shown[:, :1].expand_as(shown))

    # L survives the way through 32-bit RGB with a relative error of 1e-6, which the layers may
    # enlarge a little.
    torch.testing.assert_close(network.places(clip(L, -ab)), f, rtol=1e-3, atol=1e-4)
    assert (network.places(clip(100 - L, ab)) - f).abs().max() > 1e-2


def test_features_have_no_gradient_to_the_colours():
    """But one to the lightness."""
    network = model().eval()
    L, ab = (part.float().requires_grad_() for part in lightness_and_colours(1, 2))
    lab = torch.cat([L, ab], 2).flatten(0, 1)
    x = normalize(lab_to_rgb(lab)).unflatten(0, (1, 2))
    network.places(x).square().sum().backward()
    assert ab.grad.abs().max() < 1e-3 * L.grad.abs().max()


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_places_of_features_are_those_of_colours(arch):
    """A frame changes at one place: the features change most there, or beside it, since the last
    convolutions have random weights."""
    network = model(arch, size=48).eval()
    x = normalize(torch.full((1, 2, 3, 48, 48), 0.5))
    y = x.clone()
    y[0, 1, :, 16:20, 32:36] = 2.0
    change = (network.places(y) - network.places(x)).norm(dim=3)
    assert change[0, 0].max() == 0  # each frame by itself
    row, column = divmod(change[0, 1].argmax().item(), 12)
    assert abs(row - 4) <= 1 and abs(column - 8) <= 1
    assert (colours_of(y, 4) - colours_of(x, 4)).norm(dim=3).argmax() == 144 + 4 * 12 + 8


def test_scores_are_products_of_the_target_with_all_references():
    network = model().eval()
    L, ab = lightness_and_colours(n=1)
    x = clip(L, 4 * ab)
    scores, references, target = network(x)
    f = network.places(x)[0]  # (3, 16, 8)
    assert scores.shape == (1, 16, 32) and references.shape == (1, 32) and target.shape == (1, 16)
    torch.testing.assert_close(scores[0, 3, 16 + 5], f[2, 3] @ f[1, 5])
    assert torch.equal(torch.cat([references, target], 1), network.palette(x).flatten(1))


@pytest.mark.parametrize(
    "arch, size",
    [
        ("resnet14", 16),
        ("vit_micro", 16),
        pytest.param("resnet14", 48, marks=pytest.mark.thorough),
        pytest.param("resnet18", 16, marks=pytest.mark.thorough),
    ],
)
def test_gradient_reaches_all_weights_from_target_and_references(arch, size):
    network = model(arch, size)
    L, ab = lightness_and_colours(n=2, size=size)
    scores, _, _ = network(clip(L, ab))
    scores.square().mean().backward()
    for name, w in network.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


# -------- The views -------------------------------------------------------------------------------


def test_all_frames_of_a_clip_get_the_same_flip():
    """If each had its own, the target could not be copied from the same place; of equal frames,
    equal ones are shown."""
    ((crop, augment),) = video_colorization.views(arguments("video_colorization"))
    picture = torch.rand(8, 1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    x = augment(picture.repeat(1, 4, 1, 1, 1), BatchRandom([0], 8))
    torch.testing.assert_close(x, x[:, :1].expand_as(x))
    plain = normalize(picture[:, 0])
    flipped = (x[:, 0] - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-6
    assert 0 < flipped.sum() < 8
    torch.testing.assert_close(x[~flipped, 0], plain[~flipped])
    assert (crop.frames, crop.stride) == (4, 2)


def test_what_is_shown_is_grey():
    L, ab = lightness_and_colours()
    shown = video_colorization.show([clip(L, ab)])
    assert list(shown) == ["reference 1", "reference 2", "target"]
    for place, picture in enumerate(shown.values()):
        expected = (L[:, place] / 100).float().expand(-1, 3, -1, -1)
        torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)


# -------- Rules and the program -------------------------------------------------------------------


def coloured_videos(colours, size=SIZE):
    """Videos of plain halves: colours (n, T, 2, 3) in [0, 1] of the left and the right half."""
    n, T = colours.shape[:2]
    x = colours.transpose(2, 3)[:, :, :, None]  # (n, T, 3, 1, 2)
    x = x.repeat_interleave(size // 2, 4).expand(-1, -1, -1, size, -1)
    frames = (255 * x.flatten(0, 1)).byte()
    split = Split(VideosInMemory(frames, [T] * n), torch.arange(n) % 2)
    return Data("halves", split, split, split)


def halves(n=4):
    """Three frames: the left half is always red, the right half is first green, at last blue, so
    only the left half can be copied."""
    red, green, blue = torch.eye(3)
    frames = [torch.stack([red, right]) for right in (green, green, blue)]
    return coloured_videos(torch.stack(frames).expand(n, -1, -1, -1))


def test_rules_by_hand():
    """Half of the places of the target have the class that the references show most often (of two
    that are equally frequent the first), and that of the same place. In still videos each place
    has."""
    args = arguments("video_colorization", "--size", SIZE, "--frames", 3, "--stride", 1)
    args.min_crop = 1.0
    settings = (video_colorization.views(args), 2, 0, CPU)
    network = model()
    found = video_colorization.rules(network, halves(), settings, 3)
    assert found == {"most_frequent": 0.5, "same_place": 0.5}
    still = coloured_videos(torch.eye(3)[[0, 1]].expand(4, 3, 2, 3))
    found = video_colorization.rules(network, still, settings, 3)
    assert found == {"most_frequent": 0.5, "same_place": 1.0}
    no_test = still._replace(test=None)
    assert video_colorization.rules(network, no_test, settings, 3) == {}


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--size", 30), "--size 30: choose a multiple of 4"),
        (("--size", 52, "--cell", 4, "--arch", "vit_micro"), "--size 52: choose a multiple of 8"),
        (("--frames", 1), "--frames 1: choose at least 2"),
        (("--temperature", 0), "--temperature 0: choose more than 0"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("video_colorization", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err


def test_grey_videos_are_refused_before_anything_is_written(tmp_path):
    grey = coloured_videos(torch.rand(8, 12, 2, 1).expand(-1, -1, -1, 3))
    flags = ("--size", SIZE, "--batch", 4, "--out", tmp_path / "run")
    found = call_main("video_colorization", *flags, data=grey)
    assert found.code == 1 and found.err.count("\n") == 1
    assert "all videos are grey" in found.err and not (tmp_path / "run").exists()


def test_values_are_carried_to_the_places_with_the_same_features():
    """A place keeps its feature while it moves one place to the right in every frame, cyclically:
    sharp features carry its value along; equal ones the mean of the first frame. The third frame
    on, the references are the first frame and the latest one (frames = 3)."""
    places, moments = 4, 5
    still = torch.eye(places)[None, None].repeat(1, moments, 1, 1)  # (1, T, P, d = P)
    moving = torch.stack([still[0, t].roll(t, 0) for t in range(moments)])[None]
    first = torch.tensor([[1.0, 0.0, 0.25, 0.5]])
    found = video_colorization.carry(moving, first, 3, 1e-3)
    assert torch.equal(found[0], torch.stack([first[0].roll(t) for t in range(moments)]))
    found = video_colorization.carry(torch.ones_like(moving), first, 3, 0.5)
    torch.testing.assert_close(found[:, 1:], first.mean().expand(1, moments - 1, places))


def test_masks_are_carried_by_the_features_of_the_network(monkeypatch):
    """Features that are the truth carry the masks nearly as they are; those of a network that
    tells nothing carry none. Only where the masks are known."""
    clips = render(load_movers("test"), range(8))
    data = SimpleNamespace(test=SimpleNamespace(images=SimpleNamespace(truth=clips)))
    net = model(size=48)
    args = SimpleNamespace(size=48, cell=4, frames=4, temperature=0.05)
    masks = visible(clips, 60).masks > 0

    def truth(x):
        inside = F.adaptive_avg_pool2d(masks.float(), net.side).flatten(2)  # (n, T, P)
        return torch.stack([inside, 1 - inside], 3)

    monkeypatch.setattr(net, "places", truth)
    found = video_colorization.carried_masks(net, data, args, CPU)
    assert list(found) == ["masks_stay", "masks", "masks_raw"]
    known = found["masks"]
    monkeypatch.setattr(net, "places", lambda x: torch.zeros(*masks.shape[:2], net.side**2, 2))
    nothing = video_colorization.carried_masks(net, data, args, CPU)["masks"]
    assert known > 0.6 > 0.2 > nothing
    data = SimpleNamespace(test=None)
    assert video_colorization.carried_masks(net, data, args, CPU) == {}


def test_masks_without_a_network(monkeypatch):
    """A checkered square of 12 pixels goes 4 pixels, a place, to the right in every frame, before a
    flat background. Its own pixels find it again; its first mask, left in place, shares two thirds,
    a third and nothing with it: J = 8/16, 4/20, 0."""
    frames = torch.full((1, 4, 3, 48, 48), 64, dtype=torch.uint8)
    masks = torch.zeros(1, 4, 48, 48, dtype=torch.uint8)
    line = torch.arange(12)
    square = (255 * ((line[:, None] + line) % 2)).byte()
    for t in range(4):
        left = 8 + 4 * t
        frames[0, t, :, 16:28, left : left + 12] = square
        masks[0, t, 16:28, left : left + 12] = 1
    clips = SimpleNamespace(frames=frames, masks=masks)
    monkeypatch.setattr(video_colorization, "visible", lambda truth, most: truth)
    data = SimpleNamespace(test=SimpleNamespace(images=SimpleNamespace(truth=clips)))
    args = SimpleNamespace(size=48, cell=4, frames=4, temperature=0.05)
    found = video_colorization.carried_masks(model(size=48), data, args, CPU)
    assert found["masks_stay"] == pytest.approx((8 / 16 + 4 / 20 + 0) / 3)
    assert found["masks_raw"] > 0.9


def test_picture_shows_truth_lightness_copied_colours_and_references(tmp_path, monkeypatch):
    """A network that points at the same place of the last reference copies its colours: of the left
    half the right ones, of the right half those of before."""
    drawn = SimpleNamespace()

    def keep(path, rows, columns, note):
        vars(drawn).update(rows=rows, columns=columns)

    class SamePlace(nn.Module):
        side = 4

        def forward(self, x):
            scores = torch.cat([torch.zeros(16, 16), 100 * torch.eye(16)], 1)
            return scores.expand(len(x), 16, 32), None, None

    monkeypatch.setattr(video_colorization, "save_grid", keep)
    args = arguments("video_colorization", "--size", SIZE, "--frames", 3, "--stride", 1)
    data = halves(12)
    run = SimpleNamespace(
        name="video_colorization", data=data, args=args, device=CPU, model=SamePlace()
    )
    video_colorization.draw_coloured(tmp_path / "coloured.png", run)
    assert drawn.columns == ["the truth", "target", "copied", "reference 1", "reference 2"]
    truth, grey, coloured, first, second = (torch.stack(c) for c in zip(*drawn.rows))
    assert len(truth) == 12 and run.model.training
    assert (grey - grey[:, :1]).abs().max() < 1 / 255
    assert torch.equal(first, second) and (truth[..., :8] - first[..., :8]).abs().max() < 1e-3
    left = coloured[..., 8, 2]  # far from the border of the halves
    torch.testing.assert_close(left, truth[..., 8, 2], rtol=0, atol=0.02)
    red, green, blue = coloured[0, :, 8, 13]
    assert green > max(red, blue)  # a dark green: with the lightness of the blue


@pytest.mark.thorough
def test_it_learns_to_copy(train):
    """A few clips, whose crops differ from step to step: more places are right than if the class
    that the references show most often were copied everywhere."""
    flags = ["--size", 32, "--batch", 12, "--epochs", 40, "--warmup", 2, "--lr", 0.04]
    run = train("video_colorization", *flags, data=tiny_clips(24), double=False)
    right = torch.stack([more["accuracy"] for more in run.more])

    # The rule, on the clips of all steps.
    palette = Palette(run.state["model/palette.centres"], run.args.cell)
    settings = (video_colorization.views(run.args), 12, 0, CPU)
    data = tiny_clips(24)
    rules = video_colorization.rules(
        SimpleNamespace(palette=palette), data._replace(test=data.train), settings, 16
    )
    assert right[-20:].mean() > rules["most_frequent"] + 0.05
    assert run.losses[-20:].mean() < run.losses[:10].mean() - 0.2
