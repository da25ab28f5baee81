"""How precisely an observer sees each entry of an update: 1/σ, and 0 for what tells nothing.

Noise is the rounding of weights, the arithmetic of the client, and what a defence adds. It is taken
as independent from entry to entry. Where exact recovery knows more of it (``rounding``), for one
step on one image in a stack of layers, that is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from dlm_core.beyond import stacks
from dlm_core.beyond.clients import sgd
from dlm_core.beyond.jacobian import Client, Tensors
from dlm_core.beyond.rounding import FLOAT64, MOVED, RESOLVED, TINY, NoiseModel
from dlm_core.defenses import Setting
from dlm_core.federated import loss
from dlm_core.observation import Observation, observe, unit_in_last_place
from dlm_core.weights import rounded


class _Sent(NamedTuple):
    """What a defence makes of a parameter's Δ: variance added, a factor, which entries show."""

    variance: torch.Tensor
    factor: float
    kept: torch.Tensor


@dataclass(frozen=True)
class Precision:
    """How precisely an update is seen.

    Attributes
    ----------
    of_entries
        {parameter's name: 1/σ of each entry of Δ}.
    of_signals
        {layer: variance of the client's errors in its δ}, which all of a row share.
    """

    of_entries: Tensors
    of_signals: Mapping[str, float] = field(default_factory=dict)


def precision(
    model: nn.Module,
    client: Client,
    images: torch.Tensor,
    update: Tensors,
    transmitted: torch.dtype | None = None,
    defended: tuple[Setting, Observation] | None = None,
) -> Precision:
    """How precisely Δ is seen.

    Parameters
    ----------
    model
        With the weights W_t, in the precision that the client computes in.
    client, images, update
        The client, its images [N, C, H, W] in float64, and its Δ.
    transmitted
        To which the weights are rounded on their way, where that is coarser than their own.
    defended
        A defence, and what is seen under it; None for none.
    """
    plain = client.step is sgd and not client.options and client.loss is loss
    if plain and len(images) == client.local_steps == 1 and defended is None:
        try:
            return _of_stack(model, client, images, update, transmitted)
        except ValueError:  # no stack, or nothing moved
            pass
    return Precision(_of_any(model, client, images, update, transmitted, defended))


def _of_stack(
    model: nn.Module,
    client: Client,
    images: torch.Tensor,
    update: Tensors,
    transmitted: torch.dtype | None,
) -> Precision:
    before, shape = model.state_dict(), tuple(images.shape[1:])
    moved = {n: (before[n].double() - d).to(before[n].dtype) for n, d in update.items()}
    seen = observe(model, before, rounded({**before, **moved}, transmitted), shape)
    layers = stacks.stack(model, shape)
    noise = NoiseModel(seen, layers, client.labels[0], transmitted=transmitted)
    known = noise.at(images.flatten(), client.learning_rate)
    found = {}
    for layer, weights in zip(layers, known.weights):
        own = {"weight": weights[:, : layer.kernel.shape[1]]}
        if layer.has_bias:
            own["bias"] = weights[:, -1]
        for kind, each in own.items():
            name = f"{layer.name}.{kind}".lstrip(".")
            found[name] = each.reshape(update[name].shape).sqrt()
    first = layers[0]
    shared = {} if first.convolves or len(layers) == 1 else {first.name: known.error_variance}
    return Precision(found, shared)


def _of_any(
    model: nn.Module,
    client: Client,
    images: torch.Tensor,
    update: Tensors,
    transmitted: torch.dtype | None,
    defended: tuple[Setting, Observation] | None,
) -> Tensors:
    held = dict(model.named_parameters())
    sent = _as_sent(model, update, defended)
    computed = _as_computed(client, images, held)
    found = {}
    for name, delta in update.items():
        after = (held[name].detach().double() - delta).to(held[name].dtype)
        unit = _mean_square(delta).sqrt()
        # each local step rounds the weights once, and their way once more
        ulp = _distance(after, unit)
        variance = client.local_steps * ulp.square() / 12
        if transmitted is not None and torch.finfo(transmitted).eps > torch.finfo(after.dtype).eps:
            ulp = _distance(after.to(transmitted), unit)
            variance = variance + ulp.square() / 12
        added, factor, kept = sent[name]
        dithered = added > ulp.square()
        # What moved less is not noisy: it is rounded away, for all of an output unit alike.
        large = (factor * delta.abs() > MOVED * ulp) | (factor * unit > RESOLVED * ulp)
        arithmetic = _mean_square(computed[name] - delta) if name in computed else 0.0
        own = FLOAT64 if after.dtype == torch.float64 else 0.0
        arithmetic = arithmetic + own * delta.square()
        total = (variance + factor**2 * arithmetic + added).clamp(min=TINY)
        found[name] = torch.where(kept & (large | dithered), factor / total.sqrt(), 0.0)
    return found


def _distance(weights: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """To the next number; a weight of 0 has none, and its unit's update stands in."""
    eps = torch.finfo(weights.dtype).eps
    return torch.where(weights == 0, eps * unit, unit_in_last_place(weights))


def _mean_square(tensor: torch.Tensor) -> torch.Tensor:
    """Of each output unit's entries, shaped to be broadcast."""
    if tensor.ndim < 2:
        return tensor.square()
    return tensor.square().mean(tuple(range(1, tensor.ndim)), keepdim=True)


def _as_computed(client: Client, images: torch.Tensor, held: Mapping[str, torch.Tensor]) -> Tensors:
    """Δ with gradients as the client computes them; {} where that is in float64."""
    precision = next(iter(held.values())).dtype
    if precision == torch.float64:
        return {}
    return {n: d.detach() for n, d in client.update(images, precision).items()}


def _as_sent(
    model: nn.Module, update: Tensors, defended: tuple[Setting, Observation] | None
) -> dict[str, _Sent]:
    """What a defence does to Δ: clipping is a factor, which the observer is granted."""
    if defended is None:
        return {
            n: _Sent(torch.zeros_like(d), 1.0, torch.ones_like(d) > 0) for n, d in update.items()
        }
    setting, seen = defended
    factor = 1.0
    if setting.record.acts_on == "update" and "clip" in setting.strength:
        length = torch.stack([d.norm() for d in update.values()]).norm()
        factor = float((setting.strength["clip"] / length).clamp(max=1))
    held = dict(model.named_parameters())
    kept = setting.kept(seen) or [torch.ones_like(p, dtype=torch.bool) for p in held.values()]
    each = zip(held, setting.noise_variance(seen, model), kept)
    every = {n: _Sent(torch.full_like(k, v, dtype=torch.float64), factor, k) for n, v, k in each}
    return {name: every[name] for name in update}
