"""The tables of tests/results/EVALUATIONS.md, made from evaluations.jsonl.

evaluations.jsonl has one line per measurement, as the results.jsonl of the eval_*.py scripts have
them, without what is only drawn. report.py calls add() and blocks().
"""

import functools
import json
import math
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROWS = HERE / "evaluations.jsonl"
DRAWN = {"points", "shares", "shown", "precisions", "costs", "iou", "pck", "correlations"}

FILMS = ("movers", "tripod", "bunny")
LABELS = ("1", "2", "5", "10", "20", "1 %", "10 %")
SHARES = {"1 %": 0.01, "10 %": 0.1, "all": 1.0}  # of the labels, for fine-tuning
LAYERS = ("stem", "layer1", "layer2", "layer3", "layer4")  # of a ResNet
BLOCKS = tuple(f"block{i}" for i in range(1, 7))  # of a ViT
CORRUPTIONS = ("noise", "blur", "contrast", "brightness", "pixelation", "jpeg", "rotation",
               "occlusion")
# Settings that only repeat a measurement. What they give is averaged.
REPEATS = {"draw", "head_seed", "corruption_seed"}


def probes(layers):
    return {name: (f"linear probe of {name}", "linear", ".1f") for name in layers}


def in_two_ways(task, columns):
    """{heading: (where in the result, format)} -> columns of frozen and of fine-tuned networks."""
    found = {}
    for mode, prefix in (("frozen", ""), ("fine-tuned", "fine-tuned: ")):
        for heading, place in columns.items():
            found[prefix + heading] = (f"{task}, {mode}", *place)
    return found


