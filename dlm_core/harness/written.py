"""Files that an audit writes: whether they can be written is known before any attack, and that one
cannot in the end costs no result.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def check_writable(argument: str, path: str | Path) -> None:
    """Raise ValueError unless a file can be written there; nothing is left behind.

    Parameters
    ----------
    argument, path
        Its name for the error, and the file.
    """
    path, shown = Path(path), f"{argument} is {str(path)!r}"
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{shown}; its folder does not exist")
    if path.is_dir():
        raise ValueError(f"{shown}, a folder; it takes a file")
    existed = path.exists()
    try:
        open(path, "ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{shown}, which cannot be written ({error.strerror})") from None


def check_apart(paths: Mapping[str, str | Path]) -> None:
    """Raise ValueError where two of these are one file; ``paths``: {argument: file}."""
    met: dict[str, str] = {}
    for argument, path in paths.items():
        other = met.setdefault(os.path.realpath(path), argument)
        if other != argument and argument not in ("before", "after"):
            raise ValueError(f"{argument} is {str(path)!r}, which is {other} as well")


def keep(argument: str, path: str | Path, write: Callable[[str | Path], object]) -> bool:
    """``write(path)``; whether it succeeded. An error of the disk's is said on standard error, and
    the results that are still to be told are not lost by it.
    """
    try:
        write(path)
    except OSError as error:
        why = error.strerror or str(error)
        print(f"error: {argument} {str(path)!r} could not be written: {why}", file=sys.stderr)
        return False
    return True


def write_json(content: Any, path: str | Path) -> None:
    """Write numbers and words as a file of JSON; OSError where the disk does not take it.

    Parameters
    ----------
    content, path
        Dicts, lists and what stands in them, made ``plain`` first; the file.
    """
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """The same for JSON: its numbers are finite or None, its strings are no enumeration's."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
