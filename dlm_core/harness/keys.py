"""The name of a result: a digest of the value that asked for it, and of the code and the data
behind it.

A key covers the closure of imports of the modules that take part (an attack's own, the scene's, the
judge's) and nothing else: adding an attack costs no finished trial. Comments and docstrings do not
count. What cannot be followed is an error.
"""

import ast
import hashlib
import json
import types
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dlm_core
from dlm_core.harness.registry import is_foreign
from dlm_core.records import plain

PACKAGE = Path(dlm_core.__file__).parent


def result_key(value: Any, modules: Iterable[str], functions: Iterable[Callable], data: str) -> str:
    """Return the name of a result.

    Parameters
    ----------
    value
        A dataclass of plain data: a trial or the like.
    modules
        Full names of the modules of ours that run it.
    functions
        Those that it names by key: attack, defence, network, …
    data
        Digest of the images behind it.
    """
    versions = sorted({code_version(module) for module in modules})
    versions += sorted({fingerprint(function) for function in functions})
    described = json.dumps([plain(value), versions, data, torch.__version__], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def fingerprint(function: Callable[..., Any]) -> str:
    """Digest of the code of a function that a record holds: its module's closure, or for a user's
    all that it reaches.
    """
    module = function.__module__
    if is_foreign(function):
        parts: dict[int, str] = {}
        _reach(function, parts)
        return _digest(sorted(parts.values()))
    if module.split(".")[0] == "dlm_core":
        return code_version(module)
    # of an installed package, whose version is part of the environment
    return f"{module}.{getattr(function, '__qualname__', function)}"


@cache
def code_version(module: str) -> str:
    """Digest of a module of ours and of all of ours that it imports, comments and docstrings aside.

    Raises
    ------
    ImportError
        Where an import of ours resolves to no file.
    """
    seen: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            tree = _tree(name)
            seen[name] = ast.dump(tree)
            todo += imported(tree, name)
    return _digest(f"{name}:{code}" for name, code in sorted(seen.items()))


def imported(tree: ast.AST, module: str) -> set[str]:
    """The full names of the modules of dlm_core that a module, given as its syntax tree, imports.

    Raises
    ------
    ImportError
        Where one resolves to no file.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "dlm_core"]
            found |= {_existing(name, module) for name in names if name != "dlm_core"}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            if base.split(".")[0] == "dlm_core":
                found |= {_imported_from(base, alias.name, module) for alias in node.names}
    return found - {"dlm_core"}


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if _file(module).name == "__init__.py" else module.split(".")[:-1]
    parents = package[: len(package) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _imported_from(base: str, name: str, module: str) -> str:
    """The module that ``from base import name`` takes: a submodule, one by its public name, or
    ``base`` itself.
    """
    if _path(f"{base}.{name}") is not None:
        return f"{base}.{name}"
    if base == "dlm_core":
        if name in dlm_core.MODULES:
            return dlm_core.MODULES[name]
        if name not in vars(dlm_core):
            raise ImportError(f"{module} imports {name!r} of dlm_core, which resolves to no file")
        return base
    return _existing(base, module)


def _existing(name: str, module: str) -> str:
    if _path(name) is None:
        raise ImportError(f"{module} imports {name!r}, which resolves to no file")
    return name


def _path(module: str) -> Path | None:
    """The file of a module or package of ours, or None."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _file(module: str) -> Path:
    path = _path(module)
    if path is None:
        raise ImportError(f"module {module!r} resolves to no file")
    return path


def _tree(module: str) -> ast.Module:
    """A module's syntax tree without docstrings."""
    tree = ast.parse(_file(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


def _reach(thing: Any, parts: dict[int, str]) -> None:
    """Collect a description of a user's function or class, and of all the user's own that it refers
    to.
    """
    if id(thing) in parts:
        return
    if isinstance(thing, type):
        parts[id(thing)] = f"class {thing.__qualname__}"
        for name, member in sorted(vars(thing).items()):
            if not name.startswith("__") or name in ("__init__", "__call__"):
                _reach(getattr(member, "__func__", member), parts)
        for base in thing.__bases__:
            if is_foreign(base):
                _reach(base, parts)
        return
    if not isinstance(thing, types.FunctionType):
        parts[id(thing)] = _described(thing)
        return
    parts[id(thing)] = f"def {thing.__qualname__} {_code(thing.__code__)}"
    values = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    values += [cell.cell_contents for cell in thing.__closure__ or ()]
    values += [
        thing.__globals__[name]
        for name in sorted(_names(thing.__code__))
        if name in thing.__globals__
    ]
    for value in values:
        own = isinstance(value, (types.FunctionType, type)) and is_foreign(value)
        if own or not isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
            _reach(value, parts)
        elif value.__module__ and value.__module__.split(".")[0] == "dlm_core":
            parts[id(value)] = code_version(value.__module__)


def _described(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        name = value.__name__
        if name.split(".")[0] == "dlm_core":
            return code_version(name) if name != "dlm_core" else name
        file = getattr(value, "__file__", None)
        if not file or {"site-packages", "dist-packages", "lib"} & set(Path(file).parts):
            return name
        return _digest([Path(file).read_text(encoding="utf-8")])
    if isinstance(value, torch.Tensor):
        return _digest(
            [
                str(value.dtype),
                str(tuple(value.shape)),
                str(value.detach().cpu().flatten().tolist()),
            ]
        )
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _code(code: types.CodeType) -> str:
    """A code object's instructions and constants, nested functions' included; not its lines and its
    docstring's place.
    """
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return _digest([code.co_code.hex(), *constants, *code.co_names])


def _names(code: types.CodeType) -> set[str]:
    nested = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*(_names(c) for c in nested))


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
