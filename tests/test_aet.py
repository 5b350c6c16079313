"""AET: homographies against the official least squares and PIL, affine matrices against the
official formula, the way there and back, parameters that fit the images, and what the filling and
the softness of t(x) betray."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, noise
from PIL import Image
from sklearn.linear_model import Ridge
from test_context_prediction import fourier_noise

from common import Data, InMemory, Loader, Split, make_views
from kernels.views import AUGMENT, BatchRandom, denormalize
from methods import aet

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZE, BATCH = 16, 6
KINDS = pytest.mark.parametrize("transform", ["projective", "affine"])


def settings(*flags):
    return arguments("aet", "--size", SIZE, *flags)


def parameters(transform, n=50, seed=0):
    rand = BatchRandom([seed], n)
    return aet.draw_parameters(rand, settings("--transform", transform))


def smooth(n, size, seed=0):
    """Images in [0, 1] that change slowly from pixel to pixel."""
    coarse = noise(n, 3, 6, 6, seed=seed).sigmoid()
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def identity(transform):
    """The parameters of the transformation that changes nothing."""
    if transform == "affine":
        return torch.tensor([[1.0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    numbers = torch.tensor([[1.0, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    return (numbers - numbers.new_tensor(aet.MEAN)) / numbers.new_tensor(aet.STD)


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    estimate = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    theta = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    assert aet.transformation_loss(estimate, theta).item() == pytest.approx((1 + 9) / 4)


@KINDS
def test_a_constant_answer_has_the_loss_of_the_dotted_line(transform):
    """The mean of the parameters of many transformations; any other constant is worse. Cosine
    and sine have variance 1/2, the others, uniform in [-1, 1], 1/3; homographies about 1."""
    theta = parameters(transform, 20_000, seed=1)
    mean = theta.mean(0).expand_as(theta)
    found = aet.transformation_loss(mean, theta).item()
    assert found == pytest.approx(aet.constant_loss(settings("--transform", transform)), rel=0.02)
    assert aet.transformation_loss(mean + 0.3, theta).item() == pytest.approx(found + 0.09)
    expected = {"projective": 1.0, "affine": (1 / 2 + 1 / 2 + 4 / 3) / 6}[transform]
    assert found == pytest.approx(expected, rel=0.03)


# -------- Parameters ------------------------------------------------------------------------------


def official_coefficients(points, images):
    """The least squares of the official code, in numpy: eight numbers that send points to images.
    """
    rows = []
    for (u, v), (u2, v2) in zip(points, images):
        rows.append([u, v, 1, 0, 0, 0, -u2 * u, -u2 * v])
        rows.append([0, 0, 0, u, v, 1, -v2 * u, -v2 * v])
    A = np.array(rows)
    return np.linalg.inv(A.T @ A) @ A.T @ np.array(images).reshape(8)


def test_homographies_are_those_of_the_official_code():
    """In pixels of an image of 32, as there; the corners are met."""
    generator = np.random.default_rng(0)
    corners = np.array([(0, 0), (32, 0), (32, 32), (0, 32)], float)
    for turn in range(4):
        points = 16 + 1.1 * (np.roll(corners, -turn, 0) - 16) + generator.integers(-4, 5, (4, 2))
        expected = official_coefficients(points, corners)
        pixels = torch.from_numpy(points)[None]
        found = aet.homography(pixels, torch.from_numpy(corners))[0]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9)

        # In the coordinates of the file the side is 1.
        unit = aet.homography(pixels / 32, torch.from_numpy(corners) / 32)[0]
        scale = np.array([1, 1, 1 / 32, 1, 1, 1 / 32, 32, 32])
        np.testing.assert_allclose(unit.numpy(), expected * scale, rtol=0, atol=1e-9)


def test_corners_move_as_drawn():
    """The zoomed, turned and shifted corners of t(x) show the corners of x."""

    class Given:
        moves = 0.02 * torch.arange(8).view(1, 4, 2)
        values = [torch.tensor([1.0]), torch.tensor([[[0.9]]]), moves]

        def uniform(self, low, high, columns=()):
            return self.values.pop(0)

    theta = aet.draw_homographies(Given(), 0.125).double()
    matrix = aet.to_matrix(theta)[0]
    # one turn: corner k of the image is seen where corner k + 1 was
    zoomed = [(0.95, 0.05), (0.95, 0.95), (0.05, 0.95), (0.05, 0.05)]
    for k, (u, v) in enumerate(zoomed):
        point = torch.tensor([u + 0.04 * k, v + 0.04 * k + 0.02, 1], dtype=torch.float64)
        x, y, w = matrix @ point
        assert (x / w).item() == pytest.approx(aet.CORNERS[k][0], abs=1e-5)
        assert (y / w).item() == pytest.approx(aet.CORNERS[k][1], abs=1e-5)


def test_all_four_turns_are_drawn_alike_and_no_homography_folds_the_image():
    theta = parameters("projective", 8000)
    a, b = (theta[:, :2] * torch.tensor(aet.STD)[:2]).unbind(1)
    turn = (torch.atan2(b, a) / (math.pi / 2)).round() % 4
    assert (turn.long().bincount() / 8000 - 1 / 4).abs().max() < 4 * (3 / 16 / 8000) ** 0.5
    edge = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    points = torch.cat([edge, torch.ones(4, 1)], 1)
    assert (aet.to_matrix(theta) @ points.T)[:, 2].min() > 0  # w: no point is at infinity


def official_affine(theta, size):
    """The official code's matrix, from pixels of x to pixels of t(x), 3 x 3: around the centre, the
    angle clockwise, the second column skewed."""
    cos, sin, right, down, scale, shear = theta
    angle = math.atan2(sin, cos)
    skewed = angle + math.radians(30 * shear)
    scale = 0.7 + (scale + 1) / 2 * 0.6
    centre = size / 2
    around = np.array([[1, 0, centre], [0, 1, centre], [0, 0, 1.0]])
    turn = scale * np.array(
        [
            [math.cos(angle), -math.sin(skewed), 0],
            [math.sin(angle), math.cos(skewed), 0],
            [0, 0, 1 / scale],
        ]
    )
    shift = np.array([[1, 0, 0.2 * size * right], [0, 1, 0.2 * size * down], [0, 0, 1.0]])
    return shift @ around @ turn @ np.linalg.inv(around)


def test_affine_matrices_are_those_of_the_official_code():
    theta = parameters("affine", 20).double()
    pixels = np.diag([SIZE, SIZE, 1.0])
    for own, matrix in zip(theta, aet.to_matrix(theta)):
        expected = np.linalg.inv(official_affine(own.tolist(), SIZE))
        found = pixels @ matrix.numpy() @ np.linalg.inv(pixels)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@KINDS
def test_the_identity_has_its_own_parameters(transform):
    matrix = aet.to_matrix(identity(transform))
    torch.testing.assert_close(matrix[0], torch.eye(3, dtype=torch.float64), **EXACT)
    x = smooth(1, SIZE)
    torch.testing.assert_close(aet.warp(x, matrix, "grey"), x, **EXACT)


# -------- The transformed image -------------------------------------------------------------------


@KINDS
def test_warp_is_that_of_pil(transform):
    """PIL samples at the same points and rounds to 8 bits; it blends no filling in, so the pixels
    within one of the border of the image are left out."""
    size = 32
    pixels = (255 * smooth(8, size)).byte()
    matrices = aet.to_matrix(parameters(transform, 8).double())
    found = 255 * aet.warp(pixels.double() / 255, matrices, "grey")
    scale = np.diag([size, size, 1.0])
    for image, matrix, ours in zip(pixels, matrices, found):
        numbers = scale @ matrix.numpy() @ np.linalg.inv(scale)
        numbers = (numbers / numbers[2, 2]).flatten()[:8]
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        perspective = Image.Transform.PERSPECTIVE
        theirs = picture.transform((size, size), perspective, numbers, Image.Resampling.BILINEAR)
        theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1).double()

        inside = aet.warp(torch.ones(1, 1, size, size).double(), matrix[None], "grey")[0, 0] == 1
        assert inside.sum() > 200
        assert (ours - theirs)[:, inside].abs().max() <= 1


def test_a_quarter_turn_is_rot90():
    """The homography that sends each corner to the next: exactly the turned image."""
    x = smooth(1, SIZE)
    corners = torch.tensor(aet.CORNERS).double()
    numbers = aet.homography(corners.roll(-1, 0)[None], corners)
    theta = (numbers - numbers.new_tensor(aet.MEAN)) / numbers.new_tensor(aet.STD)
    turned = aet.warp(x, aet.to_matrix(theta), "border")
    torch.testing.assert_close(turned, x.rot90(-1, (2, 3)), rtol=0, atol=1e-9)  # clockwise


@KINDS
def test_there_and_back(transform):
    """The inverse matrix restores the image, up to two resamplings, where it was seen."""
    x = smooth(20, 64)
    matrix = aet.to_matrix(parameters(transform, 20).double())
    back = matrix.inverse()
    restored = aet.warp(aet.warp(x, matrix, "border"), back, "border")
    ones = torch.ones_like(x)
    seen = aet.warp(aet.warp(ones, matrix, "grey"), back, "grey") > 0.999
    assert seen.double().mean() > 0.4
    difference = (restored - x).abs()
    assert difference[seen].mean() < 0.01
    wrong = aet.warp(aet.warp(x, matrix, "border"), back.roll(1, 0), "border")
    assert (wrong - x).abs()[seen].mean() > 0.1


@KINDS
def test_a_grey_filling_betrays_the_transformation_of_empty_images(transform):
    """Images in which nothing is to be seen: with the filling, each transformation gives another
    picture, from whose outline it can be read; without, all give the same."""
    matrix = aet.to_matrix(parameters(transform, 20).double())
    white = torch.ones(20, 3, 32, 32, dtype=torch.float64)
    outlines = aet.warp(white, matrix, "grey").flatten(1)
    assert torch.pdist(outlines).min() > 0.5
    torch.testing.assert_close(aet.warp(white, matrix, "border"), white, **EXACT)

    # the share of grey grows as the image shrinks: the scale alone, read without looking inside
    if transform == "affine":
        scale = parameters(transform, 20)[:, 4]
        share = (outlines > 0.99).double().mean(1)
        assert torch.corrcoef(torch.stack([scale.double(), share]))[0, 1] > 0.6


def images_with_frames(n, size=32):
    """Images with detail in the middle and a flat frame, as drawings have it."""
    detail = 0.5 + 0.12 * fourier_noise(3 * n, size, 1.0).view(n, 3, size, size)
    frame = torch.full((n, 3, size, size), 0.9)
    frame[..., 4:-4, 4:-4] = detail[..., 4:-4, 4:-4]
    return frame.clamp(0, 1)


def transformed(images, *flags):
    """t(x) in [0, 1], as the views show it to the network, and theta."""
    args = arguments("aet", "--size", images.shape[3], *flags)
    ((_, augment),) = aet.views(args)
    pair = augment(images, BatchRandom([0], len(images)))
    theta = aet.draw_parameters(BatchRandom([0], len(images)), args)
    return denormalize(pair[:, 1]), theta


def is_grey(x):
    """(n, H, W): where the filling of a grey border is to be seen, 0.5 in all channels."""
    return ((x - 0.5).abs().amax(1) < 1e-5).float()


def is_streak(x):
    """(n, H - 1, W - 1): where the image does not change along some direction, as it does where
    pixels of the border are repeated: the gradients of the channels are parallel."""
    down = x.diff(dim=2)[..., :-1]  # (n, 3, H - 1, W - 1)
    right = x.diff(dim=3)[:, :, :-1]
    area = down.square().sum(1) * right.square().sum(1) - (down * right).sum(1).square()
    return (area < 1e-9).float()


def told_by(mask, theta):
    """The share of the variance of each parameter that can be told from a mask (n, H, W) alone, in
    pictures that were not used to find out how: by its 4 x 4 lowest frequencies and their products,
    linearly. 0 or less: nothing."""
    n, side, _ = mask.shape
    place = (torch.arange(side) + 0.5) / side
    waves = torch.cos(math.pi * place[:, None] * torch.arange(4))  # (H, 4)
    low = (waves.T @ mask @ waves).flatten(1) / side**2  # (n, 16)
    products = (low[:, :, None] * low[:, None]).flatten(1)
    known = torch.cat([low, products], 1)
    fitted = slice(None, 3 * n // 4)
    new = slice(3 * n // 4, None)
    rule = Ridge(1e-4).fit(known[fitted], theta[fitted])
    error = (torch.as_tensor(rule.predict(known[new])) - theta[new]).square().mean(0)
    return 1 - error / theta[new].var(0)


@KINDS
def test_the_outline_tells_parameters_with_a_grey_filling_only(transform):
    """A rule that sees nothing but the filling: where t(x) is exactly grey. It tells how an image
    was shifted and scaled, or the two numbers of its perspective (of an enlarged image no outline
    is seen). It cannot tell quarter turns, because a turned square has the same outline. With the
    default's border there is no grey, and nothing is told."""
    images = images_with_frames(1000)
    flags = ("--transform", transform)
    t, theta = transformed(images, *flags, "--fill", "grey")
    found = told_by(is_grey(t), theta)
    if transform == "affine":
        assert found[2:5].min() > 0.85  # shift to the right and down, scale
    else:
        assert found[6:].min() > 0.55  # g and h
    assert found[:2].max() < 0.05  # cosine and sine, or a and b

    t, theta = transformed(images, *flags)
    assert not is_grey(t).any()
    assert told_by(is_grey(t), theta).max() < 0.01


