"""Weights that are no linear layer's and are used as one's: a convolution as large as its input, a
matrix of the network's own, a recurrent layer's for its first input.

Where the update of such a weight is that of its bias times one vector, and the network's gradients
are so for any image, the vector is what the weight was multiplied with.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dlm_core.beyond.tracing import NOISE, Traced

ARITHMETIC = 4e-6  # of an update's size: what the client's float32 arithmetic leaves
CLIPPED = 1e-3  # how nearly entries are of the largest size, which clipping by value leaves
AGREE, FEWEST = 0.6, 3  # the share of a column's entries, and how many, that have one ratio
ANY = 1e-6  # how nearly a gradient in float64 is its bias's times one vector

Pair = tuple[str, str, bool]  # a weight, its bias, and whether its columns are the outputs


def pairs(model: nn.Module, known: Mapping[str, nn.Linear]) -> Iterator[Pair]:
    """Weights that no ``known`` layer has, each with the biases beside it that fit its outputs."""
    parameters = dict(model.named_parameters())
    taken = {f"{name}.weight" for name in known}
    for name, weight in parameters.items():
        if weight.ndim < 2 or name in taken:
            continue
        place = name.rpartition(".")[0]
        rows, columns = weight.flatten(1).shape
        for other, bias in parameters.items():
            if bias.ndim != 1 or len(bias) < 2 or other.rpartition(".")[0] != place:
                continue
            if len(bias) == rows:
                yield name, other, False
            elif len(bias) == columns and weight.ndim == 2:
                yield name, other, True


def ratio(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(r [features], how far a weight [outputs, features] is from ``bias`` times r, relatively)."""
    r = bias @ weight / bias.square().sum()
    return r, float((weight - bias[:, None] * r).norm() / weight.norm())


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
) -> tuple[torch.Tensor, float] | None:
    """As ``input_of``, where single entries were changed: clipped by value, masked, left out. Each
    number of the input is the median of its column's ratios; None where one has too few that agree.
    """
    if not delta.any() or not of_bias.any():
        return None
    largest = delta.abs().max()
    kept = (delta != 0) & (delta.abs() < (1 - CLIPPED) * largest)
    live = (of_bias.abs() > NOISE * of_bias_s.sqrt()) & (of_bias.abs() < (1 - CLIPPED) * largest)
    kept &= live[:, None]
    ratios_s = delta / of_bias[:, None]
    r = torch.where(kept, ratios_s, math.nan).nanmedian(0).values
    black = ~delta[live].any(0)
    r = torch.where(black, 0.0, r)
    if not r.isfinite().all() or not r.any():
        return None
    noise = (variance + of_bias_s[:, None] * r.square()).sqrt() / of_bias[:, None].abs()
    size = r.square().mean().sqrt()
    agree = kept & ((ratios_s - r).abs() <= NOISE * noise + ARITHMETIC * size)
    counts, agreeing = kept.sum(0)[~black], agree.sum(0)[~black]
    if bool((agreeing < FEWEST).any()) or bool((agreeing < AGREE * counts).any()):
        return None
    error = torch.where(agree, noise, math.nan).nanmedian(0).values[~black]
    return r, float(error.square().mean().sqrt() / size) + ARITHMETIC


def used_as_one(
    traced: Traced, pair: Pair, probes: torch.Tensor, *, train: bool = False, seed: int = 0
) -> torch.Tensor | None:
    """[N, features], what the weight is multiplied with for each of the ``probes`` [N, pixels];
    None where its gradient is another than its bias's times one vector.
    """
    name, bias, columns = pair
    found = []
    for number, probe in enumerate(probes):
        image = probe.reshape(1, *traced.shape)
        of_weight, of_bias = traced.gradients(name, bias, image, train=train, seed=seed + number)
        delta = oriented(of_weight, columns)
        if not of_bias.any():
            return None
        r, left = ratio(delta, of_bias)
        if delta.any() and left > ANY:
            return None
        found.append(r)
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
