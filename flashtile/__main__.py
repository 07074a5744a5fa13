"""The command line: `python -m flashtile doctor` says what flashtile finds on this machine, and whether it works."""

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy
import torch

from flashtile import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m flashtile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor_parser = commands.add_parser("doctor", help="versions, devices, kernel families, and a kernel run on each")
    doctor_parser.set_defaults(call=lambda options: doctor())
    options = parser.parse_args(argv)
    code: int = options.call(options)
    return code


def doctor() -> int:
    """Print one line per finding, "ok" or "PROBLEM" where there is something to judge; 1 if there is a problem."""
    findings = [*_versions(), *_compilers()]
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        findings += _device(device)
    for name, text, good in findings:
        verdict = "" if good is None else "ok: " if good else "PROBLEM: "
        print(f"{name:14} {verdict}{text}")
    return 0 if all(good is not False for *_, good in findings) else 1


Finding = tuple[str, str, bool | None]  # what, in words, and whether it is as it should be (None: plain information)


def _versions() -> list[Finding]:
    found: list[Finding] = [
        ("flashtile", __version__, None),
        ("python", f"{platform.python_version()} on {platform.platform()}", None),
        ("torch", torch.__version__, None),
        ("numpy", numpy.__version__, None),
    ]
    try:
        found.append(("triton", str(import_module("triton").__version__), True))
    except Exception as error:  # a broken installation can fail in any way
        # the CPU needs no Triton, a GPU does
        found.append(("triton", f"cannot be imported ({error})", False if torch.cuda.is_available() else None))
    return found


def _compilers() -> list[Finding]:
    """Triton builds a small C launcher for each kernel and keeps what it compiled in a folder: it needs both."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    needed = torch.cuda.is_available()
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton")
    writable = _writable(folder)
    advice = "" if writable else ": not writable; set TRITON_CACHE_DIR to a folder that is"
    return [
        ("C compiler", compiler or "none found; install gcc or set CC", bool(compiler) if needed else None),
        ("kernel cache", f"{folder}{advice}", writable if needed else None),
    ]


def _writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest folder above it that exists; leaves nothing behind."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _device(device: torch.device) -> list[Finding]:
    if device.type == "cpu":
        what = f"{torch.get_num_threads()} threads; kernels: PyTorch"
    else:
        properties = torch.cuda.get_device_properties(device)
        what = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB; "
            f"kernels: {_family(device)}"
        )
    return [(str(device), what, None), (f"{device} kernel", *_try_kernel(device))]


def _family(device: torch.device) -> str:
    """The attention family that a plain bf16 prefill gets on a device."""
    from flashtile.config import choose
    from flashtile.plan.problem import Problem, Workload

    problem = Problem(32, 8, 128, 128, torch.bfloat16, torch.bfloat16, torch.bfloat16, window_right=0)
    return choose(problem, Workload(1, 1024, 1024, 1024, 1024), device).family


def _try_kernel(device: torch.device) -> tuple[str, bool]:
    """Decode 3 query heads over 17 tokens and compare with the definition."""
    from flashtile.decode import single_decode_with_kv_cache
    from flashtile.reference.attention import attention

    q, k, v = (torch.randn(*shape, dtype=torch.float16) for shape in ((3, 64), (17, 1, 64), (17, 1, 64)))
    try:
        got = single_decode_with_kv_cache(q.to(device), k.to(device), v.to(device))
        assert isinstance(got, torch.Tensor)  # a tuple only with return_lse
        expected = attention(q.float()[None], k.float(), v.float())[0][0]
        error = (got.cpu().float() - expected).abs().max().item()
    except Exception as reason:  # whatever a driver, a compiler or a missing header raises is what the user must see
        return f"{type(reason).__name__}: {reason}", False
    return f"decode attention differs from its definition by {error:.1e}", error < 1e-2


if __name__ == "__main__":
    sys.exit(main())
