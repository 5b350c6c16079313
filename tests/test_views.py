"""The views: each operation equals torchvision's on each image with that image's parameters, the crops are distributed as
torchvision's, and what a loader yields depends on seed, epoch, step and position alone."""

import math
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop, transforms
from torchvision.transforms import functional as TF

import common
from common import BatchRandom, Crop, Loader, Split, color_jitter, gaussian_blur, normalize, random_flip, random_grayscale

CPU, BICUBIC = torch.device("cpu"), TF.InterpolationMode.BICUBIC
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
# The operations are float32 sums and products of at most a few dozen numbers of size 1, so that they may differ from
# torchvision's by a few dozen roundings of 6e-8. 1e-5 allows for that, and is 400 times less than one of 255 grey levels.
ROUNDING = {"rtol": 0, "atol": 1e-5}


class Recorder(BatchRandom):
    """BatchRandom that keeps what it drew: drawn(low, high, columns) is the one draw with these arguments."""

    def __init__(self, key, batch):
        super().__init__(key, batch)
        self.draws = []

    def uniform(self, low=0.0, high=1.0, columns=()):
        self.draws.append(((low, high, columns), super().uniform(low, high, columns)))
        return self.draws[-1][1]

    def drawn(self, low=0.0, high=1.0, columns=()):
        [values] = [v for (a, b, c), v in self.draws if (a, b, c) == (pytest.approx(low), pytest.approx(high), columns)]
        return values


