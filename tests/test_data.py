"""The data: the embedded sets, those that torchvision downloads, folders of any image format, files
that cannot be read, and clear errors."""

import os
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import CPU
from PIL import Image

import common
from common import (
    BrokenFiles,
    Data,
    Files,
    InMemory,
    Loader,
    Split,
    evaluate,
    features,
    load_data,
    pixels,
)
from kernels.readers import load_picture
from kernels.views import Crop


def error_of(capsys, function, *args):
    """The one sentence with which the call ends the program with exit code 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        function(*args)
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    return errors[0]


# -------- Embedded sets ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji():
    return load_data("emoji", "unused", CPU)


def test_emoji(emoji):
    assert emoji.name == "emoji" and emoji.bank is emoji.train
    for split, count in ((emoji.train, 5020), (emoji.test, 1260)):
        pixels = split.images.pixels
        assert isinstance(split.images, InMemory) and len(split.images) == count
        assert pixels.shape == (count, 3, 32, 32)
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
        for numbers in (split.labels, split.emoji, split.drawing):
            assert numbers.shape == (count,) and numbers.dtype == torch.int64
        assert split.labels.unique().tolist() == list(range(9))
        # each emoji of this split has each of the four drawings, and one category
        pairs = torch.stack([split.emoji, split.drawing], 1)
        assert len(pairs.unique(dim=0)) == count == 4 * len(split.emoji.unique())
        assert split.drawing.unique().tolist() == [0, 1, 2, 3]
        assert len(torch.stack([split.emoji, split.labels], 1).unique(dim=0)) == count // 4

    assert not set(emoji.train.emoji.tolist()) & set(emoji.test.emoji.tolist())
    train = emoji.train.labels.bincount()
    test = emoji.test.labels.bincount()
    # a fifth of every category; of the smallest, 8 flags, 2
    assert (test / (test + train) - 0.2).abs().max() < 0.06


def test_emoji_images_are_drawings_on_white_and_none_is_in_both_splits(emoji):
    train = emoji.train.images.pixels
    test = emoji.test.images.pixels
    both = torch.cat([train, test]).flatten(2).float()  # (6280, 3, 1024)
    # none is blank; the faintest is a white square in a thin grey frame
    assert both.std((1, 2)).min() > 1
    corners = both.view(-1, 3, 32, 32)[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median()
    assert corners == 255
    # nearly all have colour; a few are of grey ink
    colour = (both.amax(1) - both.amin(1)).amax(1)
    assert colour.gt(30).float().mean() > 0.9
    assert not {x.numpy().tobytes() for x in train} & {x.numpy().tobytes() for x in test}


CATEGORIES = (
    "Smileys & Emotion, People & Body, Animals & Nature, Food & Drink, Travel & Places, "
    "Activities, Objects, Symbols, Flags"
)
KNOWN = {"grinning": 0, "cat": 2, "pizza": 3, "airplane": 4, "soccer": 5, "pirate_flag": 8}
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")


def test_emoji_file_names_what_is_drawn():
    with np.load(common.HERE / "tests" / "data" / "emoji.npz") as file:
        assert file["categories"].tolist() == CATEGORIES.split(", ")
        assert file["drawings"].tolist() == ["twemoji", "noto", "fluent-3d", "fluent-flat"]
        codes = file["codepoints"]
        names = file["names"]
        assert len(set(codes)) == len(codes) == len(names) == 1570
        assert not any(tone in code for code in codes for tone in SKIN_TONES)
        assert names[codes == "1f600"] == "grinning" and names[codes == "1f355"] == "pizza"
        labels = dict(zip(file["train_emoji"].tolist(), file["train_labels"].tolist()))
        labels |= dict(zip(file["test_emoji"].tolist(), file["test_labels"].tolist()))
        for name, category in KNOWN.items():
            assert labels[np.flatnonzero(names == name)[0]] == category, name


def test_fashion():
    data = load_data("fashion", "unused", CPU)
    assert data.bank is data.train and data.train.emoji is None and data.test.drawing is None
    for split, count in ((data.train, 10_000), (data.test, 2_000)):
        pixels = split.images.pixels
        assert pixels.shape == (count, 3, 28, 28) and pixels.dtype == torch.uint8
        assert torch.equal(pixels[:, 0], pixels[:, 1])
        assert torch.equal(pixels[:, 0], pixels[:, 2])
        assert split.labels.shape == (count,) and split.labels.dtype == torch.int64
        assert split.labels.unique().tolist() == list(range(10))
    # as Fashion-MNIST begins
    assert "".join(map(str, data.train.labels[:10].tolist())) == "9003027255"
    assert "".join(map(str, data.test.labels[:10].tolist())) == "9211614657"


def test_embedded_files_are_small():
    files = (common.HERE / "tests" / "data").glob("*.npz")
    assert sum(f.stat().st_size for f in files) < 32e6  # bytes, all together


# -------- Sets of torchvision ---------------------------------------------------------------------


def write_idx(folder, stem, images, labels):
    """The two files of a split in the IDX format: magic number, sizes (big endian), bytes."""
    for name, array in (
        (f"{stem}-images-idx3-ubyte", images),
        (f"{stem}-labels-idx1-ubyte", labels),
    ):
        header = struct.pack(f">{array.ndim + 1}i", 0x800 + array.ndim, *array.shape)
        (folder / name).write_bytes(header + array.tobytes())


def test_fashion_mnist_from_files_where_torchvision_puts_them(tmp_path, monkeypatch):
    """So a system's own copy of the data set can be used by links to its files."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected to a network"))
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    test = rng.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5, 9, 2], np.uint8)
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    write_idx(folder, "train", train, labels)
    write_idx(folder, "t10k", test, labels[:3])
    with warnings.catch_warnings():
        # as of PyTorch, which asks for memory that may be written to
        warnings.simplefilter("error")
        data = load_data("fashion-mnist", tmp_path, CPU)
    assert data.name == "fashion-mnist"
    assert data.train.images.pixels.shape == (7, 3, 28, 28)
    assert (data.train.images.pixels[:, 2].numpy() == train).all()
    assert (data.test.images.pixels[:, 0].numpy() == test).all()
    assert data.train.labels.tolist() == labels.tolist()
    assert data.test.labels.tolist() == [3, 1, 4]


