"""All that is registered: importing this module imports every module with records, so that their
tables are full.

A user's own records (``dlm_core.records``) join the same tables from a notebook or a module of
theirs. Workers of a sweep are other processes, which have not run that code: ``shipped`` takes
these records along.
"""

import functools
import sys
from dataclasses import fields

import cloudpickle

from dlm_core import attacks, data, defenses, federated, models, records  # noqa: F401
from dlm_core.beyond import (  # noqa: F401
    ablation,
    adaptive,
    architectures,
    batches,
    clients,
    epochs,
    exact,
    inputs,
    invariant,
    learned,
    normalisation,
    protocols,
    signlike,
    spread,
    surrogate,
    unrolled,
    weighted,
)
from dlm_core.harness.sources import Origin, origin
from dlm_core.records import Record


def _is_of_ours(record: Record) -> bool:
    """Whether a function of ours stands in it, and none of a user's."""
    held = (getattr(record, each.name) for each in fields(record))
    whose = {origin(getattr(each, "__module__", None)) for each in held if callable(each)}
    return Origin.OURS in whose and Origin.FOREIGN not in whose


_OURS = {
    (kind, key): record
    for kind, table in records.TABLES.items()
    for key, record in table.items()
    if _is_of_ours(record)
}


def is_ours(record: Record) -> bool:
    """Whether a record is one of those that every process has which imports this module."""
    return _OURS.get((type(record), record.key)) is record


def shipped() -> bytes:
    """The records that are not ours, to be sent to a worker: what is a user's in them goes by
    value, and so do the user's other modules that it takes from.

    Raises
    ------
    ValueError
        Where a user's record holds what cannot be sent.
    """
    own = [r for table in records.TABLES.values() for r in table.values() if not is_ours(r)]
    if not own:
        return b""
    by_value = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    others = [name for name in sys.modules if origin(name) is Origin.FOREIGN]
    modules = [sys.modules[name] for name in others if name not in by_value]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(own)
    except Exception as error:
        what = next((r for r in own if not _can_be_sent(r)), own[0])
        raise ValueError(
            f"{type(what).__name__.lower()} {what.key!r} cannot be sent to workers "
            f"({' '.join(str(error).split())}): make inside its function what cannot be pickled, "
            "or sweep with jobs=1"
        ) from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _can_be_sent(record: Record) -> bool:
    try:
        return bool(cloudpickle.dumps(record))
    except Exception:
        return False


@functools.lru_cache(maxsize=1)
def receive(shipment: bytes) -> None:
    """Register, in a worker, what ``shipped`` packed."""
    for record in cloudpickle.loads(shipment) if shipment else []:
        records.TABLES[type(record)][record.key] = record
