"""What a client makes of its pixels before its network sees them: (pixels - mean) / std.

Told to an observer, it becomes the first operation of the network (``normalised``). What is
attacked then takes pixels in [0, 1] again: starts, searches, divisions, pictures and metrics follow
without code of their own. An attack that walks a network layer by layer takes it off (``bare``),
works in the network's own values, and gives its images back as pixels.
"""

import copy
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import nn

from dlm_core import check
from dlm_core.observation import Observation

EXAMPLES = (
    "a mean and a std above 0 per channel, as ([0.5], [0.5]) or '0.5/0.5', "
    "or a range that has 0 in it or begins there, as (-1, 1) or 'range=-1,1'"
)


@dataclass(frozen=True)
class Normalisation:
    """The network sees (pixels - mean) / std.

    Attributes
    ----------
    mean, std
        One number a channel, or one for all; of pixels in [0, 1], std above 0.
    name
        Its key in ``KNOWN``, or how it was told.

    Notes
    -----
    Called by ``torch`` as a hook of the network, before each forward pass.
    """

    mean: tuple[check.Finite, ...]
    std: tuple[check.Positive, ...]
    name: str

    def __post_init__(self) -> None:
        check.fields(self)
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"std is {self.std}; it takes one number for each of mean, {self.mean}"
            )

    def __call__(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a forward pass, whose first are the images."""
        return self.values(given[0]), *given[1:]

    def values(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the network sees, [..., C, H, W], of pixels [..., C, H, W]."""
        mean, std = self._like(pixels)
        return (pixels - mean) / std

    def pixels(self, values: torch.Tensor) -> torch.Tensor:
        """The pixels of what the network sees."""
        mean, std = self._like(values)
        return values * std + mean

    def errors(self, errors: torch.Tensor) -> torch.Tensor:
        """The errors [..., C, H, W] of pixels, from those of what the network sees."""
        return errors * self._like(errors)[1]

    @property
    def error(self) -> float:
        """Root mean square of an image's errors in pixels over those of what the network sees."""
        return (sum(std**2 for std in self.std) / len(self.std)) ** 0.5

    def _like(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[mean, std] as [C, 1, 1]."""
        both = (self.mean, self.std)
        made = [torch.tensor(each, dtype=images.dtype, device=images.device) for each in both]
        return [each[:, None, None] for each in made]

    def __str__(self) -> str:
        return self.name


def _known(name: str, mean: Sequence[float], std: Sequence[float]) -> Normalisation:
    return Normalisation(tuple(mean), tuple(std), name)


KNOWN = {
    each.name: each
    for each in (
        _known("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        _known("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        _known("cifar10_short", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        _known("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        _known("mnist", (0.1307,), (0.3081,)),
        _known("fashion_mnist", (0.2860,), (0.3530,)),
        _known("half", (0.5,), (0.5,)),
        _known("bytes", (0.0,), (1 / 255,)),
    )
}
"""The usual normalisations, by name: constants that clients copy from each other.

"imagenet" is that of torchvision's pretrained models (its documentation, "Models and pre-trained
weights"); "mnist" that of the examples of PyTorch (github.com/pytorch/examples, mnist/main.py);
"half" that of PyTorch's and Flower's tutorials, which takes [0, 1] to [-1, 1]; "bytes" are pixels
from 0 to 255, which were never divided. "cifar10",
"cifar100" and "fashion_mnist" are mean and std of all training pixels, to four digits;
"cifar10_short" has the smaller stds of github.com/kuangliu/pytorch-cifar, means over images of each
image's own (its issue 19).
"""


class _AsTold:
    """The rule of ``Told``."""

    def convert(self, value: Any) -> Any:
        """A ``Normalisation``, where that is unambiguous."""
        if isinstance(value, Normalisation):
            return value
        try:
            return KNOWN.get(value) or _parsed(value) if isinstance(value, str) else _parsed(value)
        except (TypeError, ValueError, OverflowError):
            raise check.Wrong(f"a name ({', '.join(KNOWN)}), {EXAMPLES}") from None


Told = Annotated[Normalisation, _AsTold()]


def _parsed(given: Any) -> Normalisation:
    """Of a pair, or of a text; ValueError or TypeError where it is neither."""
    if isinstance(given, str):
        low_high = given.removeprefix("range=").split(",")
        if given.startswith("range=") and len(low_high) == 2:
            return _of_range(*map(float, low_high))
        mean, std = given.split("/")
        return _of_channels(mean.split(","), std.split(","))
    first, second = given
    if isinstance(first, numbers.Real) and isinstance(second, numbers.Real):
        return _of_range(float(first), float(second))
    return _of_channels(list(first), list(second))


def _of_range(low: float, high: float) -> Normalisation:
    """Pixels from ``low`` to ``high``; not (0.13, 0.31), which are a mean and a std."""
    if not -torch.inf < low <= 0 < high < torch.inf:
        raise ValueError
    width = high - low
    return Normalisation((-low / width,), (1 / width,), f"range={low:g},{high:g}")


def _of_channels(mean: Sequence[Any], std: Sequence[Any]) -> Normalisation:
    means, stds = (tuple(float(each) for each in part) for part in (mean, std))
    name = "/".join(",".join(f"{each:g}" for each in part) for part in (means, stds))
    return Normalisation(means, stds, name)


def check_channels(told: Normalisation, channels: int) -> None:
    """Raise ValueError where it is of another number of channels."""
    count = len(told.mean)
    if count not in (1, channels):
        raise ValueError(
            f"normalise is {told.name!r}, of {count} channels; the images have {channels}"
        )


@check.arguments
def normalised(model: nn.Module, normalise: Told) -> nn.Module:
    """A copy of a network that normalises its images first: it takes pixels in [0, 1].

    Parameters
    ----------
    model
        Whose parameters keep their names.
    normalise
        A name of ``KNOWN``; a mean and a std per channel, as ([0.5], [0.5]) or "0.5/0.5"; a range,
        as (-1, 1) or "range=-1,1"; or a ``Normalisation``.

    Raises
    ------
    ValueError
        For what is none of these, and for a network that normalises so already.
    """
    if told_to(model) is not None:
        raise ValueError(f"the model is normalised already, by {told_to(model)}")
    copied = copy.deepcopy(model)
    copied.register_forward_pre_hook(normalise, prepend=True)
    return copied


def told_to(model: nn.Module) -> Normalisation | None:
    """What ``normalised`` has put in front of a network."""
    hooks = model._forward_pre_hooks.values()
    return next((each for each in hooks if isinstance(each, Normalisation)), None)


def bare(seen: Observation) -> tuple[Observation, Normalisation | None]:
    """(the same client, whose network sees what it saw there; what was in front of it)."""
    told = told_to(seen.model)
    if told is None:
        return seen, None
    model = copy.deepcopy(seen.model)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, Normalisation):
            del model._forward_pre_hooks[key]
    return replace(seen, model=model), told
