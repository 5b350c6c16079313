"""Multi-task SSL: Multi-task Self-Supervised Visual Learning.
Doersch, Zisserman, ICCV 2017. https://arxiv.org/abs/1708.07860
Official code (how to load a trained network): https://github.com/google-deepmind/multiself

Idea. Tasks whose answers cost nothing teach different things: where a patch lies next to another
one, which colours a grey image had, which patches come from the same image, which pixels move until
the next frame. One network, the trunk, learns several of them at once; a small head for each task
reads its features and is thrown away after the training. With --heads lasso a head may read every
stage of the trunk, but a penalty on the absolute values of its weights (a lasso) makes it choose
few. Tasks that need different things can then use different stages. Two tasks are harmonised: the
patches of position are grey, as colour's images are. Otherwise the trunk could tell them apart by
their colours and serve each separately. Exemplar and motion keep their colours.

Notation. N clips in the global batch, n = N / processes on this process; each task t is shown one
frame of each clip (nine patches of it, or two copies). u_m(x) output of stage m of the trunk, with
`width` channels, normalised by batch-norm. The head of t reads r_t = sum over m of alpha_tm u_m,
where |alpha_t|_2 = 1. lambda strength of the penalty. Naive heads read the last stage; lambda is 0.

    L = sum over tasks of  (L_t + lambda |alpha_t|_1),  where L_t is, for
    position    mean over the 8 neighbours k of  -log softmax(logits(r_middle, r_k))[k]
    colour      mean over places of              -log softmax(logits(r))[c]
    exemplar    mean over images of              max(0, dist(z1, z2) - dist(z1, z3) + 1/2)
    motion      mean over places of              -v log sigmoid(s logit(r))

Places are those of a grid with a quarter of the image's side. c: class of its colour (Differs 3).
z1, z2: of two distorted copies of an image, z3: of a copy of another image; dist = 1 - cosine.
s = 1, v = 8 where it moves; s = -1, v = 1 where it rests; v = 0 where unknown.

Run.
    python methods/multitask.py                               one CPU core, about 7 minutes
    python methods/multitask.py --tasks position,colour --heads lasso
    torchrun --nproc_per_node 8 methods/multitask.py --recipe paper --data IMAGENET
--batch counts the clips of all processes together. In metrics.jsonl, held_out_position, _colour,
_exemplar and _motion are the scores of these tasks on held-out clips (see `scores`).

Reached. On movers after 12 epochs, 411 s on one busy core: kNN 45.0 % (untrained 33.9, raw pixels
34.4); linear 50.6 % (untrained 39.7, raw pixels 40.5); mean of 4 runs. Other recipes: not run.

What to expect. It is motion that helps: --tasks position,motion has 54.4, without motion 34.6 %.

Differs from the paper. (This file | the paper.)
    1. Every step trains all tasks, on frames of the same clips | one task per machine, ImageNet for
       three tasks, videos for motion. Column `paper`: without motion, since a folder has no flow.
    2. The lasso chooses among four stages of a whole ResNet or ViT; each stage has one 1x1
       convolution and batch-norm for all tasks | among the 23 units of the third stage of a
       ResNet-101, which ends there. Column `paper`: ResNet-50.
    3. Colours are 15 x 15 steps of red and blue minus grey, of single pixels | bins of Lab.
    4. What moves: the flow differs from its median over the frame by more than --high pixels; what
       rests: by less than --low | dense trajectories that camera motion does not explain. One place
       in twelve moves. It counts eight times: otherwise "nothing moves" would be a good answer.
    5. Copies are shifted, scaled, turned and get other colours; z3 is the z2 of the next image.
    6. With --no-harmonize the channels that are dropped become flat | noise.
    7. AdamW on the sum of the losses, with warm-up and cosine | RMSProp.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
import common
from common import (ARCHS, VITS, Loader, Run, Split, held_out, join_processes, load_data, parse,
                    patch_side)
from kernels.clips import VideosInMemory
from kernels.collectives import distribute, fail, gather
from kernels.maps import maps
from kernels.views import (ClipCrop, Crop, as_clips, as_tall, color_jitter, denormalize, luminance,
                           normalize, random_flip)

KIND = "video"  # what it learns from; the tests ask for what is due to each kind

# The loss.


def total_loss(losses, alpha, strength):
    """The equation above. losses: a scalar per task; alpha: (tasks, stages), rows of length 1."""
    return sum(losses) + strength * alpha.abs().sum()


# One function for each task. It takes what the head says, and a picture (n, 3, S, S) in [0, 1] that
# holds the answer (position, exemplar: not used). It returns two scalars: the loss, and a score
# from 0 to 1.


def position(logits, picture):
    """logits (n, 8, 8): of each neighbour, for each of the eight places. Score: share right."""
    places = torch.arange(8, device=logits.device).expand(len(logits), -1)  # (n, 8)
    right = logits.argmax(2) == places
    return F.cross_entropy(logits.mT, places), right.float().mean()


def colour(logits, picture):
    """logits (n, COLOURS, S/4, S/4). Score: share of places that are right."""
    answer = colour_classes(picture[:, :, 2::4, 2::4])  # single pixels: a mean would invent colours
    right = logits.argmax(1) == answer
    return F.cross_entropy(logits, answer), right.float().mean()


def exemplar(z, picture, margin=0.5):
    """z (n, 2, d): of two copies of each image. Score: how often the own copy is the nearer one."""
    first, second = gather(z).unbind(1)  # (N, d) each: the next image may be another process's
    to_own = 1 - F.cosine_similarity(first, second)
    to_other = 1 - F.cosine_similarity(first, second.roll(-1, 0))
    loss = (to_own - to_other + margin).clamp(min=0).mean()
    return loss, (to_own < to_other).float().mean()


def motion(logits, picture):
    """logits (n, 1, S/4, S/4); picture: 1 where it moves, 0 where it rests, between them unknown.
    Score: of the places that move or are said to move, the share of those that do both."""
    label = F.avg_pool2d(picture[:, :1], 4)
    moves = label > 0.75
    known = moves | (label < 0.25)
    losses = F.binary_cross_entropy_with_logits(logits, moves.to(logits), reduction="none")
    said = (logits > 0) & known
    overlap = (said & moves).sum() / (said | moves).sum().clamp(min=1)
    weight = known + 7 * moves  # 0 if unknown, 1 if it rests, 8 if it moves: such places are few
    return (weight * losses).mean(), overlap


TASKS = {"position": position, "colour": colour, "exemplar": exemplar, "motion": motion}


def scores(tasks, outputs):
    """That of each task, (tasks,). outputs: what the head says, and the picture, for each task.

    Without knowledge position has 1/8 and exemplar 1/2. In motion "everything moves" has the share
    of places that move, about a twelfth. In colour the most frequent class, grey, has about 2/5."""
    found = [TASKS[task](*output)[1] for task, output in zip(tasks, outputs)]
    return torch.stack(found)


STEP = 0.1  # between two colours
REACH = 7  # steps to each side of grey
COLOURS = (2 * REACH + 1) ** 2  # classes: red and blue have 15 steps each


def colour_classes(x):
    """Colours (n, 3, h, w) in [0, 1] -> (n, h, w) int64: red and blue minus grey, in steps."""
    difference = x[:, ::2] - luminance(x)  # (n, 2, h, w): of channels 0 and 2, red and blue
    step = (difference / STEP).round().clamp(-REACH, REACH) + REACH
    red, blue = step.long().unbind(1)
    return (2 * REACH + 1) * red + blue


# The network.

# how many pictures of a view, the first ones, are shown to the trunk
SEEN = {"position": 9, "colour": 1, "exemplar": 2, "motion": 1}
OUTPUTS = {"position": 8, "colour": COLOURS, "exemplar": 128, "motion": 1}  # of a head
DENSE = ("colour", "motion")  # with an answer for each place of a grid, size / 4 places wide


def backbone(arch, size):  # copy of: methods/context_encoder.py::backbone
    """common.backbone. The feature of a ViT is the mean of its patches, which are what is used."""
    return common.backbone(arch, size, pool="mean")


def head_of(task, width):
    """A hidden layer with batch-norm, then the answer; for dense tasks the layer sees 3 x 3 places,
    for others there is one place."""
    seen = 2 * width if task == "position" else width
    side = 3 if task in DENSE else 1
    first = nn.Conv2d(seen, width, side, padding=side // 2, bias=False)
    last = nn.Conv2d(width, OUTPUTS[task], 1)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), last)


def pairs(h):
    """h (n, 9, width, 1, 1) of a grid of patches -> (8n, 2 width, 1, 1): the middle and each of its
    neighbours."""
    neighbours = torch.cat([h[:, :4], h[:, 5:]], 1)
    middle = h[:, 4:5].expand_as(neighbours)
    return torch.cat([middle, neighbours], 2).flatten(0, 1)


class MultiTask(nn.Module):
    def __init__(self, arch, size, tasks, heads, width):
        super().__init__()
        self.backbone = backbone(arch, size)
        self.tasks = tasks
        self.side = size // 4

        # Each stage that is read gets a unit, which makes u_m of it.
        D = self.backbone.out_dim
        channels = [D] * 4 if arch in VITS else [D // 8, D // 4, D // 2, D]
        if heads == "naive":
            channels = [D]  # the last stage alone
        self.units = nn.ModuleList()
        for c in channels:
            conv = nn.Conv2d(c, width, 1, bias=False)
            self.units.append(nn.Sequential(conv, nn.BatchNorm2d(width, affine=False)))

        alpha = torch.ones(len(tasks), len(channels))
        self.raw_alpha = nn.Parameter(alpha, requires_grad=heads == "lasso")
        self.heads = nn.ModuleDict({task: head_of(task, width) for task in tasks})

    def alpha(self):
        """(tasks, stages), rows of length 1. Otherwise the penalty could be avoided, by small
        weights here and large ones in the head."""
        return F.normalize(self.raw_alpha, dim=1)

    def read(self, x, alpha, dense):
        """x (m, 3, H, W), alpha (stages,) -> r (m, width, 1, 1), or with a quarter of the image's
        side if dense."""
        total = 0
        stages = maps(self.backbone, x)[-len(self.units) :]  # one for each unit
        for weight, unit, stage in zip(alpha, self.units, stages):
            u = unit(stage)
            if dense:
                u = F.interpolate(u, self.side, mode="bilinear", antialias=True)
            else:
                u = u.mean((2, 3), keepdim=True)
            total = total + weight * u
        return total

    def forward(self, *views):
        """A view (n, k, 3, H, W) per task -> per task the logits of its head (exemplar: z), and the
        view's last picture, where the answer is. Each task goes through the trunk by itself, so
        that its batch statistics are its own."""
        outputs = []
        for task, alpha, x in zip(self.tasks, self.alpha(), views):
            seen = x[:, : SEEN[task]]
            r = self.read(seen.flatten(0, 1), alpha, task in DENSE)
            if task == "position":
                r = pairs(r.unflatten(0, (-1, 9)))
            y = self.heads[task](r)
            if task not in DENSE:
                y = y.flatten(1).unflatten(0, (len(x), -1))  # (n, 8, 8) or (n, 2, d)
            outputs.append((y, denormalize(x[:, -1])))
        return outputs


# The views.


def grey(x):
    """Images (n, 3, H, W) without colour, in three equal channels."""
    return luminance(x).expand_as(x)


def cut_patches(x, corners, side):  # copy of: methods/context_prediction.py::cut_patches
    """Images x (n, 3, S, S), corners (n, 9, 2) -> patches (n, 9, 3, side, side)."""
    top, left = corners.to(x.device).unbind(2)  # (n, 9) each
    image = torch.arange(len(x), device=x.device)
    image = image.view(-1, 1, 1, 1)
    i = torch.arange(side, device=x.device)
    rows = (top[..., None] + i)[..., None]  # (n, 9, side, 1)
    columns = left[..., None] + i  # (n, 9, side)
    columns = columns[:, :, None]  # (n, 9, 1, side)
    return x[image, :, rows, columns].movedim(4, 2)


def keep_one_channel(x, rand):
    """Patches (n, 9, 3, t, t): of each, one random channel stays. The other two become flat, with
    the mean of the one that stays."""
    kept = rand.uniform(0, 3, columns=(9,)).long()
    kept = F.one_hot(kept, 3)[..., None, None].to(x)  # (n, 9, 3, 1, 1)
    channel = (kept * x).sum(2, keepdim=True)
    flat = channel.mean((3, 4), keepdim=True)
    return torch.lerp(flat, x, kept)


def view_position(x, rand, args):
    """Each of nine patches lies at a random place in its cell of a grid of 3 x 3, so that edges
    seldom continue from one into the next."""
    cell = args.patch + args.gap
    line = torch.arange(3)
    corner = cell * torch.cartesian_prod(line, line)  # (9, 2)
    moved = rand.uniform(0, args.gap, columns=(9, 2)).long()
    x = cut_patches(x, corner + moved, args.patch)  # (n, 9, 3, t, t)
    if args.harmonize:
        return grey(x.flatten(0, 1)).unflatten(0, (-1, 9))
    return keep_one_channel(x, rand)


def view_colour(x, rand, args):
    """The grey image, and the one in colour."""
    x = random_flip(x, rand)
    return torch.stack([grey(x), x], 1)


def distort(x, rand):
    """Shifted, scaled, turned, and in other colours."""
    # The part that is shown: its side as a share of the image's, its angle, and its middle.
    scale = rand.uniform(0.5, 1.0)
    angle = rand.uniform(-0.35, 0.35)  # radians
    cos = scale * angle.cos()
    sin = scale * angle.sin()
    right = (1 - scale) * rand.uniform(-1, 1)
    down = (1 - scale) * rand.uniform(-1, 1)

    # Each is a number per image, (n,). Together they are affine matrices, (n, 2, 3).
    rows = [cos, -sin, right, sin, cos, down]
    matrix = torch.stack(rows, 1).view(-1, 2, 3).to(x)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return color_jitter(x, rand, 0.4, 0.4, 0.4, 0.1)


def view_exemplar(x, rand, args):
    x = random_flip(x, rand)
    return torch.stack([distort(x, rand), distort(x, rand)], 1)


def view_motion(x, rand, args):
    """x (n, 2, 3, H, W): labels and frames, cut to the same box. Both get the same flip; then the
    frame comes first."""
    x = as_clips(random_flip(as_tall(x), rand), 2)
    return x.flip(1)


VIEWS = {
    "position": view_position,
    "colour": view_colour,
    "exemplar": view_exemplar,
    "motion": view_motion,
}


def views(args, stride):
    """One view for each task, with frames of its own. stride: how many pictures after a label its
    frame comes (see labelled); 0 if the videos have no labels."""

    def augmentation(task):
        def augment(x, rand):
            if stride and task != "motion":
                x = x[:, 1]  # without the label
            return normalize(VIEWS[task](x, rand, args))  # (n, k, 3, h, w)

        return augment

    found = []
    for task in args.tasks.split(","):
        side = 3 * (args.patch + args.gap) if task == "position" else args.size
        crop = Crop(side, scale=(args.min_crop, 1.0))
        if stride:
            crop = ClipCrop(crop, 2, stride)  # a label and its frame
        found.append((crop, augmentation(task)))
    return found


def labelled(split, args):
    """A split of videos with labels from their flow. Each video of T frames becomes a new one of
    2 (T - 1) pictures: first the labels of frames 1 to T - 1, then these frames (the last one has
    no flow). Two pictures that are T - 1 apart are a label and its frame; taken as one clip they
    get the same crop."""
    truth = getattr(split.images, "truth", None)  # images and files have none
    if truth is None:
        fail(f"--data {args.data}: motion needs the flow of movers or tripod; choose other --tasks")
    films = []
    for start in range(0, len(split.images), 100):  # the flow of all would take a gigabyte
        part = truth.part(slice(start, start + 100))
        label = 255 * motion_labels(part.flow, args.low, args.high)
        label = label[:, :, None].expand(-1, -1, 3, -1, -1)
        film = torch.cat([label.byte(), part.frames[:, :-1]], 1)
        films.append(film.flatten(0, 1))
    lengths = [film.shape[1]] * len(split.images)
    return Split(VideosInMemory(torch.cat(films), lengths))


def motion_labels(flow, low, high):
    """Flow (..., 2, H, W) -> (..., H, W): 1 where it moves, 0 where it rests, 1/2 where unknown.
    The median over the frame is the camera's motion: most pixels show the background."""
    camera = flow.flatten(-2).median(-1).values
    speed = (flow - camera[..., None, None]).norm(dim=-3)
    return 0.5 * (speed > high) + 0.5 * (speed >= low)


