"""The documents: the table of public names is complete and up to date, and links lead somewhere."""

import re
from pathlib import Path

import pytest

from docs.make_api import TABLE, find_tests, public_names, read, summary

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


def test_every_public_name_has_a_test() -> None:
    assert [name for name, tests in find_tests(public_names()).items() if not tests] == []


def test_a_test_tests_what_it_refers_to() -> None:
    """Not what is merely named alike: torch.softmax, or another file's table of cases."""
    found = find_tests(["rmsnorm", "softmax", "top_p_sampling_from_probs", "triton.activation.silu_and_mul"])
    assert {place.partition("::")[0] for place in found["rmsnorm"]} == {"tests/test_norm.py", "tests/test_library.py"}
    assert "tests/test_sampling.py::test_softmax" in found["softmax"]
    assert not [place for place in found["softmax"] if "test_activation" in place or "test_distribution" in place]
    assert "tests/test_sampling.py::test_sampler" in found["top_p_sampling_from_probs"]
    assert "tests/test_sampling.py::test_renorm" not in found["top_p_sampling_from_probs"]
    assert not [place for place in found["triton.activation.silu_and_mul"] if "test_triton" not in place]


def test_every_public_name_says_what_it_does() -> None:
    assert [name for name in public_names() if not summary(name)] == []


def test_api_table_is_complete() -> None:
    """A row for each name and no other; more tests than it names do no harm."""
    rows = re.findall(r"^\| `([\w.]+)` \|", TABLE.read_text(), re.MULTILINE)
    assert rows == public_names(), "docs/api.md is out of date: run `make docs`"


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_named_tests_exist(document: Path) -> None:
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", document.read_text())
    assert [f"{file}::{test}" for file, test in named if test not in read(ROOT / "tests" / file).definitions] == []


@pytest.mark.parametrize("document", sorted(DOCUMENTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []
