"""The evaluation: kNN, linear probe, retrieval and collapse panel against values computed by hand or by scikit-learn, and a
network and a set of images that leave it as they came, for any number of processes."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import common
import methods.simclr  # noqa: F401  before a test replaces common.load_data, which it takes over
from common import Data, Split, backbone, collapse_panel, evaluate, features, fit_logistic, knn, linear_probe, pixels, retrieval

CPU = torch.device("cpu")
CHANCE = 4 * 100 * math.sqrt(0.1 * 0.9 / 2000)  # percent: four standard deviations of 2,000 guesses among ten classes


def at_angles(*degrees):
    """Unit vectors (n, 2): the cosine of two is that of the angle between them."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def noise(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def random_labels(n, classes, seed):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def clusters(n, dim, classes, seed, spread=1.0):
    """Features (n, dim) around one centre a class, and labels."""
    labels = random_labels(n, classes, seed)
    return noise(classes, dim, 99)[labels] + spread * noise(n, dim, seed + 1), labels


# -------- kNN -------------------------------------------------------------------------------------------------------------

def test_knn_weighs_by_exp_of_cosine_over_temperature():
    # One neighbour of label 0 at cosine 1, two of label 1 at cosine s: label 0 wins if exp(1 / 0.07) > 2 exp(s / 0.07), that
    # is, if s < 1 - 0.07 ln 2 = 0.95148. The fourth is at cosine -1.
    def won_by(s, k, **options):
        angle = math.degrees(math.acos(s))
        bank, labels = at_angles(0.0, angle, -angle, 180.0), torch.tensor([0, 1, 1, 2])
        return [knn(bank, labels, at_angles(0.0), torch.tensor([label]), k, **options) for label in range(3)]
    assert won_by(0.950, 3) == [100, 0, 0] and won_by(0.953, 3) == [0, 100, 0]
    assert won_by(0.950, 4) == [100, 0, 0] and won_by(0.953, 4) == [0, 100, 0]  # exp(-1 / 0.07) of a vote changes nothing
    assert won_by(0.953, 1) == [100, 0, 0]
    assert won_by(0.5, 3, temperature=1e4) == [0, 100, 0]  # a large temperature: the majority
    assert won_by(0.998, 3, temperature=1e-3) == [100, 0, 0]  # a small one: the nearest; and no overflow
    bank, labels = at_angles(0.0, 90.0, 180.0, 270.0), torch.tensor([0, 1, 2, 3])
    assert knn(bank, labels, at_angles(10.0, 80.0, 190.0, 300.0, 5.0), torch.tensor([0, 1, 2, 3, 1]), 1) == 80


def test_knn_on_separable_features_on_noise_and_on_itself():
    x, labels = clusters(1000, 16, 10, seed=0, spread=0.1)
    test, test_labels = clusters(700, 16, 10, seed=7, spread=0.1)  # 700: more than one block of 512
    assert knn(x, labels, test, test_labels, 20) == 100 and knn(x, labels, x, labels, 20) == 100
    x, labels = noise(2000, 16, 0), random_labels(2000, 10, 1)
    for k in (20, 200):
        assert abs(knn(x, labels, noise(2000, 16, 2), random_labels(2000, 10, 3), k) - 10) < CHANCE
    assert knn(x, labels, x, labels, 1) == 100  # the nearest of each is itself


def test_knn_depends_on_directions_only_and_accepts_a_k_beyond_the_bank():
    (x, labels), (test, test_labels) = (clusters(300, 16, 5, seed, spread=2.0) for seed in (0, 7))
    found = knn(x, labels, test, test_labels, 20)
    assert 30 < found < 95  # hard enough that a change would show
    turn = torch.linalg.qr(noise(16, 16, 5))[0]
    lengths = noise(300, 1, 6).exp()
    assert knn(lengths * x @ turn, labels, test @ turn, test_labels, 20) == found
    # k beyond the bank: everyone votes
    assert knn(x[:50], labels[:50], test, test_labels, 200) == knn(x[:50], labels[:50], test, test_labels, 50)
    assert knn(x[:1], labels[:1], test, test_labels, 200) == 100 * (test_labels == labels[0]).double().mean().item()


# -------- Linear probe ----------------------------------------------------------------------------------------------------

