"""Videos in memory: which frames a clip has, one box for all of them, and the same clips whatever
the number of processes."""

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, noise

from common import Loader, Split, held_out, load_data
from kernels.clips import CLIPS, VideosInMemory
from kernels.movers import MOVERS
from kernels.views import (
    BatchRandom,
    ClipCrop,
    Crop,
    as_clips,
    as_tall,
    color_jitter,
    normalize,
    random_flip,
)

WHOLE = Crop(8, scale=(1, 1), ratio=(1, 1))


def videos(lengths=(5, 6, 12, 7, 9, 12)):
    """Frames of one colour, 10 x the video + the frame: (F, 3, 8, 8)."""
    values = [10 * video + np.arange(length) for video, length in enumerate(lengths)]
    frames = torch.from_numpy(np.concatenate(values)).byte()
    return VideosInMemory(frames[:, None, None, None].repeat(1, 3, 8, 8), lengths)


def plain(x, rand):
    return x


def shown(reader, view, batch=6, seed=0, epoch=0):
    """{video: the values of its frames} in one epoch."""
    loader = Loader(Split(reader), [view], batch, seed, CPU)
    found = {}
    for _, (x,) in loader(epoch):
        values = (255 * x[..., 0, 0, 0]).round().int().tolist()
        found |= dict(zip(loader.index.tolist(), values))
    return found


def test_a_clip_has_frames_of_one_video_at_equal_distances():
    found = shown(videos(), (ClipCrop(WHOLE, frames=3, stride=2), plain))
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    for video, (a, b, c) in found.items():
        assert a // 10 == b // 10 == c // 10 == video
        assert b - a == c - b == 2


def test_videos_shorter_than_a_clip_are_refused(capsys):
    """When the loader is made, before anything is written."""
    with pytest.raises(SystemExit):
        shown(videos(lengths=(5, 3, 12, 4, 9, 12)), (ClipCrop(WHOLE, frames=3, stride=2), plain))
    words = "clips of 5 frames are asked for, and 2 of 6 videos have fewer, one has 3: choose fewer"
    assert words in capsys.readouterr().err


def test_every_moment_of_a_video_is_shown():
    """A clip of 3 of 5 frames begins at frame 0, 1 or 2."""
    view = ClipCrop(WHOLE, frames=3), plain
    begins = [shown(videos(), view, epoch=epoch)[0][0] for epoch in range(60)]
    assert set(begins) == {0, 1, 2}
    assert min(begins.count(begin) for begin in range(3)) > 8


def test_places_by_hand():
    clip = ClipCrop(WHOLE, frames=3, stride=2)
    moments = np.array([0.0, 0.49, 0.51, 0.999, 0.999])
    lengths = np.array([6, 6, 6, 6, 5])
    expected = [[0, 2, 4], [0, 2, 4], [1, 3, 5], [1, 3, 5], [0, 2, 4]]
    assert clip.places(moments, lengths).tolist() == expected


def test_a_method_for_images_is_given_single_frames():
    found = shown(videos(), (WHOLE, plain))
    assert all(value // 10 == video for video, value in found.items())
    assert len({shown(videos(), (WHOLE, plain), epoch=e)[2] for e in range(20)}) > 5


def test_all_frames_of_a_clip_have_the_same_box():
    """A video of one picture: whatever is cut from it, the frames of the clip are equal, and clips
    of different videos are not."""
    picture = (255 * torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))).byte()
    reader = VideosInMemory(picture.repeat(24, 1, 1, 1), [12, 12])
    view = ClipCrop(Crop(8, scale=(0.2, 0.6)), frames=4), plain
    _, (x,) = next(Loader(Split(reader), [view], 2, 0, CPU)(0))
    assert x.shape == (2, 4, 3, 8, 8)
    torch.testing.assert_close(x, x[:, :1].expand_as(x), rtol=0, atol=0)
    assert (x[0, 0] - x[1, 0]).abs().max() > 0.1


def test_colours_and_flips_are_those_of_the_clip():
    """Of equal frames, frames that are still equal; each clip has a draw of its own."""
    x = torch.rand(1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(8, 4, 1, 1, 1)
    rand = BatchRandom([0], 8)
    x = as_tall(x)
    assert x.shape == (8, 3, 32, 8)
    x = as_clips(normalize(color_jitter(random_flip(x, rand), rand, 0.4, 0.4, 0.4, 0.1)), 4)
    torch.testing.assert_close(x, x[:, :1].expand_as(x))
    assert len({clip.sum().item() for clip in x}) == 8


def test_tall_pictures_and_back():
    x = noise(2, 5, 3, 4, 6)
    tall = as_tall(x)
    assert tall[1, 2, 4 * 3 + 1, 5] == x[1, 3, 2, 1, 5]  # frame 3, row 1
    torch.testing.assert_close(as_clips(tall, 5), x, rtol=0, atol=0)


def test_parts_and_middle_frames():
    reader = videos()
    part = reader.part(torch.tensor([4, 1]))
    assert part.lengths.tolist() == [9, 6] and part.truth is None
    images, broken = next(part.whole(torch.tensor([0, 1]), 8))
    assert images[:, 0, 0, 0].tolist() == [44, 13] and broken == []


def test_the_results_say_how_large_movers_is():
    arrays = np.load(MOVERS)
    train, test = (len(arrays[f"{split}_labels"]) for split in CLIPS)
    words = (
        f"of {CLIPS['train']:,} training and {CLIPS['test']:,} test clips: an animated emoji of "
        f"{train} for training and {test} for the test"
    )
    assert words in " ".join((ROOT / "tests" / "results" / "README.md").read_text().split())


def test_several_numbers_are_averaged_each_for_itself():
    """Of held-out clips: the least and the greatest grey level."""
    settings = ([(WHOLE, plain)], 4, 0, CPU, 0)
    split = Split(videos((4,) * 8))

    def ends(x):
        return torch.stack([x.min(), x.max()])

    found = held_out(torch.nn.Identity(), split, settings, ends)["held_out"]
    for value, end in zip(found, (torch.min, torch.max)):
        assert value == held_out(torch.nn.Identity(), split, settings, end)["held_out"]
    assert found[0] < found[1]


def test_images_have_no_clips(capsys):
    data = load_data("emoji", "", CPU)
    with pytest.raises(SystemExit):
        next(Loader(data.train, [(ClipCrop(WHOLE, 3), plain)], 4, 0, CPU)(0))
    assert "learns from videos" in capsys.readouterr().err


def test_held_out_clips_are_measured_in_eval_mode_and_always_alike():
    """The mean over two batches of four; batch-norm statistics stay as they are."""
    network = torch.nn.BatchNorm2d(3)
    settings = ([(WHOLE, plain)], 4, 0, CPU, 0)
    split = Split(videos((4,) * 8))
    before = network.state_dict()["running_mean"].clone()

    def measure(y):
        assert not network.training
        return y.mean()

    first = held_out(network, split, settings, measure)
    assert first == held_out(network, split, settings, measure)
    assert network.training
    torch.testing.assert_close(network.state_dict()["running_mean"], before)
    frames = [shown(split.images, (WHOLE, plain), batch=4)[video] for video in range(8)]
    expected = sum(frames) / 8 / 255 / (1 + 1e-5) ** 0.5
    assert first["held_out"] == pytest.approx(expected, rel=1e-5)
    assert held_out(network, None, settings, measure) == {}
