"""What batch normalisation sends besides its weights: running statistics of the client's batch.

In train mode each of a client's E batches moves a layer's running mean and variance r by its own
statistics s,

    r <- (1 - m) r + m s,      so that      (r_after - (1 - m)^E r_before) / (1 - (1 - m)^E)

is a weighted mean of the s of the E batches, and for E = 1 that batch's mean and variance, channel
by channel. FedAvg sends the whole state dict, so r is in both snapshots, and E beside it
(``num_batches_tracked``). In eval mode r stays and says nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlm_core import check, objectives, records, search
from dlm_core.observation import Observation
from dlm_core.results import Reconstruction

Tensors = Sequence[torch.Tensor]
Statistics = dict[str, list[torch.Tensor]]


@check.arguments
def local_batches(seen: Observation) -> dict[str, int]:
    """E, the number of batches that the client took, as each batch-norm layer counted them.

    Parameters
    ----------
    seen
        What the observer sees.

    Returns
    -------
    dict of str to int
        {layer's name: E > 0}. Layers that counted nothing (eval mode, or no running statistics) are
        left out, and those whose statistics never move (a momentum of 0).
    """
    found = {}
    for name, layer in _tracking(seen).items():
        steps = int(seen.weights_after[_key(name, "num_batches_tracked")]) - _tracked_before(layer)
        if steps > 0 and layer.momentum != 0:
            found[name] = steps
    return found


def _tracking(seen: Observation) -> dict[str, _BatchNorm]:
    """The batch-norm layers that keep running statistics."""
    named = seen.model.named_modules()
    layers = {name: layer for name, layer in named if isinstance(layer, _BatchNorm)}
    return {name: layer for name, layer in layers.items() if layer.track_running_stats}


def _has_moved(seen: Observation, name: str, layer: _BatchNorm) -> bool:
    before = layer.running_mean
    assert before is not None  # ``track_running_stats`` is asked first
    return not torch.equal(seen.weights_after[_key(name, "running_mean")].to(before), before)


@check.arguments
def batch_statistics(seen: Observation) -> Statistics:
    """What entered each batch-norm layer, as mean and variance of its channels.

    Parameters
    ----------
    seen
        What the observer sees.

    Returns
    -------
    dict of str to list of torch.Tensor
        {layer's name: [mean [C], variance [C]]} in float64, on the model's device. The variance is
        the unbiased one, as PyTorch keeps it. Over several batches both are weighted means.
    """
    return {name: _of_layer(seen, name, steps) for name, steps in local_batches(seen).items()}


def _tracked_before(layer: _BatchNorm) -> int:
    """The number of batches in a layer's running statistics at W_t."""
    assert layer.num_batches_tracked is not None  # ``track_running_stats`` is asked first
    return int(layer.num_batches_tracked)


def _of_layer(seen: Observation, name: str, steps: int) -> list[torch.Tensor]:
    layer = seen.model.get_submodule(name)
    assert isinstance(layer, _BatchNorm)
    before = _tracked_before(layer)
    # without a momentum r is the mean of all batches
    left = before / (before + steps) if layer.momentum is None else (1 - layer.momentum) ** steps
    found = []
    for part in ("running_mean", "running_var"):
        r = getattr(layer, part).double()
        after = seen.weights_after[_key(name, part)].to(r)
        found.append((after - left * r) / (1 - left))
    return found


def moments(x: torch.Tensor) -> list[torch.Tensor]:
    """[mean [C], unbiased variance [C]] of a layer's input, as batch normalisation takes them.

    Parameters
    ----------
    x
        [B, C, ...].
    """
    rest = [axis for axis in range(x.ndim) if axis != 1]
    return [x.mean(rest), x.var(rest)]


@check.arguments
def gradient_and_statistics(names: Sequence[str]) -> Callable[..., list[torch.Tensor]]:
    """``objectives.gradient``, followed by moments of layers' inputs, from the same pass.

    Parameters
    ----------
    names
        Of the layers.

    Returns
    -------
    Callable
        (model, loss, images, labels) -> [``*g, *moments``], for ``search.reconstruct``.
    """

    def update_of(
        model: nn.Module, loss: Callable, images: torch.Tensor, labels: torch.Tensor
    ) -> list[torch.Tensor]:
        inputs: dict[nn.Module, torch.Tensor] = {}

        def keep(layer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            inputs[layer] = given[0]

        layers = [model.get_submodule(name) for name in names]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
        try:
            g = objectives.gradient(model, loss, images, labels)
        finally:
            for hook in hooks:
                hook.remove()
        return [*g, *(moment for layer in layers for moment in moments(inputs[layer]))]

    return update_of


@check.arguments
def matched(
    distance: Callable[..., torch.Tensor], targets: Mapping[str, Tensors], weight: check.NonNegative
) -> Callable[..., torch.Tensor]:
    """``distance`` of the gradient, plus the mean relative squared error of the statistics.

    Parameters
    ----------
    distance
        Of ``dlm_core.objectives``.
    targets
        Of ``batch_statistics``.
    weight
        Of the statistics beside the distance.

    Returns
    -------
    Callable
        A distance that takes [``*g, *statistics``] for g. Each layer's means are measured against
        its standard deviations, its variances against themselves, so that no layer's scale counts.
    """
    flat, units = [], []
    for mean, variance in targets.values():
        flat += [mean, variance]
        units += [variance.sum(), variance.square().sum()]

    def between(g: Tensors, d: Tensors, *k: torch.Tensor) -> torch.Tensor:
        statistics = zip(g[len(d) :], flat, units)
        errors = [(s - t.to(s)).square().sum() / unit.to(s) for s, t, unit in statistics]
        return distance(g[: len(d)], d, *k) + weight * (sum(errors) / len(flat))

    return between


@records.attack(
    "statistics",
    title="DLM+ with statistics",
    colour=3,
    marker="^",
    assumes=("that the client took one batch",),
    client="one step of SGD, a network with batch normalisation in train mode",
    scene={
        "dataset": "fashion_mnist",
        "network": "resnet18_bn",
        "network_options": {"width": 2, "blocks": 1},
    },
)
@records.passes_on_to(search.reconstruct, fixed=["update_of"])
@search.in_lanes
@check.arguments
def reconstruct(
    seen: Observation,
    distance: Callable[..., torch.Tensor] = objectives.normalised_distance,
    *,
    weight: check.NonNegative = 1e3,
    **options: Any,
) -> Reconstruction:
    """``search.reconstruct`` that matches the client's batch statistics too.

    Parameters
    ----------
    seen
        What the observer sees, running statistics included. Told: that the client took one batch.
    distance
        Of the gradient: DLM+'s unless another is given.
    weight
        At least 0, of the statistics beside the distance. 1e3 served best of 0.1 to 1e7 on one
        image and a ResNet of width 16.
    **options
        Of ``search.reconstruct``.

    Raises
    ------
    ValueError
        Where the client sent no statistics of a batch.
    """
    targets = batch_statistics(seen)
    if not targets:
        moved = [name for name, layer in _tracking(seen).items() if _has_moved(seen, name, layer)]
        why = (
            f"{moved[0]!r} moved its running mean, but counts no batch, so that they cannot be told"
            if moved
            else "no batch-norm layer of the model moved its running mean"
        )
        raise ValueError(f"seen holds no batch statistics: {why}")
    joint = matched(distance, targets, weight)
    update_of = gradient_and_statistics(list(targets))
    return search.reconstruct(seen, joint, update_of=update_of, **options)


def _key(name: str, part: str) -> str:
    return f"{name}.{part}".lstrip(".")
