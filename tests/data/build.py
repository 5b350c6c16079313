"""Rebuilds emoji.npz and fashion.npz from package indexes: every byte of them can be traced.

    apt-get install npm libcairo2 dpkg apt && pip install numpy pillow cairosvg==2.9.0
    python tests/data/build.py         # two minutes, 180 MB of downloads, writes beside this file

emoji.npz: every base emoji (no skin-tone variants) that all four drawings below have, 32x32 RGB,
composed on white.
fashion.npz: the first 10,000 training and first 2,000 test images of Fashion-MNIST, 28x28 grey.
Licences and array contents: README.md beside this file.
"""

import gzip
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import cairosvg
import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
SIZE = 32  # pixels, both sides
NPM = {  # drawing -> the npm package and version it is read from
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "noto": "emoji-datasource-google@16.0.0",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
DEB = "dataset-fashion-mnist"
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


def fashion(folder):
    subprocess.run(["apt-get", "download", DEB], cwd=folder, check=True)
    package = next(Path(folder).glob(f"{DEB}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)

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


if __name__ == "__main__":
    for build in (emoji, fashion):
        with tempfile.TemporaryDirectory() as folder:
            arrays = build(folder)
        path = HERE / f"{build.__name__}.npz"
        np.savez_compressed(path, **arrays)
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB,",
            ", ".join(f"{k} {v.shape}" for k, v in arrays.items()),
        )