def smooth_images(n, size, seed=0):
    """(n, 3, size, size) float in [0, 1]: smooth colours with a little noise; the first four grey, grey, black and white."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 5, 5, generator=generator), (size, size), mode="bicubic")
    x = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    x[:2] = x[:2, :1]
    x[2], x[3] = 0, 1
    return x


def noise_bytes(n, height, width, low=0, high=256):
    return torch.from_numpy(np.random.default_rng(0).integers(low, high, (n, 3, height, width), dtype=np.uint8))


def some_boxes(n, height, width, crop):
    return crop.boxes(BatchRandom([0, n], n).uniform(columns=(22,)).numpy(), height, width)


def each(function, x, *parameters):
    """function(image (1, 3, H, W), its parameters) of every image, as one batch."""
    return torch.cat([function(image[None], *own) for image, *own in zip(x, *parameters)])


# -------- Each operation, image by image ----------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("height, width, size", [(32, 32, 32), (28, 28, 32), (40, 25, 17), (96, 64, 24), (24, 33, 64)])
def test_resized_crop(device, height, width, size):
    images = noise_bytes(40, height, width)  # noise is the hardest case for a resampling filter
    boxes = some_boxes(40, height, width, Crop(size, scale=(0.01, 1.0)))  # some are enlarged, some reduced
    boxes[0], boxes[1] = (0, 0, height, width), (height - 1, width - 1, 1, 1)
    ours = common.resized_crop(images.to(device), boxes, size)
    # In float64, torchvision's filter is PIL's without PIL's rounding to bytes after each axis.
    theirs = each(lambda x, box: TF.resized_crop(x, *box, [size, size], BICUBIC, antialias=True),
                  images.double() / 255, boxes.tolist()).clamp(0, 1)
    torch.testing.assert_close(ours.cpu().double(), theirs, **ROUNDING)


def test_resized_crop_to_its_own_size_is_exact():
    images, box = noise_bytes(2, 20, 30), [3, 5, 12, 12]  # every weight is exactly 0 or 1
    assert torch.equal(common.resized_crop(images, np.array([box, box]), 12), images[:, :, 3:15, 5:17] * (1 / 255))


@pytest.mark.parametrize("size", [24, 64])
def test_resized_crop_is_that_of_pil_up_to_its_rounding(size):
    # PIL rounds to bytes after each axis. The error of the first, half a level, grows on the second axis by at most the sum
    # of the absolute weights, 1.25 for this filter: 0.5 * 1.25 + 0.5 levels. The grey levels are such that no overshoot is
    # clipped, which PIL would do twice.
    images = noise_bytes(30, 32, 32, 64, 192)
    boxes = some_boxes(30, 32, 32, Crop(size))
    ours = 255 * common.resized_crop(images, boxes, size)
    pil = torch.cat([TF.pil_to_tensor(TF.resized_crop(TF.to_pil_image(x), *box, [size, size], BICUBIC))[None]
                     for x, box in zip(images, boxes.tolist())])
    assert (ours - pil).abs().max() <= 1.125 + 0.01  # 0.01: fixed point
    assert (ours - pil).mean().abs() < 0.01  # no half-pixel shift, no bias


@pytest.mark.parametrize("device", DEVICES)
def test_flip(device):
    x, rand = smooth_images(64, 32), Recorder(1, 64)
    ours = random_flip(x.to(device), rand, p=0.3)
    assert torch.equal(ours.cpu(), each(lambda x, u: TF.hflip(x) if u < 0.3 else x, x, rand.drawn()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_color_jitter_each_operation_alone(device, operation):
    x, rand = smooth_images(64, 32), Recorder(2, 64)
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | {operation: 0.45}
    ours = color_jitter(x.to(device), rand, **strengths)
    low, high = (-0.45, 0.45) if operation == "hue" else (0.55, 1.45)
    theirs = each(getattr(TF, f"adjust_{operation}"), x, rand.drawn(low, high).tolist())
    torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)


@pytest.mark.parametrize("device", DEVICES)
def test_color_jitter_in_random_order(device):
    x, rand = smooth_images(256, 16), Recorder(3, 256)
    before = x.clone()
    ours = color_jitter(x.to(device), rand, brightness=0.8, contrast=0.7, saturation=0.6, hue=0.2, p=0.8)
    assert torch.equal(x, before)  # the images that it was given are left alone

    order = rand.drawn(columns=(4,)).argsort(1).tolist()
    assert {tuple(o) for o in order} == set(permutations(range(4)))  # all 24 orders: 256 draws miss one with odds 1:2000
    factors = [rand.drawn(0.2, 1.8), rand.drawn(0.3, 1.7), rand.drawn(0.4, 1.6), rand.drawn(-0.2, 0.2)]
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]

    def jitter(x, u, order, factor):
        for operation in order if u < 0.8 else []:
            x = adjust[operation](x, factor[operation])
        return x
    theirs = each(jitter, x, rand.drawn(), order, torch.stack(factors, 1).tolist())
    torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)
    off = rand.drawn() >= 0.8
    assert torch.equal(ours.cpu()[off], x[off])  # exactly: not even a rounding

    sorted_order = each(jitter, x, rand.drawn(), [range(4)] * 256, torch.stack(factors, 1).tolist())
    assert (sorted_order - theirs).abs().max() > 0.1  # so the order matters in this test


def test_color_jitter_never_darkens_by_a_negative_factor():
    rand = Recorder(4, 100)
    color_jitter(smooth_images(100, 8), rand, brightness=1.6, contrast=0.1, saturation=0.2, hue=0.0)
    assert rand.drawn(0.0, 2.6).min() >= 0  # max(0, 1 - 1.6), as torchvision


@pytest.mark.parametrize("device", DEVICES)
def test_grayscale(device):
    x, rand = smooth_images(64, 32), Recorder(5, 64)
    ours = random_grayscale(x.to(device), rand, p=0.4)
    theirs = each(lambda x, u: TF.rgb_to_grayscale(x, 3) if u < 0.4 else x, x, rand.drawn())
    torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size, taps", [(32, 3), (48, 5), (96, 9), (224, 23)])
def test_gaussian_blur(device, size, taps):
    n = 8 if size > 100 else 32
    x, rand = smooth_images(n, size), Recorder(6, n)
    ours = gaussian_blur(x.to(device), rand, p=0.7, sigma=(0.1, 2.5))
    theirs = each(lambda x, u, sigma: TF.gaussian_blur(x, [taps, taps], [sigma, sigma]) if u < 0.7 else x,
                  x, rand.drawn(), rand.drawn(0.1, 2.5).tolist())
    torch.testing.assert_close(ours.cpu(), theirs, **ROUNDING)
    assert (theirs - x).abs().amax((1, 2, 3)).gt(0.05).any()


@pytest.mark.parametrize("device", DEVICES)
def test_solarize(device):
    x, rand = smooth_images(64, 32), Recorder(7, 64)
    x[5, 0, 0, 0] = 128 / 255  # the threshold itself is inverted
    ours = common.solarize(x.to(device), rand, p=0.6)
    assert torch.equal(ours.cpu(), each(lambda x, u: TF.solarize(x, 128 / 255) if u < 0.6 else x, x, rand.drawn()))


@pytest.mark.parametrize("device", DEVICES)
def test_normalize(device):
    x = smooth_images(8, 32)
    theirs = TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalize(x.to(device)).cpu(), theirs, **ROUNDING)


# -------- The parameters --------------------------------------------------------------------------------------------------

def recipe(x, rand):
    """Every operation with parameters of its own."""
    x = color_jitter(random_flip(x, rand), rand, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
    return normalize(common.solarize(gaussian_blur(random_grayscale(x, rand, p=0.2), rand, p=0.5), rand, p=0.2))


@pytest.mark.parametrize("low, high, columns", [(0.0, 1.0, ()), (-0.2, 0.2, ()), (0.6, 1.4, (4,))])
def test_every_image_has_its_own_numbers_whoever_draws_them(low, high, columns):
    whole = BatchRandom([0, 1, 2], 600).uniform(low, high, columns)
    assert whole.shape == (600, *columns) and whole.dtype == torch.float32
    assert low <= whole.min() and whole.max() <= high and len(whole.unique()) > 0.99 * whole.numel()
    for parts in (2, 3):  # of which the processes keep their rows
        rows = [slice(r * 600 // parts, (r + 1) * 600 // parts) for r in range(parts)]
        assert torch.equal(whole, torch.cat([BatchRandom([0, 1, 2], 600, r).uniform(low, high, columns) for r in rows]))
    # 0.2 is five standard deviations of the correlation of 600 independent pairs
    assert abs(np.corrcoef(whole.view(600, -1)[:-1, 0], whole.view(600, -1)[1:, 0])[0, 1]) < 0.2


def test_probabilities_and_an_image_does_not_see_the_others():
    x = smooth_images(1000, 20)
    changed = {"flip": (random_flip, {"p": 0.3}), "grey": (random_grayscale, {"p": 0.2}),
               "solarize": (common.solarize, {"p": 0.4}),
               "jitter": (color_jitter, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}),
               "blur": (gaussian_blur, {"p": 0.5, "sigma": (1.0, 2.0)})}
    for name, (operation, options) in changed.items():
        hit = (operation(x, BatchRandom(8, 1000), **options) != x).flatten(1).any(1)[4:]  # the first four are of one colour
        p = options["p"]  # within four standard deviations of a binomial draw
        assert abs(hit.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / 996), name
    others = x.clone()
    others[1::2] = smooth_images(500, 20, seed=1)
    assert torch.equal(recipe(x, BatchRandom(9, 1000))[::2], recipe(others, BatchRandom(9, 1000))[::2])


@pytest.mark.parametrize("height, width, scale, ratio", [
    (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)), (24, 75, (0.2, 1.0), (3 / 4, 4 / 3)), (90, 30, (0.5, 1.0), (3 / 4, 4 / 3)),
    (40, 44, (0.9, 1.0), (0.5, 2.0)), (10, 90, (0.9, 1.0), (3 / 4, 4 / 3)), (90, 10, (0.9, 1.0), (3 / 4, 4 / 3)),
    (31, 47, (1.0, 1.0), (1.0, 1.2))])
def test_crop_boxes_follow_torchvisions_rule(monkeypatch, height, width, scale, ratio):
    """torchvision's own function, fed with our uniform numbers in place of its own, gives our boxes."""
    u = np.random.default_rng(0).random((300, 22), dtype=np.float32)
    for numbers, box in zip(u, Crop(32, scale, ratio).boxes(u, height, width).tolist()):
        tries = iter(numbers[:20].reshape(2, 10).T.ravel())  # area, ratio of the first try, of the second ...
        ends = iter(numbers[20:])
        uniform = SimpleNamespace(uniform_=lambda a, b: torch.as_tensor(a + (b - a) * next(tries)))
        monkeypatch.setattr(transforms, "torch", SimpleNamespace(
            log=torch.log, exp=torch.exp, tensor=torch.tensor, empty=lambda n: uniform,
            randint=lambda low, high, size: torch.tensor(int(low + (high - low) * next(ends)))))
        assert box == list(RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio))


