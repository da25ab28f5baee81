"""What stands in an update whatever the client did: the inputs of its linear layers.

The update of a linear layer's weight and bias together is Σ δ·[x; 1]ᵀ over all inputs x that
passed through it. If one did, it has rank one, and x is the ratio of the weight's update to the
bias's: for any loss, label, optimizer's scale, clipping or dropout behind the layer, and after
several steps on one image as long as nothing in front of the layer moved its input. With B inputs
it has rank B at most. Weight decay adds a multiple of the weights, which ``decay`` finds and takes
off. Adam's kin change the update entry by entry; then its rank is full and nothing is said.

The length of the input follows from the bias, and its direction from the weight as it was sent: a
client whose rates differ between the two, that clips or scales tensor by tensor, projects its
updates, or sends an adapter's product, leaves a multiple or a projection. Later layers' inputs tell
that, where they are others than it leads to: ``disputed``. The scores to which an input leads tell
that it is none (``lengths``): ``confirmed``.

What a rank cannot tell, and what is done about it: several inputs may leave one direction where δ
is the same for all of them (a network with one output, softmax over two classes), or where rounding
hides how it differs: they are looked for, and ``alone`` says so. Several steps of Adam's kin may
leave the signs of an input, whose rank is one as well: ``signs``. A layer without bias gives the
direction of its input and not its length. A layer that sees several inputs of one image (patches,
tokens) has their rank. A layer whose weight or bias is used elsewhere as well is left out.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from dlm_core import check, records
from dlm_core.beyond import decay, lengths, ratios
from dlm_core.beyond.rounding import Transmitted, precision_of
from dlm_core.beyond.tracing import AWAY, NOISE, Loss, Traced, repeats
from dlm_core.observation import TINY, Observation, unit_in_last_place
from dlm_core.results import Evidence, Explains, Reconstruction, Status

ARITHMETIC = 4e-6  # of the largest singular value: what the client's float32 arithmetic leaves
# How nearly, and how many, entries move by the largest amount in a first step of Adam's kin; and
# how many of an input's numbers are of one size after several.
EVEN, MANY, MOST = 0.02, 0.3, 0.9
LENGTH = 0.1  # error of the bias's update, relative, up to which the input's length is known
KNOWN = 1e-3  # error of an input, relative, up to which layers are held against each other
GAP = 2.5  # between the singular values of inputs and those of what else changed an update
HALF = 2.0**-8  # of bfloat16's numbers, what rounding leaves
HALVED = 0.75  # of entries, that differ by no more than that from those of one direction
SHRUNK = 0.5  # of the weights, from which what was taken off them is no decay
MANY_NUMBERS = 8  # of an input, fewer of which may have a mean of 0 by chance
FINE = 1e-4  # of a direction, what rounding may hide for δ's numbers to be held against each other
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
        image's pixels one direction ``standing`` is much the largest, or by ``entries``; of a layer
        without bias, or whose bias moved by no more than rounding or is ``bias_apart``, its
        direction, of length 1. None elsewhere.
    error
        Root mean square error of ``values`` from rounding and from what else is in the update,
        relative to their root mean square.
    scaled
        Whether the length of ``values`` is known: the layer has a bias, and it moved by more than
        its rounding.
    single
        Whether the layer's update tells one input from several; else ``values`` may be a weighted
        mean of several that are alike to it.
    alone
        Whether it does, and neither another layer nor its mean (``centred``) speaks against it.
    mixed
        How far, relative, inputs of several images are from each other, where all images' inputs
        are so alike that a mean of them would not show; 0 where it would. Of smooth random images.
    one_row
        Whether only one of its outputs moved: then any update has rank one, and a change of its
        entries does not show.
    decay
        What multiple of the weights was taken off the update, as weight decay leaves it: the
        learning rate times λ; 0 where none was found.
    signs
        Whether ``values`` are all of one size but for zeros: they may be an input's signs, which
        Adam's kin leave.
    odd
        The one output whose row moved against all others, where there is one among three or more:
        of a last layer, the label's.
    still
        Numbers of the input that moved no weight, which are 0 in ``values``: the input is 0 there,
        or the client did not train them.
    untrained
        Whether it did not: the network itself has no weight there, or a later layer's input is not
        that of this image.
    disputed
        Whether the image or the input that it or an earlier layer shows leaves other inputs of
        later layers than their updates show: then weight and bias did not move by one gradient at
        one rate, and ``values`` may be a multiple or a projection of the input.
    confirmed
        Whether later layers' updates speak of this length of ``values``; or, where chance keeps
        them from it, of another layer's. Else they are a multiple of the input if weight and bias
        had two rates.
    centred
        Whether ``values`` have a mean of 0, though inputs there have another: then a client that
        takes the mean off each row of its gradient left what else is in the input.
    bias_apart
        Whether the weight's update has one direction and the bias's is another: it moved by another
        rule, or by further images that are multiples of one or black.
    bias_alone
        Whether the bias moved and the weight did not: its input was 0, or it was not trained.
    entries
        Whether ``values`` were read entry by entry, as others were changed one by one.
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
    single: bool = False
    alone: bool = False
    mixed: float = 0.0
    one_row: bool = False
    decay: float = 0.0
    signs: bool = False
    odd: int | None = None
    still: int = 0
    untrained: bool = False
    disputed: bool = False
    confirmed: bool = False
    centred: bool = False
    bias_apart: bool = False
    bias_alone: bool = False
    entries: bool = False
    image: torch.Tensor | None = field(repr=False, default=None)

    @property
    def directions(self) -> int:
        """Inputs, at least, that left the update, unless the client changed it entry by entry; 0
        where that says nothing, since the rank is full or an image has several inputs here.
        """
        full = self.rank >= min(self.outputs, self.features)
        return 0 if self.rows > 1 or (full and self.rank > 1) else self.standing

    @property
    def linear(self) -> bool:
        """Whether gradients alone moved it: fewer directions than it has room for, and no signs."""
        return 0 < self.rank < min(self.outputs, self.features) and not self.signs

    @property
    def halved(self) -> bool:
        """Whether ``values`` stand alone in an update of full rank, whose rest is what arithmetic
        in half precision leaves.
        """
        full = self.rank == min(self.outputs, self.features) > 1
        told = self.values is not None and not (self.entries or self.signs)
        return told and full and self.standing == 1

    @property
    def sentence(self) -> str | None:
        """What it says, in words; None for nothing."""
        if self.values is not None:
            return self._shown()
        if self.bias_alone:
            black = " (a black image)" if self.pixels else ""
            return (
                f"the bias of layer {self.name!r} moved and its weight did not: its input was 0"
                f"{black}, or the client did not train this weight"
            )
        said = [self._several(), self._silhouette()]
        return ". ".join(filter(None, said)) or None

    def _silhouette(self) -> str | None:
        if not (self.pixels and 0 < self.still < self.features) or self.untrained:
            return None
        return (
            f"{self.still:,} of the {self.features:,} weights' columns of layer {self.name!r} did "
            "not move: so many pixels are black in all of the client's images, or so dark that "
            "rounding or thinning took their moves away, unless it did not train these"
        )

    def _several(self) -> str | None:
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
        beside = f" beside {self._beside}" if self.decay else ""
        said = (
            f"the input of layer {self.name!r} ({which}{self.features:,} numbers) "
            f"stands in the update{beside}, {self._to}"
        )
        if self.centred:
            return (
                f"{said}, but for its mean: its numbers add up to 0, as where the client takes the "
                "mean off its gradients' rows, or off each of its images"
            )
        if self.bias_apart:
            return (
                f"{said}: the weight's update has one direction, and the bias moved by another "
                "rule, or by further images that are darker copies of it or black"
            )
        if self.entries:
            unmoved = f". {self.still:,} of these numbers moved no weight: they are 0, or left out"
            return (
                f"{said}, by the entries that agree on it: others were changed one by one, as "
                f"clipping by value or a mask changes them{self._mixture}"
                f"{unmoved * bool(self.still)}"
            )
        mixture = "" if self.single else self._mixture
        if not self.scaled:
            said += (
                " (or a projection of it, if the client trains adapters or by an optimizer of low "
                "rank)"
            )
        if self.untrained:
            multiple = "; or all of it is a multiple of the input, as of two rates"
            return (
                f"{said}, but for {self.still:,} of them. Their weights did not move: the client "
                "did not train these, which are not 0 then as they seem, unless it took its "
                "gradients at other weights than W_t, as SAM does"
                f"{multiple * (not self.confirmed)}{mixture}"
            )
        if self.disputed:
            return (
                f"{said}, or a multiple or a projection of it: layers' updates do not agree on one "
                "image, as where the client sets rates or clips tensor by tensor, projects its "
                f"updates, or trains adapters{mixture}"
            )
        if self.scaled and not self.confirmed:
            said += (
                " (or a multiple of it, if the client's rates for weight and bias differ: nothing "
                "else in the update fixes its length)"
            )
        return f"{said}{mixture}{self._zeros * bool(self.pixels and self.still)}"

    @property
    def _zeros(self) -> str:
        """What the pixels are whose weights did not move."""
        assert self.values is not None
        said = f". Of these numbers {self.still:,} are 0, as their weights did not move. "
        lowest, size = self.values.min(), self.values.square().mean().sqrt()
        if lowest < -NOISE * self.error * size:
            return f"{said}Others are below 0, so these need not be black"
        return f"{said}They are black, unless the client did not train them"

    @property
    def _to(self) -> str:
        """How exactly."""
        known = f"to {self.error:.0e}" if self.scaled else f"up to its length, to {self.error:.0e}"
        if self.mixed <= self.error:
            return known
        return (
            f"{known} if one image left it. A mean of several images' inputs would look the same "
            f"here, and be off by about {self.mixed:.0e}"
        )

    @property
    def _mixture(self) -> str:
        """What else than one input may stand in the update."""
        if self.signs:
            return (
                ", or only the signs of its numbers, as Adam and its kin leave them; "
                "and several inputs may have left them"
            )
        changed = (
            ", or what noise, quantising or sparsifying made of it, which does not show where only "
            "one output moved"
        )
        return (
            ", or a mean of several inputs or a difference between them, "
            f"which this update cannot tell apart{changed * self.one_row}"
        )

    @property
    def _beside(self) -> str:
        """What multiple of the weights was taken off, in words."""
        if 0 < self.decay < SHRUNK:
            return f"weight decay of {self.decay:.2g}·W"
        return f"weights that were scaled by {1 - self.decay:.3g}, which is no weight decay,"


@dataclass(frozen=True, kw_only=True)
class Ratio(Evidence):
    """The evidence of ``division``: the rank of a layer's update.

    Attributes
    ----------
    layer
        That shows the image.
    error
        As in ``LayerInput``.
    alone, confirmed
        As there.
    """

    layer: str
    error: float
    alone: bool
    confirmed: bool
    said: str = ""

    @property
    def verdict(self) -> str:
        """What the layer says."""
        return self.said

    @property
    def explains(self) -> Explains:
        """The image is read and not fitted: fully where it can only be one, of this brightness."""
        return Explains.FULLY if self.alone and self.confirmed else Explains.PARTLY


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
def division(seen: Observation, *, transmitted: Transmitted | None = None) -> Reconstruction:
    """Read the image off the update of a linear layer that it passed through, by a division.

    Parameters
    ----------
    seen
        What the observer sees.
    transmitted
        Precision to which W_{t+1} was rounded, where that is not its own; or some of its tensors,
        by name.

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


