"""Odd-One-Out: Self-Supervised Video Representation Learning With Odd-One-Out Networks.
Fernando, Bilen, Gavves, Gould, CVPR 2017. https://arxiv.org/abs/1611.06646
Official code: none is known.

Idea. Show the network six short pieces of one video. In one of them the frames are in a wrong
order: which one? All six show the same things before the same background, so only the order of the
frames tells. To answer, the network must know how things usually move, and compare the six.

Notation. N clips in the global batch, n = N / processes on this process. Of each clip six windows
of W consecutive frames x_1 ... x_W are cut out, which begin at different moments. In one of them,
the odd one, the frames are shuffled. A window is encoded as one image, its sum of differences:

    e = sum over i < j of (x_i - x_j) = sum over t of w_t x_t,    w_t = W + 1 - 2 t

(The differences of neighbours alone would add up to x_1 - x_W, and nothing would be left of what
happens between.) h = f(e) (n, 6, D) representation, kept for later use; v (n, 6, d) features after
a fully connected layer. Each window is compared with all others, and a classifier turns its o_k
into a logit. The layers after f are thrown away after training.

    o_k = sum over l of (v_k - v_l),    L = mean over clips of -log softmax(logits)[the odd one]

Chance is log 6 = 1.792. Nothing but the order of the frames may tell which window is odd:
    - Each question is asked six times, with the odd window in each place: no place is likelier.
    - The shuffle is any permutation but the identity and the reversal: much looks right backwards.
    - Windows in which something moves are preferred: in a still one, every order is right. All six
      are chosen before one of them becomes odd. Otherwise more motion would tell.
    - The channels of e are divided by their own root mean square. Differences of shuffled frames
      partly cancel, so e is faint: without the division, the faintest window is odd in 80 % of the
      clips of movers.
One cue stays: shuffled windows have more fine detail. In movers, where the camera pans, the odd one
has the steepest edges in 78 % of the clips, as often with the emoji painted over. In tripod, the
default, where the camera stands still, in 40 %.

Run.
    python methods/odd_one_out.py                       one CPU core, about 4 minutes
    python methods/odd_one_out.py --recipe bunny        the embedded film
    torchrun --nproc_per_node 8 methods/odd_one_out.py --recipe paper --data VIDEOS
--batch counts the clips of all processes together. The network sees differences, drawn around grey;
the evaluation shows single frames, which it has never seen, so it does not test motion.

Reached. On tripod after 12 epochs, 237 s on one busy core: kNN 35.7 % (untrained 34.1, raw pixels
33.4); linear 41.8 % (untrained 40.5, raw pixels 41.7); mean of 3 runs. Other recipes: not run.

What to expect. The features hardly gain, nor do they by more epochs (tests/results/LOG.md).

Differs from the paper. (This file | the paper.)
    1. Windows of five frames in a second | paper: of six, from anywhere; three ways to choose them.
    2. The network sees images of three channels. --encoding stack shows the differences between
       four grey neighbours, --encoding dynamic a dynamic image (approximate rank pooling) | paper:
       the same three encodings, a stack with as many channels as it needs.
    3. --fusion each, o_k above, treats all places alike: if two windows change places, so do their
       logits | paper: six logits of all windows together, concatenated (--fusion concat) or as one
       sum over k < l of (v_k - v_l) (--fusion sum).
    4. The odd window stands in every place in turn | paper: in one random place.
    5. A ResNet or ViT, AdamW, warm-up, cosine | paper: AlexNet, SGD. Whether it standardises
       encoded images is not known.
"""

import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import ARCHS, Loader, Run, backbone, held_out, join_processes, load_data, parse
from kernels.collectives import distribute, fail
from kernels.views import ClipCrop, Crop, as_clips, as_tall, denormalize, luminance, random_flip

KIND = "video"  # what it learns from; the tests ask for what is due to each kind
WINDOWS = 6

# The loss.


def odd_loss(logits):
    """Section 3: cross-entropy of which window is odd. Returns a scalar, in nats.

    logits: (n, 6, 6), six questions per clip; in question k the odd window is in place k."""
    answers = torch.arange(WINDOWS, device=logits.device)
    answers = answers.repeat(len(logits))  # (6n,): 0 1 2 3 4 5 0 1 ...
    return F.cross_entropy(logits.flatten(0, 1), answers)


def accuracy(logits):
    """Share of right answers: guesses are right for 1/6. A scalar tensor."""
    answers = torch.arange(WINDOWS, device=logits.device)
    return (logits.argmax(2) == answers).float().mean()


# The network.