@pytest.mark.parametrize("height, width, box", [
    (10, 90, [0, 38, 10, 13]), (90, 10, [38, 0, 13, 10]), (30, 33, [0, 0, 30, 33])])
def test_crop_that_never_fits_is_the_largest_one_in_the_middle(height, width, box):
    # an area of 90 % is never within ratios of 3/4 to 4/3 in a strip: 10 x round(10 * 4/3) is the widest that is.
    # Four times the area never fits at all: the whole image, whose own ratio is allowed.
    scale = (4.0, 4.0) if height == 30 else (0.9, 1.0)
    u = np.random.default_rng(0).random((50, 22), dtype=np.float32)
    assert Crop(32, scale).boxes(u, height, width).tolist() == [box] * 50


def test_crop_boxes_are_distributed_as_torchvisions():
    n, height, width = 4000, 64, 80
    ours = Crop(32).boxes(BatchRandom(10, n).uniform(columns=(22,)).numpy(), height, width)
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])

    def statistics(boxes):
        top, left, h, w = boxes.T.astype(float)
        return {"area": h * w, "ratio": w / h, "top": top, "left": left, "centre": top + left + (h + w) / 2}
    ours, theirs = statistics(ours), statistics(theirs)
    for name in ours:  # Kolmogorov-Smirnov: a correct sampler fails at this level once in 10,000 seeds
        assert ks_2samp(ours[name], theirs[name]).pvalue > 1e-4, name


