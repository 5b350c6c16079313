"""The views: each operation equals torchvision's on each image with that image's parameters, the
crops are distributed as torchvision's, and what a loader yields depends on seed, epoch, step and
position alone."""

import math
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop, transforms
from torchvision.transforms import functional as TF

import common
from common import Files, InMemory, Loader, Split, first_batch, make_views
from kernels.views import (
    AUGMENT,
    BICUBIC,
    CROP,
    METHOD,
    ORDER,
    BatchRandom,
    Crop,
    color_jitter,
    denormalize,
    gaussian_blur,
    normalize,
    random_flip,
    random_grayscale,
    resized_crop,
    solarize,
    whole_image,
)

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EVERY_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
# The operations are float32 sums and products of at most a few dozen numbers of size 1, so they may
# differ from torchvision's by a few dozen roundings of 6e-8. 1e-5 allows for that, and is 400 times
# less than one of 255 grey levels.
ROUNDING = {"rtol": 0, "atol": 1e-5}


class Recorder(BatchRandom):
    """BatchRandom that keeps what it drew: drawn(low, high, columns) is the one draw with these
    arguments."""

    def __init__(self, key, batch):
        super().__init__(key, batch)
        self.draws = []

    def uniform(self, low=0.0, high=1.0, columns=()):
        values = super().uniform(low, high, columns)
        self.draws.append((low, high, columns, values))
        return values

    def drawn(self, low=0.0, high=1.0, columns=()):
        wanted = (pytest.approx(low), pytest.approx(high), columns)
        [values] = [draw[3] for draw in self.draws if draw[:3] == wanted]
        return values


