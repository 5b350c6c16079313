"""Rebuilds the embedded data sets from package indexes: every byte of them can be traced.

    apt-get install npm libcairo2 dpkg apt && pip install numpy pillow cairosvg==2.9.0 av
    python tests/data/build.py         # half an hour, 1 GB of downloads, writes beside this file
    python tests/data/build.py solids  # only this file

emoji.npz: every base emoji (no skin-tone variants) that all four drawings below have, 32x32 RGB,
composed on white.
fashion.npz: the first 10,000 training and first 2,000 test images of Fashion-MNIST, 28x28 grey.
photos.npz: the photographs of GCompris that are in the public domain or under CC0, as WebP files.
solids.npz: rendered scenes with dense labels; scenes.py renders them, photos.npz has the textures.
bunny.npz: the film Big Buck Bunny, small, cut into the shots of bunny_shots.tsv, with its sound.
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


# -------- A film ----------------------------------------------------------------------------------

FILM_PACKAGE = "moviepy", "2.2.1"  # its source distribution has the film among its examples
FILM_HASH = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"  # SHA-256 of this
FILM_ARCHIVE = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
FILM_PATH = "moviepy_10_minutes/resources/bbb.mp4"  # in this archive
FILM_SIZE = 96, 54  # pixels: width, height
FILM_QUALITY = 50  # of WebP
FRAME_TIME = 83  # milliseconds from frame to frame as WebP files count them: 1/12 s, rounded
SUBJECTS_OF_FILM = ["rabbit", "rodents", "neither", "mixed"]
TEST_BLOCKS = {2, 6, 10, 11}  # of bunny_shots.tsv, a quarter of the shots

SOUND_RATE = 44100  # samples per second
SOUND_HOP = 882  # samples: 50 rows of the spectrogram per second
SOUND_WINDOW = 2048  # samples, 46 milliseconds
SOUND_BANDS = 48
SOUND_RANGE = 50, 10_000  # Hz
SOUND_FLOOR = -100  # decibels below a sine of full scale; stored as 0, full scale as 255


class Shot(NamedTuple):
    """A row of bunny_shots.tsv. Frame i is frame 2i of the film, at i/12 seconds."""

    first: int  # frame
    last: int  # frame, which belongs to the shot
    subject: str
    butterfly: int  # 1: one is seen
    block: int

    @property
    def rows(self):
        """Which rows of the sound: those whose middle is heard during the shot. Row r lasts from
        r/50 to (r + 1)/50 seconds."""
        return range(*((25 * frame + 2) // 6 for frame in (self.first, self.last + 1)))


def film_shots():
    with open(HERE / "bunny_shots.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [Shot(**{k: v if k == "subject" else int(v) for k, v in row.items()}) for row in rows]


def film_of(folder):
    """Downloads the package and returns the path of the film in it."""
    name, version = FILM_PACKAGE
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
    subprocess.run([*pip, "--dest", folder, f"{name}=={version}"], check=True)
    package = Path(folder) / f"{name}-{version}.tar.gz"
    assert hashlib.sha256(package.read_bytes()).hexdigest() == FILM_HASH
    with tarfile.open(package) as tar:
        archive = tar.extractfile(f"{name}-{version}/{FILM_ARCHIVE}").read()
    return zipfile.ZipFile(io.BytesIO(archive)).extract(FILM_PATH, folder)


def rgb(frame):
    """A decoded frame as a small RGB image. Its planes (brightness, and two colour differences at
    half the size) are made small first. Not done by the decoder's library, whose results differ
    from processor to processor."""
    planes = []
    for plane in frame.planes:
        pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        picture = Image.fromarray(pixels[:, : plane.width])  # without the padding of the lines
        picture = picture.resize(FILM_SIZE, Image.Resampling.LANCZOS)
        planes.append(np.asarray(picture, np.float64))

    # ITU-R BT.709: brightness from 16 to 235, colour differences from 16 to 240.
    y = (planes[0] - 16) / 219
    blue, red = ((plane - 128) / 224 for plane in planes[1:])
    r = y + 1.5748 * red
    g = y - 0.1873 * blue - 0.4681 * red
    b = y + 1.8556 * blue
    return np.rint(255 * np.stack([r, g, b], -1).clip(0, 1)).astype(np.uint8)


def pictures_of(path, shots):
    """Yields the pictures of each shot, a list of Images. Every second frame is kept."""
    import av  # the other sets need no film

    with av.open(path) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == 24
        frames = (f for number, f in enumerate(file.decode(stream)) if number % 2 == 0)
        number = -1
        for shot in shots:
            pictures = []
            while number < shot.last:
                frame = next(frames)
                number += 1
                if number >= shot.first:
                    pictures.append(Image.fromarray(rgb(frame)))
            yield pictures


def animation(pictures):
    """Pictures as one animated WebP file. The encoder stores equal pictures once, with a longer
    duration: a reader must repeat them. Without any movement it stores no duration at all.

    Each picture is compressed on its own (kmax=1). Otherwise those of a group would share the
    errors of the compression in what does not move, which tells which frames are neighbours."""
    out = io.BytesIO()
    others = {"save_all": True, "append_images": pictures[1:], "duration": FRAME_TIME}
    pictures[0].save(out, "WEBP", quality=FILM_QUALITY, method=6, kmin=0, kmax=1, **others)
    return out.getvalue()


def samples_of(path):
    """The film's sound, both channels averaged, (samples,) from -1 to 1."""
    import av

    with av.open(path) as file:
        stream = file.streams.audio[0]
        assert stream.rate == SOUND_RATE
        return np.concatenate([frame.to_ndarray().mean(0) for frame in file.decode(stream)])