def test_repeated_borders_tell_less_than_a_grey_filling_but_not_nothing():
    """If there is detail up to the border of an image, its repeated pixels are streaks, by which a
    rule tells about half of the variance of shift and scale. Grey tells more than 0.85 of it. White
    borders repeat without a trace, see above."""
    images = 0.5 + 0.12 * fourier_noise(3000, 32, 1.0).view(1000, 3, 32, 32)
    t, theta = transformed(images.clamp(0, 1), "--transform", "affine")
    found = told_by(is_streak(t), theta)
    assert 0.3 < found[2:5].min() and found[2:5].max() < 0.7
    assert found[:2].max() < 0.05


def softness(x):
    """Log of the energy of the finest detail in the middle of images, beside that of detail twice
    as coarse."""

    def energy(part):
        down = part.diff(dim=2).square().mean((1, 2, 3))
        return down + part.diff(dim=3).square().mean((1, 2, 3))

    middle = x[..., 8:24, 8:24]  # so that no border is in it
    return (energy(F.avg_pool2d(middle, 2)) / energy(middle)).log()


def test_softness_tells_the_scale_of_affine_transformations():
    """The images have as much detail at every scale, so what an enlarged one shows is no coarser
    than what the others show. But t(x) is resampled from the pixels of x, and where it is enlarged
    it is softer. This one number tells half of the variance of the scale, and nothing of the other
    parameters. Were t(x) made of pixels four times as fine, it would tell nothing at all."""
    n = 800
    theta = parameters("affine", n)
    matrix = aet.to_matrix(theta)
    fine = fourier_noise(n, 128, 1.0)
    as_it_is = aet.warp(F.avg_pool2d(fine, 4), matrix, "border")
    of_fine = F.avg_pool2d(aet.warp(fine, matrix, "border"), 4)

    def told(x):
        """The squared correlation with each of the six parameters."""
        return torch.corrcoef(torch.cat([softness(x)[None], theta.T]))[0, 1:].square()

    found = told(as_it_is)
    assert 0.4 < found[4] < 0.65  # the scale
    assert found[[0, 1, 2, 3, 5]].max() < 0.02
    assert told(of_fine).max() < 0.02

