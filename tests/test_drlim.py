"""DrLIM: the contrastive loss by hand, by its springs and against pytorch-metric-learning; and what
the four files of metric learning share, which images of a batch are positives."""

import math

import numpy as np
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
    tiny_data,
)
from matplotlib.axes import Axes

from common import Data, InMemory, Loader, PairLoader, Split, features, positive_names
from methods import drlim
from methods.drlim import contrastive_loss

EXACT = {"rtol": 0, "atol": 1e-12}
MARGIN = 1.5
WEIGHT = 3.0


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def loss_and_gradient(z, name, margin=MARGIN, repel=WEIGHT):
    z = z.clone().requires_grad_()
    loss = contrastive_loss(z, name, margin, repel)
    loss.backward()
    return loss.detach(), z.grad


# -------- The loss --------------------------------------------------------------------------------


def test_contrastive_loss_by_hand():
    """Four views on a line, the first two similar: one pair of similar ones at distance 3, and of
    the dissimilar ones only that at 0.5 is within the margin of 1. A margin on squared distances
    would give 1/2 (1 - 0.25)^2 for it."""
    z = double([0.0], [3.0], [0.5], [10.0])
    name = torch.tensor([7, 7, 1, 2])
    expected = 9 / 2 + WEIGHT * (1 - 0.5) ** 2 / 2 / 5
    assert contrastive_loss(z, name, 1.0, WEIGHT).item() == pytest.approx(expected, abs=1e-12)


def test_contrastive_loss_by_the_sum_of_the_paper():
    """Over all pairs of two views of N images, w = 2N - 2 gives the sum, divided by N."""
    N = 5
    z = 0.5 * noise(2 * N, 3)
    name = torch.arange(N).repeat(2)
    total = 0.0
    for i in range(2 * N):
        for j in range(i + 1, 2 * N):
            D = math.dist(z[i], z[j])
            total += D**2 / 2 if name[i] == name[j] else max(0, MARGIN - D) ** 2 / 2
    found = contrastive_loss(z, name, MARGIN, 2 * N - 2).item()
    assert found == pytest.approx(total / N, abs=1e-12)


def test_springs():
    """Similar views attract each other with a force equal to their distance; dissimilar ones repel
    each other by what is missing to the margin, and beyond it not at all."""
    z = double([0.0, 0.0], [0.6, 0.8])  # at distance 1, in the direction (0.6, 0.8)
    direction = double([0.6, 0.8], [-0.6, -0.8])
    for far in (0.2, 1.0, 1.4, 1.6):
        loss, attract = loss_and_gradient(far * z, torch.tensor([0, 0]))
        torch.testing.assert_close(attract, -far * direction, **EXACT)
        loss, repel = loss_and_gradient(far * z, torch.tensor([0, 1]))
        torch.testing.assert_close(repel, WEIGHT * max(0, MARGIN - far) * direction, **EXACT)
        assert loss == pytest.approx(WEIGHT * max(0, MARGIN - far) ** 2 / 2, abs=1e-12)


def test_views_at_the_same_point():
    """Dissimilar: w m^2 / 2, and the gradient is 0, not NaN. Similar: nothing is better, so
    without dissimilar pairs all images end in one point."""
    z = double([1.0, 2.0]).repeat(4, 1)
    loss, gradient = loss_and_gradient(z, torch.tensor([0, 1, 2, 3]))
    assert loss.item() == pytest.approx(WEIGHT * MARGIN**2 / 2, abs=1e-12)
    assert torch.equal(gradient, torch.zeros_like(z))
    loss, gradient = loss_and_gradient(z, torch.tensor([5, 5, 5, 5]))
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(z))


def test_points_that_are_free_to_move():
    """With similar pairs alone they end in one point; with dissimilar pairs each name has a point
    of its own, and the points of two names are a margin apart."""

    def settle(name):
        z = noise(12, 2, seed=3).requires_grad_()
        for _ in range(300):
            (slope,) = torch.autograd.grad(contrastive_loss(z, name, MARGIN, WEIGHT), z)
            z = (z - 2 * slope).detach().requires_grad_()
        return z.detach()

    assert torch.pdist(settle(torch.zeros(12))).max() < 1e-6
    name = torch.arange(3).repeat(4)
    z = settle(name)
    D = torch.cdist(z, z)
    same = name[:, None] == name
    assert D[same].max() < 1e-3 and D[~same].min() > MARGIN - 1e-3


