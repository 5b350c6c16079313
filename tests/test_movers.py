"""The embedded set `movers`: its file and splits; physics: what is lost, and what is not with
lossless=True; the renderer: clips, masks, poses and flow agree, on pictures whose colours tell the
place."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_data import error_of
from test_solids import SPLITS, build

from kernels import movers
from kernels.movers import DURATION, FRAMES, MOTIONS, MOVERS, Ingredients, load_movers, render
from kernels.readers import DATA, load_photos

EACH_MOTION = pytest.mark.parametrize("name", MOTIONS)


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(MOVERS))


@pytest.fixture(scope="module")
def stored():
    return load_movers("test")


@pytest.fixture(scope="module")
def ramps():
    """Three opaque squares of 40 pixels and two photographs. Red grows to the right, green grows
    downwards, blue is the number. Interpolation of linear colours is exact."""

    def picture(height, width, step, blue):
        down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack([step * across, step * down, torch.full_like(down, blue)]).byte()

    emoji = torch.zeros(3, 16, 4, 48, 48, dtype=torch.uint8)
    for number in range(3):
        emoji[number, :, :3, 4:44, 4:44] = picture(48, 48, 5, 100 + 50 * number)[:, 4:44, 4:44]
    emoji[:, :, 3, 4:44, 4:44] = 255
    photos = torch.zeros(2, 3, 140, 128, dtype=torch.uint8)
    photos[0, :, :128, :128] = picture(128, 128, 2, 10)
    photos[1] = picture(140, 128, 1, 20)
    sizes = torch.tensor([[128, 128], [128, 140]])
    return Ingredients(emoji, torch.tensor([4, 0, 4]), ["a", "b", "c"], (), photos, sizes)


# -------- The file --------------------------------------------------------------------------------


def test_ingredients(arrays, stored):
    counts = [len(arrays[f"{split}_names"]) for split in SPLITS]
    assert sum(counts) == 400 and counts[1] > 60
    assert MOVERS.stat().st_size < 6e6  # bytes

    assert stored.emoji.shape == (counts[1], 16, 4, 48, 48) and stored.emoji.dtype == torch.uint8
    opacity = stored.emoji[:, :, 3:].int()
    assert (stored.emoji[:, :, :3] <= opacity + 1).all()  # colours times opacity
    covered = (opacity > 127).float().mean((1, 2, 3, 4))
    assert covered.min() > 0.1 and 0.4 < covered.mean() < 0.8  # a flag, a sign; most are round
    change = stored.emoji.float().diff(dim=1).abs().mean((2, 3, 4))
    assert (change.mean(1) > 1).all()  # grey levels per frame; each of them moves
    assert len(stored.names) == len(stored.labels) == counts[1]

    photos = load_photos("test").images
    assert len(photos) == len(stored.photos) == len(stored.sizes)
    width, height = stored.sizes[3].tolist()
    assert torch.equal(stored.photos[3, :, :height, :width], photos[3])


def test_sides_are_those_of_emoji_and_share_no_motion(arrays):
    with np.load(DATA / "emoji.npz") as file:
        emoji = dict(file)
    groups = []
    for split in SPLITS:
        rows = arrays[f"{split}_emoji"]
        assert set(rows.tolist()) <= set(emoji[f"{split}_emoji"].tolist())
        assert len(set(rows.tolist())) == len(rows)
        for part in ("names", "codepoints"):
            assert (arrays[f"{split}_{part}"] == emoji[part][rows]).all()
        labels = dict(zip(emoji[f"{split}_emoji"].tolist(), emoji[f"{split}_labels"].tolist()))
        assert [labels[row] for row in rows.tolist()] == arrays[f"{split}_labels"].tolist()
        groups += [build.motion_group(code) for code in arrays[f"{split}_codepoints"].tolist()]
    assert len(set(groups)) == 400
    assert (arrays["categories"] == emoji["categories"]).all()


def test_motion_groups():
    for code in ("1f468-200d-1f52c", "1f469-200d-1f52c", "1f9d1-200d-1f52c"):  # scientists
        assert build.motion_group(code) == "1f9d1-1f52c"
    for code in ("1f3c3-200d-2642", "1f3c3-200d-2640", "1f3c3"):  # they run
        assert build.motion_group(code) == "1f3c3"
    assert build.motion_group("1f468-200d-1f9b0") == build.motion_group("1f469")  # red hair
    assert build.motion_group("1f499") == build.motion_group("2764")  # hearts
    assert build.motion_group("1f431") != build.motion_group("1f436")  # cat, dog


def animated_webp(greys, durations):
    pictures = [Image.new("RGBA", (48, 48), (grey, grey, grey, 255)) for grey in greys]
    out = io.BytesIO()
    options = {"duration": durations, "lossless": True}
    pictures[0].save(out, "WEBP", save_all=True, append_images=pictures[1:], **options)
    return out.getvalue()


def test_animations_have_their_number_of_frames():
    """Every third frame of 24 per second. Files hold equal frames once, with a longer duration;
    short animations start again."""
    greys = [4 * number for number in range(60)]
    found = build.frames_of(animated_webp(greys, [42] * 60))
    assert found.shape == (16, 48, 48, 4)
    assert found[:, 20, 20, 0].tolist() == greys[:48:3]

    found = build.frames_of(animated_webp([0, 50, 100], [42, 250, 125]))  # 1 + 6 + 3 frames
    expanded = [0] + 6 * [50] + 3 * [100]
    assert found[:, 20, 20, 0].tolist() == [expanded[3 * i % 10] for i in range(16)]

    assert build.frames_of(animated_webp([7], [42])) is None


def test_sheets_keep_the_order_of_the_frames(tmp_path):
    """What build.py writes is what load_movers reads."""
    frames = np.zeros((16, 48, 48, 4), np.uint8)
    frames[..., 3] = 255
    frames[..., 0] = 15 * np.arange(16)[:, None, None]
    file = build.webp(build.sheet(frames), 90)
    own = {"webp": build.joined([file])[0], "ends": build.joined([file])[1]}
    own |= {"labels": np.array([2], np.uint8), "names": np.array(["square"])}
    path = tmp_path / "own.npz"
    own = {f"test_{name}": array for name, array in own.items()}
    np.savez(path, categories=np.array(["x", "y", "z"]), **own)
    found = load_movers("test", path=path)
    reds = found.emoji[0, :, 0, 5:-5, 5:-5].float().mean((1, 2))
    assert (reds - 15 * torch.arange(16)).abs().max() < 4  # the files are compressed
    assert found.labels.tolist() == [2] and found.categories == ("x", "y", "z")


def test_wrong_split_and_missing_file_are_one_sentence(capsys, tmp_path):
    assert "'val' is not a split" in error_of(capsys, load_movers, "val")
    missing = tmp_path / "movers.npz"
    assert f"{missing} is missing" in error_of(capsys, load_movers, "test", "cpu", missing)


@pytest.mark.thorough
def test_no_emoji_moves_as_one_of_the_other_side():
    """Correlation of how the pixels change, 12 x 12. Of a heart and a blue one it is above 0.9; of
    a horse and a unicorn, which are different drawings, 0.74."""
    changes = []
    for split in SPLITS:
        small = F.avg_pool3d(load_movers(split).emoji.float(), (1, 4, 4))  # (E, 16, 4, 12, 12)
        small = small - small.mean(1, keepdim=True)
        changes.append(F.normalize(small.flatten(1), dim=1))
    train, test = changes
    assert (train @ test.T).max() < 0.8


# -------- Physics ---------------------------------------------------------------------------------

FINE = np.linspace(0, DURATION, 1101)  # times


def tracks(name, count=100, lossless=False, t=FINE):
    """(count, T, 4) poses of one motion."""
    numbers = np.random.default_rng(5).random((count, movers.OF_MOTION))
    return movers.poses(np.full(count, MOTIONS.index(name)), numbers, t, lossless)


def energies(name, track):
    """The energy of each track at the times between the first and the last, (m, T - 2), up to a
    factor. Pendulums: their frequency is that of the track without losses."""
    x, y, angle, scale = np.moveaxis(track, 2, 0)
    step = FINE[1]

    def rate(values):
        return (values[:, 2:] - values[:, :-2]) / (2 * step)

    if name in ("bounce", "launch"):
        height = movers.floor(scale) - y
        return rate(y) ** 2 / 2 + movers.GRAVITY * height[:, 1:-1]
    if name in ("swing", "shake"):
        x, y, ideal, _ = np.moveaxis(tracks(name, len(track), lossless=True), 2, 0)
        bend = np.diff(ideal, 2) / step**2
        stiffness = -(bend * ideal[:, 1:-1]).sum(1) / (ideal[:, 1:-1] ** 2).sum(1)
        return rate(angle) ** 2 + stiffness[:, None] * angle[:, 1:-1] ** 2
    moving = {"roll": x, "slide": x, "rise": y, "approach": 1 / scale}
    return rate(moving[name]) ** 2


def in_flight(name, track):
    """Times, (m, T - 2), at which no bounce is near: there a rate can be measured."""
    if name not in ("bounce", "launch"):
        return np.full((len(track), len(FINE) - 2), True)
    bend = np.diff(track[:, :, 1], 2, axis=1) / FINE[1] ** 2
    falling = np.abs(bend - movers.GRAVITY) < 1
    return falling | (np.abs(bend) < 1)


@EACH_MOTION
def test_energy_is_lost_unless_lossless(name):
    lossy = tracks(name)
    ideal = tracks(name, lossless=True)
    free = in_flight(name, ideal)
    assert free.mean() > 0.98  # a bounce takes no time
    kept = np.ma.array(energies(name, ideal), mask=~free)
    assert (kept.max(1) - kept.min(1) < 2e-3 * kept.mean(1)).all()

    left = np.ma.array(energies(name, lossy), mask=~in_flight(name, lossy))
    first = left[:, :50].max(1)
    last = left[:, -50:].min(1)
    assert (last <= 1.001 * first).all()
    assert np.ma.median(last / first) < 0.4
    if name not in ("swing", "shake"):  # there it is lost evenly only over a whole period
        low = np.minimum.accumulate(left.filled(np.inf), 1)
        assert (left <= 1.001 * low + 1e-6 * first[:, None]).all()


@pytest.mark.parametrize("name", ["bounce", "launch"])
def test_bounces_get_lower(name):
    """Each keeps the same share of the speed, so of heights its square."""
    track = tracks(name)
    height = movers.floor(track[..., 3]) - track[..., 1]
    assert height.min() > -1e-9
    limits = {"bounce": (0.55, 0.8), "launch": (0.2, 0.4)}[name]
    ratios = []
    for row in height:
        tops = np.flatnonzero((row[1:-1] > row[:-2]) & (row[1:-1] >= row[2:])) + 1
        ratios += (row[tops[1:]] / row[tops[:-1]])[row[tops[1:]] > 0.5].tolist()
    assert len(ratios) > 30
    assert limits[0] ** 2 - 0.01 < min(ratios) and max(ratios) < limits[1] ** 2 + 0.01
    assert height[:, -100:].max(1).min() < 1  # some lie still at the end


@pytest.mark.parametrize("name", ["roll", "slide", "rise", "approach"])
def test_gliding_things_come_to_rest_in_both_directions(name):
    track = tracks(name)
    column = {"roll": 0, "slide": 0, "rise": 1, "approach": 3}[name]
    speed = np.diff(track[:, :, column], axis=1)
    way = speed.sum(1)
    assert 0.4 < (way > 0).mean() < 0.6  # to the right, downwards, nearer
    assert (speed * way[:, None] >= -1e-12).all()  # none turns back
    slowed = np.abs(speed[:, -1]) / np.abs(speed[:, 0])
    assert np.median(slowed) < 0.1 and (slowed < 1e-9).mean() > 0.4


def test_rolling_is_without_slipping():
    track = tracks("roll")
    way = np.diff(track[..., 0], axis=1)
    turn = np.diff(track[..., 2], axis=1)
    assert np.allclose(way, 24 * track[:, 1:, 3] * turn)  # clockwise to the right


def asymmetries(track):
    """How a track differs from itself played backwards, (m, 4): speed, height, distance from the
    middle and size, of the first half less those of the second."""
    x, y, angle, scale = np.moveaxis(track, 2, 0)
    moves = [np.diff(values) for values in (x, y, 24 * scale * angle, 24 * scale)]
    speed = np.sqrt(np.square(moves).sum(0))
    found = []
    for values in (speed, y, np.abs(x - 24), scale):
        half = values.shape[1] // 2
        found.append(values[:, :half].mean(1) - values[:, -half:].mean(1))
    return np.stack(found, 1)


@EACH_MOTION
def test_lossless_tracks_are_as_likely_backwards(name):
    """Means of what would tell the direction are zero within four standard errors; of tracks with
    losses the speed gives it away."""
    t = np.arange(FRAMES) / movers.RATE
    found = asymmetries(tracks(name, 4000, lossless=True, t=t))
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0)) < 4 * error + 1e-9).all()

    speed = asymmetries(tracks(name, 4000, t=t))[:, 0]
    assert (speed > 0).mean() > 0.7


# -------- What seeds decide -----------------------------------------------------------------------


def equal(clips, other):
    return all(torch.equal(a, b) for a, b in zip(clips, other))


def test_a_seed_is_a_clip_in_any_batch(stored):
    seeds = [7, 3, 123456789012, 3, *range(20, 36)]
    n = len(seeds)  # more than are drawn at once
    clips = render(stored, seeds, objects=2)
    assert clips.frames.shape == (n, FRAMES, 3, 48, 48) and clips.frames.dtype == torch.uint8
    assert clips.masks.shape == (n, FRAMES, 48, 48) and clips.masks.dtype == torch.uint8
    assert clips.pose.shape == (n, FRAMES, 2, 4) and clips.camera.shape == (n, 2)
    for numbers in (clips.identity, clips.category, clips.motion):
        assert numbers.shape == (n, 2) and numbers.dtype == torch.int64
    assert clips.flow.shape == (n, FRAMES - 1, 2, 48, 48) and clips.flow.dtype == torch.float32

    assert equal(clips.part([1]), clips.part([3])) and not equal(clips.part([0]), clips.part([1]))
    for number in (0, 2, 17):
        assert equal(render(stored, [seeds[number]], objects=2), clips.part([number]))
    assert equal(render(stored, torch.tensor(seeds[2:10]), objects=2), clips.part(slice(2, 10)))
    assert torch.equal(clips.part([2]).flow, clips.flow[[2]])


def test_a_seed_has_the_same_content_with_any_settings(ramps):
    seeds = range(16)
    plain = render(ramps, seeds)
    for settings in ({"objects": 2}, {"still": True}, {"lossless": True}):
        other = render(ramps, seeds, **settings)
        for part in ("identity", "category", "motion"):
            assert torch.equal(getattr(other, part)[:, :1], getattr(plain, part))
        assert torch.equal(other.camera, plain.camera)
        same = torch.equal(other.pose[:, :, :1], plain.pose)
        assert same == ("lossless" not in settings)
    assert torch.equal(plain.category[:, 0], ramps.labels[plain.identity[:, 0]])


@pytest.fixture(scope="module")
def scripts(ramps):
    return movers.write_script(ramps, range(3000), 1, still=False, lossless=False, tripod=False)


def test_everything_is_equally_likely(scripts):
    def rare(counts):  # a deviation of more than four standard errors
        expected = counts.sum() / len(counts)
        return (counts - expected).abs().max() > 4 * expected**0.5

    assert not rare(scripts.motion.flatten().bincount(minlength=8).float())
    assert not rare(scripts.identity.flatten().bincount(minlength=3).float())
    assert not rare(scripts.photo.bincount(minlength=2).float())
    assert scripts.camera.abs().max() <= movers.PAN
    for axis in (0, 1):  # seven classes of egomotion
        classes = scripts.camera[:, axis].round().long() + 3
        assert not rare(classes.bincount(minlength=7).float())


def test_the_crop_stays_in_its_photograph(ramps, scripts):
    last = scripts.corner + (FRAMES - 1) * scripts.camera
    for corner in (scripts.corner, last):
        assert corner.min() > -1e-3
        assert (corner + 48 <= scripts.size + 1e-3).all()


def test_repeated_frames_do_not_tell_the_direction_of_time(scripts):
    """An animation has two frames for three of the clip. Each step is as often one without a
    change."""
    steps = scripts.steps[:, :, 0]
    assert steps.min() >= 0 and steps.max() <= 15
    assert ((steps[:, -1] - steps[:, 0]) >= 7).all()
    repeated = (steps.diff(dim=1) == 0).float().mean(0)  # (11,)
    assert (repeated - 1 / 3).abs().max() < 4 * (2 / 9 / 3000) ** 0.5


# -------- Pictures, masks and flow ----------------------------------------------------------------


def interior(masks):
    """Pixels whose 3 x 3 neighbours all show the same, and are in the frame."""
    values = F.pad(masks.float(), (1, 1, 1, 1), value=99)
    return F.max_pool2d(values, 3, 1) == -F.max_pool2d(-values, 3, 1)


def test_pictures_and_masks_are_where_poses_and_camera_say(ramps):
    """The colours of the ramps tell which place of an emoji or photograph is shown."""
    clips = render(ramps, range(24), objects=2)
    script = movers.write_script(ramps, range(24), 2, still=False, lossless=False, tripod=False)
    frames = clips.frames.double().numpy()
    masks = clips.masks.numpy()
    inner = interior(clips.masks).numpy()
    j, i = np.meshgrid(np.arange(48) + 0.5, np.arange(48) + 0.5)
    seen = 0
    for n in range(24):
        for t in (0, 5, 11):
            # Front to back.
            expected = np.zeros((48, 48))
            for number in (1, 2):
                x, y, angle, scale = clips.pose[n, t, number - 1].double().numpy()
                across = (np.cos(angle) * (j - x) + np.sin(angle) * (i - y)) / scale + 24
                down = (np.cos(angle) * (i - y) - np.sin(angle) * (j - x)) / scale + 24
                square = np.maximum(np.abs(across - 24), np.abs(down - 24))
                expected[square < 20] = number
                own = (masks[n, t] == number) & inner[n, t]
                red, green, blue = frames[n, t]
                assert np.abs(red - 5 * (across - 0.5))[own].max(initial=0) < 1
                assert np.abs(green - 5 * (down - 0.5))[own].max(initial=0) < 1
                assert (blue[own] == 100 + 50 * clips.identity[n, number - 1].item()).all()
                seen += own.sum()
            assert (expected != masks[n, t]).mean() < 0.01  # but for rounding at edges

            corner = script.corner[n] + t * clips.camera[n]
            photo = script.photo[n].item()
            own = (masks[n, t] == 0) & inner[n, t]
            x = corner[0].item() + j
            y = corner[1].item() + i
            assert np.abs(frames[n, t, 0] - (2, 1)[photo] * (x - 0.5))[own].max() < 1
            assert np.abs(frames[n, t, 1] - (2, 1)[photo] * (y - 0.5))[own].max() < 1
    assert seen > 8_000


def warped(frames, flow):
    """What frames (m, c, 48, 48) show at p + flow, and where that is well
    inside the frame."""
    target = movers.pixel_centres("cpu") + flow
    grid = target.movedim(1, -1) / 24 - 1
    found = F.grid_sample(frames.float(), grid, padding_mode="border", align_corners=False)
    return found, ((target > 2) & (target < 46)).all(1)


def not_hidden(clips):
    """Pixels of frame t (m, 48, 48) of which the next frame shows the same, at no edge."""
    masks = clips.masks[:, :-1].flatten(0, 1)
    following = clips.masks[:, 1:].flatten(0, 1)
    code = torch.stack([following == number for number in range(3)], 1)
    code = -F.max_pool2d(-code.float(), 3, 1, padding=1)
    same, inside = warped(code, clips.flow.flatten(0, 1))
    same = same.gather(1, masks.long()[:, None])[:, 0] > 0.999
    return same & inside & interior(masks)


def test_flow_is_exact(ramps):
    """Of colours that are linear in the place, each difference after warping is rounding."""
    clips = render(ramps, range(16), objects=2)
    found, _ = warped(clips.frames[:, 1:].flatten(0, 1), clips.flow.flatten(0, 1))
    error = (found - clips.frames[:, :-1].flatten(0, 1)).abs().amax(1)
    valid = not_hidden(clips)
    assert valid.float().mean() > 0.5
    moving = clips.flow.flatten(0, 1).norm(dim=1)
    assert (moving[valid] > 1).float().mean() > 0.7
    assert error[valid].max() < 1.05
    objects = clips.masks[:, :-1].flatten(0, 1) > 0
    assert (valid & objects).sum() > 10_000


def test_flow_explains_real_clips(stored):
    clips = render(stored, range(24), objects=2, still=True)
    before = clips.frames[:, :-1].flatten(0, 1).float()
    after = clips.frames[:, 1:].flatten(0, 1).float()
    found, inside = warped(after, clips.flow.flatten(0, 1))
    change = (after - before).abs().mean(1)
    error = (found - before).abs().mean(1)
    assert error[inside].mean() < 0.5 * change[inside].mean()
    valid = not_hidden(clips)
    assert error[valid].mean() < 0.3 * change[valid].mean()


def test_objects_are_seen(stored):
    """At least a part of each in most frames: the pose stays near the frame."""
    clips = render(stored, range(40), objects=2)
    area = torch.stack([(clips.masks == number).sum((2, 3)) for number in (1, 2)])
    assert (area[0] > 15).float().mean() > 0.85  # it may be behind the second one
    assert (area[1] > 30).float().mean() > 0.95
    share = (clips.masks > 0).float().mean()
    assert 0.1 < share < 0.4


def test_still_emoji_do_not_change_by_themselves(stored, scripts):
    """A shaking emoji stays where it is, and its size; without its own animation it is one picture,
    turned: the opaque area is the same in all frames."""
    shaking = (scripts.motion[:, 0] == MOTIONS.index("shake")).nonzero()[:8, 0]
    animated = render(stored, shaking)
    still = render(stored, shaking, still=True)

    def spread(clips):
        area = (clips.masks > 0).sum((2, 3)).float()
        return (area.std(1) / area.mean(1)).mean()

    assert spread(still) < 0.7 * spread(animated)


def test_a_camera_on_a_tripod_stands_still(ramps):
    """Only then; emoji and motions are the same, and what no emoji covers does not change."""
    panning = render(ramps, range(16))
    clips = render(ramps, range(16), tripod=True)
    assert panning.camera.abs().min() > 0 and not clips.camera.any()
    assert torch.equal(clips.pose, panning.pose)
    assert torch.equal(clips.identity, panning.identity)

    background = F.max_pool2d((clips.masks > 0).float().amax(1), 5, 1, 2) == 0  # (n, 48, 48)
    changes = clips.frames.float().diff(dim=1).abs().amax((1, 2))
    assert background.any() and not changes[background].any()
    assert not clips.flow.abs().amax((1, 2))[background].any()
    assert changes[~background].any()
