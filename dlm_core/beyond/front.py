"""The convolutions in front of a network's first linear layer, as a function of the image.

Where the update of that layer shows its input h (``inputs``), all behind it is known: label,
scores, learning rate, and δ_h = dloss/dh. What is left unknown is the image, and of it follow

    h,    and per convolution    G = Σ_l δ_l u_lᵀ,

u_l the patches of its input, and δ_l the signal that comes back to its output. Activations and
pooling alone are not linear in it. With their slopes held fixed, as they are on a piece of a
network of ReLU and max-pooling, the image is in h and in every G once.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.nn import functional as F

from dlm_core.beyond.jacobian import slope_along
from dlm_core.threads import own_generator

RELU = (nn.ReLU, F.relu, torch.relu)
MAXIMA = (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d)
ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.sigmoid, F.tanh, F.softplus),
    *(torch.relu, torch.sigmoid, torch.tanh, "relu", "sigmoid", "tanh"),
)
POOLS = (*MAXIMA, nn.AvgPool2d, F.avg_pool2d)
SAME = 1e-9  # relative difference up to which the walk's features are the network's own

Bend = Callable[[torch.Tensor], torch.Tensor]


class Stage(NamedTuple):
    """A convolution, and what stands between it and the next one.

    Attributes
    ----------
    name
        Of the convolution.
    layer
        In float64.
    bends
        Activations and pools, in turn.
    window
        Side of the square of outputs that a pool makes one of; 1 for no pool.
    """

    name: str
    layer: nn.Conv2d
    bends: tuple[Bend, ...]
    window: int

    def bent(self, z: torch.Tensor) -> torch.Tensor:
        """What the next layer gets of the convolution's output."""
        for bend in self.bends:
            z = bend(z)
        return z

    def along(self, z_dot: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """How that moves with z, at these slopes."""
        return F.avg_pool2d(slope * z_dot, self.window, divisor_override=1)

    def patches(self, u: torch.Tensor) -> torch.Tensor:
        """[K, I, L] of the layer's input."""
        of = self.layer
        assert not isinstance(of.padding, str)
        return F.unfold(u, of.kernel_size, of.dilation, of.padding, of.stride)


class Passed(NamedTuple):
    """What follows from images.

    Attributes
    ----------
    features
        [K, n], h; where the last activation is a ReLU before that.
    gradients
        Per convolution G [K, O·I].
    slopes, signals
        Per convolution [K, O, h, w]: of what stands behind it, and δ.
    """

    features: torch.Tensor
    gradients: list[torch.Tensor]
    slopes: list[torch.Tensor]
    signals: list[torch.Tensor]


class Front:
    """The stages in front of a linear layer.

    Parameters
    ----------
    model
        With the weights W_t; it is copied.
    image_shape
        (C, H, W).
    name
        Of the linear layer.

    Attributes
    ----------
    stages
        In the order in which an image passes through them.
    rectified
        Whether a ReLU stands last: then h > 0 says that it was passed, and ``stages`` are without
        it.

    Raises
    ------
    ValueError
        Where other layers stand there, such as batch norm, or ways that part.
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int], name: str) -> None:
        self.model = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
        self.image_shape, self.name = tuple(image_shape), name
        for module in self.model.modules():
            if vars(module).get("inplace"):
                vars(module)["inplace"] = False
        try:
            self.stages = self._walked()
        except ValueError:
            raise
        except Exception as error:  # whatever tracing makes of a user's forward pass
            raise self._refusal(f"{type(error).__name__} in tracing it") from None
        self._check()
        self.rectified = False
        self._set_last_relu_apart()

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """What the network makes of the linear layer's input [n], whatever the image is."""
        layer = self.model.get_submodule(self.name)
        hook = layer.register_forward_pre_hook(lambda _, given: (features.reshape(given[0].shape),))
        try:
            return self.model(features.new_full((1, *self.image_shape), 0.5))
        finally:
            hook.remove()

    def passed(self, images: torch.Tensor, signal: torch.Tensor) -> Passed:
        """What follows from images [K, C, H, W]; ``signal`` is δ_h [n], 0 where ``rectified``
        features are 0.
        """
        u, zs, bent, inputs = images.detach().requires_grad_(), [], [], []
        with torch.enable_grad():
            for stage in self.stages:
                inputs.append(u.detach())
                zs.append(stage.layer(u))
                u = stage.bent(zs[-1])
                bent.append(u)
            features = u.flatten(1)
            signals = torch.autograd.grad((features * signal).sum(), zs, retain_graph=True)
            slopes = [
                torch.autograd.grad(a.sum(), z, retain_graph=True)[0] for a, z in zip(bent, zs)
            ]
        each = zip(self.stages, inputs, signals)
        gradients = [_gradient(stage, u, delta) for stage, u, delta in each]
        return Passed(features.detach(), gradients, slopes, list(signals))

    def along(
        self, directions: torch.Tensor, slopes: Sequence[torch.Tensor], signals: Sequence[Any]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """How features and gradients move along directions [k, C, H, W], at fixed slopes and
        signals [O, h, w].
        """
        u, gradients = directions, []
        for stage, slope, signal in zip(self.stages, slopes, signals):
            gradients.append(_gradient(stage, u, signal[None]))
            of = stage.layer
            z_dot = F.conv2d(u, of.weight, None, of.stride, of.padding, of.dilation)
            u = stage.along(z_dot, slope)
        return u.flatten(1), gradients

    def _walked(self) -> list[Stage]:
        graph = symbolic_trace(self.model).graph
        modules = dict(self.model.named_modules())
        found: list[tuple[str, nn.Conv2d, list[Bend]]] = []
        for node in graph.nodes:
            module = modules.get(node.target) if node.op == "call_module" else None
            if node.op == "call_module" and node.target == self.name:
                break
            if isinstance(module, nn.Conv2d):
                found.append((str(node.target), module, []))
                continue
            kind = node.target if module is None else type(module)
            if node.op == "call_method" and kind in ELEMENTWISE:
                kind = getattr(torch, str(kind))
            if kind in (*ELEMENTWISE, *POOLS):
                if not found:
                    raise self._refusal("it begins with no convolution")
                bend = module or partial(_called, kind, node.args[1:], node.kwargs)
                found[-1][2].append(bend)
        grey = torch.full((1, *self.image_shape), 0.5, dtype=torch.float64)
        stages = []
        for name, layer, bends in found:
            if layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise self._refusal(f"the convolution {name!r} has groups or unusual padding")
            z = layer(grey)
            grey = Stage(name, layer, tuple(bends), 1).bent(z)
            stages.append(Stage(name, layer, tuple(bends), z.shape[-1] // grey.shape[-1]))
        if not stages:
            raise self._refusal("no convolution stands there")
        return stages

    def _check(self) -> None:
        """Raise ValueError unless the walk is the network's own way."""
        with own_generator(seed=0):
            images = torch.rand(2, *self.image_shape, dtype=torch.float64)
        heard: list[torch.Tensor] = []
        layer = self.model.get_submodule(self.name)
        hook = layer.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
        try:
            self.model(images)
        finally:
            hook.remove()
        u = images
        for stage in self.stages:
            z = stage.layer(u)
            with torch.enable_grad():
                z = z.requires_grad_()
                bent = stage.bent(z)
                (slope,) = torch.autograd.grad(bent.sum(), z)
                moved = slope_along(stage.bent, z.detach(), z.detach())
            if not _alike(stage.along(z.detach(), slope), moved):
                raise self._refusal(f"what stands behind {stage.name!r} mixes its outputs")
            u = bent.detach()
        if len(heard) != 1 or not _alike(u.flatten(1), heard[0].flatten(1)):
            raise self._refusal("other layers stand there, or ways that part")

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"the layers in front of {self.name!r} are no stack of convolutions, activations and "
            f"pools that do not overlap ({why})"
        )

    def _set_last_relu_apart(self) -> None:
        last = self.stages[-1]
        without = tuple(bend for bend in last.bends if not _is(bend, RELU))
        # the largest of several numbers above 0 is that before and behind a ReLU
        self.rectified = len(without) < len(last.bends) and all(_is(b, MAXIMA) for b in without)
        if self.rectified:
            self.stages[-1] = last._replace(bends=without)


def _called(function: Callable, rest: Sequence[Any], named: dict, z: torch.Tensor) -> torch.Tensor:
    return function(z, *rest, **{**named, **({"inplace": False} if "inplace" in named else {})})


def _is(bend: Bend, kinds: Sequence[Any]) -> bool:
    return (bend.args[0] if isinstance(bend, partial) else type(bend)) in kinds


def _gradient(stage: Stage, u: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
    """[K, O·I]."""
    return (signal.flatten(2) @ stage.patches(u).transpose(1, 2)).flatten(1)


def _alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape:
        return False
    return float((first - second).norm()) <= SAME * float(second.norm())
