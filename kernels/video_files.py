"""A reader of a folder of video files.

    VideoFiles(paths)   video files, decoded and cropped by worker processes

It keeps the promises of Files (kernels/readers.py): any number of processes or workers gives the
same clips, and a file that cannot be read is replaced by the next one, named once, and counted. It
shows what VideosInMemory (kernels/clips.py) shows of videos in memory: per epoch one clip of each
video, from a random moment on, all its frames cut to the same box.

Time. Files have many frame rates, or none that is constant. Here a video has FPS frames per second:
frame k is what is on show k / FPS seconds after the beginning, that is, the latest frame whose time
stamp is not after this time. A video begins with its first packet (the compressed data of a frame)
and ends when its last packet does. Both are found without decoding. What a file says about its own
duration is not used: that may be missing, too long, or include the sound.

Decoding begins at the keyframe before a clip (a frame that can be decoded without those before it)
and ends with the clip. Nothing but the frames of the clip is kept in memory. In a damaged file the
frames between a packet that cannot be decoded and the next keyframe are left out: the last good one
stays on show.

MP4, WebM, MKV, AVI and MOV are decoded by PyAV (pip install av), which nothing else here needs; GIF
and animated WebP by PIL.
"""

import contextlib
import itertools
import math
import os
import stat
from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from kernels.collectives import fail
from kernels.readers import Files, shape_of
from kernels.views import BICUBIC, MOMENT, ClipCrop

try:
    import av
except ImportError:
    av = None
OLDEST = 17  # version of PyAV, the first with to_image(threads=1)

