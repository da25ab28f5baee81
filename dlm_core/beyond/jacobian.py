"""A client's update as a function of its images, with its Jacobian: any network, any optimizer.

Products go forward, a direction of the images at a time, or back, an entry of the update at a time;
many are computed at once. For one step a linear layer is given by what its gradient is made of,

    G = δᵀ u,    u [R, I] the rows that enter the layer,    δ [R, O] = dloss/doutput,

which is R·(O + I) numbers where G has O·I: far fewer for few rows.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad, jvp, replace_all_batch_norm_modules_, vjp, vmap

from dlm_core.beyond.at_once import at_once
from dlm_core.beyond.attention import plain_attention
from dlm_core.beyond.clients import Step
from dlm_core.observation import scores
from dlm_core.threads import own_generator

AT_ONCE = 64  # products side by side on a CPU: more cost memory and gain no time
LARGEST = 2**24  # numbers that they may have
# Tensors of a product on a GPU, each of the size of the vector and the images: the client's passes
# keep values and slopes.
TENSORS = 16
SAME = 1e-9  # relative difference up to which a gradient is that of its factors

Tensors = dict[str, torch.Tensor]


class Factors(NamedTuple):
    """What the gradient of a linear layer is made of: δ [R, O] and u [R, I]."""

    signal: torch.Tensor
    entered: torch.Tensor


class Tap(NamedTuple):
    """A linear layer that is given by its factors: its parameters' names, its output's shape."""

    parameters: dict[str, str]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Client:
    """A client that trains a network on its images.

    Attributes
    ----------
    model
        The network that it receives, in the mode that it trains in; a copy of it is kept.
    labels
        [N] class indices.
    loss
        (scores, labels) -> scalar.
    step
        Its optimizer, a step of ``clients``.
    options
        The optimizer's.
    learning_rate, local_steps, batch_size
        As in ``federated.train_locally``.

    Notes
    -----
    Chance in the network, such as dropout's, is the same in every pass. Batch norm in train mode
    takes the batch's statistics and keeps none.
    """

    model: nn.Module
    labels: torch.Tensor
    loss: Callable[..., torch.Tensor]
    step: Step
    options: Mapping[str, Any]
    learning_rate: float
    local_steps: int
    batch_size: int | None

    def __post_init__(self) -> None:
        own = copy.deepcopy(self.model)
        for module in own.modules():
            # a layer may be frozen, by eval(), in a network that trains
            if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
                replace_all_batch_norm_modules_(module)
        object.__setattr__(self, "model", own)

    @property
    def weights(self) -> Tensors:
        """{name: W_t} of what is trained, in float64."""
        named = self.model.named_parameters()
        return {name: p.detach().double() for name, p in named if p.requires_grad}

    def update(self, images: torch.Tensor, precision: torch.dtype = torch.float64) -> Tensors:
        """Δ as {parameter's name: tensor} of float64, which ``torch.func`` can differentiate.

        Parameters
        ----------
        images
            [N, C, H, W] float64.
        precision
            In which gradients are computed; steps are taken in float64.
        """
        with self._chance(images):
            return self._trained(images, precision)

    def _trained(self, images: torch.Tensor, precision: torch.dtype) -> Tensors:
        count = len(images)
        size = count if self.batch_size is None else self.batch_size
        before = self.weights
        weights, states = before, dict.fromkeys(before)
        for number in range(self.local_steps):
            batch = torch.arange(number * size, (number + 1) * size, device=images.device) % count
            taken = (images, self.labels) if size == count else (images[batch], self.labels[batch])
            slopes = grad(partial(self._loss, precision=precision))(weights, *taken)
            stepped = {n: self.stepped(w, slopes[n], states[n]) for n, w in weights.items()}
            weights = {name: w for name, (w, _) in stepped.items()}
            states = {name: state for name, (_, state) in stepped.items()}
        return {name: before[name] - weights[name] for name in before}

    def stepped(self, weight: torch.Tensor, slope: torch.Tensor, state: Any) -> tuple[Any, Any]:
        """(weight, state) after the optimizer's step."""
        return self.step(weight, slope, state, self.learning_rate, **self.options)

    def in_factors(
        self, images: torch.Tensor, taps: Mapping[str, Tap]
    ) -> tuple[Tensors, dict[str, Factors]]:
        """The update of a client of one step: Δ of most parameters, and the factors of the layers
        that ``taps`` names. The batch is all images.
        """
        before = self.weights
        within = {name for tap in taps.values() for name in tap.parameters.values()}
        fixed = {name: w for name, w in before.items() if name in within}
        free = {name: w for name, w in before.items() if name not in within}
        zeros = {name: images.new_zeros(tap.shape) for name, tap in taps.items()}

        def loss(weights: Tensors, added: Tensors) -> tuple[torch.Tensor, Tensors]:
            entered: Tensors = {}

            def hear(name: str, given: Any, output: torch.Tensor) -> torch.Tensor:
                entered[name] = given[0]
                return output + added[name]

            with self._listening(taps, hear), self._chance(images):
                return self._loss({**fixed, **weights}, images, self.labels), entered

        (slopes, signals), entered = grad(loss, argnums=(0, 1), has_aux=True)(free, zeros)
        update = {name: w - self.stepped(w, slopes[name], None)[0] for name, w in free.items()}
        made_of = {n: Factors(signals[n].flatten(0, -2), entered[n].flatten(0, -2)) for n in taps}
        return update, made_of

    def taps(self, images: torch.Tensor) -> dict[str, Tap]:
        """The linear layers that are worth it, and whose gradient is that of their factors: called
        once, with weights of their own.
        """
        if self.local_steps > 1 or self.batch_size not in (None, len(images)):
            return {}
        linear = [n for n, each in self.model.named_modules() if isinstance(each, nn.Linear)]
        calls: dict[str, list[tuple[bool, tuple[int, ...]]]] = {name: [] for name in linear}

        def hear(name: str, given: Any, output: torch.Tensor) -> torch.Tensor:
            calls[name].append((len(given) == 1, tuple(output.shape)))
            return output

        with self._listening(linear, hear), self._chance(images), torch.no_grad():
            self._loss(self.weights, images, self.labels)
        taps = {}
        for name, heard in calls.items():
            layer = self.model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            own = {n: f"{name}.{n}".lstrip(".") for n, _ in layer.named_parameters(recurse=False)}
            own = {kind: full for kind, full in own.items() if full in self.weights}
            if len(heard) == 1 and heard[0][0] and "weight" in own:
                (outputs, inputs), shape = layer.weight.shape, heard[0][1]
                rows = torch.Size(shape).numel() // outputs
                if rows * (outputs + inputs) < outputs * inputs:
                    taps[name] = Tap(own, shape)
        return {name: tap for name, tap in taps.items() if self._is_made_of(images, name, tap)}

    def _chance(self, images: torch.Tensor) -> AbstractContextManager[None]:
        return own_generator(seed=0, device=images.device)

    def _is_made_of(self, images: torch.Tensor, name: str, tap: Tap) -> bool:
        with self._chance(images):
            slopes = grad(self._loss)(self.weights, images, self.labels)
        delta, u = self.in_factors(images, {name: tap})[1][name]
        made = {"weight": delta.T @ u, "bias": delta.sum(0)}
        pairs = [(slopes[full], made[kind]) for kind, full in tap.parameters.items()]
        return all(float((a - b).norm()) <= SAME * float(a.norm()) for a, b in pairs)

    def _loss(
        self,
        weights: Tensors,
        images: torch.Tensor,
        labels: torch.Tensor,
        precision: torch.dtype = torch.float64,
    ) -> torch.Tensor:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        held = {**{name: tensor.detach() for name, tensor in named}, **weights}
        held = {n: t.to(precision) if t.is_floating_point() else t for n, t in held.items()}
        with plain_attention():
            given = functional_call(self.model, held, images.to(precision))
        return self.loss(scores(given), labels)

    def _listening(
        self, layers: Any, hear: Callable[[str, Any, torch.Tensor], torch.Tensor]
    ) -> ExitStack:
        """Within it ``hear`` gets (name, what enters, what leaves) of layers, and returns the
        latter.
        """
        stack = ExitStack()
        for name in layers:
            hook = self.model.get_submodule(name).register_forward_hook(
                lambda _, given, output, name=name: hear(name, given, output)
            )
            stack.callback(hook.remove)
        return stack


def slope_along(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, direction: torch.Tensor
) -> torch.Tensor:
    """How ``function`` moves as ``x`` moves along ``direction``."""
    with warnings.catch_warnings():
        # torch's, on its first use of forward mode
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        return jvp(function, (x,), (direction,))[1]


class Jacobian:
    """Of a client's update in its images, at these images.

    The update is carried by one long vector: Δ of most parameters, the factors of some layers.

    Parameters
    ----------
    client
        The client.
    images
        [N, C, H, W] float64.

    Attributes
    ----------
    update
        {parameter's name: Δ} there.
    taps, factors
        The layers that are given by their factors, and these.
    lengths
        {name of a parameter or of a tapped layer: its entries of the vector}, in order.
    size, height
        n, the pixels of all images; m, the vector's length.
    """

    def __init__(self, client: Client, images: torch.Tensor) -> None:
        self.client, self.images = client, images
        self.update = {n: d.detach() for n, d in client.update(images).items()}
        self.taps = client.taps(images)
        whole, self.factors = self._carried(images)
        self.lengths = {name: d.numel() for name, d in whole.items()}
        for name, each in self.factors.items():
            self.lengths[name] = each.signal.numel() + each.entered.numel()
        self.size, self.height = images.numel(), sum(self.lengths.values())

    def forward(self, directions: torch.Tensor) -> Iterator[torch.Tensor]:
        """[k, n] directions of the images -> [k, m] how the vector moves along each, some at a
        time.
        """
        return self._chunks(self._push, directions)

    def back(self, entries: torch.Tensor) -> Iterator[torch.Tensor]:
        """[k, m] -> [k, n] the transposed Jacobian times each, some at a time."""
        _, pull = vjp(self._vector, self.images)[:2]
        return self._chunks(lambda u: pull(u)[0].flatten(), entries)

    def _push(self, direction: torch.Tensor) -> torch.Tensor:
        return slope_along(self._vector, self.images, direction.reshape(self.images.shape))

    def _vector(self, images: torch.Tensor) -> torch.Tensor:
        whole, factors = self._carried(images)
        parts = [*whole.values(), *(part for each in factors.values() for part in each)]
        return torch.cat([part.flatten() for part in parts])

    def _carried(self, images: torch.Tensor) -> tuple[Tensors, dict[str, Factors]]:
        if self.taps:
            return self.client.in_factors(images, self.taps)
        return self.client.update(images), {}

    def _chunks(
        self, product: Callable[[torch.Tensor], torch.Tensor], each: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        on_cpu = max(1, min(AT_ONCE, LARGEST // self.height))
        size = each.element_size() * TENSORS * (self.height + self.size)
        for some in each.split(at_once(size, each.device, on_cpu)):
            yield vmap(product, randomness="same")(some).detach()