# -------- The loader ------------------------------------------------------------------------------------------------------

def stamped(count, size=4):
    """Images of one colour each, that names its index; index_of(view) reads it from a view of plain crops."""
    index = torch.arange(count)
    colour = torch.stack([index % 256, index // 256, torch.zeros(count)], 1).to(torch.uint8)
    return Split(colour[:, :, None, None].expand(-1, -1, size, size).contiguous())


def index_of(view):
    colour = (255 * view[:, :, 0, 0]).round().int()
    return (colour[:, 0] + 256 * colour[:, 1]).tolist()


def plain(x, rand):
    return x


def two_views(size):
    return [(Crop(size), recipe), (Crop(size, scale=(0.3, 0.9)), recipe)]


def png_folder(folder, images):
    """Writes images (n, 3, h, w) uint8 as PNG files; returns their paths, in order."""
    paths = [folder / f"{i:04d}.png" for i in range(len(images))]
    for path, x in zip(paths, images):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)
    return paths


def assert_same(found, expected):
    """Lists of (step, [view, ...]) with equal numbers, bit for bit."""
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, views), (_, others) in zip(found, expected):
        assert len(views) == len(others) and all(torch.equal(a, b) for a, b in zip(views, others))


def test_each_image_once_an_epoch_and_the_same_image_in_both_views():
    loader = Loader(stamped(1000), [(Crop(2), plain)] * 2, 48, 0, CPU)
    assert loader.steps == 20
    epochs = []
    for epoch in range(3):
        seen = []
        for number, (step, (x1, x2)) in enumerate(loader(epoch)):
            assert step == 20 * epoch + number and x1.shape == x2.shape == (48, 3, 2, 2)
            assert index_of(x1) == index_of(x2)
            seen += index_of(x1)
        assert len(seen) == len(set(seen)) == 960 and max(seen) < 1000  # an incomplete 21st batch is dropped
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    assert set(epochs[0]) != set(epochs[1])  # not always the same images are dropped


def one_process(images, paths, batch, epoch, seed):
    """The views of this process, of a set in memory and of a folder."""
    return [list(Loader(Split(x), two_views(16), batch, seed, CPU)(epoch)) for x in (images, paths)]


