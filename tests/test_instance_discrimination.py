"""InstDisc: both losses by hand and against the official code in numpy, the memory bank row by row,
who is drawn as another image, and the paper's kNN."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Recorder, arguments, light, noise, tiny_data

import common
from kernels.infonce import bank_loss
from kernels.views import BatchRandom
from methods import instance_discrimination as instdisc

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SAME = {"rtol": 1e-9, "atol": 1e-9}  # float64, summed in another order
FLAGS = ["--size", 16, "--batch", 12, "--epochs", 2, "--warmup", 0, "--dim", 16]


def units(n, d, seed=0):
    return F.normalize(noise(n, d, seed=seed), dim=1)


# -------- The losses ------------------------------------------------------------------------------


def test_softmax_loss_by_hand():
    """Three images at 0, 90 and 180 degrees; a view of the first at 0 degrees, one of the second at
    180 degrees. With tau = 1/2 the logits are (2, 0, -2) and (-2, 0, 2)."""
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    log_z = math.log(math.exp(2) + 1 + math.exp(-2))
    expected = ((log_z - 2) + log_z) / 2
    found = instdisc.softmax_loss(v, bank, torch.tensor([0, 1]), 0.5)
    torch.testing.assert_close(found.item(), expected, **EXACT)


def test_a_network_that_cannot_tell_images_apart_has_the_loss_of_chance():
    """Softmax: log M. NCE: each P is 1 / M, so p = 1 / (1 + K) for all."""
    bank = units(1, 8).expand(50, 8)
    v = units(4, 8, seed=1)
    args = arguments("instance_discrimination", "--loss", "softmax")
    found = instdisc.softmax_loss(v, bank, torch.arange(4), 0.1).item()
    assert found == pytest.approx(math.log(50)) == instdisc.loss_of_chance(args, 50)

    args = arguments("instance_discrimination", "--loss", "nce", "--negatives", 7)
    logits = torch.full((4, 8), 3.0, dtype=torch.float64)
    Z = 50 * logits.exp().mean()
    by_hand = -math.log(1 / 8) - 7 * math.log(7 / 8)
    found = instdisc.nce_loss(logits, Z, 50).item()
    assert found == pytest.approx(by_hand) == instdisc.loss_of_chance(args, 50)


def test_nce_loss_by_hand():
    """M = 10, K = 2, Z = 5: P is 4/5 for the image itself, 1/5 and 2/5 for the others; K / M = 1/5.
    So p = 4/5, 1/2 and 2/3."""
    logits = torch.tensor([[4.0, 1.0, 2.0]], dtype=torch.float64).log()
    found = instdisc.nce_loss(logits, torch.tensor(5.0).double(), 10)
    expected = -math.log(4 / 5) - math.log(1 / 2) - math.log(1 / 3)
    torch.testing.assert_close(found.item(), expected, **EXACT)


def official_softmax(x, y, memory, T, momentum=0.5):
    """lib/LinearAverage.py and the cross-entropy of cifar.py, forward and backward by hand, in
    numpy. Returns the loss, its gradient to x and the new memory, which only the backward pass
    writes."""
    rows = np.arange(len(x))
    out = x @ memory.T / T
    share = np.exp(out)
    share /= share.sum(1, keepdims=True)
    loss = -np.log(share[rows, y]).mean()

    grad_out = share / len(x)
    grad_out[rows, y] -= 1 / len(x)
    grad_x = grad_out / T @ memory

    memory = memory.copy()
    moved = momentum * memory[y] + (1 - momentum) * x
    memory[y] = moved / np.sqrt((moved**2).sum(1, keepdims=True))
    return loss, grad_x, memory


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_softmax_and_the_bank_are_those_of_the_official_code(momentum):
    """Value, gradient and the rows after the step."""
    M, d, T = 40, 16, 0.07
    bank = units(M, d)
    v = units(6, d, seed=1).requires_grad_()
    index = torch.tensor([3, 39, 0, 17, 5, 8])
    found = official_softmax(v.detach().numpy(), index.numpy(), bank.numpy(), T, momentum)
    loss, grad, memory = found

    ours = instdisc.softmax_loss(v, bank, index, T)
    ours.backward()
    torch.testing.assert_close(ours.item(), loss, **EXACT)
    torch.testing.assert_close(v.grad, torch.from_numpy(grad), **EXACT)
    instdisc.update_bank(bank, index, v.detach(), momentum)
    torch.testing.assert_close(bank, torch.from_numpy(memory), **EXACT)


def official_nce(x, y, memory, idx, T, Z=None, momentum=0.5, eps=1e-7):
    """lib/NCEAverage.py and lib/NCECriterion.py, forward and backward by hand, in numpy. Returns
    the loss, its gradient to x, Z and the new memory. idx (B, K + 1): the first column is y."""
    B, K = len(x), idx.shape[1] - 1
    n = len(memory)
    weight = memory[idx]  # (B, K + 1, d)
    out = np.exp(np.einsum("bkd,bd->bk", weight, x) / T)
    Z = out.mean() * n if Z is None else Z
    out = out / Z

    noise_level = K / n
    own = out[:, 0] / (out[:, 0] + noise_level + eps)
    others = noise_level / (out[:, 1:] + noise_level + eps)
    loss = -(np.log(own).sum() + np.log(others).sum()) / B

    grad_out = np.empty_like(out)
    grad_out[:, 0] = -(1 / out[:, 0] - 1 / (out[:, 0] + noise_level + eps)) / B
    grad_out[:, 1:] = 1 / (out[:, 1:] + noise_level + eps) / B
    grad_x = np.einsum("bk,bkd->bd", grad_out * out / T, weight)

    memory = memory.copy()
    rows = memory[y] * momentum + x * (1 - momentum)
    memory[y] = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    return loss, grad_x, Z, memory


def test_nce_and_the_bank_are_those_of_the_official_code():
    """Value, gradient, Z of the first batch and the rows after the step. Their eps of 1e-7 beside
    K / M = 0.2 changes a logarithm by up to 5e-7, and there are nine of them."""
    M, K, d, T = 40, 8, 16, 0.07
    bank = units(M, d)
    v = units(6, d, seed=1).requires_grad_()
    index = torch.tensor([3, 39, 0, 17, 5, 8])
    others = instdisc.draw_others(BatchRandom([0], 6), K, index, M)
    idx = torch.cat([index[:, None], others], 1).numpy()
    found = official_nce(v.detach().numpy(), index.numpy(), bank.numpy(), idx, T)
    loss, grad, Z, memory = found

    logits = instdisc.compare(v, bank, index, others, T)
    torch.testing.assert_close((M * logits.detach().exp().mean()).item(), Z, **EXACT)
    ours = instdisc.nce_loss(logits, torch.tensor(Z), M)
    ours.backward()
    torch.testing.assert_close(ours.item(), loss, rtol=0, atol=5e-6)
    torch.testing.assert_close(v.grad, torch.from_numpy(grad), rtol=1e-5, atol=1e-5)
    instdisc.update_bank(bank, index, v.detach(), 0.5)
    torch.testing.assert_close(bank, torch.from_numpy(memory), **EXACT)


def test_first_loss_of_random_embeddings():
    """All cosines small and random, K = 4096, tau 0.07, d = 128: log(K + 1) + 1 if they were equal,
    plus half the variance of the logits, 1 / (2 d tau^2) = 0.8."""
    K, d, tau = 4096, 128, 0.07
    logits = (units(64, d)[:, None] * units(64 * 16, d, seed=1).view(64, 16, d)).sum(2) / tau
    logits = logits.repeat(1, 257)[:, : K + 1]
    Z = 1000 * logits.exp().mean()
    found = instdisc.nce_loss(logits, Z, 1000).item()
    assert math.log(K + 1) + 1 < found
    assert found == pytest.approx(math.log(K + 1) + 1 + 1 / (2 * d * tau**2), abs=0.3)


def test_both_losses_of_perfect_embeddings_are_0():
    """Both losses agree on what is perfect: with v at its own row and at right angles to all others
    each goes to 0 with the temperature."""
    bank = torch.eye(6, dtype=torch.float64)
    index = torch.arange(6)
    others = torch.stack([index.roll(-shift) for shift in range(1, 6)], 1)
    logits = instdisc.compare(bank, bank, index, others, 0.02)
    assert instdisc.softmax_loss(bank, bank, index, 0.02) < 1e-20
    assert instdisc.nce_loss(logits, torch.tensor(math.exp(25)).double(), 6) < 1e-9


def test_proximal_term_by_hand():
    """At the row, at a right angle and opposite to it: 0, 2 and 4; it pulls towards the row."""
    rows = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    term = instdisc.proximal_term(v, rows)
    assert term.item() == 2
    term.backward()
    torch.testing.assert_close(v.grad, 2 * (v.detach() - rows) / 3)


@pytest.mark.parametrize("tau", [0.02, 0.1])
def test_fused_loss_equals_the_formula(tau):
    """Float32 against float64: logits of up to 50 are rounded by 3e-6, and the gradient has the
    factor 1 / tau."""
    v = units(5, 128, seed=1).float()
    bank = units(60, 128).float()
    index = torch.tensor([59, 3, 0, 3, 17])
    plain = v.double().requires_grad_()
    fused = v.clone().requires_grad_()
    expected = instdisc.softmax_loss(plain, bank.double(), index, tau)
    found = bank_loss(fused, bank, index, tau)
    (3 * expected).backward()
    (3 * found).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.grad.double(), plain.grad, rtol=1e-5, atol=1e-5 / tau)


def test_softmax_loss_is_fused_unless_on_a_cpu(monkeypatch):
    monkeypatch.setattr(instdisc, "bank_loss", lambda *arguments: arguments)
    on_cpu = units(3, 4), units(9, 4), torch.tensor([4, 0, 8]), 0.1
    assert instdisc.softmax_loss(*on_cpu).shape == ()
    elsewhere = *[x.to("meta") for x in on_cpu[:3]], 0.1
    assert instdisc.softmax_loss(*elsewhere) == elsewhere


def test_fused_loss_trains_the_same_on_two_processes(train):
    name = "instance_discrimination"
    flags = [*FLAGS, "--loss", "softmax"]
    alone = train(name, *flags, **light(name))
    fused = train(name, *flags, world=2, softmax_loss=bank_loss, **light(name))
    torch.testing.assert_close(fused.losses, alone.losses, **SAME)
    torch.testing.assert_close(fused.state["model/bank"], alone.state["model/bank"], **SAME)


# -------- The others ------------------------------------------------------------------------------


def test_others_are_all_images_but_the_own_equally_often():
    index = torch.tensor([0, 4, 9, 5])
    others = instdisc.draw_others(BatchRandom([1], 4), 9000, index, 10)
    for i, row in zip(index.tolist(), others):
        count = row.bincount(minlength=10)
        assert count[i] == 0 and len(count) == 10
        expected = torch.full((9,), 1000)  # standard deviation 30
        assert (count[torch.arange(10) != i] - expected).abs().max() < 150


class AlmostOne:
    def uniform(self, columns):
        return torch.full((3, *columns), 1 - 2**-24)


@pytest.mark.parametrize("images", [2, 3, 50_000, 1_281_167, 16_000_000])
def test_no_rounding_leads_beyond_the_last_image(images):
    """The largest random number below 1, times images - 1, rounds up to images - 1."""
    index = torch.tensor([0, images // 2, images - 1])
    others = instdisc.draw_others(AlmostOne(), 2, index, images)
    assert others.max() < images and not (others == index[:, None]).any()


# -------- The bank --------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0.0, 0.5, 1.0])
def test_bank_by_hand(m):
    """Only the rows of the batch change: m m_i + (1 - m) v, of length 1."""
    bank = units(10, 4)
    before = bank.clone()
    index = torch.tensor([7, 2])
    v = units(2, 4, seed=1)
    instdisc.update_bank(bank, index, v, m)
    for i in range(10):
        row = before[i]
        if i in (7, 2):
            row = m * row + (1 - m) * v[[7, 2].index(i)]
            row = row / row.norm()
        torch.testing.assert_close(bank[i], row, **EXACT)


def test_an_image_that_stands_twice_in_a_batch_counts_with_its_first_view():
    bank = units(5, 4)
    v = units(3, 4, seed=1)
    twice = bank.clone()
    instdisc.update_bank(twice, torch.tensor([3, 1, 3]), v, 0.5)
    instdisc.update_bank(bank, torch.tensor([3, 1]), v[:2], 0.5)
    assert torch.equal(twice, bank)


def bank_and_z(model):
    return model.bank.clone(), model.Z.clone()


def test_main_updates_the_rows_of_the_images_of_a_step_after_the_loss(train, monkeypatch):
    """The loss meets the bank as it was before the step; of the 24 rows, the 12 of the batch
    change, and both steps of an epoch together change all."""
    seen = []
    loss = instdisc.softmax_loss

    def see(v, bank, index, tau):
        seen.append((v.detach(), bank.clone(), index))
        return loss(v, bank, index, tau)

    monkeypatch.setattr(instdisc, "softmax_loss", see)
    run = train("instance_discrimination", *FLAGS, spy=bank_and_z)
    banks = [bank for bank, _ in run.looks]
    assert len(banks) == 5
    for (v, bank, index), before, after in zip(seen, banks, banks[1:]):
        assert torch.equal(bank, before)
        assert sorted((before != after).any(1).nonzero()[:, 0].tolist()) == sorted(index.tolist())
        rows = F.normalize(0.5 * before[index] + 0.5 * v, dim=1)
        torch.testing.assert_close(after[index], rows, **EXACT)
        torch.testing.assert_close(after.norm(dim=1), torch.ones(24).double(), **EXACT)
    assert sorted(torch.cat([seen[0][2], seen[1][2]]).tolist()) == list(range(24))


NCE = [*FLAGS, "--loss", "nce", "--negatives", 6, "--proximal", 3, "--bank-momentum", 0.2]


def test_nce_is_the_same_on_two_processes_and_z_is_that_of_the_first_step(train):
    name = "instance_discrimination"
    alone = train(name, *NCE, spy=bank_and_z, **light(name))
    together = train(name, *NCE, world=2, **light(name))
    torch.testing.assert_close(together.losses, alone.losses, **SAME)
    for key in ("model/bank", "model/Z"):
        torch.testing.assert_close(together.state[key], alone.state[key], **SAME)
    Z = [z.item() for _, z in alone.looks]
    assert Z[0] == 1 != Z[1] and Z[1:] == [Z[1]] * 4


def test_no_gradient_reaches_the_bank():
    torch.manual_seed(0)
    model = instdisc.InstDisc("resnet14", 16, 8, 20)
    index = torch.arange(6)
    v = model(noise(6, 3, 16, 16, dtype=torch.float32))
    loss = instdisc.softmax_loss(v, model.bank, index, 0.1)
    loss.backward()
    assert model.bank.grad is None and not model.bank.requires_grad
    for name, w in model.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name
    torch.testing.assert_close(model.bank.norm(dim=1), torch.ones(20))
    assert {"bank", "Z"} <= set(model.state_dict())


# -------- kNN against the bank --------------------------------------------------------------------


def official_knn(features, labels, memory, train_labels, K, sigma):
    """kNN of test.py in numpy."""
    cosines = features @ memory.T
    nearest = np.argsort(-cosines, 1)[:, :K]
    right = 0
    for cosine, row, label in zip(cosines, nearest, labels):
        votes = np.zeros(train_labels.max() + 1)
        np.add.at(votes, train_labels[row], np.exp(cosine[row] / sigma))
        right += votes.argmax() == label
    return 100 * right / len(labels)


def test_knn_is_that_of_the_official_code():
    labels = torch.arange(200) % 5
    bank = F.normalize(units(200, 8) + 0.5 * units(5, 8, seed=3)[labels], dim=1)
    test_labels = torch.arange(60) % 5
    v = F.normalize(units(60, 8, seed=1) + 0.5 * units(5, 8, seed=3)[test_labels], dim=1)
    expected = official_knn(v.numpy(), test_labels.numpy(), bank.numpy(), labels.numpy(), 20, 0.1)
    assert common.knn(bank.float(), labels, v.float(), test_labels, 20, 0.1) == expected
    assert 30 < expected < 100


def test_knn_of_a_run_asks_the_bank_and_not_new_features(train, monkeypatch):
    """What knn is given: the bank as the training left it with the labels of its images, and the
    embeddings of the test images. The last line of the training tells what it found."""
    asked = []
    epochs = []

    def see(bank, labels, v, test_labels, k, temperature):
        asked.append((bank.clone(), labels, v, test_labels, k, temperature))
        return 12.345

    monkeypatch.setattr(instdisc, "knn", see)
    monkeypatch.setattr(Recorder, "end_epoch", lambda run, epoch, **more: epochs.append(more))
    run = train("instance_discrimination", *FLAGS, "--tau", 0.2, spy=bank_and_z)
    data = tiny_data()
    ((bank, labels, v, test_labels, k, temperature),) = asked
    assert torch.equal(bank, run.looks[-1][0]) and torch.equal(labels, data.train.labels)
    assert v.shape == (12, 16) and torch.equal(test_labels, data.test.labels)
    assert (k, temperature) == (200, 0.2)
    assert "retrieval.png" in run.pictures and "12.3 %" in run.out
    assert epochs == [{}, {"bank_knn": 12.345}]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--negatives", 0), "--negatives 0: choose at least 1"),
        (("--negatives", 7), "--negatives 7: only --loss nce draws other images"),
        (("--bank-momentum", 1.5), "--bank-momentum 1.5: choose at least 0 and at most 1"),
        (("--tau", 0.01), "--tau 0.01: choose at least 0.02"),
        (("--loss", "hinge"), "--loss: invalid choice: 'hinge'"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("instance_discrimination", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err
