"""Rebuilds the embedded data sets from package indexes: every byte of them can be traced.

    apt-get install npm libcairo2 dpkg apt && pip install numpy pillow cairosvg==2.9.0
    python tests/data/build.py         # ten minutes, 960 MB of downloads, writes beside this file
    python tests/data/build.py solids  # only this file

emoji.npz: every base emoji (no skin-tone variants) that all four drawings below have, 32x32 RGB,
composed on white.
fashion.npz: the first 10,000 training and first 2,000 test images of Fashion-MNIST, 28x28 grey.
photos.npz: the photographs of GCompris that are in the public domain or under CC0, as WebP files.
solids.npz: rendered scenes with dense labels; scenes.py renders them, photos.npz has the textures.
movers.npz: animated emoji with transparency, of which kernels/movers.py makes video clips.
Licences and array contents: README.md beside this file.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scenes
from PIL import Image, ImageDraw, features

HERE = Path(__file__).resolve().parent
SIZE = 32  # pixels, both sides
NPM = {  # drawing -> the npm package and version it is read from
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "noto": "emoji-datasource-google@16.0.0",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
TEST_SHARE = 0.2  # of the emoji of each category; all drawings of one emoji fall on the same side
CATEGORIES = [
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
]  # Unicode's, without "Component" (skin tones, hair)


def npm_package(spec, folder):
    """Downloads one npm package into folder and returns {path inside the package: bytes}."""
    name = subprocess.run(
        ["npm", "pack", "--silent", spec], cwd=folder, check=True, capture_output=True, text=True
    )
    with tarfile.open(Path(folder) / name.stdout.split()[-1]) as tar:
        return {
            m.name.removeprefix("package/"): tar.extractfile(m).read() for m in tar if m.isfile()
        }


def codepoints(text):
    """'1F468-200D-2695-FE0F' -> '1f468-200d-2695': the variation selector is written differently by
    each source."""
    return text.lower().replace("-fe0f", "")


def on_white(data):
    """Encoded RGBA picture of any square size -> (32, 32, 3) uint8, transparency composed on white,
    area-averaged."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(
        Image.alpha_composite(white, picture)
        .convert("RGB")
        .resize((SIZE, SIZE), Image.Resampling.BOX)
    )


def emoji(folder):
    import cairosvg  # the other sets need no vector drawings

    files = {drawing: npm_package(spec, folder) for drawing, spec in NPM.items()}
    entries = json.loads(files["twemoji"]["emoji.json"])
    flat = json.loads(files["fluent-flat"]["icons.json"])["icons"]
    flat_names = {
        codepoints(k): v for k, v in json.loads(files["fluent-flat"]["chars.json"]).items()
    }

    def svg(name):  # iconify stores the inner markup of each icon, drawn in a 32 x 32 box
        head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
        box = f'{head}{flat[name]["body"]}</svg>'
        return cairosvg.svg2png(box.encode(), output_width=4 * SIZE, output_height=4 * SIZE)

    def by_codepoints(drawing, start, ending):
        return {
            codepoints(p.removeprefix(start).removesuffix(ending)): data
            for p, data in files[drawing].items()
            if p.startswith(start) and p.endswith(ending)
        }

    drawings = {
        "twemoji": by_codepoints("twemoji", "img/twitter/64/", ".png"),
        "noto": by_codepoints("noto", "img/google/64/", ".png"),
        "fluent-3d": by_codepoints("fluent-3d", "assets/", ".webp"),
        "fluent-flat": {c: name for c, name in flat_names.items() if name in flat},
    }
    kept = [
        e
        for e in entries
        if e["category"] in CATEGORIES
        and all(codepoints(e["unified"]) in d for d in drawings.values())
    ]
    kept.sort(key=lambda e: (CATEGORIES.index(e["category"]), e["sort_order"]))

    categories = np.array([CATEGORIES.index(e["category"]) for e in kept])
    rng = np.random.default_rng(0)
    test = np.zeros(len(kept), bool)
    for category in range(len(CATEGORIES)):
        members = rng.permutation(np.flatnonzero(categories == category))
        test[members[: round(TEST_SHARE * len(members))]] = True

    arrays = {
        "categories": np.array(CATEGORIES),
        "drawings": np.array(list(NPM)),
        "codepoints": np.array([codepoints(e["unified"]) for e in kept]),
        "names": np.array([e["short_name"] for e in kept]),
    }
    for split, members in (("train", np.flatnonzero(~test)), ("test", np.flatnonzero(test))):
        pictures = [
            on_white(svg(drawings[d][c]) if d == "fluent-flat" else drawings[d][c])
            for c in arrays["codepoints"][members]
            for d in NPM
        ]
        arrays[f"{split}_images"] = np.stack(pictures)  # (n, 32, 32, 3)
        arrays[f"{split}_labels"] = np.repeat(categories[members], len(NPM)).astype(np.uint8)
        arrays[f"{split}_emoji"] = np.repeat(members, len(NPM)).astype(
            np.int16
        )  # row of codepoints and names
        arrays[f"{split}_drawing"] = np.tile(np.arange(len(NPM)), len(members)).astype(np.uint8)
    return arrays


