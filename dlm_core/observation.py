"""What the observer sees of a client: two snapshots of the weights, and what follows from them
without any assumption.

Sign convention, here and everywhere: Δ = W_t - W_{t+1}, so that one SGD step of learning rate η
gives Δ = η·g.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields
from functools import cached_property
from typing import Annotated, Any, NamedTuple

import torch
from torch import nn

from dlm_core import check
from dlm_core.arrays import ImageShape, Shape
from dlm_core.threads import own_generator
from dlm_core.weights import StateDict, check_finite, check_fit

TINY = 1e-300  # for a zero that is divided by, or whose logarithm is taken


class Unchanged(ValueError):
    """No parameter moved between the two snapshots.

    Attributes
    ----------
    statistics
        Names of the running statistics that moved all the same.
    """

    def __init__(self, said: str, statistics: Sequence[str] = ()) -> None:
        super().__init__(said)
        self.statistics = tuple(statistics)


class Head(NamedTuple):
    """The layer whose output the network returns as class scores, and its part of Δ.

    Attributes
    ----------
    layer
        The ``nn.Linear`` with bias, with the weights of W_t: n inputs, K outputs.
    names
        Of its weight and its bias among the network's parameters.
    delta_weight, delta_bias
        [K, n] and [K], float64.
    variance_weight, variance_bias
        What rounding W_{t+1} adds to each of their entries.
    """

    layer: nn.Linear
    names: tuple[str, str]
    delta_weight: torch.Tensor
    delta_bias: torch.Tensor
    variance_weight: torch.Tensor
    variance_bias: torch.Tensor


@dataclass(frozen=True)
class Observation:
    """All that an honest-but-curious observer of FedAvg holds about one client in one round.

    Attributes
    ----------
    model
        The network with the weights the client received, W_t.
    weights_after
        The state dict that the client sent back, W_{t+1}, batch norm's running statistics included.
    image_shape
        (C, H, W), as public as the architecture.
    num_classes
        K, the width of the network's head.
    head_name
        Where ``find_head`` was asked before, the name that it gave; else it is asked. No attribute.

    Raises
    ------
    ValueError
        Where the snapshots do not fit each other or hold NaN or infinity (the tensor is named), or
        the model takes no such images or has not so many classes.
    Unchanged
        Where no parameter moved; it says whether running statistics did, which leak as well.

    Notes
    -----
    What follows from the snapshots is computed on first use and kept: ``delta``,
    ``rounding_variance``, ``head`` and the rest. Their tensors are shared by all who ask: nobody
    writes into them. A pickle leaves them out.
    """

    model: nn.Module = field(repr=False)
    weights_after: StateDict = field(repr=False)
    image_shape: Annotated[tuple[int, ...], Shape()]
    num_classes: check.Count
    head_name: InitVar[str | None] = None

    def __post_init__(self, head_name: str | None) -> None:
        check.fields(self)
        if head_name is not None:
            self.__dict__["_last_layer"] = head_name, self.model.get_submodule(head_name)
        before = self.model.state_dict()
        check_fit("weights_after", self.weights_after, before)
        check_finite("the model", before)
        check_finite("weights_after", self.weights_after)
        if all(torch.equal(p, a) for p, a in zip(self.model.parameters(), self._after)):
            raise _unchanged(self.model, self.weights_after)
        found = self._last_layer[1].out_features
        if self.num_classes != found:
            raise ValueError(f"num_classes is {self.num_classes}; the model has {found} classes")

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: self.__dict__[each.name] for each in fields(self)}

    @property
    def _after(self) -> list[torch.Tensor]:
        """W_{t+1} in the parameters' order, on the model's device."""
        return [self.weights_after[n].to(p.device) for n, p in self.model.named_parameters()]

    @property
    def parameter_names(self) -> list[str]:
        """The parameters' names in the model's order, which is that of every tuple here."""
        return [name for name, _ in self.model.named_parameters()]

    @cached_property
    def delta(self) -> tuple[torch.Tensor, ...]:
        """Δ = W_t - W_{t+1}, one float64 tensor per parameter, on the model's device."""
        pairs = zip(self.model.parameters(), self._after)
        return tuple(p.detach().double() - after.double() for p, after in pairs)

    @cached_property
    def delta_by_name(self) -> dict[str, torch.Tensor]:
        """The same tensors as {parameter's name: tensor}."""
        return dict(zip(self.parameter_names, self.delta))

    @cached_property
    def rounding_variance(self) -> tuple[torch.Tensor, ...]:
        """Variance that rounding W_{t+1} to its own dtype adds to each entry of Δ: ulp²/12, one
        tensor per parameter.
        """
        return tuple(unit_in_last_place(after).square() / 12 for after in self._after)

    @cached_property
    def rounding_share(self) -> float:
        """The part of ‖Δ‖² that is rounding of W_{t+1} to its own dtype: nothing explains Δ better
        than to this misfit. Where the weights were sent coarser than they are held, as bfloat16 in
        float32, the rounding is larger, and this does not know it.

        A weight that moved by less than its rounding error adds no more than it moved.
        """
        squares = [layer.square() for layer in self.delta]
        noise = sum(
            float(torch.minimum(v, s).sum()) for v, s in zip(self.rounding_variance, squares)
        )
        return noise / sum(float(s.sum()) for s in squares)

    @cached_property
    def _last_layer(self) -> tuple[str, nn.Linear]:
        return find_head(self.model, self.image_shape)

    @cached_property
    def has_class_scores(self) -> bool:
        """Whether the last layer's outputs are class scores: the network returns them, or as many
        numbers in their order, as log-softmax leaves them. Cosines with an image per class are
        others. A layer of several rows an image, which the network then combines, is not asked.
        """
        return gives_class_scores(self.model, self.image_shape, self._last_layer[0])

    @cached_property
    def head(self) -> Head:
        """The last layer with its part of Δ, found by tracing the forward pass."""
        _, layer = self._last_layer
        # By identity: a weight that several layers share has the name of the first of them.
        own = [id(p) for p in self.model.parameters()]
        for each in ("weight", "bias"):
            if id(getattr(layer, each)) not in own:
                raise ValueError(f"the last layer's {each} is no parameter, but made of others")
        weight, bias = own.index(id(layer.weight)), own.index(id(layer.bias))
        names = (self.parameter_names[weight], self.parameter_names[bias])
        deltas, variances = self.delta, self.rounding_variance
        return Head(layer, names, deltas[weight], deltas[bias], variances[weight], variances[bias])


