"""Robustness: what is left of a linear probe's accuracy when the test images are corrupted.
Corruptions: Hendrycks, Dietterich, ICLR 2019. https://arxiv.org/abs/1903.12261
A drawing style left out: the first version of that paper. https://arxiv.org/abs/1807.01697
Official code: https://github.com/hendrycks/robustness

Idea. A classifier that was trained on clean images may meet noise, blur or a hidden part when it is
used. Features that change little under such corruptions are worth more than the accuracy on clean
images tells. A network is frozen, a linear probe (a linear classifier) is trained on its features
of clean images, and the test images are corrupted in eight ways, each at three strengths. Raw
pixels, k-means features and the same network before training are measured in the same way. On emoji
there is a second question: the probe learns from the drawings of three artists and is tested on
those of the fourth. The probe has never seen this style; the network has, without labels, if it was
trained on emoji.

Notation. a: accuracy in percent on the clean test images, of the probe of evaluate() in common.py;
a(c, s): the same probe's with corruption c at strength s = 1, 2, 3; C = 8 corruptions.

    mean relative loss = 100 / (3 C) x sum over c and s of (a - a(c, s)) / a

0: nothing is lost; below 0: the corruptions help; 100: no right answer. Always answering the most
frequent class of emoji is right for 20.6 %, so of an accuracy of 50 to 62 % this loses only 59 to
67. And a network of low accuracy has little to lose: look at the mean of all a(c, s), the mean
corrupted accuracy, too. Random numbers of a corruption are drawn from --seed and the number of the
image, so all strengths meet the same, and all networks of one --size (images in memory are
corrupted before they are resized). A "-" in a table stands for a number that is not defined.

Run.
    python methods/eval_robustness.py runs/simclr-emoji-0 runs/rotnet-emoji-0
    python methods/eval_robustness.py runs/*-emoji-* --data fashion
    torchrun --nproc_per_node 8 methods/eval_robustness.py runs/simclr-imagenet-0
It writes results.jsonl, robustness.png (accuracy against strength) and corruptions.png (what the
corruptions do to an image) into --out, by default runs/eval_robustness. What is in results.jsonl is
not measured again, so a command that was stopped continues. Most emoji runs take about 30 seconds
of one CPU core, raw pixels one minute, k-means features two, jigsaw and mae four.

Differs from the paper. (This file | the paper.)
    1. The part of the clean accuracy that is lost | the error, divided by AlexNet's (mCE), or the
       growth of the error, divided by AlexNet's (relative mCE). Ours needs no AlexNet.
    2. Five of its fifteen (noise, contrast, brightness, pixelation, JPEG), Gaussian blur, which is
       one of its spare ones, rotation and occlusion, at three strengths | fifteen at five.
    3. Brightness is added to all three channels | to the value in HSV.
    4. The size of a blur, of a block of pixels and of the covered square is a part of the image's
       side | in pixels, of images of 224 x 224.
    5. Many methods change brightness and contrast in training, and jigsaw and context_prediction
       standardise each image | a network should not have met the corruptions.
"""

import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds common.py from any folder
from common import (Candidate, Results, Split, candidates, features, join_processes,
                    linear_classifier, load_data, parse, pixels, print0, print_files, replace_file,
                    share)
from kernels.collectives import fail, leave_processes, rank
from kernels.kmeans import ABOUT, PATCH, KMeansFeatures, fit_kmeans

KIND = "evaluation"  # the tests ask for what is due to each kind
ARTISTS = ("twemoji", "noto", "fluent-3d", "fluent-flat")  # of emoji, by Split.drawing

# The measure.


def mean_relative_loss(clean, corrupted):
    """In percent, the equation above; NaN if the accuracy on clean images is 0.

    clean: accuracy. corrupted: {corruption: [accuracy at each strength]}."""
    if not clean:
        return math.nan
    losses = []
    for accuracies in corrupted.values():
        losses += [(clean - a) / clean for a in accuracies]
    return 100 * mean(losses)


def mean(numbers):
    """None if one of them is None, which means that it is not defined."""
    numbers = list(numbers)
    return None if None in numbers else sum(numbers) / len(numbers)


# The corruptions take images x (n, 3, H, W) in [0, 1], how strong they are, and one numpy generator
# per image. What leaves [0, 1] is cut off by corrupt().


def noise(x, sigma, generators):
    """Adds independent Gaussian noise of deviation sigma to every number."""
    shape = x.shape[1:]
    drawn = [rng.standard_normal(shape, dtype=np.float32) for rng in generators]
    return x + sigma * torch.from_numpy(np.stack(drawn)).to(x)