def shown(layers: Sequence[LayerInput]) -> Reconstruction:
    """The image that one of these layers shows, the best of them; ValueError where none does."""
    found = [each for each in layers if each.image is not None]
    if not found:
        if any(each.pixels and each.values is not None for each in layers):
            raise ValueError(
                "the image stands in the update up to its length, of which no bias tells"
            )
        raise ValueError(
            "no linear layer that takes the image itself, with a weight of its own, has an update "
            "of rank one, from which a division would show it"
        )
    best = min(found, key=lambda each: (not each.alone, not each.confirmed, each.error))
    assert best.image is not None and best.sentence is not None
    device = best.image.device
    return Reconstruction(
        images=best.image,
        labels=torch.full((1,), -1, device=device),
        status=Status.CONVERGED,
        vouched=torch.full((1,), best.alone and best.confirmed, device=device),
        evidence=Ratio(
            losses=[],
            loss=best.error**2,
            layer=best.name,
            error=best.error,
            alone=best.alone,
            confirmed=best.confirmed,
            said=best.sentence,
        ),
    )


@check.arguments
def layer_inputs(seen: Observation, transmitted: Transmitted | None = None) -> list[LayerInput]:
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
    transmitted: Transmitted | None = None,
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
    after = {}
    for name, w in weights_after.items():
        sent = precision_of(name, transmitted)
        after[name] = w.to(sent) if sent and w.is_floating_point() else w
    before = dict(model.named_parameters())
    traced = Traced(model, image_shape)
    moved = {}
    for name, layer in traced.layers.items():
        weight = _moved(before, after, f"{name}.weight")
        if weight is not None:
            bias = None if layer.bias is None else _moved(before, after, f"{name}.bias")
            moved[name] = weight, bias
    moves = {
        name: _Move.of(*both, images=traced.is_pixels(name) and name in traced.fixed)
        for name, both in moved.items()
    }
    loss = _loss(next(reversed(moves.values()), None))
    found = [_of_layer(traced, name, *moved[name], moves[name], loss) for name in moved]
    found = [_compared(traced, each, found) for each in found]
    if _disagree(traced, found):
        found = [_disputed(each) for each in found]
    else:
        fixed = _fixed(traced, moved, after, found)
        found = [replace(each, confirmed=fixed.get(each.name) is True) for each in found]
    return [*_of_others(traced, model, before, after), *found]


