"""The room's contract: what dist/ may import, and that each file stays one."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import undertow.dist

ROOM = Path(undertow.dist.__file__).parent
ALLOWED = {"torch", "psutil", "numpy", "rich", "typer"}
NAMED_AFTER = {"probe_mpi.py": {"mpi4py"}}  # the one file that measures MPI
FILES = sorted(ROOM.glob("*.py"))


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


def roots(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Top-level names that the statement imports absolutely."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if node.level == 0 else set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_stay_within_the_contract(path):
    allowed = ALLOWED | set(sys.stdlib_module_names) | NAMED_AFTER.get(path.name, set())
    for node in imports(path):
        assert roots(node) <= allowed, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}: dist/ is the lowest room"
            names = [node.module] if node.module else [alias.name for alias in node.names]
            assert all((ROOM / f"{name}.py").exists() for name in names), f"line {node.lineno} imports the package"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_bare_name_dist_is_torch_distributed(path):
    for node in imports(path):
        bound = {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        if "dist" in bound:
            assert isinstance(node, ast.Import) and bound["dist"] == "torch.distributed"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_opens_with_why_and_is_room_sized(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
    assert path.read_text().count("\n") <= 300


def test_the_modules_import_each_other_in_one_direction():
    graph = {
        path.stem: {
            name
            for node in imports(path)
            if isinstance(node, ast.ImportFrom) and node.level
            for name in ([node.module] if node.module else [alias.name for alias in node.names])
        }
        for path in FILES
    }
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
