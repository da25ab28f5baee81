"""A client seen through local steps, rounding and noise: what the leading direction of an update
shows is taken for the input of the first linear layer, and its client for one of one step.

Where a few steps on one image hardly move the features, or where noise lies on the update, it has
no longer rank one, and a division shows nothing. Its first singular vector is near the features all
the same. With it all behind that layer follows; convolutions stay as they were seen.
"""

import copy
from dataclasses import replace

import torch
from torch.nn import functional as F

from dlm_core import check, label_inference
from dlm_core.beyond.front import Front
from dlm_core.beyond.preprocessing import bare
from dlm_core.beyond.tracing import Traced
from dlm_core.observation import Observation


@check.arguments
def features(seen: Observation) -> tuple[str, torch.Tensor]:
    """(name of the first linear layer, [n] its input), by the first singular vector of its update.

    Parameters
    ----------
    seen
        What the observer sees.

    Raises
    ------
    ValueError
        Where no linear layer with a bias moved, or others than convolutions, activations and pools
        stand in front of it.
    """
    front, h = _led(seen)
    return front.name, h


def _led(seen: Observation) -> tuple[Front, torch.Tensor]:
    """(what stands in front of the first linear layer, [n] its input)."""
    network, _ = bare(seen)
    name = next(iter(Traced(network.model, seen.image_shape).layers), "")
    weight, bias = (seen.delta_by_name.get(f"{name}.{each}") for each in ("weight", "bias"))
    if weight is None or bias is None:
        raise ValueError("no linear layer with a bias has an update")
    left, size, right = torch.linalg.svd(weight.double().cpu(), full_matrices=False)
    scale = left[:, 0] @ bias.double().cpu()
    if scale == 0:
        raise ValueError(f"the bias of layer {name!r} did not move along its weight's update")
    h = size[0] * right[0] / scale
    front = Front(network.model, seen.image_shape, name)
    return front, h.clamp(min=0) if front.rectified else h


@check.arguments
def leading(seen: Observation) -> Observation:
    """The Observation, in float64, of a client of one step of SGD that has these features.

    Parameters
    ----------
    seen
        What the observer sees.

    Raises
    ------
    ValueError
        As ``features`` does, and where the last bias moved against its gradient.

    Notes
    -----
    An attack on one step, such as ``weighted``, takes what is returned. It knows nothing of the
    noise, and takes what it cannot explain for noise.
    """
    front, h = _led(seen)
    label = label_inference.infer(seen).cpu()
    named = dict(front.model.requires_grad_().named_parameters())
    with torch.enable_grad():
        loss = F.cross_entropy(front.head(h), label)
        slopes = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    gradient = {n: g for n, g in zip(named, slopes) if g is not None}
    slope, moved = gradient[seen.head.names[1]], seen.head.delta_bias.double().cpu()
    rate = float(slope @ moved / (slope @ slope))
    if not rate > 0:
        raise ValueError("the last bias moved against its gradient: no step of SGD on one image")
    after = {n: w.double().cpu() for n, w in seen.weights_after.items()}
    after |= {n: named[n].detach() - rate * g for n, g in gradient.items()}
    model = copy.deepcopy(seen.model).cpu().double()
    return replace(seen, model=model, weights_after=after)