def test_probe_on_one_hot_features_and_on_random_labels():
    labels, test_labels = random_labels(300, 7, 0), random_labels(200, 7, 1)
    assert linear_probe(F.one_hot(labels).float(), labels, F.one_hot(test_labels).float(), test_labels) == 100
    found = linear_probe(noise(2000, 32, 0), random_labels(2000, 10, 1), noise(2000, 32, 2), random_labels(2000, 10, 3))
    assert abs(found - 10) < CHANCE


def standardised(x, y):
    """The features x and the others y by the mean and the standard deviation of x, as linear_probe has them."""
    return [(v - x.mean(0)) / (x.std(0) + 1e-6) for v in (x, y)]


def by_sklearn(x, y, decay):
    """scikit-learn minimises C * sum of losses + ||w||^2 / 2; ours is the mean of losses + decay / 2 ||w||^2."""
    return LogisticRegression(C=1 / (len(x) * decay), tol=1e-9, max_iter=10_000).fit(x.double().numpy(), y.numpy())


@pytest.mark.parametrize("decay", [1.0, 0.01, 1e-3])
def test_logistic_regression_is_that_of_scikit_learn_and_has_converged(decay):
    x, y = clusters(600, 24, 5, seed=0, spread=2.5)
    x = x @ torch.diag(torch.logspace(-2, 1, 24))  # columns of very different size ...
    x = (x - x.mean(0)) @ torch.linalg.eigh(torch.cov(x.T))[1]  # ... and decorrelated, as linear_probe does
    weight, bias = fit_logistic(x, y, x.square().mean(0), decay, torch.zeros(5, 24), torch.zeros(5))

    w, b = weight.double().requires_grad_(), bias.double().requires_grad_()
    (F.cross_entropy(F.linear(x.double(), w, b), y) + decay / 2 * w.square().sum()).backward()
    scale = (0.1 * x.square().mean(0) + decay).rsqrt()  # the solver's coordinates are w / scale
    # the solver stops at 1e-4; the logits are in float32, whose mean over the images adds less than 1e-5
    assert (w.grad * scale).abs().max() < 1.1e-4 and b.grad.abs().max() < 1.1e-4

    # In the solver's coordinates the curvature is of the order of 1, at the least a tenth where few images are in doubt. So
    # its gradient of 1e-4 means an error of 1e-3 at most, in units of the logits that a column of usual size contributes.
    theirs = by_sklearn(x, y, decay)
    assert ((weight - torch.from_numpy(theirs.coef_)) / scale).abs().max() < 1e-3
    ours = F.linear(x, weight, bias).softmax(1).numpy()
    assert np.abs(ours - theirs.predict_proba(x.double().numpy())).max() < 1e-3


def test_probe_is_scikit_learns_with_the_decay_chosen_on_the_bank(monkeypatch):
    (x, y), (test, test_y) = clusters(800, 30, 6, seed=0, spread=3.0), clusters(1000, 30, 6, seed=7, spread=3.0)
    decays = []
    original = common.fit_logistic
    monkeypatch.setattr(common, "fit_logistic", lambda *args: decays.append(args[3]) or original(*args))
    found = linear_probe(x, y, test, test_y)
    tried, chosen = decays[:-1], decays[-1]  # from strong to weak; then one of them again, for all of the bank
    assert len(tried) > 2 and tried == sorted(tried, reverse=True) and chosen in tried
    x, test = standardised(x, test)
    theirs = 100 * by_sklearn(x, y, chosen).score(test.numpy(), test_y.numpy())
    assert 40 < found < 95 and abs(found - theirs) <= 0.1  # one of 1,000 images, where two classes tie within 1e-3

    # the choice, by scikit-learn's loss on the same fifth of the bank: it falls up to the one chosen, then rises
    held = np.isin(np.arange(800), np.random.default_rng(0).permutation(800)[:160])
    losses = [log_loss(y[held], by_sklearn(x[~held], y[~held], d).predict_proba(x[held].double().numpy())) for d in tried]
    assert losses[:-1] == sorted(losses[:-1], reverse=True) and losses[-1] > losses[-2] and chosen == tried[-2]


def test_probe_does_not_take_the_majority_for_an_answer():
    # 80 % of one class. A strong decay leaves only the bias, which always says that class, and a little less decay changes
    # nothing: the search must go on. The centres are 3 standard deviations from the best border: 99 % and more are right.
    y, test_y = (torch.arange(1000) % 5 == 0).long(), (torch.arange(500) % 5 == 0).long()
    x, test = (6 * labels[:, None] * torch.tensor([[1.0, 0.0]]) + noise(len(labels), 2, len(labels)) for labels in (y, test_y))
    assert linear_probe(x, y, test, test_y) > 98.5