FPS = 12  # frames per second of a clip: the rate of the embedded films
ROUNDING = Fraction(1, 1000)  # seconds: WebM and MKV store time stamps in whole milliseconds
ANIMATIONS = (".gif", ".webp")
SHORTEST = 10  # ms: a GIF that gives its frames no more is shown with 100 ms, as browsers do
FAR = 10**6  # seconds, after the end of any video
BACK = 10  # seconds, in which most videos have a keyframe
NOTHING = "no frame can be decoded"
UPRIGHT = {  # rotation in degrees, against the clock -> what the stored picture must undergo
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


class VideoFiles(Files):
    """Reader of video files: of each a clip (T, 3, size, size) for a ClipCrop, a frame (3, size,
    size) for a Crop, and the middle frame as the whole. Otherwise as Files. No file is opened
    before it is shown."""

    NOUN = "videos"

    def __init__(self, paths, broken=None):
        super().__init__(paths, broken)
        if not all(is_animation(path) for path in paths):
            require_av()

    def check(self, crops):
        """Nothing: how long a video is shows when it is opened."""

    def keys(self, plan):
        return ClipKeys(plan)

    def decoder(self, crops=None, size=None):
        return ClipDecoder(self.paths, crops, size)


def require_av():
    """Exits with a one-line message if PyAV is missing or too old. Called before there are workers,
    of which each could only fail by itself."""
    version = "none" if av is None else av.__version__
    if av is None or int(version.split(".")[0]) < OLDEST:
        fail(
            f"videos are decoded by PyAV {OLDEST} or newer, and {version} is installed: "
            f'pip install "av>={OLDEST}" (GIF and animated WebP need none)'
        )


class ClipKeys:
    """A plan as the batch sampler of a DataLoader: (index, per view a row of crop numbers, per view
    the moment at which the clip begins)."""

    def __init__(self, plan):
        self.plan = plan

    def __iter__(self):
        plan = self.plan
        for step, (index, draws) in enumerate(plan, plan.first):
            moments = []
            for view in range(plan.view_count):
                rand = plan.random(plan.epoch, step, view, MOMENT)
                moments.append(rand.uniform().numpy())
            yield list(zip(index.tolist(), zip(*draws), zip(*moments)))


class ClipDecoder(Dataset):
    """Video files as uint8 tensors, in a worker process. To train, crops are given: a key is one of
    ClipKeys. To evaluate, a size: a key is an index."""

    def __init__(self, paths, crops=None, size=None):
        self.paths = paths
        self.crops = crops
        self.size = size

    def __getitem__(self, key):
        """-> the index that was read, views [(T, 3, size, size) or (3, size, size), ...], and of
        broken files [(index, path, reason), ...]."""
        first, draws, moments = key if self.crops else (key, None, None)

        # In training a broken file gives way to the next one, in evaluation to a black image.
        broken = []
        for place in range(first, first + (100 if self.crops else 1)):
            index = place % len(self.paths)
            path = self.paths[index]
            try:
                return index, self.views(path, draws, moments), broken
            except Exception as error:  # PyAV and PIL raise nearly anything
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                broken.append((index, path, reason))

        shapes = [shape_of(crop) for crop in self.crops or ()] or [(3, self.size, self.size)]
        return index, [torch.zeros(shape, dtype=torch.uint8) for shape in shapes], broken

    def views(self, path, draws, moments):
        video = open_video(path)
        if self.crops:
            drawn = zip(self.crops, draws, moments)
            return [clip_of(video, crop, u, moment) for crop, u, moment in drawn]

        [picture] = pictures(video, [video.length // 2])
        picture = TF.resize(picture, round(self.size * 256 / 224), BICUBIC)
        return [TF.pil_to_tensor(TF.center_crop(picture, self.size))]


def clip_of(video, crop, u, moment):
    """A ClipCrop or Crop with its random numbers: u (22,), and moment in [0, 1) -> uint8
    (T, 3, size, size), or (3, size, size)."""
    one_frame = not isinstance(crop, ClipCrop)
    clip = ClipCrop(crop, frames=1) if one_frame else crop
    if video.length < clip.span:
        raise ValueError(f"{video.length} frames at {FPS} a second, a clip has {clip.span}")
    [places] = clip.places(np.array([moment]), np.array([video.length]))  # (T,)

    # The same numbers give the same box of each frame.
    frames = [clip.crop.cut(picture, u) for picture in pictures(video, places.tolist())]
    frames = torch.stack([TF.pil_to_tensor(frame) for frame in frames])
    return frames[0] if one_frame else frames


# -------- One video -------------------------------------------------------------------------------


def open_video(path):
    """An Animation or a Film. Both have

    start     Fraction, seconds: the time stamp at which the video begins
    length    int: how many frames it has at FPS frames per second
    frames(since)     iterator of (time stamp, frame), from a frame before `since` on, or from the
                      first on
    picture(frame)    such a frame as a PIL picture, RGB and upright
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
        raise OSError("not a regular file")
    return Animation(path) if is_animation(path) else Film(path)


def is_animation(path):
    return os.fspath(path).lower().endswith(ANIMATIONS)


def pictures(video, places):
    """For each of the places (int, in ascending order) the PIL picture on show at that time. Before
    the first frame this is the first one, and after the last frame the last one."""
    times = [video.start + Fraction(place, FPS) + ROUNDING for place in places]

    # Rarely there is no good frame where a clip begins: its keyframe is damaged, or is shown later
    # than a frame that was stored after it. Then decoding begins earlier, at last with the first.
    for since in (times[0], times[0] - BACK, None):
        frames = video.frames(since)
        first = next(frames, None)
        if first is not None and first[0] <= times[0]:
            break
    if first is None:
        raise ValueError(NOTHING)

    shown = first[1]
    following = next(frames, None)
    for time in times:
        while following is not None and following[0] <= time:
            shown = following[1]
            following = next(frames, None)
        yield video.picture(shown)


def length_of(duration):
    """How many times k / FPS, k = 0, 1, ..., a duration in seconds holds; at least one."""
    return max(1, math.ceil((duration - ROUNDING) * FPS))


class Film:
    """A video file that PyAV decodes. Of several streams of pictures the first is shown."""

    def __init__(self, path):
        self.path = path
        with open_stream(path) as stream:
            # In AVI, H.264's frames that are not stored in the order in which they are shown have
            # wrong time stamps. They are counted instead.
            coder = stream.codec_context
            avi = stream.container.format.name == "avi"
            self.counted = avi and coder.name == "h264" and coder.has_b_frames
            self.rate = stream.average_rate

            first = next(stamped(packets_of(stream)), None)
            if first is None:
                raise ValueError(NOTHING)
            self.start = stamp_of(first)

            # The end is read from the last keyframe on or, if that cannot be found, from the first.
            end = end_of(packets_of(stream)) if seek(stream, FAR) else None
        if end is None:
            with open_stream(path) as stream:
                end = end_of(packets_of(stream))
        self.length = length_of(end - self.start)

    def frames(self, since=None):
        if self.counted:
            for number, frame in enumerate(self.decode()):
                yield self.start + number / self.rate, frame
        else:
            for frame in self.decode(since):
                if stamp_of(frame) is not None:
                    yield stamp_of(frame), frame

    def decode(self, since=None):
        """The frames from the keyframe before `since` on, or all."""
        with open_stream(self.path) as stream:
            if since is not None and not seek(stream, since):
                return

            # After a seek, frames before the first keyframe may build on others that are missing.
            begun = since is None
            damaged = False
            for packet in packets_of(stream):
                # After a damaged packet nothing is good before the next keyframe, except what the
                # decoder still holds, which the empty packet at the end asks for.
                damaged = packet.is_corrupt or (damaged and not packet.is_keyframe)
                if damaged and packet.size:
                    continue
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    damaged = True
                    continue
                for frame in frames:
                    begun = begun or frame.key_frame
                    if begun and not frame.is_corrupt:
                        yield frame

    def picture(self, frame):
        # Threads of the conversion to RGB would end only with the frame. A worker process that was
        # forked while one lives would wait for such threads for ever.
        picture = frame.to_image(threads=1)
        turn = UPRIGHT.get(frame.rotation % 360)
        return picture if turn is None else picture.transpose(turn)


@contextlib.contextmanager
def open_stream(path):
    """The stream of pictures of a file, without the cover of a song, which is one, too."""
    with av.open(path, metadata_errors="replace") as container:
        covers = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & covers]
        if not streams:
            raise ValueError("no picture")
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError("PyAV has no decoder for it")
        stream.codec_context.thread_count = 1  # the workers use all cores
        yield stream


def packets_of(stream):
    """The packets of a stream, up to where the file is damaged; the last one, empty, makes the
    decoder give what it still holds."""
    try:
        yield from stream.container.demux(stream)
    except av.FFmpegError:
        return


def seek(stream, seconds):
    """Goes to the last keyframe that is not after a time stamp. Returns whether that worked."""
    try:
        stream.container.seek(math.floor(seconds / stream.time_base), stream=stream)
    except av.FFmpegError:
        return False
    return True


def stamp_of(item):
    """The time stamp of a packet or frame, a Fraction in seconds, or None."""
    stamp = item.dts if item.pts is None else item.pts
    return None if stamp is None else stamp * item.time_base


def stamped(packets):
    """Packets with a time stamp, whole, and to be shown: some only help to decode later ones."""
    for packet in packets:
        if stamp_of(packet) is not None and not packet.is_corrupt and not packet.is_discard:
            yield packet


def end_of(packets):
    """When the last of the packets ends, or None. One without a duration is shown for 1 / FPS."""
    ends = []
    for packet in stamped(packets):
        duration = packet.duration * packet.time_base if packet.duration else Fraction(1, FPS)
        ends.append(stamp_of(packet) + duration)
    return max(ends, default=None)


class Animation:
    """A GIF or a WebP file that PIL decodes, always from the first frame on; twice, because the
    durations of its frames are not known before. A picture without motion is one long frame."""

    start = Fraction(0)

    def __init__(self, path):
        self.path = path
        self.length = length_of(sum(duration for _, duration in self.decode()))

    def frames(self, since=None):
        stamp = self.start
        for picture, duration in self.decode():
            yield stamp, on_white(picture)
            stamp += duration

    def decode(self):
        """(a PIL picture, which the next frame overwrites; its duration in seconds), ..., up to
        where the file is damaged."""
        with Image.open(self.path) as picture:
            for number in itertools.count():
                try:
                    picture.seek(number)
                    picture.load()
                except Exception:  # EOFError after the last frame, and nearly any on damaged ones
                    if number == 0:
                        raise
                    return
                duration = picture.info.get("duration", 0)
                yield picture, Fraction(duration if duration > SHORTEST else 100) / 1000

    def picture(self, frame):
        return frame


def on_white(picture):
    """A PIL picture as RGB, with white where it is transparent."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
