"""Write docs/api.md: every public name, what it does, and where it is tested. Run as `make docs`.

A test function tests the names that it mentions, itself or through the helpers and tables of its file and of
flashtile/testing. tests/test_docs.py fails when the written table lacks a name or a name has no test.
"""

import ast
import functools
import inspect
from pathlib import Path

import flashtile

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "api.md"
MAX_TESTS = 3  # named per row; the rest are counted
NOT_TESTS = ("test_docs.py", "test_package.py")  # they look at all names alike

Graph = dict[str, set[str]]  # a name defined at the top of a file -> the names its definition mentions


def public_names() -> list[str]:
    """flashtile.__all__ in the order of the alphabet, without dunders."""
    return sorted((name for name in flashtile.__all__ if not name.startswith("__")), key=str.lower)


def find_tests(names: list[str]) -> dict[str, list[str]]:
    """name -> the test functions that reach it, as tests/test_norm.py::test_rmsnorm."""
    shared: Graph = {}
    for path in sorted((ROOT / "flashtile" / "testing").glob("*.py")):
        shared |= definitions(path)
    found: dict[str, list[str]] = {name: [] for name in names}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if path.name in NOT_TESTS:
            continue
        own = definitions(path)
        for test in own:
            if test.startswith("test"):
                for name in reached(test, shared | own) & found.keys():
                    found[name].append(f"{path.relative_to(ROOT)}::{test}")
    return found


def definitions(path: Path) -> Graph:
    """The functions, classes and constants at the top of a file, each with what it mentions."""
    graph: Graph = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            graph[node.name] = mentions(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            graph |= {target.id: mentions(node) for target in targets if isinstance(target, ast.Name)}
    return graph


def mentions(node: ast.AST) -> set[str]:
    """All names, attributes and strings in a piece of source."""
    found: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute):
            found.add(part.attr)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.add(part.value)
    return found


def reached(start: str, graph: Graph) -> set[str]:
    """Everything that can be reached from a definition by mention."""
    seen: set[str] = set()
    waiting = {start}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= graph.get(name, set()) - seen
    return seen


def summary(name: str) -> str:
    """The first paragraph of a name's docstring, on one line."""
    public = getattr(flashtile, name)
    if isinstance(public, functools.partial):
        return f"`{public.func.__name__}` with {', '.join(f'{k}={v!r}' for k, v in public.keywords.items())}."
    return " ".join((inspect.getdoc(public) or "").split("\n\n")[0].split()).replace("|", "\\|")


def module(name: str) -> str:
    """Where a name is defined."""
    public = getattr(flashtile, name)
    return str((public.func if isinstance(public, functools.partial) else public).__module__)


def api_table() -> str:
    """The text of docs/api.md."""
    lines = [
        "# Every public name, and its tests",
        "",
        "Written by `make docs` from the docstrings and the tests; `help(flashtile.NAME)` has the arguments and",
        "errors. The tests named here run on the CPU; `tests/interpreter` and `tests/gpu` run the same cases on the",
        "Triton kernels, in Triton's CPU interpreter and on a CUDA device.",
        "",
        "| name | defined in | what it does | tests |",
        "| --- | --- | --- | --- |",
    ]
    for name, tests in find_tests(public_names()).items():
        places = [f"`{test.removeprefix('tests/')}`" for test in tests[:MAX_TESTS]]
        more = [f"{len(tests) - MAX_TESTS} more"] if len(tests) > MAX_TESTS else []
        lines.append(f"| `{name}` | `{module(name)}` | {summary(name)} | {', '.join(places + more)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(api_table())
    print(f"wrote {TABLE.relative_to(ROOT)}: {len(public_names())} names")
