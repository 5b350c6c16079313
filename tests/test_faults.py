"""What people meet who use this on their own data and machines: odd folders, full disks, small
containers, two runs in one folder, half a launcher. Each ends well, or with one sentence that names
what is wrong; nothing is decided in silence, and nothing hangs. (Broken files: test_data.py; kills:
test_resume.py.)"""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, ROOT, method
from PIL import Image

import common
from common import Files, Loader, Split, load_data, read_lines, replace_file
from kernels import readers
from kernels.views import Crop

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")


def sentence(capsys, function, *args, **options):
    """The one sentence with which the call ends the program with exit code 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        function(*args, **options)
    text = capsys.readouterr().err
    assert caught.value.code == 1 and text.startswith("error: ") and text.count("\n") == 1
    return text.removeprefix("error: ").rstrip("\n")


@contextlib.contextmanager
def other_process(code, *args):
    """A Python program beside this one; it runs when it has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True
    )
    try:
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# -------- Folders ---------------------------------------------------------------------------------


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 90, 50)).save(path)
    return folder


def classes(inside, count=10):
    return [f"{inside}{name}/{i}.png" for name in ("ant", "bee") for i in range(count)]


def listing(capsys, folder):
    """The data of a folder, and the line that says what was found."""
    capsys.readouterr()
    data = load_data(str(folder), "", CPU)
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and text.startswith(f"{folder}: ")
    return data, text.removeprefix(f"{folder}: ").rstrip("\n")


HELD_OUT = "18 training and 2 test images of 2 classes (ant, bee); test images: "
HELD_OUT += "a tenth of the images, held out"
GIVEN = "20 training and 4 test images of 2 classes (ant, bee); test images: {}/"


def test_the_line_says_where_the_test_images_come_from(tmp_path, capsys):
    assert listing(capsys, write(tmp_path / "a", *classes("")))[1] == HELD_OUT
    assert listing(capsys, write(tmp_path / "b", *classes("train/")))[1] == HELD_OUT
    for name in ("val", "valid", "validation", "test", "Val", "TEST"):
        folder = write(tmp_path / f"c{name}", *classes("Train/"), *classes(f"{name}/", 2))
        assert listing(capsys, folder)[1] == GIVEN.format(name)
    write(folder, *classes("val/", 2), "more/ant/0.png")  # val/ comes before test/
    text = GIVEN.format("val") + "; not used: 4 images in TEST/, 1 images in more/"
    assert sorted(listing(capsys, folder)[1]) == sorted(text)
    many = write(tmp_path / "many", *[f"{c}/{i}.png" for c in "abcdef" for i in range(2)])
    assert "of 6 classes (a, b, c, d, ...)" in listing(capsys, many)[1]


def test_a_val_without_class_folders_is_an_error(tmp_path, capsys):
    """As ImageNet's val/ comes: its labels are in another file."""
    folder = write(tmp_path, *classes("train/"), "val/0.png", "val/1.png")
    text = sentence(capsys, load_data, str(folder), "", CPU)
    assert "the images in val/ have no class folders" in text and "as in train/" in text
    # beside a test set with labels, it is only named (ImageNet's test/ is flat, too)
    write(folder, *classes("test/", 2))
    assert listing(capsys, folder)[1] == GIVEN.format("test") + "; not used: 2 images in val/"


def test_folders_that_are_not_what_they_seem(tmp_path, capsys):
    folder = write(tmp_path / "a", *classes("val/"))
    (folder / "train").mkdir()
    assert "no images found in train/" in sentence(capsys, load_data, str(folder), "", CPU)
    folder = write(tmp_path / "b", *classes("training/"), *classes("validation/"))
    text = sentence(capsys, load_data, str(folder), "", CPU)
    assert "one looks like test images" in text
    folder = write(tmp_path / "d", *classes("train/"))
    (folder / "val").symlink_to("train")
    text = sentence(capsys, load_data, str(folder), "", CPU)
    assert "train/ and val/ are the same folder" in text
    folder = write(tmp_path / "c", *[f"class{i}/0.png" for i in range(3)])
    text = sentence(capsys, load_data, str(folder), "", CPU)
    assert "one image per class leaves none for training" in text