def _of_others(
    traced: Traced,
    model: nn.Module,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> list[LayerInput]:
    """The same of weights that are no linear layer's and are used as one's."""
    found: dict[str, LayerInput] = {}
    for pair in ratios.pairs(model, traced.linear):
        name, bias_s, columns = pair
        weight, bias = _moved(before, after, name), _moved(before, after, bias_s)
        if name in found or weight is None or bias is None:
            continue
        delta, variance = (ratios.oriented(each, columns) for each in weight[:2])
        if not delta.any() or _sign_like(delta):
            continue
        known = ratios.input_of(delta, bias.delta, variance, bias.variance)
        if known is None:
            continue
        try:
            taken = ratios.used_as_one(traced, pair, traced.probes)
        except Exception:  # whatever a user's network raises
            taken = None
        if taken is None:
            continue
        values, error = known
        traced.add(name, taken, steady=ratios.steady(traced, pair, taken))
        pixels = traced.is_pixels(name)
        found[name] = LayerInput(
            name=name.removesuffix(".weight"),
            features=len(values),
            outputs=len(bias.delta),
            rank=1,
            standing=1,
            rows=1,
            pixels=pixels,
            fixed=False,
            values=values,
            error=error,
            signs=even(values, error),
            image=traced.image_of(name, values) if pixels else None,
        )
    return list(found.values())


def _disagree(traced: Traced, layers: Sequence[LayerInput]) -> bool:
    """Whether later layers' inputs are not those of an image that a layer shows."""
    known = [each for each in layers if each.error < KNOWN and each.rank == 1 and not each.signs]
    later = {
        each.name: (each.values, each.scaled)
        for each in known
        if each.values is not None and not each.pixels
    }
    images = [each.image for each in known if each.image is not None and not each.untrained]
    if any(traced.disagrees(image, later) for image in images):
        return True
    inputs_s = [(name, values) for name, (values, scaled) in later.items() if scaled]
    return any(traced.leads_elsewhere(name, values, later) for name, values in inputs_s)


class _Moved(NamedTuple):
    """A tensor's move: Δ, the variance of its rounding, and W_t."""

    delta: torch.Tensor
    variance: torch.Tensor
    before: torch.Tensor

    @classmethod
    def of_both(cls, weight: "_Moved", bias: "_Moved | None") -> "_Moved":
        """Of a layer's weight and bias together: [outputs, inputs (+ 1)]."""
        if bias is None:
            return weight
        return cls(*(torch.cat([w, b[:, None]], 1) for w, b in zip(weight, bias)))


def _fixed(
    traced: Traced,
    moved: Mapping[str, tuple[_Moved, _Moved | None]],
    after: Mapping[str, torch.Tensor],
    layers: Sequence[LayerInput],
) -> dict[str, bool | None]:
    """{layer: whether the length of its input is right, None where that cannot be told}."""
    updates: dict[str, torch.Tensor] = {}
    signals: list[torch.Tensor] = []
    for each in layers:
        weight, bias = moved[each.name]
        updates[each.name] = weight.delta - each.decay * weight.before
        if each is layers[-1]:
            if bias is not None and bias.delta.any():
                signals = [bias.delta]
            elif each.values is not None:
                signals = [sign * (updates[each.name] @ each.values) for sign in (1, -1)]
    return {
        each.name: lengths.fixed(traced, after, each.name, each.values, updates, signals)
        for each in layers
        if each.values is not None and each.scaled and not each.signs
    }


def _disputed(layer: LayerInput) -> LayerInput:
    return layer if layer.values is None else replace(layer, disputed=True, alone=False)


def _compared(traced: Traced, shown: LayerInput, layers: Sequence[LayerInput]) -> LayerInput:
    """An input whose zeros may be weights that were not trained: an image is held against later
    layers, features against what the network leaves there.
    """
    if shown.values is None or not shown.still:
        return shown
    if not shown.pixels:
        zero_free = traced.never_zero(shown.name)
        return replace(shown, untrained=True, alone=False) if zero_free else shown
    if shown.image is None:
        return shown
    later = {
        each.name: each.values
        for each in layers
        if each.values is not None and not each.pixels and each.rows == 1
    }
    if shown.untrained or traced.contradicts(shown.image, later):
        return replace(shown, untrained=True, alone=False)
    return shown


def _moved(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], name: str
) -> _Moved | None:
    if name not in before or name not in after:
        return None
    old, new = before[name].detach(), after[name].detach().to(before[name].device)
    old, variance = old.double(), unit_in_last_place(new).square() / 12
    return _Moved(old - new.double(), variance, old)


