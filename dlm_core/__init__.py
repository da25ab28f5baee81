"""Deep Leakage from Model in Federated Learning: attacks and defences, stronger ones, experiments,
the repository's commands.

The modules beside this file are the paper. Whatever the folder, each but one is a public name here:
``from dlm_core import exact``; ``information`` is ``beyond.fisher``. They are imported on first
use: ``import dlm_core`` costs nothing, and the environment can be made without torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

__version__ = "0.1.0"

FOLDERS = ("beyond", "harness", "project")
# Public names that are not their file's: that of ``beyond.information`` covers exact recovery's own
# algebra, and is part of the names of finished trials.
RENAMED = {"information": "dlm_core.beyond.fisher"}


def _modules() -> dict[str, str]:
    """{public name: the module's full name}; a module may be a folder with an ``__init__``."""
    here = Path(__file__).parent
    found = {}
    for folder in (here, *(here / name for name in FOLDERS)):
        package = ".".join(("dlm_core", *folder.relative_to(here).parts))
        for path in folder.glob("[a-z]*"):
            is_folder = (path / "__init__.py").exists() and path.name not in FOLDERS
            if path.suffix == ".py" or is_folder:
                found[path.stem] = f"{package}.{path.stem}"
    shown = {name: full for name, full in found.items() if full not in RENAMED.values()}
    return {**shown, **RENAMED}


MODULES = _modules()


def __getattr__(name: str) -> ModuleType:
    if name in MODULES:
        return importlib.import_module(MODULES[name])
    raise AttributeError(f"module 'dlm_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *MODULES))
