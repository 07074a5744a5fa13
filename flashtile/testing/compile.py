"""Compile kernels for a GPU that need not be present, and read what the compiler made of them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One launch of a kernel: what Triton would specialise on.

    signature: argument name -> Triton type ("*bf16", "i32", "fp32", ..., or a tuple of them); constexprs: argument
    name -> value. Arguments in `aligned` are multiples of 16 (pointers count as aligned without being named).
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    maxnreg: int | None = None
    min_capability: int = 80
    max_capability: int = 90
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Compiled:
    """What ptxas reported: registers per thread, spilled bytes, shared memory in bytes; and the PTX and cubin."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str
    cubin: bytes
    log: str


def ptxas(capability: int) -> str:
    """The path of the ptxas that Triton itself uses for compute capability 80, 90, ...: its wheel may hold several."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(capability).path)


def compile_for(case: CompileCase, capability: int) -> Compiled:
    """Compile for compute capability 80, 90, ...; no GPU is needed. Runs ptxas once more, verbosely, to read the
    spills."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names = case.kernel.arg_names
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    constexprs = {(names.index(n),): v for n, v in case.constexprs.items()}
    aligned: list[tuple[int, ...]] = []
    for i, n in enumerate(names):
        if isinstance(signature[n], tuple):
            aligned += [(i, j) for j, kind in enumerate(signature[n]) if kind.startswith("*") or n in case.aligned]
        elif signature[n].startswith("*") or n in case.aligned:
            aligned.append((i,))
    attrs = {path: [["tt.divisibility", 16]] for path in aligned}
    source = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    compiled = triton.compile(
        source(case.kernel, signature, constexprs, attrs=attrs),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    log = _ptxas_log(compiled.asm["ptx"], capability, case.maxnreg)
    registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return Compiled(registers, spills, compiled.metadata.shared, compiled.asm["ptx"], compiled.asm["cubin"], log)


def disassemble(cubin: bytes) -> str:
    """SASS, by the nvdisasm that comes with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ptxas_log(ptx: str, capability: int, maxnreg: int | None) -> str:
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None, "PTX without a .target line"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas(capability), "-v", f"-arch={target[1]}", str(path), "-o", str(path) + ".cubin"]
        if maxnreg is not None:
            command.append(f"--maxrregcount={maxnreg}")
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
