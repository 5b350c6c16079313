"""Magic init: statistics within layers, filters against numpy and the official formulas, speeds
between layers, features that do not change, and the run folder."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, ROOT, arguments, call_main, light, light_backbone, noise, tiny_data
from torch import nn
from torchvision.models.resnet import Bottleneck

import common
from methods import magic_init

SIZE = 16
KINDS = pytest.mark.parametrize("filters", magic_init.FILTERS)


def network():
    """A stem and a residual block with a shortcut: images -> (n, 32)."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
    block = Bottleneck(16, 8, downsample=shortcut)
    return nn.Sequential(*stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def images(n=40, seed=0):
    """Smooth images: neighbouring pixels are alike."""
    x = noise(n, 3, 4, 4, seed=seed, dtype=torch.float32)
    return F.interpolate(x, (SIZE, SIZE), mode="bilinear") + 0.1 * noise(n, 3, SIZE, SIZE).float()


def initialised(filters, x=None, seed=0):
    net = network()
    magic_init.within_layers(net, images() if x is None else x, filters, 0.1, seed)
    return net


def outputs(net, x):
    """What leaves each batch-norm, before the ReLU: [(channels, values), ...]."""
    found = []
    handles = []
    for _, norm in magic_init.layers(net):
        handles.append(norm.register_forward_hook(lambda m, i, y: found.append(y.clone())))
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return [y.transpose(0, 1).flatten(1) for y in found]


# -------- Within layers ---------------------------------------------------------------------------


@KINDS
def test_every_channel_has_mean_beta_and_deviation_one(filters):
    """In evaluation and in training alike, in the last layer as in the first: each was treated on
    what the layers before it, already treated, give."""
    net = initialised(filters)
    for y in outputs(net.eval(), images()):
        torch.testing.assert_close(y.mean(1), torch.full((len(y),), 0.1), rtol=0, atol=1e-4)
        torch.testing.assert_close(y.std(1, correction=0), torch.ones(len(y)), rtol=0, atol=1e-4)
    evaluated = net(images())
    trained = copy.deepcopy(net).train()(images())
    torch.testing.assert_close(evaluated, trained, rtol=1e-3, atol=1e-4)


def test_without_it_channels_differ():
    """What the method mends: the spreads of an ordinary network differ 20-fold and more."""
    net = light_backbone("resnet14", SIZE).eval()
    spreads = torch.cat([y.std(1) for y in outputs(net, images())])
    assert spreads.max() / spreads.min() > 20


def test_layers_are_pairs_of_a_convolution_and_the_batch_norm_that_follows():
    """In the project's ResNet, branches included: it gets what the convolution gives."""
    net = light_backbone("resnet14", SIZE).eval()
    pairs = magic_init.layers(net)
    assert len(pairs) == 1 + 4 * 4  # the stem; per stage three convolutions and a shortcut
    given = {}
    got = {}
    for conv, norm in pairs:
        conv.register_forward_hook(lambda module, inputs, y: given.update({module: y}))
        norm.register_forward_hook(lambda module, inputs, y: got.update({module: inputs[0]}))
    net(images(2))
    assert all(given[conv] is got[norm] for conv, norm in pairs)


def test_rescaling_keeps_the_directions_of_the_filters():
    before = network()
    after = initialised("rescaled")
    for (old, _), (new, _) in zip(magic_init.layers(before), magic_init.layers(after)):
        cosine = F.cosine_similarity(old.weight.flatten(1), new.weight.flatten(1))
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert not torch.equal(before[0].weight, after[0].weight)


def test_brighter_images_change_the_first_layer_alone():
    one = magic_init.layers(initialised("rescaled"))
    three = magic_init.layers(initialised("rescaled", 3 * images()))
    torch.testing.assert_close(one[0][0].weight, 3 * three[0][0].weight)
    for (a, _), (b, _) in zip(one[1:], three[1:]):
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-3, atol=1e-4)


def test_a_channel_that_is_constant_stays_finite():
    net = network()
    net[0].weight.data[3] = 0
    magic_init.within_layers(net, images(), "rescaled", 0.1, 0)
    assert all(value.isfinite().all() for value in net.state_dict().values())


