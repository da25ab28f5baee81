"""A network of one's own by the name of a function that makes it, for the command line."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def network(name: str, image_shape: Sequence[int], num_classes: int | None) -> nn.Module:
    """The network that ``package.module:factory`` makes. The module's code is run.

    Parameters
    ----------
    name
        A module that can be imported, from the current folder too, and a function or class in it.
    image_shape, num_classes
        For a factory that takes arguments of these names; no number of classes where None.

    Raises
    ------
    ValueError
        In one sentence, whatever the user's code raises.
    """
    from torch import nn

    from dlm_core.harness.look import sentence

    asked = f"--model is {name!r}"
    module, _, path = name.partition(":")
    parts = [*module.split("."), *path.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{asked}; it takes a network's name, or package.module:factory")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{asked}; importing {module} failed ({sentence(error)})") from None
    for part in path.split("."):
        if not hasattr(made, part):
            raise ValueError(f"{asked}; {module} has no {path}")
        made = getattr(made, part)
    if isinstance(made, nn.Module):
        return made
    if not callable(made):
        raise ValueError(f"{asked}; {path} is {type(made).__name__}, no function or class")
    about = {"image_shape": tuple(image_shape), "num_classes": num_classes}
    try:
        made = made(**_taken(made, about))
    except (Exception, SystemExit) as error:
        hint = "" if num_classes else "; --num-classes is not given, if it takes num_classes"
        raise ValueError(f"{asked}; calling {path} failed ({sentence(error)}){hint}") from None
    if not isinstance(made, nn.Module):
        raise ValueError(f"{asked}; {path} returned {type(made).__name__}, no nn.Module")
    return made


def _taken(factory: Any, about: dict[str, Any]) -> dict[str, Any]:
    """Those of ``about`` that are known and that the factory takes."""
    try:
        named = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # something built in
        return {}
    return {name: value for name, value in about.items() if name in named and value is not None}