FEATURES = {
    "kNN": ("features", "knn20", ".1f"),
    "linear": ("features", "linear", ".1f"),
    "SVM, mAP": ("svm", "svm", ".1f"),
    "R@1": ("features", "retrieval1", ".1f"),
    "parameters": ("cost", "parameters", ",.0f"),
    "MFLOPs": ("cost", "flops", "M"),
}
# block: {heading: (protocol, where in the result, format)}. The "mean" of a list is its mean; a
# list without it holds draws.
TABLES = {
    "features": FEATURES,
    "fashion": {name: place for name, place in FEATURES.items() if name != "R@1"},
    "few": {label: ("few", f"{label}/accuracies", ".1f") for label in LABELS},
    "layers": probes(("pixels", *LAYERS)),
    "layers_vit": probes(("pixels", *BLOCKS)),
    "clusters": {
        "NMI": ("clusters", "nmi", ".1f"),
        "adjusted MI": ("clusters", "ami", ".1f"),
        "ARI": ("clusters", "ari", ".1f"),
        "accuracy": ("clusters", "accuracy", ".1f"),
        "adjusted MI, 3 K": ("clusters", "ami_3k", ".1f"),
    },
    "spectrum": {
        "exponent": ("spectrum", "exponent", ".2f"),
        "participation": ("spectrum", "participation", ".1f"),
        "RankMe": ("spectrum", "rankme", ".0f"),
        "TwoNN": ("spectrum", "twonn", ".1f"),
        "LiDAR": ("lidar", "lidar", ".0f"),
        "correlation": ("spectrum", "correlation", ".3f"),
        "alignment": ("spectrum", "alignment", ".2f"),
        "uniformity": ("spectrum", "uniformity", ".2f"),
    },
    "smoothness": {
        "Lipschitz": ("smoothness", "lipschitz", ".2f"),
        "rotation": ("smoothness", "rotation", ".2f"),
        "shift": ("smoothness", "shift", ".2f"),
        "brightness": ("smoothness", "brightness", ".2f"),
        "rotation, path": ("smoothness", "rotation_path", ".2f"),
        "shift, path": ("smoothness", "shift_path", ".2f"),
        "brightness, path": ("smoothness", "brightness_path", ".2f"),
    },
    "robustness": {
        "clean": ("robustness", "clean", ".1f"),
        **{name: ("robustness", f"corrupted/{name}/mean", ".1f") for name in CORRUPTIONS},
        "mean corrupted accuracy": ("robustness", "corrupted/mean", ".1f"),
        "mean relative loss": ("robustness", "relative_loss", ".1f"),
        "artist without labels": ("robustness", "artist_new/mean", ".1f"),
    },
    "finetune": {
        f"{share}, {kind}": (f"fine-tuning {part}", kind, how)
        for share, part in SHARES.items()
        for kind, how in (("frozen", ".1f"), ("tuned", ".1f"), ("gain", "+.1f"))
    },
    "segmentation": in_two_ways("segmentation", {
        "mean IoU": ("miou", ".1f"),
        "IoU of all objects": ("object_iou", ".1f"),
    }),
    "normals": in_two_ways("normals", {
        "mean angle on objects": ("object_angle", ".1f"),
        "median": ("object_median", ".1f"),
        "within 11.25°": ("object_11.25", ".1f"),
        "22.5°": ("object_22.5", ".1f"),
        "30°": ("object_30", ".1f"),
        "mean on all pixels": ("all_angle", ".1f"),
    }),
    "depth": in_two_ways("depth", {"RMSE": ("rmse", ".2f"), "relative": ("abs_rel", ".3f")}),
    "keypoints": in_two_ways("keypoints", {"PCK 0.1": ("pck_0.1", ".1f"), "area": ("auc", ".1f")}),
    "detection": in_two_ways("detection", {
        "AP": ("ap", ".1f"),
        "AP50": ("ap50", ".1f"),
        "AP75": ("ap75", ".1f"),
    }),
    "video": {
        "J": ("masks", "J", ".1f"),
        "F": ("masks", "F", ".1f"),
        "motion": ("motion", "motion", ".1f"),
        "category": ("category", "category", ".1f"),
        "position, pixels": ("pose", "position", ".2f"),
        "angle, degrees": ("pose", "angle", ".1f"),
        "subject": ("subject", "subject", ".1f"),
        "shot R@1": ("shots", "shot_r1", ".1f"),
    },
    "stills": {
        "emoji, kNN": ("features on emoji", "knn20", ".1f"),
        "emoji, linear": ("features on emoji", "linear", ".1f"),
        "fashion, kNN": ("features on fashion", "knn20", ".1f"),
        "fashion, linear": ("features on fashion", "linear", ".1f"),
    },
}  # fmt: skip
SCENES = {  # task: its first measure
    "segmentation": "segmentation, mean IoU, %",
    "normals": "normals, mean angle on objects, degrees",
    "depth": "depth, RMSE, units of the scene",
    "keypoints": "keypoints, PCK 0.1, %",
    "detection": "detection, AP, %",
}
ERRORS = ("normals", "depth")  # less is better
# Methods that build the network that most methods share in a function of their own. Its weights are
# the same.
SHARE_IT = (
    "context_encoder", "moco_v3", "watching_objects_move", "egomotion", "multitask",
    "arrow_of_time",
)  # fmt: skip
SHARED_START = rf" of ({'|'.join(SHARE_IT)})\b"
SCENE_SIZE = ", 96 px"  # at which nearly all networks see the scenes; only these are compared
SCENE_START = f"untrained resnet14 made for 32{SCENE_SIZE}"
DATA = {  # table: the data sets of its rows, where that is not emoji
    "fashion": ("fashion",),
    **dict.fromkeys(SCENES, ("solids",)),
    "video": FILMS,
    "stills": ("emoji", "fashion"),
}
MULTITASK = {  # task set: the flags; P position, C colour, E exemplar, M motion
    "P": "--tasks position",
    "P+C": "--tasks position,colour",
    "P+E": "--tasks position,exemplar",
    "P+M": "--tasks position,motion",
    "P+C+E": "--tasks position,colour,exemplar",
    "all": "",
    "all, lasso": "--heads lasso",
}
PREDICTORS = {  # what may tell good features -> where it is
    "kNN accuracy": ("features", "knn20"),
    "cluster accuracy": ("clusters", "accuracy"),
    "RankMe": ("spectrum", "rankme"),
    "participation ratio": ("spectrum", "participation"),
    "exponent of the spectrum": ("spectrum", "exponent"),
    "TwoNN dimension": ("spectrum", "twonn"),
    "LiDAR": ("lidar", "lidar"),
    "alignment": ("spectrum", "alignment"),
    "uniformity": ("spectrum", "uniformity"),
    "correlation of columns": ("spectrum", "correlation"),
    "Lipschitz number": ("smoothness", "lipschitz"),
    "mean relative loss": ("robustness", "relative_loss"),
}
REPEATED = {  # the measures whose deviation over seeds is told -> table, place, format
    "kNN": ("features", "features", "knn20", ".1f"),
    "linear probe": ("features", "features", "linear", ".1f"),
    "SVM": ("features", "svm", "svm", ".1f"),
    "1 % of the labels (C = 1)": ("features", "few", "1 %/accuracies", ".1f"),
    "10 % of the labels (C = 1)": ("features", "few", "10 %/accuracies", ".1f"),
    "fine-tuning (all labels)": ("finetune", "fine-tuning 1.0", "tuned", ".1f"),
    "fashion (linear probe)": ("fashion", "features", "linear", ".1f"),
    "cluster accuracy": ("features", "clusters", "accuracy", ".1f"),
    "new artist (linear probe)": ("features", "robustness", "artist_new/mean", ".1f"),
    "mean relative loss": ("features", "robustness", "relative_loss", ".1f"),
    "segmentation (frozen)": ("segmentation", "segmentation, frozen", "miou", ".1f"),
    "segmentation (fine-tuned)": ("segmentation", "segmentation, fine-tuned", "miou", ".1f"),
    "normals (frozen)": ("normals", "normals, frozen", "object_angle", ".1f"),
    "depth (frozen)": ("depth", "depth, frozen", "rmse", ".2f"),
    "keypoints (frozen)": ("keypoints", "keypoints, frozen", "pck_0.1", ".1f"),
    "detection AP (frozen)": ("detection", "detection, frozen", "ap", ".1f"),
    "detection AP (fine-tuned)": ("detection", "detection, fine-tuned", "ap", ".1f"),
    "RankMe": ("features", "spectrum", "rankme", ".0f"),
    "exponent of the spectrum": ("features", "spectrum", "exponent", ".2f"),
    "TwoNN dimension": ("features", "spectrum", "twonn", ".1f"),
    "LiDAR": ("features", "lidar", "lidar", ".0f"),
    "alignment": ("features", "spectrum", "alignment", ".2f"),
    "uniformity": ("features", "spectrum", "uniformity", ".2f"),
}
AGREE = (  # the evaluations whose rankings are compared
    "kNN", "linear probe", "SVM", "1 % of the labels (C = 1)", "fine-tuning (all labels)",
    "cluster accuracy", "new artist (linear probe)", "fashion (linear probe)",
    "segmentation (frozen)", "segmentation (fine-tuned)", "depth (frozen)", "normals (frozen)",
)  # fmt: skip
WITH_LABELS = {"kNN accuracy", "cluster accuracy", "mean relative loss"}  # these need labels


