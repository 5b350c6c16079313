"""Arrow of Time: the loss by hand, both directions from the same frames, and clips about which
nothing but chance can be right."""

import json
import math

import pytest
import torch
from conftest import CPU, arguments, call_main, light, noise, short, tiny_clips

from common import Data, Loader, Split, held_out
from kernels.clips import VideosInMemory, rendered
from kernels.views import BatchRandom, denormalize
from methods import arrow_of_time

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def model(moments=3):
    torch.manual_seed(0)
    return arrow_of_time.ArrowOfTime("resnet14", 16, moments, 32)


def shown(x, monkeypatch, *flags):
    """What augment() makes of clips x (n, F, 3, H, W), without changes of colour."""
    monkeypatch.setattr(arrow_of_time, "color_jitter", lambda x, *_: x)
    ((_, augment),) = arrow_of_time.views(arguments("arrow_of_time", *flags))
    return augment(x, BatchRandom([0], len(x)))


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """Guessing: log 2. A clip forwards that is right by 2, and backwards wrong by 3."""
    zeros = torch.zeros(4, 2, dtype=torch.float64)
    assert arrow_of_time.arrow_loss(zeros).item() == pytest.approx(math.log(2))
    logits = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(3))) / 2
    assert arrow_of_time.arrow_loss(logits).item() == pytest.approx(expected, rel=1e-12)


def test_loss_is_the_mean_over_clips():
    logits = noise(6, 2)
    parts = [arrow_of_time.arrow_loss(one) for one in logits.split(1)]
    torch.testing.assert_close(
        arrow_of_time.arrow_loss(logits), torch.stack(parts).mean(), **EXACT
    )


def test_directions_count_alike():
    """Played the other way, with the opposite answers, the loss is the same."""
    logits = noise(6, 2)
    exchanged = -logits.flip(1)
    torch.testing.assert_close(
        arrow_of_time.arrow_loss(logits), arrow_of_time.arrow_loss(exchanged), **EXACT
    )


def test_the_same_answer_for_both_is_at_best_a_guess():
    """Whatever the answer: of the two, one is right; and no loss is below log 2."""
    same = noise(50, 1).expand(50, 2)
    assert arrow_of_time.accuracy(same) == 0.5
    for one in same:
        assert arrow_of_time.arrow_loss(one[None]) >= math.log(2)
    assert arrow_of_time.accuracy(torch.zeros(5, 2)) == 0.5


def test_accuracy_by_hand():
    logits = torch.tensor([[1.0, -1.0], [2.0, 3.0], [-1.0, 2.0], [0.5, -4.0]])
    assert arrow_of_time.accuracy(logits) == 5 / 8


# -------- Both directions -------------------------------------------------------------------------


def test_moments_by_hand():
    chosen = arrow_of_time.two_frames(arguments("arrow_of_time", "--frames", 12, "--moments", 4))
    assert chosen.tolist() == [[0, 3, 7, 10], [1, 4, 8, 11]]
    chosen = arrow_of_time.two_frames(arguments("arrow_of_time", "--frames", 2, "--moments", 1))
    assert chosen.tolist() == [[0], [1]]


