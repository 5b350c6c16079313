"""CPC: InfoNCE by hand, which patch each prediction is of, what the context may see and what
batch-norm would tell it, the patches and their augmentation, the encoder."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, Shell, arguments, noise, tiny_data
from torch import nn
from torchvision.models.resnet import BasicBlock

import common
from common import Data, InMemory, Split, make_views
from kernels.maps import maps
from kernels.views import BatchRandom
from methods import cpc

EXACT = {"rtol": 0, "atol": 1e-12}
CLOSE = {"rtol": 0, "atol": 1e-5}
SIZE = 24  # 5 x 5 patches of 8 pixels, each 4 from the next


@pytest.fixture(autouse=True)
def light_networks(monkeypatch):
    monkeypatch.setattr(common, "ResNet", Shell)


def rand(n):
    return BatchRandom([0, 1], n)


def patches(n, grid=5, side=8, seed=0):
    """Random patches in [0, 1]."""
    return noise(n, grid, grid, 3, side, side, seed=seed).float().sigmoid()


def model(*flags):
    torch.manual_seed(0)
    return cpc.CPC(arguments("cpc", "--size", SIZE, *flags))


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """Predictions that score 0 everywhere: log C. A score of a at the true patch and 0 elsewhere:
    log(1 + (C - 1) exp(-a))."""
    candidates = torch.eye(6, dtype=torch.float64)
    positive = torch.tensor([2, 5, 0])
    nothing = torch.zeros(3, 6, dtype=torch.float64)
    assert cpc.info_nce(nothing, candidates, positive).item() == pytest.approx(math.log(6))
    for a in (-1.0, 3.0):
        found = cpc.info_nce(a * candidates[positive], candidates, positive)
        assert found.item() == pytest.approx(math.log1p(5 * math.exp(-a)))
    mixed = torch.stack([3 * candidates[2], 0 * candidates[2], 3 * candidates[1]])
    expected = math.log1p(5 * math.exp(-3)) + math.log(6) + math.log(5 + math.exp(3))
    found = cpc.info_nce(mixed, candidates, positive).item()
    assert found == pytest.approx(expected / 3)


def test_what_all_candidates_share_does_not_matter():
    """It adds the same to every score of a prediction."""
    predicted, candidates = noise(4, 8), noise(10, 8, seed=1)
    positive = torch.tensor([0, 9, 4, 4])
    loss = cpc.info_nce(predicted, candidates, positive)
    shifted = cpc.info_nce(predicted, candidates + noise(8, seed=2), positive)
    torch.testing.assert_close(shifted, loss, **EXACT)


def test_loss_bounds_the_information():
    """log C - L is at most log C, and at most what there is to know: here each prediction knows of
    its patch only which half of the candidates it is in, log 2, and the best scores reach it."""
    half = torch.arange(8) % 2
    candidates = F.one_hot(half, 2).double()
    found = cpc.info_nce(50 * candidates, candidates, torch.arange(8))
    assert math.log(8) - found.item() == pytest.approx(math.log(2))


def test_true_patches_are_those_of_the_published_procedure():
    """v2's appendix: of b images with a grid of h x w, the prediction of step i (one less than our
    k) number m has the label b1 h w + (i + 1) w + c1, with b1 = m // ((h - i - 1) w) and
    c1 = m % ((h - i - 1) w)."""
    b, h, w = 3, 5, 5
    number = torch.arange(b * h * w).view(b, h, w)
    for i in range(h - 1):
        m = torch.arange(b * (h - i - 1) * w)
        b1, c1 = m // ((h - i - 1) * w), m % ((h - i - 1) * w)
        found = cpc.true_patches(number, 0, [i + 1])
        assert torch.equal(found.flatten(), b1 * h * w + (i + 1) * w + c1)


class Copy(nn.Module):
    """A reader whose context is the encoding itself and whose maps change nothing: it predicts that
    a patch k rows below is like the patch itself."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.context = nn.Identity()
        self.maps = [nn.Identity() for _ in steps]

    forward = cpc.Reader.forward


