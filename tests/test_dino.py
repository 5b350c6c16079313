"""DINO: the loss, the centre, the schedules, the head and drop path against values computed by hand
and by lightly; what moves in every step of the training loop."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Recorder, arguments, noise
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common import backbone
from kernels.views import denormalize
from methods import dino

K = 8
TINY = ["--batch", 12, "--size", 16, "--small-size", 8, "--hidden", 16, "--outputs", K]
TINY += ["--epochs", 2, "--warmup", 0, "--m", 0.9]  # 24 images: two steps per epoch
BOTH = pytest.mark.parametrize("arch", ["vit_micro", "resnet14"])


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand():
    """K = 2, one image, two large views and a small one, tau_s = 1, tau_t = 1/2, centre (1, 0):
    softmaxes of two numbers are the logistic function of their difference."""
    student = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]]])
    center = torch.tensor([1.0, 0.0])
    # what the second teacher view gives the first dimension: (2 - 1) / (1/2) = 2; the first 1/2
    a = 1 / (1 + math.exp(-2))
    down = math.log(1 + math.exp(-2))
    up = math.log(1 + math.exp(2))
    low = math.log(1 + math.exp(-1))
    high = math.log(1 + math.e)
    terms = [(down + up) / 2, (high + low) / 2, math.log(2), a * high + (1 - a) * low]
    found = dino.dino_loss(student, teacher, center, 1.0, 0.5)
    assert found.item() == pytest.approx(sum(terms) / 4, abs=1e-6)


@pytest.mark.parametrize("V", [2, 5])
def test_loss_of_equal_student_outputs_is_log_of_the_dimensions(V):
    student = torch.full((V, 3, K), 0.3, dtype=torch.float64)
    loss = dino.dino_loss(student, noise(2, 3, K), noise(K, seed=1), 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(K), abs=1e-5)


def test_gradient_is_that_of_softmax_cross_entropy_and_reaches_the_student_alone():
    student = noise(3, 4, K).requires_grad_()
    teacher = noise(2, 4, K, seed=1).requires_grad_()
    center = noise(K, seed=2)
    dino.dino_loss(student, teacher, center, 0.1, 0.05).backward()
    assert teacher.grad is None
    q = ((teacher - center) / 0.05).softmax(2).detach()
    p = (student / 0.1).softmax(2).detach()
    # 4 terms: view 0 predicts teacher 1, view 1 teacher 0, view 2 both; each a mean over 4 images
    expected = torch.stack([p[0] - q[1], p[1] - q[0], 2 * p[2] - q[0] - q[1]]) / (0.1 * 4 * 4)
    torch.testing.assert_close(student.grad, expected)


def test_lightly_agrees_in_loss_gradient_and_center():
    lightly = pytest.importorskip("lightly.loss.dino_loss")
    loss = lightly.DINOLoss(output_dim=K, center_momentum=0.9).double()
    center = torch.zeros(K, dtype=torch.float64)
    for step in range(3):
        ours = noise(4, 6, K, seed=step).requires_grad_()
        theirs = noise(4, 6, K, seed=step).requires_grad_()
        teacher = noise(2, 6, K, seed=10 + step) + 1
        found = dino.dino_loss(ours, teacher, center, 0.1, 0.07)
        expected = loss(list(teacher), list(theirs), teacher_temp=0.07)
        dino.update_center(center, teacher.mean((0, 1)), 0.9)
        found.backward()
        expected.backward()
        # lightly's temperature is a float32 number: 0.07 is rounded by 3e-8 of itself, which
        # logits of 60 enlarge.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(center, loss.center.flatten())


# -------- State and schedules ---------------------------------------------------------------------


def test_center_moves_by_a_tenth_of_the_difference():
    center = torch.tensor([0.0, 10.0])
    dino.update_center(center, torch.tensor([1.0, 0.0]), 0.9)
    torch.testing.assert_close(center, torch.tensor([0.1, 9.0]))


def test_schedules():
    half = [0, 0.5, 1]
    assert [dino.cosine(0.04, 0.4, t) for t in half] == pytest.approx([0.04, 0.22, 0.4])
    assert [dino.cosine(0.996, 1.0, t) for t in half] == pytest.approx([0.996, 0.998, 1])
    official = [*np.linspace(0.04, 0.07, 30), *[0.07] * 10]
    found = [dino.teacher_temperature(epoch, 0.04, 0.07, 30) for epoch in range(40)]
    assert found == pytest.approx(official)
    assert dino.teacher_temperature(0, 0.02, 0.04, 0) == 0.04


# -------- Networks --------------------------------------------------------------------------------


def test_head_gives_cosines():
    head = dino.Head(8, 16, K, norm=False, bottleneck=4).double()
    h = noise(5, 8)
    with torch.no_grad():
        head.last_layer.weight.mul_(7)  # its length means nothing
        z = F.normalize(head.mlp(h), dim=1)
        cosines = [F.cosine_similarity(z, w[None]) for w in head.last_layer.weight]
        torch.testing.assert_close(head(h), torch.stack(cosines, 1))


def test_batch_norm_in_the_head_stands_where_the_official_one_does():
    """Official DINOHead with use_bn: each hidden layer is linear, batch-norm, GELU."""

    def kinds(norm):
        return [type(layer) for layer in dino.Head(8, 16, K, norm).mlp]

    assert kinds(True) == 2 * [nn.Linear, nn.BatchNorm1d, nn.GELU] + [nn.Linear]
    assert kinds(False) == 2 * [nn.Linear, nn.GELU] + [nn.Linear]


def make(arch, drop_path=0.0):
    torch.manual_seed(0)
    return dino.DINO(arch, 16, 16, K, head_norm=False, drop_path=drop_path).double()


def crops_of(n):
    return [noise(n, 3, 16, 16), noise(n, 3, 16, 16, seed=1), noise(n, 3, 8, 8, seed=2)]


@BOTH
def test_teacher_starts_as_the_student_sees_large_views_alone_and_gets_no_gradient(arch):
    model = make(arch)
    g_s, g_t = model(crops_of(4))
    assert g_s.shape == (3, 4, K) and g_t.shape == (2, 4, K) and not g_t.requires_grad
    # not to the last bit: a product of 12 rows may add in another order than one of 8
    torch.testing.assert_close(g_t, g_s[:2], rtol=0, atol=1e-14)
    dino.dino_loss(g_s, g_t, noise(K), 0.1, 0.04).backward()
    for name, w in model.named_parameters():
        if name.startswith("student"):
            assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name
        else:
            assert not w.requires_grad and w.grad is None
    backbone(arch, 16).load_state_dict(model.backbone.state_dict())


def test_without_small_crops_there_are_two_views():
    g_s, g_t = make("vit_micro")(crops_of(2)[:2])
    assert g_s.shape == g_t.shape == (2, 2, K)


# -------- Drop path -------------------------------------------------------------------------------


def test_drop_path_keeps_the_expectation_of_a_branch():
    """Of ten equally spaced numbers, 0.3 leaves seven: each 1 / 0.7 times the branch."""
    last = make("vit_micro", drop_path=0.3).student["backbone"].blocks[-1]
    u = (torch.arange(10, dtype=torch.float64)[:, None] + 0.5).expand(-1, 2) / 10
    branch = noise(1, 5, 96).expand(10, -1, -1)
    for number in (0, 1):
        kept = last.kept(branch, u, number)
        assert (kept == 0).all((1, 2)).sum() == 3
        torch.testing.assert_close(kept.mean(0), branch[0])


def test_drop_path_is_the_students_alone_and_each_crop_has_its_own_numbers():
    model = make("vit_micro", drop_path=0.5)
    depth = len(model.backbone.blocks)
    keep = torch.full((3, 4, depth, 2), 0.99, dtype=torch.float64)
    with torch.no_grad():
        plain, g_t = model(crops_of(4))
        before, teacher = model(crops_of(4), keep)
        assert torch.equal(teacher, g_t)  # it never drops anything
        assert ((before - plain).abs().amax(2) > 0).all()  # kept branches are enlarged
        for v, image, block, branch in [(0, 3, depth - 1, 0), (1, 2, 1, 1), (2, 0, 2, 0)]:
            u = keep.clone()
            u[v, image, block, branch] = 0.01
            after, teacher = model(crops_of(4), u)
            changed = (after - before).abs().amax(2) > 1e-9
            assert changed.nonzero().tolist() == [[v, image]]
            assert torch.equal(teacher, g_t)
        u = keep.clone()
        u[:, :, 0] = 0.0  # the first block is never left out
        assert torch.equal(model(crops_of(4), u)[0], before)


def test_drop_path_trains_the_same_on_one_and_two_processes(train):
    flags = [*TINY, "--arch", "vit_micro", "--epochs", 1]
    one = train("dino", *flags, "--drop-path", 0.5)
    two = train("dino", *flags, "--drop-path", 0.5, world=2)
    # Float64 in another order of summation. Other numbers change the losses by 0.001 and more.
    torch.testing.assert_close(two.losses, one.losses, rtol=1e-6, atol=1e-6)
    for name, value in one.state.items():
        torch.testing.assert_close(two.state[name], value, rtol=1e-6, atol=1e-6, msg=name)
    without = train("dino", *flags)
    assert (without.losses - one.losses).abs().min() > 1e-4


# -------- Views and flags -------------------------------------------------------------------------


def test_views(monkeypatch):
    seen = []
    monkeypatch.setattr(dino, "gaussian_blur", lambda x, rand, p, sigma: seen.append(p) or x)
    monkeypatch.setattr(dino, "solarize", lambda x, rand, p: seen.append(p) or x)
    for name in ("random_flip", "color_jitter", "random_grayscale"):
        monkeypatch.setattr(dino, name, lambda x, rand, **options: x)
    flags = ["--small-size", 20, "--small-scale", 0.05, "--large-scale", 0.4]
    flags += ["--blur1", 1, "--blur2", 0.1, "--blur-small", 0.5]
    found = dino.views(arguments("dino", *flags))
    expected = 2 * [(32, (0.4, 1.0))] + 2 * [(20, (0.05, 0.4))]
    assert [(crop.size, crop.scale) for crop, _ in found] == expected
    for _, augment in found:
        augment(torch.rand(1, 3, 8, 8), None)
    assert seen == [1, 0, 0.1, 0.2, 0.5, 0, 0.5, 0]


def test_crops_have_headings():
    crops = [noise(2, 3, side, side, seed=side) for side in (16, 17, 8, 9)]
    shown = dino.name_crops(crops)
    assert list(shown) == ["large 1", "large 2", "small 1", "small 2"]
    for crop, image in zip(crops, shown.values()):
        assert torch.equal(image, denormalize(crop))


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--small-size 18 --arch vit_micro", "--small-size 18: choose a multiple of 4"),
        ("--drop-path 0.1", "--drop-path 0.1 needs a vision transformer"),
        ("--drop-path 1 --arch vit_micro", "--drop-path 1: choose at least 0 and less than 1"),
        ("--blur-small 0.5", "--blur-small 0.5: crops of 16 pixels are too small"),
        ("--blur2 0.1 --size 16", "crops of 16 pixels are too small"),
        ("--small-scale 0.5", "--small-scale 0.5: choose at most --large-scale, which is 0.4"),
    ],
)
def test_flags_that_make_no_sense_together_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("dino", *flags.split())
    message = capsys.readouterr().err
    assert error.value.code == 1 and words in message and message.count("\n") == 1


def test_flags_that_make_sense_are_not_refused():
    assert arguments("dino", "--small-size", 18).small_size == 18  # a ResNet has no patches
    arguments("dino", "--small-size", 18, "--small-crops", 0, "--arch", "vit_micro")
    arguments("dino", "--blur-small", 0.5, "--small-crops", 0)
    arguments("dino", "--blur-small", 0.5, "--small-size", 20)
    paper = arguments("dino", "--recipe", "paper", "--data", "emoji")
    assert (paper.tau_t_start, paper.tau_t, paper.drop_path) == (0.04, 0.07, 0.1)


def test_colours_of_attention():
    """Violet at 0, yellow at 1, the third colour half-way; a third of it is the grey image."""
    maps = torch.tensor([0.0, 1.0, 0.5, 0.125]).view(1, 1, 2, 2)
    black = dino.overlay(torch.zeros(1, 3, 2, 2), maps)[0, 0].flatten(1).T / 0.65 * 255
    table = torch.tensor(dino.VIRIDIS, dtype=torch.float32)
    expected = torch.stack([table[0], table[4], table[2], (table[0] + table[1]) / 2])
    torch.testing.assert_close(black, expected)
    image = noise(1, 3, 2, 2, dtype=torch.float32)
    shown = dino.overlay(image, maps) - dino.overlay(torch.zeros(1, 3, 2, 2), maps)
    torch.testing.assert_close(shown[0, 0], 0.35 * image.mean(1).expand(3, -1, -1))


# -------- The training loop -----------------------------------------------------------------------


def look(model):
    """Student, teacher, centre, the last layer, and the teacher's outputs of the step before."""
    if not hasattr(model, "outputs"):
        model.outputs = []
        model.head.register_forward_hook(lambda head, inputs, g_t: model.outputs.append(g_t))
    teacher = [*model.backbone.parameters(), *model.head.parameters()]
    return SimpleNamespace(
        student=torch.cat([w.detach().flatten() for w in model.student.parameters()]),
        teacher=torch.cat([w.flatten() for w in teacher]),
        center=model.center.clone(),
        last=model.student["head"].last_layer.weight.detach().clone(),
        outputs=model.outputs[-1:],
    )