def blur(x, sigma, generators):
    """Gaussian blur of deviation sigma x H / 32 pixels, cut off at three deviations."""
    deviation = sigma * x.shape[2] / 32
    radius = min(math.ceil(3 * deviation), x.shape[2] - 1)  # borders are reflected
    return TF.gaussian_blur(x, 2 * radius + 1, deviation)


def contrast(x, factor, generators):
    """Brings all pixels of a channel closer to its mean: factor 1 changes nothing, 0 leaves it."""
    middle = x.mean((2, 3), keepdim=True)
    return middle + factor * (x - middle)


def brightness(x, amount, generators):
    """Adds the amount to every number."""
    return x + amount


def pixelation(x, part, generators):
    """Averages the image to `part` of its side and enlarges it again, each pixel to a block."""
    small = F.adaptive_avg_pool2d(x, max(1, round(part * x.shape[2])))
    return F.interpolate(small, x.shape[2:], mode="nearest")


def jpeg(x, quality, generators):
    """Encodes and decodes each image as JPEG of this quality, 1 to 100."""
    stored = (x * 255).round().to(torch.uint8).cpu()
    decoded = []
    for image in stored:
        file = io.BytesIO()
        TF.to_pil_image(image).save(file, "JPEG", quality=quality)
        decoded.append(TF.pil_to_tensor(Image.open(file)))
    return torch.stack(decoded).to(x) / 255