class _Move(NamedTuple):
    """A layer's move without its weight decay, and the directions in it.

    Attributes
    ----------
    delta, variance
        [outputs, features], or with the bias [outputs, features + 1].
    decay
        What multiple of the weights was taken off.
    scaled
        Whether the bias is its last column.
    spectrum
        Of ``delta``.
    rank, standing
        As of ``LayerInput``.
    beside
        What the other directions are of the first.
    one
        Whether it is one direction, or one that stands alone.
    """

    delta: torch.Tensor
    variance: torch.Tensor
    decay: float
    scaled: bool
    spectrum: "_Spectrum"
    rank: int
    standing: int
    beside: float
    one: bool

    @classmethod
    def of(cls, weight: _Moved, bias: _Moved | None, *, images: bool = False) -> "_Move":
        """Of a layer's weight and bias; whether nothing but ``images`` are its inputs, and not
        steps.
        """
        scaled = bias is not None and bool(bias.delta.any())
        whole = _Moved.of_both(weight, bias if scaled else None)
        (delta, variance, _), spectrum, decayed = _without_decay(whole, scaled)
        full = min(weight.delta.shape)
        rank = standing = _rank(weight.delta, delta, spectrum.rank)
        if 1 < rank < full:  # features of several images are more alike than half precision tells
            standing = spectrum.large if images else spectrum.standing
        largest = max(spectrum.largest, TINY)
        beside = float(spectrum.values[1:].norm()) / largest if rank > 1 else 0.0
        halved = 1 < rank == full and _halved(delta, variance, spectrum)
        if halved:
            standing = 1
        read = rank == 1 or (1 < rank < full and images) or halved
        one = read and standing == 1 and beside <= LEFT
        return cls(delta, variance, decayed, scaled, spectrum, rank, standing, beside, one)

    @property
    def left(self) -> torch.Tensor:
        """[outputs] its first direction among them."""
        return _left(self.delta, self.spectrum)

    @property
    def hidden(self) -> float:
        """The relative size of a direction that rounding hides."""
        return self.spectrum.limit / self.spectrum.largest