@check.arguments
def observe(
    model: nn.Module, before: StateDict, after: StateDict, image_shape: ImageShape
) -> Observation:
    """Return the Observation of two state dicts of ``model``'s architecture, as a practitioner
    holds them.

    Parameters
    ----------
    model
        The network; a copy takes the weights of ``before``.
    before, after
        W_t and W_{t+1}; copies are kept, so that a client may train on.
    image_shape
        (C, H, W).

    Raises
    ------
    ValueError
        Where ``before`` or ``after`` does not fit the model; the tensor is named.
    """
    check_fit("before", before, model.state_dict())
    model = copy.deepcopy(model)
    model.load_state_dict(before)
    name, head = find_head(model, image_shape)
    sent = {key: tensor.detach().clone() for key, tensor in after.items()}
    return Observation(model, sent, tuple(image_shape), head.out_features, name)


def _unchanged(model: nn.Module, after: StateDict) -> Unchanged:
    """What to say where no parameter moved."""
    buffers = {n: w for n, w in model.named_buffers() if n in after and w.is_floating_point()}
    moved = [n for n, w in buffers.items() if not torch.equal(w, after[n].to(w))]
    if not moved:
        return Unchanged(
            "no weight changed, weights_after equals the model's weights: the client has not "
            "trained, or sent what it received"
        )
    return Unchanged(
        f"no parameter changed, but {len(moved)} running statistic{'s' * (len(moved) > 1)} did, "
        f"{moved[0]!r} first: they are means of what passed through the network, and leak as much "
        "of the client's images; no attack here reads them alone",
        moved,
    )


