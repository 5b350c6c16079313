"""SwAV: the loss, the queue and the prototypes against values computed by hand, by plain torch and by lightly, and the whole
training loop for any number of processes."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import Data, Loader, Split, load_data
from kernels.sinkhorn import sinkhorn_reference
from methods import swav

BATCH, SIZE, K, QUEUE = 12, 16, 8, 17  # a queue that two batches overrun and that no number of processes divides
ARGUMENTS = ["--batch", BATCH, "--size", SIZE, "--small", 2, 16, "--prototypes", K, "--queue", QUEUE, 1, "--epochs", 2,
             "--optimizer", "lars", "--lr", 10, "--warmup", 0, "--epsilon", 0.2]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["swav.py", *map(str, flags)])
        return swav.get_args()


# -------- Loss ------------------------------------------------------------------------------------------------------------

def test_loss_by_hand():
    """Two prototypes, one image, two large views and a small one; tau = 1, so p is the logistic function of the difference."""
    scores = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
    q = torch.tensor([[[1.0, 0.0]], [[0.25, 0.75]]])
    down, up = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))  # -log p of the first and the second, view 2
    low, high = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    first = down + high  # q_1 predicted by views 2 and 3
    second = math.log(2) + 0.25 * high + 0.75 * low  # q_2 by views 1 and 3
    assert up - down == pytest.approx(2)
    assert swav.swapped_prediction(scores, q, 1.0).item() == pytest.approx((first + second) / 4, abs=1e-6)


@pytest.mark.parametrize("V", [2, 5])
def test_loss_of_a_collapsed_network_is_log_of_the_prototypes(V):
    same = noise(1, 1, K).expand(V, 6, K)  # one representation for all: the assignment is uniform, and learned to be so
    q = torch.stack([sinkhorn_reference(same[0])] * 2)
    torch.testing.assert_close(q, torch.full((2, 6, K), 1 / K))
    zero = torch.zeros(V, 6, K)
    for loss in (swav.swapped_prediction(zero, q, 0.1), swav.fused_swapped_prediction(zero, zero[:2, :0], 0.1, 0.05)):
        assert loss.item() == pytest.approx(math.log(K), abs=1e-5)


@pytest.mark.parametrize("queued", [0, 9])
def test_fused_loss_equals_the_formula(queued):
    """Cosines as scores, as in training. Float32: scores up to 1 / 0.05 = 20 with a rounding of 6e-8 each, so relative errors
    of the assignments near 1e-6 an iteration."""
    scores, queue = noise(4, 6, K).tanh(), noise(2, queued, K, seed=1).tanh()
    plain, fused = scores.double().requires_grad_(), scores.clone().requires_grad_()
    q = torch.stack([sinkhorn_reference(torch.cat([queue[i], scores[i]]).double())[queued:] for i in range(2)])
    torch.testing.assert_close(q.sum(2), torch.ones(2, 6, dtype=torch.float64))
    expected, found = swav.swapped_prediction(plain, q, 0.1), swav.fused_swapped_prediction(fused, queue, 0.1, 0.05)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queued", [0, 9])
def test_lightly_agrees(queued):
    lightly = pytest.importorskip("lightly.loss.swav_loss")
    scores, queue = noise(4, 6, K).tanh().double(), noise(2, queued, K, seed=1).tanh().double()
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    found = swav.fused_swapped_prediction(ours, queue, 0.1, 0.05)
    loss = lightly.SwaVLoss()
    expected = loss(list(theirs[:2]), list(theirs[2:]), list(queue) if queued else None)
    found.backward()
    expected.sum().backward()
    torch.testing.assert_close(found, expected.squeeze())
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(sinkhorn_reference(scores[0]), lightly.sinkhorn(scores[0]))


# -------- Model -----------------------------------------------------------------------------------------------------------

def test_gradient_reaches_every_parameter_and_a_pass_is_made_for_each_size():
    torch.manual_seed(0)
    model = swav.SwAV("resnet14", 32, 16, K, 0)
    crops = [noise(4, 3, 32, 32), noise(4, 3, 32, 32, seed=1), noise(4, 3, 20, 20, seed=2)]
    z, scores = model(crops)
    assert z.shape == (3, 4, 16) and scores.shape == (3, 4, K)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(3, 4))
    assert scores.abs().max() <= 1 + 1e-6
    swav.fused_swapped_prediction(scores, scores[:2, :0], 0.1, 0.05).backward()
    for name, w in model.named_parameters():
        assert w.grad is not None and w.grad.abs().max() > 0, name
    eval_z, _ = model.eval()(crops)  # views in the order in which they were given
    for v, crop in enumerate(crops):
        h = model.backbone(crop)
        torch.testing.assert_close(eval_z[v], F.normalize(model.projector(h), dim=1))


def test_prototypes_have_length_1():
    C = 3 * noise(K, 5)
    direction = F.normalize(C, dim=1)
    swav.normalize_prototypes(C)
    torch.testing.assert_close(C, direction)
    torch.testing.assert_close(swav.SwAV("resnet14", 16, 5, K, 0).prototypes.weight.norm(dim=1), torch.ones(K))


def test_views():
    args = arguments("--small", 3, 20, "--scale", 0.05, 0.14)
    crops = [crop for crop, _ in swav.views(args)]
    assert [crop.size for crop in crops] == [32, 32, 20, 20, 20]
    assert [crop.scale for crop in crops] == 2 * [(0.14, 1.0)] + 3 * [(0.05, 0.14)]
    assert len(swav.views(arguments("--small", 0, 20))) == 2


def test_queue_shorter_than_a_batch_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        arguments("--batch", 64, "--queue", 63, 0)
    assert error.value.code == 1 and "--queue 63" in capsys.readouterr().err


# -------- The training loop -----------------------------------------------------------------------------------------------

def tiny_data():
    images = np.random.default_rng(0).integers(0, 256, (3 * BATCH, 3, SIZE, SIZE), dtype=np.uint8)  # three steps an epoch
    split = Split(torch.from_numpy(images))
    return Data("tiny", split, split, None)


def train(*flags, seen=None):
    """After main() on tiny data, the network in float64: the losses of this process, the rows of the queue in use, the
    prototypes and the gradients (of all parameters in a row, 0 where there is none) at every step, and the model's state.
    Nothing is evaluated. A list `seen` gets of every step z of the large views (n, 2, d) and the scores of the queue in use."""
    def record(name, args, data, loader, model, state, collapse):
        assert name == "swav" and collapse == pytest.approx(math.log(K))
        run.model = model
        model.register_forward_hook(lambda model, inputs, output: z.append(output[0][:2].detach().transpose(0, 1)))
        return run

    def log(loss, lr):
        run.losses.append(loss.detach())
        run.prototypes.append(run.model.prototypes.weight.detach().clone())
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in run.model.parameters()]
        run.gradients.append(torch.cat([grad.flatten() for grad in grads]))

    def count(scores, queued, tau, epsilon):
        run.queued.append(queued.shape[1])
        if seen is not None:
            seen.append((z[-1], queued.clone(), run.model.prototypes.weight.detach().clone()))
        return fused(scores, queued, tau, epsilon)

    z, run = [], SimpleNamespace(step=0, losses=[], prototypes=[], gradients=[], queued=[], log=log)
    run.end_epoch, run.finish = lambda epoch: None, lambda: None
    fused, make, normalize = swav.fused_swapped_prediction, swav.SwAV, swav.normalize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["swav.py", *map(str, [*ARGUMENTS, *flags])])
        patch.setattr(swav, "load_data", lambda name, root, device: tiny_data())
        patch.setattr(swav, "Run", record)
        patch.setattr(swav, "normalize", lambda x: normalize(x).double())
        patch.setattr(swav, "SwAV", lambda *options: make(*options).double())
        patch.setattr(swav, "fused_swapped_prediction", count)
        swav.main()
    return torch.stack(run.losses), run.queued, torch.stack(run.prototypes), torch.stack(run.gradients), run.model.state_dict()


# Float64 in another order of summation: differences near 1e-15, which batch-norm among 12 images of noise enlarges tenfold
# at each of the six steps. A wrong row of the queue or an assignment over a part of the batch changes them by 0.01 and more.
TRAINED = {"rtol": 1e-6, "atol": 1e-6}


def test_training_is_the_same_on_any_number_of_processes(processes):
    losses, queued, prototypes, gradients, state = processes(1, train)[0]
    assert queued == [0, 0, 0, QUEUE, QUEUE, QUEUE]  # used from epoch 1 on
    torch.testing.assert_close(prototypes.norm(dim=2), torch.ones(6, K, dtype=torch.float64))
    torch.testing.assert_close(prototypes[2], prototypes[0], rtol=0, atol=1e-12)  # frozen in epoch 0, then not
    assert (prototypes[3] - prototypes[2]).abs().max() > 1e-5
    assert state["oldest"] == 6 * BATCH % QUEUE and (state["queue"].norm(dim=2) - 1).abs().max() < 1e-5
    for count in (2, 3):
        results = processes(count, train)
        torch.testing.assert_close(torch.stack([found for found, *_ in results]).mean(0), losses, **TRAINED)
        assert [sum(rows) for rows in zip(*(rows for _, rows, *_ in results))] == queued
        for *_, found, values in results:
            assert ((found - gradients).norm(dim=1) < 1e-6 * gradients.norm(dim=1)).all()
            for name, value in values.items():
                assert torch.equal(value, results[0][-1][name]), name  # the processes agree to the last bit
                torch.testing.assert_close(value, state[name], msg=name, **TRAINED)


def test_queue_holds_the_newest_projections():
    """Of the large views of the last images, the oldest replaced first; the scores in use are those of its rows."""
    seen = []
    *_, state = train(seen=seen)
    ring, at = torch.zeros(QUEUE, 2, 128, dtype=torch.float64), 0
    for step, (z, queued, C) in enumerate(seen):
        if step >= 3:
            torch.testing.assert_close(queued, torch.stack([ring[:, view] @ C.T for view in (0, 1)]), rtol=0, atol=1e-12)
        for image in z:
            ring[at] = image
            at = (at + 1) % QUEUE
    torch.testing.assert_close(state["queue"], ring, rtol=0, atol=0)


def test_training_without_queue_and_small_crops_on_two_processes(processes):
    for losses, queued, *_ in processes(2, train, "--queue", 0, 0, "--small", 0, 16):
        assert losses.isfinite().all() and queued == [0] * 6


def test_adam_does_not_count_the_steps_in_which_prototypes_are_frozen(processes):
    """Adam's first step moves every coordinate by the learning rate; after three steps with a gradient of 0 by 0.58 of it."""
    lr = 0.01
    prototypes = processes(1, train, "--optimizer", "adam", "--lr", lr)[0][2]
    step = (prototypes[3] - prototypes[2]).abs().median() / (lr * BATCH / 256 * 0.5)  # half of the cosine is over
    assert 0.9 < step < 1.1  # their length is reset to 1, which undoes a little of it


def test_how_many_prototypes_an_untrained_network_spreads_an_image_over():
    """The figures in the file's docstring: exponential of the mean entropy of the assignments of a batch of emoji."""
    data, args = load_data("emoji", "data", torch.device("cpu")), arguments()
    _, crops = next(Loader(data.train, swav.views(args), args.batch, 0, torch.device("cpu"))(0))
    torch.manual_seed(0)
    with torch.no_grad():
        _, scores = swav.SwAV(args.arch, args.size, 128, args.prototypes, 0)(crops)
    for epsilon, low, high in ((0.05, 100, 120), (args.epsilon, 5, 7)):
        Q = sinkhorn_reference(scores[0], epsilon, 3)
        assert low < torch.exp(-(Q * Q.clamp(min=1e-30).log()).sum(1).mean()) < high
