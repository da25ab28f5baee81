"""All that is registered: importing this module imports every module with records, so that their
tables are full.

A user's own records (``dlm_core.records``) join the same tables from a notebook or a module of
theirs. Workers of a sweep are other processes, which have not run that code: ``shipped`` takes
these records along.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from dlm_core import attacks, data, defenses, federated, models, records  # noqa: F401
from dlm_core.beyond import (  # noqa: F401
    adaptive,
    batches,
    clients,
    exact,
    normalisation,
    protocols,
    signlike,
    unrolled,
)


def shipped() -> bytes:
    """The records that are not ours, to be sent to a worker: their functions go by value, whatever
    module they are in.
    """
    foreign = [
        r for table in records.TABLES.values() for r in table.values() if is_foreign(r.function)
    ]
    modules = {sys.modules[r.function.__module__] for r in foreign} - {sys.modules["__main__"]}
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(foreign)
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


@functools.lru_cache(maxsize=1)
def receive(shipment: bytes) -> None:
    """Register, in a worker, what ``shipped`` packed."""
    for record in cloudpickle.loads(shipment):
        records.TABLES[type(record)][record.key] = record


def is_foreign(function: Callable[..., Any]) -> bool:
    """Whether a function is a user's: neither of this package nor of an installed one."""
    name = function.__module__
    if name.split(".")[0] == "dlm_core":
        return False
    if name == "__main__":  # a notebook or a script, whatever file a kernel was started from
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is None or not {"site-packages", "dist-packages"} & set(Path(file).parts)
