"""Whether a network leaves the same update of an image and of its mirror image, or of one that is
turned: then no search can tell which of them the client had.
"""

from collections.abc import Callable

import torch
from torch import nn

from dlm_core import objectives
from dlm_core.beyond.attention import plain_attention
from dlm_core.federated import loss as training_loss
from dlm_core.harness import clues
from dlm_core.observation import Observation
from dlm_core.threads import own_generator

ALIKE = 1e-5  # how far apart, relative, two updates are that differ by arithmetic alone
# {in words: [N, C, H, W] -> the same}.
OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "its mirror image": lambda x: x.flip(-1),
    "it upside down": lambda x: x.flip(-2),
    "it turned by half": lambda x: x.flip(-2, -1),
    "it turned by a quarter": lambda x: x.rot90(1, (-2, -1)),
    "its mirror image in the diagonal": lambda x: x.transpose(-2, -1),
}


def against(seen: Observation) -> str | None:
    """What speaks against any picture that a search finds; None for nothing, or where a network
    does not tell.

    Parameters
    ----------
    seen
        What the observer sees.
    """
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(1, *seen.image_shape, generator=draw)
    try:
        model = clues.precise(seen.model, seen.image_shape)
        own = _gradient(model, image)
        turned = {name: turn(image) for name, turn in OTHERS.items()}
        fit = {name: each for name, each in turned.items() if _another(each, image)}
        same = next((name for name, each in fit.items() if _same(model, each, own)), None)
    except Exception:  # whatever a user's network raises
        return None
    if same is None:
        return None
    return (
        f"of an image and of {same} this network leaves the same update: which of them the client "
        "had is not told"
    )


def _another(turned: torch.Tensor, image: torch.Tensor) -> bool:
    """Whether an image that was turned is of the same shape, and not the image itself, as one of a
    single row is upside down.
    """
    return turned.shape == image.shape and not torch.equal(turned, image)


def _same(model: nn.Module, image: torch.Tensor, expected: list[torch.Tensor]) -> bool:
    """Whether an image leaves the update that is expected."""
    rest = [a - b for a, b in zip(_gradient(model, image), expected)]
    return _length(rest) <= ALIKE * _length(expected)


def _length(update: list[torch.Tensor]) -> float:
    return float(torch.stack([each.norm() for each in update]).norm())


def _gradient(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    weight = next(model.parameters())
    label = torch.zeros(1, dtype=torch.int64, device=weight.device)
    with plain_attention(), own_generator(seed=0, device=weight.device):
        found = objectives.gradient(model, training_loss, image.to(weight), label)
    return [each.detach().double() for each in found]
