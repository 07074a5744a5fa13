"""Every kernel compiles for sm_80 and sm_90 on a machine without a GPU, without spilling registers.

With FLASHTILE_COMPILE=sample only the first case of each kernel is compiled: enough to see that another Triton takes
them.
"""

import importlib
import os
import pkgutil
from collections.abc import Iterator

import pytest
import triton

import flashtile.kernels
from flashtile.testing.compile import CompileCase, compile_for

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
CAPABILITIES = (80, 90)
# Known spills, in bytes, under a Triton newer than the pinned one; everything else must have none there too.
NEWER_TRITON_SPILLS = {"flashtile.kernels.hopper.gemm": 20} if not triton.__version__.startswith("3.6.") else {}


def compile_cases() -> Iterator[CompileCase]:
    """Those of all modules below flashtile.kernels."""
    for info in pkgutil.walk_packages(flashtile.kernels.__path__, "flashtile.kernels."):
        module = importlib.import_module(info.name)
        if hasattr(module, "compile_cases"):
            yield from module.compile_cases()


def chosen() -> list[CompileCase]:
    """All cases, or the first of each kernel."""
    cases = list(compile_cases())
    if os.environ.get("FLASHTILE_COMPILE") == "sample":
        return list({id(case.kernel): case for case in reversed(cases)}.values())
    return cases


CASES = [
    pytest.param(case, capability, id=f"{case} sm_{capability}")
    for case in chosen()
    for capability in CAPABILITIES
    if case.min_capability <= capability <= case.max_capability
]


@pytest.mark.parametrize(("case", "capability"), CASES)
def test_compiles_without_spills(case: CompileCase, capability: int) -> None:
    compiled = compile_for(case, capability)
    allowed = NEWER_TRITON_SPILLS.get(case.kernel.__module__, 0)
    assert compiled.spill_bytes <= allowed, f"{compiled.spill_bytes} bytes spilled with {compiled.registers} registers"


def test_every_kernel_module_has_cases() -> None:
    for info in pkgutil.walk_packages(flashtile.kernels.__path__, "flashtile.kernels."):
        module = importlib.import_module(info.name)
        launched = [name for name, x in vars(module).items() if name.endswith("_kernel") and x.__module__ == info.name]
        assert not launched or hasattr(module, "compile_cases"), f"{info.name} launches {launched}"