def read_lines():
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return [json.loads(line) for line in lines]


def read_rows():
    """The lines of evaluations.jsonl. The shared untrained network has one name, by whichever
    method it was measured; what it gave twice to the last digit stands once."""
    rows = {}
    for row in read_lines():
        row["network"] = re.sub(SHARED_START, "", row["network"])
        same = ("protocol", "network", "weights", "seed", "data", "settings", "result", "variant")
        rows.setdefault(json.dumps([row.get(key) for key in same]), row)
    return list(rows.values())


def without_drawings(result):
    """A result without the long lists that only pictures need."""
    if not isinstance(result, dict):
        return result
    kept = {name: without_drawings(part) for name, part in result.items() if name not in DRAWN}
    return kept


def add(path, variant):
    """Appends the lines of a results.jsonl. What was recorded of the same network, data and
    settings before is replaced, also if the older line names fewer of the settings. variant:
    (method, settings of the training) -> the flags by which the run differs from the method's
    default run."""
    rows = read_lines()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        row["result"] = without_drawings(row["result"])
        training = row.pop("training", {})  # rows.jsonl has all of it
        if "method" in row:
            row["variant"] = variant(row["method"], training)
        rows = [earlier for earlier in rows if not replaces(row, earlier)] + [row]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def replaces(row, earlier):
    """Whether a row is of the same measurement as an earlier one."""
    same = ("protocol", "network", "weights", "seed", "data")
    settings = earlier["settings"].items() <= row["settings"].items()
    return settings and all(earlier.get(key) == row.get(key) for key in same)


def protocol(row):
    """Fine-tuning is one protocol with three shares of the labels. The constant answer to a dense
    task stands beside those of the frozen networks."""
    part = row["settings"].get("part")
    name = row["protocol"] if part is None else f"{row['protocol']} {part}"
    return name.replace(", constant", ", frozen")


def value(result, path):
    """result["a"]["b"] for "a/b"; for "a/mean" the mean of a list, or of all that a dict holds;
    None if there is none."""
    for name in path.split("/"):
        if isinstance(result, list) and name == "mean":
            result = statistics.fmean(result)
        elif isinstance(result, dict) and name == "mean" and "mean" not in result:
            parts = result.values()
            parts = [value(part, "mean") if isinstance(part, list) else part for part in parts]
            result = statistics.fmean(parts)
        else:
            result = result.get(name) if isinstance(result, dict) else None
    return result


def plain_name(row):
    """**METHOD**, and for other runs than the default ones their flags; a baseline's own name."""
    if "method" not in row:
        return row["network"]
    flags = row.get("variant", "")
    name = f"**{row['method']}**" + (f" `{flags}`" if flags else "")
    name += " (with labels)" if "--positives" in flags else ""
    return name + (f", {row['settings']['size']} px" if row["data"] == "solids" else "")


