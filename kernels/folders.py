"""Folders: which files are shown in training, which are kept for the test, and their labels.

A folder holds images or videos. Its kind is told by the first thousand files that are found in it.
It is one of videos if there is a video among them, or if all images among them are WebP files and
the first by its path is animated.
"""

import os
import zlib
from collections import Counter
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image

from kernels.collectives import fail, print0


class Kind(NamedTuple):
    noun: str
    endings: tuple


IMAGES = Kind("images", (".jpg", ".jpeg", ".png", ".webp"))
VIDEOS = Kind("videos", (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".gif"))
ANIMATED = Kind("videos", (".webp",))
OTHER_ENDINGS = (".tif", ".tiff", ".bmp", ".avif", ".heic", ".jp2", ".ppm", ".jfif")
OTHER_ENDINGS += (*IMAGES.endings, *VIDEOS.endings)  # those of the other kind
TEST_FOLDERS = ("val", "valid", "validation", "test")  # beside train/, the first that there is


def read_folder(path):
    """train/ and val/ (or valid/, validation/, test/) with class folders, as ImageNet has them; or
    class folders, of which one file in ten (at least one per class, by a hash of its name) is held
    out; or plain files at any depth, without labels. Hidden names, __MACOSX, run folders and other
    endings are left out. One printed line says what was found and what is not used.

    Returns [(files, labels (n,) int64), ...] of training and test, or [(files, None)], and whether
    the files are videos."""
    kind = kind_of(path)
    unused = Counter()
    folders = [p for p in sorted(path.iterdir()) if p.is_dir()]
    folders = {p.name.lower(): p for p in folders}
    base = folders.get("train", path)
    train = files_by_class(base, kind, unused)
    stray = sum(is_wanted(p.name, kind) for p in base.iterdir())
    if base != path and not train and not stray:
        fail(f"--data {path}: no {kind.noun} found in {base.name}/{listed(unused)}")
    if len(train) < 2:
        return plain_folder(path, kind)
    unused[f"{kind.noun} beside the class folders"] = stray

    test = {}
    origin = f"a tenth of the {kind.noun}, held out"
    if base != path:
        test, origin = find_test(path, folders, kind, unused)
    elif not set(TEST_FOLDERS).isdisjoint(folders):
        fail(
            f"--data {path}: of its folders ({', '.join(folders)}) one looks like test "
            f"{kind.noun}, not like a class: name that of the training {kind.noun} train"
        )

    # One file in ten is held out. The hash does not change when other files come or go.
    if not test:
        first = len(os.path.join(path, ""))
        for name, paths in train.items():
            paths = sorted(paths, key=lambda p: zlib.crc32(os.fsencode(p[first:])))
            cut = max(1, len(paths) // 10)
            test[name] = sorted(paths[:cut])
            train[name] = sorted(paths[cut:])

    unknown = sorted(set(test) - set(train))
    if unknown:
        fail(f"--data {path}: {origin} has classes that train/ lacks: {', '.join(unknown[:5])}")
    classes = sorted(train)
    halves = [labelled(files, classes) for files in (train, test)]
    counts = [len(files) for files, _ in halves]
    if not counts[0]:
        one = kind.noun.removesuffix("s")
        fail(f"--data {path}: one {one} per class leaves none for training; two are needed")
    some = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
    print0(
        f"{path}: {counts[0]} training and {counts[1]} test {kind.noun} of "
        f"{len(classes)} classes ({some}); test {kind.noun}: {origin}{listed(unused)}"
    )
    return halves, kind is not IMAGES


def kind_of(path):
    """IMAGES, VIDEOS or ANIMATED: see the beginning of this file."""
    first = list(islice(every_file(path, Counter()), 1000))
    if any(is_wanted(os.path.basename(file), VIDEOS) for file in first):
        return VIDEOS
    images = [file for file in first if is_wanted(os.path.basename(file), IMAGES)]
    if images and all(file.lower().endswith(".webp") for file in images) and moves(min(images)):
        return ANIMATED
    return IMAGES


def moves(file):
    """Whether an image file has several frames."""
    try:
        with Image.open(file) as picture:
            return getattr(picture, "n_frames", 1) > 1
    except Exception:  # PIL raises nearly anything on a damaged file
        return False


def plain_folder(path, kind):
    """All files of a folder, without labels."""
    unused = Counter()
    files = wanted_files(path, kind, unused)
    if not files:
        fail(
            f"--data {path}: no images found{listed(unused)}. Expected class folders of "
            f"{', '.join(IMAGES.endings)} files, or of videos, train/ and val/ with class folders, "
            "or plain files"
        )
    print0(
        f"{path}: {len(files)} {kind.noun}, fewer than two class folders, so no evaluation by "
        f"labels{listed(unused)}"
    )
    return [(files, None)], kind is not IMAGES


def find_test(path, folders, kind, unused):
    """{class: test files} of the first of val/, valid/, ... that has class folders, and where they
    come from. Files in other folders beside train/ are not used. folders: {name: path}."""
    test = {}
    origin = f"a tenth of the {kind.noun}, held out"
    for name in TEST_FOLDERS:
        if name in folders and not test:
            test = files_by_class(folders[name], kind, unused)
            origin = f"{folders[name].name}/" if test else origin

    for name, folder in folders.items():
        if name == "train" or f"{folder.name}/" == origin or is_left_out(folder, unused):
            continue
        files = len(wanted_files(folder, kind, Counter()))
        unused[f"{kind.noun} in {folder.name}/"] = files
        if files and name in TEST_FOLDERS and not test:
            fail(
                f"--data {path}: the {kind.noun} in {folder.name}/ have no class folders, so their "
                "labels are not known: move each into a folder with the name of its class, as in "
                "train/"
            )
    if os.path.samefile(folders["train"], path / origin if test else path):
        fail(f"--data {path}: train/ and {origin} are the same folder")
    return test, origin


def listed(unused):
    """What is not used, and how much of it: "; not used: 40 .tif files"."""
    words = [f"{count} {what}" for what, count in unused.items() if count]
    return f"; not used: {', '.join(words)}" if words else ""


def is_wanted(name, kind):
    return not name.startswith(".") and name.lower().endswith(kind.endings)


def is_left_out(folder, unused):
    """Whether a folder is no part of a data set: hidden, of macOS's zip, or of a run."""
    name = os.path.basename(folder)
    run = os.path.exists(os.path.join(folder, "metrics.jsonl"))
    if name.startswith(".") or name == "__MACOSX" or run:
        unused["run folders" if run else "hidden folders"] += 1
        return True
    return False


def every_file(folder, unused):
    """All files below a folder, without hidden ones. Adds to unused what is left out."""
    for place, folders, names in os.walk(folder, onerror=stop):
        for name in list(folders):
            child = os.path.join(place, name)
            unused["links to folders"] += os.path.islink(child)
            if is_left_out(child, unused):
                folders.remove(name)
        for name in names:
            if name.startswith("."):
                unused["hidden files"] += 1
            else:
                yield os.path.join(place, name)


def wanted_files(folder, kind, unused):
    """All files of a kind below a folder, sorted. Adds to unused what is left out."""
    found = []
    for file in every_file(folder, unused):
        ending = os.path.splitext(file)[1].lower()
        if ending in kind.endings:
            found.append(file)
        elif ending in OTHER_ENDINGS:
            unused[f"{ending} files"] += 1
    return sorted(found)


def stop(error):
    """For os.walk, which would pass over a folder that cannot be read."""
    raise error


def files_by_class(folder, kind, unused):
    """{name of a class folder: its files}, without empty ones."""
    found = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not is_left_out(child, unused):
            found[child.name] = wanted_files(child, kind, unused)
    return {name: paths for name, paths in found.items() if paths}


def labelled(files, classes):
    """{class: files} -> all files, and labels (n,): the place of the class in `classes`."""
    paths = []
    labels = []
    for label, name in enumerate(classes):
        paths += files.get(name, [])
        labels += [label] * len(files.get(name, []))
    return paths, torch.tensor(labels)
