"""A notebook's parameters cell: the one tagged "parameters", of assignments of literals."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TAG = "parameters"


def cell_of(notebook: Mapping[str, Any]) -> Any:
    """The one cell tagged "parameters" of a notebook, as nbformat reads it.

    Raises
    ------
    ValueError
        Where there is none, or more than one.
    """
    found = [cell for cell in notebook["cells"] if TAG in cell["metadata"].get("tags", [])]
    if len(found) != 1:
        raise ValueError(f"the notebook has {len(found)} cells tagged {TAG!r}; it takes one")
    return found[0]


def assignments(source: str) -> dict[str, ast.expr]:
    """{name: the node of its value} of a cell's code."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def read(source: str) -> dict[str, Any]:
    """{name: value} of the assignments in a cell's code."""
    return {name: ast.literal_eval(value) for name, value in assignments(source).items()}


def parameters(path: Path) -> dict[str, Any]:
    """{name: value} of the parameters cell of the notebook at ``path``."""
    cell = cell_of(json.loads(path.read_text(encoding="utf-8")))
    return read("".join(cell["source"]))
