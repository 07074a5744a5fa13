"""Every kernel compiles for sm_80 and sm_90 on a machine without a GPU, without spilling registers or reading ones that
nothing wrote.

With FLASHTILE_COMPILE=sample these are compiled, to see that another Triton takes them: the first case of each kernel,
all of the Hopper attention family, one of three of the narrow one and one of ten of the portable one.
"""

import importlib
import os
import pkgutil
from collections.abc import Iterator

import pytest
import triton

import flashtile.kernels
from flashtile.testing.compile import CompileCase, compile_for, disassemble
from flashtile.testing.sass import unwritten_registers

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
CAPABILITIES = (80, 90)
# Modules whose cases are made by what chooses tiles, or in its image, so that they must fit
SIZED = ("flashtile.kernels.attention", "flashtile.kernels.hopper.narrow.attention")
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that a CTA may have
# Known spills, in bytes, of a module or a case, under a Triton newer than the pinned one; all others must have none
# there too.
NEWER_TRITON_SPILLS = {
    "flashtile.kernels.hopper.gemm": 20,
    "hopper.narrow.int4.eight.zeros.half.bf16": 32,
    "attention.append.int4.group.sm80": 16,
    "attention.decode.int8.half.page16.b64.sm90": 8,
    "attention.decode.int4.group.page1.b256.sm90": 24,
}
if triton.__version__.startswith("3.6."):
    NEWER_TRITON_SPILLS = {}


def compile_cases() -> Iterator[CompileCase]:
    """Those of all modules below flashtile.kernels."""
    for info in pkgutil.walk_packages(flashtile.kernels.__path__, "flashtile.kernels."):
        module = importlib.import_module(info.name)
        if hasattr(module, "compile_cases"):
            yield from module.compile_cases()


def chosen() -> list[CompileCase]:
    """All cases, or the sample."""
    cases = list(compile_cases())
    if os.environ.get("FLASHTILE_COMPILE") != "sample":
        return cases
    first = {id(case.kernel): case for case in reversed(cases)}.values()
    hopper = [case for case in cases if case.kernel.__module__ == "flashtile.kernels.hopper.attention"]
    narrow = [case for case in cases if case.kernel.__module__ == "flashtile.kernels.hopper.narrow.attention"]
    portable = [case for case in cases if case.kernel.__module__ == "flashtile.kernels.attention"]
    return list({case.name: case for case in (*first, *hopper, *narrow[::3], *portable[::10])}.values())


CASES = [
    pytest.param(case, capability, id=f"{case} sm_{capability}")
    for case in chosen()
    for capability in CAPABILITIES
    if case.min_capability <= capability <= case.max_capability
]


@pytest.mark.parametrize(("case", "capability"), CASES)
def test_compiles_without_spills(case: CompileCase, capability: int) -> None:
    compiled = compile_for(case, capability)
    allowed = NEWER_TRITON_SPILLS.get(case.name, NEWER_TRITON_SPILLS.get(case.kernel.__module__, 0))
    assert compiled.spill_bytes <= allowed, f"{compiled.spill_bytes} bytes spilled with {compiled.registers} registers"
    if case.kernel.__module__ in SIZED:
        assert compiled.shared_bytes <= SHARED_BYTES[capability]
    assert unwritten_registers(disassemble(compiled.cubin)) == []


SASS = """
        /*0000*/                   ULDC UR4, c[0x0][0x210] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   UIADD3.64 UR6, UR4, 0x4, URZ ;
        /*0030*/                   HGMMA.64x32x16.F32 R24, R28, gdesc[UR4].tnspB, R24 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   UIADD3 UR6, UP0, UR6, 0x40, URZ ;
        /*0060*/                   EXIT ;
"""


def test_registers_that_nothing_wrote() -> None:
    assert unwritten_registers(SASS) == ["UIADD3.64 UR6, UR4, 0x4, URZ", "UIADD3 UR6, UP0, UR6, 0x40, URZ"]
    assert unwritten_registers(SASS.replace("ULDC UR4", "ULDC.64 UR4").replace("@P0 BRA", "NOP")) == []


def test_every_kernel_module_has_cases() -> None:
    for info in pkgutil.walk_packages(flashtile.kernels.__path__, "flashtile.kernels."):
        module = importlib.import_module(info.name)
        launched = [name for name, x in vars(module).items() if name.endswith("_kernel") and x.__module__ == info.name]
        assert not launched or hasattr(module, "compile_cases"), f"{info.name} launches {launched}"
