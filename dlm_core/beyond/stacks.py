"""A network as a stack of layers, each of them one matrix: what exact recovery can walk.

Everything here concerns one image and is float64. A layer multiplies its kernel [O, I] by the
patches [I, L] of its input and adds its bias:

    z = K u + b    [O, L],    O output channels, I entries of a patch, L patches.

A linear layer has one patch, L = 1. The bias is kept as one more column of the weight matrix, which
then is [O, I + 1]. With δ = dloss/dz [O, L], the gradient in the kernel is δ uᵀ, and in the bias
δ's sum over patches.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.nn.utils.parametrize import is_parametrized

from dlm_core.observation import scores
from dlm_core.threads import own_generator

REWRITE_HINT = (
    "layers called one after the other can be written as one: "
    "notebooks/howto/bring_your_own_model.ipynb shows how"
)
SUPPORTED = (
    "exact recovery takes an nn.Sequential of Linear, Conv2d (groups 1, numeric zero padding), "
    "Flatten, Identity and elementwise activations: Sigmoid, Tanh or LeakyReLU anywhere, "
    "ReLU, GELU or SiLU after the first Linear"
)


def _identity(a: torch.Tensor) -> torch.Tensor:
    return a


class Activation(NamedTuple):
    """An elementwise activation.

    Attributes
    ----------
    function
        a = act(z).
    inverse
        z from a; None where there is none.
    bounds
        The open interval of its values.
    """

    function: Callable[[torch.Tensor], torch.Tensor] = _identity
    inverse: Callable[[torch.Tensor], torch.Tensor] | None = _identity
    bounds: tuple[float, float] = (-torch.inf, torch.inf)


NO_ACTIVATION = Activation()


def _leaky_relu(module: nn.LeakyReLU) -> Activation:
    slope = module.negative_slope
    return Activation(
        partial(F.leaky_relu, negative_slope=slope),
        lambda a: torch.where(a < 0, a / slope, a),
    )


def _gelu(module: nn.GELU) -> Activation:
    return Activation(partial(F.gelu, approximate=module.approximate), None)


ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Sigmoid: lambda module: Activation(torch.sigmoid, torch.logit, (0.0, 1.0)),
    nn.Tanh: lambda module: Activation(torch.tanh, torch.atanh, (-1.0, 1.0)),
    nn.LeakyReLU: _leaky_relu,
    nn.ReLU: lambda module: Activation(torch.relu, None, (0.0, torch.inf)),
    nn.GELU: _gelu,
    nn.SiLU: lambda module: Activation(F.silu, None),
}


@dataclass(frozen=True)
class Layer:
    """A linear or convolution layer with the activation that follows it.

    Attributes
    ----------
    name
        Its module's name in the model.
    weight
        [O, I + 1], or [O, I] without a bias.
    shape
        Of the input: (C, H, W) of a convolution, (features,) of a linear layer.
    window
        Keywords of ``F.unfold`` for a convolution, None for a linear layer.
    has_bias
        Whether the last column of ``weight`` is a bias.
    activation
        What follows.
    """

    name: str
    weight: torch.Tensor
    shape: tuple[int, ...]
    window: dict[str, tuple[int, int]] | None
    has_bias: bool
    activation: Activation = NO_ACTIVATION

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution."""
        return self.window is not None

    @property
    def size(self) -> int:
        """Number of entries of the input."""
        return math.prod(self.shape)

    @property
    def kernel(self) -> torch.Tensor:
        """The weight without the bias, [O, I]."""
        return self.weight[:, :-1] if self.has_bias else self.weight

    @property
    def bias(self) -> torch.Tensor | float:
        """[O, 1], or 0."""
        return self.weight[:, -1:] if self.has_bias else 0.0

    def patches(self, a: torch.Tensor) -> torch.Tensor:
        """The input ``a``, of any shape with the right number of entries, as patches [I, L]."""
        if self.window is None:
            return a.reshape(-1, 1)
        return F.unfold(a.reshape(self.shape), **self.window)

    def spread(self, u: torch.Tensor) -> torch.Tensor:
        """The transpose of ``patches``: [I, L] summed back into the input's shape."""
        if self.window is None:
            return u.reshape(self.shape)
        return F.fold(u, self.shape[1:], **self.window)

    def output(self, u: torch.Tensor) -> torch.Tensor:
        """z [O, L], before the activation, from the patches [I, L]."""
        return times(self.kernel, u) + self.bias

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` [m, O·L] times C [O·L, n], which takes the input's n entries to z (no bias)."""
        if self.window is None:
            return rows @ self.kernel
        channels = self.shape[0]
        kernel = self.kernel.reshape(-1, channels, *self.window["kernel_size"])
        rows = rows.reshape(len(rows), -1, *self._output_sides(self.window))
        options: Any = {name: value for name, value in self.window.items() if name != "kernel_size"}
        shape = (len(rows), *self.shape)
        return conv2d_input(shape, kernel, rows, **options).flatten(1)

    def _output_sides(self, window: dict[str, tuple[int, int]]) -> list[int]:
        """[height, width] of a convolution's output."""
        sides = []
        for axis, n in enumerate(self.shape[1:]):
            reach = window["dilation"][axis] * (window["kernel_size"][axis] - 1) + 1
            room = n + 2 * window["padding"][axis] - reach
            sides.append(room // window["stride"][axis] + 1)
        return sides

    def by_channel(self, matrix: torch.Tensor) -> torch.Tensor:
        """[O, I], a bias's column left out, -> [O, C, K].

        The entries of a patch are K places in each of C channels; K = 1 in a linear layer.
        """
        entries = self.kernel.shape[1]
        return matrix[:, :entries].reshape(len(matrix), self.shape[0], -1)

    def placed(self, delta: torch.Tensor) -> torch.Tensor:
        """How δ uᵀ depends on the input while δ [O, L] is held fast: [O, K places, P pixels].

        It is the same for each channel: entry (c, k) of a patch sees the pixels of channel c alone.
        """
        if self.window is None:
            return delta[:, None]
        outputs, pixels = len(delta), math.prod(self.shape[1:])
        numbers = torch.arange(1.0, pixels + 1).reshape(1, *self.shape[1:])
        where = F.unfold(numbers, **self.window).long().to(delta.device)  # [K, L], 0 for padding
        places = len(where)
        empty = delta.new_zeros(outputs, places, pixels + 1)
        index = where.expand(outputs, -1, -1)
        source = delta[:, None].expand(-1, places, -1)
        return empty.scatter_(2, index, source)[..., 1:]

    def gradient(self, delta: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """δ uᵀ, with a bias δ's sum as the last column: shaped as ``weight``."""
        products = delta @ u.T
        if not self.has_bias:
            return products
        return torch.cat([products, delta.sum(1, keepdim=True)], dim=1)

    def gradient_transpose(
        self, matrix: torch.Tensor, delta: torch.Tensor, u: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The transposes of ``gradient`` in δ and in u, times a ``matrix`` shaped as ``weight``."""
        if not self.has_bias:
            return matrix @ u, matrix.T @ delta
        kernel, bias = matrix[:, :-1], matrix[:, -1:]
        return kernel @ u + bias, kernel.T @ delta


def stack(model: nn.Module, image_shape: Sequence[int]) -> list[Layer]:
    """Return ``model`` as a list of Layers.

    Parameters
    ----------
    model
        An ``nn.Sequential``, nested or not.
    image_shape
        (C, H, W).

    Raises
    ------
    ValueError
        Where a layer is not supported. It names the layer, its type and what is supported instead.
    """
    layers: list[Layer] = []
    shape = tuple(image_shape)
    for name, module in _leaves(model):
        trained = [parameter.requires_grad for parameter in module.parameters()]
        if not all(trained):
            said = "is frozen in part, which is not walked" if any(trained) else "is frozen"
            raise _unsupported(name, module, said)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            layer = _layer(name, module, shape)
            layers.append(layer)
            shape = _output_shape(module, layer.shape)
        elif type(module) in ACTIVATIONS and layers and layers[-1].activation is NO_ACTIVATION:
            activation = ACTIVATIONS[type(module)](module)
            before_first_linear = all(layer.convolves for layer in layers)
            if activation.inverse is None and before_first_linear:
                raise _unsupported(name, module, "has no inverse and comes before the first Linear")
            layers[-1] = replace(layers[-1], activation=activation)
        elif not isinstance(module, (nn.Flatten, nn.Identity)):
            raise _unsupported(name, module, "cannot be walked")
    ends_well = layers and not layers[-1].convolves and layers[-1].activation is NO_ACTIVATION
    if not ends_well:
        raise ValueError(
            f"the model does not end in a Linear layer without activation; {SUPPORTED}"
        )
    check_walk(model, image_shape)
    return layers


def check_walk(model: nn.Module, image_shape: Sequence[int]) -> None:
    """Raise ValueError unless the model's own forward pass is that of its layers, one after the
    other, in training as well: a subclass of ``nn.Sequential`` may do more, and so may one of
    ``nn.Linear``; a layer may be called twice.
    """
    copied = copy.deepcopy(model).double()
    for name, module in _leaves(copied):
        if is_parametrized(module) or module._forward_pre_hooks:
            raise _unsupported(name, module, "computes its weight from other numbers")
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(2, *image_shape, generator=draws, dtype=torch.float64)
    images = images.to(next(copied.parameters()).device)
    if not all(_is_walked(copied.train(mode), images) for mode in (False, True)):
        kind = type(model).__name__
        raise ValueError(
            f"the model ({kind}) does more than to call its layers one after the other, "
            "so that they cannot be walked"
        )


def _is_walked(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether the scores are those of the layers, one after the other."""
    with torch.no_grad(), own_generator(seed=0, device=images.device):
        own = scores(model(images))
    walked = images
    with torch.no_grad(), own_generator(seed=0, device=images.device):
        for _, module in _leaves(model):
            walked = _plainly(module, walked)
    return own.shape == walked.shape and torch.allclose(own, walked, rtol=1e-6, atol=1e-9)


def _plainly(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer makes of x, and what a class derived from it would not have to."""
    if isinstance(module, nn.Linear):
        return nn.Linear.forward(module, x)
    return nn.Conv2d.forward(module, x) if isinstance(module, nn.Conv2d) else module(x)


def first_linear(layers: Sequence[Layer]) -> int:
    """Index of the first linear layer."""
    return next(i for i, layer in enumerate(layers) if not layer.convolves)


def times(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """matrix @ columns; a single column comes first, so that under vmap many make one product."""
    return (columns.T @ matrix.T).T if columns.shape[1] == 1 else matrix @ columns


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of what an ``nn.Sequential`` calls, in turn, nested ones unfolded."""
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _leaves(child, f"{name}.{child_name}".lstrip("."))


def _layer(name: str, module: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> Layer:
    """The Layer, still without its activation; ``shape`` is that of its input."""
    window: dict[str, Any] | None = None
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise _unsupported(name, module, "has groups or a padding that is not supported")
        options = ("kernel_size", "stride", "padding", "dilation")
        window = {option: getattr(module, option) for option in options}
    elif module.in_features != math.prod(shape):
        raise _unsupported(name, module, "is applied to a part of its input at a time")
    else:
        shape = (module.in_features,)
    weight = module.weight.detach().double().flatten(1)
    if module.bias is not None:
        weight = torch.cat([weight, module.bias.detach().double()[:, None]], dim=1)
    return Layer(name, weight, shape, window, module.bias is not None)


def _output_shape(module: nn.Linear | nn.Conv2d, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what the module makes of an input of ``shape``."""
    with torch.no_grad():
        output = module(torch.zeros(1, *shape).to(module.weight))
    return tuple(output.shape[1:])


def _unsupported(name: str, module: nn.Module, why: str) -> ValueError:
    kind = type(module).__name__
    if not name:
        return ValueError(f"the model ({kind}) {why}; {SUPPORTED}; {REWRITE_HINT}")
    return ValueError(f"layer {name!r} ({kind}) {why}; {SUPPORTED}")