@KINDS
def test_views_are_the_image_and_its_transformation(transform):
    """The first of the pair is not resampled. The second is made of it, mirrored or not."""
    pixels = (255 * smooth(8, SIZE)).byte()
    args = settings("--transform", transform, "--min-crop", 1)
    (pair,) = make_views(pixels, aet.views(args))
    assert pair.shape == (8, 2, 3, SIZE, SIZE)
    x, transformed = aet.show([pair]).values()
    plain = pixels.float() / 255
    mirrored = (x - plain).abs().amax((1, 2, 3)) > 1e-3
    assert 0 < mirrored.sum() < 8
    expected = torch.where(mirrored[:, None, None, None], plain.flip(3), plain)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)

    rand = BatchRandom([0, 0, AUGMENT], 8)
    matrix = aet.to_matrix(aet.draw_parameters(rand, args))
    torch.testing.assert_close(transformed, aet.warp(x, matrix, "border"), rtol=0, atol=1e-5)


# -------- The network -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_gradient_reaches_every_parameter(arch):
    model = aet.AET(arch, SIZE, 8)
    x = noise(2, 8, 3, SIZE, SIZE, dtype=torch.float32)
    estimate = model(*x)
    assert estimate.shape == (8, 8)
    aet.transformation_loss(estimate, noise(8, 8).float()).backward()
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name


