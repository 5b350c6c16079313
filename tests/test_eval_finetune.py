"""methods/eval_finetune.py: the labelled parts are nested and have the proportions of the classes;
trunk and head learn at their own rates, by AdamW's equations; the frozen line is the linear probe;
runs stay as they are; what was measured is not measured again, and is the same if it is."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, call_main, tiny_data
from PIL import Image
from test_eval_features import write_run

from common import (
    Candidate,
    Crop,
    Loader,
    Split,
    backbone,
    evaluate,
    flip_and_normalize,
    pixels,
    read_lines,
)
from methods import eval_finetune
from methods.eval_finetune import (
    PARTS,
    fine_tune,
    get_args,
    labelled_part,
    learning_rate,
    measure,
    parameter_groups,
    summary,
    table,
    with_head,
)

DATA = tiny_data(40, 16)


# -------- The labelled part -----------------------------------------------------------------------


def test_parts_are_nested_and_balanced():
    labels = torch.tensor([0] * 1000 + [1] * 300 + [2] * 40)
    labels = labels[torch.randperm(1340, generator=torch.Generator().manual_seed(0))]
    parts = [labelled_part(labels, part, draw=0) for part in PARTS]
    counts = [labels[part].bincount().tolist() for part in parts]
    # 1 % of 40 is less than one image, but a class without any could not be learned
    assert counts == [[10, 3, 1], [100, 30, 4], [1000, 300, 40]]
    for less, more in zip(parts, parts[1:]):
        assert set(less.tolist()) < set(more.tolist())
    for part in parts:
        assert torch.equal(part, part.unique())  # ascending, none twice
    assert torch.equal(parts[2], torch.arange(1340))


def test_draws_differ_and_are_reproducible():
    labels = torch.arange(200) % 4
    draws = [labelled_part(labels, 0.1, draw) for draw in range(3)]
    assert torch.equal(draws[1], labelled_part(labels, 0.1, 1))
    assert len({tuple(draw.tolist()) for draw in draws}) == 3
    # labels that lack a class, and a class with one image
    assert labelled_part(torch.tensor([3, 5, 5]), 0.01, 0)[0] == 0
    assert len(labelled_part(torch.tensor([3, 5, 5]), 0.01, 0)) == 2


# -------- The training ----------------------------------------------------------------------------


def test_learning_rate_by_hand():
    rates = [learning_rate(0.8, step, 4) for step in range(4)]
    half = 0.8 / 2
    expected = [0.8, half * (1 + math.sqrt(0.5)), half, half * (1 - math.sqrt(0.5))]
    assert rates == pytest.approx(expected)
    assert learning_rate(0.8, 4, 4) == pytest.approx(0)


def test_head_is_small_and_of_the_draw():
    net = backbone("vit_micro", 8).requires_grad_(False)
    models = [with_head(net, 9, draw) for draw in (0, 0, 1)]
    heads = [model[2].weight for model in models]
    assert heads[0].shape == (9, 96) and torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    # 864 weights of deviation 0.01; within five standard errors
    assert abs(heads[0].std() - 0.01) < 5 * 0.01 / (2 * 864) ** 0.5
    assert not models[0][2].bias.any()
    assert all(p.requires_grad for p in models[0].parameters())
    assert not any(p.requires_grad for p in net.parameters())  # it trains a copy


def test_trunk_and_head_have_their_own_rates():
    model = with_head(backbone("resnet14", 8), 3, 0)
    trunk, head = parameter_groups(model, 0.1, 2.0)
    assert trunk["lr"] == 0.1 and head["lr"] == 2.0
    assert {id(p) for p in head["params"]} == {id(p) for p in model[2].parameters()}
    everything = [id(p) for p in trunk["params"] + head["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def run_of(net, size=8, trained=True):
    about = {"arch": "resnet14"} | ({"method": "simclr"} if trained else {})
    return Candidate("a", net, "emoji", size, about)


@pytest.mark.parametrize("trained", [True, False])
def test_first_step_by_hand(trained):
    """Adam's first step moves every weight by its rate, against the sign of its gradient: that of
    the trunk (or from scratch) and that of the head."""
    torch.manual_seed(0)
    net = backbone("resnet14", 8)
    args = get_args(["x", "--steps", "1", "--lr-trunk", "0.002", "--lr-scratch", "0.003"])
    args.batch = 24
    split = Split(DATA.bank.images.part(torch.arange(24)), DATA.bank.labels[:24])
    model, loss = fine_tune(run_of(net, trained=trained), split, 9, 0, CPU, args)

    # the gradient of the same views, in training mode
    expected = with_head(net, 9, 0).train()
    seen = []
    hook = copy.deepcopy(net)
    hook.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    again, _ = fine_tune(run_of(hook, trained=trained), split, 9, 0, CPU, args)
    order = np.random.default_rng([0, 0, 0, 0, 3]).permutation(24)  # of kernels/views.py's Plan
    first = F.cross_entropy(expected(seen[0]), split.labels[torch.from_numpy(order)])
    first.backward()
    assert loss == pytest.approx(first.item(), rel=1e-5)
    rate = 0.002 if trained else 0.003
    for (name, p), q in zip(model.named_parameters(), expected.parameters()):
        large = q.grad.abs() > 1e-4  # far above Adam's epsilon, 1e-8, and the rounding
        step = (p - q.detach())[large]
        lr = 0.01 if name.startswith("2.") else rate
        assert torch.allclose(step, -lr * q.grad[large].sign(), rtol=1e-2), name
    assert large.any()
    # the running statistics of batch-norm followed the batch
    assert model[0].bn1.num_batches_tracked == 1
    assert torch.allclose(model[0].bn1.running_mean, expected[0].bn1.running_mean, atol=1e-6)
    for p, q in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(p, q)  # the same once more


def test_views_are_those_of_the_loader():
    """Random crops and flips, in an order, that belong to the draw."""
    seen = []
    net = backbone("vit_micro", 8)
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    args = get_args(["x", "--steps", "5", "--batch", "4"])
    split = Split(DATA.bank.images.part(torch.arange(10)), DATA.bank.labels[:10])
    fine_tune(run_of(net), split, 9, 7, CPU, args)
    loader = Loader(split, [(Crop(8, scale=(0.2, 1.0)), flip_and_normalize)], 4, 7, CPU)
    views = [view for epoch in range(3) for _, (view,) in loader(epoch)]
    assert len(views) == 6 and len(seen) == 5  # three epochs of two steps; the last is cut short
    for x, view in zip(seen, views):
        assert torch.equal(x, view)


def test_it_learns():
    """Images of two colours: a network from scratch tells them apart after some steps."""
    labels = torch.arange(40) % 2
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    images[labels == 0, 0] = 200
    images[labels == 1, 2] = 200
    split = Split(type(DATA.bank.images)(images), labels)
    data = DATA._replace(train=split, bank=split, test=split)
    args = get_args(["x", "--steps", "20", "--batch", "16", "--workers", "0"])
    torch.manual_seed(0)
    result = measure(run_of(backbone("vit_micro", 8), trained=False), data, 1.0, 0, CPU, args)
    assert result["tuned"] == 100 and result["loss"] < 0.3 and result["labels"] == 40


def test_frozen_line_is_the_linear_probe_and_the_network_stays():
    torch.manual_seed(0)
    net = backbone("resnet14", 8)
    candidate = run_of(net.eval())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    args = get_args(["x", "--steps", "2", "--workers", "0"])
    result = measure(candidate, DATA, 1.0, 0, CPU, args)
    assert result["labels"] == 40
    assert result["frozen"] == evaluate(net, DATA, 8, CPU)["linear"]
    assert 0 <= result["tuned"] <= 100 and math.isfinite(result["loss"])
    assert not net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    eval_finetune.frozen_features.cache_clear()
    eval_finetune.frozen_accuracy.cache_clear()
    assert measure(candidate, DATA, 1.0, 0, CPU, args) == result
    # raw pixels and k-means features have nothing to tune
    raw = Candidate("raw pixels, 8 px", pixels(8), "emoji", 8, {})
    assert measure(raw, DATA, 0.1, 0, CPU, args)["tuned"] is None
    (kmeans,) = eval_finetune.with_kmeans([raw], {"emoji": DATA}, args, CPU)[:-1]
    assert measure(kmeans, DATA, 0.1, 0, CPU, args)["tuned"] is None


def test_frozen_features_are_computed_once(monkeypatch):
    """Three draws of a run: one pass over bank and test images, and one probe of all labels; and
    what is kept is not what the probe overwrites."""
    net = backbone("vit_micro", 8).eval()
    passes = []
    probes = []
    extract, probe = eval_finetune.features, eval_finetune.linear_probe
    monkeypatch.setattr(
        eval_finetune,
        "features",
        lambda network, split, *how: passes.append(network) or extract(network, split, *how),
    )
    monkeypatch.setattr(
        eval_finetune,
        "linear_probe",
        lambda bank, *rest: probes.append(len(bank)) or probe(bank, *rest),
    )
    args = get_args(["x", "--steps", "1", "--workers", "0"])
    jobs = [(part, draw) for draw in range(3) for part in PARTS[1:]]
    found = {job: measure(run_of(net), DATA, *job, CPU, args)["frozen"] for job in jobs}
    assert passes.count(net) == 2 and probes == [4, 40, 4, 4]
    assert found[1.0, 0] == found[1.0, 2] == evaluate(net, DATA, 8, CPU)["linear"]

    for part, draw in jobs:
        index = labelled_part(DATA.bank.labels, part, draw)
        labels, emoji = DATA.bank.labels[index], DATA.bank.emoji[index]
        split = Split(DATA.bank.images.part(index), labels, emoji)
        alone = evaluate(net, DATA._replace(bank=split), 8, CPU)
        assert found[part, draw] == alone["linear"]


def test_one_class_is_always_right():
    """Several images of a single class, and a class with one image."""
    one = DATA.bank._replace(labels=torch.zeros(40, dtype=torch.int64))
    test = DATA.test._replace(labels=torch.zeros(16, dtype=torch.int64))
    args = get_args(["x", "--steps", "2", "--workers", "0"])
    candidate = run_of(backbone("vit_micro", 8))
    for part in (0.1, 1.0):
        found = measure(candidate, DATA._replace(bank=one, test=test), part, 0, CPU, args)
        assert found["labels"] == 40 * part
        assert found["frozen"] == found["tuned"] == 100 and found["loss"] == 0
    rare = DATA.bank.labels.clone()
    rare[0] = 9
    data = DATA._replace(bank=DATA.bank._replace(labels=rare))
    found = measure(candidate, data, 0.1, 0, CPU, args)
    assert 0 <= found["tuned"] <= 100 and math.isfinite(found["loss"])


@pytest.mark.parametrize(
    "case, words",
    [
        ("one image", "1% of the labels is one image: at least two are needed"),
        ("NaN", "some features are infinite or not a number"),
        ("diverges", "choose lower learning rates"),
        ("diverges in the last step", "infinite or not a number: leave this network out"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_sentence(case, words, capsys):
    data = DATA
    net = backbone("vit_micro", 8)
    rate = "1e-3"
    if case == "one image":
        data = data._replace(bank=data.bank._replace(labels=torch.zeros(40, dtype=torch.int64)))
    elif case == "NaN":
        net.norm.bias.data.fill_(math.nan)
    else:
        rate = "1e30"
    steps = "1" if case.endswith("last step") else "3"
    args = get_args(["x", "--steps", steps, "--workers", "0", "--lr-trunk", rate])
    with pytest.raises(SystemExit):
        measure(run_of(net), data, 0.01, 0, CPU, args)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_test_labels_choose_nothing(monkeypatch):
    """Other labels of the test images: all weights are the same."""
    args = get_args(["x", "--steps", "2", "--workers", "0"])
    candidate = run_of(backbone("vit_micro", 8))
    models = []

    def spy(*job):
        models.append(fine_tune(*job))
        return models[-1]

    monkeypatch.setattr(eval_finetune, "fine_tune", spy)
    frozen = []
    monkeypatch.setattr(
        eval_finetune,
        "linear_probe",
        lambda bank, labels, test, *rest: frozen.append((bank, labels, test)) or 50.0,
    )
    for labels in (DATA.test.labels, DATA.test.labels.flip(0)):
        data = DATA._replace(test=DATA.test._replace(labels=labels))
        measure(candidate, data, 0.1, 0, CPU, args)
    assert all(torch.equal(*pair) for pair in zip(*frozen))
    weights = [model.state_dict().values() for model, _ in models]
    assert all(torch.equal(*pair) for pair in zip(*weights))


def test_constant_features_give_the_share_of_a_label():
    class Constant(torch.nn.Module):
        out_dim = 4

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.weight + 0 * x.flatten(1)[:, :4]

    args = get_args(["x", "--steps", "3", "--workers", "0"])
    result = measure(run_of(Constant()), DATA, 1.0, 0, CPU, args)
    shares = 100 * DATA.test.labels.bincount().double() / len(DATA.test.labels)
    assert result["frozen"] in shares.tolist() and result["tuned"] in shares.tolist()


# -------- The script ------------------------------------------------------------------------------


def test_summary_and_table_by_hand():
    lines = {}
    for part, labels in zip(PARTS, (5, 50, 500)):
        for draw, accuracy in enumerate((40.0, 50.0, 60.0)):
            lines[part, draw] = {"labels": labels, "frozen": accuracy, "tuned": 2 * draw}
    found = summary(lines)
    assert found[0.1] == {"labels": 50, "frozen": (50.0, 10.0), "tuned": (2.0, 2.0)}
    bare = {key: {"labels": 5, "frozen": 7.0, "tuned": None} for key in lines if key[1] == 0}
    assert "tuned" not in summary(bare)[0.01] and math.isnan(summary(bare)[0.01]["frozen"][1])
    text = table({"a": found, "raw pixels": summary(bare)}).splitlines()
    assert text[0].split() == ["1%", "frozen", "tuned", "10%", "frozen", "tuned"] + [
        "100%", "frozen", "tuned"
    ]
    assert text[1].split() == ["a", *"50.0 ± 10.0 2.0 ± 2.0".split() * 3]
    assert text[2].split() == ["raw", "pixels", *["7.0", "-"] * 3]
    assert text[-1] == "mean ± deviation over draws, if several; labels 1%: 5, 10%: 50, 100%: 500"


def quick(stop_at=None):
    """In place of measure(): numbers that tell which measurement they are of, and a kill."""
    calls = []
    networks = []

    def measured(candidate, data, part, draw, device, args):
        if len(calls) == stop_at:
            raise InterruptedError
        calls.append((candidate.name, part, draw))
        networks.append((candidate.about.get("seed"), candidate.network))
        tuned = 60.0 + draw if "arch" in candidate.about else None
        return {"labels": round(100 * part), "frozen": 50.0 + draw, "tuned": tuned, "loss": 0.1}

    measured.calls = calls
    measured.networks = networks
    return measured


def run_script(*flags, data=DATA, **patches):
    patches.setdefault("with_kmeans", lambda found, *_: found)
    found = call_main("eval_finetune", *flags, "--workers", 0, data=data, **patches)
    found.rows = read_lines(flags[flags.index("--out") + 1] / "results.jsonl")
    return found


def test_one_baseline_for_all_runs_and_the_picture(tmp_path):
    """Two runs of one architecture: scratch and pixels are measured once, one line each per part
    and draw."""
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=4, method="rotnet")
    measured = quick()
    out = tmp_path / "out"
    found = run_script(tmp_path / "a", tmp_path / "b", "--out", out, measure=measured)
    assert found.code == 0, found.err
    names = ["raw pixels, 8 px", "untrained vit_micro, 8 px", "a", "b"]
    assert measured.calls == [(n, part, draw) for n in names for draw in range(3) for part in PARTS]
    settings = [row["settings"] for row in found.rows if row["network"] in ("a", names[1])]
    args = get_args(["x"])
    assert {row["lr_trunk"] for row in settings} == {args.lr_trunk, args.lr_scratch}
    assert settings[4]["part"] == 0.1 and settings[4]["draw"] == 1
    # each draw from scratch starts from weights of its own, the runs always from the same
    weights = [network.state_dict() for _, network in measured.networks]
    for i, (name, part, draw) in enumerate(measured.calls):
        if name == names[1]:
            assert measured.networks[i][0] == found.rows[i]["seed"] == draw
            torch.manual_seed(draw)
            for key, value in backbone("vit_micro", 8).state_dict().items():
                assert torch.equal(weights[i][key], value), key
        elif name == "a":
            assert measured.networks[i][1] is measured.networks[18][1]
    assert np.asarray(Image.open(out / "finetune.png").convert("RGB")).std() > 5
    assert "51.0 ± 1.0" in found.out and found.out.splitlines()[-1].endswith("results.jsonl")


def test_the_seed_is_the_first_draw(tmp_path):
    """--seed 1 --draws 2 are draws 1 and 2 of the three: what is known is not measured again."""
    write_run(tmp_path / "a", seed=1)
    flags = [tmp_path / "a", "--out", tmp_path / "out"]
    patches = {"draw_curves": lambda *_: None}
    later = quick()
    found = run_script(*flags, "--seed", 1, "--draws", 2, measure=later, **patches)
    assert [draw for _, _, draw in later.calls] == [1, 1, 1, 2, 2, 2] * 3
    untrained = [row["seed"] for row in found.rows if row["network"].startswith("untrained")]
    assert untrained == [1, 1, 1, 2, 2, 2]
    rest = quick()
    run_script(*flags, measure=rest, **patches)
    assert {draw for _, _, draw in rest.calls} == {0}


def test_continues_after_a_kill(tmp_path):
    write_run(tmp_path / "a")
    flags = [tmp_path / "a", "--out", tmp_path / "out", "--draws", 2]
    with pytest.raises(InterruptedError):
        run_script(*flags, measure=quick(stop_at=7))
    patches = {"draw_curves": lambda *_: None}
    rest = quick()
    found = run_script(*flags, measure=rest, **patches)
    assert len(rest.calls) == 3 * 3 * 2 - 7 and len(found.rows) == 18
    none = quick()
    assert run_script(*flags, measure=none, **patches).rows == found.rows and none.calls == []
    # another rate from scratch does not concern the run
    other = quick()
    run_script(*flags, "--lr-scratch", 0.5, measure=other, **patches)
    assert {name for name, _, _ in other.calls} == {"raw pixels, 8 px", "untrained vit_micro, 8 px"}


def test_the_picture_has_three_lines_against_labels(tmp_path, drawn):
    """Fine-tuned, from scratch, and the frozen probe of the trained network, not of the other."""

    def found(tuned, frozen):
        return {
            part: {"labels": labels, "tuned": (tuned + labels, 2.0), "frozen": (frozen, math.nan)}
            for part, labels in zip(PARTS, (10, 100, 1000))
        }

    summaries = {"a": found(20, 40), "untrained": found(10, 30)}
    eval_finetune.draw_curves(tmp_path / "x.png", summaries, {"a": "untrained"}, 3)
    (figure,) = drawn
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and "over 3 draws" in figure.get_suptitle()
    lines = {bars.get_label(): bars for bars in axes.containers}
    heights = {name: list(bars[0].get_ydata()) for name, bars in lines.items()}
    assert heights == {
        "fine-tuned": [30, 120, 1020],
        "from scratch": [20, 110, 1010],
        "frozen, linear probe": [40, 40, 40],
    }
    assert all(list(bars[0].get_xdata()) == [10, 100, 1000] for bars in axes.containers)
    ends = lines["fine-tuned"][2][0].get_segments()[0]
    assert ends[:, 1].tolist() == [28, 32]


def test_run_folder_stays_as_it_is(tmp_path):
    """The whole script with real measurements, of one draw."""
    write_run(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    flags = [tmp_path / "a", "--steps", 2, "--draws", 1, "--out", tmp_path / "out"]
    found = run_script(*flags, draw_curves=lambda *_: None)
    assert found.code == 0, found.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [row["result"]["tuned"] is None for row in found.rows] == [True] * 3 + [False] * 6
    assert "draw 1 of 1" in found.out


def test_images_without_labels_and_several_processes_are_refused(tmp_path):
    write_run(tmp_path / "a")
    flags = [tmp_path / "a", "--out", tmp_path / "out"]
    unlabelled = DATA._replace(train=DATA.train._replace(labels=None), test=None)
    found = run_script(*flags, data=unlabelled)
    assert found.code == 1 and found.err.count("\n") == 1
    assert found.err.startswith("error: --data emoji: labels are needed")
    found = run_script(*flags, world=lambda: 2)
    assert found.code == 1 and "runs in one process" in found.err
