"""The patches of an image, from the updates of a transformer's first layer and of the positions
that it learns.

A position that is added to what the layer makes of each patch moves by that patch's own signal:

    Δ_P[t] = δ_t,    Δ_W = Σ_t δ_t x_tᵀ = Δ_Pᵀ X,

so that X follows by least squares, whatever the loss (Lu et al., APRIL, CVPR 2022). Of several
images or steps no X fits, where a patch has more outputs than there are patches.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core.beyond.moves import ARITHMETIC, largest_of
from dlm_core.beyond.tracing import NOISE, Traced

TOKENS = 2  # in front of the patches, at most, that have positions as well: a class's, a teacher's
FITS = 3.0  # times what rounding explains, up to which patches explain the layer's update
SPARE = 4  # outputs beside the patches, from which they are tested by that

LAYERS = (nn.Linear, nn.Conv2d)  # that may see patches


class Patches(NamedTuple):
    """A layer and its positions, whose gradients are those of patches.

    Attributes
    ----------
    weight, position
        Names of the parameters.
    tokens
        Positions in front of those of the patches.
    inputs
        [5, T·p] what ``Traced.probes`` leave of patches.
    number
        T.
    """

    weight: str
    position: str
    tokens: int
    inputs: torch.Tensor
    number: int


class Solved(NamedTuple):
    """What was solved for.

    Attributes
    ----------
    values
        [T·p] the patches.
    error
        Of them from rounding, root mean square, relative to theirs.
    open
        Directions among the patches that the update leaves open: there ``values`` are 0.
    tested
        Whether one image in one step alone leaves such an update, and not just some patches.
    """

    values: torch.Tensor
    error: float
    open: int
    tested: bool


def found(traced: Traced) -> Iterator[Patches]:
    """The layers of patches that a network has, with their positions."""
    parameters = {n: p for n, p in traced.model.named_parameters() if p.is_floating_point()}
    layers = {n: each for n, each in traced.model.named_modules() if isinstance(each, LAYERS)}
    weights = {f"{name}.weight" for name in layers}
    free = {n: p for n, p in parameters.items() if n not in weights and p.ndim > 1}
    convolved = next((n for n, each in layers.items() if isinstance(each, nn.Conv2d)), None)
    for name, module in layers.items():
        weight, first = f"{name}.weight", name == convolved or name in traced.fixed
        if not (first and _cuts(module) and weight in parameters):
            continue
        outputs = len(parameters[weight])
        places = {n: p.numel() // outputs for n, p in free.items() if p.shape[-1] == outputs}
        entered = _entered(traced, module) if places else None
        if entered is None:
            continue
        count = entered.shape[1]
        for position, number in places.items():
            if 0 <= number - count <= TOKENS:
                made = Patches(weight, position, number - count, entered.flatten(1), count)
                if all(_is_made_of(traced, made, i) for i in (3, 4)):
                    yield made


def solve(
    patches: Patches,
    of_weight: tuple[torch.Tensor, torch.Tensor],
    of_position: tuple[torch.Tensor, torch.Tensor],
) -> Solved | None:
    """The patches of one image in one step; None where the updates are not theirs.

    Parameters
    ----------
    patches
        The layer.
    of_weight, of_position
        Moves of its weight and of the positions, and the variances of their rounding.
    """
    weight, variance = (each.flatten(1).T for each in of_weight)  # [p, outputs]
    signals, of_signals = (
        each.reshape(-1, weight.shape[1])[patches.tokens :] for each in of_position
    )
    left, sizes, right = torch.linalg.svd(signals, full_matrices=False)
    used = sizes > NOISE * largest_of(of_signals) + ARITHMETIC * sizes[0]
    left, sizes, right = left[:, used], sizes[used], right[used]
    if not len(sizes):
        return None
    x = left @ ((right @ weight.T) / sizes[:, None])  # [T, p]
    noise = variance.mean() + of_signals.mean() * x.square().sum(0).mean()
    rest = (weight.T - signals.T @ x).square().sum().sqrt()
    spare = weight.shape[1] - len(sizes)
    expected = (spare * len(weight) * noise).sqrt() + ARITHMETIC * weight.norm()
    if float(rest) > FITS * float(expected):
        return None
    error = float(((noise / sizes.square()).sum() / len(x)).sqrt() / x.square().mean().sqrt())
    missing = len(x) - len(sizes)
    return Solved(x.flatten(), error + ARITHMETIC, missing, spare >= SPARE)


def _cuts(module: nn.Module) -> bool:
    """Whether a layer may see patches that do not overlap."""
    if isinstance(module, nn.Linear):
        return True
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
        and math.prod(module.dilation) == 1
    )


def _entered(traced: Traced, module: nn.Module) -> torch.Tensor | None:
    """[5, T, p] what enters the layer of the probes; None where it is not called once for each, or
    sees no patches.
    """
    entered = []
    for probe in traced.probes:
        given = traced.entering(module, probe.reshape(1, *traced.shape))
        if given is None:
            return None
        if isinstance(module, nn.Conv2d):
            entered.append(F.unfold(given, module.kernel_size, stride=module.stride)[0].T)
        else:
            entered.append(given.flatten(0, -2))
    return torch.stack(entered) if len(entered[0]) > 1 else None


def _is_made_of(traced: Traced, patches: Patches, number: int) -> bool:
    """Whether the gradients for a probe are Δ_W = Δ_Pᵀ X, in training as well."""
    image = traced.probes[number].reshape(1, *traced.shape)
    x = patches.inputs[number].reshape(patches.number, -1)
    for train in (False, True):
        try:
            weight, position = traced.gradients(
                patches.weight, patches.position, image, train=train
            )
        except Exception:  # whatever a user's network raises
            return False
        weight = weight.flatten(1)
        signals = position.reshape(-1, len(weight))[patches.tokens :]
        if not weight.any() or not traced.close(signals.T @ x, weight):
            return False
    return True
