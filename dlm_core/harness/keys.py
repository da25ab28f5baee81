"""The name of a result: a digest of the value that asked for it, and of the code and the data
behind it.

A key covers the closure of imports of the modules that take part (an attack's own, the scene's, the
judge's) and nothing else: adding an attack costs no finished trial. Of a user's own it covers all
that it reaches (``contents``). What cannot be followed is an error.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

import torch

from dlm_core import data
from dlm_core.harness import registry
from dlm_core.harness.contents import contents
from dlm_core.harness.sources import Origin, code_version, origin, version
from dlm_core.records import Record, plain

# Of a record, what no result depends on: how it looks and what is said about it.
LOOKS = {"title", "colour", "marker", "assumes", "client", "audited", "example", "neutral", "scene"}

# What was read for other keys of the same moment.
_READ: ContextVar[dict[Any, str] | None] = ContextVar("read", default=None)


def result_key(
    value: Any, modules: Iterable[str], named: Iterable[Record], dataset: str, source: str
) -> str:
    """Return the name of a result.

    Parameters
    ----------
    value
        A dataclass of plain data: a trial or the like.
    modules
        Full names of the modules of ours that run it.
    named
        Records that it names by key: of its attack, defence, network, …
    dataset, source
        Of ``data.load``: the images behind it.

    Raises
    ------
    ValueError
        Where a user's code reaches what cannot be followed.
    """
    versions = sorted({code_version(module) for module in modules})
    versions += sorted({fingerprint(record) for record in named})
    images = _once(("images", dataset, source), lambda: data.digest(dataset, source))
    described = json.dumps([plain(value), versions, images, torch.__version__], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def fingerprint(record: Record) -> str:
    """Digest of what a record holds: of one of ours, the closure of its function's module; of a
    user's, all that it reaches.
    """
    if registry.is_ours(record):
        return _of_ours(record.function)
    return _once(("code", id(record)), lambda: _of_a_user(record))


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within it, all keys are of one moment: a user's code and images are read once."""
    token = _READ.set({})
    try:
        with data.read_once({}):
            yield
    finally:
        _READ.reset(token)


def _once(what: Any, read: Callable[[], str]) -> str:
    known = _READ.get()
    if known is None:
        return read()
    if what not in known:
        known[what] = read()
    return known[what]


@functools.cache
def _of_ours(function: Callable[..., Any]) -> str:
    module = function.__module__
    if origin(module) is Origin.OURS:
        return code_version(module)
    return f"{module}.{function.__qualname__} {version(module)}"  # a class of torch.optim


def _of_a_user(record: Record) -> str:
    names = [each.name for each in fields(record) if each.name not in LOOKS]
    held = {name: getattr(record, name) for name in names}
    return contents(f"{type(record).__name__.lower()} {record.key!r}", held)
