"""Measures a run on a million image files: listing, the first step, memory, and an evaluation.

    python tests/bench_scale.py                 1,000 classes x 1,000 files, in a temporary folder
    python tests/bench_scale.py --classes 100 --files 100 --steps 40      the same, smaller
    python tests/bench_scale.py --videos --classes 20 --files 100 --steps 40     2,000 long videos

The folder holds hard links to 1,000 small JPEG files, so it takes no space, but every name counts.
SimCLR runs on it with its defaults but for --size 32 --batch 256, in a process of its own, and is
stopped after the last step. Memory is the proportional set size (PSS) of all of its processes:
pages that they share count once. The factor is the peak memory of one evaluation of random
features, less what the process had before, over the size of the float32 features of bank and test
images.

With --videos the files are links to ten H.264 videos of one minute, 320 x 240 pixels, written by
PyAV, and Shuffle and Learn runs with its defaults but for --size 32 --batch 64. Further lines give
the seconds to open the folder, without reading a file, and the clips per second that one process
decodes: 64 places of random videos, three frames a second apart. There is no factor.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common
from kernels.provenance import device_name
from kernels.video_files import FPS, open_video, pictures

LINKS = 1000  # links to a file that some file systems allow is 65,000


def write_pictures(folder):
    """The paths of a thousand JPEG files."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(LINKS):
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        paths.append(folder / f"picture{i}.jpg")
        picture = Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)
        picture.save(paths[-1], quality=80)
    return paths


def write_videos(folder, count=10, seconds=60, rate=24):
    """The paths of videos of a picture that moves: --videos."""
    import av  # nothing else here needs it

    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        paths.append(folder / f"video{i}.mp4")
        small = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        scene = np.asarray(Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC))
        with av.open(str(paths[-1]), "w") as file:
            stream = file.add_stream("libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for t in range(seconds * rate):
                x = round(160 + 160 * np.sin(t / 40))
                y = round(120 + 120 * np.cos(t / 55))
                picture = np.ascontiguousarray(scene[y : y + 240, x : x + 320])
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    return paths


def build(folder, paths, classes, files):
    """A folder of class folders with hard links to some files."""
    data = folder / "data"
    for c in range(classes):
        place = data / f"class{c:04}"
        place.mkdir(parents=True)
        for i in range(files):
            path = paths[(c + i) % len(paths)]
            os.link(path, place / f"{c:04}_{i:05}{path.suffix}")
    return data


def decoding(data, clips=64):
    """{what: measured} of opening a folder of videos and decoding clips of it, in this process."""
    began = time.perf_counter()
    videos = common.load_data(str(data), ".", torch.device("cpu")).train.images
    found = {"seconds to open the folder": time.perf_counter() - began}

    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for i in rng.integers(len(videos), size=clips):
        video = open_video(videos.paths[i])
        start = int(rng.integers(video.length - 3 * FPS))
        for _ in pictures(video, [start, start + FPS, start + 2 * FPS]):
            pass
    found["clips per second of one process"] = clips / (time.perf_counter() - began)
    return found


def family(pid):
    """A process and all that it has started."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def memory(pid):
    """Proportional set size of a process and its children, in GB."""
    total = 0
    for process in family(pid):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        total += int(re.search(r"^Pss: +(\d+)", text, re.M)[1])
    return total / 1e6


def run(method, batch, data, out, steps):
    """{what: measured} of a training run, stopped after `steps` steps."""
    command = [sys.executable, "-u", str(ROOT / "methods" / f"{method}.py"), "--data", str(data)]
    command += ["--size", "32", "--batch", str(batch), "--out", str(out), "--workers", "2"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found = {}
    for line in process.stdout:
        print("   ", line.rstrip(), flush=True)
        if "training and" in line:
            found["seconds to list the files"] = time.perf_counter() - began
        if " per step on " in line:  # "images" or "videos"
            break

    metrics = out / "metrics.jsonl"
    done = 0
    while done < steps and process.poll() is None:
        time.sleep(0.2)
        lines = common.read_lines(metrics)
        done = max([line["step"] + 1 for line in lines if "step" in line], default=0)
        if done and "seconds to the first steps" not in found:
            found["seconds to the first steps"] = time.perf_counter() - began
            found["GB of all processes at the first steps"] = memory(process.pid)
    found[f"GB of all processes at step {steps}"] = memory(process.pid)
    process.terminate()
    process.wait()
    return found


def evaluation_factor(bank, width):
    """Peak memory of an evaluation over the size of its float32 features, in a fresh process."""
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, common
from common import Data, InMemory, Split
device = torch.device("cpu")
def split(count):
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8)
    return Split(InMemory(images), torch.arange(count) % 10)
data = Data("noise", split({bank}), split({bank}), split({bank} // 10))
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, {width}), torch.nn.ReLU())
network.eval()
small = data._replace(bank=split(500), test=split(100))
common.evaluate(network, small, 8, device)  # loads what is loaded on the first call
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
common.evaluate(network, data, 8, device)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)
"""
    command = [sys.executable, "-c", program]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peak / (1.1 * bank * width * 4 / 1e9)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--classes", type=int, default=1000, help="class folders (1000)")
    p.add_argument("--files", type=int, default=1000, help="files in each (1000)")
    p.add_argument("--steps", type=int, default=400, help="steps after which the run stops (400)")
    p.add_argument("--bank", type=int, default=40_000, help="rows of the evaluation (40000)")
    p.add_argument("--width", type=int, default=2048, help="features of the evaluation (2048)")
    p.add_argument("--videos", action="store_true", help="videos of one minute in place of images")
    args = p.parse_args(argv)
    print(f"{device_name(torch.device('cpu'))}; torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = write_videos(folder) if args.videos else write_pictures(folder)
        data = build(folder, paths, args.classes, args.files)
        found = decoding(data) if args.videos else {}
        method, batch = ("shuffle_and_learn", 64) if args.videos else ("simclr", 256)
        found.update(run(method, batch, data, folder / "run", args.steps))
    if not args.videos:
        found["evaluation: peak over float32 features"] = evaluation_factor(args.bank, args.width)
    for name, value in found.items():
        print(f"{name:45}{value:8.2f}")


if __name__ == "__main__":
    main()