def test_views_do_not_depend_on_the_number_of_processes(processes, tmp_path):
    images = noise_bytes(40, 20, 24)
    paths = png_folder(tmp_path, images)
    expected = one_process(images, paths, 18, 1, 5)
    for world in (1, 2, 3):
        ranks = processes(world, one_process, images, paths, 18, 1, 5)
        assert all(view.shape == (18 // world, 3, 16, 16) for rank in ranks for found in rank for _, v in found for view in v)
        for kind in (0, 1):  # in memory, folder
            steps = zip(*(rank[kind] for rank in ranks))
            joined = [(step[0][0], [torch.cat(view) for view in zip(*(views for _, views in step))]) for step in steps]
            assert_same(joined, expected[kind])


def test_views_do_not_depend_on_workers_or_on_being_resumed(tmp_path):
    images = noise_bytes(32, 20, 24)
    paths = png_folder(tmp_path, images)
    for split, workers in ((Split(images), 0), (Split(paths), 0), (Split(paths), 2)):
        loader = Loader(split, two_views(8), 4, 0, CPU, workers)
        if workers != 2:
            epochs = [list(loader(epoch)) for epoch in range(3)]
        else:
            assert_same(list(loader(0)), epochs[0])  # as without workers
        for step, _ in loader(1):
            if step == 10:
                break  # in the middle of an epoch; workers are ahead of it ...
        assert_same(list(loader(1, done=11)), epochs[1][3:])  # ... and must go back
        assert_same(list(loader(2, done=11)), epochs[2])
        assert_same(list(Loader(split, two_views(8), 4, 0, CPU, 0)(1, done=11)), epochs[1][3:])  # a new program


def test_views_of_a_set_in_memory_and_of_a_folder_are_the_same(tmp_path):
    """The order, the boxes and all parameters are equal. The pixels of the crops differ by PIL's rounding to bytes (see
    test_resized_crop_is_that_of_pil_up_to_its_rounding); where nothing is resized, only by that of a division by 255."""
    images = noise_bytes(24, 32, 32, 64, 192)
    paths = png_folder(tmp_path, images)
    for crop, levels in ((Crop(24), 1.135), (Crop(32, scale=(1.0, 1.0), ratio=(1.0, 1.0)), 1e-4)):
        memory, folder = (list(Loader(Split(x), [(crop, random_flip)] * 2, 8, 3, CPU)(1)) for x in (images, paths))
        for (step, views), (other, others) in zip(memory, folder, strict=True):
            assert step == other
            assert all(255 * (a - b).abs().max() <= levels for a, b in zip(views, others))


def test_epochs_steps_views_and_seeds_differ():
    def jitter(x, rand):
        return color_jitter(x, rand, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)

    def views(seed, epoch):
        return [v for _, views in Loader(Split(same), [(Crop(8), jitter)] * 2, 4, seed, CPU)(epoch) for v in views]
    same = noise_bytes(1, 16, 16).expand(8, -1, -1, -1).contiguous()  # one image eight times: only the draws can differ
    found = torch.cat([v for seed in (0, 1) for epoch in (0, 1) for v in views(seed, epoch)])
    assert len(found) == 64 and len(found.flatten(1).unique(dim=0)) == 64
    assert all(torch.equal(a, b) for a, b in zip(views(1, 1), views(1, 1)))


def test_global_random_states_are_neither_used_nor_changed():
    def views():
        return list(Loader(Split(noise_bytes(8, 16, 16)), two_views(8), 4, 0, CPU)(0))
    torch.manual_seed(1)
    first, torch_state, numpy_state = views(), torch.get_rng_state(), np.random.get_state()[1].copy()
    second = views()
    assert torch.equal(torch_state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    assert_same(second, first)
    assert_same(views(), first)


@pytest.mark.parametrize("device", DEVICES)
def test_loader_on_any_device(device):
    images = noise_bytes(8, 16, 16)
    [(_, views)] = Loader(Split(images.to(device)), two_views(8), 8, 0, torch.device(device))(0)
    [(_, expected)] = Loader(Split(images), two_views(8), 8, 0, CPU)(0)
    for view, other in zip(views, expected):
        assert view.device.type == device and view.dtype == torch.float32
        torch.testing.assert_close(view.cpu(), other, rtol=0, atol=5e-5)  # ROUNDING / 0.225 by normalize


@pytest.mark.parametrize("batch", [0, -4, 9])
def test_impossible_batch_is_refused_with_one_sentence(batch, capsys):
    with pytest.raises(SystemExit, match="1"):
        Loader(stamped(8), two_views(8), batch, 0, CPU)
    assert capsys.readouterr().err == f"error: --batch {batch}: choose 1 to 8, the number of images\n"


def refused_batch(batch):
    with pytest.raises(SystemExit):
        Loader(stamped(8), two_views(8), batch, 0, CPU)
    return common.world()


def test_batch_that_the_processes_cannot_share_is_refused(processes):
    assert processes(2, refused_batch, 7) == [2, 2]