def test_differences_by_hand(monkeypatch):
    """Frames of one grey level, (t / 12)^2: differences of (2 t + 1) / 144, around one half."""
    t = torch.arange(12.0)
    x = (t / 12).square().view(1, 12, 1, 1, 1).expand(2, 12, 3, 8, 8)
    found = shown(x, monkeypatch, "--frames", 12, "--moments", 4)
    assert found.shape == (2, 2, 4, 3, 8, 8)
    steps = 144 * (denormalize(found.flatten(0, 2)).mean((1, 2, 3)).view(2, 2, 4) - 0.5)
    expected = torch.tensor([[1.0, 7.0, 15.0, 21.0], [-21.0, -15.0, -7.0, -1.0]])
    torch.testing.assert_close(steps, expected.expand(2, 2, 4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("frames, moments", [(10, 3), (12, 4), (9, 2)])
def test_a_reversed_clip_has_the_two_parts_exchanged(frames, moments, monkeypatch):
    x = noise(3, frames, 3, 8, 8).sigmoid()
    flags = ("--frames", frames, "--moments", moments)
    found = shown(x, monkeypatch, *flags)
    torch.testing.assert_close(shown(x.flip(1), monkeypatch, *flags), found.flip(1))


def test_all_frames_have_the_same_box_and_colours():
    """A clip of one picture: no difference anywhere, so its boxes, flips and colours cannot tell
    the direction."""
    pictures = tiny_clips().train.images.frames[::12]
    split = Split(VideosInMemory(pictures.repeat_interleave(12, 0), [12] * 24))
    view = arrow_of_time.views(arguments("arrow_of_time", "--min-crop", 0.2))
    _, (x,) = next(Loader(split, view, 24, 0, CPU)(0))
    grey = denormalize(x.flatten(0, 2))
    torch.testing.assert_close(grey, torch.full_like(grey, 0.5), rtol=0, atol=1e-5)


def test_directions_are_the_opposite_of_each_other_on_clips_that_move():
    """After crop, flip and colours: what is lighter forwards is as much darker backwards, at the
    moment that is as far from the other end. And there is something to see."""
    view = arrow_of_time.views(arguments("arrow_of_time"))
    _, (x,) = next(Loader(tiny_clips().train, view, 24, 0, CPU)(0))
    grey = x - arrow_of_time.normalize(torch.full((1, 3, 1, 1), 0.5))
    torch.testing.assert_close(grey[:, 1], -grey[:, 0].flip(1), rtol=0, atol=1e-5)
    assert grey.abs().mean() > 0.05


# -------- The network -----------------------------------------------------------------------------


def test_clips_and_directions_do_not_mix():
    """The logit of a clip in one direction depends on all of its moments and on nothing else, and
    on their order."""
    network = model().eval()
    x = noise(2, 2, 3, 3, 16, 16).float()
    before = network(x)
    assert before.shape == (2, 2)
    for clip in range(2):
        for direction in range(2):
            for moment in range(3):
                other = x.clone()
                other[clip, direction, moment] += noise(3, 16, 16, seed=1).float()
                changed = (network(other) - before).abs() > 1e-6
                expected = torch.zeros(2, 2, dtype=bool)
                expected[clip, direction] = True
                assert torch.equal(changed, expected)
    assert ((network(x.flip(2)) - before).abs() > 1e-6).all()


def test_where_nothing_moves_no_answer_is_better_than_a_guess():
    """Both directions look the same, also to a network in training mode: it normalises them by the
    same statistics."""
    network = model()
    x = arrow_of_time.both_directions(*noise(8, 3, 3, 16, 16).float().expand(2, 8, 3, 3, 16, 16))
    logits = network(x + noise(8, 1, 1, 3, 16, 16, seed=1).float())
    torch.testing.assert_close(logits[:, 0], logits[:, 1])
    assert arrow_of_time.accuracy(logits) == 0.5
    assert arrow_of_time.arrow_loss(logits) >= math.log(2)


# -------- The control -----------------------------------------------------------------------------


class Speeds(torch.nn.Module):
    """Answers "forwards" if more changes at the first moment than at the last: what comes to rest
    gives that away. No training is needed."""

    def forward(self, x):
        grey = x - arrow_of_time.normalize(torch.full((1, 3, 1, 1), 0.5))
        change = grey.abs().mean((3, 4, 5))  # (n, 2, T)
        return change[:, :, 0] - change[:, :, -1]


@pytest.mark.parametrize("film, share", [("movers", 0.75), ("tripod", 0.87)])
def test_lost_energy_tells_the_direction_and_nothing_else_does(film, share):
    """A rule without training, on the same hundred clips with and without losses. With them the
    share that the docstring says is right, within three standard errors; without them no more than
    chance, within two."""
    views = arrow_of_time.views(arguments("arrow_of_time", "--min-crop", 1))
    settings = (views, 25, 0, CPU, 0)
    control = arrow_of_time.reversible_clips(film, 100, CPU)
    assert len(control.images) == 100 and control.labels is None
    lossy, _ = rendered("test", 100, CPU, tripod=film == "tripod")
    found = []
    for split in (Split(lossy), control):
        found.append(held_out(Speeds(), split, settings, arrow_of_time.accuracy)["held_out"])
    assert abs(found[0] - share) < 3 * (share * (1 - share) / 100) ** 0.5
    assert abs(found[1] - 0.5) < 2 * 0.5 / 100**0.5


def test_the_control_is_printed_and_kept(tmp_path, monkeypatch):
    """With tripod, beside held_out, once per epoch."""
    monkeypatch.setattr("common.evaluate", lambda *_, **more: {"knn20": 1.0, "linear": 1.0})
    monkeypatch.setattr("common.draw_curve", lambda *_: None)
    monkeypatch.setattr("common.draw_neighbours", lambda *_: None)
    flags = [*short("arrow_of_time"), "--out", tmp_path / "run"]
    data = tiny_clips()._replace(name="tripod")
    found = call_main("arrow_of_time", *flags, data=data, **light("arrow_of_time"))
    assert found.code == 0, found.err
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert rows.count('"control": ') == rows.count('"held_out": ') == 2
    assert found.out.count("control 0.") == 2


@pytest.mark.thorough
def test_training_learns_the_direction_where_there_is_one(tmp_path, monkeypatch):
    """Five epochs of 400 clips: on 200 held-out ones at least 70 % are right, of those without
    losses half, within three standard errors."""
    monkeypatch.setattr("common.evaluate", lambda *_, **more: {"knn20": 1.0, "linear": 1.0})
    monkeypatch.setattr("common.draw_curve", lambda *_: None)
    monkeypatch.setattr("common.draw_neighbours", lambda *_: None)
    train, test = [Split(*rendered(s, n, CPU)) for s, n in (("train", 400), ("test", 200))]
    data = Data("movers", train, train, test)
    flags = ["--epochs", 5, "--batch", 50, "--workers", 0, "--out", tmp_path / "run"]
    found = call_main("arrow_of_time", *flags, data=data)
    assert found.code == 0, found.err
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["held_out"] > 0.7
    assert abs(last["control"] - 0.5) < 3 * 0.5 / 200**0.5


# -------- What is refused -------------------------------------------------------------------------


def test_more_moments_than_differences():
    found = call_main("arrow_of_time", "--moments", 10)
    assert found.code == 1
    words = "error: --moments 10: 10 frames have 9 differences; choose fewer moments or more frames"
    assert found.err.strip() == words