def fuse(v, fusion):
    """Six windows v (m, 6, d) -> what the classifier is given: (m, 6, d), (m, d) or (m, 6 d)."""
    if fusion == "each":
        return WINDOWS * v - v.sum(1, keepdim=True)  # the sum over l of v_k - v_l
    if fusion == "sum":
        # In the sum over k < l of v_k - v_l, window k (counted from 0) is added 5 - k times and
        # subtracted k times.
        weights = WINDOWS - 1 - 2 * torch.arange(WINDOWS, device=v.device)
        return (weights[:, None] * v).sum(1)
    return v.flatten(1)


def dense(inputs, outputs):
    """A fully connected layer."""
    return nn.Sequential(
        nn.Linear(inputs, outputs, bias=False),
        nn.BatchNorm1d(outputs),
        nn.ReLU(),
    )


class OddOneOut(nn.Module):
    def __init__(self, arch, size, hidden, fusion):
        super().__init__()
        self.fusion = fusion
        self.backbone = backbone(arch, size)
        self.fc = dense(self.backbone.out_dim, hidden)
        self.classifier = dense(WINDOWS * hidden if fusion == "concat" else hidden, hidden)
        # No bias, which could favour a place: all are equally likely.
        self.logits = nn.Linear(hidden, 1 if fusion == "each" else WINDOWS, bias=False)

    def forward(self, x):
        """Windows (n, 6, 3, H, W), the odd one first -> logits (n, 6, 6) of six questions per clip;
        in question k the odd window is in place k."""
        h = self.backbone(x.flatten(0, 1))  # (6n, D)
        v = self.fc(h).unflatten(0, (-1, WINDOWS))  # (n, 6, d)

        # Question k: the windows moved on by k places, so that the odd one is in place k.
        questions = [v.roll(place, dims=1) for place in range(WINDOWS)]
        questions = torch.stack(questions, 1)  # (n, 6, 6, d)

        fused = fuse(questions.flatten(0, 1), self.fusion)
        logits = self.logits(self.classifier(fused.flatten(0, -2)))
        return logits.view(-1, WINDOWS, WINDOWS)


# The views.


def shuffles(length):
    """All orders of `length` frames except the right one and its reverse: (K, length) int64."""
    right = list(range(length))
    orders = [list(order) for order in itertools.permutations(right)]
    orders.remove(right)
    orders.remove(right[::-1])
    return torch.tensor(orders)


def encoder(encoding, length):
    """The weight w_t of each frame of a window: (1, length), or (length - 1, length) of a stack. In
    each row the positive weights add up to 1, the negative ones to -1."""
    t = torch.arange(1, length + 1)
    if encoding == "stack":
        one = torch.eye(length)
        return one[:-1] - one[1:]  # row t: frame t minus frame t + 1
    if encoding == "sum":
        weights = length + 1.0 - 2 * t
    else:
        # Approximate rank pooling (Bilen et al. 2016): the sum over s >= t of (2s - W - 1) / s.
        terms = (2 * t - length - 1) / t
        weights = terms.flip(0).cumsum(0).flip(0)
    return weights[None] * (2 / weights.abs().sum())


def choose(x, length, rand):
    """Where the six windows of each clip begin, the odd one first: (n, 6) int64. x: clips (n, T, C,
    H, W) in [0, 1].

    Six different windows are drawn. A window's probability is proportional to the least difference
    between two neighbours in it. Which of the six is odd does not depend on what they show."""
    difference = x.diff(dim=1).abs().mean((2, 3, 4))  # (n, T - 1)
    motion = difference.unfold(1, length - 1, 1).amin(2)  # (n, T - length + 1)
    motion = motion + 1e-6  # in a clip without motion all windows are equally likely

    # To draw without replacement, add Gumbel noise to log p and take the six largest sums.
    u = rand.uniform(columns=motion.shape[1:]).to(x.device)
    gumbel = -(-u.log()).log()
    begins = (motion.log() + gumbel).topk(WINDOWS).indices  # (n, 6)

    # Windows that move much tend to come first here, so shuffle the six.
    order = rand.uniform(columns=(WINDOWS,)).argsort(1)
    return begins.gather(1, order.to(x.device))


def encode(x, frames, rows, eps=0.01):
    """Clips x (n, T, C, H, W), the frames of each window (n, 6, W), and the weights of an encoder
    (R, W) -> images (n, 6, R C, H, W). Each channel is divided by its root mean square, but by at
    least eps: where nothing moves, noise is not blown up."""
    n, T = x.shape[:2]

    # The weight of every frame of the clip in every window, 0 outside the window.
    frames = frames[:, :, None].expand(-1, -1, len(rows), -1)  # (n, 6, R, W)
    matrix = x.new_zeros(n, WINDOWS, len(rows), T)
    matrix = matrix.scatter(3, frames, rows.to(x).expand(frames.shape))

    e = torch.einsum("nkrt,ntchw->nkrchw", matrix, x).flatten(2, 3)
    size = e.square().mean((3, 4), keepdim=True).sqrt()
    return e / size.clamp(min=eps)