def test_both_images_have_one_encoder_and_the_order_matters():
    torch.manual_seed(0)
    model = aet.AET("resnet14", SIZE, 8).eval()
    x, tx = noise(2, 4, 3, SIZE, SIZE, dtype=torch.float32)
    assert (model(x, tx) - model(tx, x)).abs().max() > 1e-3
    expected = model(x, tx)
    of_x, of_tx = model.decoder[0].weight.data.chunk(2, 1)
    model.decoder[0].weight.data = torch.cat([of_tx, of_x], 1)
    torch.testing.assert_close(model(tx, x), expected, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_those_of_each_image_by_itself():
    """As in the official code: what t(x) looks like changes nothing in how x is normalised."""
    torch.manual_seed(0)
    model = aet.AET("resnet14", SIZE, 8)
    x, tx, other = noise(3, 4, 3, SIZE, SIZE, dtype=torch.float32)
    seen = []
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x, tx)
    model(x, 3 + other)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[3])


# -------- Training --------------------------------------------------------------------------------


def random_images():
    split = Split(InMemory((255 * smooth(3 * BATCH, SIZE)).byte()))
    return Data("smooth", split, split, None)


@KINDS
@pytest.mark.parametrize("process, world", [(0, 1), (1, 2)])
def test_targets_of_the_loop_are_those_of_the_views(monkeypatch, transform, process, world):
    """In every step of every epoch, resumed or not, also where each process has but a share."""
    args = settings("--transform", transform)
    used = []
    warp = aet.warp

    def see(x, matrix, fill):
        used.append(matrix)
        return warp(x, matrix, fill)

    monkeypatch.setattr(aet, "warp", see)
    monkeypatch.setattr("kernels.views.rank", lambda: process)
    monkeypatch.setattr("kernels.views.world", lambda: world)
    loader = Loader(random_images().train, aet.views(args), BATCH, 3, CPU)
    for epoch, done in ((0, 0), (1, 0), (1, 4)):
        for step, _ in loader(epoch, done):
            rand = loader.random(epoch, step % loader.steps, 0, AUGMENT)
            theta = aet.draw_parameters(rand, args)
            assert len(theta) == BATCH // world
            torch.testing.assert_close(used[-1], aet.to_matrix(theta))


