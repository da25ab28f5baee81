"""Whether a client rounded its update to few levels before it sent it, as integers of so many bits:
then the update is known to half a level and no better.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dlm_core.beyond.tracing import NOISE

LEVELS = [2**bits - 1 for bits in range(2, 8)]  # above 0, of signed integers of 3 to 8 bits
# From the lowest to the highest of 3 to 8 bits; one less where 0 is one of them.
RANGES = [2**bits - less for bits in range(3, 9) for less in (1, 2)]
FEWEST = 8  # numbers from which a grid is read
MANY = 31  # levels that no image's grey values have by chance
DIFFERENT = 3  # of them, at least: those of signs are of one size
SOME = 8  # rows that are asked first
OFF = 0.05  # of a step, up to which numbers are on its grid, rounding of the weights included
ARITHMETIC = 1e-6  # of the largest number, what the client's own leaves
ROWS = 0.9  # of them, that are on grids of their own


class Levels(NamedTuple):
    """What rounding to levels adds.

    Attributes
    ----------
    of_weight, of_bias
        Variance of each entry.
    shared
        Error, relative, that is the same in all rows, so that no mean over them makes it less:
        where each row has levels of its own.
    zeros
        (of the weight, of the bias): the level that stands for 0, where the grid has none.
    """

    of_weight: torch.Tensor
    of_bias: torch.Tensor
    shared: float = 0.0
    zeros: tuple[float, float] = (0.0, 0.0)


def of_layer(
    delta: torch.Tensor, variance: torch.Tensor, bias: torch.Tensor, of_bias: torch.Tensor
) -> Levels | None:
    """What rounding to levels adds to a layer's move; None where its weight has none.

    Parameters
    ----------
    delta, variance
        [outputs, features] a weight's move, and the variance of its own rounding.
    bias, of_bias
        [outputs] the same of its bias. Of an image of few grey values each row has levels as well,
        and so they are believed where the bias has levels, too, or speaks of others.
    """
    step, zero = _grid(delta, variance)
    own, zero_s = _grid(bias, of_bias)
    added = torch.full_like(bias, own**2 / 12)
    if step:
        return Levels(torch.full_like(delta, step**2 / 12), added, zeros=(zero, zero_s))
    full = ((delta != 0).sum(1) >= FEWEST).nonzero()[:, 0]
    steps = delta.new_zeros(len(delta))
    for rows in (full[:SOME], full):
        steps[rows] = delta.new_tensor([_step(delta[row], variance[row]) for row in rows])
        if not len(rows) or (steps[rows] > 0).double().mean() < ROWS:
            return None
    if not (own or _of_update(delta, steps, bias)):
        return None
    of_weight = (steps.square() / 12)[:, None].expand_as(delta)
    shared = float((of_weight[delta != 0].sum() / delta.square().sum()).sqrt())
    return Levels(of_weight, added, shared)


def _grid(delta: torch.Tensor, variance: torch.Tensor) -> tuple[float, float]:
    """(the step of a grid on which all numbers lie, its level that stands for 0); zeros where there
    is none. The grid has 0 in it, or goes from the lowest number to the highest.
    """
    step = _step(delta, variance)
    if step or not delta.numel():
        return step, 0.0
    low, high = float(delta.min()), float(delta.max())
    step = _finest(delta - low, variance, high - low, RANGES)
    if not step:
        return 0.0, 0.0
    zero = low + round(-low / step) * step
    sizes = ((delta - zero) / step).round().abs()
    different = len(sizes[sizes > 0].unique())  # those of signs are of one size
    return (step, zero) if different >= DIFFERENT else (0.0, 0.0)


def _step(delta: torch.Tensor, variance: torch.Tensor) -> float:
    """The step of a grid with 0 in it on which all numbers lie; 0 where there is none."""
    moved = delta != 0
    if not moved.any():
        return 0.0
    sizes = delta[moved].abs()
    return _finest(sizes, variance[moved], float(sizes.max()), LEVELS)


def _finest(
    sizes: torch.Tensor, variance: torch.Tensor, largest: float, levels: Sequence[int]
) -> float:
    """The step of which all ``sizes`` are multiples and ``largest`` is so many; 0 where it is not
    so, or they are few.
    """
    sizes, noise = sizes.flatten(), NOISE * variance.sqrt().flatten()
    if len(sizes) < FEWEST or not largest > 0:
        return 0.0
    noise = noise + noise.max() + ARITHMETIC * largest  # the largest is rounded as well
    few = slice(FEWEST)
    for step in (largest / number for number in levels):
        if all(_on_grid(sizes[part], noise[part], step) for part in (few, slice(None))):
            different = (sizes / step).round().unique()
            return step if len(different) >= DIFFERENT else 0.0
    return 0.0


def _on_grid(sizes: torch.Tensor, noise: torch.Tensor, step: float) -> bool:
    off = sizes - (sizes / step).round() * step
    return bool((noise < OFF * step).all()) and bool((off.abs() <= noise).all())


def _of_update(delta: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether rows have levels of their own, and not because the input has: its grey values are
    whole parts of the bias's move, the same in all rows, and other than the rows' own.
    """
    used = (steps > 0) & (bias != 0)
    parts = bias[used].abs() / steps[used]
    if not len(parts) or float(parts.std()) > OFF * float(parts.mean()):
        return False
    part, own = (float(each.median()) for each in (parts, delta[used].abs().amax(1) / steps[used]))
    if part < own - OFF:  # of pixels beyond [0, 1], whose grey values may have any size
        return own >= MANY
    return abs(part - round(part)) > OFF or abs(part - own) <= OFF