def views(args):
    """Crop and flip of the clip, then six windows, of which the first is shuffled."""
    table = shuffles(args.length)
    rows = encoder(args.encoding, args.length)

    def augment(x, rand):
        x = random_flip(as_tall(x), rand)  # one draw for all frames of a clip
        if args.encoding == "stack":
            x = luminance(x)
        x = as_clips(x, args.frames)

        begins = choose(x, args.length, rand)
        frames = begins[:, :, None] + torch.arange(args.length, device=x.device)  # (n, 6, W)

        # The first window is the odd one.
        shuffle = table[rand.uniform(0, len(table)).long()]  # (n, W)
        odd = frames[:, 0].gather(1, shuffle.to(x.device))
        frames = torch.cat([odd[:, None], frames[:, 1:]], 1)
        return encode(x, frames, rows)  # (n, 6, 3, H, W)

    crop = Crop(args.size, scale=(args.min_crop, 1.0))
    return [(ClipCrop(crop, args.frames, args.stride), augment)]


# Training.

ENCODINGS = ("sum", "dynamic", "stack")
FUSIONS = ("each", "sum", "concat")
SETTINGS = {
    "recipe": ("tripod", "bunny", "paper", "which column gives the defaults"),
    "size": (32, 32, 224, "side of a frame, pixels"),
    "arch": ("resnet14", "resnet14", "resnet18", "the backbone", ARCHS),
    "frames": (12, 12, 36, "frames of a clip, in which the windows lie", "[8, 64]"),
    "stride": (1, 1, 1, "show every n-th frame, of 12 per second", "[1, inf)"),
    "length": (5, 5, 6, "frames of a window, W; 4 for a stack", "[3, 7]"),
    "encoding": ("sum", "sum", "sum", "how a window becomes an image", ENCODINGS),
    "fusion": ("each", "each", "sum", "how six windows are compared", FUSIONS),
    "batch": (32, 32, 64, "clips per step, over all processes; six windows of each"),
    "epochs": (12, 100, 200, "passes over the training clips"),
    "warmup": (1.0, 5.0, 5.0, "epochs of linear learning-rate warm-up"),
    "lr": (8e-3, 8e-3, 2e-3, "learning rate per 256 clips"),
    "weight_decay": (0.05, 0.05, 5e-4, "on all parameters"),
    "hidden": (256, 256, 4096, "units of each of the two layers after the backbone", "[1, inf)"),
    "min_crop": (0.5, 0.5, 0.5, "smallest crop, share of a frame's area", "(0, 1]"),
}


def learning_rate(step, args, steps_per_epoch):  # copy of: methods/simclr.py::learning_rate
    """Base rate x batch / 256, linear warm-up, then cosine to 0. `step` counts from 0 over the
    whole run."""
    peak = args.lr * args.batch / 256
    warmup = args.warmup * steps_per_epoch
    total = args.epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / (total - warmup)
    return peak * 0.5 * (1 + math.cos(angle))


def show(views):
    """For views.png: the encoded windows, the odd one first."""
    (x,) = views  # (n, 6, 3, H, W)
    names = ["odd", *[f"in order {i}" for i in range(1, WINDOWS)]]
    return {name: denormalize(x[:, place]) for place, name in enumerate(names)}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    if args.frames < args.length + WINDOWS - 1:
        fail(
            f"--frames {args.frames}: choose at least {args.length + WINDOWS - 1}, for six windows "
            f"of --length {args.length} frames"
        )
    if args.encoding == "stack" and args.length != 4:
        fail(
            f"--encoding stack, --length {args.length}: choose --length 4, whose three differences "
            f"are the three channels"
        )
    return args


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    settings = (views(args), args.batch, args.seed, device, args.workers)
    loader = Loader(data.train, *settings)
    model = OddOneOut(args.arch, args.size, args.hidden, args.fusion).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    chance = math.log(WINDOWS)
    state = {"optimizer": optimizer}
    run = Run("odd_one_out", args, data, loader, model, state, ("chance", chance), show)
    wrapped = distribute(model, device, args.compile)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x,) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = wrapped(x).float()  # (n, 6, 6)

            # The mean over the clips of this process; DistributedDataParallel averages the
            # gradients: exactly the gradient of one process with all N clips.
            loss = odd_loss(logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr, accuracy=accuracy(logits))
        with run.not_training():
            found = held_out(model, data.test, settings, accuracy)
        run.end_epoch(epoch, **found)
    run.finish()


if __name__ == "__main__":
    main()
