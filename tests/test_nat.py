"""NAT: loss and assignment by hand and by trying all permutations, the exchange of targets against
the official procedure, and what the network cannot see."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import arguments, noise

import common
from kernels.views import BatchRandom, normalize
from methods import nat

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def units(n, d, seed=0):
    return F.normalize(noise(n, d, seed=seed), dim=1)


def model(images=24, dim=8):
    torch.manual_seed(0)
    return nat.NAT("resnet14", 16, 32, dim, images)


class NoFlip:
    def uniform(self):
        return torch.ones(2)


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """At the target, at a right angle and opposite to it: 0, 2 and 4."""
    c = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    by_image = [nat.nat_loss(z[i : i + 1], c[i : i + 1]).item() for i in range(3)]
    assert by_image == [0, 2, 4]
    assert nat.nat_loss(z, c).item() == 2


def test_loss_is_two_minus_twice_the_cosine_and_its_gradient():
    z = units(6, 5).requires_grad_()
    c = units(6, 5, seed=1)
    loss = nat.nat_loss(z, c)
    torch.testing.assert_close(loss, (2 - 2 * (z * c).sum(1)).mean(), **EXACT)
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * (z.detach() - c) / 6, **EXACT)


def test_equal_embeddings_gain_nothing_by_an_exchange():
    """Why features cannot collapse: every permutation of the targets has the same loss, about 2."""
    c = units(400, 16, seed=1)
    z = units(1, 16).expand(400, -1)
    before = nat.nat_loss(z, c)
    torch.testing.assert_close(nat.nat_loss(z, c[nat.assign(z, c)]), before, **EXACT)
    # of 400 targets the mean product with z has the deviation 1 / sqrt(16 * 400)
    assert abs(before.item() - 2) < 2 * 4 / 80


# -------- The assignment --------------------------------------------------------------------------


def test_assignment_is_the_best_of_all_permutations():
    for seed in range(10):
        z = units(6, 3, seed=2 * seed)
        c = units(6, 3, seed=2 * seed + 1)
        losses = {p: nat.nat_loss(z, c[list(p)]).item() for p in itertools.permutations(range(6))}
        found = tuple(nat.assign(z, c).tolist())
        assert found == min(losses, key=losses.get)


def test_assignment_by_hand():
    """The nearest target of both images is the first; the sum decides: 0.9 + 0.8 > 1.0 + 0.1."""
    z = torch.tensor([[1.0, 0.9], [0.8, 0.1]])
    assert nat.assign(z, torch.eye(2)).tolist() == [1, 0]


def test_a_network_that_knows_its_targets_keeps_them():
    c = units(50, 8)
    assert nat.assign(c, c).tolist() == list(range(50))
    order = torch.from_numpy(np.random.default_rng(0).permutation(50))
    assert torch.equal(nat.assign(c[order], c), order)


def test_a_run_that_diverges_meets_no_traceback():
    """Its loss, which is not finite, ends it with a sentence; the assignment comes before that."""
    z = torch.full((4, 3), math.nan)
    assert sorted(nat.assign(z, units(4, 3).float()).tolist()) == [0, 1, 2, 3]


# -------- The exchange ----------------------------------------------------------------------------


def official_step(z, codes, label, index):
    """main.lua, engine.hooks.onForward, in numpy; the assignment by trying all permutations."""
    code = codes[label[index]]
    scores = z @ code.T
    rows = np.arange(len(z))
    orders = itertools.permutations(range(len(z)))
    assignment = max(orders, key=lambda order: scores[rows, list(order)].sum())
    label = label.copy()
    label[index] = label[index][list(assignment)]
    return code[list(assignment)], label


def test_exchange_is_that_of_the_official_code():
    """Targets of the batch and labels of all images, over several overlapping batches."""
    net = model()
    codes = net.targets.double().numpy()
    label = net.label.numpy().copy()
    for step in range(6):
        index = np.random.default_rng(step).permutation(24)[:6]
        z = units(6, 8, seed=step).float()
        targets, new = official_step(z.double().numpy(), codes, label, index)
        share = net.exchange(z, torch.from_numpy(index))
        assert share.item() == pytest.approx((new[index] != label[index]).mean())
        label = new
        assert np.array_equal(net.label.numpy(), label)
        found = net.targets[net.label[torch.from_numpy(index)]]
        np.testing.assert_allclose(found.numpy(), targets, atol=1e-6)


def test_exchange_lowers_the_loss_of_the_batch_and_touches_no_other_image():
    net = model()
    others = torch.arange(12, 24)
    for step in range(10):
        index = torch.arange(12)
        z = units(12, 8, seed=step).float()
        before = nat.nat_loss(z, net.targets[net.label[index]])
        kept = net.label[others].clone()
        net.exchange(z, index)
        assert nat.nat_loss(z, net.targets[net.label[index]]) < before
        assert torch.equal(net.label[others], kept)


def test_an_image_that_stands_twice_in_a_batch_exchanges_once():
    """Another image is read in the place of a broken file: labels stay a permutation."""
    net = model()
    for step in range(10):
        index = torch.tensor([3, 5, 3, 7, 5, 9])
        net.exchange(units(6, 8, seed=step).float(), index)
        assert sorted(net.label.tolist()) == list(range(24))

    alone = model()
    z = units(6, 8).float()
    again = z.clone()
    again[[2, 4]] = units(2, 8, seed=1).float()  # later views of the images 3 and 5
    twice = model()
    twice.exchange(again, index)
    alone.exchange(z[[0, 1, 3, 5]], torch.tensor([3, 5, 7, 9]))
    assert torch.equal(twice.label, alone.label)


def test_targets_are_unit_vectors_one_for_each_image():
    net = model(images=30, dim=5)
    assert net.targets.shape == (30, 5)
    torch.testing.assert_close(net.targets.norm(dim=1), torch.ones(30))
    assert sorted(net.label.tolist()) == list(range(30)) != net.label.tolist()
    assert not net.targets.requires_grad and "targets" in net.state_dict()


def labels(net):
    return net.label.clone(), net.targets.clone()


def test_main_exchanges_in_every_third_epoch_and_labels_stay_a_permutation(train):
    """Two steps per epoch of 24 images: exchanges in the epochs 0 and 3 alone; targets of images
    that are in no batch yet stay; the loss is that of the targets after the exchange."""
    flags = ["--size", 16, "--batch", 12, "--epochs", 4, "--permute", 3, "--hidden", 16]
    run = train("nat", *flags, "--dim", 8, "--warmup", 0, spy=labels)
    assert len(run.looks) == 9
    first = run.looks[0][1]
    for (before, _), (after, targets), more, step in zip(
        run.looks, run.looks[1:], run.more, range(8)
    ):
        assert after.sort().values.tolist() == list(range(24))
        assert torch.equal(targets, first)
        exchanged = step // 2 in (0, 3)
        assert (more["moved"] > 0) == exchanged
        changed = (before != after).sum().item()
        assert changed == pytest.approx(12 * float(more["moved"]))
    assert not torch.equal(run.looks[0][0], run.looks[-1][0])


def test_main_asks_for_the_images_own_targets(train, monkeypatch):
    seen = []
    loss = nat.nat_loss

    def see(z, c):
        seen.append((z.detach(), c))
        return loss(z, c)

    monkeypatch.setattr(nat, "nat_loss", see)
    flags = ["--size", 16, "--batch", 12, "--epochs", 1, "--hidden", 16, "--dim", 8]
    run = train("nat", *flags, spy=labels)
    label, targets = run.looks[1]
    z, c = seen[0]
    torch.testing.assert_close(z.norm(dim=1), torch.ones(12, dtype=z.dtype))
    assert torch.equal(c[:8], targets[label[run.index]])
    assert not c.requires_grad
    # after the exchange no two images of the batch would gain by changing places
    assert nat.assign(z, c).tolist() == list(range(12))


# -------- The network -----------------------------------------------------------------------------


def test_gradients_by_hand():
    """A ramp of 1 per pixel to the right has the gradient 8: 1 + 2 + 1 rows of a difference of 2.
    At the border, where the last pixels are repeated, half of that. A constant has none."""
    ramp = torch.arange(5.0).expand(1, 3, 5, 5)
    across, down = nat.gradients(ramp)[0]
    assert across[2].tolist() == [4, 8, 8, 8, 4] and not down.any()
    across, down = nat.gradients(ramp.transpose(2, 3))[0]
    assert down[:, 2].tolist() == [4, 8, 8, 8, 4] and not across.any()
    assert not nat.gradients(torch.full((1, 3, 4, 4), 7.0)).any()


def test_gradients_are_the_official_filters_inside():
    x = noise(2, 3, 8, 8)
    dx = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).double() / 3
    weight = torch.stack([dx, dx.T])[:, None].expand(-1, 3, -1, -1)  # (2, 3, 3, 3)
    official = F.conv2d(x, weight, padding=1)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(nat.gradients(x)[inside], official[inside], **EXACT)


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_colours_of_equal_brightness_cannot_be_told_apart(arch):
    """The shortcut: images sorted by their colours. A network that sees the image tells a red
    square from a green one, ours does not, neither in training nor in evaluation."""
    x = torch.zeros(2, 3, 16, 16)
    x[0, 0, 4:12, 4:12] = 1  # after normalisation, in which channels have their own scale
    x[1, 1, 4:12, 4:12] = 1
    torch.manual_seed(0)
    ours = nat.backbone(arch, 16)
    plain = common.backbone(arch, 16)
    for training in (True, False):
        a, b = ours.train(training)(x)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        a, b = plain.train(training)(x)
        assert (a - b).abs().max() > 1e-2
    y = x.clone()
    y[0] = y[0].roll(3, 2)
    assert (ours(y)[0] - ours(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_gradient_reaches_every_parameter_and_no_target(arch):
    net = nat.NAT(arch, 16, 32, 8, 10)
    z = F.normalize(net(noise(8, 3, 16, 16, dtype=torch.float32)), dim=1)
    nat.nat_loss(z, net.targets[:8]).backward()
    for name, w in net.named_parameters():
        assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name
    assert net.targets.grad is None


def test_pictures_show_the_view_and_its_gradients():
    args = arguments("nat", "--size", 16)
    ((_, augment),) = nat.views(args)
    image = torch.full((2, 3, 16, 16), 0.4)
    image[:, :, :, 8:] = 0.6  # brighter to the right
    x = augment(image, NoFlip())
    assert torch.equal(x, normalize(image))
    shown = nat.show([x])
    assert list(shown) == ["view", "across", "down"]
    torch.testing.assert_close(shown["view"], image)
    assert (shown["down"] == 0.5).all() and (shown["across"][..., 7:9] > 0.6).all()
    assert (shown["across"][..., :6] == 0.5).all()


def test_views_are_flipped_for_half_of_the_images():
    ((_, augment),) = nat.views(arguments("nat", "--size", 16))
    image = torch.zeros(64, 3, 16, 16)
    image[..., 0] = 1
    x = augment(image, BatchRandom([0], 64))
    right = (x[:, 0, 0, -1] > 0).sum().item()
    assert 16 < right < 48


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--size", 1), "--size 1: choose at least 2"),
        (("--permute", 0), "--permute 0: choose at least 1"),
        (("--dim", 1), "--dim 1: choose at least 2"),
        (("--momentum", 1), "--momentum 1: choose at least 0 and less than 1"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("nat", *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err
