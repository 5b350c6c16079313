"""Draws movers.png: eight clips of the embedded set `movers` with masks and flow.

    python tests/data/clips.py

Colours of the flow: the hue is the direction, red to the right, green-yellow downwards; white does
not move, full colours move 10 pixels per frame or more.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from kernels.movers import MOTIONS, load_movers, render  # noqa: I001

TIMES = (0, 3, 6, 9)  # frames that are shown
LABELLED = (0, 6)  # of them with masks and flow
SEEDS = range(200)  # of them the first of each motion
FASTEST = 10  # pixels per frame
ZOOM = 2
COLOURS = np.array([[40, 40, 40], [230, 150, 40], [60, 140, 230]], np.uint8)  # by number in a mask


def flow_colours(flow):
    """(2, 48, 48) -> (48, 48, 3) uint8."""
    hue = np.arctan2(flow[1], flow[0]) / (2 * np.pi) % 1
    speed = np.clip(np.hypot(flow[0], flow[1]) / FASTEST, 0, 1)
    hsv = np.stack([255 * hue, 255 * speed, np.full_like(hue, 255)], 2)
    return np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))


def picture(clips):
    """A row per clip: some frames, then masks and flow of two of them."""
    side = 48 * ZOOM + 4
    left = 60  # pixels, for the names of the motions
    top = 16
    columns = [("frame", t) for t in TIMES]
    columns += [(kind, t) for kind in ("mask", "flow") for t in LABELLED]
    size = left + side * len(columns), top + side * len(clips.frames)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    flow = clips.flow.numpy()
    for column, (kind, t) in enumerate(columns):
        draw.text((left + side * column + 4, 2), f"{kind} {t}", fill="black")
        for row in range(len(clips.frames)):
            tile = {
                "frame": clips.frames[row, t].permute(1, 2, 0).numpy(),
                "mask": COLOURS[clips.masks[row, t].numpy()],
                "flow": flow_colours(flow[row, t]),
            }[kind]
            enlarged = tile.repeat(ZOOM, 0).repeat(ZOOM, 1)
            sheet.paste(Image.fromarray(enlarged), (left + side * column, top + side * row))
    for row, motion in enumerate(clips.motion[:, -1].tolist()):
        draw.text((4, top + side * row + side // 2), MOTIONS[motion], fill="black")
    return sheet


if __name__ == "__main__":
    clips = render(load_movers("test"), SEEDS, objects=2, still=True)
    motions = clips.motion[:, -1].tolist()  # of the object that is before the other one
    clips = clips.part([motions.index(number) for number in range(len(MOTIONS))])
    picture(clips).save(HERE / "movers.png", optimize=True)
