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
tokens) has their rank; learned positions tell them apart (``positions``). A layer whose weight or
bias is used elsewhere as well is left out.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import check, records
from dlm_core.beyond import lengths, positions, ratios, witnesses
from dlm_core.beyond.layer_input import LayerInput
from dlm_core.beyond.moves import (
    ARITHMETIC,
    EVEN,
    ROUGH,
    Move,
    Moved,
    as_sent,
    moved_of,
    sign_like,
    to_levels,
)
from dlm_core.beyond.rounding import Transmitted
from dlm_core.beyond.tracing import AWAY, NOISE, Traced
from dlm_core.beyond.turning import Loss, repeats, tells_apart
from dlm_core.observation import TINY, Observation
from dlm_core.results import Evidence, Explains, Reconstruction, Status

MOST = 0.9  # of an input's numbers, that are of one size after several steps of Adam's kin
LENGTH = 0.1  # error of the bias's update, relative, up to which the input's length is known
KNOWN = 1e-3  # error of an input, relative, up to which layers are held against each other
MANY_NUMBERS = 8  # of an input, fewer of which may have a mean of 0 by chance
FINE = 1e-4  # of a direction, what rounding may hide for δ's numbers to be held against each other
TRANSPOSED = 0.999  # cosine of a bias's move with its square weight's columns, from which they are
SHOWN = 0.05  # error, relative, up to which patches, and what entries agree on, are shown


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
def division(
    seen: Observation,
    *,
    transmitted: Transmitted | None = None,
    layers: Sequence[LayerInput] = (),
) -> Reconstruction:
    """Read the image off the update of a linear layer that it passed through, by a division; or
    those that several of its outputs each show by themselves.

    Parameters
    ----------
    seen
        What the observer sees.
    transmitted
        Precision to which W_{t+1} was rounded, where that is not its own; or some of its tensors,
        by name.
    layers
        What ``layer_inputs`` says of it, where that was asked already; else it is asked.

    Returns
    -------
    Reconstruction
        In the client's own range of pixels: an input that the client normalised stays so. Its
        evidence is ``Ratio``; labels are -1, which it does not tell.

    Raises
    ------
    ValueError
        Where no linear layer's update shows an input, or where that is not the image.
    """
    began = time.perf_counter()
    found = shown(layers or layer_inputs(seen, transmitted))
    return replace(found, seconds=time.perf_counter() - began)


