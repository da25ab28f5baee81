"""What a network itself tells before any attack, in sentences: what of its output is taken for
scores, and what of an update it leaves open.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dlm_core.observation import scores
from dlm_core.threads import own_generator


def of_network(model: nn.Module, image_shape: Sequence[int]) -> list[str]:
    """What to say of a network; nothing where it does not take an image from black to white.

    Parameters
    ----------
    model
        Of the client.
    image_shape
        (C, H, W).
    """
    like = next(model.parameters(), torch.zeros(()))
    image = torch.linspace(0, 1, math.prod(image_shape)).reshape(1, *image_shape).to(like)
    copied = copy.deepcopy(model)
    try:
        said = [*_returned(_passed(copied.eval(), image, 0))]
    except Exception:  # whatever a user's network raises
        return []
    alone = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in copied.modules())
    try:
        random = draws(copied.train(), image)
    except Exception:
        alone = True
    else:
        if random:
            said.append(
                "two forward passes of one image differ in train mode (dropout, noise or the "
                "like): searches do not know what the client drew, and explain its update in part"
            )
    if alone:
        said.append(
            "batch norm takes statistics of the client's whole batch: searches here pass images "
            "through it together, so that the number of images must be right, or the client in "
            "eval mode"
        )
    return said


def draws(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether two passes of the same images differ by chance, in the mode that a network is in."""
    apart = (copy.deepcopy(model) for _ in range(2))  # a pass may move buffers
    first, second = (scores(_passed(each, images, seed)) for seed, each in enumerate(apart))
    return not torch.equal(first.nan_to_num(), second.nan_to_num())


def alone(returned: Any) -> Any:
    """The class scores among what a network returned; all of it where none are."""
    try:
        return scores(returned)
    except ValueError:
        return returned


def insists(model: nn.Module, image_shape: Sequence[int]) -> bool:
    """Whether a network takes an image in its own precision alone, and none in float64."""
    try:
        copied = copy.deepcopy(model).eval().double()
        _passed(copied, torch.full((1, *image_shape), 0.5).to(next(copied.parameters())), 0)
    except Exception:  # whatever a user's network raises
        return True
    return False


def precise(model: nn.Module, image_shape: Sequence[int]) -> nn.Module:
    """A copy in float64, or in the network's own precision where it ``insists`` on that."""
    copied = copy.deepcopy(model)
    return copied if insists(model, image_shape) else copied.double()


def _passed(model: nn.Module, images: torch.Tensor, seed: int) -> Any:
    with torch.no_grad(), own_generator(seed=seed, device=images.device):
        return model(images)


def _returned(output: Any) -> Iterator[str]:
    """What of an output is taken for the class scores."""
    taken = scores(output)
    if not isinstance(output, torch.Tensor):
        several = isinstance(output, (Mapping, list, tuple))
        many = f" of {len(output)}" if several else ""
        which = "logits" if hasattr(output, "logits") or "logits" in _keys(output) else "first"
        yield (
            f"the network returns a {type(output).__name__}{many}; "
            f"its {which} {'are' if which == 'logits' else 'is'} taken for the class scores"
        )
    if taken.ndim == 2 and taken.shape[1] == 1:
        yield (
            "the network has one output: its loss is no cross-entropy of a softmax, which the "
            "other attacks here assume, so that none but the division is tried"
        )


def _keys(output: Any) -> list[Any]:
    return list(output) if isinstance(output, Mapping) else []