def full_names(rows):
    """The name of each row's network. If it was measured with several values of a setting, all but
    the most frequent one stand in the name."""
    seen = {}  # (name, protocol, setting) -> its values
    counts = {}  # (name, setting) -> how often it has each value
    for row in rows:
        name = plain_name(row)
        for setting, number in row["settings"].items():
            if setting not in REPEATS:
                text = str(number)
                seen.setdefault((name, protocol(row), setting), set()).add(text)
                counts.setdefault((name, setting), Counter())[text] += 1
    several = {(name, setting) for (name, _, setting), texts in seen.items() if len(texts) > 1}
    usual = {key: counts[key].most_common(1)[0][0] for key in several}

    names = []
    for row in rows:
        name = plain = plain_name(row)
        for setting, number in row["settings"].items():
            text = str(number)
            if text != usual.get((plain, setting), text):
                name += f", {text} px" if setting == "size" else f", {setting} {text}"
        names.append(name)
    return names


def collect(rows):
    """{network: {protocol: {run: [results of its draws]}}}: all seeds of a method together, the
    baselines first."""
    networks = {}
    for row, name in zip(rows, full_names(rows)):
        runs = networks.setdefault(name, {}).setdefault(protocol(row), {})
        runs.setdefault((row.get("weights"), row.get("seed")), []).append(row["result"])
    return dict(sorted(networks.items(), key=lambda item: item[0].startswith("**")))


def draws(results, path):
    """The numbers of several results of one run, without those that are not defined."""
    found = []
    for result in results:
        number = value(result, path)
        found += number if isinstance(number, list) else [number]
    return [number for number in found if number is not None]


def numbers(runs, path):
    """One number per seed of the training, the mean of its draws; of two trainings with the same
    seed, which other machines round otherwise, the mean."""
    seeds = {}
    for (_, seed), results in runs.items():
        found = draws(results, path)
        if found:
            seeds.setdefault(seed, []).append(statistics.fmean(found))
    return [statistics.fmean(found) for found in seeds.values()]


def mean(networks, name, measured, path, seeds=()):
    """The mean over the runs of a network, None if it was not measured; over those with some seeds
    alone, if there are any."""
    runs = networks.get(name, {}).get(measured, {})
    some = {run: results for run, results in runs.items() if run[1] in seeds}
    found = numbers(some or runs, path)
    return statistics.fmean(found) if found else None


def seeds_of(networks, name, measured):
    """The seeds with which a network was trained, of the runs that were measured."""
    return {seed for _, seed in networks[name].get(measured, {})}


def beside_start(networks, name, start, measured, path):
    """The number of a trained network and that of the same one untrained, with the same seeds if
    they were measured; None if one of the two is not known."""
    seeds = seeds_of(networks, name, measured)
    pair = mean(networks, name, measured, path), mean(networks, start, measured, path, seeds)
    return None if None in pair else pair


def cell(runs, path, how):
    """The mean over the seeds of the training ± the deviation; of one seed, the deviation of its
    draws, or the one that was recorded with their mean, as of k-means' seeds; none if the draws do
    not differ, as with all labels. Of two trainings with that seed it is that of the one with more
    draws; the mean is of both."""
    found = numbers(runs, path)
    if not found:
        return ""
    if how == "M":
        return f"{statistics.fmean(found) / 1e6:.1f}"
    text = f"{statistics.fmean(found):{how}}"
    deviations = []
    seeds = len(found)
    if seeds == 1:
        results = max(runs.values(), key=lambda results: len(draws(results, path)))
        found = draws(results, path)
        deviations = draws(results, f"{path}_std")
    if len(found) > 1:
        deviations = [statistics.stdev(found)]
    deviation = f"{deviations[0]:{how.strip('+')}}" if deviations else ""
    constant = how == ",.0f"  # a count: of parameters
    if not deviation or constant or (seeds == 1 and float(deviation) == 0):
        return text
    return f"{text} ± {deviation}"


def table(networks, columns):
    """One line per network that was measured, the baselines first: its name, with how many seeds it
    was trained, at most, and the columns."""
    lines = []
    for name, protocols in networks.items():
        cells = [cell(protocols.get(measured, {}), *how) for measured, *how in columns.values()]
        if any(cells):
            places = [(protocols.get(measured, {}), path) for measured, path, _ in columns.values()]
            lines.append([name, max(len(numbers(*place)) for place in places), *cells])
    return lines


def beside_linear(protocols, measured, path):
    """A measure and the linear accuracy, means over the runs of a network of which both are known:
    two trainings by the same command differ; () if there is no such run. The probe is that of
    "features" or, with all labels, that beside fine-tuning, which is the same."""
    pairs = []
    for run, results in protocols.get(measured, {}).items():
        accuracy = draws(protocols.get("features", {}).get(run, []), "linear")
        if not accuracy:
            accuracy = draws(protocols.get("fine-tuning 1.0", {}).get(run, []), "frozen")
        known = draws(results, path)
        if known and accuracy:
            pairs.append((statistics.fmean(known), statistics.fmean(accuracy)))
    return tuple(statistics.fmean(numbers) for numbers in zip(*pairs))