def _halved(delta: torch.Tensor, variance: torch.Tensor, spectrum: "_Spectrum") -> bool:
    """Whether an update is one direction and what arithmetic in half precision leaves of it: of
    most entries a share of their own size, which noise does not leave.
    """
    if spectrum.values[1] > spectrum.half or _sign_like(delta):
        return False
    left = _left(delta, spectrum)
    rest = (delta - torch.outer(left, left @ delta)).abs()
    rounded = HALF * delta.abs() + NOISE * variance.sqrt()
    return bool((rest <= rounded)[delta != 0].double().mean() > HALVED)


def _loss(last: _Move | None) -> Loss:
    """What the last layer's move says of the loss: δ of one direction is its slopes, where these
    are the same for any images of a class.
    """
    if last is None or not last.delta.any():
        return Loss(seen=False)
    constant = last.rank == 1 and last.hidden <= FINE and repeats(last.left, last.hidden)
    return Loss(seen=True, slopes=last.left if constant else None)


def _of_layer(
    traced: Traced,
    name: str,
    weight: _Moved,
    bias: _Moved | None,
    move: _Move,
    loss: Loss,
) -> LayerInput:
    outputs, features = weight.delta.shape
    pixels, fixed = traced.is_pixels(name), name in traced.fixed
    about: dict[str, Any] = {
        "name": name,
        "features": features,
        "outputs": outputs,
        "pixels": pixels,
        "rank": move.rank,
        "standing": move.standing,
        "fixed": fixed,
        "rows": traced.rows[name],
        "scaled": move.scaled,
        "decay": move.decay,
        "bias_alone": move.scaled and not weight.delta.any(),
    } | _still(weight)
    if traced.rows[name] != 1:
        return LayerInput(**about)
    if move.scaled and not move.one:
        of_weight = _Move.of(weight, None, images=pixels and fixed)
        if of_weight.one:
            move = of_weight
            about |= {"scaled": False, "decay": move.decay, "bias_apart": True}
    if move.one:
        return LayerInput(**about | _input(traced, name, move, loss))
    return LayerInput(**about | (_by_entries(traced, name, weight, bias) if pixels else {}))