def test_contrastive_loss_symmetries_and_gradient():
    z = 0.5 * noise(8, 3, seed=1)
    name = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    loss = contrastive_loss(z, name, MARGIN, WEIGHT)
    turn = torch.linalg.qr(noise(3, 3)).Q
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for other, names_of in ((z @ turn + 3, name), (z[order], name[order]), (z, 9 - name)):
        found = contrastive_loss(other, names_of, MARGIN, WEIGHT)
        torch.testing.assert_close(found, loss, **EXACT)
    assert (contrastive_loss(z, name // 2, MARGIN, WEIGHT) - loss).abs() > 0.01
    inputs = z.clone().requires_grad_()
    torch.autograd.gradcheck(lambda x: contrastive_loss(x, name, MARGIN, WEIGHT), inputs)


def test_contrastive_loss_against_pytorch_metric_learning():
    """Its loss is linear in the distance, or, with squared distances, has the margin on them. Its
    distances of each pair, before it averages them, are ours."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    z = 0.5 * noise(10, 4, seed=2)
    name = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 3])
    theirs = losses.ContrastiveLoss(
        pos_margin=0,
        neg_margin=MARGIN,
        distance=distances.LpDistance(normalize_embeddings=False),
        reducer=reducers.DoNothingReducer(),
    )
    leaf = z.clone().requires_grad_()
    found = theirs(leaf, name)
    inner, outer = [found[part]["losses"].square().mean() / 2 for part in ("pos_loss", "neg_loss")]
    expected = inner + WEIGHT * outer
    expected.backward()
    loss, gradient = loss_and_gradient(z, name)
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, leaf.grad, **EXACT)


# -------- Which images are positives --------------------------------------------------------------


def test_names():
    split = tiny_data().train
    assert positive_names("views", split).tolist() == list(range(24))
    assert torch.equal(positive_names("labels", split), split.labels)
    assert torch.equal(positive_names("drawings", split), split.emoji)


def loader_of(name, batch=12, seed=0):
    split = tiny_data().train
    view = drlim.views(arguments("drlim", "--size", 8))[0]
    return PairLoader(torch.as_tensor(name), split, [view, view], batch, seed, CPU)


def order_of(loader, epoch=0):
    loader.epoch = epoch
    return np.stack([index for index, _ in loader.__iter__()])


def test_views_leave_the_batches_as_they_are():
    loader = loader_of(range(24))
    plain = Loader(tiny_data().train, loader.views, 12, 0, CPU)
    plain.epoch = 1
    expected = np.stack([index for index, _ in Loader.__iter__(plain)])
    assert (order_of(loader, epoch=1) == expected).all()


def test_every_second_image_is_a_partner_of_the_one_before():
    """Another image of the same name, each of them equally often; the first of each pair is as the
    plan drew it; a name that only one image has leaves the second image as it was."""
    name = tiny_data().train.emoji  # six names, four images each
    loader = loader_of(name)
    plain = order_of(loader_of(range(24)))
    first, second = order_of(loader).reshape(-1, 2).T
    assert (first == plain.reshape(-1, 2)[:, 0]).all()
    assert (name[first] == name[second]).all() and (first != second).all()

    seen = {image: set() for image in range(24)}
    for epoch in range(60):
        for one, other in order_of(loader, epoch).reshape(-1, 2):
            seen[one].add(other)
    assert all(len(others) == 3 for others in seen.values())

    lone = torch.arange(24)
    lone[:6] = 100  # six images of one name, all others alone
    changed = order_of(loader_of(lone))
    paired = plain.reshape(-1, 2)[:, 0] < 6
    second = changed.reshape(-1, 2)[:, 1]
    assert (second[paired] < 6).all() and 0 < paired.sum() < len(paired)
    assert (second[~paired] == plain.reshape(-1, 2)[~paired, 1]).all()


def test_partners_are_drawn_evenly():
    """u in [0, 1) goes in equal parts to the other images of the name."""
    loader = loader_of([0] * 5 + [1] * 19)
    index = np.full(1000, 2)
    partner, exists = loader.partners(index, np.arange(1000) / 1000)
    assert exists.all() and np.bincount(partner).tolist() == [250, 250, 0, 250, 250]


def test_pairs_need_an_even_share_of_the_batch(capsys):
    with pytest.raises(SystemExit):
        loader_of(tiny_data().train.labels, batch=9)
    assert capsys.readouterr().err == "error: --batch 9: choose a multiple of 2, pairs of images\n"
    loader_of(range(24), batch=9)


@pytest.mark.parametrize("positives", ["labels", "drawings"])
def test_positives_that_are_not_known_are_refused(tmp_path, positives):
    data = tiny_data()
    split = Split(InMemory(data.train.images.pixels))
    data = Data("plain", split, split, None)
    out = tmp_path / "run"
    found = call_main("drlim", *short("drlim"), "--positives", positives, "--out", out, data=data)
    assert found.code == 1 and not out.exists()
    assert found.err == (
        f"error: --positives {positives}: not known of these images; choose views or other "
        "--data\n"
    )


def test_main_gives_the_loss_both_views_of_all_images_and_their_names(train, monkeypatch):
    """The rows: first views in the order of the batch, then second views; neighbours are pairs."""
    seen = []

    def loss(z, name, margin, repel):
        seen.append((z.detach(), name, margin, repel))
        return contrastive_loss(z, name, margin, repel)

    monkeypatch.setattr(drlim, "contrastive_loss", loss)
    flags = short("drlim", positives="drawings", margin=0.7, repel=2.0)
    run = train("drlim", *flags, **light("drlim"))
    emoji = tiny_data().train.emoji
    assert len(seen) == 4
    for z, name, margin, repel in seen:
        assert margin == 0.7 and repel == 2.0
        assert z.shape == (24, 32) and torch.equal(name[:12], name[12:])
        assert torch.equal(name[0:12:2], name[1:12:2])
    assert torch.equal(seen[0][1][:8], emoji[run.index])


def test_pairs_do_not_depend_on_the_number_of_processes(train):
    """As test_distributed.py, which takes the default, views."""
    flags = short("drlim", positives="drawings", epochs=1)
    alone = train("drlim", *flags, **light("drlim"))
    together = train("drlim", *flags, world=2, **light("drlim"))
    torch.testing.assert_close(together.losses, alone.losses, rtol=1e-9, atol=1e-9)
    assert_close_states(together.state, alone.state, rtol=1e-9, atol=1e-9)
    assert len(alone.losses) == 2


# -------- The picture -----------------------------------------------------------------------------


def test_points_in_the_plane_are_drawn(train):
    flags = short("drlim", epochs=1)
    assert "points.png" not in train("drlim", *flags, double=False, **light("drlim")).pictures
    flags = short("drlim", epochs=1, dim=2)
    pictures = train("drlim", *flags, double=False, **light("drlim")).pictures
    assert len(pictures["points.png"]) > 10_000


@pytest.mark.parametrize("unit", [True, False])
def test_the_points_drawn_are_those_of_the_loss(train, monkeypatch, unit):
    """With --unit on the unit circle. The bar is as long as the margin, in the same numbers."""
    drawn = []
    bars = []
    monkeypatch.setattr(Axes, "scatter", lambda axes, x, y, **options: drawn.append((x, y)))
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, *others, **options: bars.append((x, y)))
    flags = short("drlim", batch=24, epochs=1, dim=2, margin=0.7)
    flags += ["--unit" if unit else "--no-unit"]
    train("drlim", *flags, double=False, **light("drlim"))
    z, _ = features(Recorder.latest.model, tiny_data().test, 16, CPU)
    if unit:
        z = z / z.square().sum(1, keepdim=True).sqrt()
    assert (z.square().sum(1) - 1).abs().max() < 1e-5 or not unit
    torch.testing.assert_close(torch.stack(drawn[0], 1), z, rtol=1e-5, atol=1e-5)
    (((left, right), (bottom, top)),) = bars
    assert right - left == pytest.approx(0.7) and bottom == top