class Predictor(NamedTuple):
    """A rank correlation with linear accuracy, its interval, of how many methods; and that of the
    methods that share network and size of input. None: of fewer than five."""

    rank: float | None
    low: float | None
    high: float | None
    methods: int
    same: float | None
    of_same: int


@functools.cache  # three pages ask for the same
def bootstrap(pairs):
    """Spearman's rank correlation of the methods' pairs of numbers, and its interval over 20,000
    draws of as many methods: together, the intervals of all PREDICTORS hold with about 95 %
    (Bonferroni)."""
    import numpy as np
    from scipy.stats import rankdata, spearmanr, zscore

    outside = 100 * 0.05 / len(PREDICTORS)  # percent of the draws, for one predictor
    pairs = np.array(pairs)
    rng = np.random.default_rng(0)
    drawn = pairs[rng.integers(len(pairs), size=(20_000, len(pairs)))]  # (20000, methods, 2)
    drawn = drawn[np.ptp(drawn, axis=1).min(1) > 0]
    x, y = np.moveaxis(zscore(rankdata(drawn, axis=1), axis=1), 2, 0)
    several = (x * y).mean(1)  # the correlation of the ranks
    low, high = np.percentile(several, [outside / 2, 100 - outside / 2])
    return spearmanr(*pairs.T).statistic, low, high


def predictors(networks):
    """{measure: Predictor} over the methods at their defaults."""
    from scipy.stats import spearmanr

    found = {}
    for name, place in PREDICTORS.items():
        pairs = {n: beside_linear(networks[n], *place) for n in networks if at_defaults(n)}
        pairs = {network: pair for network, pair in pairs.items() if pair}
        alike = [pair for network, pair in pairs.items() if not own_start(network, networks)]
        if len(pairs) < 5:
            found[name] = Predictor(None, None, None, len(pairs), None, len(alike))
            continue
        rank, low, high = bootstrap(tuple(pairs.values()))
        same = spearmanr(*zip(*alike)).statistic if len(alike) > 4 else None
        found[name] = Predictor(rank, low, high, len(pairs), same, len(alike))
    return found


def predictor_table(networks):
    lines = []
    for name, found in predictors(networks).items():
        line = [name, "yes" if name in WITH_LABELS else "no", "not measured", "", found.methods, ""]
        if found.rank is not None:
            line[2:4] = f"{found.rank:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}"
        if found.same is not None:
            line[5] = f"{found.same:+.2f} ({found.of_same})"
        lines.append(line)
    heads = ["measure", "needs labels", "rank correlation with linear accuracy"]
    return [*heads, "99.6 % interval", "methods", "same network"], lines


def agreement(networks):
    """Rank correlations {(evaluation, another): number} between the evaluations that AGREE names,
    over the methods at their defaults of which all of them are known, and how many these are; {} if
    they are fewer than five. networks: {table: those that were measured}"""
    from scipy.stats import spearmanr

    found = {}  # method: its numbers
    for name in networks["features"]:
        values = []
        for measure in AGREE:
            block, measured, path, _ = REPEATED[measure]
            names = name, name + SCENE_SIZE
            known = [mean(networks[block], sized, measured, path) for sized in names]
            known = [number for number in known if number is not None]
            if known:
                values.append(-known[0] if block in ERRORS else known[0])
        if at_defaults(name) and len(values) == len(AGREE):
            found[name] = values
    if len(found) < 5:
        return {}, len(found)
    table = spearmanr(list(found.values())).statistic
    pairs = {(a, b): table[i, j] for i, a in enumerate(AGREE) for j, b in enumerate(AGREE)}
    return pairs, len(found)


def agreement_table(networks):
    """agreement() as a triangle."""
    pairs, count = agreement(networks)
    lines = []
    for i, measure in enumerate(AGREE):
        cells = [f"{pairs[measure, other]:+.2f}" for other in AGREE[:i]] if pairs else []
        if cells:
            lines.append([f"{i + 1} {measure}", *cells, *[""] * (len(AGREE) - 1 - i)])
    heads = [f"{count} methods", *[f"{i + 1} {name}" for i, name in enumerate(AGREE[:-1])]]
    return heads, lines


class Reliability(NamedTuple):
    """Deviations over seeds and between methods, and what repeatability() says of them."""

    over_seeds: float
    between: float
    value: float
    low: float
    high: float
    methods: int
    runs: int


