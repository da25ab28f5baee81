"""Networks of the released experiments, built from an explicit seed.

Every network is an ``nn.Module`` whose last layer is ``nn.Linear`` with bias; LeNet and the MLP are plain
``nn.Sequential`` stacks, so that other code can walk them layer by layer.
"""

import torch
from torch import nn

from dlm_core import check, records
from dlm_core.records import NETWORKS

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
INITS = ("paper", "default")


def build(name, image_shape=(3, 32, 32), num_classes=100, *, seed=0, init="paper", **options):
    """Return a freshly initialised network in float32 on the CPU, in train mode.

    name         "lenet", "mlp", "resnet18" (no normalisation) or "resnet18_bn".
    image_shape  (C, H, W).
    num_classes  number of outputs, at least 2.
    seed         of the initial weights; the global random generator is left as it was.
    init         "paper": every weight and bias uniform(-0.5, 0.5), as released (batch-norm layers keep 1 and 0);
                 "default": PyTorch's own.
    options      of the network's constructor: ``activation`` (all), ``depth`` (lenet, mlp), ``hidden`` (mlp), ``width`` and
                 ``blocks`` (resnets).

    Raises ValueError for an unknown name, init or activation, or for sizes below what the network needs.
    """
    check.one_of("model", name, NETWORKS)
    check.one_of("init", init, INITS)
    check.at_least("num_classes", num_classes, 2)
    NETWORKS[name].check_options("option", options)
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape is {tuple(image_shape)}; it takes (channels, height, width), each at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = NETWORKS[name].function(tuple(image_shape), num_classes, **options)
        if init == "paper":
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    for parameter in module.parameters(recurse=False):
                        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


@records.network("lenet", title="LeNet")
def lenet(image_shape, num_classes, *, activation="sigmoid", depth=3):
    """``depth`` 5x5 convolutions of 12 channels (strides 2, 2, then 1), each with its activation, and one linear layer."""
    check.at_least("depth", depth, 1)
    act = _activation(activation)
    channels, height, width = image_shape
    layers = []
    for i in range(depth):
        stride = 2 if i < 2 else 1
        layers += [nn.Conv2d(channels if i == 0 else 12, 12, 5, stride=stride, padding=2), act()]
        height, width = -(-height // stride), -(-width // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * height * width, num_classes))


@records.network("mlp", title="MLP")
def mlp(image_shape, num_classes, *, hidden=32, activation="relu", depth=1):
    """Flatten, ``depth`` linear layers to ``hidden`` units with activation, one linear layer to the classes."""
    check.at_least("hidden", hidden, 1)
    check.at_least("depth", depth, 1)
    act = _activation(activation)
    channels, height, width = image_shape
    sizes = [channels * height * width] + [hidden] * depth
    layers = [layer for fan_in, fan_out in zip(sizes, sizes[1:]) for layer in (nn.Linear(fan_in, fan_out), act())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], num_classes))


class Residual(nn.Module):
    """ResNet's basic block: out = act(body(x) + shortcut(x))."""

    def __init__(self, channels_in, channels_out, stride, norm, act):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
            norm(channels_out),
            act(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            norm(channels_out),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), norm(channels_out)
            )
        self.act = act()

    def forward(self, x):
        return self.act(self.body(x) + self.shortcut(x))


@records.network("resnet18", title="ResNet-18")
def resnet18(image_shape, num_classes, *, norm=nn.Identity, activation="sigmoid", width=64, blocks=2):
    """ResNet-18 for small images: first convolution 3x3, no pooling before the blocks; sigmoid unless ``activation`` differs.

    Four stages of ``blocks`` blocks, of ``width`` channels and then twice as many each: the defaults are ResNet-18's.
    """
    check.at_least("width", width, 1)
    check.at_least("blocks", blocks, 1)
    act, last = _activation(activation), width
    layers = [nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False), norm(width), act()]
    for stage in range(4):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Residual(last, width << stage, stride, norm, act))
            last = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, num_classes))


@records.network("resnet18_bn", title="ResNet-18 with batch norm")
@records.passes_on_to(resnet18)
def resnet18_bn(image_shape, num_classes, **options):
    """The same with batch normalisation after every convolution."""
    return resnet18(image_shape, num_classes, norm=nn.BatchNorm2d, **options)


def _activation(name):
    check.one_of("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]