@KINDS
def test_main_asks_for_what_it_shows(train, monkeypatch, transform):
    """Each pair that the network of main() gets is explained by the parameters of the loss."""
    shown = []
    asked = []
    forward = aet.AET.forward
    loss = aet.transformation_loss

    def see(model, x, tx):
        if model.training:
            shown.append((denormalize(x), denormalize(tx)))
        return forward(model, x, tx)

    def listen(estimate, theta):
        asked.append(theta)
        return loss(estimate, theta)

    monkeypatch.setattr(aet.AET, "forward", see)
    flags = ["--size", SIZE, "--batch", BATCH, "--epochs", 2, "--transform", transform]
    run = train("aet", *flags, data=random_images(), double=False, transformation_loss=listen)
    assert len(shown) == len(asked) == 6 and "restored.png" in run.pictures
    for (x, tx), theta in zip(shown, asked):
        expected = aet.warp(x, aet.to_matrix(theta), "border")
        torch.testing.assert_close(tx, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--size", 1), "--size 1: choose at least 2"),
        (("--shift", 0.2), "--shift 0.2: choose at least 0 and at most 0.14"),
        (("--transform", "rotation"), "--transform: invalid choice: 'rotation'"),
        (("--fill", "white"), "--fill: invalid choice: 'white'"),
        (("--min-crop", 0), "--min-crop 0: choose more than 0 and at most 1"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("aet", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err