def repeatability(networks):
    """{measure: Reliability}: how far the runs of a method with other seeds differ, and how far the
    methods: the deviation over seeds, pooled over the methods; that of the methods, without what
    the seeds add; and the reliability, ICC(1) of Shrout and Fleiss 1979, the share of the second in
    the variance of single runs, with its 95 % interval, which is exact if all methods have the same
    number of runs. Of methods at their defaults with two seeds or more and the network and input
    that most methods share. networks: {table: those that were measured}"""
    from scipy.stats import f

    sharing = {
        end
        for name in networks["features"]
        if at_defaults(name) and own_start(name, networks["features"]) is None
        for end in (name, f"{name}, 96 px")
    }
    reliabilities = {}
    for name, (block, measured, path, _) in REPEATED.items():
        groups = []
        for network, protocols in networks[block].items():
            found = numbers(protocols.get(measured, {}), path)
            if network in sharing and len(found) > 1:
                groups.append(found)
        if len(groups) < 3:
            continue
        runs = [number for group in groups for number in group]
        free = len(groups) - 1, len(runs) - len(groups)  # degrees of freedom
        of_all = statistics.fmean(runs)
        means = [statistics.fmean(group) for group in groups]
        within = sum((x - m) ** 2 for group, m in zip(groups, means) for x in group) / free[1]
        between = sum(len(g) * (m - of_all) ** 2 for g, m in zip(groups, means)) / free[0]
        each = (len(runs) - sum(len(g) ** 2 for g in groups) / len(runs)) / free[0]  # runs

        def icc(ratio):
            return max(0, (ratio - 1) / (ratio - 1 + each))

        ratio = between / within
        low, high = [icc(ratio / f.ppf(q, *free)) for q in (0.975, 0.025)]
        methods = math.sqrt(max(0, between - within) / each)
        numbers_of = math.sqrt(within), methods, icc(ratio), low, high
        reliabilities[name] = Reliability(*numbers_of, len(groups), len(runs))
    return reliabilities


def repeatability_table(networks):
    lines = []
    for name, found in repeatability(networks).items():
        form = REPEATED[name][3]
        deviations = [f"{number:{form}}" for number in (found.over_seeds, found.between)]
        interval = f"{found.low:.2f} to {found.high:.2f}"
        lines.append([name, *deviations, f"{found.value:.2f}", interval, *found[5:]])
    heads = ["measure", "SD over seeds", "SD between methods", "reliability (ICC)"]
    return [*heads, "95 % interval", "methods", "runs"], lines


def multitask(networks):
    """The sets of tasks of multitask, in the order of the paper."""
    columns = {name: TABLES["video"][name] for name in ("category", "motion", "J")}
    columns["position, pixels"] = TABLES["video"]["position, pixels"]
    lines = []
    for tasks, flags in MULTITASK.items():
        name = plain_name({"method": "multitask", "variant": flags, "data": "movers"})
        for line in table({name: networks.get(name, {})}, columns):
            lines.append([tasks, *line[1:]])
    return ["task set", "seeds", *columns], lines


def learned_from(row, videos):
    """What a network, or the one that it is the start of, learned from: "films" or "images"; None
    for what both kinds have in common. videos: the methods that learn from films."""
    method = row.get("method")
    if method is None:
        owner = re.search(r" of (\w+)", row["network"])
        if owner is None:
            return None
        method = owner[1]
    data = re.search(r"--data (\w+)", row.get("variant", ""))
    film = data[1] in FILMS if data else method in videos
    return "films" if film else "images"


def rows_of(block, rows, videos):
    """The rows of a table. Of images only networks that learned from images, but for "stills"."""
    data = DATA.get(block, ("emoji",))
    rows = [row for row in rows if row["data"] in data]
    if block == "finetune":
        rows = [row | {"result": with_gain(row["result"])} for row in rows]
    if block == "stills":
        rows = [row | {"protocol": f"{row['protocol']} on {row['data']}"} for row in rows]
        return [row for row in rows if learned_from(row, videos) != "images"]
    if data[0] in ("emoji", "fashion"):
        return [row for row in rows if learned_from(row, videos) != "films"]
    return rows


def start_of(row, networks):
    """The name of the untrained network of a trained one: its method's own, or a shared one."""
    own = own_start(row["method"], networks)
    return own or f"untrained {row['arch']}, {row['settings']['size']} px"


def own_start(method, networks):
    """The name of a method's own untrained network, None if it has the one that most share."""
    method = method.split("**")[1] if "**" in method else method
    own = [name for name in networks if re.search(rf" of {method}\b", name)]
    return own[0] if own else None


def at_defaults(name):
    """Whether a name is that of a method's runs at its defaults."""
    return name.startswith("**") and "`" not in name


