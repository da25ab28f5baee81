"""What goes up and down a stack of layers: the gradient, and the walk down to the image.

Everything here concerns one image and is float64; layers and symbols are those of ``stacks``.
``information`` has the curvature of an image's likelihood in the same terms.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.func import vjp
from torch.nn import functional as F

from dlm_core.beyond.stacks import Layer, first_linear, times

# of a pixel: uniform on [0, 1], which is negligible beside the data, but for what no data determine
PRIOR_MEAN, PRIOR_VARIANCE = 0.5, 1 / 12

SAMPLES = 64  # random vectors that give a variance to about 20 %
RIDGE = 1e-16  # of the trace: where rounding of float64 makes a normal matrix singular

Tensors = list[torch.Tensor]


def pull_back(
    function: Callable[..., Any], x: torch.Tensor
) -> tuple[Any, Callable[..., tuple[torch.Tensor]]]:
    """``torch.func.vjp`` of one tensor: (function(x), its transposed Jacobian at ``x``)."""
    return vjp(function, x)[:2]  # its annotation has a third part, which only has_aux=True adds


def count_equations(layers: Sequence[Layer]) -> int:
    """How many directions of the image an update can determine at most.

    One per convolution parameter, and one per feature.
    """
    first = first_linear(layers)
    return sum(layer.weight.numel() for layer in layers[:first]) + layers[first].shape[0]


def signals(
    layers: Sequence[Layer],
    label: torch.Tensor,
    x: torch.Tensor,
    softmax: torch.Tensor | None = None,
) -> tuple[Tensors, Tensors]:
    """Return (deltas, inputs), one of each per layer: the gradient in its parameters is δ uᵀ.

    Parameters
    ----------
    layers
        The network.
    label
        Class index, a scalar.
    x
        [n], the image. Where it is longer, its rest [O] is what the client's arithmetic adds to a
        first linear layer's δ.
    softmax
        [K, 1] to be used in the place of the network's own; None computes it.

    Returns
    -------
    deltas
        δ = dloss/dz [O, L] of each layer.
    inputs
        The patches u [I, L] of each layer's input.
    """
    n = layers[0].size
    patches = layers[0].patches(x[:n])
    z = layers[0].output(patches)
    (delta, *deltas), inputs = signals_after_first(layers, label, z, softmax)
    if len(x) > n:
        delta = delta + x[n:, None]
    return [delta, *deltas], [patches, *inputs]


def signals_after_first(
    layers: Sequence[Layer],
    label: torch.Tensor,
    z: torch.Tensor,
    softmax: torch.Tensor | None = None,
) -> tuple[Tensors, Tensors]:
    """The same from the first layer's output on, without the input of that layer.

    Parameters
    ----------
    layers, label, softmax
        As in ``signals``.
    z
        [O, L], the first layer's output before its activation.
    """
    outputs, inputs = [z], []
    for below, layer in zip(layers, layers[1:]):
        activated = below.activation.function(outputs[-1])
        inputs.append(layer.patches(activated))
        outputs.append(layer.output(inputs[-1]))
    target = F.one_hot(label, len(outputs[-1])).to(z)[:, None]
    probabilities = outputs[-1].softmax(0) if softmax is None else softmax
    deltas = [probabilities - target]
    for below, layer, output in zip(layers[-2::-1], layers[:0:-1], outputs[-2::-1]):
        back = layer.spread(times(layer.kernel.T, deltas[0])).reshape(output.shape)
        _, through_activation = pull_back(below.activation.function, output)
        deltas.insert(0, through_activation(back)[0])
    return deltas, inputs


class Recovered(NamedTuple):
    """A layer's input, as the walk down finds it.

    Attributes
    ----------
    x
        [n] its entries.
    variance
        [n] of each of them.
    back
        dloss/dx, in the input's shape.
    """

    x: torch.Tensor
    variance: torch.Tensor
    back: torch.Tensor


def input_of(
    layer: Layer,
    above: Recovered,
    gradient: torch.Tensor,
    weights: torch.Tensor,
    mean: float | torch.Tensor = PRIOR_MEAN,
    variance: float = PRIOR_VARIANCE,
) -> Recovered:
    """Return the input of a convolution ``layer`` from its activated output.

    Parameters
    ----------
    layer
        With an activation that has an inverse.
    above
        The activated output a = act(z): its estimate, the variance of each entry, and dloss/da.
    gradient
        [O, I] or [O, I + 1], of the layer's weight.
    weights
        Inverse variance of each entry of ``gradient``.
    mean, variance
        The prior's, of the input's entries.

    Notes
    -----
    Weighted least squares over {K u + b = act⁻¹(a); δ uᵀ = gradient} (R-GAP: Zhu & Blaschko, ICLR
    2021), each row by its own noise. The variance of a is divided by act'² on its way through the
    inverse.
    """
    z, slope, z_weights = _through_inverse(layer, above)
    delta = slope * above.back.reshape(len(layer.weight), -1)

    entries = layer.kernel.shape[1]  # the bias's gradient says nothing about the input
    gradient, weights = gradient[:, :entries], weights[:, :entries]

    of_output = layer.kernel.T @ (z_weights * (z - layer.bias))
    of_gradient = (weights * gradient).T @ delta
    right = layer.spread(of_output + of_gradient).flatten()
    matrix = layer.back(layer.back(torch.diag(z_weights.flatten())).T)
    add_by_channel(matrix, layer, layer.placed(delta), weights)
    factor, ridge = cholesky(matrix, 1 / variance)
    x = torch.cholesky_solve((right + ridge * mean)[:, None], factor)[:, 0]
    return Recovered(x, _sampled_variance(factor), layer.spread(layer.kernel.T @ delta))


def _through_inverse(
    layer: Layer, above: Recovered
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z, act'(z), inverse variance of z), each [O, L], from the activated output."""
    channels = len(layer.weight)
    activation = layer.activation
    assert activation.inverse is not None  # ``stack`` refuses others before the first linear layer
    output = above.x.reshape(channels, -1)
    sd = above.variance.sqrt().reshape(channels, -1)
    low, high = activation.bounds
    # an estimate at the edge of the range, or beyond it, is known no better than to its sd
    margin = sd.clamp(max=(high - low) / 2)
    z = activation.inverse(output.clamp(low + margin, high - margin))
    _, pull = pull_back(activation.function, z)
    slope = pull(torch.ones_like(z))[0]
    return z, slope, (slope / sd).square()


