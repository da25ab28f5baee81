"""A layer's move between two snapshots, and the directions in it: how many stand above rounding,
and what else than gradients changed it.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from dlm_core.beyond import decay, quantised
from dlm_core.beyond.rounding import Transmitted, precision_of
from dlm_core.beyond.tracing import NOISE
from dlm_core.observation import TINY, unit_in_last_place

ARITHMETIC = 4e-6  # of the largest singular value: what the client's float32 arithmetic leaves
# How nearly, and how many, entries move by the largest amount in a first step of Adam's kin.
EVEN, MANY = 0.02, 0.3
GAP = 2.5  # between the singular values of inputs and those of what else changed an update
HALF, EIGHTH = 2.0**-8, 2.0**-4  # of bfloat16's numbers and those of 8 bits, what rounding leaves
HALVED = 0.75  # of entries, that differ by no more than that from those of one direction
LEFT = 0.01  # what else changed it, of the first singular value, up to which an input is shown
ROUGH = 0.1  # the same where that is rounding of each number to a few bits


class Spectrum(NamedTuple):
    """The directions of a matrix.

    Attributes
    ----------
    values
        Singular values, falling.
    vectors
        Of its smaller side, in columns, in the same order.
    limit
        What rounding and the client's arithmetic leave of a singular value.
    half
        The same for a client that computes gradients in half precision.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    limit: float
    half: float

    @property
    def rank(self) -> int:
        """Directions above the limit."""
        return int((self.values > self.limit).sum())

    @property
    def standing(self) -> int:
        """Those of them that stand out: up to the last after which there is a gap."""
        following = torch.cat([self.values[1:], self.values.new_zeros(1)])
        gaps = (self.values > GAP * following)[: self.rank].nonzero()
        return int(gaps.max()) + 1 if len(gaps) else 0

    @property
    def large(self) -> int:
        """The same where several are so small that arithmetic in half precision leaves them: those
        above these.
        """
        large = int((self.values > self.half).sum())
        return large if self.rank > large + 1 else self.standing

    @property
    def largest(self) -> float:
        """The first singular value."""
        return float(self.values[0])


class Moved(NamedTuple):
    """A tensor's move: Δ, the variance of its rounding, and W_t; of a weight the error that
    rounding to levels leaves in all rows alike.
    """

    delta: torch.Tensor
    variance: torch.Tensor
    before: torch.Tensor
    shared: float = 0.0

    @classmethod
    def of_both(cls, weight: "Moved", bias: "Moved | None") -> "Moved":
        """Of a layer's weight and bias together: [outputs, inputs (+ 1)]."""
        if bias is None:
            return weight
        pairs = zip(weight[:3], bias[:3])
        delta, variance, before = (torch.cat([w, b[:, None]], 1) for w, b in pairs)
        return cls(delta, variance, before, weight.shared)


class Move(NamedTuple):
    """A layer's move without its weight decay, and the directions in it.

    Attributes
    ----------
    delta, variance
        [outputs, features], or with the bias [outputs, features + 1].
    decay
        What multiple of the weights was taken off.
    scaled
        Whether the bias is its last column.
    spectrum
        Of ``delta``.
    rank, standing
        As of ``LayerInput``.
    beside
        What else is in it: the other directions, and an error that all rows share, of the first.
    one
        Whether it is one direction, or one that stands alone.
    """

    delta: torch.Tensor
    variance: torch.Tensor
    decay: float
    scaled: bool
    spectrum: Spectrum
    rank: int
    standing: int
    beside: float
    one: bool

    @classmethod
    def of(cls, weight: Moved, bias: Moved | None, *, images: bool = False) -> "Move":
        """Of a layer's weight and bias; whether nothing but ``images`` are its inputs, and not
        steps.
        """
        scaled = bias is not None and bool(bias.delta.any())
        whole = Moved.of_both(weight, bias if scaled else None)
        (delta, variance, *_), spectrum, decayed = _without_decay(whole, scaled)
        full = min(weight.delta.shape)
        rank = standing = _rank(weight.delta, delta, spectrum.rank)
        if 1 < rank < full:  # features of several images are more alike than half precision tells
            standing = spectrum.large if images else spectrum.standing
        largest = max(spectrum.largest, TINY)
        beside = float(spectrum.values[1:].norm()) / largest if rank > 1 else 0.0
        halved = 1 < rank == full and _halved(delta, variance, spectrum, scaled)
        if halved:
            standing = 1
        read = rank == 1 or (1 < rank < full and images) or halved
        one = read and standing == 1 and beside <= (ROUGH if halved else LEFT)
        shown = (rank, standing, math.hypot(beside, weight.shared), one)
        return cls(delta, variance, decayed, scaled, spectrum, *shown)

    @property
    def left(self) -> torch.Tensor:
        """[outputs] its first direction among them."""
        return _left(self.delta, self.spectrum)

    @property
    def hidden(self) -> float:
        """The relative size of a direction that rounding hides."""
        return self.spectrum.limit / self.spectrum.largest


def moved_of(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], name: str
) -> Moved | None:
    """How a tensor moved; None where a snapshot lacks it."""
    if name not in before or name not in after:
        return None
    old, new = before[name].detach(), after[name].detach().to(before[name].device)
    old, variance = old.double(), unit_in_last_place(new).square() / 12
    return Moved(old - new.double(), variance, old)


