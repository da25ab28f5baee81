"""Weights that are no linear layer's and are used as one's: a convolution as large as its input, a
matrix of the network's own, a recurrent layer's for its first input.

Where the update of such a weight is that of its bias times one vector, and the network's gradients
are so for any image, the vector is what the weight was multiplied with. The same ratio shows the
input of a layer whose entries were changed one by one (``by_entries``), and inputs of a batch that
some outputs saw alone (``shared_by_rows``).
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from dlm_core.beyond.moves import ARITHMETIC
from dlm_core.beyond.tracing import NOISE, Traced

CLIPPED = 1e-3  # how nearly entries are of the largest size, which clipping by value leaves
FEW = 0.1  # of a column's entries, that stand still where no mask left them out
FAILED = 0.25  # of an input's numbers, at most, on which its entries may not agree
SAME = 3e-3  # how nearly, relative, two inputs that outputs show are one
AGREE, FEWEST = 0.6, 2  # the share of a column's entries, and how many, that have one ratio
LOYAL, ENOUGH = 0.8, 3  # of a row's entries, in such columns, that have their column's
EXACT = 1e-3  # error, relative, up to which rows are held against each other
NUMBERS = 2**24  # of them all, at most: of more rows those that moved most
SKETCH = 16  # numbers of each by which like ones are sought
ANY = 1e-6  # how nearly a gradient in float64 is its bias's times one vector

Pair = tuple[str, str | None, bool]  # a weight, its bias, and whether its columns are the outputs


def pairs(model: nn.Module, known: Mapping[str, nn.Linear]) -> Iterator[Pair]:
    """Weights that no ``known`` layer has, each with the biases beside it that fit its outputs; a
    matrix without any, such as an adapter's, with either side as its outputs.
    """
    parameters = dict(model.named_parameters())
    taken = {f"{name}.weight" for name in known}
    for name, weight in parameters.items():
        if weight.ndim < 2 or name in taken:
            continue
        place = name.rpartition(".")[0]
        rows, columns = weight.flatten(1).shape
        fitting: list[Pair] = []
        for other, bias in parameters.items():
            if bias.ndim != 1 or len(bias) < 2 or other.rpartition(".")[0] != place:
                continue
            if len(bias) == rows:
                fitting.append((name, other, False))
            elif len(bias) == columns and weight.ndim == 2:
                fitting.append((name, other, True))
        either: list[Pair] = [(name, None, False), (name, None, True)]
        yield from fitting or (either if weight.ndim == 2 else [])


def ratio(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(r [features], how far a weight [outputs, features] is from ``bias`` times r, relatively)."""
    r = bias @ weight / bias.square().sum()
    return r, float((weight - bias[:, None] * r).norm() / weight.norm())


