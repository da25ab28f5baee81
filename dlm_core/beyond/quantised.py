"""Whether a client rounded its update to few levels before it sent it, as integers of so many bits:
then the update is known to half a level and no better.
"""

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
    (step, zero), (own, zero_s) = (
        (whole, 0.0) if (whole := _step(*each)) else _of_range(*each)
        for each in ((delta, variance), (bias, of_bias))
    )
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


def _step(delta: torch.Tensor, variance: torch.Tensor) -> float:
    """The step of a grid with 0 in it on which all numbers lie; 0 where there is none."""
    moved = (delta != 0).flatten()
    sizes, noise = (each.flatten()[moved] for each in (delta.abs(), NOISE * variance.sqrt()))
    if len(sizes) < FEWEST:
        return 0.0
    largest = float(sizes.max())
    noise = noise + noise.max() + ARITHMETIC * largest  # the largest is rounded as well
    few = slice(FEWEST)
    for step in (largest / levels for levels in LEVELS):
        if all(_on_grid(sizes[part], noise[part], step) for part in (few, slice(None))):
            different = (sizes / step).round().unique()
            return step if len(different) >= DIFFERENT else 0.0
    return 0.0


def _of_range(delta: torch.Tensor, variance: torch.Tensor) -> tuple[float, float]:
    """(the step of a grid from the lowest number to the highest on which all numbers lie, its level
    that is nearest to 0); zeros where there is none.
    """
    low, high = float(delta.min()), float(delta.max())
    if delta.numel() < FEWEST or not high > low:
        return 0.0, 0.0
    above, noise = (delta - low).flatten(), NOISE * variance.sqrt().flatten()
    noise = noise + noise.max() + ARITHMETIC * (high - low)  # the ends are rounded as well
    few = slice(FEWEST)
    for step in ((high - low) / levels for levels in RANGES):
        if not all(_on_grid(above[part], noise[part], step) for part in (few, slice(None))):
            continue
        if len((above / step).round().unique()) >= DIFFERENT:
            return step, low + round(-low / step) * step
    return 0.0, 0.0


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
