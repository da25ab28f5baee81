"""Networks of the released experiments, built from an explicit seed.

Every network is an ``nn.Module`` whose last layer is ``nn.Linear`` with bias. LeNet and the MLP
are plain ``nn.Sequential`` stacks, so that other code can walk them layer by layer. A network
of your own is a function of image shape and number of classes::

    @records.network("mine", title="Mine")
    def mine(image_shape, num_classes, *, width=16): ...
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import nn

from dlm_core import check, records
from dlm_core.arrays import ImageShape
from dlm_core.records import NETWORKS
from dlm_core.threads import own_generator

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
}
INITS = ("paper", "default")
Classes = Annotated[int, check.Range(2)]


@check.arguments
def build(
    name: str,
    image_shape: ImageShape = (3, 32, 32),
    num_classes: Classes = 100,
    *,
    seed: check.Whole = 0,
    init: str = "paper",
    **options: Any,
) -> nn.Module:
    """Return a freshly initialised network in float32 on the CPU, in train mode.

    Parameters
    ----------
    name
        "lenet", "mlp", "resnet18" (no normalisation), "resnet18_bn", or the key of one of your own.
    image_shape
        (C, H, W), each at least 1.
    num_classes
        Number of outputs, at least 2.
    seed
        Of the initial weights; the global random generator is left as it was.
    init
        "paper": every weight and bias of convolutions and linear layers uniform(-0.5, 0.5), as
        released (batch-norm layers keep 1 and 0). "default": PyTorch's own.
    **options
        Of the network's function: ``activation`` (all), ``depth`` (lenet, mlp), ``hidden`` (mlp),
        ``width`` and ``blocks`` (resnets).

    Raises
    ------
    ValueError
        For an unknown name, init, option or activation, for sizes below what the network needs, and
        where a network of your own is no ``nn.Module``.
    """
    check.one_of("model", name, NETWORKS)
    check.one_of("init", init, INITS)
    record = NETWORKS[name]
    record.check_options("option", options)
    record.check_told(options)
    with own_generator(seed):
        model = record.function(tuple(image_shape), num_classes, **options)
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise ValueError(f"network {name!r} returned a {kind}; its function returns nn.Module")
        if init == "paper":
            _initialise_as_released(model)
    return model


def _initialise_as_released(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, -0.5, 0.5)


@records.network("lenet", title="LeNet")
@check.arguments
def lenet(
    image_shape: ImageShape,
    num_classes: Classes,
    *,
    activation: str = "sigmoid",
    depth: check.Count = 3,
) -> nn.Sequential:
    """Convolutions 5x5 of 12 channels, each with its activation, and one linear layer.

    Parameters
    ----------
    image_shape, num_classes
        As in ``build``.
    activation
        Key of ``ACTIVATIONS``.
    depth
        Number of convolutions, at least 1, of strides 2, 2, then 1.
    """
    act = _activation(activation)
    channels, height, width = image_shape
    layers: list[nn.Module] = []
    for i in range(depth):
        stride = 2 if i < 2 else 1
        fan_in = channels if i == 0 else 12
        layers += [nn.Conv2d(fan_in, 12, 5, stride=stride, padding=2), act()]
        height, width = -(-height // stride), -(-width // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * height * width, num_classes))


@records.network("mlp", title="MLP")
@check.arguments
def mlp(
    image_shape: ImageShape,
    num_classes: Classes,
    *,
    hidden: check.Count = 32,
    activation: str = "relu",
    depth: check.Count = 1,
) -> nn.Sequential:
    """Flatten, linear layers with activation, one linear layer to the classes.

    Parameters
    ----------
    image_shape, num_classes
        As in ``build``.
    hidden
        Units of each hidden layer, at least 1.
    activation
        Key of ``ACTIVATIONS``.
    depth
        Number of hidden layers, at least 1.
    """
    act = _activation(activation)
    channels, height, width = image_shape
    sizes = [channels * height * width] + [hidden] * depth
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out), act()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], num_classes))


class Residual(nn.Module):
    """ResNet's basic block: out = act(body(x) + shortcut(x)).

    Parameters
    ----------
    channels_in, channels_out
        x is [B, channels_in, H, W].
    stride
        Of the first convolution; out is [B, channels_out, ⌈H/stride⌉, ⌈W/stride⌉].
    norm
        Layer of a number of channels, after each convolution.
    act
        Layer, after the first convolution and at the end.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        stride: int,
        norm: Callable[[int], nn.Module],
        act: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
            norm(channels_out),
            act(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            norm(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                norm(channels_out),
            )
        self.act = act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels_in, H, W] -> [B, channels_out, ⌈H/stride⌉, ⌈W/stride⌉]."""
        return self.act(self.body(x) + self.shortcut(x))


@records.network("resnet18", title="ResNet-18")
@check.arguments
def resnet18(
    image_shape: ImageShape,
    num_classes: Classes,
    *,
    norm: Callable[[int], nn.Module] = nn.Identity,
    activation: str = "sigmoid",
    width: check.Count = 64,
    blocks: check.Count = 2,
) -> nn.Sequential:
    """ResNet-18 for small images: first convolution 3x3, no pooling before the blocks.

    Parameters
    ----------
    image_shape, num_classes
        As in ``build``.
    norm
        Layer of a number of channels, after each convolution.
    activation
        Key of ``ACTIVATIONS``.
    width
        Channels of the first of four stages, at least 1; each further one has twice as many.
    blocks
        Blocks of each stage, at least 1. The defaults are ResNet-18's.
    """
    act, last = _activation(activation), width
    first = nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False)
    layers: list[nn.Module] = [first, norm(width), act()]
    for stage in range(4):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Residual(last, width << stage, stride, norm, act))
            last = width << stage
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes)
    )


@records.network("resnet18_bn", title="ResNet-18 with batch norm")
@records.passes_on_to(resnet18, fixed=["norm"])
def resnet18_bn(image_shape: ImageShape, num_classes: Classes, **options: Any) -> nn.Sequential:
    """The same with batch normalisation after every convolution."""
    return resnet18(image_shape, num_classes, norm=nn.BatchNorm2d, **options)


def _activation(name: str) -> Callable[[], nn.Module]:
    check.one_of("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