def mel_filters():
    """(SOUND_BANDS, frequencies): triangles that overlap by half, evenly spaced in mel."""
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in SOUND_RANGE)
    corners = 700 * (10 ** (np.linspace(low, high, SOUND_BANDS + 2) / 2595) - 1)  # Hz
    left, top, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    hertz = np.fft.rfftfreq(SOUND_WINDOW, 1 / SOUND_RATE)
    return np.minimum((hertz - left) / (top - left), (right - hertz) / (right - top)).clip(0)


def log_mel(samples, rows):
    """Rows of the log-mel spectrogram, (rows, SOUND_BANDS) uint8: loudness in decibels from
    SOUND_FLOOR to 0. Row r is heard through a window around the middle of row r."""
    window = np.hanning(SOUND_WINDOW + 1)[:-1]
    padded = np.pad(samples, SOUND_WINDOW)
    starts = np.array(rows) * SOUND_HOP + SOUND_HOP // 2 + SOUND_WINDOW // 2
    parts = padded[starts[:, None] + np.arange(SOUND_WINDOW)]
    whole = SOUND_WINDOW * (window**2).sum() / 4  # of a sine of full scale, over all frequencies
    power = np.abs(np.fft.rfft(window * parts)) ** 2 / whole
    decibels = 10 * np.log10(power @ mel_filters().T + 1e-12)
    return np.rint(255 * (1 - decibels / SOUND_FLOOR).clip(0, 1)).astype(np.uint8)


def bunny(folder):
    path = film_of(folder)
    shots = film_shots()
    files = [animation(pictures) for pictures in pictures_of(path, shots)]
    samples = samples_of(path)

    arrays = {"subjects": np.array(SUBJECTS_OF_FILM), "encoder": encoder()}
    for split in ("train", "test"):
        numbers = [i for i, s in enumerate(shots) if (s.block in TEST_BLOCKS) == (split == "test")]
        kept = [shots[i] for i in numbers]
        sounds = [log_mel(samples, shot.rows) for shot in kept]
        subjects = [SUBJECTS_OF_FILM.index(shot.subject) for shot in kept]
        data, ends = joined([files[i] for i in numbers])
        arrays[f"{split}_webp"] = data
        arrays[f"{split}_ends"] = ends
        arrays[f"{split}_sound"] = np.concatenate(sounds)
        arrays[f"{split}_sound_ends"] = np.cumsum([len(s) for s in sounds]).astype(np.int32)
        arrays[f"{split}_numbers"] = np.array(numbers, np.uint8)
        arrays[f"{split}_frames"] = np.array([(s.first, s.last) for s in kept], np.int16)
        arrays[f"{split}_labels"] = np.array(subjects, np.uint8)
        arrays[f"{split}_butterfly"] = np.array([bool(shot.butterfly) for shot in kept])
        arrays[f"{split}_blocks"] = np.array([shot.block for shot in kept], np.uint8)
    return arrays


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


def frames_of(data):
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
            frames = frames_of(data) if path.endswith(".webp") and code in row else None
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
    builders = {f.__name__: f for f in (emoji, fashion, photos, solids, bunny, movers)}
    for build in (builders[name] for name in sys.argv[1:] or builders):
        with tempfile.TemporaryDirectory() as folder:
            arrays = build(folder)
        path = HERE / f"{build.__name__}.npz"
        np.savez_compressed(path, **arrays)
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB,",
            ", ".join(f"{k} {v.shape}" for k, v in arrays.items()),
        )