def _by_entries(traced: Traced, name: str, weight: _Moved, bias: _Moved | None) -> dict[str, Any]:
    """The same of a layer that sees an image, where single entries of its move were changed."""
    if bias is None:
        return {}
    # weights that were set to 0 tell nothing of the input
    delta = torch.where(weight.delta == weight.before, 0.0, weight.delta)
    found = ratios.by_entries(delta, bias.delta, weight.variance, bias.variance)
    if found is None:
        return {}
    values, error = found
    return {
        "values": values,
        "error": error,
        "entries": True,
        "signs": even(values, error),
        "image": traced.image_of(name, values),
    }


def _input(traced: Traced, name: str, move: _Move, loss: Loss) -> dict[str, Any]:
    """What a move of one direction adds to what is said of a layer; nothing where it is its bias's
    alone, or nearly.
    """
    left, largest = move.left, move.spectrum.largest
    features = move.delta.shape[1] - move.scaled
    along, noise = left @ move.delta, left.square() @ move.variance  # [features (+ 1)]
    values = along[:features]
    arithmetic = ARITHMETIC * largest / math.sqrt(len(left) * features)
    size = max(float(values.square().mean().sqrt()), TINY)
    error = (float(noise[:features].mean().sqrt()) + arithmetic) / size
    unit = float(along[-1]) if move.scaled else 0.0
    of_unit = float(noise[-1].sqrt()) / max(abs(unit), TINY)
    if not error < 1:
        return {}
    scaled = move.scaled and of_unit <= LENGTH  # the bias moved by more than rounding
    values = values / (unit if scaled else float(values.norm()))
    error = math.hypot(error, move.beside, of_unit if scaled else 0.0)
    signs, one_row = even(values, error), int(move.delta.any(1).sum()) == 1
    one = move.rank == 1 and scaled and not signs and not one_row
    single = one and traced.tells_apart(name, values, left, move.hidden, loss)
    centred = _without_mean(values, error) and traced.has_mean(name)
    return {
        "values": values,
        "error": error,
        "scaled": scaled,
        "odd": _odd(left, move.hidden),
        "signs": signs,
        "one_row": one_row,
        "single": single,
        "alone": single and not centred,
        "centred": centred,
        "mixed": _apart(traced, name, values, move, loss) if single else 0.0,
        "image": traced.image_of(name, values) if scaled and traced.is_pixels(name) else None,
    }


