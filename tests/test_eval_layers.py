"""methods/eval_layers.py: maps of equal numbers of features, of the layers that they are named
after, and a linear probe on each."""

import math

import pytest
import torch
from conftest import CPU, call_main, light_backbone, noise, tiny_data
from test_eval_features import write_run

import common
from common import (
    backbone,
    candidates,
    features,
    fit_logistic,
    linear_probe,
    new_backbone,
    pixels,
    read_lines,
)
from methods import cpc
from methods.eval_layers import Layer, average, draw_layers, layers, probe

DATA = tiny_data(40, 16)


def run_script(*flags, data=DATA, **patches):
    found = call_main("eval_layers", *flags, "--workers", 0, data=data, **patches)
    out = flags[flags.index("--out") + 1]
    found.rows = read_lines(out / "results.jsonl")
    return found


def test_sizes_of_the_literature():
    """resnet50 at 224 pixels: those of Goyal et al., table 10 of the appendix."""
    maps = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]
    found = [average(torch.zeros(1, c, side, side), 9000).shape[1] for c, side in maps]
    assert found == [9216, 9216, 8192, 9216, 8192]
    # resnet14 at 32 pixels
    maps = [(32, 16), (96, 8), (192, 4), (384, 2), (768, 2)]
    found = [average(torch.zeros(1, c, side, side), 800).shape[1] for c, side in maps]
    assert found == [800, 864, 768, 768, 768]
    # resnet18 at 32 pixels: places that are not square
    maps = [(64, 32), (128, 16), (256, 8), (512, 4)]
    found = [average(torch.zeros(1, c, side, side), 800).shape[1] for c, side in maps]
    assert found == [768, 768, 1024, 1024]
    assert average(torch.zeros(1, 8, 2, 2), 800).shape[1] == 32  # all there is
    assert average(torch.zeros(1, 900, 2, 2), 800).shape[1] == 900  # at least one place


