"""A stack of convolution and linear layers as matrices: its gradient, the walk down it, and the information it holds.

Everything here concerns one image and is float64. A layer multiplies its kernel [O, I] by the patches [I, L] of its input
(a linear layer has one patch, L = 1) and adds its bias, kept as one more column of the weight matrix [O, I + 1]. With
δ = dloss/d(output) [O, L], the gradient in all of a layer's parameters is δ times the transposed patches, and δ's sum.

``input_of`` takes the recursion one layer down; ``curvature`` is the Fisher information of an image in the update.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.func import vjp, vmap
from torch.nn import functional as F

LARGEST = 5000  # pixels: beyond it the information matrix (0.2 GB at this size) is only applied, never formed
CHUNK = 64  # unit vectors sent through a layer at once; more costs memory and gains no time
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
        return _times(self.kernel, u) + self.bias

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
        back = layer.spread(_times(layer.kernel.T, deltas[0])).reshape(output.shape)
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

    def column(unit):
        u = layer.patches(unit)
        return transpose(z_weights * (layer.kernel @ u), weights * (delta @ u.T))

    right = transpose(z_weights * (z - layer.bias), weights * gradient)
    matrix = vmap(column, chunk_size=CHUNK)(torch.eye(len(right)).to(z))
    factor, ridge = _cholesky(matrix)
    x = torch.cholesky_solve((right + ridge * PRIOR_MEAN)[:, None], factor)[:, 0]
    return x, _sampled_variance(factor), layer.spread(layer.kernel.T @ delta)


@dataclass(frozen=True)
class Curvature:
    """The information matrix N = JᵀWJ + ridge of an image in an update, J the update's Jacobian, W its weights.

    solve     [n, m] -> N⁻¹ times it.      variance  [n] diagonal of N⁻¹, None where n is too large.
    ridge     precision of the prior, or more where N would otherwise be singular in float64.
    """

    solve: Callable
    variance: torch.Tensor | None
    ridge: float = 1 / PRIOR_VARIANCE


def curvature(layers, label, weights, x, eta, error_variance):
    """The Curvature of the image ``x`` [n], learning rate ``eta``, with one matrix of ``weights`` [O, I] per layer.

    Where ``x`` is longer, as in ``signals``, its rest has prior variance ``error_variance``.
    """
    if layers[0].window is None:
        return _low_rank_curvature(layers, label, weights, x, eta, error_variance)
    (deltas, inputs), push, pull = _linearise(partial(signals, layers, label), x)

    def information(v):  # JᵀWJ v
        d_dot, u_dot = push(v)
        back = [_weigh(*each) for each in zip(layers, weights, deltas, inputs, d_dot, u_dot)]
        return eta**2 * pull(([d for d, _ in back], [u for _, u in back]))

    if len(x) > LARGEST:
        return Curvature(partial(_conjugate_gradients, information), None)
    factor, ridge = _cholesky(vmap(information, chunk_size=CHUNK)(torch.eye(len(x)).to(x)))
    inverse = torch.cholesky_inverse(factor)
    # along a direction without data N⁻¹ is 1/ridge, the prior's variance is meant: the projector on these is (ridge N⁻¹)²
    variance = inverse.diagonal() + (PRIOR_VARIANCE - 1 / ridge) * ridge**2 * inverse.square().sum(1)
    return Curvature(lambda b: torch.cholesky_solve(b, factor), variance, ridge)


def _low_rank_curvature(layers, label, weights, x, eta, error_variance):
    """The same for a first linear layer, where x enters the rest through z = Wx alone, with the errors e of its δ, if any.

    Its own rows are δ_o x_i. Per pixel the square Σ_o w_o (x_i δ̇_o + δ_o ẋ_i)² is completed in ẋ_i, with minimum at -Eδ̇.
    That leaves a diagonal D in t = ẋ + Eδ̇, the information ``left`` in δ̇ and ``above`` in ż, all sums of non-negative terms
    (a plain Woodbury identity would subtract large numbers here). With δ̇ = Bż + ė both are linear in y = (t, ė): ż = Zy,
    δ̇ = Uy, so N⁻¹ = A (D + Zᵀ above Z + Uᵀ left U)⁻¹ Aᵀ where A = 1 - (E, 0)ᵀU takes y to (ẋ, ė).
    """
    layer, ridge = layers[0], 1 / PRIOR_VARIANCE
    n = math.prod(layer.shape)
    x, errors = x[:n], x[n:]
    matrix, w = layer.kernel, weights[0][:, :n]
    z = layer.output(layer.patches(x))
    (deltas, inputs), push, pull = _linearise(partial(signals_after_first, layers, label), z)
    delta = eta * (deltas[0] + errors[:, None] if len(errors) else deltas[0])
    one = torch.eye(len(z)).to(x)

    def information(v):  # (JᵀWJ v for the layers above, the change of this layer's δ)
        d_dot, u_dot = push(v[:, None])
        back = [_weigh(*each) for each in zip(layers[1:], weights[1:], deltas[1:], inputs, d_dot[1:], u_dot)]
        above = pull(([torch.zeros_like(z), *(d for d, _ in back)], [u for _, u in back]))
        return eta**2 * above[:, 0], eta * d_dot[0][:, 0]

    above, d_dot = vmap(information)(one)
    D = (w.T @ delta.square())[:, 0] + ridge
    E = (w * delta * x).T / D[:, None]
    shared = ((w * x.square() / D) @ w.T).fill_diagonal_(0)
    own = shared @ delta.square() + w @ (ridge * x.square() / D)[:, None]
    left = torch.diag(own[:, 0]) - shared * (delta @ delta.T)
    if layer.has_bias:
        left = left + torch.diag(weights[0][:, n])

    Z = torch.linalg.solve(one + matrix @ E @ d_dot.T, torch.cat([matrix, -eta * matrix @ E], 1)[:, : n + len(errors)])
    U = d_dot.T @ Z
    U[:, n:] += eta * one[:, : len(errors)]
    spread = torch.cat([1 / D, torch.full_like(errors, error_variance)])
    root = torch.cat([_root(above) @ Z, _root(left) @ U])
    factor = torch.linalg.cholesky(torch.eye(len(root)).to(x) + root * spread @ root.T)
    H = torch.linalg.solve_triangular(factor, root * spread, upper=False)

    def solve(b):
        y = b - U.T @ (E.T @ b[:n])
        y = y * spread[:, None] - H.T @ (H @ y)
        return torch.cat([y[:n] - E @ (U @ y), y[n:]])

    U_spread, HA = U * spread, H[:, :n] - (H @ U.T) @ E.T
    squares = (E @ (U_spread @ U.T) * E).sum(1) - 2 * (E * U_spread[:, :n].T).sum(1)
    return Curvature(solve, 1 / D + squares - HA.square().sum(0))


def _root(matrix):
    """R with RᵀR = a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _linearise(function, x):
    """(value, push, pull): what ``function`` gives at ``x``, its Jacobian times a vector and that one's transpose.

    ``push`` is the transpose of the transpose; torch's forward mode would do, but its import warns of deprecation.
    """
    value, pull = vjp(function, x)
    _, push = vjp(lambda cotangent: vjp(function, x)[1](cotangent)[0], value)
    return value, lambda v: push(v)[0], lambda cotangent: pull(cotangent)[0]


