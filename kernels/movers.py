"""Video clips with exact labels: animated emoji that bounce, roll or swing before a photograph.

    ingredients = load_movers("train")
    clips = render(ingredients, range(64), objects=2)
    clips.frames                 # (64, 12, 3, 48, 48) uint8
    clips.masks, clips.flow      # which object a pixel shows, and where it moves

A clip lasts 12 frames, 12 per second. Its background is a crop of a photograph that moves evenly:
the camera pans. Before it one or two emoji move in one of eight ways (MOTIONS). They move relative
to the frame, not to the photograph, as if the camera went with them. With tripod=True the camera
stands still: otherwise the background alone tells in which order frames were filmed.

A seed is a clip: it has the same content on every machine, in every batch and on every device. The
pixels may differ by one grey level between kinds of processors, which round differently.

Time has a direction because energy is lost. Each bounce is lower than the one before, what rolls
or slides comes to rest, a swing dies away. What nature shows in both directions is drawn in both:
"approach" also goes away, "rise" also sinks, always ever slower. With lossless=True nothing is
lost, and with still=True an emoji does not change by itself: then a clip played backwards is as
likely as the clip, and no one can tell them apart. It is the control of a method that looks for
time's direction.

Emoji and photographs of the two splits are different (tests/data/README.md).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kernels.readers import DATA, arrays_of, decode_webp, load_photos

MOVERS = DATA / "movers.npz"
SIDE = 48  # pixels, of a frame and of a stored emoji
MIDDLE = SIDE / 2
FRAMES = 12
RATE = 12  # frames per second
DURATION = (FRAMES - 1) / RATE  # seconds from the first to the last frame
EMOJI_RATE = 8  # frames per second of the stored animations
PAN = 3.5  # pixels per frame: rounded, the camera's motion has seven values along each axis
GRAVITY = 400  # pixels per second and second
BOUNCES = 10  # after so many, a thing lies still


# -------- The ingredients -------------------------------------------------------------------------


class Ingredients(NamedTuple):
    """Emoji and photographs of a split."""

    emoji: torch.Tensor  # (E, 16, 4, 48, 48) uint8: red, green, blue times opacity, and opacity
    labels: torch.Tensor  # (E,) int64: category, a row of `categories`
    names: list  # E texts
    categories: tuple  # 9 texts
    photos: torch.Tensor  # (P, 3, H, W) uint8; right of and below a photograph is nothing
    sizes: torch.Tensor  # (P, 2) int64, on the CPU: width and height of each photograph


def load_movers(split, device="cpu", path=MOVERS):
    """The Ingredients of a split, "train" or "test"."""
    arrays = arrays_of(split, path)
    sheets = torch.stack(decode_webp(arrays, "RGBA"))  # (E, 4, 192, 192): 4 x 4 frames
    tiles = sheets.unflatten(2, (4, SIDE)).unflatten(4, (4, SIDE))
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (E, 16, 4, 48, 48)

    images = load_photos(split).images
    sizes = torch.tensor([[image.shape[2], image.shape[1]] for image in images])
    width, height = sizes.amax(0).tolist()
    padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images]
    return Ingredients(
        emoji=torch.stack([softened(frames) for frames in tiles]).to(device),
        labels=torch.from_numpy(arrays["labels"]).long().to(device),
        names=arrays["names"].tolist(),
        categories=tuple(arrays["categories"].tolist()),
        photos=torch.stack(padded).to(device),
        sizes=sizes,
    )


def softened(frames):
    """RGBA frames (16, 4, 48, 48) uint8 -> colours times opacity, and opacity. Each pixel becomes a
    mean of 3 x 3: an emoji is drawn at half its size or less, and would flicker without it."""
    frames = frames.float()
    opacity = frames[:, 3:]
    frames = torch.cat([frames[:, :3] * opacity / 255, opacity], 1)
    return F.avg_pool2d(frames, 3, stride=1, padding=1).round().byte()


# -------- Physics ---------------------------------------------------------------------------------
#
# A motion is a function of uniform random numbers of m objects, of the times t (T,) in seconds, and
# of whether nothing is lost. It returns x, y, angle and scale, each (m, T) or (m, 1). x points to
# the right and y down, in pixels; a positive angle turns clockwise; scale 1 is 48 pixels wide.


class Draws:
    """Random numbers between 0 and 1 of m objects, (m, K). Each column is used once."""

    def __init__(self, numbers):
        self.columns = iter(numbers.T[:, :, None].copy())

    def uniform(self, low, high):
        """(m, 1) numbers."""
        return low + (high - low) * next(self.columns)

    def sign(self):
        """-1 or 1, (m, 1)."""
        return np.where(next(self.columns) < 0.5, -1.0, 1.0)

    def scale(self):
        return self.uniform(0.34, 0.5)

    def tilt(self):
        """An angle near upright."""
        return self.uniform(-0.3, 0.3)


def floor(scale):
    """y of a thing that lies on the floor."""
    return SIDE - 1 - MIDDLE * scale


def gliding(draws, t, lossless):
    """Which share of its way a thing has gone: from 0 to 1. Friction slows it down evenly until it
    rests; without, it goes evenly."""
    rest = draws.uniform(0.6, 1.1)  # seconds
    if lossless:
        return t / DURATION
    left = 1 - np.minimum(t / rest, 1)
    return 1 - left**2


def swaying(draws, t, lossless, slowest, fastest, losses):
    """A vibration of amplitude 1 that dies away. Frequencies in radians per second."""
    frequency = draws.uniform(slowest, fastest)
    phase = draws.uniform(0, 2 * math.pi)
    loss = draws.uniform(*losses)  # of the amplitude, per second
    amplitude = 1 if lossless else np.exp(-loss * t)
    return amplitude * np.cos(frequency * t + phase)


def hopping(draws, t, lossless, scale, kept):
    """Height above the floor of a thing that bounces, in pixels, and for how many seconds it would
    have gone at its first speed to get as far to the side.

    Between two bounces it flies freely: height = u s - GRAVITY s^2 / 2 after s seconds. At each
    bounce it keeps the same share of its speed upwards, to the side, and of its spin."""
    space = floor(scale) - MIDDLE * scale
    top = draws.uniform(0.7, 1) * space  # pixels, of the first flight
    speed = np.sqrt(2 * GRAVITY * top)
    kept = draws.uniform(*kept)
    if lossless:
        kept = 1.0

    # The first flight has begun before the clip.
    left = t + draws.uniform(0, 1) * 2 * speed / GRAVITY  # seconds since this flight began
    share = 1.0  # of the first speed
    height = 0
    sideways = 0
    for _ in range(BOUNCES):
        flight = 2 * speed * share / GRAVITY
        flown = np.clip(left, 0, flight)
        height = height + flown * (speed * share - GRAVITY / 2 * flown)
        sideways = sideways + share * flown
        left = left - flight
        share = share * kept
    return height, sideways - (sideways[:, :1] + sideways[:, -1:]) / 2


def bounce(draws, t, lossless):
    scale = draws.scale()
    height, sideways = hopping(draws, t, lossless, scale, (0.55, 0.8))
    middle = MIDDLE + draws.uniform(-8, 8)
    x = middle + draws.uniform(-20, 20) * sideways
    return x, floor(scale) - height, draws.tilt(), scale


def launch(draws, t, lossless):
    """A throw, with spin."""
    scale = draws.scale()
    height, sideways = hopping(draws, t, lossless, scale, (0.2, 0.4))
    direction = draws.sign()
    middle = MIDDLE + draws.uniform(-5, 5)
    x = middle + direction * draws.uniform(28, 45) * sideways
    spin = direction * draws.uniform(5, 9)  # radians per second
    angle = draws.uniform(0, 2 * math.pi) + spin * sideways
    return x, floor(scale) - height, angle, scale


def slide(draws, t, lossless):
    scale = draws.scale()
    way = draws.sign() * draws.uniform(22, 34)  # pixels
    x = MIDDLE + way * (gliding(draws, t, lossless) - 0.5)
    return x, floor(scale), draws.tilt(), scale


def roll(draws, t, lossless):
    scale = draws.scale()
    way = draws.sign() * draws.uniform(22, 34)
    rolled = way * (gliding(draws, t, lossless) - 0.5)
    angle = draws.uniform(0, 2 * math.pi) + rolled / (MIDDLE * scale)
    return MIDDLE + rolled, floor(scale), angle, scale


def swing(draws, t, lossless):
    """A pendulum that hangs from the upper edge of the frame."""
    scale = draws.scale()
    length = draws.uniform(23, 29)  # pixels
    amplitude = draws.uniform(0.5, 0.9)
    angle = amplitude * swaying(draws, t, lossless, 6, 9, (1, 2.5))
    pivot = MIDDLE + draws.uniform(-7, 7)
    x = pivot + length * np.sin(angle)
    y = draws.uniform(-3, 3) + length * np.cos(angle)
    return x, y, -angle, scale


def rise(draws, t, lossless):
    """A bubble, or one that sinks; it sways a little."""
    scale = draws.scale()
    way = draws.sign() * draws.uniform(20, 32)
    y = MIDDLE + way * (gliding(draws, t, lossless) - 0.5)
    middle = MIDDLE + draws.uniform(-12, 12)
    amplitude = draws.uniform(2, 4)
    x = middle + amplitude * swaying(draws, t, lossless, 5, 8, (1, 2))
    return x, y, draws.tilt(), scale


def approach(draws, t, lossless):
    """To the camera or away from it. What is twice as far is half as large and half as far from the
    middle of the frame."""
    near = draws.uniform(0.6, 0.75)
    far = near / draws.uniform(2, 2.6)
    nearer = draws.sign() > 0
    first = np.where(nearer, 1 / far, 1 / near)  # distances
    last = np.where(nearer, 1 / near, 1 / far)
    scale = 1 / (first + (last - first) * gliding(draws, t, lossless))
    x = MIDDLE + draws.uniform(-14, 14) * scale
    y = MIDDLE + draws.uniform(-14, 14) * scale
    return x, y, draws.tilt(), scale


def shake(draws, t, lossless):
    scale = draws.scale()
    amplitude = draws.uniform(0.35, 0.6)
    angle = amplitude * swaying(draws, t, lossless, 12, 18, (1.5, 3))
    x = MIDDLE + draws.uniform(-12, 12)
    y = MIDDLE + draws.uniform(-12, 12)
    return x, y, angle, scale


MOVES = (bounce, roll, slide, swing, rise, approach, launch, shake)
MOTIONS = tuple(move.__name__ for move in MOVES)


def poses(motion, numbers, t, lossless):
    """Motions (m,) and random numbers (m, OF_MOTION) -> (m, T, 4): x, y, angle, scale."""
    found = np.empty((len(motion), len(t), 4))
    for number, move in enumerate(MOVES):
        rows = motion == number
        parts = move(Draws(numbers[rows]), t, lossless)
        found[rows] = np.stack(np.broadcast_arrays(*parts), -1)
    return found


# -------- What happens in a clip ------------------------------------------------------------------

OF_CAMERA = 5  # random numbers
OF_MOTION = 12
OF_OBJECT = 3 + OF_MOTION


class Script(NamedTuple):
    """What the seeds decide, on the device. Steps: numbers of the stored frames of an emoji."""

    photo: torch.Tensor  # (n,) int64
    size: torch.Tensor  # (n, 2) int64: width and height of the photograph
    corner: torch.Tensor  # (n, 2) x, y of the crop in the photograph, in the first frame
    camera: torch.Tensor  # (n, 2) pixels per frame
    identity: torch.Tensor  # (n, objects) int64
    steps: torch.Tensor  # (n, T, objects) int64
    motion: torch.Tensor  # (n, objects) int64
    pose: torch.Tensor  # (n, T, objects, 4)


def write_script(ingredients, seeds, objects, still, lossless, tripod):
    """All of it is computed on the CPU, so that every device gets the same."""
    count = OF_CAMERA + objects * OF_OBJECT
    numbers = [np.random.default_rng(int(seed)).random(count) for seed in seeds]
    of_clip, of_objects = np.split(np.stack(numbers), [OF_CAMERA], axis=1)

    # The camera moves evenly, and never leaves the photograph.
    photo = (of_clip[:, 0] * len(ingredients.photos)).astype(int)
    camera = (0 if tripod else PAN) * (2 * of_clip[:, 1:3] - 1)
    way = camera * (FRAMES - 1)
    size = ingredients.sizes.numpy()[photo]
    space = size - SIDE - np.abs(way)
    corner = np.maximum(-way, 0) + space * of_clip[:, 3:5]

    # The motions.
    of_objects = of_objects.reshape(-1, OF_OBJECT)  # (n objects, ...)
    identity = (of_objects[:, 0] * len(ingredients.emoji)).astype(int)
    motion = (of_objects[:, 1] * len(MOVES)).astype(int)
    times = np.arange(FRAMES) / RATE
    pose = poses(motion, of_objects[:, 3:], times, lossless)

    # Stored animations are slower than the clip, so some frames are shown twice. Which ones depends
    # on the random start: otherwise they would tell the direction of time.
    stored = ingredients.emoji.shape[1]
    start = of_objects[:, 2:3] * (stored - FRAMES * EMOJI_RATE / RATE)
    steps = np.floor(start + (0 if still else EMOJI_RATE) * times).astype(int)

    def of_clips(array, dtype):
        array = torch.from_numpy(array).unflatten(0, (-1, objects))
        return array.to(ingredients.photos.device, dtype)

    def on_device(array):
        return torch.from_numpy(array).to(ingredients.photos.device)

    return Script(
        photo=on_device(photo),
        size=on_device(size),
        corner=on_device(corner.astype(np.float32)),
        camera=on_device(camera.astype(np.float32)),
        identity=of_clips(identity, torch.int64),
        steps=of_clips(steps, torch.int64).mT,
        motion=of_clips(motion, torch.int64),
        pose=of_clips(pose, torch.float32).transpose(1, 2),
    )


# -------- Rendering -------------------------------------------------------------------------------


class Clips(NamedTuple):
    """n clips of T = 12 frames. The centre of pixel (i, j) is at x = j + 0.5, y = i + 0.5."""

    frames: torch.Tensor  # (n, T, 3, 48, 48) uint8, RGB
    masks: torch.Tensor  # (n, T, 48, 48) uint8: 0 background, 1 the first object, 2 the second
    pose: torch.Tensor  # (n, T, objects, 4): x, y in pixels, angle in radians, scale; 1 is 48 wide
    identity: torch.Tensor  # (n, objects) int64: emoji, a row of the ingredients
    category: torch.Tensor  # (n, objects) int64: a row of `categories`
    motion: torch.Tensor  # (n, objects) int64: a row of MOTIONS
    camera: torch.Tensor  # (n, 2) x, y: how far the camera moves per frame, in pixels

    def part(self, index):
        """Some of the clips, by numbers or a slice."""
        return Clips(*(values[index] for values in self))

    @property
    def flow(self):
        """(n, T - 1, 2, 48, 48) x, y in pixels: what pixel p of frame t shows is at p + flow in
        frame t + 1. It is computed anew at each use, from poses and masks. An emoji's own animation
        is not in it; with still=True there is none."""
        p = pixel_centres(self.camera.device)
        found = -self.camera[:, None, :, None, None]  # (n, 1, 2, 1, 1)
        for number in range(self.pose.shape[2]):
            x, y, angle, scale = self.pose[:, :, number, :, None, None].unbind(2)  # (n, T, 1, 1)
            turn = angle[:, 1:] - angle[:, :-1]
            growth = scale[:, 1:] / scale[:, :-1]
            cos = growth * turn.cos()
            sin = growth * turn.sin()
            across = p[0] - x[:, :-1]  # from the object's centre, (n, T - 1, 48, 48)
            down = p[1] - y[:, :-1]
            own_x = x[:, 1:] + cos * across - sin * down - p[0]
            own_y = y[:, 1:] + sin * across + cos * down - p[1]
            own = torch.stack([own_x, own_y], 2)
            found = torch.where(self.masks[:, :-1, None] == number + 1, own, found)
        return found


@torch.no_grad()
def render(ingredients, seeds, objects=1, still=False, lossless=False, tripod=False):
    """Clips, one for each of the seeds (numbers from 0 on), on the device of the ingredients.

    objects: emoji per clip; later ones are before earlier ones. still: the emoji themselves do not
    move, so that the flow is all of the motion. lossless: no energy is lost. tripod: the camera
    stands still. With other settings a seed still has the same emoji, motions and photograph."""
    few = 16 if ingredients.photos.device.type == "cpu" else 512  # what fits into a CPU's cache
    parts = []
    for start in range(0, len(seeds), few):
        some = seeds[start : start + few]
        script = write_script(ingredients, some, objects, still, lossless, tripod)
        parts.append(draw(ingredients, script))
    return Clips(*(torch.cat(values) for values in zip(*parts)))


def draw(ingredients, script):
    """Script -> Clips."""
    frames = backgrounds(ingredients, script)  # (n, T, 3, 48, 48)
    masks = torch.zeros_like(frames[:, :, 0], dtype=torch.uint8)
    for number in range(script.identity.shape[1]):
        identity = script.identity[:, number, None]
        tiles = ingredients.emoji[identity, script.steps[:, :, number]]  # (n, T, 4, 48, 48)
        grid = inside(script.pose[:, :, number])
        drawn = F.grid_sample(
            tiles.flatten(0, 1).float(), grid.flatten(0, 1), align_corners=False
        ).unflatten(0, grid.shape[:2])

        opacity = drawn[:, :, 3:] / 255
        frames = drawn[:, :, :3] + frames * (1 - opacity)
        masks.masked_fill_(opacity[:, :, 0] > 0.5, number + 1)
    return Clips(
        frames=frames.round_().clamp_(max=255).byte(),
        masks=masks,
        pose=script.pose,
        identity=script.identity,
        category=ingredients.labels[script.identity],
        motion=script.motion,
        camera=script.camera,
    )


def pixel_centres(device):
    """x and y of the pixels of a frame, (2, 48, 48)."""
    places = torch.arange(SIDE, device=device) + 0.5
    return torch.stack(torch.meshgrid(places, places, indexing="xy"))


def inside(pose):
    """Where in an emoji each pixel lies: pose (n, T, 4) -> (n, T, 48, 48, 2), from -1 to 1."""
    p = pixel_centres(pose.device)
    x, y, angle, scale = pose[..., None, None].unbind(2)
    cos = angle.cos() / (MIDDLE * scale)
    sin = angle.sin() / (MIDDLE * scale)
    across = p[0] - x
    down = p[1] - y
    return torch.stack([cos * across + sin * down, cos * down - sin * across], -1)


def backgrounds(ingredients, script):
    """The photograph as the panning camera sees it, (n, T, 3, 48, 48), 0 to 255."""
    # Only a window of the photograph is needed, which starts at a whole pixel.
    device = script.corner.device
    time = torch.arange(FRAMES, device=device)
    corners = script.corner[:, None] + time[:, None] * script.camera[:, None]  # (n, T, 2)
    first = corners.amin(1).floor().long().clamp(min=0)  # (n, 2)
    window = SIDE + math.ceil(PAN * (FRAMES - 1)) + 2
    columns, rows = (first[..., None] + torch.arange(window, device=device)).unbind(1)
    width, height = script.size[..., None].unbind(1)
    rows = rows.minimum(height - 1)[:, :, None]
    columns = columns.minimum(width - 1)[:, None, :]
    photo = script.photo[:, None, None]
    windows = ingredients.photos[photo, :, rows, columns].permute(0, 3, 1, 2).float()

    places = (corners - first[:, None])[..., None, None] + pixel_centres(device)
    grid = 2 / window * places.permute(0, 1, 3, 4, 2) - 1  # (n, T, 48, 48, 2)
    windows = windows[:, None].expand(-1, FRAMES, -1, -1, -1)
    seen = F.grid_sample(windows.flatten(0, 1), grid.flatten(0, 1), align_corners=False)
    return seen.unflatten(0, (-1, FRAMES))