def rotation(x, degrees, generators):
    """Turns square images about their centres, to the left or to the right at random; pixels at the
    border are continued outwards."""
    signs = [1 if rng.random() < 0.5 else -1 for rng in generators]
    angle = math.radians(degrees) * torch.tensor(signs).to(x)  # (n,)
    cos = angle.cos()
    sin = angle.sin()
    zero = torch.zeros_like(angle)
    # Where each pixel comes from: two rows of a matrix per image.
    numbers = [cos, -sin, zero, sin, cos, zero]
    matrices = torch.stack(numbers, 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def occlusion(x, part, generators):
    """Covers a square with `part` of the side by grey, at a random place."""
    size = x.shape[2]
    side = round(part * size)
    corners = np.array([rng.integers(size - side + 1, size=2) for rng in generators])
    corners = torch.from_numpy(corners).to(x.device)[:, :, None]  # (n, 2, 1): top, left
    place = torch.arange(size, device=x.device)
    inside = (corners <= place) & (place < corners + side)
    rows, columns = inside.unbind(1)  # (n, size) each
    covered = rows[:, :, None] & columns[:, None]  # (n, size, size)
    return x.masked_fill(covered[:, None], 0.5)


# Mostly within the range of the official code for images of 224 and of 32 pixels; the strongest
# blur is twice theirs.
CORRUPTIONS = {  # name: function, three strengths, what their number is
    "noise": (noise, (0.05, 0.1, 0.2), "deviation; black 0, white 1"),
    "blur": (blur, (0.5, 1.0, 2.0), "deviation, 1/32 of the side"),
    "contrast": (contrast, (0.5, 0.3, 0.15), "part that is left"),
    "brightness": (brightness, (0.1, 0.2, 0.3), "added; black 0, white 1"),
    "pixelation": (pixelation, (0.5, 0.375, 0.25), "part of the pixels per side"),
    "jpeg": (jpeg, (50, 25, 10), "quality"),
    "rotation": (rotation, (5, 10, 20), "degrees"),
    "occlusion": (occlusion, (0.25, 0.375, 0.5), "part of the side"),
}


def corrupt(images, indices, corruption, strength, seed):
    """uint8 images (n, 3, H, W) -> the same corrupted, rounded to 8 bits. The random numbers of an
    image belong to its index in the data set and the seed, not to the batch. Exits with a one-line
    message if the images are not square."""
    if images.shape[2] != images.shape[3]:
        fail("the corruptions need square images, as those of emoji: choose other --data")
    function = CORRUPTIONS[corruption][0]
    generators = [np.random.default_rng([seed, index]) for index in indices]
    x = function(images.float() / 255, strength, generators)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


class Corrupted:
    """A reader (kernels/readers.py) of corrupted images, for an evaluation: what another reader
    gives, through corrupt()."""

    def __init__(self, reader, corruption, strength, seed):
        self.reader = reader
        self.how = (corruption, strength, seed)

    def __len__(self):
        return len(self.reader)

    def whole(self, indices, size, workers=0):
        done = 0
        for images, broken in self.reader.whole(indices, size, workers):
            these = indices[done : done + len(images)].tolist()
            done += len(images)
            yield corrupt(images, these, *self.how), broken


def percent(right):
    return 100 * right.double().mean().item()


# The evaluation.

SETTINGS = {
    "recipe": ("default", "which column gives the defaults"),
    "seed": (0, "seed of the untrained network, the k-means features and the corruptions"),
    "data": ("", "data set or folder of images; if not given, that of the training"),
    "size": (0, "side of the images, pixels; 0: that of the training", "[0, inf)"),
}


def get_args(argv=None):  # copy of: methods/eval_features.py::get_args
    return parse(__doc__, SETTINGS, argv, runs="folders of finished runs, or their backbone.pt")


def robustness(candidate, data, device, args):
    """What a line of results.jsonl holds of a network. Every process must call it; process 0 gets
    the result, the others {}."""
    network = candidate.network.to(device, memory_format=torch.channels_last)  # as in training
    how = candidate.size, device, args.workers
    bank, bank_readable = features(network, data.bank, *how)
    test, readable = features(network, data.test, *how)
    result = {}

    # Process 0 fits the probe; the others only compute features.
    if rank() == 0:
        bank, known = only_readable(bank, data.bank, bank_readable)
        test, asked = only_readable(test, data.test, readable)
        if len(bank) < 2:
            fail(f"{data.name}: two training images with labels are needed")
        # It overwrites its features.
        classify = linear_classifier(bank.clone(), known.labels, known.emoji)
        right = classify(test.clone()) == asked.labels
        result["clean"] = percent(right)
        result["corrupted"] = {}

    for corruption in tqdm(CORRUPTIONS, leave=False, disable=rank() > 0 or None):
        strengths = CORRUPTIONS[corruption][1]
        accuracies = []
        for strength in strengths:
            reader = Corrupted(data.test.images, corruption, strength, args.seed)
            x, _ = features(network, data.test._replace(images=reader), *how)
            if rank() == 0:
                accuracies.append(percent(classify(x[readable]) == asked.labels))
        if rank() == 0:
            result["corrupted"][corruption] = accuracies

    if rank() == 0:
        result["relative_loss"] = mean_relative_loss(result["clean"], result["corrupted"])
        if data.bank.drawing is not None:
            result["artist_known"] = by_artist(right, asked.drawing)
            result["artist_new"] = leave_one_out(bank, known, test, asked)
    return result


def only_readable(x, split, readable):
    """The features (n, D), and the labels and further numbers as a Split, of the images that could
    be read. x: features (N, D); readable: (N,) bool."""
    numbers = []
    for part in split[1:]:
        numbers.append(None if part is None else part.to(x.device)[readable])
    return x[readable], Split(split.images, *numbers)


def by_artist(right, drawing):
    """Accuracy on the test images of each artist. right, drawing: (n,) bool and int64."""
    return {name: percent(right[drawing == artist]) for artist, name in enumerate(ARTISTS)}


def leave_one_out(bank, bank_split, test, test_split):
    """{artist: accuracy on that artist's test images} of probes trained on the bank images of the
    other three. bank, test: features (N, D), which belong to the numbers of the splits."""
    found = {}
    for artist, name in enumerate(ARTISTS):
        others = bank_split.drawing != artist
        labels, groups = bank_split.labels[others], bank_split.emoji[others]
        classify = linear_classifier(bank[others], labels, groups)
        own = test_split.drawing == artist
        found[name] = percent(classify(test[own]) == test_split.labels[own])
    return found


def table(results):
    """{network: what robustness() returned} as text: the accuracies, those of a corruption averaged
    over its strengths, and their mean; on emoji a second table."""
    rows = {}
    for name, found in results.items():
        corrupted = {key: mean(values) for key, values in found["corrupted"].items()}
        rows[name] = {"clean": found["clean"], **corrupted}
        rows[name]["mean"] = mean(corrupted.values())
        rows[name]["loss"] = found["relative_loss"]
    text = f"{columns(rows)}\nmean: of the accuracies on corrupted images"
    text += "\nloss: mean relative loss, % of the accuracy on clean images"
    if "artist_new" in found:
        rows = {}
        for name, found in results.items():
            new = found["artist_new"]
            known = mean(found["artist_known"].values())
            rows[name] = {**new, "mean": mean(new.values()), "known": known}
        text += f"\n\nby artist, of a probe that has seen only the three others\n{columns(rows)}"
        text += "\nknown: the mean over the artists, of the probe that has seen all four, and so a "
        text += "third more images"
    return text


def columns(rows):
    """{name: {column: number or None}} as text, one line per name."""
    width = max(len(name) for name in rows)
    heads = list(next(iter(rows.values())))
    lines = [" " * width + "".join(f"  {head:>5}" for head in heads)]
    for name, row in rows.items():
        line = f"{name:{width}}"
        for head in heads:
            word = "-" if row[head] is None else f"{row[head]:.1f}"
            line += f"  {word:>{max(5, len(head))}}"
        lines.append(line)
    return "\n".join(lines)


def draw_curves(path, results):
    """Accuracy against strength: one panel per corruption, one line per network."""
    from matplotlib.figure import Figure  # here, so --help need not wait for it

    figure = Figure((12, 6.5), dpi=100, layout="constrained")
    panels = figure.subplots(2, 4, sharey=True).flat
    for axes, (corruption, row) in zip(panels, CORRUPTIONS.items()):
        _, strengths, meaning = row
        for i, (name, found) in enumerate(results.items()):
            dashes = "--" if name.startswith(("raw pixels", "k-means", "untrained")) else "-"
            marker = "os^D"[i // 10 % 4]  # ten colours, then another marker
            heights = [found["clean"], *found["corrupted"][corruption]]
            axes.plot(heights, dashes, marker=marker, markersize=4, label=name)
        axes.set_xticks(range(4), ["clean", *map(str, strengths)])
        axes.set(title=corruption, xlabel=meaning)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[::4]:
        axes.set_ylabel("accuracy, %")
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False)
    title = "A linear probe trained on clean images, tested on corrupted ones"
    figure.suptitle(f"{title} (dashed: baselines)")
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def draw_corruptions(path, data, size, seed):
    """The first test image under all corruptions at all strengths. size: of the images of a folder,
    as they were evaluated."""
    from matplotlib.figure import Figure

    image, _ = next(data.test.images.whole(torch.tensor([0]), size))  # (1, 3, H, W)
    side = image.shape[2]
    # An inch per image: a large one is hardly made smaller, or its noise would be averaged out.
    figure = Figure((10, 4.6), dpi=min(max(100, side), 200), layout="constrained")
    grid = figure.subplots(3, len(CORRUPTIONS) + 1)
    for column, (corruption, row) in zip(grid.T[1:], CORRUPTIONS.items()):
        strengths = row[1]
        for axes, strength in zip(column, strengths):
            shown = corrupt(image, [0], corruption, strength, seed)
            axes.imshow(shown[0].permute(1, 2, 0).cpu().numpy())
            axes.set_xlabel(strength)
        column[0].set_title(corruption, fontsize=10)
    for axes, word in zip(grid[:, 0], ("weak", "medium", "strong")):
        axes.imshow(image[0].permute(1, 2, 0).cpu().numpy())
        axes.set_ylabel(word)
    grid[0, 0].set_title("test image", fontsize=10)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    title = f"What the corruptions do to a test image of {side} x {side} pixels"
    figure.suptitle(f"{title}; below each: its strength")
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def with_kmeans(found, sets, args, device):  # copy of: methods/eval_features.py::with_kmeans
    """The candidates, and first the k-means features of their data sets and sizes, which are fitted
    to 1,000 images of the bank without labels."""
    baselines = []
    for name, size in dict.fromkeys((candidate.data, candidate.size) for candidate in found):
        if size < PATCH:
            print0(f"no k-means features: {size} pixels are less than a patch of {PATCH}")
            continue
        images = sets[name].bank.images
        # Another stream than that of eval_few.py's draws: they would label these very images.
        some = np.random.default_rng([args.seed, 1]).permutation(len(images))[:1000]
        some = Split(images.part(torch.from_numpy(some)))
        x, readable = features(pixels(size), some, size, device, args.workers)
        x = x if x is None else x[readable]  # process 0 has them
        network = KMeansFeatures(*share(fit_kmeans, x, args.seed))
        about = {"seed": args.seed, "weights": ABOUT}
        baselines.append(Candidate(f"k-means, {size} px", network, name, size, about))
    return [*baselines, *found]


def main(argv=None):
    args = get_args(argv)
    device = join_processes(args.seed)
    found = candidates(args)
    names = dict.fromkeys(candidate.data for candidate in found)
    sets = {name: load_data(name, args.root, device) for name in names}
    for name, data in sets.items():
        if data.test is None:
            fail(f"--data {name}: a probe needs labels; give images in folders of their classes")
    results = Results("eval_robustness", args, device)

    tables = {name: {} for name in sets}
    for candidate in with_kmeans(found, sets, args, device):
        data = sets[candidate.data]
        tables[candidate.data][candidate.name] = results.measure(
            "robustness",
            candidate,
            lambda: robustness(candidate, data, device, args),
            images=[len(split.images) for split in (data.bank, data.test)],
            corruption_seed=args.seed,
            strengths={name: row[1] for name, row in CORRUPTIONS.items()},
        )

    folder = results.folder
    if rank() == 0:
        for name, measured in tables.items():
            ending = f"-{Path(name).name}.png" if len(tables) > 1 else ".png"
            draw_curves(folder / f"robustness{ending}", measured)
            size = max(candidate.size for candidate in found if candidate.data == name)
            draw_corruptions(folder / f"corruptions{ending}", sets[name], size, args.seed)
            print0(f"\n{name}\n{table(measured)}")
    print0("")
    print_files(folder)
    leave_processes()


if __name__ == "__main__":
    main()
