"""Folders of video files: which frame is shown at which time, whatever the format, the frame rate
or the damage; and the same clips for any number of workers and processes.

The tests write their own small videos; those that PyAV must write are skipped where it is missing,
GIF and WebP need none. Each frame carries its number as a row of six black or white
blocks, which survive every coder, so that the frames of a clip can be read back as numbers.
"""

import multiprocessing
import os
import resource
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import bench_scale
import numpy as np
import pytest
import torch
from conftest import CPU, call_main, light
from PIL import Image
from test_resume import Stop, assert_same_run, stopping

from common import BrokenFiles, Loader, Split, held_out, load_data
from kernels import readers, video_files, views
from kernels.clips import VideosInMemory
from kernels.readers import Files
from kernels.video_files import VideoFiles, open_video, pictures
from kernels.views import ClipCrop, Crop

try:
    import av
except ImportError:
    av = None

NO_AV = "PyAV is not installed"
NEEDS_AV = pytest.mark.skipif(av is None, reason=NO_AV)  # beside all tests that write a film

HEIGHT, WIDTH, BLOCK = 32, 48, 8
TWELFTHS = [Fraction(k, 12) for k in range(60)]


def frame(number, height=HEIGHT, width=WIDTH):
    """(height, width, 3) uint8: the number in the first row of blocks, below it a ramp."""
    x = np.zeros((height, width, 3), np.uint8)
    x[:] = np.linspace(60, 200, width)[None, :, None]
    for bit in range(6):
        x[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
    return x


def number(picture):
    """The inverse of frame."""
    bits = np.asarray(picture)[BLOCK // 2, BLOCK // 2 : 6 * BLOCK : BLOCK].mean(1) > 128
    return int(bits @ 2 ** np.arange(6))


def write(
    path,
    stamps,
    codec="mpeg4",
    size=(HEIGHT, WIDTH),
    rate=12,
    base=1200,
    reorder=0,
    draw=frame,
    **more,
):
    """A video with a keyframe in every twelve frames. path: a name, or a file object. stamps: of
    the frames, in seconds, multiples of 1 / base; the last is shown for 1 / rate. reorder: how many
    frames may be stored after one that is shown later. more: options of the coder."""
    if av is None:
        pytest.skip(NO_AV)
    format = None if isinstance(path, str) else "webm"
    container = {"movflags": "faststart"} if str(path).endswith(".mp4") else {}
    try:
        file = av.open(path, "w", format, options=container)
        stream = file.add_stream(codec, rate)
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"PyAV without {codec}")
    coder = stream.codec_context
    stream.height, stream.width = size
    stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
    coder.time_base = Fraction(1, base)
    coder.gop_size = 12
    coder.max_b_frames = reorder
    coder.options = {"sc_threshold": "1000000000", **more}  # no keyframes at changes of scene
    for i, stamp in enumerate(stamps):
        picture = av.VideoFrame.from_ndarray(draw(i, *size), format="rgb24")
        picture.pts = int(stamp * base)
        picture.time_base = coder.time_base
        file.mux(stream.encode(picture))
    file.mux(stream.encode())
    file.close()


def shown(path, places=None):
    """The numbers of the frames at some places of a video, or at all of them."""
    video = open_video(path)
    places = range(video.length) if places is None else places
    return [number(picture) for picture in pictures(video, places)]


@pytest.fixture
def film(tmp_path):
    return str(tmp_path / "film.mp4")


def error_of(capsys, function, *args):
    """The one sentence with which the call ends the program."""
    with pytest.raises(SystemExit) as caught:
        function(*args)
    text = capsys.readouterr().err
    assert caught.value.code == 1 and text.startswith("error: ") and text.count("\n") == 1
    return text


# -------- Which frame is shown when ---------------------------------------------------------------


def test_frame_rates(film):
    write(film, TWELFTHS[:30])
    assert shown(film) == list(range(30))

    # At k / 12 s: frame 2.5 k of 30 per second, frame 5 k / 12 of 5 per second, rounded down.
    write(film, [Fraction(k, 30) for k in range(20)], rate=30)
    assert shown(film) == [0, 2, 5, 7, 10, 12, 15, 17]
    write(film, [Fraction(k, 5) for k in range(4)], rate=5)
    assert shown(film) == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


def test_a_rate_that_varies(film):
    # k / 12 s:  0    .083 .167 .25  .333 .417 .5   ...  the last frame is shown as long as .01 s
    stamps = [0, 0.05, 0.17, 0.2, 0.21, 0.45, 0.5, 0.51]
    write(film, [Fraction(str(stamp)) for stamp in stamps], base=100)
    assert shown(film)[:7] == [0, 1, 1, 4, 4, 4, 6]
    assert shown(film, [9]) == [7]


@pytest.mark.parametrize("name, codec", [("a.mkv", "ffv1"), ("a.webm", "libvpx")])
def test_stamps_rounded_to_milliseconds(tmp_path, name, codec):
    """Frame 2 of 12 per second is stored with 0.167 s, which is after 2 / 12 s."""
    path = str(tmp_path / name)
    write(path, TWELFTHS[:24], codec)
    assert [stamp * 1000 for stamp, _ in open_video(path).frames()][:4] == [0, 83, 167, 250]
    assert shown(path) == list(range(24))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_start_that_is_not_zero(tmp_path, name):
    path = str(tmp_path / name)
    write(path, [5 + stamp for stamp in TWELFTHS[:20]])
    video = open_video(path)
    assert video.start == 5 and video.length == 20
    assert shown(path) == list(range(20)) and shown(path, [15, 17]) == [15, 17]


class Pipe:
    """A file that cannot go back, as a camera or a browser writes it: no duration, no index."""

    def __init__(self, path):
        self.file = open(path, "wb")

    def write(self, content):
        return self.file.write(content)


def test_a_duration_that_is_missing(tmp_path):
    path = str(tmp_path / "a.webm")
    pipe = Pipe(path)
    write(pipe, TWELFTHS[:40], "libvpx")
    pipe.file.close()
    with av.open(path) as file:
        assert file.duration is None and file.streams.video[0].duration is None
    assert open_video(path).length == 40
    assert shown(path, [13, 30, 39]) == [13, 30, 39]


def test_sound_that_is_longer_than_the_pictures(film):
    """The duration of the file is that of the sound; the video is as long as its pictures."""
    write(film, TWELFTHS[:12])
    add_sound(film, seconds=4)
    with av.open(film) as file:
        assert file.duration > 3_900_000
    assert shown(film) == list(range(12))


def add_sound(path, seconds, keep_pictures=True):
    """Writes a video again, with silence beside or in place of its pictures."""
    old = path + ".old.mp4"
    os.rename(path, old)
    with av.open(old) as source, av.open(path, "w") as target:
        pictures = source.streams.video[0]
        sound = target.add_stream("aac", rate=8000)
        if keep_pictures:
            stream = target.add_stream_from_template(pictures)
            for packet in source.demux(pictures):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        for _ in range(seconds):
            target.mux(sound.encode(silence()))
        target.mux(sound.encode())


def silence():
    """A second of sound."""
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
    sound.sample_rate = 8000
    return sound


# -------- Formats ---------------------------------------------------------------------------------

OPEN = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=12"}
CODERS = [  # ending, coder, reorder, options
    (".mp4", "mpeg4", 2, {}),
    (".avi", "mpeg4", 0, {}),
    (".avi", "mpeg4", 2, {}),
    (".avi", "libx264", 3, {}),
    (".mp4", "libx264", 3, OPEN),
    (".mkv", "libx264", 3, OPEN),
    (".mov", "libx264", 0, REFRESH),
    (".webm", "libvpx", 0, {"auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "realtime"}),
]


@pytest.mark.parametrize("ending, codec, reorder, options", CODERS)
def test_seeking_equals_decoding_from_the_start(tmp_path, ending, codec, reorder, options):
    path = str(tmp_path / f"a{ending}")
    base = 12 if ending == ".avi" else 1200
    write(path, TWELFTHS, codec, base=base, reorder=reorder, **options)
    video = open_video(path)
    every = [np.asarray(video.picture(frame)) for _, frame in video.frames()]
    assert [number(x) for x in every] == list(range(60)) and video.length == 60
    for place in (0, 1, 11, 12, 13, 35, 47, 57, 59):
        for k, picture in zip(range(place, 60), pictures(video, [place, place + 1])):
            assert np.array_equal(picture, every[k]), (place, k)


def test_only_what_a_clip_needs_is_decoded(film):
    write(film, TWELFTHS)
    video = open_video(film)
    begin = next(video.frames(since=Fraction(40, 12)))[0]
    assert begin == Fraction(36, 12)  # the keyframe
    taken = []
    every = video.frames
    video.frames = lambda since: (taken.append(pair) or pair for pair in every(since))
    assert [number(picture) for picture in pictures(video, [38, 40])] == [38, 40]
    assert len(taken) == 6  # 36 to 41


TURNS = {  # degrees with the clock -> a, b, c, d of the matrix in an MP4: x' = a x + c y, ...
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}


@pytest.mark.parametrize("degrees", TURNS)
def test_rotated_videos_are_shown_upright(film, degrees):
    """As a phone stores them that was held upright. The matrix is written into the file by hand."""
    write(film, TWELFTHS[:2])
    [before, _] = pictures(open_video(film), [0, 1])
    content = bytearray(Path(film).read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert content[matrix : matrix + 4] == (1 << 16).to_bytes(4, "big")
    a, b, c, d = (value << 16 for value in TURNS[degrees])
    for place, value in ((0, a), (4, b), (12, c), (16, d)):
        content[matrix + place : matrix + place + 4] = value.to_bytes(4, "big", signed=True)
    Path(film).write_bytes(content)
    [after, _] = pictures(open_video(film), [0, 1])
    assert np.array_equal(after, np.rot90(before, -degrees // 90))


def test_odd_sizes(film):
    write(film, TWELFTHS[:3], size=(33, 51))
    [first, _, last] = pictures(open_video(film), [0, 1, 2])
    assert first.size == (51, 33) and number(last) == 2
    assert np.abs(np.asarray(first)[BLOCK:].astype(int) - frame(0, 33, 51)[BLOCK:]).mean() < 6


def save(path, frames, durations, **more):
    """An animation of PIL pictures. durations: in ms."""
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **more)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "A.GIF"])
def test_animations(tmp_path, name, monkeypatch):
    """A frame of 0 or 10 ms is shown for 100 ms, as browsers do. They need no PyAV."""
    monkeypatch.setattr(video_files, "av", None)
    path = str(tmp_path / name)
    frames = [Image.fromarray(frame(k)) for k in range(6)]
    save(path, frames, [40, 50, 300, 0, 10, 250])  # begin at 0, 40, 90, 390, 490, 590; end at 840
    assert shown(path) == [0, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5]
    assert shown(path, [4, 7]) == [2, 4]
    assert len(VideoFiles([path, path])) == 2


@pytest.mark.parametrize("name, more", [("a.gif", {"disposal": 2}), ("a.webp", {"lossless": True})])
def test_transparent_animations_are_laid_on_white(tmp_path, name, more):
    path = str(tmp_path / name)
    opaque = np.eye(8, dtype=bool)
    frames = []
    for k in range(3):
        x = np.zeros((8, 8, 4), np.uint8)
        x[opaque] = (200 - k, 0, 0, 255)
        frames.append(Image.fromarray(x))
    save(path, frames, 100, **more)
    for k, picture in enumerate(pictures(open_video(path), [0, 2, 3])):
        expected = np.full((8, 8, 3), 255)
        expected[opaque] = (200 - k, 0, 0)
        assert picture.mode == "RGB" and np.array_equal(picture, expected), k


def test_a_picture_without_motion_is_a_video(tmp_path):
    path = str(tmp_path / "a.webp")
    Image.fromarray(frame(5)).save(path, lossless=True)
    assert set(shown(path)) == {5}


# -------- Damage ----------------------------------------------------------------------------------


def packets_of(path):
    """(place in the file, bytes) of each packet."""
    with av.open(path) as file:
        return [(p.pos, p.size) for p in file.demux(file.streams.video[0]) if p.size]


def spoil(path, which):
    """Overwrites a packet with zeros."""
    content = bytearray(Path(path).read_bytes())
    begin, size = packets_of(path)[which]
    content[begin : begin + size] = bytes(size)
    Path(path).write_bytes(content)


def test_a_tail_that_is_missing(film):
    """The video ends with the last whole frame. The file says that it is longer."""
    write(film, TWELFTHS)
    begin, size = packets_of(film)[40]
    os.truncate(film, begin + size // 2)
    assert shown(film) == list(range(40))
    assert shown(film, [38, 45, 59]) == [38, 39, 39]


def test_a_tail_that_is_missing_among_reordered_frames(film):
    """Frames that the decoder holds back, for others to be shown before, are not lost."""
    write(film, TWELFTHS, "libx264", reorder=3, **OPEN)
    with av.open(film) as file:
        stream = file.streams.video[0]
        stored = [int(12 * p.pts * p.time_base) for p in file.demux(stream) if p.size]
    # cut where a frame that is shown later has been stored before
    cut = next(n for n in range(30, 60) if max(stored[:n]) >= n)
    whole = stored[:cut]
    begin, size = packets_of(film)[cut]
    os.truncate(film, begin + size // 2)
    expected = [max(k for k in whole if k <= place) for place in range(max(whole) + 1)]
    assert shown(film) == expected
    assert shown(film, [max(whole), 59]) == [max(whole)] * 2


def test_an_unknown_coder(film):
    write(film, TWELFTHS[:2])
    content = Path(film).read_bytes().replace(b"mp4v", b"none").replace(b"esds", b"free")
    Path(film).write_bytes(content)
    with pytest.raises(ValueError, match="PyAV has no decoder for it"):
        open_video(film)


def test_frames_after_damage_wait_for_a_keyframe(film):
    write(film, TWELFTHS)
    spoil(film, 30)
    expected = [*range(30), *[29] * 6, *range(36, 60)]
    assert shown(film) == expected
    for place in (29, 30, 35, 36, 37):
        assert shown(film, [place, place + 1]) == expected[place : place + 2]


def test_a_damaged_keyframe(film):
    """Decoding begins with an earlier one."""
    write(film, TWELFTHS)
    spoil(film, 36)
    assert shown(film, [37, 47, 48]) == [35, 35, 48]
    spoil(film, 48)  # the last one: nothing good follows
    assert shown(film, [50, 59]) == [35, 35]


def test_a_tail_of_an_animation(tmp_path):
    path = str(tmp_path / "a.gif")
    save(path, [Image.fromarray(frame(k)) for k in range(8)], 500)
    os.truncate(path, os.path.getsize(path) * 2 // 3)
    found = shown(path)
    assert 12 <= len(found) < 48 and found == [k // 6 for k in range(len(found))]


@pytest.fixture
def folder(tmp_path):
    """Twelve short videos; the number of the first frame of a video is that of the file."""
    paths = [str(tmp_path / f"{i:02}.mp4") for i in range(12)]
    for i, path in enumerate(paths):
        write(path, TWELFTHS[: 3 + i])
    return paths


def test_broken_files_give_way_to_the_next_and_are_named_once(folder, capfd):
    Path(folder[2]).write_bytes(b"not a video")
    Path(folder[3]).write_bytes(b"")
    os.truncate(folder[4], packets_of(folder[4])[0][0])
    add_sound(folder[11], seconds=1, keep_pictures=False)
    spoiled = [2, 3, 4, 11]
    loader = clip_loader(folder, [ClipCrop(Crop(8), 2)], batch=12)
    for epoch in range(2):
        [(_, [clips])] = loader(epoch)
        order = np.random.default_rng([0, epoch, 0, 0, views.ORDER]).permutation(12)
        instead = {2: 5, 3: 5, 4: 5, 11: 0}
        assert loader.index.tolist() == [instead.get(i, i) for i in order.tolist()]
    assert loader.reader.broken.met == {folder[i] for i in spoiled}
    unknown = "Invalid data found when processing input"
    reasons = {2: unknown, 3: unknown, 4: "no frame can be decoded", 11: "no picture"}
    lines = sorted(capfd.readouterr().err.splitlines())
    for line, i in zip(lines, spoiled, strict=True):
        assert line == f"warning: left out, cannot be used: {folder[i]} ({reasons[i]})"


@NEEDS_AV
def test_the_cover_of_a_song_is_no_video(film):
    with av.open(film, "w") as file:
        sound = file.add_stream("aac", rate=8000)
        cover = file.add_stream("mjpeg", rate=1)
        cover.disposition = av.stream.Disposition.attached_pic
        cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        file.mux(cover.encode(av.VideoFrame.from_ndarray(frame(1), format="rgb24")))
        file.mux(cover.encode())
        file.mux(sound.encode(silence()))
        file.mux(sound.encode())
    with pytest.raises(ValueError, match="no picture"):
        open_video(film)


@NEEDS_AV
def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to("nowhere.mp4")
    broken = BrokenFiles(100)
    files = VideoFiles([str(tmp_path / "pipe.mp4"), str(tmp_path / "link.mp4")], broken)
    decoder = video_files.ClipDecoder(files.paths, size=8)
    assert decoder[0][2] == [(0, files.paths[0], "not a regular file")]
    assert decoder[1][2] == [(1, files.paths[1], "No such file or directory")]


@pytest.mark.parametrize("installed", [None, SimpleNamespace(__version__="14.2.0")])
def test_without_pyav(tmp_path, monkeypatch, capsys, installed):
    monkeypatch.setattr(video_files, "av", installed)
    for name in ("a/0.mp4", "a/1.mp4", "b/0.mp4", "b/1.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    text = error_of(capsys, load_data, str(tmp_path), "unused", CPU)
    assert 'pip install "av>=17"' in text and ("14.2.0" in text) == bool(installed)


# -------- The reader ------------------------------------------------------------------------------


def clip_loader(paths, crops, batch=4, workers=0, seed=0):
    same = [(crop, lambda x, rand: x) for crop in crops]
    return Loader(Split(VideoFiles(paths)), same, batch, seed, CPU, workers)


CROPS = [ClipCrop(Crop(16), frames=4, stride=2), Crop(8), ClipCrop(Crop(8), frames=2)]


def test_both_readers_of_videos_show_the_same(tmp_path):
    """They differ by PIL's rounding only."""
    lengths = [20, 8, 31, 7]
    paths = [str(tmp_path / f"{i}.mkv") for i in range(4)]

    def ramp(k, height=HEIGHT, width=WIDTH):
        """Without edges, where PIL would also clip between rows and columns."""
        levels = np.linspace(20, 100, width) + 5 * k
        return np.broadcast_to(levels[None, :, None], (height, width, 3)).astype(np.uint8)

    for path, length in zip(paths, lengths):
        write(path, TWELFTHS[:length], "ffv1", draw=ramp)
    frames = np.concatenate([[ramp(k) for k in range(length)] for length in lengths])
    memory = VideosInMemory(torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), lengths)
    loaders = [clip_loader(paths, CROPS, seed=3), clip_loader(paths, CROPS, seed=3)]
    loaders[1].reader = memory
    for epoch in range(3):
        [(_, found)] = loaders[0](epoch)
        [(_, expected)] = loaders[1](epoch)
        assert torch.equal(loaders[0].index, loaders[1].index)
        for x, y in zip(found, expected):
            assert x.shape == y.shape and (x - y).abs().max() < 2.1 / 255
    assert [x.shape[1:] for x in found] == [(4, 3, 16, 16), (3, 8, 8), (2, 3, 8, 8)]

    indices = torch.tensor([2, 0, 3])
    [(found, broken)] = VideoFiles(paths).whole(indices, 28)
    [(expected, _)] = memory.whole(indices, 28)
    assert expected.shape == (3, 3, 32, 48) and not broken  # 28 256 / 224 = 32: only cut
    assert torch.equal(found, expected[:, :, 2:30, 10:38])


def test_a_video_shorter_than_a_clip_is_left_out_and_named(tmp_path, capsys):
    """Its last frame, shown again, would tell the order of the frames."""
    paths = [str(tmp_path / f"{i}.mkv") for i in range(3)]
    for path, length in zip(paths, (20, 6, 20)):
        write(path, TWELFTHS[:length], "ffv1")
    clip = ClipCrop(Crop(16), frames=4, stride=2)  # of seven frames
    loader = clip_loader(paths, [clip], batch=3)
    for epoch in range(2):
        for _ in loader(epoch):
            assert 1 not in loader.index
    found = capsys.readouterr().err
    assert found.count("warning: left out") == 1
    assert f"{paths[1]} (6 frames at 12 a second, a clip has 7)" in found


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the threads of Linux")
def test_a_frame_leaves_no_threads(film):
    """A process forked while a frame has threads would wait for them when it drops the frame."""
    write(film, TWELFTHS[:3])
    video = open_video(film)
    before = len(os.listdir("/proc/self/task"))
    frames = [frame for _, frame in video.frames()]
    for frame in frames:
        video.picture(frame)
    assert len(frames) == 3 and len(os.listdir("/proc/self/task")) == before


def test_workers_processes_and_resume_change_nothing(folder, monkeypatch):
    def epoch_of(loader, done=0):
        return [(loader.index, *shown) for _, shown in loader(0, done)]

    whole = epoch_of(clip_loader(folder, CROPS))
    assert len(whole) == 3
    for x, y in zip(whole, epoch_of(clip_loader(folder, CROPS, workers=2)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    for x, y in zip(whole[2:], epoch_of(clip_loader(folder, CROPS), done=2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))

    halves = []
    monkeypatch.setattr(views, "world", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(views, "rank", lambda rank=rank: rank)
        halves.append(epoch_of(clip_loader(folder, CROPS)))
    for x, *parts in zip(whole, *halves, strict=True):
        for a, *b in zip(x, *parts, strict=True):
            assert torch.equal(a, torch.cat(b))


def test_epochs_and_views_have_other_moments(film):
    write(film, TWELFTHS)
    clip = ClipCrop(Crop(HEIGHT, scale=(1, 1), ratio=(1.5, 1.5)), frames=3)
    loader = clip_loader([film, film], [clip, clip], batch=2)
    found = []
    for epoch in range(4):
        for _, shown_views in loader(epoch):
            for x in torch.cat(shown_views):
                bits = x[:, :, 4, [2, 8, 13, 18, 24, 29]].mean(1) > 0.5  # 48 pixels became 32
                numbers = bits.long() @ 2 ** torch.arange(6)
                assert numbers.diff().tolist() == [1, 1]  # also the same box for all frames
                found.append(numbers[0].item())
    assert len(set(found)) > 8 and max(found) <= 57


def test_evaluation_leaves_broken_files_out(folder):
    Path(folder[1]).write_bytes(b"not a video")
    files = VideoFiles(folder)
    [(images, broken)] = files.whole(torch.tensor([0, 1, 9]), 28)
    assert broken == [1] and images.shape == (3, 3, 28, 28) and images.dtype == torch.uint8
    assert not images[1].any() and images[0].any()
    part = files.part(torch.tensor([9, 1]))
    assert part.paths == [folder[9], folder[1]] and part.broken is files.broken
    [(again, _)] = part.whole(torch.tensor([0]), 28)
    assert torch.equal(again[0], images[2])


@NEEDS_AV
def test_two_thousand_videos_open_without_being_read(tmp_path, monkeypatch, capsys):
    for i in range(2000):
        path = tmp_path / f"class{i % 10}" / f"{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.setattr(video_files.av, "open", lambda *args, **options: pytest.fail("opened"))
    begin = time.process_time()
    data = load_data(str(tmp_path), "unused", CPU)
    assert time.process_time() - begin < 3
    assert isinstance(data.train.images, VideoFiles) and len(data.train.images) == 1800
    assert "1800 training and 200 test videos of 10 classes" in capsys.readouterr().out


# -------- Folders ---------------------------------------------------------------------------------

EACH_ANIMATION = pytest.mark.parametrize("ending", [".gif", ".webp"])


def animate(path, frames=18):
    """A small animation, 12 frames per second: a picture of noise that moves to the right."""
    seed = sum(os.fsencode(path))
    picture = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    path.parent.mkdir(parents=True, exist_ok=True)
    moving = [Image.fromarray(np.roll(picture, 2 * k, 1)) for k in range(frames)]
    save(path, moving, 80)


def animations(folder, ending, **counts):
    """counts: {folder inside: how many animations}, of which "_" stands for "/"."""
    for name, count in counts.items():
        for i in range(count):
            animate(folder / name.replace("_", "/") / f"{i}{ending}", frames=2)


def opened(folder, capsys):
    """A folder as data, and the line that is printed about it, without its name."""
    data = load_data(str(folder), "unused", CPU)
    line = capsys.readouterr().out
    assert line.startswith(f"{folder}: ") and line.count("\n") == 1
    return data, line.removeprefix(f"{folder}: ").strip()


@EACH_ANIMATION
def test_class_folders_of_videos(tmp_path, capsys, ending):
    """Of each class one video in ten is held out, at least one."""
    animations(tmp_path, ending, ant=20, bee=3)
    data, line = opened(tmp_path, capsys)
    assert line == (
        "20 training and 3 test videos of 2 classes (ant, bee); test videos: a tenth of the "
        "videos, held out"
    )
    for split, counts in ((data.train, [18, 2]), (data.test, [2, 1])):
        assert isinstance(split.images, VideoFiles)
        assert split.labels.bincount().tolist() == counts
        for path, label in zip(split.images.paths, split.labels.tolist()):
            assert Path(path).parent.name == ("ant", "bee")[label]
    assert not {*data.train.images.paths} & {*data.test.images.paths}


@EACH_ANIMATION
def test_training_and_test_folders_of_videos(tmp_path, capsys, ending):
    animations(tmp_path, ending, train_bee=1, train_ant=2, val_bee=2)
    data, line = opened(tmp_path, capsys)
    assert line == "3 training and 2 test videos of 2 classes (ant, bee); test videos: val/"
    for split, name, labels in ((data.train, "train", [0, 0, 1]), (data.test, "val", [1, 1])):
        assert isinstance(split.images, VideoFiles) and split.labels.tolist() == labels
        assert {Path(path).parts[-3] for path in split.images.paths} == {name}


@EACH_ANIMATION
def test_plain_videos_have_no_labels(tmp_path, capsys, ending):
    animations(tmp_path, ending, some=1, some_more=2)
    data, line = opened(tmp_path, capsys)
    assert line == "3 videos, fewer than two class folders, so no evaluation by labels"
    assert isinstance(data.train.images, VideoFiles) and len(data.train.images) == 3
    assert data.train.labels is None and data.test is None


def test_images_among_videos_are_not_used(tmp_path, capsys):
    """And are named, whichever comes first. An animated WebP is an image where other files are."""
    animations(tmp_path, ".gif", b=2)
    animations(tmp_path, ".webp", a=1)
    Image.fromarray(frame(0)).save(tmp_path / "a" / "0.png")
    data, line = opened(tmp_path, capsys)
    unused = line.partition("; not used: ")[2].split(", ")
    assert sorted(unused) == ["1 .png files", "1 .webp files"]
    assert [Path(path).suffix for path in data.train.images.paths] == [".gif"] * 2


@pytest.mark.parametrize("other", ["b/0.png", "a.webp"])
def test_what_is_a_folder_of_images(tmp_path, capsys, other):
    """Animated WebP files beside other images, or after a WebP that does not move."""
    animations(tmp_path, ".webp", b=2)
    Image.fromarray(frame(0)).save(tmp_path / other)
    data, line = opened(tmp_path, capsys)
    assert line.startswith("3 images") and type(data.train.images) is Files


def test_a_method_learns_from_a_folder_of_videos(tmp_path):
    """Stopped in its second epoch and continued, with a worker process: it ends as a run that was
    not."""
    for i in range(12):
        animate(tmp_path / "videos" / "ab"[i % 2] / f"{i}.gif")
    flags = ["--data", tmp_path / "videos", "--size", 16, "--frames", 8, "--batch", 5]
    flags += ["--epochs", 2, "--hidden", 16, "--workers", 1, "--out"]

    def life(folder, after=None):
        name = "shuffle_and_learn"
        patches = {"load_data": load_data, "Run": stopping(after), **light(name)}
        found = call_main(name, *flags, tmp_path / folder, **patches)
        assert found.code == 0 and not found.err, found.err
        return found.out

    with pytest.raises(Stop):
        life("parts", after=3)
    assert "continuing after step 3" in life("parts")
    assert "10 training and 2 test videos of 2 classes" in life("whole")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 4)


def test_held_out_clips_are_decoded_by_workers(tmp_path, monkeypatch):
    """They change no number, and none of them is left."""
    animations(tmp_path, ".gif", a=6)
    files = VideoFiles(sorted(map(str, (tmp_path / "a").iterdir())))
    view = ClipCrop(Crop(8), frames=2), lambda x, rand: x
    before = multiprocessing.active_children()
    found = []
    for workers in (0, 2):
        numbers = []
        decoding = readers.decoding

        def spy(decoder, workers, *args, decoding=decoding, numbers=numbers, **options):
            numbers.append(workers)
            return decoding(decoder, workers, *args, **options)

        monkeypatch.setattr(readers, "decoding", spy)
        settings = ([view], 3, 0, CPU, workers)
        found.append(held_out(torch.nn.Identity(), Split(files), settings, torch.mean))
        assert numbers == [workers]
        monkeypatch.undo()
    assert found[0] == found[1] and 0 < found[0]["held_out"] < 1
    assert multiprocessing.active_children() == before


@NEEDS_AV
def test_videos_of_the_benchmark_are_written_linked_and_decoded(tmp_path):
    """tests/bench_scale.py --videos, without its training: two videos of four seconds, with names
    for two classes of two files, of which one each is held out."""
    paths = bench_scale.write_videos(tmp_path, count=2, seconds=4)
    data = bench_scale.build(tmp_path, paths, classes=2, files=2)
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.mp4"))
    assert names == [f"class000{c}/000{c}_0000{i}.mp4" for c in (0, 1) for i in (0, 1)]
    train = load_data(str(data), tmp_path, CPU).train.images
    assert len(train) == 2 and open_video(train.paths[0]).length == 48

    found = bench_scale.decoding(data, clips=3)
    assert list(found) == ["seconds to open the folder", "clips per second of one process"]
    assert all(value > 0 for value in found.values())


@pytest.mark.thorough
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from Linux")
def test_a_long_video_is_never_in_memory(film):
    """600 frames of 320 x 480 would be 276 MB."""

    def memory():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    write(film, [Fraction(k, 12) for k in range(600)], size=(320, 480))
    before = memory()
    for _ in pictures(open_video(film), range(600)):
        assert memory() - before < 50e6  # bytes