@pytest.mark.parametrize("flags", [(), ("--nearest", 1, "--furthest", 2), ("--nearest", 4)])
def test_each_prediction_is_of_the_patch_k_rows_further(flags):
    """In all four directions. Encodings that say where a patch lies: image, row, column. The true
    patch of each prediction lies k rows below the patch that it was made from; after a quarter turn
    counter-clockwise this means k columns to the left, and so on. Every pair occurs once."""
    args = arguments("cpc", "--size", SIZE, *flags)
    steps = cpc.steps_of(args)
    places = torch.stack(torch.meshgrid(*map(torch.arange, (2, 5, 5)), indexing="ij"), -1)
    network = model(*flags)
    network.readers = nn.ModuleList([Copy(steps) for _ in range(4)])
    network.scale = 1
    network.backbone.encode = lambda x: places.float()
    network.target = nn.Identity()
    source, target = network(None)
    number = torch.arange(50).view(2, 5, 5)
    positive = torch.cat([cpc.true_patches(number, turn, steps) for turn in range(4)], 1)
    moved = target.flatten(0, 2)[positive] - source  # (2, R, 3)

    expected = []
    for down, right in ((1, 0), (0, -1), (-1, 0), (0, 1)):
        for k in steps:
            expected += [[0, k * down, k * right]] * (5 * (5 - k))
    assert torch.equal(moved, torch.tensor(expected).float().expand(2, -1, -1))
    pairs = torch.cat([source, target.flatten(0, 2)[positive]], 2).flatten(0, 1)
    assert len(pairs.unique(dim=0)) == len(pairs)


def test_first_loss_is_near_chance():
    """The predictions begin small: log of the number of patches of the batch."""
    network = model()
    predicted, target = network(patches(2))
    number = torch.arange(50).view(2, 5, 5)
    positive = [cpc.true_patches(number, turn, range(2, 5)) for turn in range(4)]
    assert predicted.shape == (2, 4 * (3 + 2 + 1) * 5, 64) and target.shape == (2, 5, 5, 64)
    positive = torch.cat(positive, 1).flatten()
    loss = cpc.info_nce(predicted.flatten(0, 1), target.flatten(0, 2), positive)
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)


# -------- What the context sees -------------------------------------------------------------------


def test_context_sees_its_row_and_those_above_but_none_below():
    """By gradients. With b blocks: its own row and b rows above, b columns to each side."""
    torch.manual_seed(0)
    reader = cpc.Reader(8, 16, 2, 4, range(2, 5)).double()
    z = noise(1, 8, 7, 7).requires_grad_()
    for row, column in ((0, 0), (3, 3), (6, 1)):
        c = reader.context(z)[0, :, row, column]
        (seen,) = torch.autograd.grad(c.square().sum(), z)
        seen = seen.abs().sum(1)[0] > 0  # (7, 7)
        i = torch.arange(7)
        rows = (row - 2 <= i) & (i <= row)
        columns = (i - column).abs() <= 2
        assert torch.equal(seen, rows[:, None] & columns)


@pytest.fixture
def pixels_seen():
    """pixels_seen(arch, turn) -> bool (source rows, rows of the turned grid): whether the
    predictions from a row depend on the pixels of a row of patches."""

    def measure(arch, turn):
        network = model("--arch", arch, "--nearest", 2, "--furthest", 2).train()
        x = patches(2).requires_grad_()
        per_turn = 3 * 5
        predicted, _ = network(x)
        mine = predicted[:, turn * per_turn : (turn + 1) * per_turn].unflatten(1, (3, 5))
        found = []
        for row in range(3):
            value = mine[:, row].square().sum()
            (grad,) = torch.autograd.grad(value, x, retain_graph=True)
            grad = torch.rot90(grad.abs().sum((3, 4, 5)), turn, dims=(1, 2))  # (2, 5, 5)
            found.append(grad.sum((0, 2)) > 1e-9 * grad.sum())
        return torch.stack(found)

    return measure


