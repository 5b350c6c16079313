"""SwAV: the loss, the queue and the prototypes against values computed by hand, by plain torch and
by lightly, and the training loop: when the queue and the prototypes come into play."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, noise, tiny_data, train_here

from common import Loader, load_data
from kernels.sinkhorn import sinkhorn_reference
from methods import swav

BATCH, SIZE, K = 12, 16, 8
QUEUE = 17  # two batches overrun it, and no number of processes divides it
STEPS = 3  # per epoch
FLAGS = f"""--batch {BATCH} --size {SIZE} --small-crops 2 --small-size 16 --prototypes {K}
            --queue {QUEUE} --queue-from 1 --epochs 2 --optimizer lars --lr 10 --warmup 0
            --epsilon 0.2""".split()


def cosines(*shape, seed=0, dtype=torch.float64):
    """Scores as in training: between -1 and 1."""
    return noise(*shape, seed=seed, dtype=dtype).tanh()


# -------- Loss ------------------------------------------------------------------------------------


def test_loss_by_hand():
    """Two prototypes, one image, two large views and a small one; tau = 1, so p is the logistic
    function of the difference."""
    scores = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
    q = torch.tensor([[[1.0, 0.0]], [[0.25, 0.75]]])
    # -log p: of the first prototype in view 2; of the second and the first in view 3
    down = math.log(1 + math.exp(-2))
    low = math.log(1 + math.exp(-1))
    high = math.log(1 + math.e)
    first = down + high  # q_1 predicted by views 2 and 3
    second = math.log(2) + 0.25 * high + 0.75 * low  # q_2 by views 1 and 3
    loss = swav.swapped_prediction(scores, q, 1.0)
    assert loss.item() == pytest.approx((first + second) / 4, abs=1e-6)


@pytest.mark.parametrize("V", [2, 5])
def test_loss_of_a_collapsed_network_is_log_of_the_prototypes(V):
    # One representation for all: the assignment is uniform, and learned to be so.
    same = noise(1, 1, K, dtype=torch.float32).expand(V, 6, K)
    q = torch.stack([sinkhorn_reference(same[0])] * 2)
    torch.testing.assert_close(q, torch.full((2, 6, K), 1 / K))
    zero = torch.zeros(V, 6, K)
    plain = swav.swapped_prediction(zero, q, 0.1)
    fused = swav.fused_swapped_prediction(zero, zero[:2, :0], 0.1, 0.05)
    assert plain.item() == pytest.approx(math.log(K), abs=1e-5)
    assert fused.item() == pytest.approx(math.log(K), abs=1e-5)


@pytest.mark.parametrize("queued", [0, 9])
def test_fused_loss_equals_the_formula(queued):
    """Float32: scores up to 1 / 0.05 = 20 with a rounding of 6e-8 each, so relative errors of the
    assignments near 1e-6 per iteration."""
    scores = cosines(4, 6, K, dtype=torch.float32)
    queue = cosines(2, queued, K, seed=1, dtype=torch.float32)
    double = scores.double().requires_grad_()
    q = []
    for i in range(2):
        rows = torch.cat([queue[i], scores[i]]).double()
        q.append(sinkhorn_reference(rows)[queued:])
        torch.testing.assert_close(q[i].sum(1), torch.ones(6, dtype=torch.float64))
    expected = swav.swapped_prediction(double, torch.stack(q), 0.1)
    expected.backward()

    scores.requires_grad_()
    loss = swav.fused_swapped_prediction(scores, queue, 0.1, 0.05)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.grad.double(), double.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queued", [0, 9])
def test_lightly_agrees(queued):
    lightly = pytest.importorskip("lightly.loss.swav_loss")
    scores = cosines(4, 6, K)
    queue = cosines(2, queued, K, seed=1)
    ours = scores.clone().requires_grad_()
    theirs = scores.clone().requires_grad_()
    loss = swav.fused_swapped_prediction(ours, queue, 0.1, 0.05)
    their_queue = list(queue) if queued else None
    expected = lightly.SwaVLoss()(list(theirs[:2]), list(theirs[2:]), their_queue)
    loss.backward()
    expected.sum().backward()
    torch.testing.assert_close(loss, expected.squeeze())
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(sinkhorn_reference(scores[0]), lightly.sinkhorn(scores[0]))


# -------- Model and views -------------------------------------------------------------------------


def test_gradient_reaches_every_parameter_and_a_pass_is_made_for_each_size():
    torch.manual_seed(0)
    model = swav.SwAV("resnet14", 32, 16, K, 0)
    sides = (32, 32, 20)
    crops = [noise(4, 3, s, s, seed=v, dtype=torch.float32) for v, s in enumerate(sides)]
    z, scores = model(crops)
    assert z.shape == (3, 4, 16) and scores.shape == (3, 4, K)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(3, 4))
    assert scores.abs().max() <= 1 + 1e-6
    swav.fused_swapped_prediction(scores, scores[:2, :0], 0.1, 0.05).backward()
    for name, w in model.named_parameters():
        assert w.grad is not None and w.grad.abs().max() > 0, name
    # Views are returned in the order in which they were given.
    z, _ = model.eval()(crops)
    for v, crop in enumerate(crops):
        h = model.backbone(crop)
        torch.testing.assert_close(z[v], F.normalize(model.projector(h), dim=1))


def test_prototypes_have_length_1():
    C = 3 * noise(K, 5)
    direction = F.normalize(C, dim=1)
    swav.normalize_prototypes(C)
    torch.testing.assert_close(C, direction)
    first = swav.SwAV("resnet14", 16, 5, K, 0).prototypes.weight
    torch.testing.assert_close(first.norm(dim=1), torch.ones(K))


def test_views():
    flags = "--small-crops 3 --small-size 20 --small-scale 0.05 --large-scale 0.14".split()
    crops = [crop for crop, _ in swav.views(arguments("swav", *flags))]
    assert [crop.size for crop in crops] == [32, 32, 20, 20, 20]
    assert [crop.scale for crop in crops] == 2 * [(0.14, 1.0)] + 3 * [(0.05, 0.14)]
    assert len(swav.views(arguments("swav", "--small-crops", 0))) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch 64 --queue 63", "--queue 63: choose at least the 64 images"),
        ("--small-scale 0.4", "--small-scale 0.4: choose at most --large-scale, which is 0.3"),
        ("--arch vit_micro --small-size 18", "--small-size 18: choose a multiple of 4"),
        ("--blur 0.5 --small-size 19", "--blur 0.5: crops of 19 pixels are too small"),
        ("--blur 0.5 --small-crops 0 --size 16", "--blur 0.5: crops of 16 pixels are too small"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        arguments("swav", *flags.split())
    assert error.value.code == 1 and words in capsys.readouterr().err


def test_flags_about_small_crops_do_not_matter_without_them():
    arguments("swav", *"--blur 0.5 --small-crops 0 --small-size 16".split())
    arguments("swav", *"--arch vit_micro --small-crops 0 --small-size 18".split())


# -------- The training loop -----------------------------------------------------------------------

queue_scores = []  # that the loss of each step was given
projections = []  # z of the large views of each step
fused_swapped_prediction = swav.fused_swapped_prediction


def remember(scores, queued, tau, epsilon):
    """What replaces the loss: it keeps the scores of the queue."""
    queue_scores.append(queued.clone())
    return fused_swapped_prediction(scores, queued, tau, epsilon)


class Remembering(swav.SwAV):
    def forward(self, crops):
        z, scores = super().forward(crops)
        projections.append(z[:2].detach().transpose(0, 1))  # (n, 2, d)
        return z, scores


def look(model):
    """Before each step and after the last: the prototypes, and the length of the queue that the
    step before has used."""
    used = queue_scores[-1].shape[1] if queue_scores else 0
    return model.prototypes.weight.detach().clone(), used


def queue_lengths(result):
    return [used for _, used in result.looks[1:]]


def vector(gradients):
    """{parameter: gradient} in a row."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.fixture