@pytest.mark.parametrize("layout", ["", "train/"])
def test_hidden_names_and_run_folders_are_left_out_at_every_depth(tmp_path, capsys, layout):
    folder = write(tmp_path, *classes(layout))
    expected, _ = listing(capsys, folder)
    write(folder, f"{layout}.ipynb_checkpoints/a.png", f"{layout}ant/.ipynb_checkpoints/0.png")
    write(folder, f"{layout}__MACOSX/ant/0.png", f"{layout}runs/mine/views.png")
    write(folder, f"{layout}bee/run/curve.png", f"{layout}.thumbnail.png")
    for run in ("runs/mine", "bee/run"):
        (folder / f"{layout}{run}/metrics.jsonl").touch()
    (folder / f"{layout}ant/._0.png").write_bytes(b"\0\5\26\7")
    data, text = listing(capsys, folder)
    assert data.train.images.paths == expected.train.images.paths
    assert data.test.images.paths == expected.test.images.paths
    assert text.startswith(f"{HELD_OUT}; not used: ")
    for words in ("3 hidden folders", "2 run folders", "1 hidden files"):
        assert words in text


def test_stray_images_do_not_switch_off_the_labels(tmp_path, capsys):
    folder = write(tmp_path, *classes("train/"), *classes("val/", 2), "train/montage.png")
    data, text = listing(capsys, folder)
    assert text == GIVEN.format("val") + "; not used: 1 images beside the class folders"
    assert len(data.train.images) == 20


def test_files_of_other_formats_are_named(tmp_path, capsys):
    folder = write(tmp_path, *classes(""), "cow/0.bmp", "ant/1.TIF", "ant/2.tif")
    (folder / "ant/notes.txt").touch()  # no image: nothing to say
    found = listing(capsys, folder)[1]
    assert found.startswith(HELD_OUT) and "2 .tif files" in found and "1 .bmp files" in found
    text = sentence(capsys, load_data, str(write(tmp_path / "x", "a/0.tiff")), "", CPU)
    assert "no images found; not used: 1 .tiff files" in text and ".webp" in text


def test_links_and_loops(tmp_path, capsys):
    """A class folder may be a link; links to folders inside it are named, not followed."""
    folder = write(tmp_path / "a", *classes(""))
    write(tmp_path / "elsewhere", *[f"{i}.png" for i in range(10)])
    (folder / "cow").symlink_to(tmp_path / "elsewhere")
    (folder / "ant/loop").symlink_to(folder)
    data, text = listing(capsys, folder)
    assert "of 3 classes (ant, bee, cow)" in text and text.endswith("not used: 1 links to folders")
    assert len(data.train.images) == 27


def test_names_that_are_not_unicode(tmp_path, capsys):
    """Their class is like any other, and does not change how the others are split."""
    folder = write(tmp_path, *classes(""))
    before, _ = listing(capsys, folder)
    os.rename(folder / "ant", os.fsencode(folder) + b"/caf\xe9")
    with contextlib.redirect_stdout(None):
        data = load_data(str(folder), "", CPU)
    assert len(data.train.images) == 18
    bees = [[p for p in d.test.images.paths if "/bee/" in p] for d in (before, data)]
    assert bees[0] == bees[1]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    folder = write(tmp_path, *classes(""))
    real = os.scandir

    def scandir(path):
        if str(path).endswith("bee"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError) as caught:
        load_data(str(folder), "", CPU)
    assert said(caught.value) == f"error: [Errno 13] Permission denied: '{folder / 'bee'}'"