@KINDS
def test_plain_images_give_finite_weights(filters):
    net = network()
    magic_init.within_layers(net, torch.zeros_like(images()), filters, 0.1, 0)
    assert all(value.isfinite().all() for value in net.state_dict().values())


@KINDS
def test_the_same_seed_gives_the_same_weights(filters):
    first, again, other = (initialised(filters, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    # the random mixtures of PCA, the first centres of k-means
    same = all(torch.equal(value, other[key]) for key, value in first.items())
    assert same == (filters == "rescaled")


# -------- Filters ---------------------------------------------------------------------------------


def conv_of(inputs, outputs, kernel=1):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)


def test_pca_by_hand():
    """Two inputs that mostly rise together, with the variances 9 along (1, 1) and 1 across: the
    whitened directions are (1, 1) / (3 sqrt 2) and (1, -1) / sqrt 2, the leading one last."""
    u = torch.tensor([1.0, 1.0, -1.0, -1.0]) * 3
    v = torch.tensor([1.0, -1.0, 1.0, -1.0])
    x = torch.stack([u + v, u - v], 1)[:, :, None, None] / 2**0.5 + 5  # (4, 2, 1, 1), any mean
    weight = magic_init.new_filters(conv_of(2, 2), x, "pca", np.random.default_rng(0))
    across, along = weight.flatten(1)
    torch.testing.assert_close(along.abs(), torch.full((2,), 1 / (3 * 2**0.5)))
    torch.testing.assert_close(across.abs(), torch.full((2,), 1 / 2**0.5))
    assert along[0] * along[1] > 0 > across[0] * across[1]


def test_answers_of_pca_filters_are_uncorrelated():
    conv = conv_of(3, 20, kernel=3)  # 20 of 27 directions
    x = images()
    conv.weight.data = magic_init.new_filters(conv, x, "pca", np.random.default_rng(0), 10**6)
    answers = conv(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(answers, correction=0), torch.eye(20), rtol=0, atol=1e-3)


def official(D, kind, count, centres=None):
    """initializeWeight of the official code, for data (M, D): without the division by the answers'
    deviation, which comes later here. centres(whitened data): in place of k-means."""
    D = D - D.mean(0)
    s, V = np.linalg.eigh(D.T @ D)
    order = np.argsort(s)[-count:]
    s, V = s[order], V[:, order]
    S = np.diag(np.where(s < 1e-6, 0, 1 / np.sqrt(s + 1e-3)))
    if kind == "pca":
        return S @ V.T
    white = D @ V @ S
    white = white / np.linalg.norm(white, axis=1)[:, None]
    return centres(white) @ S @ V.T


@pytest.mark.parametrize("filters", ["pca", "kmeans"])
def test_filters_are_those_of_the_official_code(monkeypatch, filters):
    """Up to the scale of each, which the layer's own answers decide afterwards. The centres of
    k-means are replaced by the first samples, the official kind "rand"."""
    monkeypatch.setattr(magic_init, "typical", lambda white, count, rng: white[:count])
    conv = conv_of(3, 12, kernel=3)
    x = images().double()
    found = magic_init.new_filters(conv, x, filters, np.random.default_rng(0), 10**6).flatten(1)
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1).numpy()
    expected = official(patches, filters, 12, lambda white: white[:12])
    expected = F.normalize(torch.from_numpy(expected), dim=1)
    cosine = (F.normalize(found, dim=1) * expected).sum(1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine), rtol=0, atol=1e-5)
    if filters == "kmeans":  # no sign is left open
        assert (cosine > 0).all()


def test_typical_finds_groups():
    """Three groups of unit vectors: one centre each, near its mean."""
    means = torch.eye(4, dtype=torch.float64)[:3]
    white = F.normalize(means.repeat_interleave(50, 0) + 0.05 * noise(150, 4), dim=1)
    centres = magic_init.typical(white, 3, np.random.default_rng(0))
    nearest = torch.cdist(means, centres).min(1)
    assert nearest.values.max() < 0.1 and len(nearest.indices.unique()) == 3


