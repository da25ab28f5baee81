"""What stands in an update whatever the client did: the inputs of its linear layers.

The update of a linear layer's weight and bias together is Σ δ·[x; 1]ᵀ over all inputs x that
passed through it. If one did, it has rank one, and x is the ratio of the weight's update to the
bias's: for any loss, label, optimizer's scale, clipping or dropout behind the layer, and after
several steps on one image as long as nothing in front of the layer moved its input. With B inputs
it has rank B at most. Weight decay and Adam's kin change the update entry by entry; then its rank
is full and nothing is said.

What a rank cannot tell, and what is done about it: several inputs may leave one direction where δ
is the same for all of them (a network with one output, softmax over two classes), or where rounding
hides how it differs: they are looked for, and ``alone`` says so. Several steps of Adam's kin may
leave the signs of an input, whose rank is one as well: ``signs``. A layer without bias gives the
direction of its input and not its length. A layer that sees several inputs of one image (patches,
tokens) has their rank. A layer whose weight or bias is used elsewhere as well is left out.
"""

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import check, records
from dlm_core.arrays import Precision
from dlm_core.observation import TINY, Observation, scores, unit_in_last_place
from dlm_core.results import Evidence, Explains, Reconstruction, Status
from dlm_core.threads import own_generator

ARITHMETIC = 4e-6  # of the largest singular value: what the client's float32 arithmetic leaves
NOISE = 3.0  # singular values up to so many times what rounding of the weights leaves are noise
NEAR = 1e-4  # how far inputs are moved, over their own size, to see how δ turns
TURNS = 1e-4  # the angle that δ turns by, over how far its input moved, from which two show as two
AWAY = 0.1  # how far inputs are moved to see whether rounding would hide that δ turns
HIDDEN = 40.0  # times the relative size below which rounding hides a direction: what δ turns by
PROBES = 4
EVEN, MANY, MOST = (
    0.02,
    0.3,
    0.9,
)  # how nearly, and how many, entries move by the largest amount in such a step; in several
LENGTH = 0.1  # error of the bias's update, relative, up to which the input's length is known
FITS = 0.999  # cosine of δ with the update's, from which a label is taken for the client's
GAP = 2.5  # between the singular values of inputs and those of what else changed an update
HALF = 2.0**-8  # of bfloat16's numbers, what rounding leaves
LEFT = 0.01  # what else changed it, of the first singular value, up to which an input is shown


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
    standing
        Those of them that stand out over what a little weight decay, half precision on the way or
        the rounding of many steps leave, which falls without a gap.
    rows
        Inputs that pass through it for one image: 1, or its patches or tokens.
    pixels
        Whether its input is the pixels of an image, perhaps in another order and normalised by the
        network; then nothing but another image gives another input.
    fixed
        Whether no parameter stands in front of it, so that several steps on an image leave its
        input.
    values
        [features] float64, the input itself where ``rank`` and ``rows`` are 1, or where of an
        image's pixels one direction ``standing`` is much the largest; of a layer without bias, or
        whose bias moved by no more than rounding, its direction, of length 1. None elsewhere.
    error
        Root mean square error of ``values`` from rounding and from what else is in the update,
        relative to their root mean square.
    scaled
        Whether the length of ``values`` is known: the layer has a bias, and it moved by more than
        its rounding.
    alone
        Whether only one input leaves such an update; else ``values`` may be a weighted mean of
        several that are alike to this layer.
    signs
        Whether ``values`` are all of one size but for zeros: they may be an input's signs, which
        Adam's kin leave.
    image
        [1, C, H, W] where ``values`` are ``pixels``: in the client's own range, whatever that is.
        None elsewhere.
    """

    name: str
    features: int
    outputs: int
    rank: int
    standing: int
    rows: int
    pixels: bool
    fixed: bool
    values: torch.Tensor | None = field(repr=False, default=None)
    error: float = math.nan
    scaled: bool = True
    alone: bool = False
    signs: bool = False
    image: torch.Tensor | None = field(repr=False, default=None)

    @property
    def directions(self) -> int:
        """Inputs, at least, that left the update, unless the client changed it entry by entry; 0
        where that says nothing, since the rank is full or an image has several inputs here.
        """
        full = self.rank >= min(self.outputs, self.features)
        return 0 if self.rows > 1 or (full and self.rank > 1) else self.standing

    @property
    def sentence(self) -> str | None:
        """What it says, in words; None for nothing."""
        if self.values is not None:
            return self._shown()
        if self.directions < 2:
            return None
        of = "images" if self.pixels and self.fixed else "images or steps"
        return (
            f"the update of layer {self.name!r} has {self.directions} directions: so many inputs "
            f"or more are in it, of several {of}, or of earlier ones that momentum has kept, "
            "unless its entries were changed one by one (Adam's kin, clipping by value, "
            "sparsifying, quantising, half precision)"
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
        if self.signs:
            return (
                f"{said}, or only the signs of its numbers, as Adam and its kin leave them; "
                "and several inputs may have left them"
            )
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
    spectrum = _spectrum(delta, variance)
    rank, largest, full = spectrum.rank, spectrum.largest, min(outputs, features)
    if not weight[0].any():
        rank = 0
    elif _sign_like(delta) or rank >= max(2, _moving(weight[0])):
        rank = full
    standing = rank
    pixels = traced.is_pixels(name)
    image_s = pixels and name in traced.fixed  # nothing but images, not steps, are its inputs
    if 1 < rank < full:  # features of several images are more alike than half precision can tell
        standing = spectrum.large if image_s else spectrum.standing
    about: dict[str, Any] = {
        "name": name,
        "features": features,
        "outputs": outputs,
        "pixels": pixels,
        "rank": rank,
        "standing": standing,
        "fixed": name in traced.fixed,
        "rows": traced.rows[name],
        "scaled": scaled,
    }
    beside = float(spectrum.values[1:].norm()) / max(largest, TINY) if rank > 1 else 0.0
    read = rank == 1 or (1 < rank < full and image_s)
    if not read or standing != 1 or traced.rows[name] != 1 or beside > LEFT:
        return LayerInput(**about)
    left, hidden = _left(delta, spectrum), spectrum.limit / largest
    along, noise = left @ delta, left.square() @ variance  # [features (+ 1)]
    values, size = along[:features], float(along[:features].square().mean().sqrt())
    arithmetic = ARITHMETIC * largest / math.sqrt(outputs * features)
    error = (float(noise[:features].mean().sqrt()) + arithmetic) / max(size, TINY)
    unit = float(along[-1]) if scaled else 0.0
    of_unit = float(noise[-1].sqrt()) / max(abs(unit), TINY)
    if not error < 1:  # the bias moved alone, or nearly
        return LayerInput(**about)
    if of_unit > LENGTH:  # the bias moved by no more than rounding, if at all
        about["scaled"] = scaled = False
    values = values / (unit if scaled else float(values.norm()))
    error = math.hypot(error, beside, of_unit if scaled else 0.0)
    image = traced.image_of(name, values) if scaled and about["pixels"] else None
    signs = _even(values, error)
    alone = rank == 1 and scaled and not signs and traced.tells_apart(name, values, left, hidden)
    return LayerInput(**about, values=values, error=error, alone=alone, signs=signs, image=image)


def _moving(delta: torch.Tensor) -> int:
    """The most directions that the rows and columns that moved at all can have."""
    moved = delta != 0
    return int(min(moved.any(0).sum(), moved.any(1).sum()))


def _even(values: torch.Tensor, error: float) -> bool:
    """Whether an input's numbers but for zeros are of one size, as where Adam's kin made several
    steps: then they may be signs. Of black and white images they are so, too.
    """
    sizes = values.abs() / values.square().mean().sqrt()
    near = max(EVEN, NOISE * error)
    sizes = sizes[sizes > near]
    if not len(sizes):
        return False
    return bool(((sizes / sizes.median() - 1).abs() < near).double().mean() > MOST)


def _sign_like(delta: torch.Tensor) -> bool:
    """Whether the entries that moved did by the same amount, as in a first step of Adam's kin: the
    signs of a matrix of rank one are one, too, and tell no input.
    """
    moved = delta[delta != 0].abs()
    return bool((moved > (1 - EVEN) * moved.max()).double().mean() > MANY)


class _Spectrum(NamedTuple):
    """The directions of a matrix.

    Attributes
    ----------
    values
        Singular values, falling.
    vectors
        Of its smaller side, in columns, in the same order.
    limit
        What rounding and the client's arithmetic leave of a singular value.
    half
        The same for a client that computes gradients in half precision.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    limit: float
    half: float

    @property
    def rank(self) -> int:
        """Directions above the limit."""
        return int((self.values > self.limit).sum())

    @property
    def standing(self) -> int:
        """Those of them that stand out: up to the last after which there is a gap."""
        following = torch.cat([self.values[1:], self.values.new_zeros(1)])
        gaps = (self.values > GAP * following)[: self.rank].nonzero()
        return int(gaps.max()) + 1 if len(gaps) else 0

    @property
    def large(self) -> int:
        """The same where several are so small that arithmetic in half precision leaves them: those
        above these.
        """
        large = int((self.values > self.half).sum())
        return large if self.rank > large + 1 else self.standing

    @property
    def largest(self) -> float:
        """The first singular value."""
        return float(self.values[0])


