"""The tables and the picture of tests/results/EVALUATIONS.md, made from evaluations.jsonl.

evaluations.jsonl has one line per measurement, as the results.jsonl of the eval_*.py scripts have
them, without what is only drawn. report.py calls add() and blocks().
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROWS = HERE / "evaluations.jsonl"
DRAWN = {"points", "shares", "shown", "precisions", "costs", "iou", "pck", "correlations"}

# block: {heading: (protocol, where in the result, format)}. "mean" of a list is its mean.
LABELS = ("1", "2", "5", "10", "20", "1 %", "10 %")
LAYERS = ("stem", "layer1", "layer2", "layer3", "layer4")
CORRUPTIONS = ("noise", "blur", "contrast", "brightness", "pixelation", "jpeg", "rotation",
               "occlusion")
TABLES = {
    "features": {
        "kNN": ("features", "knn20", ".1f"),
        "linear": ("features", "linear", ".1f"),
        "SVM, mAP": ("svm", "svm", ".1f"),
        "R@1": ("features", "retrieval1", ".1f"),
        "parameters": ("cost", "parameters", ",.0f"),
        "MFLOPs": ("cost", "flops", "M"),
        "images/s": ("cost", "images_per_s", ".0f"),
    },
    "few": {label: ("few", f"{label}.mean", ".1f") for label in LABELS},
    "layers": {name: (f"linear probe of {name}", "linear", ".1f") for name in LAYERS},
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
        "LiDAR": ("spectrum", "lidar", ".0f"),
        "correlation": ("spectrum", "correlation", ".3f"),
        "alignment": ("spectrum", "alignment", ".2f"),
        "uniformity": ("spectrum", "uniformity", ".2f"),
    },
    "smoothness": {
        "Lipschitz": ("smoothness", "lipschitz", ".2f"),
        "rotation": ("smoothness", "rotation", ".2f"),
        "shift": ("smoothness", "shift", ".2f"),
        "brightness": ("smoothness", "brightness", ".2f"),
    },
    "robustness": {
        "clean": ("robustness", "clean", ".1f"),
        **{name: ("robustness", f"corrupted.{name}.mean", ".1f") for name in CORRUPTIONS},
        "mean relative loss": ("robustness", "relative_loss", ".1f"),
        "unseen artist": ("robustness", "artist_new.mean", ".1f"),
    },
    "finetune": {
        "1 %, frozen": ("fine-tuning 0.01", "frozen", ".1f"),
        "1 %, tuned": ("fine-tuning 0.01", "tuned", ".1f"),
        "10 %, frozen": ("fine-tuning 0.1", "frozen", ".1f"),
        "10 %, tuned": ("fine-tuning 0.1", "tuned", ".1f"),
        "all, frozen": ("fine-tuning 1.0", "frozen", ".1f"),
        "all, tuned": ("fine-tuning 1.0", "tuned", ".1f"),
    },
    "dense": {
        "segmentation, mean IoU": ("segmentation, frozen", "miou", ".1f"),
        "normals, mean angle": ("normals, frozen", "mean_angle", ".1f"),
        "normals, within 11.25°": ("normals, frozen", "within_11.25", ".1f"),
        "depth, RMSE": ("depth, frozen", "rmse", ".2f"),
        "depth, relative": ("depth, frozen", "abs_rel", ".3f"),
        "keypoints, PCK area": ("keypoints, frozen", "auc", ".1f"),
        "fine-tuned: mean IoU": ("segmentation, fine-tuned", "miou", ".1f"),
        "mean angle": ("normals, fine-tuned", "mean_angle", ".1f"),
    },
    "detection": {
        "AP": ("detection, frozen", "ap", ".1f"),
        "AP50": ("detection, frozen", "ap50", ".1f"),
        "AP75": ("detection, frozen", "ap75", ".1f"),
        "fine-tuned: AP": ("detection, fine-tuned", "ap", ".1f"),
    },
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
}
DATA = {  # table: the data sets of its rows, where that is not emoji
    "dense": ("solids",),
    "detection": ("solids",),
    "video": ("movers", "bunny"),
}
PREDICTORS = {  # what may tell good features without labels -> where it is
    "kNN accuracy": ("features", "knn20"),
    "cluster accuracy": ("clusters", "accuracy"),
    "RankMe": ("spectrum", "rankme"),
    "participation ratio": ("spectrum", "participation"),
    "exponent of the spectrum": ("spectrum", "exponent"),
    "TwoNN dimension": ("spectrum", "twonn"),
    "LiDAR": ("spectrum", "lidar"),
    "alignment": ("spectrum", "alignment"),
    "uniformity": ("spectrum", "uniformity"),
    "correlation of columns": ("spectrum", "correlation"),
    "Lipschitz number": ("smoothness", "lipschitz"),
    "mean relative loss": ("robustness", "relative_loss"),
}


def read_rows():
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return [json.loads(line) for line in lines]


def without_drawings(result):
    """A result without the long lists that only pictures need."""
    if not isinstance(result, dict):
        return result
    kept = {name: without_drawings(part) for name, part in result.items() if name not in DRAWN}
    return kept


def add(path, variant):
    """Appends the lines of a results.jsonl. What was recorded of the same network, data and
    settings before is replaced. variant: (method, settings of the training) -> the flags by which
    the run differs from the method's default run."""
    rows = read_rows()
    same = ("protocol", "network", "weights", "seed", "data", "settings")
    for line in path.read_text().splitlines():
        row = json.loads(line)
        row["result"] = without_drawings(row["result"])
        training = row.pop("training", {})  # rows.jsonl has all of it
        if "method" in row:
            row["variant"] = variant(row["method"], training)
        rows = [r for r in rows if any(r.get(key) != row.get(key) for key in same)] + [row]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def protocol(row):
    """Fine-tuning is one protocol with three shares of the labels."""
    part = row["settings"].get("part")
    return row["protocol"] if part is None else f"{row['protocol']} {part}"