@pytest.mark.parametrize("filters", ["pca", "kmeans"])
def test_more_filters_than_directions(filters):
    """4 inputs, of which one is a copy: 3 directions, 9 filters. All are of use and differ."""
    x = noise(500, 4, 1, 1, dtype=torch.float32)
    x[:, 3] = x[:, 2]
    weight = magic_init.new_filters(conv_of(4, 9), x, filters, np.random.default_rng(0))
    unit = F.normalize(weight.flatten(1), dim=1)
    assert weight.isfinite().all() and torch.linalg.matrix_rank(unit, atol=1e-3) == 3
    assert ((unit @ unit.T).abs() - torch.eye(9)).max() < 0.9999
    # the direction in which the copies differ is not blown up
    torch.testing.assert_close(weight[:, 2], weight[:, 3], rtol=1e-3, atol=1e-3)


def test_fewer_patches_than_filters_gives_random_ones():
    x = noise(5, 4, 1, 1, dtype=torch.float32)
    weight = magic_init.new_filters(conv_of(4, 9), x, "kmeans", np.random.default_rng(0))
    expected = np.random.default_rng(0)
    expected.permutation(5)
    assert torch.equal(weight.flatten(), torch.from_numpy(expected.standard_normal(36)).float())


# -------- Between layers --------------------------------------------------------------------------


def test_speeds_by_hand():
    """Of each layer the gradient's root mean square over that of the weights; the network itself
    is left as it was."""
    net = initialised("rescaled")
    before = copy.deepcopy(net.state_dict())
    r = magic_init.speeds(net, images(), 7)
    assert not net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(w.grad is None for w in net.parameters())

    net.train()
    h = net(images())
    push = torch.from_numpy(np.random.default_rng(7).standard_normal(h.shape)).float()
    (h * push).sum().backward()
    for found, (conv, _) in zip(r, magic_init.layers(net), strict=True):
        expected = conv.weight.grad.square().mean().sqrt() / conv.weight.square().mean().sqrt()
        torch.testing.assert_close(found, expected.detach())


@KINDS
def test_all_layers_learn_at_the_same_speed(filters):
    """The geometric mean of the speeds before, in every layer; each weight by the published
    factor."""
    net = initialised(filters)
    weights = [conv.weight.detach().clone() for conv, _ in magic_init.layers(net)]
    r = magic_init.speeds(net, images(), 0)
    assert r.max() / r.min() > 2  # there is something to do
    magic_init.between_layers(net, images(), 0)
    after = magic_init.speeds(net, images(), 0)
    mean = r.log().mean().exp()
    torch.testing.assert_close(after, mean.expand(len(r)), rtol=0.02, atol=0)
    for old, ratio, (conv, _) in zip(weights, r, magic_init.layers(net)):
        torch.testing.assert_close(conv.weight.detach(), old * (ratio / mean).sqrt())


def test_speeds_between_layers_change_no_feature():
    """Neither of an initialised nor of a trained network, in evaluation and in training."""
    trained = network()
    for _, norm in magic_init.layers(trained):
        for i, values in enumerate((norm.weight.data, norm.bias.data, norm.running_mean)):
            values.copy_(1 - i + 0.3 * noise(len(values), seed=i).float())
        norm.running_var.copy_(0.5 + noise(len(norm.running_var)).float().square())
    other = images(seed=5)
    for net in (trained, initialised("pca")):
        expected = net.eval()(other), copy.deepcopy(net).train()(other)
        magic_init.between_layers(net, images(), 0)
        found = net.eval()(other), copy.deepcopy(net).train()(other)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


# -------- Program ---------------------------------------------------------------------------------


def quick(monkeypatch):
    """The probe takes seconds."""
    monkeypatch.setattr(common, "pixels", lambda *_: nn.AdaptiveAvgPool2d(8))
    monkeypatch.setattr(common, "linear_probe", lambda *args, **options: 50.0)