def _weigh(layer, weights, delta, u, d_dot, u_dot):
    """A change of (δ, u) -> the change of the gradient -> times the weights -> back to (δ, u)."""
    if delta.shape[1] == 1:  # one patch: the same without a matrix [O, I] per direction
        size = torch.cat([u.square(), torch.ones_like(u[:1])])[: weights.shape[1]]
        weights, size = weights[:, : len(u)], weights @ size
        mixed = weights * (delta @ u.T)
        to_u = _times(mixed.T, d_dot) + weights.T @ delta.square() * u_dot
        return size * d_dot + _times(mixed, u_dot), to_u
    change = d_dot @ u.T + delta @ u_dot.T
    if layer.has_bias:
        change = torch.cat([change, d_dot.sum(1, keepdim=True)], dim=1)
    return layer.gradient_transpose(weights * change, delta, u)


def _times(matrix, columns):
    """matrix @ columns; a single column is put first, so that under vmap many of them make one product."""
    return (columns.T @ matrix.T).T if columns.shape[1] == 1 else matrix @ columns


def _conjugate_gradients(information, right, steps=200):
    """N⁻¹ ``right`` [n, m] by so many steps of conjugate gradients: what the data determine best comes first."""
    columns = []
    for b in right.T:
        x, residual, direction = torch.zeros_like(b), b, b
        for _ in range(steps):
            image = information(direction) + direction / PRIOR_VARIANCE
            size = residual.square().sum()
            if size <= 1e-20 * b.square().sum():
                break
            length = size / (direction @ image)
            x, residual = x + length * direction, residual - length * image
            direction = residual + residual.square().sum() / size * direction
        columns.append(x)
    return torch.stack(columns, dim=1)


def _cholesky(matrix):
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
    return ValueError(f"layer {name!r} ({type(module).__name__}) {why}; {SUPPORTED}")