@pytest.mark.parametrize("arch", ["resnet14-layer", "resnet14-none", "vit_micro"])
def test_predictions_know_nothing_of_the_rows_that_they_predict(pixels_seen, arch):
    """From the pixels to the prediction, in training mode. Two blocks see two rows above."""
    for turn in (0, 3):
        assert torch.equal(pixels_seen(arch, turn), torch.ones(3, 5).tril().bool())


def test_with_batch_norm_they_do(pixels_seen):
    """The shortcut of which v2 warns: statistics of the batch connect all patches."""
    assert pixels_seen("resnet14", 0).all()


# -------- The encoder -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, grid",
    [(48, (5, 8, 16)), (96, (5, 16, 32)), (256, (7, 32, 64)), (16, (5, 2, 8)), (6, (5, 1, 2))],
)
def test_the_grid_covers_the_image_and_patches_overlap(size, grid):
    """48, 96 and 256: by half, as in v1."""
    assert cpc.grid_of(size) == grid
    count, stride, side = grid
    assert (count - 1) * stride + side == size and stride <= side / 2


def test_cut_patches_is_slicing():
    x = noise(2, 3, SIZE, SIZE)
    cut = cpc.cut_patches(x)
    assert cut.shape == (2, 5, 5, 3, 8, 8)
    for i in range(5):
        for j in range(5):
            part = x[:, :, 4 * i : 4 * i + 8, 4 * j : 4 * j + 8]
            assert torch.equal(cut[:, i, j], part)


@pytest.mark.parametrize("arch", ["resnet14-layer", "vit_micro"])
def test_the_representation_is_the_mean_encoding_of_the_patches(arch):
    """One image after the other, one patch after the other; as common.py measures it."""
    torch.manual_seed(0)
    network = common.new_backbone("cpc", arch, SIZE)
    x = noise(2, 3, SIZE, SIZE).float()
    expected = []
    with torch.no_grad():
        for image in cpc.cut_patches(x).flatten(1, 2):  # (25, 3, 8, 8)
            single = [network.net.eval()(patch[None]) for patch in image]
            expected.append(torch.cat(single).mean(0))
    found = common.embed(network, x)
    assert found.shape == (2, network.out_dim)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_the_map_of_an_image_has_a_place_per_patch():
    net = cpc.backbone("resnet14", SIZE).eval()
    x = noise(2, 3, SIZE, SIZE).float()
    (found,) = maps(net, x)
    assert found.shape == (2, net.out_dim, 5, 5)
    torch.testing.assert_close(found.mean((2, 3)), net(x), **CLOSE)
    patch = cpc.cut_patches(x)[1, 3, 4]
    torch.testing.assert_close(found[1, :, 3, 4], net.net(patch[None])[0], **CLOSE)


def test_layer_norm_is_over_channels_and_places_of_one_patch():
    x = noise(3, 4, 2, 2)
    net = nn.Sequential(nn.BatchNorm2d(4)).double()
    cpc.replace_norms(net, "layer")
    net.double()[0].weight.data = noise(4, seed=1)
    scaled = F.layer_norm(x, x.shape[1:]) * net[0].weight[:, None, None]
    torch.testing.assert_close(net(x), scaled, **EXACT)


def test_norms_are_replaced_everywhere():
    kinds = {"layer": nn.GroupNorm, "none": cpc.Affine}
    plain = cpc.backbone("resnet14", SIZE).net
    count = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    for norm, kind in kinds.items():
        net = cpc.backbone(f"resnet14-{norm}", SIZE).net
        assert sum(isinstance(module, kind) for module in net.modules()) == count
        assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
        assert not [name for name in net.state_dict() if "running" in name]


def test_without_norms_a_block_begins_as_its_shortcut():
    """Otherwise each would double the variance, and the 16 of a ResNet-50 would be too many."""
    torch.manual_seed(0)
    block = BasicBlock(64, 64)
    cpc.replace_norms(block, "none")
    x = noise(2, 64, 4, 4).float()
    torch.testing.assert_close(block(x), x.relu(), **CLOSE)