def shown(layers: Sequence[LayerInput]) -> Reconstruction:
    """The image that one of these layers shows, the best of them; where its length is not known,
    with its largest number 1. ValueError where none does.
    """
    found = [each for each in layers if each.pictures is not None]
    if not found:
        raise ValueError(
            "no linear layer that takes the image itself, with a weight of its own, has an update "
            "of rank one, or outputs that one input alone moved, from which a division would show "
            "it"
        )
    best = min(
        found,
        key=lambda e: (not e.alone, not e.confirmed, e.faint is not None, e.entries, e.error),
    )
    images = best.pictures
    assert images is not None and best.told is not None
    count, device = len(images), images.device
    return Reconstruction(
        images=images,
        labels=torch.full((count,), -1, device=device),
        status=Status.CONVERGED,
        vouched=torch.full((count,), best.alone and best.confirmed, device=device),
        evidence=Ratio(
            losses=[],
            loss=best.error**2,
            layer=best.name,
            error=best.error,
            alone=best.alone,
            confirmed=best.confirmed,
            said=best.told,
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
    after = as_sent(weights_after, transmitted)
    before = dict(model.named_parameters())
    traced = Traced(model, image_shape)
    moved = _moved(traced, before, after)
    moves = {
        name: Move.of(*both, images=traced.is_pixels(name) and name in traced.fixed)
        for name, both in moved.items()
    }
    loss = _loss(next(reversed(moves.values()), None))
    found = [_of_layer(traced, name, *moved[name], moves[name], loss) for name in moved]
    # among class scores many rows have one mean of all inputs, where these are the same
    scored = found[-1].outputs if found else 0
    found = [
        each if each.outputs == scored else _with_shared(traced, each, *moved[each.name], scored)
        for each in found
    ]
    found = [_compared(traced, each, found) for each in found]
    if _disagree(traced, found):
        found = [_disputed(each) for each in found]
    elif found:
        fixed = _fixed(traced, moved, after, found)
        found = [replace(each, confirmed=fixed.get(each.name) is True) for each in found]
        if fixed.get(found[-1].name) is False:
            found = [_under_any_loss(traced, each, moves, found[-1].name) for each in found]
    patches = _of_patches(traced, before, after, found)
    return [*_of_others(traced, model, before, after), *patches, *found]


def _moved(
    traced: Traced, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> dict[str, tuple[Moved, Moved | None]]:
    """{layer: the moves of its weight and its bias}, of those that the snapshots have."""
    moved = {}
    for name, layer in traced.layers.items():
        weight = moved_of(before, after, f"{name}.weight")
        if weight is not None:
            bias = None if layer.bias is None else moved_of(before, after, f"{name}.bias")
            moved[name] = to_levels(weight, bias)
    return moved


def _of_others(
    traced: Traced,
    model: nn.Module,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> list[LayerInput]:
    """The same of weights that are no linear layer's and are used as one's; without a bias, such as
    an adapter's, of those that see an image.
    """
    found: dict[str, LayerInput] = {}
    for pair in ratios.pairs(model, traced.linear):
        name, bias, columns = pair
        known = {} if name in found else _of_pair(pair, before, after)
        if not known:
            continue
        try:
            taken = ratios.used_as_one(traced, pair, traced.probes)
        except Exception:  # whatever a user's network raises
            taken = None
        if taken is None:
            continue
        traced.add(name, taken, steady=ratios.steady(traced, pair, taken))
        pixels = traced.is_pixels(name)
        if bias is None and not pixels:
            continue
        weight, values = before[name], known["values"]
        found[name] = LayerInput(
            name=name.removesuffix(".weight"),
            features=len(values),
            outputs=weight.shape[1] if columns else len(weight),
            standing=1,
            rows=1,
            pixels=pixels,
            fixed=False,
            signs=even(values, known["error"]),
            image=traced.image_of(name, values) if bias and pixels else None,
            faint=None if bias else traced.faint(name, values),
            **known,
        )
    return list(found.values())


def _of_pair(
    pair: ratios.Pair, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What the move of a weight, with its bias or without, says of one vector that it was
    multiplied with; nothing where it was not one.
    """
    name, bias_s, columns = pair
    weight = moved_of(before, after, name)
    if weight is None or not weight.delta.any() or sign_like(weight.delta):
        return {}
    delta, variance, old = (ratios.oriented(each, columns) for each in weight[:3])
    if bias_s is not None:
        bias = moved_of(before, after, bias_s)
        known = bias and ratios.input_of(delta, bias.delta, variance, bias.variance)
        return {"values": known[0], "error": known[1], "rank": 1} if known else {}
    if ratios.direction(delta)[1] > ROUGH:
        return {}
    move = Move.of(Moved(delta, variance, old), None)
    along, error = _direction(move, delta.shape[1])
    if not (move.one and error < 1):
        return {}
    return {"values": along / along.norm(), "error": error, "rank": move.rank, "scaled": False}


def _of_patches(
    traced: Traced,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    layers: Sequence[LayerInput],
) -> list[LayerInput]:
    """The image by its patches, whose positions are learned."""
    found, later = [], _later(each for each in layers if each.linear)
    for patches in positions.found(traced):
        weight, place = (moved_of(before, after, n) for n in (patches.weight, patches.position))
        if weight is None or place is None:
            continue
        if any(not each.delta.any() or sign_like(each.delta) for each in (weight, place)):
            continue
        solved = positions.solve(patches, weight[:2], place[:2])
        if solved is None or not solved.error < SHOWN or 2 * solved.open > patches.number:
            continue
        traced.add(patches.weight, patches.inputs, steady=True)
        if not traced.is_pixels(patches.weight):
            continue
        image = traced.image_of(patches.weight, solved.values)
        confirmed = solved.open == 0 and witnesses.agree(traced, image, later) is True
        found.append(
            LayerInput(
                name=patches.weight.removesuffix(".weight"),
                features=len(solved.values),
                outputs=len(weight.delta),
                rank=1,
                standing=1,
                rows=1,
                pixels=True,
                fixed=True,
                values=solved.values,
                error=solved.error,
                single=solved.tested,
                alone=confirmed and solved.tested,
                confirmed=confirmed,
                patches=patches.number,
                open=solved.open,
                image=image,
            )
        )
    return found


def _known(layers: Iterable[LayerInput]) -> list[LayerInput]:
    """Those that are told exactly enough to be held against each other."""
    return [each for each in layers if each.error < KNOWN and each.rank == 1 and not each.signs]


def _later(layers: Iterable[LayerInput]) -> dict[str, tuple[torch.Tensor, bool]]:
    """{layer: (its input, whether its length is known)} of these behind the first."""
    return {
        each.name: (each.values, each.scaled)
        for each in _known(layers)
        if each.values is not None and not each.pixels
    }


def _disagree(traced: Traced, layers: Sequence[LayerInput]) -> bool:
    """Whether later layers' inputs are not those of an image that a layer shows."""
    known, later = _known(layers), _later(layers)
    images = [each.image for each in known if each.image is not None and not each.untrained]
    if any(witnesses.agree(traced, image, later) is False for image in images):
        return True
    inputs_s = [(name, values) for name, (values, scaled) in later.items() if scaled]
    return any(witnesses.leads_elsewhere(traced, name, values, later) for name, values in inputs_s)


def _fixed(
    traced: Traced,
    moved: Mapping[str, tuple[Moved, Moved | None]],
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
                without = bias.delta - each.decay * bias.before
                signals = [bias.delta, *[without] * bool(each.decay)]
            elif each.values is not None:
                signals = [sign * (updates[each.name] @ each.values) for sign in (1, -1)]
    known = {
        each.name: each.values
        for each in layers
        if each.values is not None and each.scaled and not each.signs
    }
    # several steps leave later layers several directions, and one exactly what it leads to; a mean
    # of several images that an optimizer of low rank left follows nearly
    once = all(each.rank == 1 for each in layers if each.rank and each.rows == 1)
    parts = [part for name in known for part in moved[name] if part and part.delta.any()]
    exactly = max([lengths.EXACTLY, *map(_rounding, parts)])
    limit = min(exactly, lengths.FITS) if once else lengths.FITS
    return {
        name: lengths.fixed(traced, after, name, values, updates, signals, limit)
        for name, values in known.items()
    }


def _rounding(part: Moved) -> float:
    """How far rounding may lead from a move, over its size: of a bias over that of what rises, as
    the classes do that are no label.
    """
    told = part.delta.clamp(min=0) if part.delta.ndim == 1 else part.delta
    return NOISE * float(part.variance.sum().sqrt() / told.norm())


def _under_any_loss(
    traced: Traced, layer: LayerInput, moves: Mapping[str, Move], last: str
) -> LayerInput:
    """A layer's input where the ``last`` layer's δ follows the scores of none: then an optimizer of
    low rank may have left it, or a loss of which δ is the same for any images. It is one input
    alone where a later layer confirms it, and the network between turns such a δ.
    """
    if not layer.alone or layer.values is None:
        return layer
    move, loss = moves[layer.name], Loss(seen=True, slopes=moves[last].left)
    turns = layer.confirmed and tells_apart(
        traced, layer.name, layer.values, move.left, move.hidden, loss
    )
    return layer if turns else replace(layer, single=False, alone=False)


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
    if shown.untrained or witnesses.contradict(traced, shown.image, later):
        return replace(shown, untrained=True, alone=False)
    return shown


def _loss(last: Move | None) -> Loss:
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
    weight: Moved,
    bias: Moved | None,
    move: Move,
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
        of_weight = Move.of(weight, None, images=pixels and fixed)
        if of_weight.one and bias is not None and outputs == features:
            along, _ = _direction(of_weight, features)
            if F.cosine_similarity(along, bias.delta, 0).abs() > TRANSPOSED:
                return LayerInput(**about | {"transposed": True})
        if of_weight.one:
            move = of_weight
            about |= {"scaled": False, "decay": move.decay, "bias_apart": True}
    if move.one:
        return LayerInput(**about | _input(traced, name, move, loss))
    return LayerInput(**about | (_by_entries(traced, name, weight, bias) if pixels else {}))


def _with_shared(
    traced: Traced, layer: LayerInput, weight: Moved, bias: Moved | None, scored: int
) -> LayerInput:
    """With the inputs that several of its outputs show by themselves, where it shows none; of a
    network with so many scores.
    """
    told = layer.values is not None or layer.rows != 1 or layer.rank < 2
    if bias is None or told or sign_like(weight.delta):
        return layer
    found = ratios.shared_by_rows(weight.delta, bias.delta, weight.variance, bias.variance)
    found = [each for each in found if not even(each.values, each.error)]  # Adam's kin leave signs
    if not found:
        return layer
    # one score or two weigh all images by one slope, which tells no image from a sum of several
    combined = scored <= 2 or len(found) > Move.of(weight, None).rank
    error = max(each.error for each in found)
    layer = replace(layer, shared=found, error=error, combined=combined)
    if not layer.pixels:
        return layer
    images = [traced.image_of(layer.name, each.values) for each in found]
    return replace(layer, images=torch.cat(images))


def _by_entries(traced: Traced, name: str, weight: Moved, bias: Moved | None) -> dict[str, Any]:
    """The same of a layer that sees an image, where single entries of its move were changed."""
    if bias is None:
        return {}
    # weights that were set to 0 tell nothing of the input
    delta = torch.where(weight.delta == weight.before, 0.0, weight.delta)
    update = delta, bias.delta, weight.variance, bias.variance
    found = ratios.by_entries(*update)
    if found is None or len(ratios.shared_by_rows(*update)) > 1:  # these are several inputs
        return {}
    values, error, failed = found
    if not error < SHOWN:
        return {}
    return {
        "values": values,
        "error": error,
        "entries": True,
        "open": failed,
        "signs": even(values, error),
        "image": traced.image_of(name, values),
    }


def _input(traced: Traced, name: str, move: Move, loss: Loss) -> dict[str, Any]:
    """What a move of one direction adds to what is said of a layer; nothing where it is its bias's
    alone, or nearly.
    """
    left, features = move.left, move.delta.shape[1] - move.scaled
    along, error = _direction(move, features)
    values = along[:features]
    unit = float(along[-1]) if move.scaled else 0.0
    of_unit = float((left.square() @ move.variance[:, -1]).sqrt()) / max(abs(unit), TINY)
    if not error < 1:
        return {}
    scaled = move.scaled and of_unit <= LENGTH  # the bias moved by more than rounding
    values = values / (unit if scaled else float(values.norm()))
    error = math.hypot(error, move.beside, of_unit if scaled else 0.0)
    signs, one_row = even(values, error), int(move.delta.any(1).sum()) == 1
    one = move.rank == 1 and scaled and not signs and not one_row
    single = one and tells_apart(traced, name, values, left, move.hidden, loss)
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
        "faint": None if scaled else traced.faint(name, values),
    }


def _direction(move: Move, features: int) -> tuple[torch.Tensor, float]:
    """(a move's first direction [features (+ 1)], the error of its first numbers, relative)."""
    left = move.left
    along, noise = left @ move.delta, left.square() @ move.variance
    arithmetic = ARITHMETIC * move.spectrum.largest / math.sqrt(len(left) * features)
    size = max(float(along[:features].square().mean().sqrt()), TINY)
    return along, (float(noise[:features].mean().sqrt()) + arithmetic) / size


def _without_mean(values: torch.Tensor, error: float) -> bool:
    """Whether an input's numbers have a mean of 0, as a chance of many can hardly leave them."""
    return len(values) > MANY_NUMBERS and bool(values.sum().abs() <= NOISE * error * values.norm())


def _apart(traced: Traced, name: str, values: torch.Tensor, move: Move, loss: Loss) -> float:
    """``LayerInput.mixed``."""
    least, greatest = traced.apart(name)
    if least >= AWAY or tells_apart(traced, name, values, move.left, move.hidden, loss, least):
        return 0.0
    return greatest


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


def _still(weight: Moved) -> dict[str, Any]:
    """``still`` and ``untrained`` of a layer, as far as it tells that itself."""
    still = ~weight.delta.any(0)
    return {
        "still": int(still.sum()),
        "untrained": bool(weight.before.any() and (still & ~weight.before.any(0)).any()),
    }


def _odd(left: torch.Tensor, hidden: float) -> int | None:
    """The one entry of another sign than all others; None where some are ``hidden`` by rounding."""
    for side in (left, -left):
        negative = side < 0
        if len(left) > 2 and negative.sum() == 1 and bool((left.abs() > hidden).all()):
            return int(negative.int().argmax())
    return None
