"""A stack of convolution and linear layers as matrices: its gradient, and the walk down it to the image.

Everything here concerns one image and is float64. A layer multiplies its kernel [O, I] by the patches [I, L] of its input
(a linear layer has one patch, L = 1) and adds its bias, kept as one more column of the weight matrix [O, I + 1]. With
δ = dloss/d(output) [O, L], the gradient in all of a layer's parameters is δ times the transposed patches, and δ's sum.
``information`` has the curvature of an image's likelihood in the same terms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.func import vjp
from torch.nn import functional as F

PRIOR_MEAN, PRIOR_VARIANCE = 0.5, 1 / 12  # uniform on [0, 1]: negligible beside the data, but for what no data determine

# type -> (function, inverse or None, open range of its values), given the module
ACTIVATIONS = {
    nn.Sigmoid: lambda module: (torch.sigmoid, torch.logit, (0.0, 1.0)),
    nn.Tanh: lambda module: (torch.tanh, torch.atanh, (-1.0, 1.0)),
    nn.LeakyReLU: lambda module: (
        partial(F.leaky_relu, negative_slope=module.negative_slope),
        lambda a: torch.where(a < 0, a / module.negative_slope, a),
        (-torch.inf, torch.inf),
    ),
    nn.ReLU: lambda module: (torch.relu, None, (0.0, torch.inf)),
    nn.GELU: lambda module: (partial(F.gelu, approximate=module.approximate), None, (-torch.inf, torch.inf)),
    nn.SiLU: lambda module: (F.silu, None, (-torch.inf, torch.inf)),
}
SUPPORTED = (
    "exact recovery takes an nn.Sequential of Linear, Conv2d (groups 1, numeric zero padding), Flatten, Identity and "
    "elementwise activations: Sigmoid, Tanh or LeakyReLU anywhere, ReLU, GELU or SiLU after the first Linear"
)
WRAPPED = "layers called one after the other can be written as one: notebooks/howto/bring_your_own_model.ipynb shows how"


def _identity(a):
    return a


@dataclass(frozen=True)
class Layer:
    """A linear or convolution layer with the activation that follows it.

    weight         [O, I + 1], or [O, I] without a bias.      shape   of the input, (C, H, W) or (features,).
    window         keywords of F.unfold for a convolution, None for a linear layer.
    has_bias       whether the last column of ``weight`` is a bias.
    act, inverse, bounds   the activation, its inverse (None where there is none), the range of its values.
    """

    name: str
    weight: torch.Tensor
    shape: tuple
    window: dict | None
    has_bias: bool
    act: Callable = _identity
    inverse: Callable | None = _identity
    bounds: tuple = (-torch.inf, torch.inf)

    @property
    def kernel(self):
        """The weight without the bias [O, I]."""
        return self.weight[:, :-1] if self.has_bias else self.weight

    @property
    def bias(self):
        """[O, 1], or 0."""
        return self.weight[:, -1:] if self.has_bias else 0.0

    def patches(self, a):
        """The input ``a`` (any shape with the right number of entries) as patches [I, L]."""
        return a.reshape(-1, 1) if self.window is None else F.unfold(a.reshape(self.shape), **self.window)

    def spread(self, u):
        """The transpose of ``patches``: [I, L] summed back into the input's shape."""
        return u.reshape(self.shape) if self.window is None else F.fold(u, self.shape[1:], **self.window)

    def output(self, u):
        """Before the activation, [O, L]."""
        return times(self.kernel, u) + self.bias

    def back(self, rows):
        """[m, O·L] times the kernel as a matrix [O·L, entries of the input]: the transpose of ``output``, for m at once."""
        if self.window is None:
            return rows @ self.kernel
        channels, *size = self.shape
        sides = zip(size, *self.window.values())
        height, width = ((n + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for n, k, stride, pad, dilation in sides)
        kernel = self.kernel.reshape(-1, channels, *self.window["kernel_size"])
        rows = rows.reshape(len(rows), -1, height, width)
        options = {name: value for name, value in self.window.items() if name != "kernel_size"}
        return torch.nn.grad.conv2d_input((len(rows), *self.shape), kernel, rows, **options).flatten(1)

    def by_channel(self, matrix):
        """[O, I], bias left out -> [O, C, K]: the entries of a patch are K places in each of C channels (K = 1 if linear)."""
        return matrix[:, : self.kernel.shape[1]].reshape(len(matrix), self.shape[0], -1)

    def placed(self, delta):
        """δ as the derivative of the kernel's gradient in the input, the same for each channel: [O, K places, P pixels]."""
        pixels = math.prod(self.shape[1:])
        if self.window is None:
            return delta[:, None]
        numbers = torch.arange(1.0, pixels + 1).reshape(1, *self.shape[1:])
        where = F.unfold(numbers, **self.window).long().to(delta.device)  # [K, L], 0 for padding
        placed = delta.new_zeros(len(delta), len(where), pixels + 1)
        return placed.scatter_(2, where.expand(len(delta), -1, -1), delta[:, None].expand(-1, len(where), -1))[..., 1:]

    def gradient(self, delta, u):
        """In all parameters, shaped as ``weight``."""
        return torch.cat([delta @ u.T, delta.sum(1, keepdim=True)], dim=1) if self.has_bias else delta @ u.T

    def gradient_transpose(self, matrix, delta, u):
        """The transposes of ``gradient`` in δ and in u, applied to a ``matrix`` shaped as ``weight``."""
        if not self.has_bias:
            return matrix @ u, matrix.T @ delta
        return matrix[:, :-1] @ u + matrix[:, -1:], matrix[:, :-1].T @ delta


def stack(model, image_shape):
    """``model`` as a list of Layers. Raises ValueError naming the layer, its type and what is supported instead."""
    layers, shape = [], tuple(image_shape)
    for name, module in _leaves(model):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            layers.append(_layer(name, module, shape))
            with torch.no_grad():
                shape = tuple(module(torch.zeros(1, *layers[-1].shape).to(module.weight)).shape[1:])
        elif type(module) in ACTIVATIONS and layers and layers[-1].act is _identity:
            act, inverse, bounds = ACTIVATIONS[type(module)](module)
            if inverse is None and not any(layer.window is None for layer in layers):
                raise _unsupported(name, module, "has no inverse and comes before the first Linear")
            layers[-1] = replace(layers[-1], act=act, inverse=inverse, bounds=bounds)
        elif not isinstance(module, (nn.Flatten, nn.Identity)):
            raise _unsupported(name, module, "cannot be walked")
    if not layers or layers[-1].window is not None or layers[-1].act is not _identity:
        raise ValueError(f"the model does not end in a Linear layer without activation; {SUPPORTED}")
    return layers


def count_equations(layers):
    """At most so many directions of the image can an update determine: one per convolution parameter and feature."""
    first = next(i for i, layer in enumerate(layers) if layer.window is None)
    return sum(layer.weight.numel() for layer in layers[:first]) + layers[first].shape[0]


def signals(layers, label, x, softmax=None):
    """(deltas, inputs): for each layer δ = dloss/d(output) [O, L] and the patches [I, L] of its input; gradient = δ uᵀ.

    Where ``x`` is longer than an image, its rest [O] is what the client's arithmetic adds to a first linear layer's δ.
    """
    n = math.prod(layers[0].shape)
    first = layers[0].patches(x[:n])
    (delta, *deltas), inputs = signals_after_first(layers, label, layers[0].output(first), softmax)
    return [delta + x[n:, None] if len(x) > n else delta, *deltas], [first, *inputs]


def signals_after_first(layers, label, z, softmax=None):
    """The same from the first layer's output ``z`` [O, L] on: all deltas, and the inputs of all layers but the first."""
    outputs, inputs = [z], []
    for below, layer in zip(layers, layers[1:]):
        inputs.append(layer.patches(below.act(outputs[-1])))
        outputs.append(layer.output(inputs[-1]))
    target = F.one_hot(label, len(outputs[-1])).to(z)[:, None]
    deltas = [(outputs[-1].softmax(0) if softmax is None else softmax) - target]
    for below, layer, output in zip(layers[-2::-1], layers[:0:-1], outputs[-2::-1]):
        back = layer.spread(times(layer.kernel.T, deltas[0])).reshape(output.shape)
        deltas.insert(0, vjp(below.act, output)[1](back)[0])
    return deltas, inputs


def input_of(layer, output, variance, back, gradient, weights):
    """The input of ``layer`` from its activated output: (input, variance of each entry, dloss/d(input)).

    output, variance, back   the output's estimate, the variance of each entry, and dloss/d(output).

    Weighted least squares over {W u + b = act⁻¹(output); δ uᵀ = gradient} (R-GAP: Zhu & Blaschko, ICLR 2021), each row by
    its own noise: ``weights`` [O, I] are the inverse variances of ``gradient``; ``variance`` is divided by act'² on its way
    through the inverse.
    """
    channels = len(layer.weight)
    output, sd = output.reshape(channels, -1), variance.sqrt().reshape(channels, -1)
    low, high = layer.bounds
    margin = sd.clamp(max=(high - low) / 2)  # an estimate at the edge of the range, or beyond, is known no better than sd
    z = layer.inverse(output.clamp(low + margin, high - margin))
    slope = vjp(layer.act, z)[1](torch.ones_like(z))[0]
    delta = slope * back.reshape(channels, -1)
    z_weights = (slope / sd).square()

    entries = layer.kernel.shape[1]  # the bias's gradient says nothing about the input
    gradient, weights = gradient[:, :entries], weights[:, :entries]

    def transpose(z, gradient):
        return layer.spread(layer.kernel.T @ z + gradient.T @ delta).flatten()

    right = transpose(z_weights * (z - layer.bias), weights * gradient)
    matrix = layer.back(layer.back(torch.diag(z_weights.flatten())).T)
    add_by_channel(matrix, layer, layer.placed(delta), weights)
    factor, ridge = cholesky(matrix)
    x = torch.cholesky_solve((right + ridge * PRIOR_MEAN)[:, None], factor)[:, 0]
    return x, _sampled_variance(factor), layer.spread(layer.kernel.T @ delta)


def add_by_channel(matrix, layer, placed, weights):
    """Add to ``matrix`` [n, n] in place what the kernel's gradient says of a layer's input [n] as such, not through δ."""
    placed, weights = placed.flatten(0, 1), layer.by_channel(weights).transpose(0, 1).flatten(1)  # [O·K, P], [C, O·K]
    blocks = (placed.T * weights[:, None]) @ placed
    channels, pixels = len(weights), placed.shape[1]
    matrix.view(channels, pixels, channels, pixels).diagonal(dim1=0, dim2=2).add_(blocks.permute(1, 2, 0))


def times(matrix, columns):
    """matrix @ columns; a single column is put first, so that under vmap many of them make one product."""
    return (columns.T @ matrix.T).T if columns.shape[1] == 1 else matrix @ columns


def cholesky(matrix):
    """Factor of a normal matrix plus a ridge, and the ridge: the prior's precision, or more where rounding demands it."""
    ridge = max(1 / PRIOR_VARIANCE, 1e-16 * float(matrix.trace()))
    for _ in range(10):
        matrix.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            break
        ridge *= 10
    return factor, ridge


def _sampled_variance(factor, samples=64):
    """Diagonal of the inverse normal matrix to about 20 %, ten times faster than by inversion: it only weights rows."""
    noise = torch.randn(len(factor), samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(factor)
    return torch.linalg.solve_triangular(factor.T, noise, upper=True).square().mean(1)


def _leaves(module, name=""):
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _leaves(child, f"{name}.{child_name}".lstrip("."))


def _layer(name, module, shape):
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise _unsupported(name, module, "has groups or a padding that is not supported")
        window = {what: getattr(module, what) for what in ("kernel_size", "stride", "padding", "dilation")}
    else:
        shape, window = (module.in_features,), None
    weight = module.weight.detach().double().flatten(1)
    if module.bias is not None:
        weight = torch.cat([weight, module.bias.detach().double()[:, None]], dim=1)
    return Layer(name, weight, shape, window, module.bias is not None)


def _unsupported(name, module, why):
    what, hint = (f"layer {name!r}", SUPPORTED) if name else ("the model", f"{SUPPORTED}; {WRAPPED}")
    return ValueError(f"{what} ({type(module).__name__}) {why}; {hint}")