@BOTH
def test_what_moves_in_every_step(train, arch):
    """By section 3.1: theta_t <- m theta_t + (1 - m) theta_s with the student after its update, m
    from 0.9 to 1 by a cosine; and by Eq. 4 with the mean of both large views. The last layer is
    frozen in the first epoch; the weight decay of the matrices follows a cosine."""
    decays = []

    def note(optimizer, args, kwargs):
        decays.append([group["weight_decay"] for group in optimizer.param_groups])

    handle = register_optimizer_step_pre_hook(note)
    run = train("dino", *TINY, "--arch", arch, spy=look)
    handle.remove()
    assert len(run.looks) == 5
    for step, (before, after) in enumerate(itertools.pairwise(run.looks)):
        m = 1 - 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        moved = after.teacher - before.teacher
        assert moved.abs().max() > 1e-6
        expected = (1 - m) * (after.student - before.teacher)
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-14)
        (outputs,) = after.outputs
        assert outputs.shape == (2 * 12, K)
        expected = 0.9 * before.center + 0.1 * outputs.mean(0)
        torch.testing.assert_close(after.center, expected, rtol=1e-9, atol=1e-14)

    frozen = [torch.equal(a.last, b.last) for a, b in itertools.pairwise(run.looks)]
    assert frozen == [True, True, False, False]
    matrices = [decay for decay, _ in decays]
    assert matrices == pytest.approx([dino.cosine(0.04, 0.4, t / 4) for t in range(4)])
    assert all(decay == 0 for _, decay in decays)
    assert Recorder.latest.reference_loss == ("collapsed", pytest.approx(math.log(K)))
    assert ("attention.png" in run.pictures) == (arch == "vit_micro")


def test_every_parameter_is_clipped_by_itself_and_the_teacher_warms_up(train):
    temperatures = []

    def loss(student, teacher, center, tau_s, tau_t):
        temperatures.append((tau_s, tau_t))
        return dino_loss(student, teacher, center, tau_s, tau_t)

    dino_loss = dino.dino_loss
    flags = ["--tau-t-start", 0.04, "--tau-t", 0.07, "--tau-t-warmup", 2]
    flags += ["--arch", "vit_micro"]
    run = train("dino", *TINY, *flags, dino_loss=loss, MAX_GRAD_NORM=1e-5)
    assert temperatures == [(0.1, 0.04)] * 2 + [(0.1, 0.07)] * 2
    for gradients in run.gradients:
        norms = torch.stack([g.norm() for g in gradients.values()])
        assert (norms < 1.001e-5).all()
        assert (norms > 0.9e-5).sum() > len(norms) / 2  # many, so not all of them together
