"""What an audit was asked, of which files, and with which software."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

import dlm_core
from dlm_core.harness import files


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One of the two snapshots.

    Attributes
    ----------
    name
        As it was given; "a state dict" or the like where it was no file.
    digests
        {file: its SHA-256}, several of sharded weights; empty where it was no file.
    """

    name: str
    digests: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class About:
    """What an audit was asked, of which files, and with which software.

    Attributes
    ----------
    before, after
        The snapshots.
    asked
        {argument: what was asked}, numbers and words.
    date
        When, in UTC.
    versions
        Of this package and of those that it computes with.
    """

    before: Snapshot
    after: Snapshot
    asked: Mapping[str, Any]
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: Mapping[str, str] = field(
        default_factory=lambda: {
            "dlm_core": dlm_core.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "system": f"{platform.system()} {platform.machine()}",
        }
    )


def of(before: files.Given, after: files.Given, **asked: Any) -> About:
    """What was asked of two snapshots; of a network its class, of other objects their ``str``."""
    plain = (int, float, str, tuple, type(None))
    named = {name: type(v).__name__ if isinstance(v, nn.Module) else v for name, v in asked.items()}
    words = {name: v if isinstance(v, plain) else str(v) for name, v in named.items()}
    return About(before=snapshot(before), after=snapshot(after), asked=words)


def snapshot(given: files.Given) -> Snapshot:
    """The name and the digests of what ``files.snapshots`` has read."""
    if not isinstance(given, (str, Path)):
        return Snapshot(name=f"{type(given).__name__}, no file", digests={})
    return Snapshot(
        name=str(given), digests={each.name: _digest(each) for each in files.parts(given)}
    )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