@pytest.mark.parametrize("arch", ["resnet14-layer", "resnet14-none", "vit_micro"])
def test_gradient_reaches_every_parameter(arch):
    """A residual branch that starts at 0 learns its last scale and offset first."""
    network = model("--arch", arch)
    predicted, target = network(patches(2))
    (predicted.square().sum() + target.square().sum()).backward()
    for name, w in network.named_parameters():
        inside = arch.endswith("none") and ".layer" in name and "downsample" not in name
        assert w.grad.isfinite().all()
        assert inside or w.grad.abs().max() > 0, name
    assert network.readers[0].maps[0].weight.grad is not None


# -------- The views -------------------------------------------------------------------------------


def test_a_share_of_the_patches_loses_its_colours():
    """To one channel that is as it was, another for each patch."""
    x = patches(60)
    y = cpc.drop_colors(x, rand(60), 0.4)
    grey = (y[:, :, :, :1] == y).flatten(3).all(3)  # (60, 5, 5)
    assert grey.double().mean().item() == pytest.approx(0.4, abs=0.05)
    assert torch.equal(y[~grey], x[~grey])
    same = (y == x).flatten(4).all(4)[grey]  # (patches, 3)
    assert (same.sum(1) == 1).all()
    assert (same.double().mean(0) - 1 / 3).abs().max() < 0.08
    assert not grey.flatten(1).all(1).any() and grey.flatten(1).any(1).all()
    assert torch.equal(cpc.drop_colors(x, rand(60), 0), x)


def test_patches_are_mirrored_by_themselves():
    x = patches(60)
    y = cpc.flip_patches(x, rand(60), 0.5)
    mirrored = (y == x.flip(5)).flatten(3).all(3)
    assert torch.equal(y[~mirrored], x[~mirrored])
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert len({tuple(row.tolist()) for row in mirrored.flatten(1)}) == 60
    assert torch.equal(cpc.flip_patches(x, rand(60), 0), x)


def test_shifted_patches_are_slices_with_a_border():
    """v1: a random 60 x 60 of 64 x 64 pixels, padded again. Here 6 of 8: each place occurs."""
    x = patches(30)
    y = cpc.shift_patches(x, rand(30), 2)
    assert y.shape == x.shape
    inner = y[..., 1:7, 1:7]
    assert torch.equal(F.pad(inner, (1, 1, 1, 1)), y)
    places = []
    for top in range(3):
        for left in range(3):
            part = x[..., top : top + 6, left : left + 6]
            places.append((part == inner).flatten(3).all(3))
    places = torch.stack(places).double()  # (9, 30, 5, 5)
    assert (places.sum(0) == 1).all()
    assert (places.mean((1, 2, 3)) - 1 / 9).abs().max() < 0.05
    assert torch.equal(cpc.shift_patches(x, rand(30), 0), x)


def test_views_without_augmentation_are_what_is_evaluated():
    """Plain slices, normalised as in evaluation; the picture shows them side by side."""
    args = arguments("cpc", "--size", SIZE, "--drop", 0)
    images = noise(4, 3, SIZE, SIZE).float().sigmoid()

    def uniform(low=0.0, high=1.0, columns=()):
        return torch.full((4, *columns), low + 0.9 * (high - low))  # nothing is mirrored

    ((_, augment),) = cpc.views(args)
    x = augment(images, SimpleNamespace(uniform=uniform))
    torch.testing.assert_close(x, cpc.cut_patches(common.normalize(images)), **CLOSE)
    shown = cpc.show([x])["patches"]
    assert shown.shape == (4, 3, 50, 50)  # a line of one pixel around each
    torch.testing.assert_close(shown[:, :, 11:19, 41:49], images[:, :, 4:12, 16:24], **CLOSE)