def test_probe_does_not_split_groups(monkeypatch):
    fitted = []
    original = common.fit_logistic
    monkeypatch.setattr(common, "fit_logistic", lambda *args: fitted.append(args[1]) or original(*args))
    groups = torch.arange(80) % 20  # four images each; here the label names the group
    linear_probe(noise(80, 8, 0), groups, noise(20, 8, 1), torch.arange(20), groups=1000 - groups)
    for labels in fitted[:-1]:  # a fifth of the groups is held out, whole
        assert sorted(labels.bincount(minlength=20).tolist()) == [0] * 4 + [4] * 16
    assert len(fitted[-1]) == 80  # at last, all of the bank
    fitted.clear()
    linear_probe(noise(80, 8, 0), groups, noise(20, 8, 1), torch.arange(20))
    assert [len(labels) for labels in fitted[:-1]] == [64] * (len(fitted) - 1) and len(fitted[-1]) == 80


def test_probe_ignores_scale_and_offset_and_survives_degenerate_features():
    (x, y), (test, test_y) = clusters(300, 12, 4, 0, spread=2.0), clusters(200, 12, 4, 7, spread=2.0)
    found = linear_probe(x, y, test, test_y)
    scale, offset = noise(1, 12, 5).exp(), 10 * noise(1, 12, 6)
    assert abs(linear_probe(x * scale + offset, y, test * scale + offset, test_y) - found) <= 0.5  # one of 200 images
    constant, wide = torch.ones(300, 3), noise(300, 400, 8)
    assert abs(linear_probe(torch.cat([x, constant], 1), y, torch.cat([test, constant[:200]], 1), test_y) - found) <= 0.5
    assert linear_probe(torch.cat([5 * x, wide], 1), y, torch.cat([5 * test, wide[:200]], 1), test_y) > 25  # more than images
    assert 0 <= linear_probe(constant, y, constant[:200], test_y) <= 100  # collapsed


# -------- Retrieval and collapse panel ------------------------------------------------------------------------------------

def test_retrieval_across_drawings():
    # emoji A by artists 0 and 1 at 0 and 10 degrees, B at 5 and 90. By other artists: A0 sees A1, B1 and finds A1; A1 sees
    # A0, B0 and finds B0, wrong; B0 sees A1, B1 and finds A1, wrong; B1 sees A0, B0 and finds B0.
    x, emoji, drawing = at_angles(0.0, 10.0, 5.0, 90.0), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    assert retrieval(x, emoji, drawing, 1) == 50
    assert retrieval(x, emoji, drawing, 2) == 100
    assert retrieval(x * torch.tensor([[5.0], [1.0], [0.1], [3.0]]), emoji, drawing, 1) == 50  # cosine
    # 600 emoji by two artists, alike up to a little noise: all are found. By chance: one in 600.
    emoji, drawing = torch.arange(1200) // 2, torch.arange(1200) % 2
    x = noise(600, 32, 0)[emoji]
    assert retrieval(x + 0.1 * noise(1200, 32, 1), emoji, drawing, 1) == 100
    assert retrieval(noise(1200, 32, 2), emoji, drawing, 1) < 1


def test_rankme():
    def rankme(x):
        return collapse_panel(x, x[:5], x[:5])["rankme"]
    orthonormal = torch.linalg.qr(noise(1000, 64, 0))[0]
    assert rankme(orthonormal) == pytest.approx(64, abs=5e-3)
    assert rankme(noise(1000, 1, 1) @ noise(1, 64, 2)) == pytest.approx(1, abs=5e-4)
    gaussian = noise(1000, 64, 3)
    assert rankme(gaussian) == pytest.approx(63.5, abs=0.1)
    assert rankme(1000 * gaussian) == pytest.approx(rankme(gaussian), abs=1e-3)
    # singular values 3 and 1: p = 3/4, 1/4, exp(entropy) = (4/3)^(3/4) 4^(1/4) = 1.7548
    assert rankme(orthonormal[:, :2] * torch.tensor([3.0, 1.0])) == pytest.approx(1.7548, abs=1e-4)
    assert rankme(noise(40, 64, 4)) <= 40 + 1e-3  # at most the number of images


