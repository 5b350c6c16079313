"""kernels/bench.py: all ways to compute a case agree, its rows, and the table made from them. Times are not tested."""

import pytest
import torch

from kernels import bench

CPU = torch.device("cpu")
SMALL = [bench.simclr_case(64, 32), bench.clip_case(64, 128), bench.moco_case(8, 100, 32),
         *(of(20, 30, torch.float32) for of in (bench.sinkhorn_case, bench.potentials_case, bench.assignment_case)),
         *bench.mae_cases(2, torch.float32, D=8, decoder=6)]


def test_rows_of_ours_and_of_the_plain_formula(tmp_path):
    """Both agree in every case, value and gradients, and each is a row with all that the table needs."""
    assert bench.run(SMALL, CPU, tmp_path / "rows.jsonl") == []
    rows = bench.read(tmp_path / "rows.jsonl")
    assert {(row["op"], row["who"]) for row in rows} == {(case.op, who) for case in SMALL for who in ("ours", "eager")}
    for row in rows:
        # Float32 rounds exponents of 10 to 20 by 1e-6, and the least of the losses is 1.4e-3; a wrong formula is off by 1e-2.
        assert row["value_error"] < 1e-3 and (row["gradient_error"] is None or row["gradient_error"] < 1e-3), row
        assert (row["gradient_error"] is None) == (row["op"] in ("random_masking", "sinkhorn", "sinkhorn_potentials"))
        assert row["ms"] > 0 and row["rate"] > 0 and row["share"] is None and row["type"] == "cpu"
        assert {"device", "driver", "torch", "triton", "date", "commit", "package", "memory_mb", "unit"} <= set(row)
    lines = bench.table(rows, [], SMALL).splitlines()
    assert lines[0] == "GPU: not run" and sum(line.startswith("| ") for line in lines) == 1 + len(SMALL)
    assert "not run" not in "".join(lines[1:]) and rows[0]["device"] in "".join(lines)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", SMALL[:3], ids=lambda case: case.op)
def test_other_ways(case):
    """They multiply in bf16, with errors of 2^-9 in each logit, up to 10 (simclr, moco) or 14 (clip): 0.03 in the loss."""
    inputs = case.inputs(CPU)
    want = case.ways["ours"](*inputs).item()
    assert case.ways["eager bf16"](*inputs).item() == pytest.approx(want, abs=0.03)
    flex = {"simclr_loss": bench.flex_simclr, "clip_loss": bench.flex_clip, "moco_loss": bench.flex_moco}[case.op]
    assert flex(*(x.detach() for x in inputs)).item() == pytest.approx(want, abs=0.03)


def test_on_a_gpu_our_losses_get_rows_in_float16():
    class OnGPU:
        is_cuda, dtype = True, torch.float32

        def __init__(self, ndim):
            self.ndim = ndim

        def half(self):
            return "float16"

    seen, scale = [], OnGPU(0)
    bench.halved(lambda *x: seen.extend(x))(OnGPU(2), scale)
    assert seen == ["float16", scale]
    z = torch.zeros(2, 3)
    assert bench.halved(lambda x: x)(z) is z


def test_lightly():
    pytest.importorskip("lightly.loss.ntx_ent_loss")
    inputs = SMALL[0].inputs(CPU)
    torch.testing.assert_close(SMALL[0].ways["lightly"](*inputs), SMALL[0].ways["ours"](*inputs), rtol=0, atol=1e-5)


def test_memory_of_a_known_size():
    """16 MB that are written and freed within the call; other memory of the process may come and go, 4 MB at most."""
    found = bench.peak_memory(lambda: torch.ones(4 * 2**20).sum().item(), CPU)
    assert found is None or found == pytest.approx(16.8, abs=4)


def test_failures(tmp_path, monkeypatch, capsys):
    """One of ours is recorded, told and the exit code; one of another is recorded only. No folder: nothing is measured."""
    def broken(*inputs):
        raise RuntimeError("out of luck\nand more")
    case, file = SMALL[2], tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["bench.py", "--out", str(file)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for who, code in (("eager", None), ("ours", 1)):
        inputs = case.inputs(CPU)
        ways = case.ways | {who: broken if who == "eager" else lambda *x: broken() if x[0].dtype == torch.float32
                            else case.ways["ours"](*x)}
        monkeypatch.setattr(bench, "CPU_CASES", [case._replace(ways=ways, inputs=lambda device: inputs)])
        if code:
            with pytest.raises(SystemExit) as stop:
                bench.main()
            assert stop.value.code == code and "moco_loss B=8 K=100 D=32: RuntimeError: out of luck" in capsys.readouterr().err
        else:
            bench.main()
            out = capsys.readouterr().out
            assert "PyTorch path" in out and "RuntimeError: out of luck\n" in out
    monkeypatch.setattr("sys.argv", ["bench.py", "--out", str(tmp_path / "none" / "rows.jsonl")])
    with pytest.raises(SystemExit):
        bench.main()
    assert "there is no folder" in capsys.readouterr().err
    file.write_text("{}\n{broken\n")
    with pytest.raises(SystemExit):
        bench.read(file)
    assert "line 2: not a row of results" in capsys.readouterr().err


def test_table_by_hand(tmp_path):
    case = bench.simclr_case(64, 32)
    assert bench.read(tmp_path / "none") == []
    lines = bench.table([]).splitlines()
    cases = [line for line in lines if line.startswith("| ") and not line.startswith("| kernel")]
    assert len(cases) == len(bench.GPU_CASES) + len(bench.CPU_CASES) and all("not run" in line for line in cases)

    def row(who, **fields):
        return {"op": case.op, "size": case.size, "who": who, "type": "cuda", "device": "H200", "date": "today"} | fields
    ours = {"ms": 2.0, "rate": 456.7, "share": 0.5, "memory_mb": 3.0, "value_error": 1e-6, "gradient_error": 2e-6}
    rows = [row("ours", ms=99.0), row("ours", **ours), row("eager", ms=8.0), row("compile", error="OutOfMemoryError: much"),
            row("memeff", ms=4.0), row("lightly", ms=3.0), row("inf_cl", error="ImportError: it")]
    line, = [line for line in bench.table(rows, [case], []).splitlines() if line.startswith("| simclr_loss")]
    assert line == ("| simclr_loss | M=64 D=32 | 2 | 457 | 0.5 | 3 | 1e-06, 2e-06 | 8 | not run | out of memory | 3, lightly |")
    cpu = [r | {"type": "cpu", "device": "a CPU"} for r in rows]
    line, = [line for line in bench.table(cpu, [], [case]).splitlines() if line.startswith("| simclr_loss")]
    assert line == "| simclr_loss | M=64 D=32 | 2 | 8 | 0.25 | 3 | - | 1e-06, 2e-06 |"
    assert "a CPU: date today" in bench.table(cpu, [], [case]) and "H200" not in bench.table(cpu, [], [case])


def test_sizes_are_unique():
    """A row is found by its kernel and size."""
    for cases in (bench.GPU_CASES, bench.CPU_CASES, SMALL):
        assert len({(case.op, case.size) for case in cases}) == len(cases)
        assert all(who in sum(bench.STAGES, ()) for case in cases for who in case.ways)


def test_help(program):
    text = " ".join(program("kernels/bench.py", "--help").stdout.split())
    assert "results.jsonl" in text and "Measures the kernels beside plain PyTorch" in text