def train_swav(train):
    def run(*flags, world=1):
        queue_scores.clear()
        options = {"world": world, "spy": look, "fused_swapped_prediction": remember}
        return train("swav", *FLAGS, *flags, data=tiny_data(STEPS * BATCH), **options)

    return run


@pytest.fixture(scope="module")
def alone():
    """The run in one process that several tests look at. It also has projections and queue_scores
    of each step."""
    patches = {"fused_swapped_prediction": remember, "SwAV": Remembering}
    queue_scores.clear()
    projections.clear()
    result = train_here("swav", FLAGS, tiny_data(STEPS * BATCH), True, patches, look)
    result.queue_scores = list(queue_scores)
    result.projections = list(projections)
    return result


def test_queue_and_prototypes_come_into_play_after_the_first_epoch(alone):
    assert queue_lengths(alone) == [0, 0, 0, QUEUE, QUEUE, QUEUE]
    prototypes = torch.stack([C for C, _ in alone.looks])  # before each step and after the last
    torch.testing.assert_close(prototypes.norm(dim=2), torch.ones(7, K, dtype=torch.float64))
    torch.testing.assert_close(prototypes[3], prototypes[0], rtol=0, atol=1e-12)
    assert (prototypes[4] - prototypes[3]).abs().max() > 1e-5
    frozen = ["prototypes.weight" not in gradients for gradients in alone.gradients]
    assert frozen == [True] * STEPS + [False] * STEPS


