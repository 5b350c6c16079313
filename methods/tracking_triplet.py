"""Tracked patches: Unsupervised Learning of Visual Representations using Videos.
Wang, Gupta, ICCV 2015. https://arxiv.org/abs/1505.00687
Official code (Caffe): https://github.com/xiaolonw/caffe-video_triplet

Idea. Follow a moving thing through a video. In the first and in the last frame it is the same
thing, though it has turned, come nearer or changed its background: two views of it that nobody had
to invent. Their embeddings should be nearer to each other than to that of a patch of another video.
Most other patches are after a few epochs already farther away than the margin asks for and teach
nothing. So later the training searches for those that are still too near.

Notation. N tracks in the global batch, n = N / processes on this process, one from each clip; x1,
x2 (n, 3, H, W) patches around the thing in the first and in the last frame; h = f(x) (n, D)
representation, kept for later use; z = g(h) (n, d) embedding, by two layers that are thrown away
after training, L2-normalised; dist(a, b) = 1 - z_a . z_b cosine distance, at most 2; M margin; K
negatives of each anchor. Of each pair, one patch is the anchor a and the other the positive p; then
they exchange roles (Eq. 2 and 3):

    L = mean over anchors a and their K negatives of  max(0, dist(a, p) - dist(a, negative) + M)

Negatives are patches of other clips of the batch. At first they are random; both patches of a track
get the same ones. From epoch `hard_from` on, `hard` of the K are those nearest to the anchor, which
have the largest loss. If all embeddings are the same, the loss is M (the training has collapsed).
It may stay there if hard negatives are used from the start, or if all K are hard.

Run.
    python methods/tracking_triplet.py                        one CPU core, about 2 minutes
    python methods/tracking_triplet.py --hard-from 20         random to the end (20 = --epochs)
    torchrun --nproc_per_node 8 methods/tracking_triplet.py --recipe paper --data movers
--batch counts the clips of all processes together.
The network sees two patches of each. Clips without a track are left out; of 4,000 of movers 3,946
remain. In metrics.jsonl, held_out is the share of triplets of test clips that are in the right
order, dist(a, p) < dist(a, negative), over all negatives of a batch; guesses have 0.5.

Reached. On movers after 20 epochs, 129 s on one busy core: kNN 36.6 % (untrained 34.0, raw pixels
34.4); linear 42.7 % (untrained 40.4, raw pixels 40.5); mean of 3 runs. Other recipes: not run.

Differs from the paper. (This file | the paper, or the official code.)
    1. A track follows one point for 11 steps, by the exact optical flow: how many pixels each pixel
       moves until the next frame. It begins in the middle of what moves against the background |
       paper: in real videos, it begins with the box that has most moving points (trajectories of
       SURF features, motion above half a pixel); a tracker (KCF) follows the box for 30 frames.
    2. Two negatives are the nearest to the anchor and two are random |
       paper: the four nearest (column `paper`) |
       code: two of the four nearest to the first patch, two random with a loss, for both patches.
    3. M = 0.5 as in the paper | code: 1.
    4. Each patch has its own crop and flip, as in the code, and its own changes of colour:
       otherwise the colours of a clip would tell which patches belong together | paper: colours as
       they are. In both methods, the background around the thing is of the same video, and can
       be recognised instead.
    5. The network is a ResNet or ViT with a small head, trained by AdamW with warm-up and cosine |
       paper: AlexNet with two more layers, SGD whose rate falls in steps. A batch of the column
       `paper` has 48 tracks, a multiple of 8 processes | paper: 50.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (ARCHS, Loader, Run, Split, backbone, fail, held_out, join_processes, load_data,
                    parse)
from kernels.clips import VideosInMemory
from kernels.collectives import distribute, gather, rank, world
from kernels.views import (METHOD, ClipCrop, Crop, color_jitter, denormalize, normalize,
                           random_flip, random_grayscale)

KIND = "video"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def ranking_loss(anchor, positive, negatives, margin):
    """The equation above. Returns a scalar.

    anchor, positive: (A, d); negatives: (A, K, d); all L2-normalised."""
    to_positive = 1 - (anchor * positive).sum(1, keepdim=True)  # (A, 1)
    to_negatives = 1 - (negatives @ anchor[:, :, None]).squeeze(2)  # (A, K)
    return (to_positive - to_negatives + margin).clamp(min=0).mean()


def random_negatives(u, own, tracks):
    """Uniform u (n, K) -> (n, K) int64: patches of other tracks, as rows of the 2N patches, of
    which the first N are in the first frames. own: (n,) which of the N tracks these are."""
    others = tracks - 1
    # A number among the 2 (N - 1) patches of the other tracks, first frames before last frames.
    number = (u * 2 * others).long()
    in_last_frame = number // others  # 0 or 1
    track = number % others

    # Skip this track: the numbers from it on move up by one.
    track = track + (track >= own[:, None]).long()
    return in_last_frame * tracks + track


@torch.no_grad()
def hardest_negatives(anchor, everyone, own, count):
    """(A, count) int64: of the 2N patches the `count` nearest to each anchor, but not those of its
    own track. anchor (A, d), everyone (2N, d); own: (A,) the track of each anchor."""
    distance = 1 - anchor @ everyone.T  # (A, 2N)
    tracks = len(everyone) // 2
    track = torch.arange(len(everyone), device=own.device) % tracks
    distance = distance.masked_fill(track == own[:, None], torch.inf)
    return distance.topk(count, largest=False).indices


def right_order(z):
    """Share of triplets with dist(a, p) < dist(a, negative); equal distances count one half. A
    scalar tensor. z: (2n, d), L2-normalised; the first n are in the first frames. The triplets are
    those of the whole batch, on all processes."""
    z1, z2 = z.chunk(2)
    z = torch.cat([gather(z1), gather(z2)])  # (2N, d)
    n = len(z) // 2
    row = torch.arange(2 * n, device=z.device)
    likeness = z @ z.T  # (2N, 2N): 1 - dist
    of_positive = likeness.gather(1, row.roll(n)[:, None])
    right = (likeness < of_positive).to(z) + 0.5 * (likeness == of_positive).to(z)

    # Only patches of other tracks count as negatives.
    track = row % n
    other = (track != track[:, None]).to(z)
    return (right * other).sum() / other.sum()


# The network.


class TrackingTriplet(nn.Module):
    def __init__(self, arch, size, hidden, dim):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.head = nn.Sequential(
            nn.Linear(self.backbone.out_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim),
        )

    def forward(self, x1, x2):
        """Patches (n, 3, H, W) -> z (2n, d). One pass, so that they share the batch statistics."""
        h = self.backbone(torch.cat([x1, x2]))  # (2n, D)
        return F.normalize(self.head(h).float(), dim=1)


# The views.


def motion(flow):  # copy of: methods/watching_objects_move.py::motion
    """How fast each pixel moves relative to the background: (..., 2, H, W) -> (..., H, W)."""
    camera = flow.flatten(-2).median(-1).values
    return (flow - camera[..., None, None]).norm(dim=-3)


def follow(flow, speed):
    """In each of m clips, follows one point of what moves. flow: (m, T - 1, 2, H, W); speed: the
    least motion, in pixels per frame. Returns the places x, y of the point (m, T, 2), and (m,)
    bool: whether something moves and the point never leaves the frame."""
    size = flow.shape[-1]
    clip = torch.arange(len(flow), device=flow.device)
    centres = torch.arange(size, device=flow.device) + 0.5
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)  # (H, W, 2): x, y
    grid = grid.flatten(0, 1).to(flow)

    # The first place: of the pixels that move, the one that is nearest to their mean place. The
    # mean itself may lie in a hole of the thing.
    moves = motion(flow[:, 0]).flatten(1) > speed  # (m, H W)
    weight = moves.to(flow)
    mean = weight @ grid / weight.sum(1, keepdim=True).clamp(min=1)  # (m, 2)
    distance = torch.cdist(mean[:, None], grid[None])[:, 0]  # (m, H W)
    nearest = distance.masked_fill(~moves, torch.inf).argmin(1)  # (m,)
    place = grid[nearest]  # (m, 2)
    found = moves.any(1)

    # In each frame the point moves as the pixel under it does.
    places = [place]
    for step in flow.unbind(1):  # (m, 2, H, W), to the next frame
        column, row = place.long().clamp(0, size - 1).unbind(1)
        place = place + step[clip, :, row, column]
        found = found & ((0 <= place) & (place < size)).all(1)
        places.append(place)
    return torch.stack(places, 1), found


def cut(frames, place, side):
    """Cuts a box around a place in each frame: frames (m, 3, H, W), places (m, 2) -> boxes (m, 3,
    side, side). A box that reaches beyond the frame is moved into it."""
    corner = (place - side / 2).round().long()
    corner = corner.clamp(0, frames.shape[3] - side)
    pixel = torch.arange(side, device=frames.device)
    columns, rows = (corner[:, :, None] + pixel).unbind(1)  # (m, side) each
    clip = torch.arange(len(frames), device=frames.device)[:, None, None]
    patches = frames[clip, :, rows[:, :, None], columns[:, None]]  # (m, side, side, 3)
    return patches.movedim(3, 1)


def mine(split, args):
    """A split of videos whose objects are followed -> a split of pairs: new videos of two frames,
    which are the patches at the two ends of a track. Clips without a track are left out."""
    truth = getattr(split.images, "truth", None)  # images and files have none
    if truth is None:
        fail(f"--data {args.data}: the flow of these videos is not known; choose movers or tripod")
    side = truth.frames.shape[4]
    if args.patch > side:
        fail(f"--patch {args.patch}: choose at most {side}, the side of a frame")
    pairs = []
    for start in range(0, len(split.images), 100):  # the flow of all would take a gigabyte
        part = truth.part(slice(start, start + 100))
        places, found = follow(part.flow, args.speed)
        first = cut(part.frames[:, 0], places[:, 0], args.patch)
        last = cut(part.frames[:, -1], places[:, -1], args.patch)
        pairs.append(torch.stack([first, last], 1)[found])
    pairs = torch.cat(pairs)  # (tracks, 2, 3, patch, patch)
    if not len(pairs):
        fail(f"--speed {args.speed:g}: nothing moves so fast; choose a lower speed")
    return Split(VideosInMemory(pairs.flatten(0, 1), [2] * len(pairs)))


def views(args):
    """The first and the last patch, each with its own crop, flip and colours."""

    def augment(x, rand):
        s = args.strength
        x = random_flip(x, rand)
        x = color_jitter(x, rand, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8)
        return normalize(random_grayscale(x, rand, args.grey))

    # A pair is a video of two frames. Each view cuts both and keeps one.
    crop = ClipCrop(Crop(args.size, scale=(args.min_crop, 1.0)), 2)
    first = (crop, lambda x, rand: augment(x[:, 0], rand))
    last = (crop, lambda x, rand: augment(x[:, 1], rand))
    return [first, last]


# Training.

SETTINGS = {
    "recipe": ("movers", "paper", "which column gives the defaults"),
    "size": (32, 224, "side of a patch that the network sees, pixels"),
    "patch": (28, 28, "side of a patch in the frame, pixels", "[1, inf)"),
    "speed": (0.5, 0.5, "motion above which a pixel is followed, pixels per frame"),
    "arch": ("resnet14", "resnet18", "the backbone", ARCHS),
    "batch": (64, 48, "clips per step, over all processes"),
    "epochs": (20, 30, "passes over the training clips"),
    "warmup": (1.0, 0.0, "epochs of linear learning-rate warm-up"),
    "lr": (4e-3, 5.3e-3, "learning rate per 256 clips"),
    "weight_decay": (0.05, 5e-4, "on all parameters"),
    "hidden": (512, 4096, "units of the hidden layer of g", "[1, inf)"),
    "dim": (128, 1024, "dimensions of the embedding z", "[1, inf)"),
    "margin": (0.5, 0.5, "margin M between cosine distances", "(0, 2]"),
    "negatives": (4, 4, "negatives K of an anchor", "[1, inf)"),
    "hard": (2, 4, "how many of the K negatives are the nearest, from epoch --hard-from on"),
    "hard_from": (10, 10, "first epoch, from 0, with hard negatives"),
    "strength": (0.5, 0.0, "strength s of the colour jitter", "[0, 1.25]"),
    "grey": (0.2, 0.0, "share of patches without colour", "[0, 1]"),
    "min_crop": (0.5, 0.95, "smallest crop, share of the patch's area", "(0, 1]"),
}


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv)
    most = 2 * args.batch - 2
    if args.negatives > most:
        fail(f"--negatives {args.negatives}: choose at most {most}, the patches of other clips")
    if args.hard > args.negatives:
        fail(f"--hard {args.hard}: choose at most {args.negatives}, the negatives of an anchor")
    return args


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
    """For views.png: the two patches of a track."""
    first, last = views  # (n, 3, H, W) each
    return {"first": denormalize(first), "last": denormalize(last)}


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    train = mine(data.train, args)
    test = mine(data.test, args)
    settings = (views(args), args.batch, args.seed, device, args.workers)
    loader = Loader(train, *settings)
    model = TrackingTriplet(args.arch, args.size, args.hidden, args.dim).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    state = {"optimizer": optimizer}
    reference = ("collapsed", args.margin)
    run = Run("tracking_triplet", args, data, loader, model, state, reference, show)
    wrapped = distribute(model, device, args.compile)

    # The tracks of this process among all N of a batch.
    n = args.batch // world()
    own = torch.arange(rank() * n, (rank() + 1) * n, device=device)

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, (x1, x2) in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z = wrapped(x1, x2)  # (2n, d)
            z1, z2 = z.chunk(2)
            everyone = torch.cat([gather(z1), gather(z2)])  # (2N, d)

            # Which negatives: random ones, and later some that are the hardest.
            hard = args.hard if epoch >= args.hard_from else 0
            rand = loader.random(epoch, step % loader.steps, 0, METHOD)
            u = rand.uniform(columns=(args.negatives - hard,)).to(device)
            easy = random_negatives(u, own, args.batch).repeat(2, 1)  # (2n, K - hard)
            hardest = hardest_negatives(z, everyone, own.repeat(2), hard)  # (2n, hard)
            chosen = torch.cat([easy, hardest], 1)  # (2n, K)
            positive = torch.cat([z2, z1])  # (2n, d): of each patch the other one of its track

            # The mean over the anchors of this process; DistributedDataParallel averages the
            # gradients, and gather passes them back: exactly that of one process with all tracks.
            loss = ranking_loss(z, positive, everyone[chosen], args.margin)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss, lr)
        with run.not_training():
            found = held_out(model, test, settings, right_order)
        run.end_epoch(epoch, **found)
    run.finish()


if __name__ == "__main__":
    main()
