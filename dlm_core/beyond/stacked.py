"""Many networks of one architecture as one: their weights are stacked, and the network is mapped
over them (``torch.func.vmap``).
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Networks(nn.Module):
    """One network with the weights of many: images [L, B, C, H, W] -> scores [L, B, K]."""

    def __init__(self, like: nn.Module, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.like = (like,)  # a tuple: its parameters are none of these
        self.names = [name for name, _ in like.named_parameters()]
        self.weights = nn.ParameterList()
        every = [list(model.parameters()) for model in models]
        for own, several in zip(like.parameters(), zip(*every)):
            stacked = torch.stack([each.detach() for each in several]).to(own.dtype)
            self.weights.append(nn.Parameter(stacked, own.requires_grad))
        buffers = [dict(model.named_buffers()) for model in models]
        self.state = {
            name: torch.stack([each[name] for each in buffers]).to(own.dtype)
            for name, own in like.named_buffers()
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of each lane's images."""
        mapped = vmap(self._one, randomness="different")
        with _Products() if images.is_cuda else contextlib.nullcontext():
            return mapped(list(self.weights), self.state, images)

    def _one(
        self,
        weights: Sequence[torch.Tensor],
        state: Mapping[str, torch.Tensor],
        images: torch.Tensor,
    ) -> Any:
        return functional_call(self.like[0], {**dict(zip(self.names, weights)), **state}, (images,))

    def keep(self, lanes: Sequence[int]) -> None:
        """Leave all others."""
        for weight in self.weights:
            weight.data = weight.detach()[lanes]
        self.state = {name: each[lanes] for name, each in self.state.items()}


class _Products(TorchFunctionMode):
    """Within it, a convolution is a product of matrices, ``convolution``.

    By itself, one of many networks is a convolution in groups, whose second derivative goes from
    group to group: on a GPU a launch for each lane. On a CPU that is the faster of the two.
    ``torch.nn.functional.unfold`` would launch once for each lane as well; ``Tensor.unfold`` is a
    view.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """What was called, or ``convolution`` instead of ``conv2d``."""
        called = convolution if function is F.conv2d else function
        return called(*args, **(kwargs or {}))


def convolution(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """``torch.conv2d`` as a product of the kernel with the patches that it meets; in groups or with
    ``padding`` in words, ``torch.conv2d`` itself.
    """
    if groups != 1 or isinstance(padding, str) or input.ndim != 4:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    strides, paddings, dilations = (
        (each,) * 2 if isinstance(each, int) else each for each in (stride, padding, dilation)
    )
    windows = F.pad(input, [each for each in reversed(paddings) for _ in range(2)])
    for axis, size in enumerate(weight.shape[2:]):
        reach = dilations[axis] * (size - 1) + 1
        windows = windows.unfold(2 + axis, reach, strides[axis])[..., :: dilations[axis]]
    shape = windows.shape[2:4]
    patches = windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
    out = weight.flatten(1) @ patches
    return (out if bias is None else out + bias[:, None]).unflatten(2, shape)
