"""Compiles Triton kernels to machine code without a GPU and reports what a test should hold:
registers, spills, shared memory, and which instructions were chosen.

    from aot import SHARED_LIMIT, Spec, compile_ahead

    signature = {"r": "*fp16", "scale": "*fp32", "out": "*fp16", "L": "i32"}
    sizes = {"P": 768, "ROWS": 16, "COLS": 256}
    spec = Spec("kernels.mae_mask", "scale_kernel", signature, sizes, arch=90)
    report, = compile_ahead([spec])
    # stores to global memory
    assert report.stack == 0 and report.shared <= SHARED_LIMIT[90] and report.count("STG") > 0

The work is done in another process, because whether a kernel is compiled or interpreted is settled
when it is decorated, and the tests interpret. That process spends seconds on importing torch: hand
over many specs at once. What was compiled before in the same test session is not compiled again.
"""

import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # bytes of shared memory a block may use (A100, H100); more cannot be launched
DONE = {}  # repr(spec) -> Report


class Spec(NamedTuple):
    """One kernel and one choice of its arguments. A constexpr that is left out keeps its default
    value.

    module, kernel: the @triton.jit function (or an autotuned one) and the module that holds it,
    "kernels.infonce". signature: type of each run-time argument: "*fp16", "*bf16", "*fp32", "*i32",
    "i32", "i64", "fp32", ... constexprs: value of each constexpr, and of each argument that a
    launch would specialise, such as None or a stride of 1. arch: compute capability, 80 (A100) or
    90 (H100, H200). aligned: names of the arguments divisible by 16, as Triton finds out at a
    launch (addresses, widths); all pointers by
        default. Without alignment there are no 16-byte loads."""

    module: str
    kernel: str
    signature: dict
    constexprs: dict
    arch: int = 90
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple | None = None


class Report(NamedTuple):
    """registers: 32-bit registers a thread. stack: bytes a thread keeps in memory, 0 if nothing is
    spilled. shared: bytes of shared memory a block. opcodes: how often each occurs in the machine
    code. loops: the same for each innermost loop, in the order of the code; a software-pipelined
    loop is one loop. ptx, sass: the code."""

    registers: int
    stack: int
    shared: int
    opcodes: Counter
    loops: list
    ptx: str
    sass: str

    def count(self, opcode, loop=None):
        """Instructions `opcode`, of the whole kernel or of loops[loop]: the first part must agree
        and the others occur, so that "LDG.128" counts LDG.E.128 and LDG.E.EF.128.CONSTANT, but not
        LDGSTS.E.128 (the asynchronous copy) nor LDG.E."""
        name, *modifiers = opcode.split(".")
        found = self.opcodes if loop is None else self.loops[loop]
        return sum(
            n
            for op, n in found.items()
            if op.split(".")[0] == name and set(modifiers) <= set(op.split(".")[1:])
        )


def compile_ahead(specs):
    """A Report for each Spec. RuntimeError, with the compiler's message, if one does not
    compile."""
    todo = [spec for spec in specs if repr(spec) not in DONE]
    if todo:
        environment = {
            name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
        }
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "specs").write_bytes(pickle.dumps([tuple(spec) for spec in todo]))
            ran = subprocess.run(
                [sys.executable, __file__, folder], env=environment, text=True, capture_output=True
            )
            if ran.returncode:
                raise RuntimeError(
                    f"the compiling process ended with exit code {ran.returncode}:\n"
                    f"{ran.stdout}{ran.stderr}"
                )
            answers = pickle.loads((Path(folder) / "answers").read_bytes())
        for spec, answer in zip(todo, answers, strict=True):
            if isinstance(answer, str):
                raise RuntimeError(
                    f"{spec.module}.{spec.kernel} does not compile for sm_{spec.arch}, {spec}:\n"
                    f"{answer}"
                )
            DONE[repr(spec)] = Report(*answer)
    return [DONE[repr(spec)] for spec in specs]


def opcodes_and_loops(sass):
    """Counts of the opcodes in cuobjdump's listing, of all and of every innermost loop. A loop
    reaches from the target of a backward branch to the branch; the branch to itself after the end
    of every kernel is none."""
    listing = re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)([^;]*);", sass
    )  # address, opcode, operands
    code = [(int(address, 16), opcode) for address, opcode, _ in listing]
    ranges = []
    for address, opcode, operands in listing:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < int(address, 16):
            ranges.append((int(target[1], 16), int(address, 16)))
    inner = [
        (a, b)
        for a, b in ranges
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ranges)
    ]
    loops = [
        Counter(op for address, op in code if a <= address <= b) for a, b in sorted(set(inner))
    ]
    return Counter(op for _, op in code), loops


def compile_one(spec):
    """The fields of a Report, or what went wrong as text. Runs where kernels are compiled, not
    interpreted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        kernel = getattr(importlib.import_module(spec.module), spec.kernel)
        while not isinstance(kernel, triton.JITFunction):
            kernel = kernel.fn  # @triton.autotune and @triton.heuristics wrap it
        names = kernel.arg_names
        constants = {
            p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default
        } | spec.constexprs
        if wrong := (set(spec.signature) | set(constants)) ^ set(names):
            return f"arguments {sorted(wrong)} are missing or unknown; the kernel takes {names}"
        aligned = (
            [n for n, kind in spec.signature.items() if kind[0] == "*"]
            if spec.aligned is None
            else spec.aligned
        )
        source = ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in constants else spec.signature[n] for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", spec.arch, 32),
            options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
        )
    except Exception as error:  # reported by the caller, which knows all specs
        return f"{type(error).__name__}: {error}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path  # comes with Triton
        usage = subprocess.run(
            [tool, "-res-usage", file.name], text=True, capture_output=True, check=True
        ).stdout
        sass = subprocess.run(
            [tool, "--dump-sass", file.name], text=True, capture_output=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return (
        registers,
        stack,
        compiled.metadata.shared,
        *opcodes_and_loops(sass),
        compiled.asm["ptx"],
        sass,
    )


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    folder = Path(sys.argv[1])
    jobs = [Spec(*job) for job in pickle.loads((folder / "specs").read_bytes())]
    (folder / "answers").write_bytes(pickle.dumps([compile_one(job) for job in jobs]))