def test_average_of_a_map_and_of_tokens():
    x = noise(2, 3, 4, 4)
    expected = x.view(2, 3, 2, 2, 2, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(average(x, 12), expected)
    token = noise(2, 1, 3, seed=1)
    tokens = torch.cat([token, x.flatten(2).transpose(1, 2)], 1)
    found = average(tokens, 12)
    torch.testing.assert_close(found, torch.cat([expected, token[:, 0]], 1))


def test_layers_of_a_resnet():
    """The stem before max-pooling; the last stage, averaged to one place, is the feature."""
    net = light_backbone("resnet14", 32).eval()
    parts = layers(net)
    assert list(parts) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    x = noise(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        last = Layer(net, parts["layer4"], 800)(x)
        torch.testing.assert_close(last, net(x))
        stem = Layer(net, parts["stem"], 10**9)(x)
        torch.testing.assert_close(stem, net.bn1(net.conv1(x)).relu().flatten(1))
        second = net.layer2(net.layer1(net.maxpool(stem.unflatten(1, (32, 16, 16)))))
        torch.testing.assert_close(Layer(net, parts["layer2"], 10**9)(x), second.flatten(1))
    assert not any(part._forward_hooks for part in net.modules())
    state = {key: value.clone() for key, value in net.state_dict().items()}
    features(Layer(net, parts["layer3"], 800), DATA.test, 32, CPU)
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_layers_of_a_vit():
    net = backbone("vit_micro", 8).eval()
    parts = layers(net)
    assert list(parts) == ["block1", "block2", "block3", "block4"]
    x = noise(2, 3, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        found = Layer(net, parts["block4"], 10**9)(x)  # 96 x 4 patches, then the class token
        assert found.shape == (2, 480)
        torch.testing.assert_close(net.norm(found[:, 384:]), net(x))
        tokens = net.blocks[:2](net.embed(x))
        expected = torch.cat([tokens[:, 1:].mean(1), tokens[:, 0]], 1)
        torch.testing.assert_close(Layer(net, parts["block2"], 96)(x), expected)


@pytest.mark.parametrize("arch", ["resnet14-layer", "vit_micro"])
def test_layers_of_a_network_of_patches(arch):
    """CPC: the layers of the network that sees a patch, for the mean over the 25 patches of an
    image."""
    torch.manual_seed(0)
    net = new_backbone("cpc", arch, 24).eval()
    parts = layers(net)
    assert parts == layers(net.net) and len(parts) > 3
    x = noise(2, 3, 24, 24, dtype=torch.float32)
    patches = cpc.cut_patches(x).flatten(1, 2)  # (2, 25, 3, 8, 8)
    with torch.no_grad():
        for name, part in parts.items():
            view = Layer(net.net, part, 400)
            expected = torch.stack([view(image).mean(0) for image in patches])
            found = Layer(net, part, 400)(x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)
        if "layer4" in parts:  # the encoding is a mean over places, and so is the feature
            torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-4)
    assert not any(part._forward_hooks for part in net.modules())


def test_what_has_no_known_layers():
    assert list(layers(pixels(8))) == ["pixels"]
    assert layers(torch.nn.Linear(3, 3)) == {}


def test_a_run_without_known_layers_alone(tmp_path):
    """Raw pixels are measured, and there is no picture."""
    write_run(tmp_path / "a")

    def unknown(args):
        raw, *_, run = candidates(args)
        return [raw, run._replace(network=torch.nn.Linear(3, 3))]

    out = tmp_path / "out"
    found = run_script(tmp_path / "a", "--out", out, candidates=unknown)
    assert found.code == 0, found.err
    assert "a: left out" in found.out and not (out / "layers.png").exists()
    assert [row["network"] for row in found.rows] == ["raw pixels, 8 px"]


def test_features_that_are_not_finite_end_in_one_sentence(tmp_path):
    """Though all weights are finite."""
    write_run(tmp_path / "a")

    def spoiled(args):
        run = candidates(args)[-1]
        run.network.blocks[1].register_forward_hook(lambda *_: _[2] * math.inf)
        return [run]

    found = run_script(tmp_path / "a", "--out", tmp_path / "out", candidates=spoiled)
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: some features are infinite or not a number")
    assert [row["protocol"] for row in found.rows] == ["linear probe of block1"]


def test_one_class_and_test_labels_that_choose_nothing(monkeypatch):
    x = noise(30, 4, dtype=torch.float32)
    labels = torch.arange(30) % 3
    assert probe(x.clone(), 0 * labels, x.clone(), 0 * labels, None)["linear"] == 100

    fits = []

    def spy(*args, **options):
        fits.append(fit_logistic(*args, **options)[0])
        return fit_logistic(*args, **options)

    monkeypatch.setattr(common, "fit_logistic", spy)
    for test_labels in (labels, labels.flip(0)):
        probe(x.clone(), labels, x.clone(), test_labels, None)
    half = len(fits) // 2
    assert half > 2 and all(torch.equal(*pair) for pair in zip(fits[:half], fits[half:]))


def test_run(tmp_path):
    """One line per layer, after a kill in the middle; the last one of a ResNet is the linear probe
    of its features; a second call measures nothing."""
    net = write_run(tmp_path / "a", arch="resnet14")
    write_run(tmp_path / "vit", seed=4)
    out = tmp_path / "out"
    flags = [tmp_path / "a", tmp_path / "vit", "--out", out, "--features", 20]

    def stopping(*sets):
        if len(read_lines(out / "results.jsonl")) == 7:
            raise InterruptedError
        return probe(*sets)

    with pytest.raises(InterruptedError):
        run_script(*flags, probe=stopping)
    found = run_script(*flags)
    assert found.code == 0, found.err
    assert found.out.count("already measured") == 7
    rows = {}
    for row in found.rows:
        layer = row["protocol"].removeprefix("linear probe of ")
        rows.setdefault(row["network"], {})[layer] = row["result"]
        assert row["settings"] == {"size": 8, "images": [40, 16], "features": 20}
    untrained = ["untrained resnet14, 8 px", "untrained vit_micro, 8 px"]
    assert list(rows) == ["raw pixels, 8 px", *untrained, "a", "vit"]
    assert list(rows["a"]) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert [part["features"] for part in rows["a"].values()] == [32, 96, 192, 384, 768]
    assert [part["features"] for part in rows["vit"].values()] == [192] * 4
    assert rows["raw pixels, 8 px"]["pixels"]["features"] == 18  # 3 x 2 places

    net.eval().to(memory_format=torch.channels_last)
    x = [features(net, split, 8, CPU)[0] for split in (DATA.bank, DATA.test)]
    sets = x[0], DATA.bank.labels, x[1], DATA.test.labels, DATA.bank.emoji
    assert rows["a"]["layer4"]["linear"] == pytest.approx(linear_probe(*sets))

    lines = found.out.splitlines()
    head = next(i for i, line in enumerate(lines) if "layer4" in line and "block4" in line)
    numbers = [f"{part['linear']:.1f}" for part in rows["a"].values()]
    assert lines[head + 4].split() == ["a", *numbers]
    assert (out / "layers.png").stat().st_size > 5000
    again = run_script(*flags, labelled_features=None)
    assert again.rows == found.rows and again.out.splitlines()[-7:] == lines[-7:]


def test_unlabelled_images_are_refused(tmp_path):
    write_run(tmp_path / "a")
    unlabelled = DATA._replace(train=DATA.train._replace(labels=None), test=None)
    found = run_script(tmp_path / "a", "--out", tmp_path / "out", data=unlabelled)
    assert found.code == 1 and found.err.startswith("error: emoji has no labels")


def test_the_picture_has_the_layers_in_the_order_of_depth(tmp_path, drawn):
    """One panel per kind of network; untrained ones are dashed, raw pixels dotted."""
    resnet = {"stem": 50.0, "layer1": 52.0, "layer2": 51.0}
    vit = {"block1": 40.0, "block2": 41.0}
    results = {"raw pixels": {"pixels": 45.0}, "untrained a": resnet, "b": resnet, "c": vit}
    draw_layers(tmp_path / "layers.png", {"small": results})
    first, second = drawn[0].axes
    for axes, known in ((first, resnet), (second, vit)):
        assert [text.get_text() for text in axes.get_xticklabels()] == list(known)
        raw, *others = axes.lines
        assert list(raw.get_ydata()) == [45.0, 45.0] and raw.get_linestyle() == ":"
        assert all(list(line.get_ydata()) == list(known.values()) for line in others)
    assert [line.get_linestyle() for line in first.lines] == [":", "--", "-"]
    assert [line.get_linestyle() for line in second.lines] == [":", "-"]


def of_two_processes(folder, out):
    found = run_script(folder, "--out", out)
    assert found.code == 0, found.err


@pytest.mark.thorough
def test_two_processes(processes, tmp_path):
    write_run(tmp_path / "a")
    alone = run_script(tmp_path / "a", "--out", tmp_path / "one")
    processes(2, of_two_processes, tmp_path / "a", tmp_path / "two")
    together = read_lines(tmp_path / "two" / "results.jsonl")
    assert len(together) == len(alone.rows) == 9
    for row, other in zip(alone.rows, together):
        # one of 16 images may lie on the border
        assert other["result"]["linear"] == pytest.approx(row["result"]["linear"], abs=100 / 16)
