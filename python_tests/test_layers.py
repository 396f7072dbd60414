"""Imports go down only: systems -> attention -> ops -> backends; csrc knows no torch."""

import ast
import re
from pathlib import Path

import pytest

import idcore

PACKAGE = Path(idcore.__file__).parent
ROOT = PACKAGE.parent
FLOORS = ["backends", "ops", "attention", "systems"]


def imported(path):
    """Sub-packages of idcore that a module imports at any depth, as first dotted component."""
    tree, found = ast.parse(path.read_text()), set()
    here = ["idcore", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(p for p in (base, node.module or "") if p)
            names = [f"{module}.{a.name}" for a in node.names] + [module]
        found |= {n.split(".")[1] for n in names if n.startswith("idcore.")}
    return found


@pytest.mark.parametrize("level", range(len(FLOORS)))
def test_imports_go_down(level):
    above = set(FLOORS[level + 1 :])
    modules = sorted((PACKAGE / FLOORS[level]).rglob("*.py"))
    assert modules
    # the plain values Site and AttentionOptions are re-exported upward, never needed below
    wrong = {str(m.relative_to(PACKAGE)): sorted(imported(m) & above) for m in modules if imported(m) & above}
    assert not wrong, f"imports that go up: {wrong}"


def test_csrc_is_free_of_torch_and_pybind_stands_in_one_unit():
    if not (ROOT / "csrc").exists():
        pytest.skip("not a checkout: csrc/ is not installed")
    pybind, users = set(), set()
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            text = path.read_text()
            assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)", text), path
            if "pybind11/" in text:
                pybind.add(path.name)
            if '#include "bind_tuples.h"' in text:
                users.add(path.name)
    assert pybind == {"bind.cpp", "bind_tuples.h"} and users == {"bind.cpp"}


def test_kernels_does_not_shadow_the_hub_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