class FakeSet:
    """Stands for a data set of torchvision, with its layout of the arrays."""

    counts = {True: 6, False: 2, "train": 6, "test": 2, "unlabeled": 9}

    def __init__(self, root, download, train=None, split=None):
        assert download
        self.count = self.counts[split if train is None else train]
        self.targets = [i % 3 for i in range(self.count)]


class FakeCIFAR(FakeSet):
    @property
    def data(self):
        numbers = np.arange(self.count, dtype=np.uint8)[:, None, None, None]
        return numbers + np.zeros((32, 32, 3), np.uint8)


class FakeSTL(FakeSet):
    @property
    def data(self):
        return np.full((self.count, 3, 96, 96), self.count, np.uint8)

    @property
    def labels(self):
        return np.array(self.targets, np.uint8)


def test_layouts_of_torchvision(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FakeCIFAR)
    monkeypatch.setattr(torchvision.datasets, "STL10", FakeSTL)
    data = load_data("cifar100", tmp_path, CPU)
    assert data.train.images.pixels.shape == (6, 3, 32, 32)
    assert data.train.images.pixels[:, 1, 5, 5].tolist() == list(range(6))
    assert data.bank is data.train
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test.labels.tolist() == [0, 1]

    data = load_data("stl10", tmp_path, CPU)  # learns from the labelled and the unlabelled images
    assert data.train.images.pixels.shape == (15, 3, 96, 96) and data.train.labels is None
    assert data.train.images.pixels[:, 0, 0, 0].tolist() == [6] * 6 + [9] * 9
    assert data.bank.labels.tolist() == [0, 1, 2, 0, 1, 2] and len(data.test.images) == 2


@pytest.mark.parametrize("name, files", list(common.DOWNLOADED.items()))
def test_failed_download_is_one_helpful_sentence(monkeypatch, capsys, tmp_path, name, files):
    # nothing listens on this port: a real download, which fails at once
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    error = error_of(capsys, load_data, name, tmp_path, CPU)
    start = f"error: --data {name}: torchvision could not download it into {tmp_path}"
    assert error.startswith(start)
    assert f"torchvision's {files} there" in error and "--root" in error
    assert all(name in error for name in common.EMBEDDED)


def test_failed_download_of_a_real_run(program, tmp_path):
    proxy = "http://127.0.0.1:9"
    flags = ["--data", "cifar10", "--root", tmp_path / "sets"]
    found = program("methods/simclr.py", *flags, check=False, http_proxy=proxy, https_proxy=proxy)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert found.stderr.startswith("error: --data cifar10: ") and found.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# -------- Folders ---------------------------------------------------------------------------------


def picture(seed=0, height=32, width=64):
    """(height, width, 3) uint8: four quarters of different colours, each of whole JPEG blocks."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return colours.repeat(height // 2, 0).repeat(width // 2, 1)


def write_images(folder, names, seed=0):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed + i)).save(folder / name)


def named(split, folder):
    """{name inside folder: label}"""
    assert isinstance(split.images, Files)
    labels = [None] * len(split.images) if split.labels is None else split.labels.tolist()
    assert len(labels) == len(split.images)
    paths = split.images.paths
    assert all(isinstance(path, str) for path in paths)  # a million Path objects would be 0.5 GB
    return {os.path.relpath(path, folder): label for path, label in zip(paths, labels)}


def test_imagenet_layout(tmp_path, capsys):
    names = "train/n2/a.png train/n1/b.JPEG train/n1/c.webp train/n10/deep/er/d.jpg"
    write_images(tmp_path, [*names.split(), "val/n2/e.png", "val/n1/a.png"])
    (tmp_path / "train/n1/notes.txt").write_text("no image")
    (tmp_path / "train/empty").mkdir()
    data = load_data(str(tmp_path), "unused", CPU)
    assert data.name == tmp_path.name and data.bank is data.train
    assert named(data.train, tmp_path) == {
        "train/n1/b.JPEG": 0,
        "train/n1/c.webp": 0,
        "train/n10/deep/er/d.jpg": 1,
        "train/n2/a.png": 2,
    }
    assert named(data.test, tmp_path) == {"val/n1/a.png": 0, "val/n2/e.png": 2}
    assert "4 training and 2 test images of 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize("inside", ["", "train/"])  # also where train/ has no val/ beside it
def test_class_folders_are_split_by_the_names_of_the_files(tmp_path, inside):
    names = []
    for name, count in (("ant", 40), ("bee", 25), ("cow", 2)):
        names += [f"{inside}{name}/{i:02d}.png" for i in range(count)]
    splits = []
    for copy in ("here", "elsewhere"):
        random.Random(copy).shuffle(names)  # other order of creation, other place
        write_images(tmp_path / copy, names)
        data = load_data(str(tmp_path / copy), "unused", CPU)
        splits.append((named(data.train, tmp_path / copy), named(data.test, tmp_path / copy)))
    assert splits[0] == splits[1]
    train, test = splits[0]
    assert set(train) | set(test) == set(names) and not set(train) & set(test)
    assert np.bincount(list(test.values())).tolist() == [4, 2, 1]  # one in ten, at least one
    assert np.bincount(list(train.values())).tolist() == [36, 23, 1]
    # not the first ones by name
    names.sort()
    assert sorted(test) != names[:4] + names[40:42] + names[65:66]


def test_plain_images_have_no_labels(tmp_path, capsys):
    names = ["a.png", "some/b.jpg", "some/more/c.webp"]
    write_images(tmp_path, names)
    data = load_data(str(tmp_path), "unused", CPU)
    assert named(data.train, tmp_path) == dict.fromkeys(names)
    assert data.test is None and data.bank is data.train
    assert "no evaluation by labels" in capsys.readouterr().out


def test_the_folder_one_is_in_has_a_name(tmp_path, monkeypatch):
    write_images(tmp_path, ["a.png"])
    monkeypatch.chdir(tmp_path)
    # the name of the run folder contains it
    assert load_data(".", "unused", CPU).name == tmp_path.name


@pytest.mark.parametrize("name", ["only/a.png", "train/only/a.png"])
def test_one_class_is_as_good_as_none(tmp_path, capsys, name):
    write_images(tmp_path, [name])
    data = load_data(str(tmp_path), "unused", CPU)
    assert data.test is None and data.train.labels is None
    assert "no evaluation by labels" in capsys.readouterr().out


def test_wrong_folders_and_names_are_one_sentence(tmp_path, capsys):
    error = error_of(capsys, load_data, "imagenet", "unused", CPU)
    known = ("imagenet", *common.EMBEDDED, *common.DOWNLOADED, "folder")
    assert all(name in error for name in known)
    error = error_of(capsys, load_data, str(tmp_path), "unused", CPU)
    assert all(word in error for word in ("no images found", str(tmp_path), ".webp", "train/"))
    (tmp_path / "notes.txt").write_text("no image")
    assert "no images found" in error_of(capsys, load_data, str(tmp_path), "unused", CPU)
    write_images(tmp_path, ["train/a/0.png", "train/b/0.png", "val/a/0.png", "val/zebra/0.png"])
    error = error_of(capsys, load_data, str(tmp_path), "unused", CPU)
    assert "zebra" in error and "train/ lacks" in error


# -------- Formats ---------------------------------------------------------------------------------


def loaded(path):
    found = load_picture(path)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


def distance(path, expected):
    """The largest difference of a level."""
    return np.abs(loaded(path) - expected).max()


def test_rgb_formats(tmp_path):
    x = picture()
    # JPEG rounds YCbCr and the means of its blocks
    for name, levels in (("a.png", 0), ("a.webp", 0), ("a.jpg", 3)):
        Image.fromarray(x).save(tmp_path / name, lossless=True, quality=95, subsampling=0)
        assert distance(tmp_path / name, x) <= levels, name


def test_grey_formats(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "8bit.png")
    # 0, 257, ..., 65535: the same levels
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16bit.png")
    Image.fromarray(grey > 127).save(tmp_path / "1bit.png")
    assert Image.open(tmp_path / "16bit.png").mode.startswith("I")
    assert Image.open(tmp_path / "1bit.png").mode == "1"
    for name, expected in (("8bit", grey), ("16bit", grey), ("1bit", (grey > 127) * 255)):
        assert (loaded(tmp_path / f"{name}.png") == expected[:, :, None]).all(), name
    Image.fromarray(np.array([[300, 40_000, 65_000]], np.uint16)).save(tmp_path / "16bit.png")
    # scaled by 1/257, not clipped at 255
    assert loaded(tmp_path / "16bit.png")[0, :, 1].tolist() == [1, 155, 252]


def test_transparency_is_composed_on_white(tmp_path):
    # 255 - alpha / 255 * (255 - colour): alpha 0 is white, 255 the colour, 102 two fifths of it
    alpha = np.array([[0, 102, 255]], np.uint8)
    colour = np.array([[[200, 100, 0]] * 3], np.uint8)
    expected = np.array([[255, 233, 200], [255, 193, 100], [255, 153, 0]]).T
    for name in ("rgba.png", "rgba.webp"):
        Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / name, lossless=True, exact=True)
        assert distance(tmp_path / name, expected[None]) <= 1, name  # PIL rounds the product
    Image.fromarray(np.dstack([colour[:, :, 1], alpha])).save(tmp_path / "grey_alpha.png")
    assert Image.open(tmp_path / "grey_alpha.png").mode == "LA"
    assert distance(tmp_path / "grey_alpha.png", expected[None, :, 1:2]) <= 1

    # only the middle pixel has the colour that is declared transparent
    x = colour.copy()
    x[0, 1, 2] = 7
    for name, x, transparent in (("rgb.png", x, (200, 100, 7)), ("grey.png", alpha, 102)):
        Image.fromarray(x).save(tmp_path / name, transparency=transparent)
        found = loaded(tmp_path / name)
        assert found[0, 1].tolist() == [255, 255, 255], name
        assert found[0, 0].tolist() == np.broadcast_to(x[0, 0], 3).tolist(), name


def test_palettes(tmp_path):
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 200, 100, 50, 7, 77, 177])
    image.save(tmp_path / "opaque.png")
    assert Image.open(tmp_path / "opaque.png").mode == "P"
    first, second, third = [10, 20, 30], [200, 100, 50], [7, 77, 177]
    assert loaded(tmp_path / "opaque.png")[0].tolist() == [first, second, third]
    image.save(tmp_path / "index.png", transparency=1)
    assert loaded(tmp_path / "index.png")[0].tolist() == [first, [255, 255, 255], third]
    image.save(tmp_path / "each.png", transparency=bytes([255, 0, 102]))  # an alpha for each colour
    expected = [[first, [255, 255, 255], [156, 184, 224]]]
    assert distance(tmp_path / "each.png", expected) <= 1


def test_cmyk(tmp_path):
    # cyan, magenta, yellow, black; the expected colour is (255 - ink) (255 - black) / 255
    for ink, expected in (
        ([0, 255, 255, 0], [255, 0, 0]),
        ([102, 51, 0, 51], [122, 163, 204]),
    ):
        x = np.tile(np.array(ink, np.uint8), (16, 16, 1))
        Image.fromarray(x, "CMYK").save(tmp_path / "a.jpg", quality=95)
        assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
        assert distance(tmp_path / "a.jpg", expected) <= 3  # JPEG's rounding


UPRIGHT = {  # orientation -> what the stored pixels must undergo (EXIF 2.3, section 4.6.4)
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation(tmp_path, name):
    for orientation, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"exif": exif, "quality": 95, "subsampling": 0, "lossless": True}
        Image.fromarray(picture()).save(tmp_path / name, **options)
        expected = turn(picture())
        assert loaded(tmp_path / name).shape == expected.shape, orientation
        assert distance(tmp_path / name, expected) <= 3, orientation


def test_plain_view_is_the_centre(tmp_path):
    # 100 x 160 with a red square of 50 in the middle. The shorter side becomes 64 = 56 * 256 / 224,
    # the square 32.
    x = np.zeros((100, 160, 3), np.uint8)
    x[25:75, 55:105, 0] = 255
    Image.fromarray(x).save(tmp_path / "a.png")
    [(views, broken)] = Files([tmp_path / "a.png"]).whole(torch.tensor([0]), 56)
    assert views.shape == (1, 3, 56, 56) and views.dtype == torch.uint8 and not broken
    # the square covers 28 +- 16 pixels; a bicubic filter rings by less than a tenth
    red = views[0, 0].float() / 255
    assert red[16:40, 16:40].min() > 0.9
    assert max(red[:8].max(), red[-8:].max(), red[:, :8].max(), red[:, -8:].max()) < 0.1
    assert abs(red.sum() - 32**2) < 0.02 * 32**2


def test_both_readers_give_the_images_that_are_asked_for(tmp_path):
    write_images(tmp_path, ["0.png", "1.png", "2.png"])
    files = Files([tmp_path / f"{i}.png" for i in range(3)])
    x = np.stack([picture(i) for i in range(3)])
    memory = InMemory(torch.from_numpy(x).permute(0, 3, 1, 2))
    assert len(files) == len(memory) == 3
    [(found, broken)] = memory.whole(torch.tensor([2, 0, 2]), 32)
    assert not broken and torch.equal(found, memory.pixels[[2, 0, 2]])
    [(found, broken)] = files.whole(torch.tensor([2, 0, 2]), 16, workers=0)
    # a pixel of the upper left quarter, beyond the reach of the filter
    assert not broken and torch.equal(found[:, :, 2, 2], memory.pixels[[2, 0, 2]][:, :, 0, 0])


# -------- Files that cannot be read ---------------------------------------------------------------


@pytest.fixture
def hundreds(tmp_path):
    """300 files, each one colour that names its index, and break_(index, how) to spoil one."""
    paths = [str(tmp_path / f"{i:03d}.png") for i in range(300)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(path)

    def break_(index, how="text"):
        whole = Path(paths[index]).read_bytes()
        spoiled = {"text": b"not an image", "empty": b"", "head": whole[:20], "cut": whole[:-24]}
        Path(paths[index]).write_bytes(spoiled[how])

    return paths, break_


def shown_indices(loader, epoch=0):
    """The images of an epoch, read from their colours; loader.index must say the same."""
    seen = []
    for _, views in loader(epoch):
        levels = (255 * views[0][:, :, 0, 0]).round().long()
        index = levels[:, 0] + 256 * levels[:, 1]
        assert torch.equal(loader.index, index)
        seen += index.tolist()
    return seen


def crop_loader(paths, batch=20, workers=0):
    views = [(Crop(4), lambda x, rand: x)] * 2
    return Loader(Split(Files(paths)), views, batch, 0, CPU, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_file_gives_way_to_the_next_and_is_named_once(hundreds, capfd, workers):
    paths, break_ = hundreds
    before = shown_indices(crop_loader(paths))
    # two in a row, and the last one: the next is then the first
    broken = {17: "text", 18: "empty", 299: "cut"}
    for index, how in broken.items():
        break_(index, how)
    loader = crop_loader(paths, workers=workers)
    instead = {17: 19, 18: 19, 299: 0}
    assert shown_indices(loader) == [instead.get(i, i) for i in before]
    shown_indices(loader, epoch=1)
    warnings = sorted(capfd.readouterr().err.splitlines())
    reasons = ("cannot identify image file", "cannot identify image file", "truncated")
    for warning, index, reason in zip(warnings, broken, reasons, strict=True):
        start = f"warning: left out, cannot be used: {paths[index]} ("
        assert warning.startswith(start) and reason in warning
    # fewer than ten are allowed
    assert loader.reader.broken.met == {paths[i] for i in broken}


def test_more_than_one_in_a_hundred_stops_the_training(hundreds, capsys):
    """Ten or more, that is: of few images, a few broken ones need not end the run."""
    paths, break_ = hundreds
    for index, how in ((3, "text"), (100, "cut"), (101, "head"), (250, "empty")):
        break_(index, how)
    for index in range(200, 205):
        break_(index)
    shown_indices(crop_loader(paths))  # nine
    break_(4)
    error = error_of(capsys, shown_indices, crop_loader(paths))
    assert "10 of 300 files cannot be used, more than 1 in 100" in error and paths[3] in error


def test_one_in_a_hundred_counts_over_the_whole_data_set(capsys):
    broken = BrokenFiles(1200)
    broken.add([(i, f"{i:02}.png", "empty") for i in range(12)])
    error = error_of(capsys, broken.add, [(99, "99.png", "empty")])
    assert "13 of 1200 files cannot be used" in error and "00.png" in error
    few = BrokenFiles(3)
    few.add([(0, "a.png", "empty"), (1, "b.png", "empty")])
    assert "3 of 3 files cannot be used" in error_of(capsys, few.add, [(2, "c.png", "empty")])


def test_all_files_unreadable_stops_at_once(hundreds, capsys):
    paths, break_ = hundreds
    for index in range(300):
        break_(index)
    assert "cannot be used" in error_of(capsys, shown_indices, crop_loader(paths))


def test_unreadable_file_is_left_out_of_the_evaluation(hundreds, capsys):
    paths, break_ = hundreds
    break_(42)
    split = Split(Files(paths[:120]), torch.arange(120) % 2)
    x, readable = features(pixels(8), split, 8, CPU)
    assert readable.shape == (120,) and readable.dtype == torch.bool
    assert (~readable).nonzero().tolist() == [[42]]
    # a row for each file, so that rows and labels stay in step
    assert len(x) == 120 and x.isfinite().all()
    assert paths[42] in capsys.readouterr().err
    # its label does not count, neither in the bank nor in the test set
    other = split._replace(labels=split.labels.index_fill(0, torch.tensor([42]), 7))
    found = []
    for s in (split, other):
        found.append(evaluate(pixels(8), Data("some", s, s, s), 8, CPU, only_knn=True))
    assert found[0] == found[1]


@pytest.mark.parametrize("empty", ["bank", "test"])
def test_nothing_that_can_be_read_stops_the_evaluation(hundreds, capsys, empty):
    """One sentence instead of an accuracy of no images."""
    paths, break_ = hundreds
    labels = torch.arange(4) % 2
    broken = BrokenFiles(1000)  # of which fewer than one in 100 are broken
    good, bad = [Split(Files(part, broken), labels) for part in (paths[:4], paths[4:8])]
    data = Data("some", good, bad if empty == "bank" else good, bad if empty == "test" else good)
    for index in range(4, 8):
        break_(index)
    error = error_of(capsys, lambda: evaluate(pixels(8), data, 8, CPU))
    assert error.endswith("none of 4 images for the evaluation can be read: replace these files")


@pytest.mark.parametrize("only_knn", [True, False])
def test_more_than_one_in_a_hundred_stops_the_evaluation(hundreds, capsys, only_knn):
    paths, break_ = hundreds
    labels = torch.arange(150) % 2
    # 10 of the 150 test images, none of the 150 training images
    for index in range(200, 210):
        break_(index)
    broken = BrokenFiles(300)
    train = Split(Files(paths[:150], broken), labels)
    test = Split(Files(paths[150:], broken), labels)
    data = Data("some", train, train, test)
    error = error_of(capsys, lambda: evaluate(pixels(8), data, 8, CPU, only_knn=only_knn))
    assert "10 of 300 files cannot be used, more than 1 in 100" in error and paths[200] in error
