"""Weight decay, taken off a layer's update.

An update of few directions beside decay is Δ = c·W + Σ δ·[x; 1]ᵀ, whatever the loss and the steps,
for one number c: the learning rate times λ, summed over the steps. Where c is right, Δ - c·W has
few directions; elsewhere it has as many as W. Of some of these the number is solved for, by turns
with the directions.
"""

from typing import NamedTuple

import torch

SIDE = 64  # a matrix is mixed down to so many rows and columns, which keeps its directions
MOST = 8  # directions beside decay that are looked for
ROUNDS = 8  # of decay -> directions -> decay
LESS = 0.2  # what is left of the next direction where c is right, over what it was
SPARE = 20  # equations, at least, beside those that c and the directions take


class Decay(NamedTuple):
    """What was found of it.

    Attributes
    ----------
    factor
        c.
    directions
        Of the update beside it.
    """

    factor: float
    directions: int


def find(delta: torch.Tensor, weights: torch.Tensor) -> Decay | None:
    """The decay in a layer's update; None where it leaves no fewer directions.

    Parameters
    ----------
    delta
        Δ of the layer, [outputs, inputs].
    weights
        W_t, of the same shape; 0 where nothing decays.
    """
    update, decayed = _mixed(delta, weights)
    size = decayed.square().sum()
    if not size:
        return None
    before = torch.linalg.svdvals(update)
    rows, columns = update.shape
    for count in range(1, MOST + 1):
        if (rows - count) * (columns - count) < SPARE or min(rows, columns) <= count:
            return None
        factor = (decayed * update).sum() / size
        for _ in range(ROUNDS):
            left, _, right = torch.linalg.svd(update - factor * decayed, full_matrices=False)
            outside = _beside(decayed, left[:, :count], right[:count])
            factor = (outside * update).sum() / outside.square().sum()
        after = torch.linalg.svdvals(update - factor * decayed)
        if after[count] < LESS * before[count]:
            return Decay(float(factor), count)
    return None


def _mixed(delta: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, with their rows and columns mixed down to ``SIDE`` at most."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # rows, then columns
        if len(delta) > SIDE:
            mix = torch.randn(SIDE, len(delta), generator=generator, dtype=torch.float64)
            delta, weights = (mix.to(delta) @ each for each in (delta, weights))
        delta, weights = delta.T, weights.T
    return delta, weights


def _beside(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What of a matrix is in no direction of ``left`` [rows, n] and none of ``right``."""
    matrix = matrix - left @ (left.T @ matrix)
    return matrix - (matrix @ right.T) @ right
