"""The package as a whole: what importing costs and needs, what the wheel holds, which room may import which."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flashtile"
RUNTIME = {"torch", "triton", "numpy"}
IMPORT_SECONDS = 0.3  # what `import flashtile` may add to `import torch`


def run_python(code: str, *flags: str, **environment: str) -> str:
    """Run `code` in a fresh interpreter at the repository root; what it printed."""
    result = subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# --- importing -------------------------------------------------------------------------------------------------------


def test_import_needs_nothing_of_the_machine(tmp_path: Path) -> None:
    """No GPU, no nvcc (an empty PATH), a HOME that cannot be written, asserts compiled out."""
    out = run_python(
        "import flashtile; print(len(flashtile.__all__))",
        "-O",
        CUDA_VISIBLE_DEVICES="",
        PATH=str(tmp_path),
        HOME="/proc/nowhere",
        TRITON_CACHE_DIR="/proc/nowhere",
    )
    assert int(out) > 0


def test_import_time() -> None:
    code = "import time, torch; t = time.perf_counter(); import flashtile; print(time.perf_counter() - t)"
    run_python(code)  # writes the bytecode, reads the files into memory
    seconds = [float(run_python(code)) for _ in range(3)]
    assert median(seconds) <= IMPORT_SECONDS, f"import flashtile took {seconds} s beyond import torch"


def test_import_is_lazy() -> None:
    """Triton (a second, and Linux only) and transformers are imported by those who use them."""
    out = run_python(
        "import torch, sys; before = set(sys.modules); import flashtile; print(*set(sys.modules) - before)"
    )
    heavy = {name for name in out.split() if name.partition(".")[0] in ("triton", "transformers", "gguf", "pandas")}
    assert not heavy


def test_every_public_name_exists() -> None:
    import flashtile

    assert [name for name in flashtile.__all__ if not hasattr(flashtile, name)] == []
    assert len(set(flashtile.__all__)) == len(flashtile.__all__)


def test_doctor_finds_the_cpu_working() -> None:
    out = run_python(
        "import sys; from flashtile.__main__ import main; sys.exit(main(['doctor']))", CUDA_VISIBLE_DEVICES=""
    )
    assert re.search(r"^cpu kernel +ok", out, re.MULTILINE), out


def test_doctor_names_a_kernel_cache_that_cannot_be_written() -> None:
    code = "import sys; from flashtile.__main__ import main; sys.exit(main(['doctor']))"
    out = run_python(code, CUDA_VISIBLE_DEVICES="", TRITON_CACHE_DIR="/proc/nowhere")
    assert "/proc/nowhere: not writable; set TRITON_CACHE_DIR" in out


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the tree stays clean and nothing stale gets in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "flashtile", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", target, source], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return next(target.glob("*.whl"))


def test_wheel_is_pure_python_and_small(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000
    assert {Path(name).suffix for name in zipfile.ZipFile(wheel).namelist() if name.startswith("flashtile/")} <= {
        ".py",
        ".typed",
    }


def test_wheel_holds_every_module(wheel: Path) -> None:
    expected = {str(path.relative_to(ROOT)) for path in sources("flashtile")} | {"flashtile/py.typed"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("flashtile/")}
    assert packed == expected


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    needs = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in needs} == RUNTIME  # type: ignore[index]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/licenses/LICENSE") for name in names)


# --- rooms: imports go one way ---------------------------------------------------------------------------------------

# compile_cases() of a kernel module describes its launches in the words of two test tools
KERNEL_TOOLS = ("flashtile.testing.compile", "flashtile.testing.launches")
KERNEL_ROOMS = ("flashtile.kernels", "flashtile.plan", "flashtile.config", *KERNEL_TOOLS)
# folder or file of flashtile/ -> the modules of ours it may import
ROOMS = {
    "reference/": ("flashtile.reference",),
    "plan/": ("flashtile.plan", "flashtile.config"),
    "config.py": ("flashtile.plan",),
    "kernels/": KERNEL_ROOMS,
}


def sources(*folders: str) -> list[Path]:
    """All Python files of some folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The full names of the modules (or module.name) that a file imports anywhere, lazily too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level(name: str) -> str:
    return name.partition(".")[0]


def inside(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("flashtile")
        if str(path.relative_to(PACKAGE)).startswith(room)
        for name in imports(path)
        if top_level(name) == "flashtile" and not inside(name, ROOMS[room])
    ]
    assert not wrong


def test_the_oracle_needs_only_torch() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "flashtile"}
    assert not [(p.name, n) for p in sources("flashtile/reference") for n in imports(p) if top_level(n) not in allowed]


def test_only_kernels_import_triton() -> None:
    """Except for the tools that compile them, and the doctor, which tries."""
    found = {p for p in sources("flashtile") if any(top_level(name) == "triton" for name in imports(p))}
    elsewhere = {str(p.relative_to(PACKAGE)) for p in found if not p.is_relative_to(PACKAGE / "kernels")}
    assert elsewhere <= {"testing/compile.py", "__main__.py"}
    assert not [p for p in found if p.is_relative_to(PACKAGE / "kernels" / "cpu")]


def test_the_package_imports_nothing_but_its_dependencies() -> None:
    """Plug-ins (flashtile/integrations) import what they plug into."""
    allowed = {*sys.stdlib_module_names, *RUNTIME, "flashtile"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("flashtile")
        if not path.is_relative_to(PACKAGE / "integrations")
        for name in imports(path)
        if top_level(name) not in allowed
    ]
    assert not wrong


def test_public_modules_import_no_test_tools() -> None:
    wrong = [
        f"{path.name} imports {name}"
        for path in PACKAGE.glob("*.py")
        for name in imports(path)
        if inside(name, ("flashtile.testing",))
        or (inside(name, ("flashtile.reference",)) and path.name != "__main__.py")
    ]
    assert not wrong


def test_every_todo_names_its_condition() -> None:
    """As in TODO(triton >= 3.10): ..., so that it can be found when it is due."""
    files = [*sources("flashtile", "tests", "benchmarks", "examples", "docs"), *(ROOT / "docs").glob("*.md")]
    open_ended = re.compile(r"\bTODO\b(?!\([^)\n]+\))")
    assert not [str(p.relative_to(ROOT)) for p in files if p != Path(__file__) and open_ended.search(p.read_text())]
