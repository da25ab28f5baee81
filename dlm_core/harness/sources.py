"""Where code comes from, and which version of it this is: of this package by what its modules say,
of an installed one by its number.
"""

import ast
import enum
import hashlib
import importlib.util
import platform
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

import dlm_core

PACKAGE = Path(dlm_core.__file__).parent
NAMING = "dlm_core.harness.keys"  # it knows every module, and takes part in no result
STANDARD = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


class Origin(enum.Enum):
    """Whose a module is."""

    OURS = "of this package"
    INSTALLED = "of an installed package, or of Python"
    FOREIGN = "a user's: a notebook, a script, a module of a project"


def origin(module: str | None) -> Origin:
    """Whose a module is, by its full name; one that nothing is known of is a user's."""
    top = (module or "__main__").split(".")[0]
    if top == "dlm_core":
        return Origin.OURS
    if top in sys.builtin_module_names:
        return Origin.INSTALLED
    if top == "__main__":  # a notebook or a script, whatever file a kernel was started from
        return Origin.FOREIGN
    place = _place(top)
    return Origin.FOREIGN if place is None else _of_file(place)


def exists(module: str) -> bool:
    """Whether a module's package can be imported, or has been."""
    top = module.split(".")[0]
    return top in sys.modules or importlib.util.find_spec(top) is not None


def _place(top: str) -> str | None:
    """File or folder of a package, imported or not; None where it has none."""
    known = sys.modules.get(top)
    if known is not None:
        file, folders = getattr(known, "__file__", None), getattr(known, "__path__", None)
    else:
        spec = importlib.util.find_spec(top)
        file = spec.origin if spec and spec.has_location else None
        folders = spec.submodule_search_locations if spec else None
    return file or next(iter(folders or ()), None)


@cache
def _of_file(file: str) -> Origin:
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    if installed or any(path.is_relative_to(folder) for folder in STANDARD):
        return Origin.INSTALLED
    return Origin.FOREIGN


@cache
def version(module: str) -> str:
    """The version of a module that is no user's, by its full name."""
    top = module.split(".")[0]
    if module == "dlm_core":
        return digest(code_version(each) for each in sorted(dlm_core.MODULES.values()))
    if top == "dlm_core":
        return code_version(module)
    if top in sys.stdlib_module_names:
        return platform.python_version()
    known = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(known, str):
        return known
    try:
        return metadata.version(top)
    except metadata.PackageNotFoundError:
        names = sorted(set(_distributions().get(top, ())))
        return " ".join(f"{name} {metadata.version(name)}" for name in names)


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


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
            seen[name], further = _read(name)
            todo += further
    return digest(f"{name}:{code}" for name, code in sorted(seen.items()))


@cache
def _read(module: str) -> tuple[str, set[str]]:
    """A module of ours: its code as text, and those of ours that it imports."""
    tree = _tree(module)
    return ast.dump(tree), imported(tree, module)


def digest(parts: Iterable[str]) -> str:
    """16 hex digits that tell these texts, in this order, from others."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def imported(tree: ast.AST, module: str) -> set[str]:
    """The full names of the modules of dlm_core that a module, given as its syntax tree, imports,
    ``NAMING`` aside.

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
    return found - {"dlm_core", NAMING}


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
