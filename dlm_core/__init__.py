"""Deep Leakage from Model in Federated Learning: attacks, defences, and the notebooks' harness.

Submodules are imported on first use: ``import dlm_core`` costs nothing, and the environment can be made without torch.
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"

_SUBMODULES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"dlm_core.{name}")
    raise AttributeError(f"module 'dlm_core' has no attribute {name!r}")


def __dir__():
    return sorted((*globals(), *_SUBMODULES))