def run(folder, *flags):
    flags = ["--size", SIZE, "--batch", 24, "--workers", 0, "--out", folder, *flags]
    return call_main("magic_init", *flags, **light("magic_init"))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_leaves_the_folder_of_a_run(monkeypatch, tmp_path):
    """The table has all kinds; backbone.pt has the one asked for; a second start changes nothing,
    one after a kill begins anew and ends the same."""
    quick(monkeypatch)
    found = run(tmp_path / "run", "--filters", "pca")
    assert found.code == 0, found.err
    for word in ("He", "rescaled", "pca", "kmeans", "raw pixels", "random init", "magic_init"):
        assert f"\n{word} " in found.out
    left = files(tmp_path / "run")
    assert {"backbone.pt", "metrics.jsonl", "views.png", "filters.png"} <= set(left)
    assert "curve.png" not in left  # there is none: nothing is trained

    lines = [json.loads(line) for line in left["metrics.jsonl"].decode().splitlines()]
    assert len(lines) == 2 and lines[0]["settings"]["epochs"] == 0
    assert {"evaluation", "random_init", "pixels", "train_seconds"} <= set(lines[1])
    assert lines[1]["evaluation"] != lines[1]["random_init"] and lines[1]["train_seconds"] > 0

    # the table, as it was printed
    table = lines[1]["table"]
    assert list(table) == ["He", *magic_init.FILTERS]
    assert table["pca"] == lines[1]["evaluation"] | {"speeds": table["pca"]["speeds"]}
    for name, row in table.items():
        assert (row["speeds"] > 2) == (name == "He")
        words = found.out.split(f"\n{name} ")[1].split("\n")[0].split()
        assert words[0] == f"{row['knn20']:.1f}" and words[-1] == f"{row['speeds']:.1f}"

    net = common.load_backbone(tmp_path / "run")
    assert (net.method, net.arch, net.size) == ("magic_init", "resnet14", SIZE)
    args = arguments("magic_init", "--size", SIZE, "--batch", 24)
    x, _ = magic_init.initial_images(args, tiny_data(), CPU)
    for y in outputs(net, x):
        torch.testing.assert_close(y.mean(1), torch.full((len(y),), 0.1), rtol=0, atol=1e-3)

    assert run(tmp_path / "run", "--filters", "pca").code == 0
    assert files(tmp_path / "run") == left
    for name in ("backbone.pt", "filters.png"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert run(tmp_path / "run", "--filters", "pca").code == 0
    assert files(tmp_path / "run")["backbone.pt"] == left["backbone.pt"]


def test_picture_has_the_leading_directions_of_pca(tmp_path, monkeypatch):
    """A stem with 32 filters sees 27 directions, of which the last ones lead. The five filters
    after them, random mixtures, are left out."""
    drawn = []
    monkeypatch.setattr(magic_init, "save_grid", lambda path, rows, *_, note: drawn.extend(rows))
    nets = {}
    for filters in ("rescaled", "pca"):
        nets[filters] = nn.Sequential(conv_of(3, 32, kernel=3), nn.BatchNorm2d(32))
        magic_init.within_layers(nets[filters], images(), filters, 0.1, 0)
        nets[filters].first_layer = nets[filters][0]
    magic_init.draw_filters(tmp_path / "filters.png", nets)
    (shown,) = drawn
    assert shown.shape == (12, 3, 3, 3) and shown.min() == 0 and shown.max() == 1

    weight = nets["pca"][0].weight.detach().flatten(1)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    assert torch.equal(shown.flatten(1), ((weight - low) / (high - low))[15:27])
    x = images()
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    variance = (patches @ F.normalize(weight).T).var(0)
    assert variance[:27].diff().min() > 0  # from the least to the largest


def trained_run(folder, arch="resnet14", method="rotnet"):
    """A run folder with a network whose batch-norm has seen images."""
    folder.mkdir()
    torch.manual_seed(0)
    net = common.backbone(arch, SIZE)
    net.train()(images())
    about = {"method": method, "arch": arch, "size": SIZE, "data": "emoji"}
    torch.save({**about, "weights": net.state_dict()}, folder / "backbone.pt")
    settings = {"settings": {"data": "emoji", "seed": 3}}
    (folder / "metrics.jsonl").write_text(json.dumps(settings) + "\n")
    return folder


def test_the_network_of_a_run_is_rescaled(tmp_path):
    """The same features, other weights, equal speeds; what is known of the run comes along."""
    folder = trained_run(tmp_path / "rotnet-emoji-3")
    found = run(tmp_path / "new", "--run", folder)
    assert found.code == 0, found.err
    assert "times as fast as the slowest, now 1.0" in found.out
    old, new = common.load_backbone(folder), common.load_backbone(tmp_path / "new")
    assert (new.method, new.arch, new.size, new.data) == ("rotnet", "resnet14", SIZE, "emoji")
    x = images(seed=5)
    torch.testing.assert_close(new(x), old(x), rtol=1e-3, atol=1e-4)
    assert not torch.equal(new.conv1.weight, old.conv1.weight)
    (first, *rest), (copied, *others) = [
        common.read_lines(path / "metrics.jsonl") for path in (folder, tmp_path / "new")
    ]
    assert copied["settings"] == first["settings"] | {"rescaled": True} and others == rest

    again = run(tmp_path / "new", "--run", folder)
    assert again.code == 1 and "holds a network already" in again.err


def test_a_rescaled_run_has_a_folder_beside_the_others(tmp_path, monkeypatch):
    folder = trained_run(tmp_path / "rotnet-emoji-3")
    monkeypatch.chdir(tmp_path)
    found = call_main("magic_init", "--run", folder, "--batch", 24, "--workers", 0)
    assert found.code == 0, found.err
    assert (tmp_path / "runs" / "rotnet-emoji-3-rescaled" / "backbone.pt").exists()


def test_a_vision_transformer_is_refused(tmp_path, capsys):
    folder = trained_run(tmp_path / "run", "vit_micro", "simclr")
    found = run(tmp_path / "new", "--run", folder)
    assert found.code == 1 and "vit_micro has no batch-norm" in found.err
    assert found.err.count("\n") == 1 and not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        arguments("magic_init", "--arch", "vit_micro")
    assert "--arch: invalid choice" in capsys.readouterr().err


def quick_run(folder):
    """A run in this process, with the others if there are any."""
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        found = run(folder)  # k-means, whose centres depend on rounding the most
    assert found.code == 0, found.err
    return found.out


def test_recorded_rows_have_the_gain_of_k_means():
    """The vote of neighbours is better than in random filters by more than the seeds differ."""
    text = (ROOT / "tests" / "results" / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    rows = [row for row in rows if row["method"] == "magic_init"]
    assert all(row["settings"]["filters"] == "kmeans" for row in rows)
    ours = np.array([row["evaluation"]["knn20"] for row in rows])
    random = np.array([row["random_init"]["knn20"] for row in rows])
    assert len(rows) >= 3
    assert ours.mean() - random.mean() > 2 * (ours.std(ddof=1) + random.std(ddof=1))


@pytest.mark.thorough
def test_two_processes_find_the_weights_of_one(processes, tmp_path):
    """Each reads half of the images and knows all; one speaks for both."""
    (alone,) = processes(1, quick_run, tmp_path / "1")
    first, second = processes(2, quick_run, tmp_path / "2")
    assert "kmeans" in first and second == ""
    saved = [torch.load(tmp_path / name / "backbone.pt") for name in "12"]
    weights, others = [file["weights"] for file in saved]
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


@pytest.mark.parametrize("column", ["emoji", "paper"])
def test_every_column_is_accepted(column):
    args = arguments("magic_init", "--recipe", column, "--data", "emoji")
    assert args.recipe == column and args.epochs == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--epochs", 1), "--epochs 1: choose at least 0 and at most 0"),
        (("--filters", "zca"), "--filters: invalid choice"),
        (("--recipe", "paper"), "--recipe paper needs images"),
        (("--batch", 1), "--batch 1: choose at least 2"),
        (("--size", 1), "--size 1: choose at least 2"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("magic_init", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err


def test_more_images_than_there_are_is_refused_before_anything_is_written(tmp_path):
    found = run(tmp_path / "run", "--batch", 25)
    assert found.code == 1 and "--batch 25: choose 2 to 24" in found.err
    assert not (tmp_path / "run").exists()
