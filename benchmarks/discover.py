"""Which benchmarks there are: the modules of this folder that define BENCHMARK at their top level.

They are found by reading, not importing, so that listing is quick and one that cannot be imported here still shows.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from pathlib import Path

from undertow.benchmarks.case import Benchmark
from undertow.dist.errors import UserError

FOLDER = Path(__file__).parent


def listed(folder: Path = FOLDER) -> dict[str, str]:
    """Name of each benchmark → the first line of its module's docstring, by name."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
        targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
        if any(isinstance(target, ast.Name) and target.id == "BENCHMARK" for target in targets):
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def load(name: str) -> Benchmark:
    """The benchmark called `name`; `UserError` naming the nearest when there is none."""
    names = listed()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(
            f"there is no benchmark '{name}'",
            expected="one of " + ", ".join(names),
            remedy=f"undertow bench {near[0]}" if near else "",
        )
    return importlib.import_module(f".{name}", __package__).BENCHMARK