def as_sent(
    weights: Mapping[str, torch.Tensor], transmitted: Transmitted | None
) -> dict[str, torch.Tensor]:
    """The weights in the precision that each was rounded to, where that is not its own."""
    found = {}
    for name, w in weights.items():
        sent = precision_of(name, transmitted)
        found[name] = w.to(sent) if sent and w.is_floating_point() else w
    return found


def to_levels(weight: Moved, bias: Moved | None) -> tuple[Moved, Moved | None]:
    """Both, known as well as the levels allow to which a client rounded its update."""
    none = weight.delta.new_zeros(2, len(weight.delta))
    of_bias = none if bias is None else (bias.delta, bias.variance)
    levels = quantised.of_layer(weight.delta, weight.variance, *of_bias)
    if levels is None:
        return weight, bias
    if bias is not None:
        of_bias_s = bias.variance + levels.of_bias
        delta = _with_zero(bias.delta, of_bias_s, levels.zeros[1])
        bias = bias._replace(delta=delta, variance=of_bias_s)
    variance = weight.variance + levels.of_weight
    delta = _with_zero(weight.delta, variance, levels.zeros[0])
    return weight._replace(delta=delta, variance=variance, shared=levels.shared), bias


def _with_zero(delta: torch.Tensor, variance: torch.Tensor, zero: float) -> torch.Tensor:
    """A move in which the level that stands for 0 is 0."""
    if zero == 0:
        return delta
    return torch.where((delta - zero).abs() <= variance.sqrt(), 0.0, delta)


def _without_decay(moved: Moved, scaled: bool) -> tuple[Moved, Spectrum, float]:
    """(a layer's move without its weight decay, its directions, c): of the bias as well, or of the
    weight alone, as some clients set it; the move as it is and 0 where that leaves no fewer
    directions.
    """
    spectrum = _spectrum(moved.delta, moved.variance)
    if spectrum.rank < 2:
        return moved, spectrum, 0.0
    weight_s = moved.before.clone()
    if scaled:
        weight_s[:, -1] = 0
    best, least, factor = moved, spectrum.rank, 0.0
    for decayed in (moved.before, weight_s):
        found = decay.find(moved.delta, decayed)
        if found is None or found.directions >= least:
            continue
        without = moved._replace(delta=moved.delta - found.factor * decayed)
        left = _spectrum(without.delta, moved.variance)
        if left.rank <= found.directions:
            best, spectrum, least, factor = without, left, found.directions, found.factor
    return best, spectrum, factor


def _rank(of_weight: torch.Tensor, delta: torch.Tensor, rank: int) -> int:
    """The directions of a layer's update: none where its weight stood still, all that there can be
    where they are as many as rows or columns that moved, or where ``delta`` has signs alone.
    """
    if not of_weight.any():
        return 0
    every = sign_like(delta) or rank >= max(2, _moving(of_weight))
    return min(of_weight.shape) if every else rank


def _moving(delta: torch.Tensor) -> int:
    """The most directions that the rows and columns that moved at all can have."""
    moved = delta != 0
    return int(min(moved.any(0).sum(), moved.any(1).sum()))


def _halved(delta: torch.Tensor, variance: torch.Tensor, spectrum: Spectrum, scaled: bool) -> bool:
    """Whether an update is one direction and what rounding to half precision or to 8 bits leaves of
    it: of most entries, of the small ones as well, and of the bias's where that is the last column
    (``scaled``), a share of their own size, which noise does not leave.
    """
    second = float(spectrum.values[1])
    shares = [share for share in (HALF, EIGHTH) if second <= share / HALF * spectrum.half]
    if not shares or sign_like(delta):
        return False
    left, moved = _left(delta, spectrum), delta != 0
    rest = (delta - torch.outer(left, left @ delta)).abs()
    small = moved & (delta.abs() <= delta[moved].abs().median())
    for share in shares:
        rounded = rest <= share * delta.abs() + NOISE * variance.sqrt()
        parts = [rounded[small], rounded[moved], *([rounded[:, -1]] if scaled else [])]
        if all(each.double().mean() > HALVED for each in parts):
            return True
    return False


def sign_like(delta: torch.Tensor) -> bool:
    """Whether the entries that moved did by the same amount, as in a first step of Adam's kin: the
    signs of a matrix of rank one are one, too, and tell no input.
    """
    moved = delta[delta != 0].abs()
    return bool((moved > (1 - EVEN) * moved.max()).double().mean() > MANY)


def _spectrum(delta: torch.Tensor, variance: torch.Tensor) -> Spectrum:
    outputs, inputs = delta.shape
    # of the smaller side: singular values below 1e-8 of the first do not matter
    square = delta @ delta.T if outputs <= inputs else delta.T @ delta
    squares, vectors = torch.linalg.eigh(square)
    values = squares.clamp(min=0).flip(0).sqrt()
    rounding, size = largest_of(variance), largest_of(delta.square())
    limit = max(NOISE * rounding, ARITHMETIC * float(values[0]))
    return Spectrum(values, vectors.flip(1), limit, max(limit, HALF * size))


def largest_of(squares: torch.Tensor) -> float:
    """The largest singular value, about, of a matrix of numbers drawn with these mean squares: by
    the largest row and column, not the mean, as large weights are rounded more coarsely.
    """
    return sum(float(squares.sum(side).max().sqrt()) for side in (0, 1))


def _left(delta: torch.Tensor, found: Spectrum) -> torch.Tensor:
    """The first direction among the outputs."""
    first = found.vectors[:, 0]
    return first if delta.shape[0] <= delta.shape[1] else delta @ first / found.largest
