"""Deep Leakage from Model in Federated Learning: attacks and defences, stronger ones, experiments,
the repository's commands.

The modules beside this file are the paper. Whatever the folder, each is a public name here: ``from
dlm_core import exact``. They are imported on first use: ``import dlm_core`` costs nothing, and the
environment can be made without torch.
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"

FOLDERS = ("beyond", "harness", "project")


def _modules():
    """{public name: the module's full name}, packages (folders with an ``__init__``) included."""
    here = Path(__file__).parent
    found = {}
    for folder, prefix in (
        (here, "dlm_core"),
        *((here / name, f"dlm_core.{name}") for name in FOLDERS),
    ):
        for path in folder.glob("[a-z]*"):
            is_package = (path / "__init__.py").exists() and path.name not in FOLDERS
            if path.suffix == ".py" or is_package:
                found[path.stem] = f"{prefix}.{path.stem}"
    return found


_MODULES = _modules()


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'dlm_core' has no attribute {name!r}")


def __dir__():
    return sorted((*globals(), *_MODULES))