def test_views_differ_between_patches_of_an_image():
    """All of drop, flip and margin are drawn for each patch; the same seed gives the same views."""
    flags = ("--drop", 0.5, "--flip", 0.5, "--margin", 2)
    args = arguments("cpc", "--size", SIZE, *flags)
    images = torch.full((3, 3, SIZE, SIZE), 200, dtype=torch.uint8)
    images[:, 1] = 90
    (x,) = make_views(images, cpc.views(args))
    assert x.shape == (3, 5, 5, 3, 8, 8)
    assert (x[0, 0, 0] != x[0, :, :]).flatten(2).any(2).any()
    (again,) = make_views(images, cpc.views(args))
    assert torch.equal(x, again)


# -------- Training --------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_loss_falls_where_a_picture_goes_on_as_it_began(train):
    """Each image has one colour of its own: all patches of it are alike, so the best that can be
    done is to know the image, not the patch, which leaves the log of 25."""
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 256, (48, 3, 1, 1), generator=generator, dtype=torch.uint8)
    split = Split(InMemory(colour.expand(-1, -1, SIZE, SIZE).contiguous()))
    flags = ["--size", SIZE, "--drop", 0, "--batch", 12, "--epochs", 12, "--warmup", 0]
    run = train("cpc", *flags, "--lr", 0.02, data=Data("plain", split, split, None), double=False)
    assert run.losses[0] > math.log(12 * 25) - 0.2
    assert math.log(25) - 0.01 < run.losses[-1] < math.log(25) + 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--size", 5), "--size 5: choose at least 6, for 5 patches along a side"),
        (("--furthest", 5), "--nearest 2, --furthest 5: choose from 1 to 4"),
        (("--nearest", 4, "--furthest", 3), "choose from 1 to 4, the first not larger"),
        (("--nearest", 0), "--nearest 0: choose at least 1"),
        (("--margin", 16), "--margin 16: choose less than 16, the side of a patch"),
        (("--arch", "vit_micro", "--size", 80), "its patches have 28 pixels, not a multiple of 8"),
        (("--arch", "resnet14-batch"), "--arch: invalid choice: 'resnet14-batch'"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("cpc", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err


def test_the_picture_shows_the_true_patch_and_the_likeliest(monkeypatch):
    """With a network that predicts a patch by the patch itself, the first guess is always true. It
    is drawn for the patch in the middle column, the given number of rows below the last one that is
    read, of which nothing is shown."""
    args = arguments("cpc", "--size", SIZE)
    data = tiny_data()
    seen = []
    monkeypatch.setattr(cpc, "save_grid", lambda *args: seen.append(args))

    def knows(x):
        u = F.normalize(x.flatten(3), dim=3)  # (n, 5, 5, 192)
        number = torch.arange(x[:, :, :, 0, 0, 0].numel()).view(x.shape[:3])
        true = torch.cat([cpc.true_patches(number, turn, range(2, 5)) for turn in range(4)], 1)
        return u.flatten(0, 2)[true], u

    run = SimpleNamespace(args=args, data=data, device=CPU, name="cpc")
    run.model = SimpleNamespace(eval=lambda: knows)
    cpc.draw_predictions("", run)
    ((_, rows, columns, green, note),) = seen
    assert len(columns) == len(rows[0]) == 8 and green.shape == (10, 8) and "2 rows below" in note
    assert green[:, 2].all() and not green[:, :2].any()
    images = next(data.test.images.whole(torch.arange(12), SIZE))[0]
    for read, true, first, *_ in rows:
        assert torch.equal(true, first) and (read[:, 12:] == 0.6).all()
        candidates = []
        for image in images / 255:
            small = F.interpolate(image[None], (SIZE, SIZE), mode="bicubic", antialias=True)[0]
            if torch.allclose(small[:, :12].clamp(0, 1), read[:, :12], atol=1e-3):
                candidates.append(small[:, 12:20, 8:16].clamp(0, 1))
        assert any(torch.allclose(true, patch, atol=1e-3) for patch in candidates)
