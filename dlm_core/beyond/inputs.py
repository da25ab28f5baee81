"""What stands in an update whatever the client did: the inputs of its linear layers.

The update of a linear layer's weight and bias together is Σ δ·[x; 1]ᵀ over all inputs x that
passed through it. If one did, it has rank one, and x is the ratio of the weight's update to the
bias's: for any loss, label, optimizer's scale, clipping or dropout behind the layer, and after
several steps on one image as long as nothing in front of the layer moved its input. With B inputs
it has rank B at most. Weight decay and Adam's kin change the update entry by entry; then its rank
is full and nothing is said.

Three things a rank cannot tell, and what is done about them: several inputs may leave one direction
where δ is the same for all of them (a network with one output, softmax over two classes): they are
looked for, and ``alone`` says so. A layer without bias gives the direction of its input and not its
length. A layer that sees several inputs of one image (patches, tokens) has their rank.
"""

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import check, records
from dlm_core.arrays import Precision
from dlm_core.observation import Observation, scores, unit_in_last_place
from dlm_core.results import Evidence, Explains, Reconstruction, Status
from dlm_core.threads import own_generator

ARITHMETIC = 4e-6  # of the largest singular value: what the client's float32 arithmetic leaves
NOISE = 3.0  # singular values up to so many times what rounding of the weights leaves are noise
NEAR = 1e-4  # how far inputs are moved, over their own size, to see how δ turns
TURNS = 1e-4  # the angle that δ turns by, over how far its input moved, from which two show as two
PROBES = 4
EVEN, MANY = (
    0.02,
    0.3,
)  # how nearly, and how many, entries move by the largest amount in such a step


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """What the update of one linear layer says about what passed through it.

    Attributes
    ----------
    name
        Of the layer.
    features, outputs
        Numbers in one input, and in what the layer makes of it.
    rank
        Directions in the layer's update above rounding, 0 where it did not move.
    rows
        Inputs that pass through it for one image: 1, or its patches or tokens.
    pixels
        Whether its input is the pixels of an image, perhaps in another order and normalised by the
        network; then nothing but another image gives another input.
    values
        [features] float64, the input itself where ``rank`` and ``rows`` are 1; of a layer without
        bias its direction, of length 1. None elsewhere.
    error
        Root mean square error of ``values`` from rounding, relative to their root mean square.
    scaled
        Whether the length of ``values`` is known: the layer has a bias, and it moved.
    alone
        Whether only one input leaves such an update; else ``values`` may be a weighted mean of
        several that are alike to this layer.
    image
        [1, C, H, W] where ``values`` are ``pixels``: in the client's own range, whatever that is.
        None elsewhere.
    """

    name: str
    features: int
    outputs: int
    rank: int
    rows: int
    pixels: bool
    values: torch.Tensor | None = field(repr=False, default=None)
    error: float = math.nan
    scaled: bool = True
    alone: bool = False
    image: torch.Tensor | None = field(repr=False, default=None)

    @property
    def directions(self) -> int:
        """Inputs, at least, that left the update: its rank; 0 where that says nothing, since it is
        full or an image has several inputs here.
        """
        full = self.rank >= min(self.outputs, self.features)
        return 0 if self.rows > 1 or (full and self.rank > 1) else self.rank

    @property
    def sentence(self) -> str | None:
        """What it says, in words; None for nothing."""
        if self.values is not None:
            return self._shown()
        if self.directions < 2:
            return None
        of = "images" if self.pixels else "images or steps"
        return (
            f"the update of layer {self.name!r} has {self.directions} directions: so many inputs "
            f"or more are in it, of several {of}, or of earlier ones that momentum has kept"
        )

    def _shown(self) -> str:
        which = "the image, " if self.pixels else ""
        known = f"to {self.error:.0e}" if self.scaled else f"up to its length, to {self.error:.0e}"
        said = (
            f"the input of layer {self.name!r} ({which}{self.features:,} numbers) "
            f"stands in the update, {known}"
        )
        if self.alone:
            return said
        return f"{said}, or a mean of several inputs, which this update cannot tell apart"