@check.arguments
def find_head(model: nn.Module, image_shape: ImageShape) -> tuple[str, nn.Linear]:
    """Return (name, layer) of the ``nn.Linear`` whose output the network returns as class scores.

    One image is sent through a copy of the network in eval mode, and every linear layer's output is
    compared with the network's; where none is it (scores are transformed once more), the last one
    called is taken.

    Raises
    ------
    ValueError
        Where the network cannot take an image of this shape, or returns no scores, or calls no
        linear layer, or that one has no bias.
    """
    called, output = _linear_layers(model, image_shape)
    last = [entry for entry in called if entry[2] is output or torch.equal(entry[2], output)]
    if not called or (last or called)[-1][1].bias is None:
        raise ValueError(
            "the model does not end in an nn.Linear layer with bias; "
            "class scores must come from one"
        )
    name = (last or called)[-1][0]
    head = model.get_submodule(name)
    assert isinstance(head, nn.Linear)
    return name, head


def _linear_layers(
    model: nn.Module, image_shape: Sequence[int]
) -> tuple[list[tuple[str, nn.Linear, torch.Tensor]], torch.Tensor]:
    """([(name, layer, its output)] as one image calls them, what the network returns); of a copy,
    in eval mode.
    """
    called: list[tuple[str, nn.Linear, torch.Tensor]] = []
    traced = copy.deepcopy(model).eval()
    for name, module in traced.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, _, output, name=name: called.append((name, m, output))
            )
    floating = (p for p in model.parameters() if p.is_floating_point())
    like = next(floating, torch.zeros(()))
    # from black to white: of a constant image, standardisation by its own spread leaves NaN
    ramp = torch.linspace(0, 1, math.prod(image_shape)).reshape(1, *image_shape).to(like)
    try:
        with torch.no_grad(), own_generator(device=like.device):
            returned = traced(ramp)
    except Exception as error:  # whatever a user's network raises
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"image_shape is {tuple(image_shape)}; the model does not take such an image ({said})"
        ) from None
    return called, scores(returned)


def gives_class_scores(model: nn.Module, image_shape: ImageShape, name: str) -> bool:
    """Whether the outputs of a linear layer are the network's class scores, as
    ``Observation.has_class_scores`` says.
    """
    called, output = _linear_layers(model, image_shape)
    layer, own = next((each[1], each[2].flatten()) for each in reversed(called) if each[0] == name)
    if len(own) > layer.out_features:
        return True
    returned = output.flatten()
    order = own[: len(returned)].argsort()
    return len(own) >= len(returned) and bool((returned[order].diff() >= 0).all())


def scores(output: Any) -> torch.Tensor:
    """The class scores among what a network returns: the tensor itself, ``.logits``, "logits", or
    the first of several; ValueError where that is no tensor.
    """
    found = output
    if hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, Mapping):
        found = output.get("logits", next(iter(output.values()), None))
    elif isinstance(output, Sequence) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor):
        raise ValueError(
            f"the model returns {check.shown(output)}, which are no class scores: "
            "a tensor, .logits, or several of which they are the first"
        )
    return found


def check_per_parameter(seen: Observation, argument: str, given: Sequence[torch.Tensor]) -> None:
    """Raise ValueError unless ``given`` has one tensor per parameter, of its shape."""
    named = list(seen.model.named_parameters())
    if len(given) != len(named):
        raise ValueError(
            f"{argument} has {len(given)} entries; the model has {len(named)} parameters"
        )
    for tensor, (name, p) in zip(given, named):
        if tensor.shape != p.shape:
            raise ValueError(
                f"{argument} has shape {list(tensor.shape)} for {name!r}, which has {list(p.shape)}"
            )


@check.arguments
def unit_in_last_place(weights: torch.Tensor) -> torch.Tensor:
    """The distance of each weight to the next number of its dtype, as float64; 0 of whole numbers,
    which no rounding moves.
    """
    if not weights.is_floating_point():
        return torch.zeros_like(weights, dtype=torch.float64)
    exponent = weights.abs().double().clamp(min=TINY).log2().floor()
    return torch.finfo(weights.dtype).eps * torch.exp2(exponent)
