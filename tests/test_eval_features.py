"""methods/eval_features.py: its numbers are those of evaluate(), it continues after a kill, and it
refuses wrong files in one sentence, before anything is measured."""

import json
import shutil

import pytest
import torch
from conftest import CPU, call_main, noise, tiny_data

import methods.simclr
from common import backbone, evaluate, pixels, read_lines
from methods.eval_features import knn_curve, spread

DATA = tiny_data(40, 16)


def write_run(folder, seed=3, arch="vit_micro", size=8, method="simclr", epochs=2):
    """A finished run: an untrained network and a short metrics.jsonl."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    net = backbone(arch, size)
    saved = {"method": method, "arch": arch, "size": size, "data": "emoji"}
    torch.save({**saved, "weights": net.state_dict()}, folder / "backbone.pt")
    lines = [
        {"method": method, "settings": {"data": "emoji", "seed": seed, "epochs": epochs}},
        {"step": 0, "epoch": 0, "loss": 2.0, "knn20": 41.0},
        {"evaluation": {"knn20": 44.0}, "pixels": {"knn20": 30.0}, "random_init": {"knn20": 40.0}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return net


def quick(network, data, size, device, workers=0):
    """evaluate() without the linear probe, which takes longest."""
    return evaluate(network, data, size, device, workers, only_knn=True)


def run_script(*flags, data=DATA, evaluate=quick, draw=False, **patches):
    """main() of the script, and the lines of results.jsonl."""
    patches["evaluate"] = evaluate
    if not draw:
        patches["draw_curves"] = lambda *_: None
    found = call_main("eval_features", *flags, "--workers", 0, data=data, **patches)
    out = flags[flags.index("--out") + 1]
    found.rows = read_lines(out / "results.jsonl")
    return found


class Counter:
    """Counts the evaluations, and stops before one of them, as a kill would."""

    def __init__(self, stop_at=None):
        self.sizes = []
        self.stop_at = stop_at

    def __call__(self, network, data, size, *args):
        if len(self.sizes) == self.stop_at:
            raise InterruptedError
        self.sizes.append(size)
        return quick(network, data, size, *args)


def no_evaluation(*args):
    raise AssertionError("measured something before it looked at all files")


# -------- What is measured ------------------------------------------------------------------------


def test_values_are_those_of_evaluate(tmp_path):
    first = write_run(tmp_path / "simclr-emoji-0")
    second = write_run(tmp_path / "rotnet-emoji-1", seed=4, method="rotnet")
    torch.manual_seed(0)
    networks = {
        "raw pixels, 8 px": pixels(8),
        "untrained vit_micro, 8 px": backbone("vit_micro", 8),
        "simclr-emoji-0": first,
        "rotnet-emoji-1": second,
    }
    expected = {}
    for name, network in networks.items():
        network.to(memory_format=torch.channels_last)  # as in training
        expected[name] = evaluate(network, DATA, 8, CPU)

    asked = []
    folders = [tmp_path / "simclr-emoji-0", tmp_path / "rotnet-emoji-1" / "backbone.pt"]
    out = tmp_path / "out"

    def load(*args):
        asked.append(args[0])
        return DATA

    found = run_script(*folders, "--out", out, evaluate=evaluate, draw=True, load_data=load)
    assert found.code == 0, found.err
    assert asked == ["emoji"]  # what both were trained on, loaded once
    # one untrained network for both: the methods share it
    assert [row["network"] for row in found.rows] == list(expected)
    for row in found.rows:
        assert row["result"] == expected[row["network"]], row["network"]

    # the table: a line per network, the columns in the order of the head
    lines = found.out.splitlines()
    columns = ["knn20", "knn200", "linear", "retrieval1", "retrieval5", "rankme"]
    head = next(i for i, line in enumerate(lines) if line.split() == columns)
    for line, row in zip(lines[head + 1 :], found.rows):
        assert line.startswith(row["network"])
        numbers = [float(word) for word in line.removeprefix(row["network"]).split()]
        assert numbers == [round(row["result"][column], 1) for column in columns]

    # what a line records
    row = found.rows[2]
    assert row["protocol"] == "features" and row["data"] == "emoji"
    assert row["settings"] == {"size": 8, "images": [40, 16]}
    assert row["seed"] == 3 and row["training"]["epochs"] == 2
    assert row["versions"]["torch"] == torch.__version__ and "commit" in row
    assert row["command"].startswith(f"methods/eval_features.py {folders[0]} {folders[1]} --out")
    assert found.rows[1]["seed"] == 0
    assert (out / "curves.png").stat().st_size > 5000


def test_another_size_and_a_network_of_its_own(tmp_path, monkeypatch):
    """A method that makes its backbone itself is compared with its own untrained network."""

    def own(arch, size):
        net = backbone(arch, size)
        net.conv1.register_forward_pre_hook(lambda conv, inputs: (inputs[0].flip(1),))
        return net

    monkeypatch.setattr(methods.simclr, "backbone", own)
    write_run(tmp_path / "a", arch="resnet14")
    counter = Counter()
    found = run_script(tmp_path / "a", "--size", 16, "--out", tmp_path / "out", evaluate=counter)
    names = [row["network"] for row in found.rows]
    assert names == ["raw pixels, 16 px", "untrained resnet14 of simclr made for 8, 16 px", "a"]
    assert counter.sizes == [16, 16, 16]
    torch.manual_seed(0)
    assert found.rows[1]["result"] == quick(own("resnet14", 8), DATA, 16, CPU)


def test_vit_at_another_size_and_images_without_labels(tmp_path):
    net = write_run(tmp_path / "a")
    unlabelled = DATA._replace(train=DATA.train._replace(labels=None), test=None)
    unlabelled = unlabelled._replace(bank=unlabelled.train)
    flags = [tmp_path / "a", "--size", 12, "--out", tmp_path / "out"]
    found = run_script(*flags, data=unlabelled, evaluate=evaluate)
    assert found.code == 0, found.err
    assert "rankme" in found.out and "knn20" not in found.out
    assert found.rows[2]["result"] == pytest.approx(evaluate(net, unlabelled, 12, CPU), rel=1e-5)


def of_two_processes(folder, out):
    found = run_script(folder, "--out", out)
    assert found.code == 0, found.err
    return found.out


def test_several_processes_write_one_file_with_the_same_numbers(processes, tmp_path):
    write_run(tmp_path / "a")
    alone = run_script(tmp_path / "a", "--out", tmp_path / "one").rows
    texts = processes(2, of_two_processes, tmp_path / "a", tmp_path / "two")
    together = read_lines(tmp_path / "two" / "results.jsonl")
    assert len(together) == 3 and texts[0] and not texts[1]
    for row, other in zip(alone, together):
        assert row["network"] == other["network"]
        assert other["result"] == row["result"]


# -------- Continuing ------------------------------------------------------------------------------


def test_continues_after_a_kill_and_measures_nothing_twice(tmp_path):
    write_run(tmp_path / "a")
    out = tmp_path / "out"
    with pytest.raises(InterruptedError):
        run_script(tmp_path / "a", "--out", out, evaluate=Counter(stop_at=2))
    whole = (out / "results.jsonl").read_text()
    assert whole.count("\n") == 2
    (out / "results.jsonl").write_text(whole + '{"protocol": "fea')  # cut short by the kill

    counter = Counter()
    found = run_script(tmp_path / "a", "--out", out, evaluate=counter)
    assert len(counter.sizes) == 1 and len(found.rows) == 3
    assert (out / "results.jsonl").read_text().startswith(whole)
    assert found.out.count(": already measured") == 2
    again = run_script(tmp_path / "a", "--out", out, evaluate=no_evaluation)
    assert again.code == 0 and again.rows == found.rows
    assert again.out.splitlines()[-6:] == found.out.splitlines()[-6:]  # the same table


def test_other_data_sizes_seeds_and_weights_are_kept_apart(tmp_path):
    write_run(tmp_path / "a")
    flags = [tmp_path / "a", "--out", tmp_path / "out"]

    def measured(*more, data=DATA):
        counter = Counter()
        found = run_script(*flags, *more, data=data, evaluate=counter)
        assert found.code == 0, found.err
        return len(counter.sizes)

    assert measured() == 3
    assert measured("--seed", 1) == 1  # another untrained network
    assert measured("--size", 12) == 3
    assert measured("--data", "fashion") == 3
    assert measured(data=tiny_data(40, 12)) == 3  # the same name, other images
    shutil.rmtree(tmp_path / "a")
    write_run(tmp_path / "a", seed=5)  # a new run in the same folder
    assert measured() == 1
    assert measured() == 0 and measured("--size", 12, "--seed", 1) == 2


def test_two_folders_of_one_name(tmp_path):
    write_run(tmp_path / "here" / "a")
    write_run(tmp_path / "there" / "a", seed=4)
    folders = [tmp_path / "here" / "a", tmp_path / "there" / "a", tmp_path / "here" / "a"]
    found = run_script(*folders, "--out", tmp_path / "out")
    assert [row["network"] for row in found.rows[2:]] == ["a", str(folders[1])]
    assert found.rows[2]["weights"] != found.rows[3]["weights"]


# -------- Refusals --------------------------------------------------------------------------------


def refusal(*flags):
    """The one sentence with which the script ends, before anything is measured."""
    found = call_main("eval_features", *flags, evaluate=no_evaluation)
    assert found.code == 1 and found.err.startswith("error: ") and found.err.count("\n") == 1
    return found.err


def test_unfinished_runs_are_left_out(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text('{"method": "simclr"}\n')
    (tmp_path / "empty").mkdir()
    folders = [tmp_path / name for name in ("begun", "a", "empty")]
    found = run_script(*folders, "--out", tmp_path / "out")
    assert found.code == 0 and len(found.rows) == 3
    lines = found.out.splitlines()
    assert lines[:2] == [f"left out, no finished run: {folders[i]}" for i in (0, 2)]
    for left in (folders[:1], [folders[0], folders[2]]):
        words = refusal(*left)
        assert "no finished run in " in words and all(str(folder) in words for folder in left)


def test_what_does_not_exist_or_is_not_named_is_refused(tmp_path):
    write_run(tmp_path / "a")
    assert f"{tmp_path / 'b'}: no such folder" in refusal(tmp_path / "a", tmp_path / "b")
    assert "RUN" in refusal()


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # a tensor by name
@pytest.mark.parametrize("spoil", ["text", "empty", "cut", "tensor", "checkpoint", "resnet14"])
def test_damaged_file_is_refused_before_anything_is_measured(tmp_path, spoil):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    path = tmp_path / "b" / "backbone.pt"
    whole = path.read_bytes()
    if spoil in ("text", "empty", "cut"):
        path.write_bytes({"text": b"no weights", "empty": b"", "cut": whole[:1000]}[spoil])
    else:
        saved = torch.load(path)
        others = {
            "tensor": torch.zeros(3),
            "checkpoint": {"state": {}, "step": 3},
            "resnet14": {**saved, "arch": "resnet14"},  # the weights of another network
        }
        torch.save(others[spoil], path)
    words = refusal(tmp_path / "a", tmp_path / "b")
    assert words.startswith(f"error: {path} is not the backbone.pt of a run")


def test_a_side_that_no_patches_fill_is_refused(tmp_path):
    write_run(tmp_path / "a", arch="resnet14")
    write_run(tmp_path / "vit")
    words = refusal(tmp_path / "a", tmp_path / "vit", "--size", 30)
    assert words.startswith("error: --size 30: choose a multiple of 4, the side of a patch")


# -------- The picture -----------------------------------------------------------------------------


def test_knn_curve():
    first = {"settings": {"epochs": 6}}
    rows = [{"epoch": e, "loss": 1.0, "knn20": 50.0 + e} for e in (1, 3)]
    last = {"evaluation": {"knn20": 57.0}, "random_init": {"knn20": 48.0}}
    curve = [(0, 48.0), (2, 51.0), (4, 53.0), (6, 57.0)]
    assert knn_curve([first, rows[0], {"epoch": 2, "loss": 1.0}, rows[1], last]) == curve
    assert knn_curve([]) == knn_curve([first, *rows]) == []
    assert knn_curve([first, {"evaluation": {"rankme": 3.0}}]) == []


def test_spread():
    assert spread([5.0, 1.0, 1.5, 1.6], 1.0) == [5.0, 1.0, 2.0, 3.0]
    assert spread([2.0, 2.0], 0.5) == [2.0, 2.5]
    heights = noise(20).tolist()
    places = sorted(spread(heights, 0.3))
    assert all(b - a > 0.3 - 1e-9 for a, b in zip(places, places[1:]))