def value(result, path):
    """result["a"]["b"] for "a.b"; the mean of a list for "a.mean"; None if there is none."""
    for name in path.split("."):
        if isinstance(result, list) and name == "mean":
            result = statistics.mean(result)
        elif isinstance(result, dict) and name == "mean" and "mean" not in result:
            result = statistics.mean(result.values())
        else:
            result = result.get(name) if isinstance(result, dict) else None
    return result


def trained_name(row):
    """**METHOD**, and for other runs than the default ones their flags."""
    flags = row.get("variant", "")
    name = f"**{row['method']}**" + (f" `{flags}`" if flags else "")
    return name + (" (with labels)" if "--positives" in flags else "")


def collect(rows):
    """{network: {protocol: [its results]}}: the seeds of a method together, the baselines first."""
    networks = {}
    for row in rows:
        name = trained_name(row) if "method" in row else row["network"]
        networks.setdefault(name, {}).setdefault(protocol(row), []).append(row["result"])
    return dict(sorted(networks.items(), key=lambda item: item[0].startswith("**")))


def numbers(results, path):
    """The values of several results, without those that are not defined."""
    found = [value(result, path) for result in results]
    return [number for number in found if number is not None]


def cell(found, how):
    if not found:
        return ""
    if how == "M":
        return f"{statistics.mean(found) / 1e6:.1f}"
    text = f"{statistics.mean(found):{how}}"
    return text + (f" ± {statistics.stdev(found):{how}}" if len(found) > 1 else "")


def table(networks, columns):
    """One line per network that was measured, the baselines first. Untrained networks of several
    methods may be the same: such a line stands once, though their speeds never agree."""
    lines = []
    told = []  # the lines without speed
    for name, protocols in networks.items():
        cells = {}
        for heading, (measured, path, how) in columns.items():
            cells[heading] = cell(numbers(protocols.get(measured, []), path), how)
        what = {heading: text for heading, text in cells.items() if heading != "images/s"}
        if any(what.values()) and what not in told:
            told.append(what)
            lines.append([name, *cells.values()])
    return lines


def predictors(networks):
    """Rank correlation of linear accuracy with each predictor over the methods at their defaults,
    and the 95 % interval of the bootstrap over methods."""
    import numpy as np
    from scipy.stats import rankdata, spearmanr, zscore

    lines = []
    trained = [protocols for name, protocols in networks.items() if name.endswith("**")]
    for name, (measured, path) in PREDICTORS.items():
        pairs = []
        for protocols in trained:
            x = numbers(protocols.get(measured, []), path)
            y = numbers(protocols.get("features", []), "linear")
            if x and y:
                pairs.append((statistics.mean(x), statistics.mean(y)))
        if len(pairs) < 5:
            continue
        pairs = np.array(pairs)
        rng = np.random.default_rng(0)
        drawn = pairs[rng.integers(len(pairs), size=(2000, len(pairs)))]  # (2000, methods, 2)
        drawn = drawn[np.ptp(drawn, axis=1).min(1) > 0]
        x, y = np.moveaxis(zscore(rankdata(drawn, axis=1), axis=1), 2, 0)
        several = (x * y).mean(1)  # Spearman's: the correlation of the ranks
        low, high = np.percentile(several, [2.5, 97.5])
        known = spearmanr(*pairs.T).statistic
        lines.append([name, f"{known:+.2f}", f"{low:+.2f} to {high:+.2f}", len(pairs)])
    return lines


def blocks(markdown):
    """{block of EVALUATIONS.md: its lines}. markdown: (heads, lines) -> a table."""

    def networks(data):
        return collect([row for row in read_rows() if row["data"] in data])

    found = {}
    for name, columns in TABLES.items():
        lines = table(networks(DATA.get(name, ("emoji",))), columns)
        found[f"eval_{name}"] = markdown(["network", *columns], lines) if lines else ["Not run."]
    lines = predictors(networks(("emoji",)))
    heads = ["measure", "rank correlation with linear accuracy", "95 % interval", "methods"]
    found["eval_predictors"] = markdown(heads, lines) if lines else ["Not run."]
    return found