def with_gain(result):
    """The result of a fine-tuning with the points that it gains over the frozen features."""
    tuned = result.get("tuned")
    return result if tuned is None else result | {"gain": tuned - result["frozen"]}


def by_draw(rows, part, kind):
    """{network: {draw: accuracy}} of fine-tuning with a share of the labels, the mean over the runs
    of a network. kind: "frozen" or "tuned"."""
    found = {}
    for row, name in zip(rows, full_names(rows)):
        number = row["result"].get(kind)
        if row["settings"].get("part") == part and number is not None:
            draws = found.setdefault(name, {})
            draws.setdefault(row["settings"]["draw"], []).append(number)
    return {
        name: {draw: statistics.fmean(numbers) for draw, numbers in draws.items()}
        for name, draws in found.items()
    }


def difference(a, b):
    """The mean over the draws of a - b, and half of its 95 % interval by Student's t; infinite for
    fewer than three draws. a, b: {draw: accuracy}; a draw has the same labelled images in both."""
    from scipy.stats import t

    steps = [a[draw] - b[draw] for draw in a if draw in b]
    if len(steps) < 3:
        return statistics.fmean(steps), math.inf
    error = statistics.stdev(steps) / len(steps) ** 0.5
    return statistics.fmean(steps), t.ppf(0.975, len(steps) - 1) * error


def tuned_pairs(rows):
    """{share of the labels: ({network: {draw: tuned}}, {network: {draw: frozen}}, {network: the
    same one untrained})} of fine-tuning, and how many draws all the networks have: of those that
    share the most frequent untrained network, and if some have three draws or more, these alone."""
    networks = collect(rows)
    starts = {plain_name(row): start_of(row, networks) for row in rows if "method" in row}
    shared = Counter(starts.values()).most_common(1)
    starts = {name: start for name, start in starts.items() if start == shared[0][0]}
    found = {}
    counts = {}  # network: draws with all shares of the labels
    for share, part in SHARES.items():
        tuned, frozen = by_draw(rows, part, "tuned"), by_draw(rows, part, "frozen")
        pairs = {name: starts[name] for name in starts if name.endswith("**") and name in tuned}
        for name, start in list(pairs.items()):
            common = len(tuned[name].keys() & tuned.get(start, {}))
            counts[name] = min(common, counts.get(name, common))
            if common == 0:
                del pairs[name]
        found[share] = tuned, frozen, pairs

    repeated = [name for name, count in counts.items() if count > 2]
    if repeated:
        for tuned, frozen, pairs in found.values():
            for name in pairs.keys() - set(repeated):
                del pairs[name]
    found = {share: numbers for share, numbers in found.items() if numbers[2]}
    return found, min((counts[name] for name in repeated or counts), default=0)


class Gain(NamedTuple):
    """Mean accuracy after fine-tuning, less that of the same networks from scratch, and less that
    of a linear probe of the frozen features; the second for the networks from scratch, whose frozen
    features are those of the untrained network: three of difference(). How many networks."""

    over_scratch: tuple
    over_frozen: tuple
    scratch_over_frozen: tuple
    networks: int


def gains(rows):
    """{share of the labels: Gain}, and how many draws the networks have; {} if they are fewer than
    three."""
    found, draws = tuned_pairs(rows)
    steps = {}
    if draws > 2:
        for share, (tuned, frozen, pairs) in found.items():
            own = mean_by_draw(tuned, pairs)
            scratch = mean_by_draw(tuned, pairs.values())
            probe = mean_by_draw(frozen, pairs)
            untrained = mean_by_draw(frozen, pairs.values())
            differences = (own, scratch), (own, probe), (scratch, untrained)
            steps[share] = Gain(*[difference(*pair) for pair in differences], len(pairs))
    return steps, draws


def few_minus_all(rows):
    """By how much fine-tuning is better than training from scratch with 1 % of the labels, less
    that with all of them: of difference()."""
    found, _ = tuned_pairs(rows)
    steps = []
    for share in ("1 %", "all"):
        tuned, _, pairs = found[share]
        own, scratch = mean_by_draw(tuned, pairs), mean_by_draw(tuned, pairs.values())
        steps.append({draw: own[draw] - scratch[draw] for draw in own if draw in scratch})
    return difference(*steps)


def gain_table(rows):
    lines = []
    for share, gain in gains(rows)[0].items():
        steps = [f"{step:+.1f} ± {half:.1f}" for step, half in gain[:3]]
        lines.append([share, *steps, gain.networks])
    heads = ["labels", "fine-tuned minus from scratch", "fine-tuned minus linear probe"]
    return [*heads, "from scratch minus linear probe of the untrained", "networks"], lines


