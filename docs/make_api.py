"""Write docs/api.md: every public name, what it does, and where it is tested. Run as `make docs`.

A test function tests the public objects that it refers to, itself or through what it refers to in its file and in
flashtile/testing. tests/test_docs.py fails when the written table lacks a name or a name has no test.
"""

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flashtile

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "api.md"
TESTING = "flashtile.testing"
MAX_TESTS = 3  # named per row; the rest are counted
NOT_TESTS = ("test_docs.py", "test_package.py", "test_signatures.py")  # they look at all names alike
# Public names that are not at top level: module of flashtile -> its names (None: its __all__)
DOTTED: dict[str, tuple[str, ...] | None] = {
    "cascade": ("variable_length_merge_states",),
    "gemm": ("determine_gemm_backend",),
    "logits_processor": None,
    "sampling": ("top_k_renorm_prob", "top_p_renorm_prob"),
    "triton.activation": ("silu_and_mul",),
    "triton.cascade": None,
    "triton.norm": ("rms_norm", "rms_norm_add_residual"),
    "triton.sm_constraint_gemm": ("gemm", "gemm_descriptor_persistent", "gemm_persistent"),
}

Reference = tuple[str, ...]  # of a reference: ("cases", "check_append"); ("", "run") if it is of no name
Node = tuple[str, str]  # module and definition: ("cases_page", "PageCase.draw")


def public_names() -> list[str]:
    """flashtile.__all__ without dunders, then the dotted ones, each in the order of the alphabet."""
    top = sorted((name for name in flashtile.__all__ if not name.startswith("__")), key=str.lower)
    dotted = (
        f"{module}.{name}"
        for module, names in DOTTED.items()
        for name in names or importlib.import_module(f"flashtile.{module}").__all__
    )
    return top + sorted(dotted, key=str.lower)


def public_object(name: str) -> Any:
    """What a public name stands for."""
    found = resolve(("flashtile", *name.split(".")))
    assert found, f"{name} does not exist"
    return found[-1]


def resolve(path: Reference) -> list[Any]:
    """The objects on the way along a path into a package: modules, then what is in them. None, if it leads nowhere."""
    found: list[Any] = []
    for i, name in enumerate(path):
        try:
            found.append(importlib.import_module(".".join(path[: i + 1])))
        except ImportError:
            if not found or not hasattr(found[-1], name):
                return []
            found.append(getattr(found[-1], name))
    return found


@dataclass
class Source:
    """What a file defines at its top, methods of classes apart, with what each definition refers to; what it
    imports."""

    name: str
    definitions: dict[str, set[Reference]] = field(default_factory=dict)
    imports: dict[str, Reference] = field(default_factory=dict)

    def methods(self, name: str) -> Iterator[Node]:
        """The methods of this name, whatever the class."""
        return ((self.name, key) for key in self.definitions if key.endswith(f".{name}"))


def read(path: Path) -> Source:
    """The definitions and imports of a file."""
    source, tree = Source(path.stem), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            source.imports |= {(a.asname or a.name).partition(".")[0]: tuple(a.name.split(".")) for a in node.names}
            source.imports |= {
                a.name.partition(".")[0]: (a.name.partition(".")[0],) for a in node.names if not a.asname
            }
        elif isinstance(node, ast.ImportFrom):
            source.imports |= {a.asname or a.name: (*str(node.module).split("."), a.name) for a in node.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            source.definitions[node.name] = references(node)
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            source.definitions |= {f"{node.name}.{method.name}": references(method) for method in methods}
            rest = [part for part in ast.iter_child_nodes(node) if part not in methods]
            source.definitions[node.name] = {path for part in rest for path in references(part)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            source.definitions |= {t.id: references(node) for t in targets if isinstance(t, ast.Name)}
    return source


def references(node: ast.AST) -> set[Reference]:
    """All names in a piece of source, with the attributes that are taken of them."""
    found: set[Reference] = set()
    waiting = [node]
    while waiting:
        part, attributes = waiting.pop(), []
        while isinstance(part, ast.Attribute):
            attributes.append(part.attr)
            part = part.value
        root = part.id if isinstance(part, ast.Name) else ""
        if root or attributes:
            found.add((root, *reversed(attributes)))
        waiting.extend(ast.iter_child_nodes(part))
    return found


class Tests:
    """The test functions of a folder and what they reach."""

    def __init__(self, names: list[str]) -> None:
        self.names_of: dict[int, list[str]] = {}
        for name in names:
            self.names_of.setdefault(id(public_object(name)), []).append(name)
        self.sources = {path.stem: read(path) for path in sorted((ROOT / "flashtile" / "testing").glob("*.py"))}

    def reached(self, test: Node) -> set[str]:
        """The public names that a test function refers to, itself or through others."""
        found: set[str] = set()
        seen: set[Node] = set()
        waiting = {test}
        while waiting:
            node = waiting.pop()
            seen.add(node)
            source = self.sources[node[0]]
            for path in source.definitions[node[1]]:
                nodes, names = self.follow(source, path)
                found |= names
                waiting |= nodes - seen
        return found

    def follow(self, source: Source, path: Reference) -> tuple[set[Node], set[str]]:
        """The definitions, and the public names, that a reference in a file leads to."""
        root, *rest = path
        if root in source.definitions:
            return {(source.name, root), *self.methods(source, rest)}, set()
        full = (*source.imports[root], *rest) if root in source.imports else ()
        if ".".join(full[:2]) == TESTING and len(full) > 2:
            module = self.sources[full[2]]
            start = {(module.name, full[3])} if full[3:] and full[3] in module.definitions else set()
            return start | set(self.methods(source, list(full[4:]))), set()
        if full and full[0] == "flashtile":
            return set(), {name for x in resolve(full) for name in self.names_of.get(id(x), [])}
        return set(self.methods(source, rest)), set()

    def methods(self, source: Source, attributes: list[str]) -> Iterator[Node]:
        """The methods of these names, of the file and of the test tools that it imports."""
        tools = {path[2] for path in source.imports.values() if ".".join(path[:2]) == TESTING and len(path) > 2}
        for module in (source, *(self.sources[name] for name in tools)):
            for name in attributes:
                yield from module.methods(name)


def find_tests(names: list[str]) -> dict[str, list[str]]:
    """name -> the test functions that reach it, as tests/test_norm.py::test_rmsnorm; those of its own module first."""
    tests, found = Tests(names), {name: list[str]() for name in names}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if path.name in NOT_TESTS:
            continue
        source = tests.sources[path.stem] = read(path)
        for test in source.definitions:
            if test.startswith("test"):
                for name in tests.reached((path.stem, test)):
                    found[name].append(f"{path.relative_to(ROOT)}::{test}")
    for name, places in found.items():
        own = f"tests/test_{module(name).removeprefix('flashtile.').partition('.')[0]}.py"
        places.sort(key=lambda place: place.partition("::")[0] != own)
    return found


def summary(name: str) -> str:
    """The first paragraph of a name's docstring, on one line."""
    public = public_object(name)
    if isinstance(public, functools.partial):
        return f"`{public.func.__name__}` with {', '.join(f'{k}={v!r}' for k, v in public.keywords.items())}."
    return " ".join((inspect.getdoc(public) or "").split("\n\n")[0].split()).replace("|", "\\|")


def module(name: str) -> str:
    """Where a name is defined."""
    public = public_object(name)
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