def test_reasons_of_unreadable_files(tmp_path, monkeypatch):
    """A pipe would be waited for; a link may lead nowhere; PIL has a limit of pixels."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    write(tmp_path, "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # load_picture sets it; to be restored
    monkeypatch.setattr("kernels.readers.MAX_PIXELS", 31)  # 64 pixels are more than twice as many
    words = {
        "pipe.png": "not a regular file",
        "link.png": "No such file",
        "small.png": "(64 pixels) exceeds limit of 62 pixels, could be decompression bomb",
    }
    for name, expected in words.items():
        picture, reason = readers.try_picture(str(tmp_path / name))
        assert picture is None and expected in reason and "Traceback" not in reason
    assert "MAX_PIXELS in kernels/readers.py" in reason
    monkeypatch.setattr("kernels.readers.MAX_PIXELS", 64)
    assert readers.try_picture(str(tmp_path / "small.png"))[0].size == (8, 8)


# -------- Processes that decode -------------------------------------------------------------------


def test_small_shared_memory_is_refused_before_anything_waits(monkeypatch, capsys):
    """Docker's 64 MB. Four workers with three batches of 10 MB each need 120 MB."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64e6))
    monkeypatch.setattr(readers, "CORES", 4)
    text = sentence(capsys, readers.decoding, [], 4, 1, 10e6)
    for words in ("/dev/shm has 64 MB, 4 workers need 120 MB", "--shm-size", "--workers 0"):
        assert words in text
    readers.decoding([], 2, 1, 10e6)
    readers.decoding([], 0, 1, 1e12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # processes of torchrun that share it
    sentence(capsys, readers.decoding, [], 2, 1, 11e6)


class Misbehaving:
    """A Crop whose first use in a worker process kills it, or takes an hour."""

    size = 4

    def __init__(self, how):
        self.how = how

    def cut(self, picture, u):
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)


@pytest.mark.parametrize("how", ["dies", pytest.param("hangs", marks=pytest.mark.thorough)])
def test_a_worker_that_is_lost_ends_the_run(tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr(readers, "PATIENCE", 1)
    files = Files([str(write(tmp_path, f"{i}.png") / f"{i}.png") for i in range(4)])
    loader = Loader(Split(files), [(Crop(4), lambda x, rand: x)], 2, 0, CPU)
    batches = files.batches(loader, [Misbehaving(how)], CPU, 1)
    text = sentence(capsys, next, batches)
    assert "the processes that decode images have failed (DataLoader " in text
    assert "--workers 0" in text
    del files.stream  # ends the workers
    del batches


# -------- Two runs in one folder ------------------------------------------------------------------

LOCKING = """
import fcntl, sys, time
file = open(sys.argv[1] + "/.lock", "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 7 on host")
file.flush()
print("locked", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not common.fcntl, reason="no locks on this system")
def test_a_folder_in_use_is_refused_until_the_other_process_has_ended(tmp_path, capsys):
    with other_process(LOCKING, tmp_path) as other:
        text = sentence(capsys, common.lock, tmp_path)
        assert text.startswith(f"{tmp_path} is in use by process 7 on host")
        assert "--out" in text
        other.send_signal(signal.SIGKILL)
        other.wait()
        mine = common.lock(tmp_path)
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    again = common.lock(tmp_path)  # by the same process, as in a notebook
    assert again and mine


def test_a_file_system_without_locks(tmp_path, capsys, monkeypatch):
    def lockf(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "lockf", lockf)
    common.lock(tmp_path).close()
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
    monkeypatch.setattr(common, "fcntl", None)  # Windows
    assert common.lock(tmp_path) is None


# -------- Half a launcher -------------------------------------------------------------------------

HALF = [
    ({"WORLD_SIZE": "4"}, "only WORLD_SIZE are set"),
    ({"RANK": "0"}, "only RANK are set"),
    (
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"},
        "only RANK, WORLD_SIZE, MASTER_ADDR are set",
    ),
    ({"SLURM_STEP_NUM_TASKS": "4"}, "srun has started several tasks"),
    (
        {
            "RANK": "0",
            "WORLD_SIZE": "two",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500",
            "TORCHELASTIC_RUN_ID": "1",
        },
        "cannot join by torchrun's variables (invalid literal for int() with base 10: 'two')",
    ),
]
ALONE = [
    {},
    {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
]


@pytest.fixture
def environment(monkeypatch):
    def set_variables(values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("values, words", HALF)
def test_half_a_launcher_is_named(environment, capsys, values, words):
    environment(values)
    text = sentence(capsys, common.join_processes, 0)
    assert words in text and ("torchrun" in text or "MASTER_PORT" in text)


@pytest.mark.parametrize("values", ALONE)
def test_variables_that_a_single_process_may_have(environment, values):
    environment(values)
    assert common.join_processes(0).type in ("cpu", "cuda") and common.world() == 1


def test_more_processes_than_gpus(environment, capsys, monkeypatch):
    environment({})
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    text = sentence(capsys, common.join_processes, 0)
    assert "LOCAL_RANK is 2: start one process per GPU" in text


# -------- Disks -----------------------------------------------------------------------------------


def test_full_disks(tmp_path, capsys, monkeypatch):
    """torch.save hides the reason; the free space shows it, before the half-written file makes
    space again."""

    def write(file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6964992")

    path = tmp_path / "last.pt"
    path.write_bytes(b"good")
    assert "no space" not in sentence(capsys, replace_file, path, write)

    def usage(folder):
        return SimpleNamespace(free=0 if (folder / "last.part").exists() else 1e9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    text = sentence(capsys, replace_file, path, write)
    assert text == (
        f"{path} cannot be written (no space left on the disk); what was saved before is kept"
    )
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_metrics_on_a_full_disk(capsys):
    text = sentence(capsys, common.append, "/dev/full", [{"loss": 1.0}])
    assert text.startswith("/dev/full cannot be written (No space left on device)")


def test_lines_torn_in_the_middle_are_skipped(tmp_path):
    """By two writers, a full disk and a restart, or a power failure, which leaves zeros."""
    path = tmp_path / "metrics.jsonl"
    good = [{"settings": {}}, {"step": 0}, {"step": 1}, {"evaluation": {}}]
    lines = [json.dumps(line).encode() for line in good]
    torn = [lines[0], b'{"step": 0, "lo', lines[1], b"\0\0\0", b"\xff\xfe", b"12", lines[2], b""]
    path.write_bytes(b"\n".join([*torn, lines[3]]))
    assert read_lines(path) == good


# -------- Sentences in place of tracebacks --------------------------------------------------------


def said(error):
    """What the program says of an exception that nobody caught."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", sys.stdout)  # one_line may replace it
        patch.setattr(sys, "stderr", open(os.devnull, "w"))
        words = []
        patch.setattr(sys.stderr, "write", words.append, raising=False)
        common.one_line(type(error), error, None)
    return "".join(words).strip()