@dataclass(frozen=True, kw_only=True)
class Ratio(Evidence):
    """The evidence of ``division``: the rank of a layer's update.

    Attributes
    ----------
    layer
        That shows the image.
    error
        As in ``LayerInput``.
    alone
        As there.
    """

    layer: str
    error: float
    alone: bool
    said: str = ""

    @property
    def verdict(self) -> str:
        """What the layer says."""
        return self.said

    @property
    def explains(self) -> Explains:
        """The image is read and not fitted: fully where it can only be one."""
        return Explains.FULLY if self.alone else Explains.PARTLY


@records.attack(
    "division",
    title="division",
    colour=5,
    marker="d",
    client="one image, whatever loss, label, optimizer's scale and steps; a linear layer in front",
    several=False,
    seeded=False,
    audited=-1,
    scene={"network": "mlp"},
)
@check.arguments
def division(seen: Observation, *, transmitted: Precision | None = None) -> Reconstruction:
    """Read the image off the update of a linear layer that it passed through, by a division.

    Parameters
    ----------
    seen
        What the observer sees.
    transmitted
        Precision to which W_{t+1} was rounded, where that is not its own.

    Returns
    -------
    Reconstruction
        In the client's own range of pixels: an input that the client normalised stays so. Its
        evidence is ``Ratio``; labels are -1, which it does not tell.

    Raises
    ------
    ValueError
        Where no linear layer's update has rank one, or where its input is not the image.
    """
    began = time.perf_counter()
    return replace(shown(layer_inputs(seen, transmitted)), seconds=time.perf_counter() - began)


def shown(layers: Iterable[LayerInput]) -> Reconstruction:
    """The image that one of these layers shows, the best of them; ValueError where none does."""
    found = [each for each in layers if each.image is not None]
    if not found:
        raise ValueError(
            "no linear layer that the image passes through has an update of rank one, "
            "from which a division would show it"
        )
    best = min(found, key=lambda each: (not each.alone, each.error))
    assert best.image is not None and best.sentence is not None
    device = best.image.device
    return Reconstruction(
        images=best.image,
        labels=torch.full((1,), -1, device=device),
        status=Status.CONVERGED,
        vouched=torch.full((1,), best.alone, device=device),
        evidence=Ratio(
            losses=[],
            loss=best.error**2,
            layer=best.name,
            error=best.error,
            alone=best.alone,
            said=best.sentence,
        ),
    )


@check.arguments
def layer_inputs(seen: Observation, transmitted: Precision | None = None) -> list[LayerInput]:
    """What the update of each linear layer says, in the order in which an image passes through
    them; layers that no image passes through, or more than once, are left out.

    Parameters
    ----------
    seen
        What the observer sees.
    transmitted
        As in ``division``.
    """
    return read(seen.model, seen.weights_after, seen.image_shape, transmitted)


def read(
    model: nn.Module,
    weights_after: Mapping[str, torch.Tensor],
    image_shape: Sequence[int],
    transmitted: torch.dtype | None = None,
) -> list[LayerInput]:
    """The same of a network that an Observation does not take, such as one whose last layer has no
    bias.

    Parameters
    ----------
    model
        With the weights W_t.
    weights_after
        W_{t+1}; of what it lacks nothing is said.
    image_shape
        (C, H, W).
    transmitted
        As in ``division``.
    """
    after = {
        name: w.to(transmitted) if transmitted and w.is_floating_point() else w
        for name, w in weights_after.items()
    }
    before = dict(model.named_parameters())
    found = []
    traced = _Traced(model, image_shape)
    for name, layer in traced.layers.items():
        weight = _moved(before, after, f"{name}.weight")
        if weight is None:
            continue
        bias = None if layer.bias is None else _moved(before, after, f"{name}.bias")
        found.append(_of_layer(traced, name, weight, bias))
    return found


Moved = tuple[torch.Tensor, torch.Tensor]  # Δ of a tensor, and the variance of its rounding


def _moved(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], name: str
) -> Moved | None:
    if name not in before or name not in after:
        return None
    old, new = before[name].detach(), after[name].detach().to(before[name].device)
    return old.double() - new.double(), unit_in_last_place(new).square() / 12