def test_queue_holds_the_newest_projections(alone):
    """Of the large views of the last images, the oldest replaced first; the scores in use are those
    of its rows."""
    ring = torch.zeros(QUEUE, 2, 128, dtype=torch.float64)
    at = 0
    for step in range(2 * STEPS):
        if step >= STEPS:
            C = alone.looks[step][0]
            expected = torch.stack([ring[:, view] @ C.T for view in (0, 1)])
            torch.testing.assert_close(alone.queue_scores[step], expected, rtol=0, atol=1e-12)
        for image in alone.projections[step]:
            ring[at] = image
            at = (at + 1) % QUEUE
    torch.testing.assert_close(alone.state["model/queue"], ring, rtol=0, atol=0)
    torch.testing.assert_close(ring.norm(dim=2), torch.ones(QUEUE, 2, dtype=torch.float64))
    assert alone.state["model/oldest"] == at == 6 * BATCH % QUEUE


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_training_with_a_queue_is_the_same_on_any_number_of_processes(world, alone, train_swav):
    """Float64 in another order of summation: differences near 1e-15, which batch-norm among 12
    images enlarges tenfold at each of the six steps. A wrong row of the queue or an assignment over
    a part of the batch changes them by 0.01 and more."""
    result = train_swav(world=world)
    share = math.ceil(QUEUE / world)  # of process 0
    assert queue_lengths(result) == [0, 0, 0, share, share, share]
    torch.testing.assert_close(result.losses, alone.losses, rtol=1e-6, atol=1e-6)
    for gradients, expected in zip(result.gradients, alone.gradients):
        assert gradients.keys() == expected.keys()
        difference = (vector(gradients) - vector(expected)).norm()
        assert difference < 1e-6 * vector(expected).norm()
    for name, value in alone.state.items():
        if name.startswith("model/"):
            torch.testing.assert_close(result.state[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_training_without_queue_and_small_crops(train_swav):
    result = train_swav("--queue", 0, "--queue-from", 0, "--small-crops", 0)
    assert result.losses.isfinite().all() and queue_lengths(result) == [0] * 6


def test_adam_does_not_count_the_steps_in_which_prototypes_are_frozen(train_swav):
    """Adam's first step moves every coordinate by the learning rate; after three steps with a
    gradient of 0 by 0.58 of it."""
    lr = 0.01
    looks = train_swav("--optimizer", "adam", "--lr", lr).looks
    moved = (looks[STEPS + 1][0] - looks[STEPS][0]).abs().median()
    # Half of the cosine is over. The length is reset to 1, which undoes a little of the step.
    assert 0.9 < moved / (lr * BATCH / 256 * 0.5) < 1.1


def test_how_many_prototypes_an_untrained_network_spreads_an_image_over():
    """The numbers in the file's table: the exponential of the mean entropy of the assignments of a
    batch of emoji."""
    args = arguments("swav")
    data = load_data("emoji", "", CPU)
    _, crops = next(Loader(data.train, swav.views(args), args.batch, 0, CPU)(0))
    torch.manual_seed(0)
    with torch.no_grad():
        _, scores = swav.SwAV(args.arch, args.size, args.dim, args.prototypes, 0)(crops)
    for epsilon, low, high in ((0.05, 100, 120), (args.epsilon, 5, 7)):
        Q = sinkhorn_reference(scores[0], epsilon, 3)
        entropy = -(Q * Q.clamp(min=1e-30).log()).sum(1).mean()
        assert low < torch.exp(entropy) < high