NOT_FOUND = FileNotFoundError(errno.ENOENT, "No such file or directory", "here/last.part")
SAID = [
    (KeyboardInterrupt(), "stopped: the same command continues"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "error: nobody reads the output any more"),
    (FULL, "error: [Errno 28] No space left on device"),
    (NOT_FOUND, "error: [Errno 2] No such file or directory: 'here/last.part'"),
    (
        RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:29896."),
        "error: another process has ended",
    ),
    (MemoryError(), "error: out of memory: choose a smaller --batch"),
    (torch.OutOfMemoryError("CUDA out of memory."), "error: out of memory: choose a smaller"),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        "error: out of memory: choose a smaller --batch, --size",
    ),
]


@pytest.mark.parametrize("error, words", SAID, ids=[type(error).__name__ for error, _ in SAID])
def test_one_line_in_place_of_a_traceback(error, words):
    text = said(error)
    assert text.startswith(words) and "\n" not in text


def test_errors_of_the_program_keep_their_traceback(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "__excepthook__", lambda *args: shown.append(args))
    error = ValueError("a bug")
    common.one_line(ValueError, error, None)
    assert shown == [(ValueError, error, None)]


def test_a_full_log_does_not_end_a_run(capsys, monkeypatch):
    class Failing:
        def write(self, text):
            raise self.error

        def flush(self):
            pass

    out = Failing()
    monkeypatch.setattr(sys, "stdout", out)
    out.error = FULL
    common.print0("epoch 1")
    assert "warning: cannot print: No space left on device" in capsys.readouterr().err
    out.error = BrokenPipeError(errno.EPIPE, "Broken pipe")
    with pytest.raises(BrokenPipeError):
        common.print0("epoch 2")


def parse(*flags, doc="A method."):
    return common.parse(doc, method("rotnet").SETTINGS, flags)


