"""DINO: the loss, the centre, the schedules and the vision transformer against values computed by hand, by plain torch and by
lightly, and the whole training loop for any number of processes."""

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import Data, Split
from methods import dino

BATCH, SIZE, K = 6, 16, 8
ARGUMENTS = ["--batch", BATCH, "--size", SIZE, "--small", 2, 8, "--head", 16, K, 1, "--epochs", 2, "--warmup", 0, "--m", 0.9]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dino.py", *map(str, flags)])
        return dino.get_args()


# -------- Loss ------------------------------------------------------------------------------------------------------------

def test_loss_by_hand():
    """K = 2, one image, two large views and a small one, tau_s = 1, tau_t = 1/2, centre (1, 0): softmaxes of two numbers are
    the logistic function of their difference."""
    student = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
    teacher, center = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]]]), torch.tensor([1.0, 0.0])
    a = 1 / (1 + math.exp(-2))  # what the second teacher view gives the first dimension: (2 - 1) / (1/2) = 2; the first 1/2
    down, up = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    low, high = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    terms = [(down + up) / 2, (high + low) / 2, math.log(2), a * high + (1 - a) * low]
    assert dino.dino_loss(student, teacher, center, 1.0, 0.5).item() == pytest.approx(sum(terms) / 4, abs=1e-6)


@pytest.mark.parametrize("V", [2, 5])
def test_loss_of_equal_student_outputs_is_log_of_the_dimensions(V):
    loss = dino.dino_loss(torch.full((V, 3, K), 0.3), noise(2, 3, K), noise(K, seed=1), 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(K), abs=1e-5)


def test_gradient_is_that_of_softmax_cross_entropy_and_reaches_the_student_alone():
    student, teacher = noise(3, 4, K).double().requires_grad_(), noise(2, 4, K, seed=1).double().requires_grad_()
    center = noise(K, seed=2).double().requires_grad_()
    dino.dino_loss(student, teacher, center.detach(), 0.1, 0.05).backward()
    assert teacher.grad is None
    q, p = ((teacher - center) / 0.05).softmax(2).detach(), (student / 0.1).softmax(2).detach()
    # 4 terms: view 0 predicts teacher 1, view 1 teacher 0, view 2 both; each is a mean over 4 images
    expected = torch.stack([p[0] - q[1], p[1] - q[0], 2 * p[2] - q[0] - q[1]]) / (0.1 * 4 * 4)
    torch.testing.assert_close(student.grad, expected)


def test_lightly_agrees_in_loss_gradient_and_center():
    lightly = pytest.importorskip("lightly.loss.dino_loss")
    loss, center = lightly.DINOLoss(output_dim=K, center_momentum=0.9).double(), torch.zeros(K, dtype=torch.float64)
    for step in range(3):
        ours, theirs = (noise(4, 6, K, seed=step).double().requires_grad_() for _ in range(2))
        teacher = noise(2, 6, K, seed=10 + step).double() + 1
        found = dino.dino_loss(ours, teacher, center, 0.1, 0.07)
        expected = loss(list(teacher), list(theirs), teacher_temp=0.07)
        dino.update_center(center, teacher.mean((0, 1)), 0.9)
        found.backward()
        expected.backward()
        # lightly's temperature is a float32 number: 0.07 is rounded by 3e-8 of itself, which logits of 60 enlarge.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(center, loss.center.flatten())


# -------- State and schedules ---------------------------------------------------------------------------------------------

def test_center_moves_by_a_tenth_of_the_difference():
    center = torch.tensor([0.0, 10.0])
    dino.update_center(center, torch.tensor([1.0, 0.0]), 0.9)
    torch.testing.assert_close(center, torch.tensor([0.1, 9.0]))


def test_moving_average_moves_by_one_minus_m_of_the_difference():
    target, online = nn.Linear(3, 2), nn.Linear(3, 2)
    before = [w.clone() for w in target.parameters()]
    dino.ema_update(target, online, 0.75)
    for old, new, o in zip(before, target.parameters(), online.parameters()):
        torch.testing.assert_close(new - old, 0.25 * (o - old))


def test_schedules():
    assert [dino.cosine(0.04, 0.4, t) for t in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])
    assert [dino.cosine(0.996, 1.0, t) for t in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1])
    official = [*np.linspace(0.04, 0.07, 30), *[0.07] * 10]
    assert [dino.teacher_temperature(epoch, 0.04, 0.07, 30) for epoch in range(40)] == pytest.approx(official)
    assert dino.teacher_temperature(0, 0.04, 0.04, 0) == 0.04


# -------- Networks --------------------------------------------------------------------------------------------------------