def direction(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(r [features] of length 1, how far a weight [outputs, features] is from multiples of r,
    relatively), r the direction of its largest row, turned so that its numbers add up to 0 or more;
    0 of a weight of zeros.
    """
    row = weight[weight.norm(dim=1).argmax()]
    if not row.any():
        return row, 0.0
    r = row / row.norm()
    left = (weight - torch.outer(weight @ r, r)).norm() / weight.norm()
    return -r if r.sum() < 0 else r, float(left)


def oriented(weight: torch.Tensor, columns: bool) -> torch.Tensor:
    """[outputs, features]."""
    return weight.T if columns else weight.flatten(1)


def input_of(
    delta: torch.Tensor, of_bias: torch.Tensor, variance: torch.Tensor, of_bias_s: torch.Tensor
) -> tuple[torch.Tensor, float] | None:
    """(input, its error relative to its size) by the updates of a weight and its bias and the
    variances of their rounding; None where the updates are not one input's.
    """
    if not delta.any() or not of_bias.any():
        return None
    r, left = ratio(delta, of_bias)
    rounding = float((variance.sum() + of_bias_s.sum() * r.square().sum()).sqrt() / delta.norm())
    if left > NOISE * rounding + ARITHMETIC:
        return None
    unit = of_bias.square().sum()
    noise = (of_bias.square() @ variance).mean() / unit.square()
    error = (noise + r.square().mean() * of_bias_s.mean() / unit).sqrt() / r.square().mean().sqrt()
    return r, float(error) + ARITHMETIC


def by_entries(
    delta: torch.Tensor, of_bias: torch.Tensor, variance: torch.Tensor, of_bias_s: torch.Tensor
) -> tuple[torch.Tensor, float, int] | None:
    """As ``input_of``, where single entries were changed: clipped by value, masked, left out; and
    how many numbers are not told. Each number of the input is the mean of its column's ratios, in
    rows that have the medians of most columns: a row of another input has not. One whose entries do
    not agree is 0: most of them did not move, or it is not told. None where too few agree.
    """
    if not delta.any() or not of_bias.any():
        return None
    largest = (1 - CLIPPED) * delta.abs().max()
    kept = (delta != 0) & (delta.abs() < largest)
    live = (of_bias.abs() > NOISE * of_bias_s.sqrt()) & (of_bias.abs() < largest)
    r, _, told, _ = _columns(delta, of_bias, variance, of_bias_s, kept & live[:, None])
    if not told.any():
        return None
    # the columns that are told tell the signals of rows whose bias was left out
    others = ~live & (kept[:, told].sum(1) >= ENOUGH)
    signal, of_signal = (
        torch.where(others, torch.where(kept, by_row, math.nan)[:, told].nanmedian(1).values, own)
        for by_row, own in ((delta / r, of_bias), (variance / r.square(), of_bias_s))
    )
    kept &= (live | others)[:, None]
    _, noise, told, agree = _columns(delta, signal, variance, of_signal, kept)
    in_told = kept[:, told].sum(1)
    loyal = (in_told >= ENOUGH) & (agree[:, told].sum(1) >= LOYAL * in_told)
    kept &= loyal[:, None]  # of a column with few entries one of such a row is enough
    black, ratios_s = ~delta.any(0), delta / signal[:, None]
    near = _columns(delta, signal, variance, of_signal, kept)[3]
    r, size, agree = _better(
        *(_by_mean(ratios_s, noise, entries, kept) for entries in (kept, kept & near))
    )
    counts, agreeing = kept.sum(0), agree.sum(0)
    still = (delta == 0)[loyal & live].double().mean(0)
    # where many columns moved whole, one entry that moved in another is no mask's
    whole = bool(still.quantile(0.25) < FEW) if len(still) else False
    told = (agreeing >= AGREE * counts) & (agreeing >= (FEWEST if whole else 1)) & ~black
    failed = int((~told & ~black & ~(whole & (still > AGREE))).sum())
    if not told.any() or failed > FAILED * len(r):
        return None
    error = torch.where(agree, noise, math.nan).nanmedian(0).values[told]
    r = torch.where(told, r, 0.0)
    return r, float(error.square().mean().sqrt() / size) + ARITHMETIC, failed


class Shared(NamedTuple):
    """An input that several outputs show by themselves.

    Attributes
    ----------
    values
        [features].
    error
        Root mean square, relative to the input's.
    outputs
        How many.
    """

    values: torch.Tensor
    error: float
    outputs: int


def shared_by_rows(
    delta: torch.Tensor, of_bias: torch.Tensor, variance: torch.Tensor, of_bias_s: torch.Tensor
) -> list[Shared]:
    """Inputs that are the ratio of several rows each, those of most rows first: behind ReLU some
    outputs are moved by one input alone. A mean of several is another one in each row, but where
    the loss's slopes are the same for all of them.
    """
    live = (of_bias.abs() > of_bias_s.sqrt() / EXACT).nonzero()[:, 0]
    most = max(ENOUGH, NUMBERS // delta.shape[1])
    live = live[of_bias[live].abs().argsort(descending=True)[:most]]
    rows = delta[live] / of_bias[live, None]
    noise = (variance[live] + of_bias_s[live, None] * rows.square()).sum(1).sqrt()
    noise = noise / of_bias[live].abs() + ARITHMETIC * rows.norm(dim=1)
    exact = noise < EXACT * rows.norm(dim=1)
    rows, noise = rows[exact], noise[exact]
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(delta.shape[1], SKETCH, generator=draw, dtype=rows.dtype).to(rows)
    sketch, near = rows @ mixing / SKETCH**0.5, 2 * NOISE * noise
    found, left = [], torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for first in range(len(rows)):
        if not left[first]:
            continue
        close = (sketch - sketch[first]).norm(dim=1) <= near + near[first]
        few = (left & close).nonzero()[:, 0]
        own = (rows[few] - rows[first]).norm(dim=1) <= NOISE * (noise[few] + noise[first])
        own = few[own]
        left[own] = False
        if len(own) >= ENOUGH:
            best = own[noise[own].argmin()]
            error = float(noise[best] / rows[best].norm())
            found.append(Shared(rows[best], error, len(own)))
    alike: list[Shared] = []
    for each in sorted(found, key=lambda each: -each.outputs):
        apart = ((each.values - one.values).norm() / one.values.norm() for one in alike)
        if all(away > SAME for away in apart):
            alike.append(each)
    return alike


def _columns(
    delta: torch.Tensor,
    signal: torch.Tensor,
    variance: torch.Tensor,
    of_signal: torch.Tensor,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(medians of the columns' ratios of ``kept`` entries, the ratios' errors, whether enough of a
    column agree on it, which do).
    """
    ratios_s = delta / signal[:, None]
    r = torch.where(kept, ratios_s, math.nan).nanmedian(0).values
    noise = (variance + of_signal[:, None] * r.square()).sqrt() / signal[:, None].abs()
    agree = _agree(ratios_s, r, noise, r.square().nanmean().sqrt()) & kept
    told = (agree.sum(0) >= FEWEST) & (agree.sum(0) >= AGREE * kept.sum(0))
    return r, noise, told, agree


_Means = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of columns; their size; who agrees


def _by_mean(
    ratios_s: torch.Tensor, noise: torch.Tensor, entries: torch.Tensor, kept: torch.Tensor
) -> _Means:
    """The weighted means of these entries' ratios, 0 of a column without, and which of those that
    are ``kept`` agree on them.
    """
    weight = torch.where(entries, 1 / noise.square(), 0.0)
    of_column = (weight * ratios_s).nansum(0) / weight.sum(0)
    r = torch.where(weight.any(0), of_column, 0.0)
    size = r.square().mean().sqrt()
    return r, size, _agree(ratios_s, r, noise, size) & kept


def _better(one: _Means, other: _Means) -> _Means:
    """Column by column the mean on which more entries agree."""
    first = one[2].sum(0) >= other[2].sum(0)
    r = torch.where(first, one[0], other[0])
    return r, r.square().mean().sqrt(), torch.where(first, one[2], other[2])


def _agree(
    ratios_s: torch.Tensor, r: torch.Tensor, noise: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    return (ratios_s - r).abs() <= NOISE * noise + ARITHMETIC * size


def used_as_one(
    traced: Traced, pair: Pair, probes: torch.Tensor, *, train: bool = False, seed: int = 0
) -> torch.Tensor | None:
    """[N, features], what the weight is multiplied with for each of the ``probes`` [N, pixels];
    without a bias the direction of that, as long as the probe. None where its gradient is another
    than its bias's times one vector, or has more than one direction.
    """
    name, bias, columns = pair
    found = []
    for number, probe in enumerate(probes):
        image = probe.reshape(1, *traced.shape)
        grads = traced.gradients(name, bias, image, train=train, seed=seed + number)
        delta = oriented(grads[0], columns)
        unmoved = not grads[1].any() if bias else bool(probe.any()) and not delta.any()
        r, left = ratio(delta, grads[1]) if bias else direction(delta)
        if unmoved or delta.any() and left > ANY:
            return None
        found.append(r if bias else r * probe.norm())
    return torch.stack(found)


def steady(traced: Traced, pair: Pair, taken: torch.Tensor) -> bool:
    """Whether the weight is multiplied with the same in training, whatever chance does there."""
    probes = traced.probes
    try:
        again = [
            used_as_one(traced, pair, probes, train=True, seed=start)
            for start in (len(probes), 2 * len(probes))
        ]
    except Exception:  # one image in batch norm, or what else a user's network raises
        return False
    return all(each is not None and traced.close(each, taken) for each in again)