def add_by_channel(
    matrix: torch.Tensor, layer: Layer, placed: torch.Tensor, weights: torch.Tensor
) -> None:
    """Add to ``matrix``, in place, what the kernel's gradient says of a layer's input as such.

    What it says of the input through δ is not included.

    Parameters
    ----------
    matrix
        [n, n], information in the input.
    layer
        Whose input it is.
    placed
        ``layer.placed(delta)``, [O, K, P].
    weights
        [O, I] or [O, I + 1], inverse variances of the gradient's entries.

    Notes
    -----
    Channels do not mix: block c is Σ_{o,k} weights[o, (c, k)] placed[o, k, :]ᵀ placed[o, k, :].
    """
    placed = placed.flatten(0, 1)  # [O·K, P]
    by_channel = layer.by_channel(weights).transpose(0, 1).flatten(1)  # [C, O·K]
    blocks = (placed.T * by_channel[:, None]) @ placed  # [C, P, P]
    channels, pixels = len(by_channel), placed.shape[1]
    of_equal_channels = matrix.view(channels, pixels, channels, pixels).diagonal(dim1=0, dim2=2)
    of_equal_channels.add_(blocks.permute(1, 2, 0))


def cholesky(matrix: torch.Tensor, precision: float) -> tuple[torch.Tensor, float]:
    """(factor, ridge) of a normal matrix plus a ridge on its diagonal, which is added in place.

    The ridge is the prior's ``precision``, or more where rounding demands it.
    """
    ridge = max(precision, RIDGE * float(matrix.trace()))
    matrix.diagonal().add_(ridge)
    for _ in range(10):
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            break
        matrix.diagonal().add_(9 * ridge)
        ridge *= 10
    return factor, ridge


def _sampled_variance(factor: torch.Tensor) -> torch.Tensor:
    """Diagonal of the inverse normal matrix, from random vectors.

    That is ten times faster than inversion, and good enough to weight rows.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(factor), SAMPLES, dtype=torch.float64, generator=generator).to(factor)
    return torch.linalg.solve_triangular(factor.T, noise, upper=True).square().mean(1)