# Training.

SETTINGS = {
    "recipe": ("movers", "bunny", "paper", "which column gives the defaults"),
    "tasks": (
        "position,colour,exemplar,motion",
        "position,colour,exemplar",
        "position,colour,exemplar",
        f"some of {', '.join(TASKS)}, separated by commas",
    ),
    "heads": ("naive", "naive", "naive", "what a head reads", ("naive", "lasso")),
    "lasso": (0.01, 0.01, 0.01, "strength lambda of the penalty on alpha"),
    "harmonize": (True, True, True, "for position: grey patches; else one channel of their colour"),
    "size": (32, 32, 256, "side of an image, pixels; a multiple of 4"),
    "arch": ("resnet14", "resnet14", "resnet50", "the trunk", ARCHS),
    "patch": (12, 12, 96, "for position: side of a patch, pixels", "[1, inf)"),
    "gap": (4, 4, 16, "for position: pixels between two patches on average", "[1, inf)"),
    "low": (0.5, 0.5, 0.5, "for motion: a pixel that is slower rests, pixels per frame"),
    "high": (1.0, 1.0, 1.0, "for motion: one that is faster moves, pixels per frame"),
    "width": (128, 128, 512, "channels of r, and units of the heads", "[1, inf)"),
    "batch": (64, 32, 256, "clips per step, over all processes"),
    "epochs": (12, 100, 100, "passes over the training clips"),
    "warmup": (1.0, 5.0, 1.0, "epochs of linear learning-rate warm-up"),
    "lr": (4e-3, 4e-3, 1e-3, "learning rate per 256 clips"),
    "weight_decay": (0.05, 0.05, 0.05, "on all parameters"),
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


def get_args(argv=None):
    args = parse(__doc__, SETTINGS, argv, learns_from="videos or images")
    tasks = args.tasks.split(",")
    if len({*tasks} & {*TASKS}) < len(tasks):
        fail(f"--tasks {args.tasks}: choose some of {','.join(TASKS)}, each once")
    if args.size % 4:
        fail(f"--size {args.size}: choose a multiple of 4, for answers at a quarter of the side")
    if args.low > args.high:
        fail(f"--low {args.low:g}, --high {args.high:g}: choose a --low of at most --high")
    if args.arch in VITS and args.patch % patch_side(args.size):
        fail(
            f"--patch {args.patch}: choose a multiple of {patch_side(args.size)}, the side of a "
            f"token of {args.arch} at --size {args.size}"
        )
    if args.heads != "lasso" and args.lasso != SETTINGS["lasso"][0]:
        fail(f"--lasso {args.lasso:g}: only --heads lasso has a penalty")
    return args


def show(tasks):
    """For views.png, two pictures for each task: neighbouring patches, an image and its answer, or
    two copies of an image."""

    def pictures(views):
        shown = {}
        for task, x in zip(tasks, views):
            shown[task] = denormalize(x[:, 0])
            shown[f"{task} 2"] = denormalize(x[:, 1])
        return shown

    return pictures


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    data = load_data(args.data, args.root, device)
    tasks = args.tasks.split(",")
    train = data.train
    test = data.test
    stride = 0
    if "motion" in tasks:
        train = labelled(train, args)
        test = labelled(test, args)
        stride = int(train.images.lengths[0]) // 2  # half of a video are labels
    settings = (views(args, stride), args.batch, args.seed, device, args.workers)
    loader = Loader(train, *settings)
    model = MultiTask(args.arch, args.size, tasks, args.heads, args.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=args.weight_decay)
    state = {"optimizer": optimizer}
    run = Run("multitask", args, data, loader, model, state, show=show(tasks))
    wrapped = distribute(model, device, args.compile)
    penalty = args.lasso if args.heads == "lasso" else 0.0

    # A run that is continued starts in the epoch in which it stopped; the loader skips its steps.
    for epoch in range(run.step // loader.steps, args.epochs):
        for step, shown in loader(epoch, run.step):
            lr = learning_rate(step, args, loader.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                outputs = wrapped(*shown)

            losses = []
            logged = {}
            for task, (said, picture) in zip(tasks, outputs):
                part, score = TASKS[task](said.float(), picture)
                losses.append(part)
                logged[task] = part.detach()
                logged[f"{task}_score"] = score

            # Each loss is a mean over the clips of this process (exemplar: of all processes);
            # DistributedDataParallel averages the gradients: exactly the gradient of one process
            # with all N clips.
            alpha = model.alpha()
            loss = total_loss(losses, alpha, penalty)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # (sum of |alpha|) squared: 1 if a head reads one stage, 4 if it reads all alike.
            stages = alpha.detach().abs().sum(1).square().mean()
            run.log(loss, lr, **logged, stages=stages)
        with run.not_training():
            found = held_out(model, test, settings, lambda outputs: scores(tasks, outputs))
        names = [f"held_out_{task}" for task in tasks]
        found = dict(zip(names, found.get("held_out", ())))
        run.end_epoch(epoch, **found)
    run.finish()


if __name__ == "__main__":
    main()