def test_uniformity_alignment_and_spread():
    x = at_angles(0.0, 90.0, 180.0)
    panel = collapse_panel(x, 7 * x, x)
    # squared distances 2, 2 and 4 of the three pairs
    assert panel["uniformity"] == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3), rel=1e-5)
    assert panel["alignment"] == pytest.approx(0, abs=1e-12)
    # columns 1, 0, -1 and 0, 1, 0: standard deviations 1 and 1/sqrt(3)
    assert panel["feature_std"] == pytest.approx((1 + 3 ** -0.5) / 2, rel=1e-5)
    assert panel["feature_std_isotropic"] == pytest.approx(2 ** -0.5)
    # 60 degrees apart: squared distance 2 - 2 cos 60 = 1; opposite: 4; together: 0
    panel = collapse_panel(x, x, at_angles(60.0, 270.0, 180.0))
    assert panel["alignment"] == pytest.approx(5 / 3, rel=1e-5)
    sphere = noise(3000, 50, 0)
    assert collapse_panel(sphere, sphere, sphere)["feature_std"] == pytest.approx(50 ** -0.5, rel=0.01)


def test_collapsed_features():
    same = torch.ones(100, 8) * torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 1.0, 1.0, -1.0])
    panel = collapse_panel(same, same, same)
    assert panel == pytest.approx({"feature_std": 0, "rankme": 1, "alignment": 0, "uniformity": 0,
                                   "feature_std_isotropic": 8 ** -0.5}, abs=1e-4)
    assert all(math.isfinite(v) for v in collapse_panel(0 * same, 0 * same, 0 * same).values())  # dead features


# -------- The whole of it -------------------------------------------------------------------------------------------------

def some_emoji(bank, test):
    """The emoji, cut to the first images of either side."""
    data = common.load_data("emoji", "unused", CPU)
    train, held = (Split(*(part[:n].clone() for part in split)) for split, n in ((data.train, bank), (data.test, test)))
    return Data("emoji", train, train, held)