def _spectrum(delta: torch.Tensor, variance: torch.Tensor) -> _Spectrum:
    outputs, inputs = delta.shape
    # of the smaller side: singular values below 1e-8 of the first do not matter
    square = delta @ delta.T if outputs <= inputs else delta.T @ delta
    squares, vectors = torch.linalg.eigh(square)
    values = squares.clamp(min=0).flip(0).sqrt()
    # the largest row and column, not the mean: large weights are rounded more coarsely
    rounding, size = (
        sum(float(each.sum(side).max().sqrt()) for side in (0, 1))
        for each in (variance, delta.square())
    )
    limit = max(NOISE * rounding, ARITHMETIC * float(values[0]))
    return _Spectrum(values, vectors.flip(1), limit, max(limit, HALF * size))


def _left(delta: torch.Tensor, found: _Spectrum) -> torch.Tensor:
    """The first direction among the outputs."""
    first = found.vectors[:, 0]
    return first if delta.shape[0] <= delta.shape[1] else delta @ first / found.largest


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
    fixed
        Names of those in front of which no parameter stands.
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        self.model = copy.deepcopy(model).double().requires_grad_(False)
        self.shape = tuple(image_shape)
        self.device = next(self.model.parameters()).device
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.maps: dict[str, _Map | None] = {}
        named = self.model.named_modules()
        self.linear = {name: each for name, each in named if isinstance(each, nn.Linear)}
        self.returned: Any = None
        for name, module in self.linear.items():
            module.register_forward_pre_hook(
                lambda _, given, named, name=name: self.seen.setdefault(name, []).append(
                    given[0] if given else named["input"]
                ),
                with_kwargs=True,
            )
        self.generator = torch.Generator().manual_seed(0)
        grey = torch.full((1, *self.shape), 0.5, dtype=torch.float64)
        once = {n: each[0] for n, each in self._pass(grey).items() if len(each) == 1}
        self.fixed: set[str] = set()
        shared = self._used_elsewhere(once)
        once = {n: each for n, each in once.items() if n not in shared}
        self.layers = {name: self.linear[name] for name in once}
        self.rows = {name: each[..., 0].numel() for name, each in once.items()}

    def _pass(
        self, images: torch.Tensor, *, train: bool = False, grad: bool = False, seed: int = 0
    ) -> dict[str, list[torch.Tensor]]:
        """{layer: what passed through it}, in eval mode, or in the one the client trains in."""
        self.model.train(train)
        self.seen = {}
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.set_grad_enabled(grad), own_generator(seed=seed, device=self.device):
            self.returned = self.model(images.to(self.device))
        for name, buffer in self.model.named_buffers():  # batch norm's statistics
            buffer.copy_(kept[name])
        return self.seen

    def _used_elsewhere(self, names: Iterable[str]) -> set[str]:
        """Layers whose weight or bias does more than the layer: their gradient is not δ·[x; 1]ᵀ."""
        layers = {name: self.linear[name] for name in names}
        signals: dict[str, torch.Tensor] = {}

        def probed(name: str, output: torch.Tensor) -> torch.Tensor:
            signals[name] = torch.zeros_like(output, requires_grad=True)
            return output + signals[name]

        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name: probed(name, output))
            for name, layer in layers.items()
        ]
        parameters = [w for layer in layers.values() for w in layer.parameters(recurse=False)]
        noise = torch.rand(1, *self.shape, generator=self.generator, dtype=torch.float64)
        try:
            self.model.requires_grad_(True)
            seen = {name: each[0] for name, each in self._pass(noise, grad=True).items()}
            given = {name: each.detach() for name, each in seen.items()}
            self.fixed = {name for name, each in seen.items() if not each.requires_grad}
            total = torch.stack([(each * _slope(each)).sum() for each in _tensors(self.returned)])
            grads = torch.autograd.grad(
                total.sum(), [*signals.values(), *parameters], allow_unused=True
            )
        except Exception:  # whatever a user's network raises where it is differentiated
            return set()
        finally:
            self.model.requires_grad_(False)
            for hook in hooks:
                hook.remove()
        of_output = dict(zip(signals, grads))
        of_weight = dict(zip(map(id, parameters), grads[len(signals) :]))
        found = set()
        for name, layer in layers.items():
            if of_output[name] is None:
                continue
            delta, x = of_output[name].flatten(0, -2), given[name].flatten(0, -2)
            for w, expected in ((layer.weight, delta.T @ x), (layer.bias, delta.sum(0))):
                own = None if w is None else of_weight.get(id(w))
                if own is not None and not torch.allclose(own, expected, rtol=1e-6, atol=1e-12):
                    found.add(name)
        return found

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
        beyond = 4 * noise.flip(0) - 1.5  # of clients that normalise
        probes = torch.stack([torch.zeros(count), torch.ones(count), places, noise, beyond])
        taken = self._inputs(name, probes.reshape(-1, *self.shape))
        if taken is None:
            return None
        constant, factor = taken[0], taken[1] - taken[0]
        factor = torch.where(factor.abs() > 1e-9, factor, 0.0)
        used = factor != 0
        position = ((taken[2] - constant)[used] / factor[used] * count - 1).round().long()
        if not used.any() or position.min() < 0 or position.max() >= count:
            return None
        expected = constant.repeat(2, 1)
        expected[:, used] += factor[used] * probes[3:].to(constant)[:, position]
        found = torch.allclose(taken[3:], expected, rtol=1e-7, atol=1e-9)
        every = len(position.unique()) == count
        return _Map(position, factor, constant) if found and every else None

    def _inputs(self, name: str, images: torch.Tensor) -> torch.Tensor | None:
        """[N, features] that reach the layer, or None where training changes them, chance, or the
        other images of a batch: dropout, noise, or batch norm's own statistics in front of it.
        """

        def each(start: int, *, train: bool) -> list[torch.Tensor]:
            passed = [
                self._pass(image[None], train=train, seed=start + i)[name][0]
                for i, image in enumerate(images)
            ]
            return [one.flatten() for one in passed]

        in_eval = each(0, train=False)
        try:
            in_training = each(len(images), train=True)
        except ValueError:  # a single value per channel, of which no statistic can be taken
            return None
        alone = torch.stack(in_eval)
        try:
            together = self._pass(images)[name][0].flatten(1)
        except Exception:  # a network that takes one image
            together = alone
        one_by_one = together.shape == alone.shape and torch.allclose(together, alone)
        return alone if one_by_one and all(map(torch.equal, in_eval, in_training)) else None

    def tells_apart(
        self, name: str, values: torch.Tensor, left: torch.Tensor, hidden: float
    ) -> bool:
        """Whether δ turns where this input changes: then two inputs would show as two. It does not
        in a network of one output, or of two classes, whose units are switched and not smooth, and
        where the scores are so far apart that the softmax has saturated. And whether it turns by
        so much that it is not ``hidden`` by rounding: the relative size of a direction that is.
        Whatever the label is; where one explains ``left``, the direction of δ, whatever that is.
        """
        noise = torch.randn(PROBES, len(values), generator=self.generator, dtype=torch.float64)
        one = torch.ones_like(noise[:1])
        given = values * torch.cat([one, 1 + NEAR * noise, 1 + AWAY * noise]).to(values)
        try:
            signals = self._signals(name, given, left)
            fits = [each for each in signals if F.cosine_similarity(each[0], left, 0).abs() > FITS]
            if not fits and _repeats(left, hidden):  # a loss of constant slopes, for any images
                return False
            turned = torch.stack([_turned(each) for each in fits or signals])
        except Exception:  # a network that takes one image, or gives no gradient: nothing is known
            return False
        near, away = turned[:, :PROBES].amax(1), turned[:, PROBES:].amax(1)
        return bool((near > TURNS * NEAR).all() and (away > HIDDEN * hidden).all())

    def _signals(self, name: str, given: torch.Tensor, left: torch.Tensor) -> list[torch.Tensor]:
        """dL/dz at the layer's output for each input [N, features], L the usual loss; for the
        labels whose classes have the highest scores and the lowest, since others turn no less, and
        for the class that moved most where ``left`` is of the scores.
        """
        layer, kept = self.layers[name], {}

        def given_instead(
            _: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
        ) -> tuple[tuple[torch.Tensor], dict[str, torch.Tensor]]:
            shape = (args[0] if args else named["input"]).shape[1:]
            return (given.reshape(len(given), *shape),), {}

        def keep(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            kept["output"] = output.detach().requires_grad_()
            return kept["output"].clone()  # which the next layer may overwrite

        hooks = [
            layer.register_forward_pre_hook(given_instead, with_kwargs=True),
            layer.register_forward_hook(keep),
        ]
        self.model.eval()
        try:
            with torch.enable_grad(), own_generator(seed=0, device=self.device):
                grey = torch.full((len(given), *self.shape), 0.5, dtype=torch.float64)
                output = scores(self.model(grey.to(self.device))).flatten(1)
                losses = [F.softplus(output).sum()]
                if output.shape[1] > 1:
                    order = output[0].argsort()
                    labels = {int(order[at]) for at in (0, -1, -2)}
                    if len(left) == output.shape[1]:
                        labels.add(int(left.abs().argmax()))
                    losses = [
                        F.cross_entropy(output, torch.full_like(output[:, 0], label).long())
                        for label in sorted(labels)
                    ]
                return [
                    torch.autograd.grad(loss, kept["output"], retain_graph=True)[0].flatten(1)
                    for loss in losses
                ]
        finally:
            for hook in hooks:
                hook.remove()


def _repeats(signal: torch.Tensor, hidden: float) -> bool:
    """Whether most numbers of a δ are of one size with another, as of a hinge or absolute loss."""
    sizes = (signal.abs() / signal.abs().max()).sort().values
    sizes = sizes[sizes > NOISE * hidden]
    same = sizes.diff() < NOISE * hidden
    return len(sizes) < 2 or bool(same.double().mean() > 0.5)


def _turned(signals: torch.Tensor) -> torch.Tensor:
    """By how much each direction is another than the first, from 0 to 1."""
    first = signals[0] / signals[0].norm()
    beside = signals[1:] - (signals[1:] @ first)[:, None] * first
    return (beside.norm(dim=1) / signals[1:].norm(dim=1)).nan_to_num()


def _tensors(returned: Any) -> Iterator[torch.Tensor]:
    """What a network returns that has a gradient."""
    if isinstance(returned, torch.Tensor):
        if returned.requires_grad:
            yield returned
    elif isinstance(returned, Mapping):
        for each in returned.values():
            yield from _tensors(each)
    elif isinstance(returned, (list, tuple)):
        for each in returned:
            yield from _tensors(each)


def _slope(like: torch.Tensor) -> torch.Tensor:
    """Another number for each entry, so that none cancel."""
    return torch.linspace(1, 2, like.numel()).to(like).reshape(like.shape)