def test_feature_is_the_class_token_and_attention_that_of_the_last_block():
    """The block written out by plain matrix products, without scaled_dot_product_attention."""
    torch.manual_seed(0)
    vit, x = dino.ViT("vit_micro", 16).double(), noise(2, 3, 16, 16).double()
    for w in vit.parameters():
        nn.init.normal_(w, std=0.2)
    tokens = vit.tokens(x)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, 48)  # in reading order
    conv = vit.patch_embed["proj"]
    torch.testing.assert_close(tokens[:, 1:], F.linear(patches, conv.weight.flatten(1), conv.bias) + vit.pos_embed[:, 1:])
    torch.testing.assert_close(tokens[:, 0], (vit.cls_token + vit.pos_embed[:, :1])[:, 0].expand(2, -1))
    for block in vit.blocks:
        n, t, dim = tokens.shape
        q, k, v = (y.view(n, t, 3, dim // 3).transpose(1, 2) for y in block.attn["qkv"](block.norm1(tokens)).chunk(3, 2))
        attention = (q @ k.transpose(2, 3) / math.sqrt(dim / 3)).softmax(3)  # (n, 3, t, t)
        tokens = tokens + block.attn["proj"]((attention @ v).transpose(1, 2).reshape(n, t, dim))
        tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(vit(x), vit.norm(tokens)[:, 0])
    torch.testing.assert_close(vit.attention(x), attention[:, :, 0, 1:].view(2, 3, 4, 4))


def test_positions_of_a_small_crop_span_those_of_a_large_one():
    vit = dino.ViT("vit_micro", 32)
    with torch.no_grad():  # a plane: rows and columns, that interpolation keeps away from the borders
        row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        vit.pos_embed.zero_()
        vit.pos_embed[0, 1:, 0], vit.pos_embed[0, 1:, 1] = row.flatten(), column.flatten()
        nn.init.zeros_(vit.patch_embed["proj"].weight)
        nn.init.zeros_(vit.patch_embed["proj"].bias)
        found = vit.tokens(torch.zeros(1, 3, 16, 16))[0, 1:].view(4, 4, -1)
    centres = torch.tensor([2.5, 4.5])  # of the second and third of four patches of twice the side
    torch.testing.assert_close(found[1:3, 1, 0], centres)
    torch.testing.assert_close(found[1, 1:3, 1], centres)


def test_head_gives_cosines():
    head, h = dino.Head(8, 16, K, norm=0, bottleneck=4), noise(5, 8)
    with torch.no_grad():
        head.last_layer.weight.mul_(7)  # its length means nothing
        z = F.normalize(head.mlp(h), dim=1)
        torch.testing.assert_close(head(h), torch.stack([F.cosine_similarity(z, w[None]) for w in head.last_layer.weight], 1))


def test_batch_norm_in_the_head_stands_where_the_official_one_does():
    """Official DINOHead with use_bn: each hidden layer is linear, batch-norm, GELU."""
    kinds = [type(layer) for layer in dino.Head(8, 16, K, norm=1).mlp]
    assert kinds == 2 * [nn.Linear, nn.BatchNorm1d, nn.GELU] + [nn.Linear]
    assert [type(layer) for layer in dino.Head(8, 16, K, norm=0).mlp] == 2 * [nn.Linear, nn.GELU] + [nn.Linear]


@pytest.mark.parametrize("arch", ["vit_micro", "resnet14"])
def test_teacher_starts_as_the_student_sees_large_views_alone_and_gets_no_gradient(arch):
    torch.manual_seed(0)
    model = dino.DINO(arch, 16, 16, K, norm=0)
    crops = [noise(4, 3, 16, 16), noise(4, 3, 16, 16, seed=1), noise(4, 3, 8, 8, seed=2)]
    g_s, g_t = model(crops)
    assert g_s.shape == (3, 4, K) and torch.equal(g_t, g_s[:2]) and not g_t.requires_grad
    dino.dino_loss(g_s, g_t, noise(K), 0.1, 0.04).backward()
    for name, w in model.named_parameters():
        if name.startswith("student"):
            assert w.grad.isfinite().all() and w.grad.abs().max() > 0, name
        else:
            assert not w.requires_grad and w.grad is None
    saved = model.backbone.state_dict()
    dino.backbone(arch, 16).load_state_dict(saved)


def test_views(monkeypatch):
    seen = []
    monkeypatch.setattr(dino, "gaussian_blur", lambda x, rand, p, sigma: seen.append(p) or x)
    monkeypatch.setattr(dino, "solarize", lambda x, rand, p: seen.append(p) or x)
    for name in ("random_flip", "color_jitter", "random_grayscale"):
        monkeypatch.setattr(dino, name, lambda x, rand, **options: x)
    found = dino.views(arguments("--small", 2, 16, "--scale", 0.05, 0.4, "--blur", 1, 0.1, 0.5))
    assert [(crop.size, crop.scale) for crop, _ in found] == 2 * [(32, (0.4, 1.0))] + 2 * [(16, (0.05, 0.4))]
    for _, augment in found:
        augment(torch.rand(1, 3, 8, 8), None)
    assert seen == [1, 0, 0.1, 0.2, 0.5, 0, 0.5, 0]


def test_small_crop_of_broken_patches_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        arguments("--small", 2, 18, "--arch", "vit_micro")
    assert error.value.code == 1 and "--small 18" in capsys.readouterr().err
    assert arguments("--small", 2, 18).small == [2, 18]  # a ResNet has no patches


# -------- The training loop -----------------------------------------------------------------------------------------------

def tiny_data():
    images = np.random.default_rng(0).integers(0, 256, (2 * BATCH, 3, SIZE, SIZE), dtype=np.uint8)  # two steps an epoch
    split = Split(torch.from_numpy(images))
    return Data("tiny", split, split, None)


def train(folder, arch, seen=None):
    """After main() on tiny data, the network in float64: the losses of this process; at every step the last layer, weight
    decays and the gradients of the student in a row, without the last layer's; the model's state. Nothing is evaluated; a ViT's
    attention is drawn into folder. A list `seen` gets a line before the first step and one after each: student, teacher,
    centre, and what the teacher's head gave in that step."""
    def record(name, args, data, loader, model, state, collapse):
        assert name == "dino" and collapse == pytest.approx(math.log(K))
        run.model, run.optimizer, run.args, run.data, run.device = model, state["optimizer"], args, data, loader.device
        model.head.register_forward_hook(lambda head, inputs, output: outputs.append(output.detach()))
        see()
        return run

    def see():
        if seen is not None:
            parts = run.model.student.parameters(), [*run.model.backbone.parameters(), *run.model.head.parameters()]
            student, teacher = (torch.cat([w.detach().flatten() for w in part]) for part in parts)
            seen.append(SimpleNamespace(student=student, teacher=teacher, center=run.model.center.clone(), out=outputs[-1:]))

    def log(loss, lr):
        see()
        run.losses.append(loss.detach())
        run.last.append(run.model.student["head"].last_layer.weight.detach().clone())
        run.gradients.append(torch.cat([w.grad.flatten() for name, w in run.model.student.named_parameters()
                                        if name != "head.last_layer.weight"]))
        run.decays.append([group["weight_decay"] for group in run.optimizer.param_groups])

    outputs, run = [], SimpleNamespace(step=0, losses=[], last=[], decays=[], gradients=[], log=log, folder=folder)
    run.end_epoch, run.finish = lambda epoch: None, lambda: None
    make, normalize = dino.DINO, dino.normalize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dino, "normalize", lambda x: normalize(x).double())
        patch.setattr(dino, "DINO", lambda *options: make(*options).double())
        patch.setattr(sys, "argv", ["dino.py", "--arch", arch, *map(str, ARGUMENTS)])
        patch.setattr(dino, "load_data", lambda name, root, device: tiny_data())
        patch.setattr(dino, "Run", record)
        dino.main()
    return torch.stack(run.losses), torch.stack(run.last), run.decays, torch.stack(run.gradients), run.model.state_dict()


@pytest.mark.parametrize("arch", ["vit_micro", "resnet14"])
def test_teacher_and_center_follow_in_every_step(tmp_path, arch):
    """By section 3.1: theta_t <- m theta_t + (1 - m) theta_s with the student after its update, m from 0.9 to 1 by a cosine;
    and by Eq. 4 with the mean of both large views."""
    seen = []
    train(tmp_path, arch, seen)
    assert len(seen) == 5
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        m = 1 - 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        moved = after.teacher - before.teacher
        assert moved.abs().max() > 1e-6
        torch.testing.assert_close(moved, (1 - m) * (after.student - before.teacher), rtol=1e-9, atol=1e-14)
        outputs, = after.out
        assert outputs.shape == (2 * BATCH, K)
        torch.testing.assert_close(after.center, 0.9 * before.center + 0.1 * outputs.mean(0), rtol=1e-9, atol=1e-14)


# Float64 in another order of summation: differences near 1e-15, which batch-norm among 6 images of noise enlarges about tenfold
# at each of the four steps. Images of another process or the centre of a share of the batch change them by 0.01 and more.
TRAINED = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("arch", ["vit_micro", "resnet14"])
def test_training_is_the_same_on_any_number_of_processes(processes, tmp_path, arch):
    losses, last, decays, gradients, state = processes(1, train, tmp_path, arch)[0]
    assert torch.equal(last[0], last[1]) and not torch.equal(last[1], last[2])  # frozen in epoch 0
    assert [decay for decay, _ in decays] == pytest.approx([dino.cosine(0.04, 0.4, t / 4) for t in range(4)])
    assert all(decay == 0 for _, decay in decays)
    assert state["center"].abs().max() > 0
    assert (tmp_path / "attention.png").exists() == (arch == "vit_micro")
    for count in (2, 3):
        results = processes(count, train, tmp_path, arch)
        torch.testing.assert_close(torch.stack([found for found, *_ in results]).mean(0), losses, **TRAINED)
        for *_, found, values in results:
            assert ((found - gradients).norm(dim=1) < 1e-6 * gradients.norm(dim=1)).all()
            for name, value in values.items():
                assert torch.equal(value, results[0][-1][name]), name  # the processes agree to the last bit
                torch.testing.assert_close(value, state[name], msg=name, **TRAINED)
