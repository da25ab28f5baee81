"""Stands in for a GPU: a tensor that is made without a word about its device is refused beside one
that lies where the network does.

On a GPU PyTorch raises an error there; on a CPU nothing is seen of it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {
    getattr(torch, name)
    for name in (
        *("arange", "as_tensor", "empty", "eye", "from_numpy", "full", "linspace", "ones"),
        *("rand", "randint", "randn", "randperm", "tensor", "zeros"),
    )
}
# Of these one may be on the CPU: it is brought to the other, or says where to look.
PLACING = {"__getitem__", "__setitem__", "copy_", "type_as"}
PLACES = (torch.Tensor, torch.device, str, int)


class Elsewhere(TorchFunctionMode):
    """Within it, what was there before lies on a device that none finds by itself."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(_tensors([args, kwargs]))
        found = function(*args, **kwargs)
        unplaced = [each for each in given if is_unplaced(each)]
        placed = [each for each in given if not is_unplaced(each)]
        name = getattr(function, "__name__", "")
        if function in FACTORIES:
            if kwargs.get("device") is None and not placed:
                _mark(found, True)
        elif name == "to" and unplaced:
            _mark(found, not any(_is_place(each) for each in [*args[1:], *kwargs.values()]))
        elif unplaced and not placed:
            _mark(found, True)
        elif name not in PLACING and _vectors(unplaced) and _vectors(placed):
            shapes = [tuple(each.shape) for each in unplaced]
            raise RuntimeError(f"{name}: tensors of shapes {shapes} have no device of their own")
        return found


def _vectors(tensors: list[torch.Tensor]) -> bool:
    """Whether there are some: a single number may lie anywhere."""
    return any(each.ndim for each in tensors)


def is_unplaced(tensor: torch.Tensor) -> bool:
    """Whether it was made without a word about its device."""
    return tensor.__dict__.get("unplaced", False)


def _is_place(given: Any) -> bool:
    return isinstance(given, PLACES) and not isinstance(given, bool)


def _mark(found: Any, unplaced: bool) -> None:
    for tensor in _tensors(found):
        tensor.__dict__["unplaced"] = unplaced


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