def debian_package(name, folder):
    """Downloads one Debian package and unpacks it into folder."""
    subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
    package = next(Path(folder).glob(f"{name}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)


def fashion(folder):
    debian_package("dataset-fashion-mnist", folder)

    def idx(name, header):  # the IDX format: a fixed header, then the bytes
        data = gzip.decompress(
            (Path(folder) / "usr/share/datasets/fashion-mnist" / name).read_bytes()
        )
        return np.frombuffer(data, np.uint8, offset=header)

    arrays = {
        "categories": np.array(
            [
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ]
        )
    }
    for split, stem, count in (("train", "train", 10_000), ("test", "t10k", 2_000)):
        arrays[f"{split}_images"] = idx(f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[
            :count
        ]
        arrays[f"{split}_labels"] = idx(f"{stem}-labels-idx1-ubyte.gz", 8)[:count]
    return arrays


# -------- Photographs -----------------------------------------------------------------------------

ARCHIVES = "usr/share/gcompris-qt/rcc"  # inside the package gcompris-qt-data
KINDS = {  # kind -> folders of photographs, below /gcompris/src/activities in these archives
    "monuments": ["categorization/resource/images/monuments", "explore_monuments/resource"],
    "tools": ["categorization/resource/images/tools"],
    "energy": ["categorization/resource/images/renewable"],
    "fishes": ["categorization/resource/images/fishes"],
    "animals": ["explore_farm_animals/resource/animals", "explore_world_animals/resource/animals"],
    "others": ["categorization/resource/images/others"],
}
FREE = ("Public Domain", "CC0-1.0")  # the licences, as the READMEs write them, that are kept
MISSPELT = {"screDriver.webp": "screwDriver.webp"}  # name in a README -> name of the file
MISSPELT["germany/audaPalatina.webp"] = "germany/aulaPalatina.webp"
SUBJECTS = {  # another photograph of the same thing: both fall on the same side
    "france/eiffelTower": "eiffelTower",
    "usa/mountRushmore": "mountRushmore",
    "usa/statueofLiberty": "statueOfLiberty",
    "wonders/greatWallofChina": "greatWall",
    "india/qutubMinar": "kutubMinar",
}
PHOTO_SIDE = 128  # pixels, the shorter side
PHOTO_QUALITY = 80  # of WebP
PHOTO_TEST_SHARE = 0.25  # of the subjects of each kind


def qt_resources(path):
    """{path inside: bytes} of a Qt resource archive (.rcc), whose format is described at
    https://doc.qt.io/qt-5/resources.html and defined by qtbase/src/corelib/io/qresource.cpp: a
    header of four numbers, a tree of records, names and data, all big-endian."""
    archive = path.read_bytes()
    magic, version, tree, data, names = struct.unpack_from(">4s4i", archive)
    assert magic == b"qres"
    record = 14 if version == 1 else 22  # bytes; later versions add the time of the last change

    def walk(node, folder):
        place = tree + record * node
        name_at, flags = struct.unpack_from(">iH", archive, place)
        (letters,) = struct.unpack_from(">H", archive, names + name_at)
        text = archive[names + name_at + 6 :][: 2 * letters].decode("utf-16-be") if node else ""
        here = f"{folder}/{text}" if node else ""
        if flags & 2:  # a folder
            count, first = struct.unpack_from(">2i", archive, place + 6)
            for child in range(first, first + count):
                yield from walk(child, here)
        else:
            (start,) = struct.unpack_from(">i", archive, place + 10)
            (size,) = struct.unpack_from(">i", archive, data + start)
            content = archive[data + start + 4 :][:size]
            yield here, zlib.decompress(content[4:]) if flags & 1 else content

    return dict(walk(0, ""))


def credits_of(readme):
    """{file: (author, source, licence)} from a README of GCompris: paragraphs of "Copyright:",
    "Source:", "License:" and the files that they hold for."""
    found = {}
    for paragraph in re.split(r"\n\s*\n", readme):
        head, _, files = paragraph.partition("Files:")
        fields = dict(re.findall(r"^(\w+): *(.*?) *$", head, re.MULTILINE))
        credit = tuple(fields.get(key, "") for key in ("Copyright", "Source", "License"))
        for file in files.split():
            found[MISSPELT.get(file, file)] = credit
    return found


def reduced(data):
    """An encoded photograph as a WebP file whose shorter side has PHOTO_SIDE pixels."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    factor = PHOTO_SIDE / min(picture.size)
    size = round(factor * picture.width), round(factor * picture.height)
    return webp(picture.resize(size, Image.Resampling.LANCZOS), PHOTO_QUALITY)


def webp(picture, quality, effort=6):
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=quality, method=effort)
    return out.getvalue()


def encoder():
    """Which library makes the WebP files: another version may make other bytes of a picture."""
    return np.array(f"libwebp {features.version('webp')}")


def joined(files):
    """Files as one array of bytes, and where in it each of them ends."""
    data = np.frombuffer(b"".join(files), np.uint8)
    return data, np.cumsum([len(file) for file in files]).astype(np.int32)


class Photo(NamedTuple):
    kind: int  # place in KINDS
    name: str
    data: bytes  # the file
    author: str
    source: str
    licence: str


def photos_of(folder):
    """The photographs in the package's archives that are free, each once."""
    found = {}  # by source: a photograph may be in two activities, the first is kept
    for kind, paths in enumerate(KINDS.values()):
        for path in paths:
            activity = path.split("/")[0]
            files = qt_resources(Path(folder) / ARCHIVES / f"{activity}.rcc")
            start = f"/gcompris/src/activities/{path}/"
            inside = {k.removeprefix(start): v for k, v in files.items() if k.startswith(start)}
            credit = credits_of(inside["README"].decode())
            for file in sorted(inside):
                if file.endswith(".webp"):
                    name = file.removesuffix(".webp")
                    photo = Photo(kind, name, inside[file], *credit[file])
                    if photo.licence in FREE:
                        found.setdefault(photo.source, photo)
    return list(found.values())


def photos(folder):
    debian_package("gcompris-qt-data", folder)
    rows = photos_of(folder)

    rng = np.random.default_rng(0)
    subjects = [SUBJECTS.get(photo.name, photo.name) for photo in rows]
    held_out = set()
    for kind in range(len(KINDS)):
        own = sorted({s for s, photo in zip(subjects, rows) if photo.kind == kind})
        shuffled = rng.permutation(own)
        held_out.update(shuffled[: round(PHOTO_TEST_SHARE * len(own))].tolist())

    arrays = {"kinds": np.array(list(KINDS)), "encoder": encoder()}
    for split in ("train", "test"):
        kept = [p for s, p in zip(subjects, rows) if (s in held_out) == (split == "test")]
        data, ends = joined([reduced(photo.data) for photo in kept])
        arrays[f"{split}_webp"] = data
        arrays[f"{split}_ends"] = ends
        arrays[f"{split}_labels"] = np.array([photo.kind for photo in kept], np.uint8)
        arrays[f"{split}_names"] = np.array([photo.name for photo in kept])
        arrays[f"{split}_authors"] = np.array([photo.author for photo in kept])
        arrays[f"{split}_sources"] = np.array([photo.source for photo in kept])
        arrays[f"{split}_licences"] = np.array([photo.licence for photo in kept])
    return arrays


# -------- Rendered scenes -------------------------------------------------------------------------

SCENES = {"train": 1000, "test": 250}
SCENE_QUALITY = 85  # of WebP


def scene_arrays(split, count, photos):
    """The arrays of the first `count` scenes of a split, {name: array}. photos: the arrays of
    photos.npz."""
    seeds = [(["train", "test"].index(split), number) for number in range(count)]
    textures = scenes.textures(photos, split)
    pictures, labels, _ = zip(*(scenes.render(seed, textures) for seed in seeds))
    data, ends = joined([webp(Image.fromarray(p), SCENE_QUALITY) for p in pictures])
    label = scenes.Labels(*(np.stack(values) for values in zip(*labels)))
    return {
        "webp": data,
        "ends": ends,
        "instances": label.instances,
        "depth": np.rint(256 * label.depth).astype(np.uint16),
        "normals": np.rint(127 * label.normals).astype(np.int8),
        "labels": label.labels,
        "boxes": label.boxes,
        "areas": label.areas,
        "keypoints": np.rint(256 * label.keypoints).astype(np.int16),
        "states": label.states,
    }


def solids(folder):
    photos = dict(np.load(HERE / "photos.npz"))
    arrays = {"shapes": np.array(scenes.NAMES), "encoder": encoder()}
    for split, count in SCENES.items():
        found = scene_arrays(split, count, photos)
        arrays |= {f"{split}_{name}": array for name, array in found.items()}
    contact_sheet(arrays).save(HERE / "solids.png", optimize=True)
    return arrays


COLOURS = np.array(  # of the background and the shapes, in the contact sheet
    [
        [30, 30, 30],
        [130, 40, 40],
        [40, 110, 40],
        [50, 60, 160],
        [130, 110, 30],
        [110, 50, 130],
        [40, 110, 120],
        [150, 90, 30],
        [130, 130, 130],
    ],
    np.uint8,
)
ROWS = ["image", "shapes", "normals", "depth"]  # of the contact sheet


def contact_sheet(arrays, count=5, zoom=2):
    """A picture of the first test scenes and their labels, one column per scene. Shapes: a colour
    for each, the boxes, and the points of the shapes, yellow if they are visible, red if not."""
    side = zoom * scenes.SIZE
    left = 52  # pixels, for the names of the rows
    sheet = Image.new("RGB", (left + count * (side + 4), len(ROWS) * (side + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(ROWS):
        draw.text((4, number * (side + 4) + side // 2), name, fill="black")

    starts = [0, *arrays["test_ends"].tolist()]
    for scene in range(count):
        labels = arrays["test_labels"][scene]
        instances = arrays["test_instances"][scene]
        depth = arrays["test_depth"][scene] / 256
        file = arrays["test_webp"][starts[scene] : starts[scene + 1]].tobytes()
        image = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        normals = arrays["test_normals"][scene] * [1, -1, -1] + 128.0  # blue faces the camera
        near = np.where(depth > 0, 255 * np.clip((7 - depth) / 5, 0, 1), 0)  # white is near
        shown = [image, COLOURS[np.append(0, labels)[instances]], normals]
        shown.append(np.repeat(near[..., None], 3, 2))
        for row, picture in enumerate(shown):
            tile = Image.fromarray(np.uint8(picture)).resize((side, side), Image.Resampling.NEAREST)
            if ROWS[row] == "shapes":
                draw_objects(ImageDraw.Draw(tile), arrays, scene, zoom)
            sheet.paste(tile, (left + scene * (side + 4), row * (side + 4)))
    return sheet


def draw_objects(draw, arrays, scene, zoom):
    for j in np.flatnonzero(arrays["test_labels"][scene]):
        x0, y0, x1, y1 = zoom * arrays["test_boxes"][scene, j].astype(int)
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline="white")
        places = zoom * arrays["test_keypoints"][scene, j] / 256
        states = arrays["test_states"][scene, j]
        for (x, y), state in zip(places[1:], states[1:]):  # without the centre
            if state >= 0:
                draw.rectangle((x - 1, y - 1, x, y), fill="yellow" if state else "red")


# -------- Animated emoji --------------------------------------------------------------------------

ANIMATED = [f"@lobehub/fluent-emoji-anim-{part}@1.0.0" for part in (1, 2, 3, 4)]  # npm, 730 MB
MOVERS = 400  # emoji
MOVER_FRAMES = 16  # every third frame of an animation with 24 frames per second
MOVER_SIDE = 48  # pixels
MOVER_QUALITY = 75  # of WebP; the transparency is stored without loss
MOVER_EFFORT = 4  # of WebP; the highest, 6, would take ten minutes more and save 6 %
MEANINGLESS = {"200d", "2640", "2642", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}  # joiner, sexes, hair
NEUTRAL = {  # man or woman -> person, boy or girl -> child, old man or woman -> old person
    "1f468": "1f9d1",
    "1f469": "1f9d1",
    "1f466": "1f9d2",
    "1f467": "1f9d2",
    "1f474": "1f9d3",
    "1f475": "1f9d3",
}
HEARTS = "1f499 1f49a 1f49b 1f49c 1f5a4 1f90d 1f90e 1f9e1"  # blue, green, ...
NEUTRAL |= dict.fromkeys(HEARTS.split(), "2764")  # the red one


def motion_group(code):
    """What emoji have in common that move alike: "1f469-200d-1f52c", a woman who is a scientist ->
    "1f9d1-1f52c"."""
    parts = [NEUTRAL.get(part, part) for part in code.split("-") if part not in MEANINGLESS]
    return "-".join(parts)


def animation(data):
    """An animated WebP file -> (MOVER_FRAMES, MOVER_SIDE, MOVER_SIDE, 4) uint8, RGBA, 8 frames per
    second; None if it does not move. Short animations are repeated: all of them are loops."""
    file = Image.open(io.BytesIO(data))
    if file.n_frames == 1:
        return None
    frames = []  # 24 per second
    for number in range(min(file.n_frames, 3 * MOVER_FRAMES)):
        file.seek(number)
        picture = file.convert("RGBA").resize((MOVER_SIDE, MOVER_SIDE), Image.Resampling.BOX)
        frames += round(file.info["duration"] * 24 / 1000) * [picture]  # equal ones are stored once
    return np.stack([frames[3 * number % len(frames)] for number in range(MOVER_FRAMES)])


def liveliness(frames):
    """Mean change of a pixel from frame to frame, before grey."""
    opaque = frames[..., 3:] / 255
    seen = frames[..., :3] * opaque + 127 * (1 - opaque)
    return np.abs(np.diff(seen, axis=0)).mean()


def sheet(frames):
    """The 16 frames of an animation as one picture, four in a row. It is smaller than an animated
    WebP file and cannot lose a frame: encoders merge frames that are equal."""
    rows = [np.concatenate(list(row), 1) for row in frames.reshape(4, 4, *frames.shape[1:])]
    return Image.fromarray(np.concatenate(rows))


def movers(folder):
    with np.load(HERE / "emoji.npz") as file:
        known = dict(file)
    row = {code: number for number, code in enumerate(known["codepoints"].tolist())}

    # Of emoji that move alike only the liveliest is kept, so no motion is on both sides.
    best = {}  # motion group -> liveliness, code points, frames
    for spec in ANIMATED:
        files = npm_package(spec, folder)
        for path, data in files.items():
            code = codepoints(Path(path).stem)
            frames = animation(data) if path.endswith(".webp") and code in row else None
            if frames is not None:
                found = liveliness(frames), code, frames
                group = motion_group(code)
                best[group] = max(best.get(group, found), found, key=lambda entry: entry[:2])
    chosen = sorted(best.values(), key=lambda entry: entry[:2])[-MOVERS:]
    frames = {row[code]: frames for _, code, frames in chosen}

    arrays = {"categories": known["categories"], "encoder": encoder()}
    for split in ("train", "test"):
        labels = dict(zip(known[f"{split}_emoji"].tolist(), known[f"{split}_labels"].tolist()))
        kept = sorted(frames.keys() & labels.keys())
        sheets = [sheet(frames[emoji]) for emoji in kept]
        data, ends = joined([webp(x, MOVER_QUALITY, MOVER_EFFORT) for x in sheets])
        arrays[f"{split}_webp"] = data
        arrays[f"{split}_ends"] = ends
        arrays[f"{split}_labels"] = np.array([labels[emoji] for emoji in kept], np.uint8)
        arrays[f"{split}_emoji"] = np.array(kept, np.int16)
        arrays[f"{split}_names"] = known["names"][kept]
        arrays[f"{split}_codepoints"] = known["codepoints"][kept]
    return arrays


if __name__ == "__main__":
    builders = {f.__name__: f for f in (emoji, fashion, photos, solids, movers)}
    for build in (builders[name] for name in sys.argv[1:] or builders):
        with tempfile.TemporaryDirectory() as folder:
            arrays = build(folder)
        path = HERE / f"{build.__name__}.npz"
        np.savez_compressed(path, **arrays)
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB,",
            ", ".join(f"{k} {v.shape}" for k, v in arrays.items()),
        )