def mean_by_draw(found, names):
    """{draw: the mean over the networks that are named} of the draws that all of them have. found:
    {network: {draw: accuracy}}"""
    common = set.intersection(*(set(found[name]) for name in names))
    return {draw: statistics.fmean(found[name][draw] for name in names) for draw in sorted(common)}


def on_scenes(networks, task, how):
    """The first measure of a task on rendered scenes of every network at its defaults that saw them
    at SCENE_SIZE and of the same one untrained: {network: (trained, untrained)}. how: "frozen" or
    "fine-tuned"."""
    measured, path, _ = list(TABLES[task].values())[0]
    measured = measured.replace("frozen", how)
    found = {}
    for name in networks:
        start = own_start(name, networks) or SCENE_START
        pair = beside_start(networks, name, start, measured, path)
        if at_defaults(name) and name.endswith(SCENE_SIZE) and pair:
            found[name.split("**")[1]] = pair
    return found


class Scene(NamedTuple):
    """A task on rendered scenes: how many of the networks are better than the same ones untrained,
    the means of both, the constant answer (None: there is none), the best method and its number,
    and whether the constant is better."""

    better: int
    networks: int
    untrained: float
    trained: float
    constant: float | None
    best: str
    highest: float
    constant_wins: bool


def scene(networks, task, how):
    """Scene, None if nothing was measured. how: "frozen" or "fine-tuned" """
    measured, path, _ = list(TABLES[task].values())[0]
    pairs = on_scenes(networks[task], task, how)
    if not pairs:
        return None
    sign = -1 if task in ERRORS else 1
    trained, untrained = map(statistics.mean, zip(*pairs.values()))
    better = sum(sign * (a - b) > 0 for a, b in pairs.values())
    best = max(pairs, key=lambda name: sign * pairs[name][0])
    highest = pairs[best][0]
    constant = mean(networks[task], "no network", measured, path)
    wins = constant is not None and sign * (constant - highest) > 0
    return Scene(better, len(pairs), untrained, trained, constant, best, highest, wins)


def scene_table(networks):
    """scene() of each task, frozen and fine-tuned. networks: {task: those that were measured}"""
    lines = []
    for task in SCENES:
        measured, path, form = list(TABLES[task].values())[0]
        for how in ("frozen", "fine-tuned"):
            found = scene(networks, task, how)
            if found:
                shared = networks[task].get(SCENE_START, {})
                shared = shared.get(measured.replace("frozen", how), {})
                constant = f"{found.constant:{form}}" if found.constant and how == "frozen" else ""
                lines.append([
                    SCENES[task],
                    how,
                    constant,
                    cell(shared, path, form),
                    f"{found.untrained:{form}}",
                    f"{found.trained:{form}}",
                    f"{found.better} of {found.networks}",
                    f"{found.highest:{form}}, {found.best}",
                ])  # fmt: skip
    heads = ["task", "weights", "no network", "shared untrained network"]
    heads += ["untrained, mean", "trained, mean", "better than untrained", "best"]
    return heads, lines


def accuracies_of_stages(networks, name, seeds=()):
    """Linear accuracy after each stage or block, None if it was not measured. seeds: of mean()."""
    for layers in (LAYERS, BLOCKS):
        places = [f"linear probe of {layer}" for layer in layers]
        found = [mean(networks, name, place, "linear", seeds) for place in places]
        if None not in found:
            return found
    return None


def stage_accuracies(networks):
    """{network: its linear accuracy after each stage or block}, of those that were measured."""
    found = {name: accuracies_of_stages(networks, name) for name in networks}
    return {name: accuracies for name, accuracies in found.items() if accuracies}


def networks_of(rows, videos):
    """{table: the networks in it, see collect()}. videos: the methods that learn from films."""
    return {name: collect(rows_of(name, rows, videos)) for name in TABLES}


def blocks(markdown, videos):
    """{block of a page: its lines}. markdown: (heads, lines) -> a table."""
    rows = read_rows()
    networks = networks_of(rows, videos)
    tables = {}
    for name, columns in TABLES.items():
        tables[name] = ["network", "seeds", *columns], table(networks[name], columns)
    tables["predictors"] = predictor_table(networks["features"])
    tables["agreement"] = agreement_table(networks)
    tables["multitask"] = multitask(networks["video"])
    tables["gains"] = gain_table(rows_of("finetune", rows, videos))
    tables["scenes"] = scene_table(networks)
    tables["seeds"] = repeatability_table(networks)

    found = {}
    for name, (heads, lines) in tables.items():
        if name in ("stills", "layers_vit") and not any("**" in line[0] for line in lines):
            lines = []  # baselines alone
        if name == "multitask" and len(lines) < 2:
            lines = []  # nothing to compare
        found[f"eval_{name}"] = markdown(heads, lines) if lines else ["Not run."]
    return found
