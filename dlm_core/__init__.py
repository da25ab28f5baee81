"""Deep Leakage from Model in Federated Learning: attacks, defences, and the notebooks' harness.

Submodules are imported on first use: ``import dlm_core`` costs nothing, and the environment can be made without torch.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "attacks", "batches", "bench", "check", "coordinates", "data", "defenses", "environment", "exact", "federated", "figures",
    "labels", "metrics", "models", "objectives", "optimizers", "recursion", "report", "reproduce", "search", "sweeps", "trials",
)  # fmt: skip


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"dlm_core.{name}")
    raise AttributeError(f"module 'dlm_core' has no attribute {name!r}")


def __dir__():
    return sorted((*globals(), *_SUBMODULES))
