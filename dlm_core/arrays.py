"""Images and labels as a user may hold them: what is unambiguous is converted, the rest is refused
in a sentence.

These are annotations for ``check.arguments``: a function that has them gets what they promise.
"""

import numbers
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from dlm_core.check import Must, Wrong, shown

ROUNDING = 1e-6  # by which a pixel may leave [0, 1]: resizing and float32 arithmetic do that
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Pixels:
    """The rule of ``Images``: tensors and NumPy arrays [N, C, H, W] of floating point in [0, 1], or
    of 8-bit values from 0 to 255, which become float32 in [0, 1].
    """

    def convert(self, value: Any) -> Any:
        """A tensor of floating point, where that is unambiguous."""
        images = _tensor(value)
        if images.dtype == torch.uint8 and images.numel() and images.max() == 1:
            raise Wrong("8-bit images from 0 to 255; 0 and 1 alone are given as floating point")
        if images.dtype == torch.uint8:
            return images.to(torch.float32) / 255
        return images

    def check(self, images: torch.Tensor) -> torch.Tensor:
        """The images, where they are some, of floating point and in [0, 1]."""
        if images.ndim != 4 or images.numel() == 0:
            raise Wrong("images [N, C, H, W] in [0, 1], N at least 1")
        if not images.is_floating_point():
            raise Wrong("floating point in [0, 1], or 8-bit values from 0 to 255")
        low, high = float(images.detach().min()), float(images.detach().max())
        if not -ROUNDING <= low <= high <= 1 + ROUNDING:
            found = "NaN" if low != low else f"from {low:g} to {high:g}"
            raise Wrong(f"pixels in [0, 1], and not {found}")
        return images

    def __str__(self) -> str:
        return "images [N, C, H, W] in [0, 1]"


class ClassIndices:
    """The rule of ``Labels``: tensors, NumPy arrays, lists and tuples [N] of whole numbers of at
    least 0, which become int64.
    """

    def convert(self, value: Any) -> Any:
        """A tensor int64, where that is unambiguous."""
        labels = _tensor(value)
        return labels.to(torch.int64) if labels.dtype in WHOLE else labels

    def check(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels, where they are class indices."""
        if labels.dtype != torch.int64 or labels.ndim != 1 or not len(labels):
            raise Wrong("class indices [N], N at least 1")
        if labels.min() < 0:
            raise Wrong(f"class indices of at least 0, and not {int(labels.min())}")
        return labels

    def __str__(self) -> str:
        return "class indices [N]"


class Numbers:
    """The rule of ``Pictures``: tensors and NumPy arrays of any shape and range."""

    def convert(self, value: Any) -> torch.Tensor:
        """A tensor."""
        return _tensor(value)

    def __str__(self) -> str:
        return "images [N, C, H, W]"


class Shape:
    """The rule of ``ImageShape``: three whole numbers, each at least 1, which become a tuple."""

    def convert(self, value: Any) -> Any:
        """The tuple."""
        several = isinstance(value, (tuple, list)) and len(value) == 3
        if several and all(isinstance(n, numbers.Integral) and int(n) >= 1 for n in value):
            return tuple(map(int, value))
        raise Wrong(str(self))

    def __str__(self) -> str:
        return "(channels, height, width), each at least 1"


Images = Annotated[torch.Tensor, Pixels()]
Labels = Annotated[torch.Tensor, ClassIndices()]
Pictures = Annotated[torch.Tensor, Numbers()]
ImageShape = Annotated[Sequence[int], Shape()]
Precision = Annotated[torch.dtype, Must("of floating point", lambda d: d.is_floating_point)]


def for_model(images: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """``images`` in the model's dtype and on its device."""
    return images.to(next(model.parameters()))


def _tensor(value: Any) -> torch.Tensor:
    """An array, a list or a tuple of numbers as a tensor; a tensor as it is."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (np.ndarray, list, tuple)):
        try:
            return torch.tensor(np.array(value))
        except (TypeError, ValueError):  # of objects, or of lists of unlike length
            pass
    raise Wrong(f"a tensor or an array of numbers, and not {shown(value)}")