def _of_layer(traced: "_Traced", name: str, weight: Moved, bias: Moved | None) -> LayerInput:
    outputs, features = weight[0].shape
    delta, variance = weight
    scaled = bias is not None and bool(bias[0].any())
    if bias is not None and scaled:
        delta = torch.cat([delta, bias[0][:, None]], 1)
        variance = torch.cat([variance, bias[1][:, None]], 1)
    rank, left, largest = _rank(delta, variance)
    if not weight[0].any():
        rank = 0
    elif _sign_like(delta):
        rank = min(outputs, features)
    about: dict[str, Any] = {
        "name": name,
        "features": features,
        "outputs": outputs,
        "pixels": traced.is_pixels(name),
        "rank": rank,
        "rows": traced.rows[name],
        "scaled": scaled,
    }
    if rank != 1 or traced.rows[name] != 1:
        return LayerInput(**about)
    along = left @ delta  # [features (+ 1)], of length ``largest``
    values, unit = along[:features], float(along[-1]) if scaled else float(along[:features].norm())
    noise = float(variance[:, :features].mean().sqrt()) + ARITHMETIC * largest / math.sqrt(
        outputs * features
    )
    error = noise / float(values.square().mean().sqrt())
    if unit == 0 or not math.isfinite(error):
        return LayerInput(**about)
    values = values / unit
    image = traced.image_of(name, values) if scaled and about["pixels"] else None
    alone = scaled and traced.tells_apart(name, values)
    return LayerInput(**about, values=values, error=error, alone=alone, image=image)


def _sign_like(delta: torch.Tensor) -> bool:
    """Whether the entries that moved did by the same amount, as in a first step of Adam's kin: the
    signs of a matrix of rank one are one, too, and tell no input.
    """
    moved = delta[delta != 0].abs()
    return bool((moved > (1 - EVEN) * moved.max()).double().mean() > MANY)


def _rank(delta: torch.Tensor, variance: torch.Tensor) -> tuple[int, torch.Tensor, float]:
    """(directions above rounding, the first one among the outputs, its singular value)."""
    outputs, inputs = delta.shape
    wide = outputs <= inputs
    # of the smaller side: singular values below 1e-8 of the first do not matter
    squares, vectors = torch.linalg.eigh(delta @ delta.T if wide else delta.T @ delta)
    values = squares.clamp(min=0).flip(0).sqrt()
    first = vectors[:, -1]
    largest = float(values[0])
    if largest == 0:
        return 0, delta.new_zeros(outputs), 0.0
    left = first if wide else delta @ first / largest
    rounding = float(variance.mean().sqrt()) * (math.sqrt(outputs) + math.sqrt(inputs))
    rank = int((values > max(NOISE * rounding, ARITHMETIC * largest)).sum())
    return rank, left, largest


class _Map(NamedTuple):
    """How a layer's input follows from the pixels.

    Attributes
    ----------
    position
        The pixel of each entry whose factor is not zero.
    factor, constant
        [features].
    """

    position: torch.Tensor
    factor: torch.Tensor
    constant: torch.Tensor