def smooth_images(n, size, seed=0):
    """(n, 3, size, size) float in [0, 1]: smooth colours with a little noise; the first four grey,
    grey, black and white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    x = F.interpolate(coarse, (size, size), mode="bicubic")
    x = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    x[:2] = x[:2, :1]
    x[2] = 0
    x[3] = 1
    return x


def noise_bytes(n, height, width, low=0, high=256):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(low, high, (n, 3, height, width), dtype=np.uint8))


def some_boxes(n, height, width, crop):
    u = BatchRandom([0, n], n).uniform(columns=(22,))
    return crop.boxes(u.numpy(), height, width)


def each(function, x, *parameters):
    """function(image (1, 3, H, W), its parameters) of every image, as one batch."""
    return torch.cat([function(image[None], *own) for image, *own in zip(x, *parameters)])


# -------- Each operation, image by image ----------------------------------------------------------


@EVERY_DEVICE
@pytest.mark.parametrize(
    "height, width, size", [(32, 32, 32), (28, 28, 32), (40, 25, 17), (96, 64, 24), (24, 33, 64)]
)
def test_resized_crop(device, height, width, size):
    images = noise_bytes(40, height, width)  # noise is the hardest case for a resampling filter
    # some are enlarged, some reduced
    boxes = some_boxes(40, height, width, Crop(size, scale=(0.01, 1.0)))
    boxes[0] = (0, 0, height, width)
    boxes[1] = (height - 1, width - 1, 1, 1)
    ours = resized_crop(images.to(device), boxes, size)

    # In float64, torchvision's filter is PIL's without PIL's rounding to bytes after each axis.
    def crop(x, box):
        return TF.resized_crop(x, *box, [size, size], BICUBIC, antialias=True)

    theirs = each(crop, images.double() / 255, boxes.tolist()).clamp(0, 1)
    torch.testing.assert_close(ours.cpu().double(), theirs, **ROUNDING)


def test_resized_crop_to_its_own_size_is_exact():
    images = noise_bytes(2, 20, 30)
    box = [3, 5, 12, 12]  # every weight is exactly 0 or 1
    ours = resized_crop(images, np.array([box, box]), 12)
    assert torch.equal(ours, images[:, :, 3:15, 5:17] * (1 / 255))


@pytest.mark.parametrize("size", [24, 64])
def test_resized_crop_is_that_of_pil_up_to_its_rounding(size):
    # PIL rounds to bytes after each axis. The error of the first, half a level, grows on the second
    # axis by at most the sum of the absolute weights, 1.25 for this filter: in all 0.5 * 1.25 + 0.5
    # levels. The grey levels are such that no overshoot is clipped, which PIL would do twice.
    images = noise_bytes(30, 32, 32, 64, 192)
    boxes = some_boxes(30, 32, 32, Crop(size))
    ours = 255 * resized_crop(images, boxes, size)
    pil = []
    for x, box in zip(images, boxes.tolist()):
        picture = TF.resized_crop(TF.to_pil_image(x), *box, [size, size], BICUBIC)
        pil.append(TF.pil_to_tensor(picture))
    error = ours - torch.stack(pil)
    assert error.abs().max() <= 1.125 + 0.01  # 0.01: fixed point
    assert error.mean().abs() < 0.01  # no half-pixel shift, no bias


@EVERY_DEVICE
def test_flip(device):
    x = smooth_images(64, 32)
    rand = Recorder(1, 64)
    ours = random_flip(x.to(device), rand, p=0.3)
    theirs = each(lambda x, u: TF.hflip(x) if u < 0.3 else x, x, rand.drawn())
    assert torch.equal(ours.cpu(), theirs)


@EVERY_DEVICE
@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_color_jitter_each_operation_alone(device, operation):
    x = smooth_images(64, 32)
    rand = Recorder(2, 64)
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    ours = color_jitter(x.to(device), rand, **strengths | {operation: 0.45})
    low, high = (-0.45, 0.45) if operation == "hue" else (0.55, 1.45)
    theirs = each(getattr(TF, f"adjust_{operation}"), x, rand.drawn(low, high).tolist())
    torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)


@EVERY_DEVICE
def test_color_jitter_in_random_order(device):
    x = smooth_images(256, 16)
    rand = Recorder(3, 256)
    before = x.clone()
    strengths = {"brightness": 0.8, "contrast": 0.7, "saturation": 0.6, "hue": 0.2}
    ours = color_jitter(x.to(device), rand, **strengths, p=0.8)
    assert torch.equal(x, before)  # the images that it was given are left alone

    # all 24 orders: 256 draws miss one with odds 1:2000
    order = rand.drawn(columns=(4,)).argsort(1).tolist()
    assert {tuple(o) for o in order} == set(permutations(range(4)))
    ranges = [(0.2, 1.8), (0.3, 1.7), (0.4, 1.6), (-0.2, 0.2)]
    factors = torch.stack([rand.drawn(*ends) for ends in ranges], 1).tolist()
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]

    def jitter(x, u, order, factor):
        for operation in order if u < 0.8 else []:
            x = adjust[operation](x, factor[operation])
        return x

    theirs = each(jitter, x, rand.drawn(), order, factors)
    torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)
    off = rand.drawn() >= 0.8
    assert torch.equal(ours.cpu()[off], x[off])  # exactly: not even a rounding

    sorted_order = each(jitter, x, rand.drawn(), [range(4)] * 256, factors)
    assert (sorted_order - theirs).abs().max() > 0.1  # so the order matters in this test


def test_color_jitter_never_darkens_by_a_negative_factor():
    rand = Recorder(4, 100)
    color_jitter(smooth_images(100, 8), rand, brightness=1.6, contrast=0.1, saturation=0.2, hue=0.0)
    assert rand.drawn(0.0, 2.6).min() >= 0  # max(0, 1 - 1.6), as torchvision


@EVERY_DEVICE
def test_grayscale(device):
    x = smooth_images(64, 32)
    rand = Recorder(5, 64)
    ours = random_grayscale(x.to(device), rand, p=0.4)
    theirs = each(lambda x, u: TF.rgb_to_grayscale(x, 3) if u < 0.4 else x, x, rand.drawn())
    torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)


@EVERY_DEVICE
@pytest.mark.parametrize("size, taps", [(32, 3), (48, 5), (96, 9), (224, 23)])
def test_gaussian_blur(device, size, taps):
    n = 8 if size > 100 else 32
    x = smooth_images(n, size)
    rand = Recorder(6, n)
    ours = gaussian_blur(x.to(device), rand, p=0.7, sigma=(0.1, 2.5))

    def blur(x, u, sigma):
        return TF.gaussian_blur(x, [taps, taps], [sigma, sigma]) if u < 0.7 else x

    theirs = each(blur, x, rand.drawn(), rand.drawn(0.1, 2.5).tolist())
    torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)
    assert (theirs - x).abs().amax((1, 2, 3)).gt(0.05).any()


@EVERY_DEVICE
def test_solarize(device):
    x = smooth_images(64, 32)
    rand = Recorder(7, 64)
    x[5, 0, 0, 0] = 128 / 255  # the threshold itself is inverted
    ours = solarize(x.to(device), rand, p=0.6)
    theirs = each(lambda x, u: TF.solarize(x, 128 / 255) if u < 0.6 else x, x, rand.drawn())
    assert torch.equal(ours.cpu(), theirs)


@EVERY_DEVICE
def test_normalize_and_back(device):
    x = smooth_images(8, 32)
    ours = normalize(x.to(device))
    theirs = TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)
    torch.testing.assert_close(denormalize(ours).cpu(), x, **ROUNDING)
    # what no image can be is cut off: pictures need [0, 1]
    beyond = denormalize(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    assert beyond[0].eq(0).all() and beyond[1].eq(1).all()


# -------- The parameters --------------------------------------------------------------------------


def recipe(x, rand):
    """Every operation with parameters of its own."""
    x = random_flip(x, rand)
    x = color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
    x = random_grayscale(x, rand, p=0.2)
    x = gaussian_blur(x, rand, p=0.5)
    return normalize(solarize(x, rand, p=0.2))


def test_streams_are_distinct():
    assert len({CROP, AUGMENT, ORDER, METHOD}) == 4


@pytest.mark.parametrize("low, high, columns", [(0.0, 1.0, ()), (-0.2, 0.2, ()), (0.6, 1.4, (4,))])
def test_every_image_has_its_own_numbers_whoever_draws_them(low, high, columns):
    whole = BatchRandom([0, 1, 2], 600).uniform(low, high, columns)
    assert whole.shape == (600, *columns) and whole.dtype == torch.float32
    assert low <= whole.min() and whole.max() <= high
    assert len(whole.unique()) > 0.99 * whole.numel()
    for parts in (2, 3):  # of which the processes keep their rows
        drawn = []
        for r in range(parts):
            rows = slice(r * 600 // parts, (r + 1) * 600 // parts)
            drawn.append(BatchRandom([0, 1, 2], 600, rows).uniform(low, high, columns))
        assert torch.equal(whole, torch.cat(drawn))
    # 0.2 is five standard deviations of the correlation of 600 independent pairs
    first = whole.view(600, -1)[:, 0]
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.2


JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}
RANDOM = {  # operations, and options with which they change nearly every image that they hit
    "flip": (random_flip, {"p": 0.3}),
    "grey": (random_grayscale, {"p": 0.2}),
    "solarize": (solarize, {"p": 0.4}),
    "jitter": (color_jitter, JITTER),
    "blur": (gaussian_blur, {"p": 0.5, "sigma": (1.0, 2.0)}),
}


def test_probabilities_and_an_image_does_not_see_the_others():
    x = smooth_images(1000, 20)
    for name, (operation, options) in RANDOM.items():
        changed = operation(x, BatchRandom(8, 1000), **options) != x
        hit = changed.flatten(1).any(1)[4:]  # the first four are of one colour
        p = options["p"]  # within four standard deviations of a binomial draw
        assert abs(hit.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / 996), name
    others = x.clone()
    others[1::2] = smooth_images(500, 20, seed=1)
    alone = recipe(x, BatchRandom(9, 1000))
    assert torch.equal(alone[::2], recipe(others, BatchRandom(9, 1000))[::2])


USUAL = (3 / 4, 4 / 3)
SHAPES = [  # height, width, scale, ratio
    (32, 32, (0.08, 1.0), USUAL),
    (24, 75, (0.2, 1.0), USUAL),
    (90, 30, (0.5, 1.0), USUAL),
    (40, 44, (0.9, 1.0), (0.5, 2.0)),
    (10, 90, (0.9, 1.0), USUAL),
    (90, 10, (0.9, 1.0), USUAL),
    (31, 47, (1.0, 1.0), (1.0, 1.2)),
]


@pytest.mark.parametrize("height, width, scale, ratio", SHAPES)
def test_crop_boxes_follow_torchvisions_rule(monkeypatch, height, width, scale, ratio):
    """torchvision's own function, fed with our uniform numbers in place of its own, gives our
    boxes."""
    image = torch.empty(3, height, width)
    u = np.random.default_rng(0).random((300, 22), dtype=np.float32)
    for numbers, box in zip(u, Crop(32, scale, ratio).boxes(u, height, width).tolist()):
        # area and ratio of the first try, of the second ..., then the place
        tries = iter(numbers[:20].reshape(2, 10).T.ravel())
        ends = iter(numbers[20:])

        def uniform(a, b, tries=tries):
            return torch.as_tensor(a + (b - a) * next(tries))

        def randint(low, high, size, ends=ends):
            return torch.tensor(int(low + (high - low) * next(ends)))

        fed = SimpleNamespace(
            log=torch.log,
            exp=torch.exp,
            tensor=torch.tensor,
            empty=lambda n, uniform=uniform: SimpleNamespace(uniform_=uniform),
            randint=randint,
        )
        monkeypatch.setattr(transforms, "torch", fed)
        assert box == list(RandomResizedCrop.get_params(image, scale, ratio))


@pytest.mark.parametrize(
    "height, width, box",
    [(10, 90, [0, 38, 10, 13]), (90, 10, [38, 0, 13, 10]), (30, 33, [0, 0, 30, 33])],
)
def test_crop_that_never_fits_is_the_largest_one_in_the_middle(height, width, box):
    # An area of 90 % is never within ratios of 3/4 to 4/3 in a strip: 10 x round(10 * 4/3) is the
    # widest that is. Four times the area never fits at all: the whole image, whose own ratio is
    # allowed.
    scale = (4.0, 4.0) if height == 30 else (0.9, 1.0)
    u = np.random.default_rng(0).random((50, 22), dtype=np.float32)
    assert Crop(32, scale).boxes(u, height, width).tolist() == [box] * 50


def test_crop_boxes_are_distributed_as_torchvisions():
    n, height, width = 4000, 64, 80
    image = torch.empty(3, height, width)
    theirs = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(n):
            theirs.append(RandomResizedCrop.get_params(image, (0.08, 1.0), USUAL))

    def statistics(boxes):
        top, left, h, w = np.array(boxes).T.astype(float)
        centre = top + left + (h + w) / 2
        return {"area": h * w, "ratio": w / h, "top": top, "left": left, "centre": centre}

    u = BatchRandom(10, n).uniform(columns=(22,)).numpy()
    ours = statistics(Crop(32).boxes(u, height, width))
    theirs = statistics(theirs)
    for name in ours:  # Kolmogorov-Smirnov: a correct sampler fails once in 10,000 seeds
        assert ks_2samp(ours[name], theirs[name]).pvalue > 1e-4, name


@pytest.mark.parametrize("height, width, box", [(20, 20, [0, 0, 20, 20]), (20, 33, [0, 6, 20, 20])])
def test_whole_image(height, width, box):
    crop, augment = whole_image(12, normalize)
    u = np.random.default_rng(0).random((50, 22), dtype=np.float32)
    assert crop.size == 12 and augment is normalize
    assert crop.boxes(u, height, width).tolist() == [box] * 50


# -------- The loader ------------------------------------------------------------------------------


def stamped(count, size=4):
    """Images of one colour each, that names its index; index_of(view) reads it from a view of plain
    crops."""
    index = torch.arange(count)
    colour = torch.stack([index % 256, index // 256, torch.zeros(count)], 1).to(torch.uint8)
    images = colour[:, :, None, None].expand(-1, -1, size, size).contiguous()
    return Split(InMemory(images), 7 * index % 11)


def index_of(view):
    colour = (255 * view[:, :, 0, 0]).round().int()
    return (colour[:, 0] + 256 * colour[:, 1]).tolist()


def plain(x, rand):
    return x


def two_views(size):
    return [(Crop(size), recipe), (Crop(size, scale=(0.3, 0.9)), recipe)]


def png_folder(folder, images):
    """Writes images (n, 3, h, w) uint8 as PNG files; returns a split of them, in order."""
    paths = [folder / f"{i:04d}.png" for i in range(len(images))]
    for path, x in zip(paths, images):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)
    return Split(Files(paths))


def assert_same(found, expected):
    """Lists of (step, [view, ...]) with equal numbers, bit for bit."""
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, views), (_, others) in zip(found, expected):
        assert len(views) == len(others)
        assert all(torch.equal(a, b) for a, b in zip(views, others))


def test_each_image_once_an_epoch_and_the_same_image_in_both_views():
    split = stamped(1000)
    loader = Loader(split, [(Crop(2), plain)] * 2, 48, 0, CPU)
    assert loader.steps == 20 and loader.count == 1000 and loader.index is None
    epochs = []
    for epoch in range(3):
        seen = []
        for number, (step, (x1, x2)) in enumerate(loader(epoch)):
            assert step == 20 * epoch + number and x1.shape == x2.shape == (48, 3, 2, 2)
            assert index_of(x1) == index_of(x2)
            # loader.index says which images these are, and so which labels they have
            assert loader.index.tolist() == index_of(x1)
            assert split.labels[loader.index].tolist() == [7 * i % 11 for i in index_of(x1)]
            seen += index_of(x1)
        # an incomplete 21st batch is dropped
        assert len(seen) == len(set(seen)) == 960 and max(seen) < 1000
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    assert set(epochs[0]) != set(epochs[1])  # not always the same images are dropped


def test_the_first_batch_that_was_shown_is_kept_for_the_picture():
    loader = Loader(stamped(40), [(Crop(2), plain)] * 2, 20, 0, CPU)
    shown = [views for _, views in loader(0)]
    index, views = loader.first_shown
    assert index.tolist() == index_of(shown[0][0])[:8]
    assert all(torch.equal(view, part[:8]) for view, part in zip(views, shown[0]))


def one_process(splits, batch, epoch, seed):
    """Per split: the step, the views and the indices of this process."""
    found = []
    for split in splits:
        loader = Loader(split, two_views(16), batch, seed, CPU)
        found.append([(step, [*views, loader.index]) for step, views in loader(epoch)])
    return found


def test_views_do_not_depend_on_the_number_of_processes(processes, tmp_path):
    images = noise_bytes(40, 20, 24)
    splits = [Split(InMemory(images)), png_folder(tmp_path, images)]
    expected = one_process(splits, 18, 1, 5)
    for world in (1, 2, 3):
        ranks = processes(world, one_process, splits, 18, 1, 5)
        for kind in (0, 1):  # in memory, files
            joined = []
            for parts in zip(*[found[kind] for found in ranks]):  # a step of all processes
                views = [views for _, views in parts]
                assert all(len(view) == 18 // world for part in views for view in part)
                joined.append((parts[0][0], [torch.cat(view) for view in zip(*views)]))
            assert_same(joined, expected[kind])


@pytest.mark.parametrize("kind, workers", [("memory", 0), ("files", 0), ("files", 2)])
def test_views_do_not_depend_on_workers_or_on_being_resumed(tmp_path, kind, workers):
    images = noise_bytes(32, 20, 24)
    split = Split(InMemory(images)) if kind == "memory" else png_folder(tmp_path, images)
    fresh = Loader(split, two_views(8), 4, 0, CPU, 0)
    epochs = [list(fresh(epoch)) for epoch in range(3)]
    loader = Loader(split._replace(), two_views(8), 4, 0, CPU, workers)
    if kind == "files":
        loader.reader = Files(split.images.paths)
    assert_same(list(loader(0)), epochs[0])
    for step, _ in loader(1):
        if step == 10:
            break  # in the middle of an epoch; workers are ahead of it ...
    assert_same(list(loader(1, done=11)), epochs[1][3:])  # ... and must go back
    assert_same(list(loader(2, done=11)), epochs[2])


def test_two_loaders_of_the_same_files_do_not_disturb_each_other(tmp_path):
    """As first_batch and a training do, which share a split."""
    split = png_folder(tmp_path, noise_bytes(8, 20, 24))
    one = Loader(split, two_views(8), 4, 0, CPU)
    expected = list(one(0))
    other = Loader(split, [(Crop(6), plain)], 2, 1, CPU)
    steps = one(0)
    first = next(steps)
    assert next(other(0))[1][0].shape == (2, 3, 6, 6)
    assert_same([first, *steps], expected)
    assert_same(list(one(0)), expected)


def test_views_of_a_set_in_memory_and_of_files_are_the_same(tmp_path):
    """The order, the boxes and all parameters are equal. The pixels of the crops differ by PIL's
    rounding to bytes (see test_resized_crop_is_that_of_pil_up_to_its_rounding); where nothing is
    resized, only by that of a division by 255."""
    images = noise_bytes(24, 32, 32, 64, 192)
    memory = Split(InMemory(images))
    files = png_folder(tmp_path, images)
    for crop, levels in ((Crop(24), 1.135), (Crop(32, scale=(1, 1), ratio=(1, 1)), 1e-4)):
        views = [(crop, random_flip)] * 2
        first = list(Loader(memory, views, 8, 3, CPU)(1))
        second = list(Loader(files, views, 8, 3, CPU)(1))
        assert [step for step, _ in first] == [step for step, _ in second]
        for (_, shown), (_, others) in zip(first, second):
            assert all(255 * (a - b).abs().max() <= levels for a, b in zip(shown, others))


def test_epochs_steps_views_and_seeds_differ():
    # one image eight times: only the draws can differ
    same = Split(InMemory(noise_bytes(1, 16, 16).expand(8, -1, -1, -1).contiguous()))

    def jitter(x, rand):
        return color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)

    def views(seed, epoch):
        loader = Loader(same, [(Crop(8), jitter)] * 2, 4, seed, CPU)
        return torch.cat([view for _, views in loader(epoch) for view in views])

    found = torch.cat([views(seed, epoch) for seed in (0, 1) for epoch in (0, 1)])
    assert len(found) == 64 and len(found.flatten(1).unique(dim=0)) == 64
    assert torch.equal(views(1, 1), views(1, 1))


def test_global_random_states_are_neither_used_nor_changed():
    split = Split(InMemory(noise_bytes(8, 16, 16)))

    def views():
        return list(Loader(split, two_views(8), 4, 0, CPU)(0))

    torch.manual_seed(1)
    first = views()
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    second = views()
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    assert_same(second, first)
    assert_same(views(), first)


@EVERY_DEVICE
def test_loader_on_any_device(device):
    images = noise_bytes(8, 16, 16)
    there = Loader(Split(InMemory(images.to(device))), two_views(8), 8, 0, torch.device(device))
    here = Loader(Split(InMemory(images)), two_views(8), 8, 0, CPU)
    [(_, views)] = there(0)
    [(_, expected)] = here(0)
    assert there.index.device.type == device and torch.equal(there.index.cpu(), here.index)
    for view, other in zip(views, expected):
        assert view.device.type == device and view.dtype == torch.float32
        # ROUNDING / 0.225 by normalize
        torch.testing.assert_close(view.cpu(), other, rtol=0, atol=5e-5)


@pytest.mark.parametrize("batch", [0, -4, 9])
def test_impossible_batch_is_refused_with_one_sentence(batch, capsys):
    with pytest.raises(SystemExit, match="1"):
        Loader(stamped(8), two_views(8), batch, 0, CPU)
    words = f"error: --batch {batch}: choose 2 to 8, the number of images\n"
    assert capsys.readouterr().err == words


def refused_batch(batch):
    with pytest.raises(SystemExit):
        Loader(stamped(8), two_views(8), batch, 0, CPU)
    return common.world()


def test_batch_that_the_processes_cannot_share_is_refused(processes):
    assert processes(2, refused_batch, 7) == [2, 2]


# -------- Views of one batch ----------------------------------------------------------------------


def test_make_views_are_those_of_the_images_in_their_order():
    images = stamped(300).images.pixels
    first, second = make_views(images, [(Crop(2), plain), (Crop(3), random_flip)])
    assert first.shape == (300, 3, 2, 2) and second.shape == (300, 3, 3, 3)
    assert index_of(first) == index_of(second) == list(range(300))


def test_make_views_draw_as_the_loader_does():
    """The same augmentations, with numbers that a BatchRandom of the same key draws."""
    images = noise_bytes(20, 16, 16)
    shown = make_views(images, two_views(8), seed=[3, 1, 4])
    for view, (x, (crop, augment)) in enumerate(zip(shown, two_views(8))):
        u = BatchRandom([3, 1, 4, view, CROP], 20).uniform(columns=(22,)).numpy()
        expected = resized_crop(images, crop.boxes(u, 16, 16), 8)
        expected = augment(expected, BatchRandom([3, 1, 4, view, AUGMENT], 20))
        assert torch.equal(x, expected)
    # the key of a loader is seed, epoch and step: with it come the very views of a training step
    loader = Loader(Split(InMemory(images)), two_views(8), 20, 3, CPU)
    [(_, views)] = loader(0)
    assert_same([(0, make_views(images[loader.index], two_views(8), seed=[3, 0, 0]))], [(0, views)])


def test_make_views_are_deterministic_and_differ_by_seed_and_view():
    images = noise_bytes(1, 16, 16).expand(6, -1, -1, -1)
    views = [(Crop(8), recipe)] * 2
    torch.manual_seed(0)
    once = make_views(images, views)
    torch.manual_seed(1)
    again = make_views(images, views, seed=0)
    assert_same([(0, once)], [(0, again)])
    found = torch.cat(
        [*once, *make_views(images, views, seed=1), *make_views(images, views, [0, 1])]
    )
    assert len(found.flatten(1).unique(dim=0)) == 36  # every view of every image


def test_first_batch():
    shown = first_batch(stamped(30), [(Crop(2), plain)] * 2, 8, 0, CPU)
    assert [view.shape for view in shown] == [(8, 3, 2, 2)] * 2
    assert index_of(shown[0]) == index_of(shown[1]) and len(set(index_of(shown[0]))) == 8
    again = first_batch(stamped(30), [(Crop(2), plain)] * 2, 8, 0, CPU)
    assert index_of(again[0]) == index_of(shown[0])
    other = first_batch(stamped(30), [(Crop(2), plain)] * 2, 8, 1, CPU)
    assert index_of(other[0]) != index_of(shown[0])
    few = first_batch(stamped(5), [(Crop(2), plain)], 8, 0, CPU)
    assert sorted(index_of(few[0])) == list(range(5))


def first_of_two(count):
    return index_of(first_batch(stamped(count), [(Crop(2), plain)], 8, 0, CPU)[0])


def test_first_batch_is_shared_by_the_processes(processes):
    one, two = processes(2, first_of_two, 30)
    assert one + two == first_of_two(30) and len(one) == len(two) == 4
    one, two = processes(2, first_of_two, 5)  # a multiple of the number of processes
    assert len(one) == len(two) == 2