def _without_mean(values: torch.Tensor, error: float) -> bool:
    """Whether an input's numbers have a mean of 0, as a chance of many can hardly leave them."""
    return len(values) > MANY_NUMBERS and bool(values.sum().abs() <= NOISE * error * values.norm())


def _apart(traced: Traced, name: str, values: torch.Tensor, move: _Move, loss: Loss) -> float:
    """``LayerInput.mixed``."""
    least, greatest = traced.apart(name)
    if least >= AWAY or traced.tells_apart(name, values, move.left, move.hidden, loss, least):
        return 0.0
    return greatest


def _rank(of_weight: torch.Tensor, delta: torch.Tensor, rank: int) -> int:
    """The directions of a layer's update: none where its weight stood still, all that there can be
    where they are as many as rows or columns that moved, or where ``delta`` has signs alone.
    """
    if not of_weight.any():
        return 0
    every = _sign_like(delta) or rank >= max(2, _moving(of_weight))
    return min(of_weight.shape) if every else rank


def _without_decay(moved: _Moved, scaled: bool) -> tuple[_Moved, "_Spectrum", float]:
    """(a layer's move without its weight decay, its directions, c): of the bias as well, or of the
    weight alone, as some clients set it; the move as it is and 0 where that leaves no fewer
    directions.
    """
    spectrum = _spectrum(moved.delta, moved.variance)
    if spectrum.rank < 2:
        return moved, spectrum, 0.0
    weight_s = moved.before.clone()
    if scaled:
        weight_s[:, -1] = 0
    best, least, factor = moved, spectrum.rank, 0.0
    for decayed in (moved.before, weight_s):
        found = decay.find(moved.delta, decayed)
        if found is None or found.directions >= least:
            continue
        without = moved._replace(delta=moved.delta - found.factor * decayed)
        left = _spectrum(without.delta, moved.variance)
        if left.rank <= found.directions:
            best, spectrum, least, factor = without, left, found.directions, found.factor
    return best, spectrum, factor


def _moving(delta: torch.Tensor) -> int:
    """The most directions that the rows and columns that moved at all can have."""
    moved = delta != 0
    return int(min(moved.any(0).sum(), moved.any(1).sum()))


def even(values: torch.Tensor, error: float) -> bool:
    """Whether an input's numbers but for zeros are of one size, as where Adam's kin made several
    steps: then they may be signs. Of black and white images they are so, too.
    """
    sizes = values.abs() / values.square().mean().sqrt()
    near = max(EVEN, NOISE * error)
    sizes = sizes[sizes > near]
    if not len(sizes):
        return False
    return bool(((sizes / sizes.median() - 1).abs() < near).double().mean() > MOST)


def _still(weight: _Moved) -> dict[str, Any]:
    """``still`` and ``untrained`` of a layer, as far as it tells that itself."""
    still = ~weight.delta.any(0)
    return {
        "still": int(still.sum()),
        "untrained": bool((still & ~weight.before.any(0)).any()),
    }


def _odd(left: torch.Tensor, hidden: float) -> int | None:
    """The one entry of another sign than all others; None where some are ``hidden`` by rounding."""
    for side in (left, -left):
        negative = side < 0
        if len(left) > 2 and negative.sum() == 1 and bool((left.abs() > hidden).all()):
            return int(negative.int().argmax())
    return None


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