class _Traced:
    """A copy of a network in float64 whose linear layers tell what passes through them.

    Attributes
    ----------
    layers
        {name: layer}, those through which an image passes once, in that order.
    rows
        {name: inputs of it for one image}.
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        self.model = copy.deepcopy(model).double().requires_grad_(False)
        self.shape = tuple(image_shape)
        self.device = next(self.model.parameters()).device
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.maps: dict[str, _Map | None] = {}
        linear = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        for name, module in linear.items():
            module.register_forward_pre_hook(
                lambda _, given, name=name: self.seen.setdefault(name, []).append(given[0])
            )
        self.generator = torch.Generator().manual_seed(0)
        grey = torch.full((1, *self.shape), 0.5, dtype=torch.float64)
        once = {n: each[0] for n, each in self._pass(grey).items() if len(each) == 1}
        self.layers = {name: linear[name] for name in once}
        self.rows = {name: each[..., 0].numel() for name, each in once.items()}

    def _pass(self, images: torch.Tensor, train: bool = False) -> dict[str, list[torch.Tensor]]:
        """{layer: what passed through it}, in eval mode, or in the one the client trains in."""
        self.model.train(train)
        self.seen = {}
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.no_grad(), own_generator(seed=0, device=self.device):
            self.model(images.to(self.device))
        for name, buffer in self.model.named_buffers():  # batch norm's statistics
            buffer.copy_(kept[name])
        return self.seen

    def is_pixels(self, name: str) -> bool:
        """Whether the layer's input is the image's pixels, each times a factor and plus a constant,
        in any order, and all of them.
        """
        return self.rows[name] == 1 and self._map(name) is not None

    def image_of(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """[1, C, H, W] from a layer's input where it ``is_pixels``."""
        found = self._map(name)
        assert found is not None
        position, factor, constant = found
        used = factor != 0
        pixels = (values - constant)[used] / factor[used]
        count = math.prod(self.shape)
        total = values.new_zeros(count).index_add(0, position, torch.ones_like(pixels))
        image = values.new_zeros(count).index_add(0, position, pixels) / total
        return image.reshape(1, *self.shape)

    def _map(self, name: str) -> "_Map | None":
        if name not in self.maps:
            self.maps[name] = self._make_map(name)
        return self.maps[name]

    def _make_map(self, name: str) -> "_Map | None":
        count = math.prod(self.shape)
        places = torch.arange(1, count + 1, dtype=torch.float64) / count
        noise = torch.rand(count, generator=self.generator, dtype=torch.float64)
        probes = torch.stack([torch.zeros(count), torch.ones(count), places, noise])
        taken = self._inputs(name, probes.reshape(-1, *self.shape))
        if taken is None:
            return None
        constant, factor = taken[0], taken[1] - taken[0]
        factor = torch.where(factor.abs() > 1e-9, factor, 0.0)
        used = factor != 0
        position = ((taken[2] - constant)[used] / factor[used] * count - 1).round().long()
        if not used.any() or position.min() < 0 or position.max() >= count:
            return None
        expected = constant.clone()
        expected[used] += factor[used] * noise.to(constant)[position]
        found = torch.allclose(taken[3], expected, rtol=1e-7, atol=1e-9)
        every = len(position.unique()) == count
        return _Map(position, factor, constant) if found and every else None

    def _inputs(self, name: str, images: torch.Tensor) -> torch.Tensor | None:
        """[N, features] that reach the layer, or None where training changes them: dropout or batch
        norm's own statistics in front of it.
        """
        in_eval = self._pass(images)[name][0]
        try:
            in_training = self._pass(images, train=True)[name][0]
        except ValueError:  # a single value per channel, of which no statistic can be taken
            return None
        return in_eval.flatten(1) if torch.equal(in_eval, in_training) else None

    def tells_apart(self, name: str, values: torch.Tensor) -> bool:
        """Whether δ turns where this input changes: then two inputs would show as two. It does not
        in a network of one output, or of two classes, whose units are switched and not smooth, and
        where the scores are so far apart that the softmax has saturated.
        """
        noise = torch.randn(PROBES, len(values), generator=self.generator, dtype=torch.float64)
        given = values * torch.cat([torch.ones_like(noise[:1]), 1 + NEAR * noise]).to(values)
        signals = self._signals(name, given).flatten(1)
        first = signals[0] / signals[0].norm()
        beside = signals[1:] - (signals[1:] @ first)[:, None] * first
        turned = beside.norm(dim=1) / signals[1:].norm(dim=1)
        return bool(turned.max() > TURNS * NEAR)

    def _signals(self, name: str, given: torch.Tensor) -> torch.Tensor:
        """dL/dz at the layer's output for each input [N, features], L the usual loss."""
        layer, kept = self.layers[name], {}

        def given_instead(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (given.reshape(len(given), *arguments[0].shape[1:]),)

        def keep(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            kept["output"] = output.detach().requires_grad_()
            return kept["output"]

        hooks = [layer.register_forward_pre_hook(given_instead), layer.register_forward_hook(keep)]
        self.model.eval()
        try:
            with torch.enable_grad(), own_generator(seed=0, device=self.device):
                grey = torch.full((len(given), *self.shape), 0.5, dtype=torch.float64)
                output = scores(self.model(grey.to(self.device))).flatten(1)
                if output.shape[1] > 1:
                    loss = F.cross_entropy(output, output[0].argmin().expand(len(given)))
                else:
                    loss = F.softplus(output).sum()
                (signals,) = torch.autograd.grad(loss, kept["output"])
        finally:
            for hook in hooks:
                hook.remove()
        return signals