def test_where_the_results_go_is_checked_first(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        text = sentence(capsys, parse, "--out", out)
        assert f"--out {out}: {tmp_path / 'file'} is a file" in text
    assert "--out is empty" in sentence(capsys, parse, "--out", "")
    same = tmp_path / "data" / ".." / "data"
    assert "the folder of --data" in sentence(
        capsys, parse, "--data", tmp_path / "data", "--out", same
    )
    parse("--out", tmp_path / "new" / "and newer")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    text = sentence(capsys, parse, "--out", tmp_path / "new" / "run")
    assert f"{tmp_path} is a file, or you may not write there" in text
    assert not (tmp_path / "new").exists()


def test_flags_that_are_empty_or_too_large(capsys):
    assert "needs images: --data FOLDER" in sentence(capsys, parse, "--data", "")
    assert "--seed 1e+20: choose at least 0" in sentence(capsys, parse, "--seed", 10**20)


def test_python_without_docstrings():
    assert parse(doc=None).size == parse().size


def test_closed_and_narrow_outputs(monkeypatch):
    """`>&-` leaves None; an encoding may lack letters of a folder's name."""
    monkeypatch.setattr(sys, "argv", ["rotnet.py"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w", encoding="ascii"))
    common.parse("A method.", method("rotnet").SETTINGS)
    for stream in (sys.stdout, sys.stderr):
        print("ünïcode 测试 \udce9", file=stream, flush=True)
    assert sys.excepthook is common.one_line


# -------- As users meet them ----------------------------------------------------------------------

QUICK = ["--size", 16, "--batch", 4, "--epochs", 1, "--warmup", 0]


@pytest.fixture
def mounting():
    """Skips a test where file systems of its own are not permitted."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("unshare -m is not permitted")
    return ["unshare", "-m", "sh", "-c"]


@pytest.mark.thorough
def test_small_shared_memory_of_a_container(tmp_path, mounting):
    folder = write(tmp_path / "data", *classes(""))
    flags = ["--data", folder, "--size", 224, "--batch", 16, "--epochs", 1, "--warmup", 0]
    script = 'mount -t tmpfs -o size=4m none /dev/shm; exec "$@"'
    command = [*mounting, script, "sh", sys.executable, ROOT / "methods" / "simclr.py", *flags]
    command += ["--workers", 2, "--out", tmp_path / "run"]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert found.stderr.startswith("error: /dev/shm has 4 MB") and found.stderr.count("\n") == 1


@pytest.mark.thorough
def test_a_disk_that_is_full_in_the_middle(tmp_path, mounting):
    """16 MB hold the untrained weights and the first checkpoint, not the second beside it. What is
    there can be loaded."""
    (tmp_path / "disk").mkdir()
    script = f'mount -t tmpfs -o size=16m none {tmp_path}/disk; "$@"; code=$?; '
    script += f"cd {tmp_path}/disk/run; cp last.pt {tmp_path}/kept.pt; ls; exit $code"
    flags = ["--data", write(tmp_path / "data", "a.png", "b.png", "c.png", "d.png"), *QUICK]
    command = [*mounting, script, "sh", sys.executable, ROOT / "methods" / "simclr.py", *flags]
    command += ["--workers", 0, "--out", tmp_path / "disk" / "run"]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert "no space left on the disk" in found.stderr and "last.part" not in found.stdout
    assert torch.load(tmp_path / "kept.pt", weights_only=True)["step"] == 0


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_while_a_file_is_written_counts_afterwards(tmp_path, handler):
    """torch.save would turn it into an error of its own. The file is whole when it ends. A program
    in the background ignores it."""
    path = tmp_path / "last.pt"

    def write(file):
        os.kill(os.getpid(), signal.SIGINT)
        file.write(b"all of it")

    ignored = handler == signal.SIG_IGN
    before = signal.signal(signal.SIGINT, handler)
    try:
        with contextlib.nullcontext() if ignored else pytest.raises(KeyboardInterrupt):
            replace_file(path, write)
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert path.read_bytes() == b"all of it" and list(tmp_path.iterdir()) == [path]


@pytest.mark.thorough
def test_ctrl_c_of_a_run_with_workers(tmp_path):
    """SIGINT to all processes of the terminal: one line, and nobody is left."""
    folder = write(tmp_path / "data", *[f"{i}.png" for i in range(16)])
    command = [sys.executable, ROOT / "methods" / "simclr.py", "--data", folder, *QUICK]
    command += ["--epochs", 5000, "--workers", 2, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert err.strip() == "stopped: the same command continues"
    with pytest.raises(ProcessLookupError):  # no process of the group is left
        os.killpg(process.pid, 0)
