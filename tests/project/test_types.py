"""Public signatures carry types, and mypy, with the settings of pyproject.toml, finds no error."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MODULES = sorted((REPOSITORY / "dlm_core").rglob("*.py"))


def test_mypy_finds_nothing(tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def public(tree):
    """The public functions of a module, and public methods and __init__ of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, []
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for each in node.body:
                if isinstance(each, ast.FunctionDef):
                    decorators = [ast.unparse(d) for d in each.decorator_list]
                    if not each.name.startswith("_") or each.name == "__init__":
                        yield each, [] if "staticmethod" in decorators else ["self", "cls"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_parameter_has_a_type(path):
    missing = []
    for function, bound in public(ast.parse(path.read_text())):
        given = function.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        for each in filter(None, every):
            if each.annotation is None and each.arg not in bound:
                missing.append(f"{function.name}({each.arg})")
        if function.returns is None and function.name != "__init__":
            missing.append(f"{function.name} -> ?")
    assert not missing, ", ".join(missing)