def test_features_are_in_index_order_and_resized():
    index = torch.arange(600)  # more than two blocks of 256
    colour = torch.stack([index % 256, index // 256, 0 * index], 1).to(torch.uint8)[:, :, None, None]
    for side in (4, 7):
        x, readable = features(pixels(4), Split(colour.expand(-1, -1, side, side).contiguous()), 4, CPU)
        assert x.shape == (600, 3 * 4 * 4) and x.dtype == torch.float32 and readable.all()
        expected = common.normalize(colour / 255).expand(-1, -1, 4, 4).flatten(1)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)  # of values up to 2.6: float32 in resizing


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_returns_everything_and_leaves_the_network_alone(training):
    data = some_emoji(160, 80)
    torch.manual_seed(0)
    network = backbone("resnet14", 16).train(training)
    network(torch.randn(8, 3, 16, 16))  # so that batch-norm has met something
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = evaluate(network, data, 16, CPU)
    assert set(found) == {"knn20", "knn200", "linear", "retrieval1", "retrieval5", "feature_std", "feature_std_isotropic",
                          "rankme", "alignment", "uniformity"}
    assert all(math.isfinite(v) for v in found.values())
    assert all(0 <= found[name] <= 100 for name in ("knn20", "knn200", "linear", "retrieval1", "retrieval5"))
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(module.training == training for module in network.modules())
    assert all(w.grad is None and w.requires_grad for w in network.parameters())
    assert evaluate(network, data, 16, CPU) == found  # nothing in it is random
    assert evaluate(network, data, 16, CPU, only_knn=True) == {k: found[k] for k in ("knn20", "knn200", "retrieval1",
                                                                                      "retrieval5")}
    unlabelled = Data("some", Split(data.train.images), Split(data.train.images), None)
    assert set(evaluate(network, unlabelled, 16, CPU)) == {"feature_std", "feature_std_isotropic", "rankme", "alignment",
                                                           "uniformity"}


def test_probe_of_evaluate_keeps_the_drawings_of_an_emoji_together(monkeypatch):
    seen = []
    monkeypatch.setattr(common, "linear_probe", lambda *args, groups: seen.append(groups) or 0.0)
    data = some_emoji(40, 8)
    evaluate(pixels(8), data, 8, CPU)
    assert torch.equal(seen[0], data.bank.emoji)


def evaluated(sizes):
    """The evaluation, and the features, in this process."""
    data = some_emoji(*sizes)
    torch.manual_seed(0)
    network = backbone("resnet14", 16)
    return evaluate(network, data, 16, CPU), features(network, data.bank, 16, CPU)[0]


def test_evaluation_does_not_depend_on_the_number_of_processes(processes):
    expected, x = evaluated((203, 96))
    for world in (2, 3):  # 203 images do not divide
        for found, others in processes(world, evaluated, (203, 96)):
            # A convolution may add its products in another order in a batch of other size: a few roundings of 6e-8 in each of
            # ten layers. Accuracies are counts, and the same.
            torch.testing.assert_close(others, x, rtol=1e-4, atol=1e-5)
            accuracies = {"knn20", "knn200", "linear", "retrieval1", "retrieval5"}
            assert {k: found[k] for k in accuracies} == {k: expected[k] for k in accuracies}
            assert found == pytest.approx(expected, rel=1e-4)


# -------- python common.py ------------------------------------------------------------------------------------------------

@pytest.fixture
def run_folder(tmp_path):
    """The files of a finished run that common.py needs: an untrained resnet14."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"seed": 3, "arch": "resnet14", "size": 16, "data": "emoji"}
    (folder / "metrics.jsonl").write_text(json.dumps({"method": "simclr", "settings": settings}) + "\n")
    torch.manual_seed(3)
    torch.save(backbone("resnet14", 16).state_dict(), folder / "backbone.pt")
    return folder


def test_common_evaluates_a_backbone_on_a_folder(program, run_folder, tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in (("blue", [20, 30, 200]), ("red", [200, 40, 20])):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            x = (rng.normal(colour, 20, (20, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(x).save(tmp_path / "images" / name / f"{i}.png")
    found = program("common.py", run_folder / "backbone.pt", "--data", tmp_path / "images", "--workers", 0)
    lines = found.stdout.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == ["raw", "random", "trained"]
    results = json.loads(lines[-1])
    assert results["evaluation"] == results["random_init"]  # the seed of the run gives its initial weights again
    assert results["pixels"]["knn20"] == results["pixels"]["linear"] == 100


def call_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["common.py", *map(str, arguments)])
    common.main()


@pytest.fixture
def little_fashion(monkeypatch):
    """load_data that cuts what it loads to 100 images a side, and is asked for fashion."""
    original = common.load_data

    def load(name, root, device):
        assert name == "fashion"
        data = original(name, root, device)
        train, test = (Split(split.images[:100], split.labels[:100]) for split in (data.train, data.test))
        return Data(name, train, train, test)
    monkeypatch.setattr(common, "load_data", load)


def test_common_evaluates_on_another_set_than_the_one_of_training(monkeypatch, capsys, run_folder, little_fashion):
    call_main(monkeypatch, run_folder / "backbone.pt", "--data", "fashion", "--size", 28)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    for result in results.values():  # no retrieval: no drawings
        assert {"knn20", "knn200", "linear", "rankme"} <= set(result) and "retrieval1" not in result
    assert results["pixels"]["feature_std_isotropic"] == (3 * 28 * 28) ** -0.5  # at the size that was asked for


@pytest.mark.parametrize("spoil, sentence", [
    ("no backbone", "give the backbone.pt of a run folder, with its metrics.jsonl beside it"),
    ("no metrics", "give the backbone.pt of a run folder, with its metrics.jsonl beside it"),
    ("empty metrics", "metrics.jsonl"),
    *((spoil, "is damaged, or not a resnet14") for spoil in ("text", "empty", "cut", "tensor", "checkpoint", "resnet18"))])
def test_common_refuses_a_wrong_file_with_one_sentence(monkeypatch, capsys, run_folder, little_fashion, spoil, sentence):
    path = run_folder / "backbone.pt"
    if spoil in ("no backbone", "no metrics"):
        (path if spoil == "no backbone" else run_folder / "metrics.jsonl").unlink()
    elif spoil == "empty metrics":
        (run_folder / "metrics.jsonl").write_text("")
    elif spoil in ("text", "empty", "cut"):
        path.write_bytes({"text": b"no weights", "empty": b"", "cut": path.read_bytes()[:1000]}[spoil])
    else:
        torch.save({"tensor": torch.zeros(3), "checkpoint": {"state": {}, "step": 3},
                    "resnet18": backbone("resnet18", 16).state_dict()}[spoil], path)
    with pytest.raises(SystemExit, match="1"):
        call_main(monkeypatch, path, "--data", "fashion")
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run_folder}") and sentence in error and error.count("\n") == 1
