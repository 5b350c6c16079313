"""Where a recorded number comes from: the versions, the commit, the machine and its memory."""

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).resolve().parents[1]


def versions():
    """{package: version} of what computes a result; Pillow decodes and resizes images.
    scikit-learn and SciPy are not imported for this, because that takes a second."""
    known = {"python": platform.python_version(), "numpy": np.__version__}
    known |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    for package in ("scikit-learn", "scipy", "pillow"):
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a training can do without
            known[package] = None
    return known


def commit():
    """The commit of this project, with "-dirty" if files differ from it; None if not known."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    command.append("--exclude=*")
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    found = re.search(r"model name\s*: (.*)", text)
    name = found[1] if found else platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


def peak_memory(device):
    """The most memory that this process has had so far, in GB: on a GPU of its own, on a CPU all;
    None where the system does not tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    if resource:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
    return None
