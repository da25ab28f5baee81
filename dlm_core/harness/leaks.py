"""What leaked, what was not tried, and what the files show before any attack, in sentences."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import records
from dlm_core.beyond.layer_input import LayerInput
from dlm_core.beyond.moves import HALF, as_sent, moved_of
from dlm_core.beyond.rounding import Transmitted
from dlm_core.beyond.tracing import NOISE
from dlm_core.harness.look import Look
from dlm_core.harness.tables import counted
from dlm_core.observation import Observation, Unchanged, gives_class_scores

# Of the last bias's update: how far it may be from that of softmax, cross-entropy and one label;
# and how much of its size rounding may be, if its sum shall say anything.
FITS, ROUNDED = 0.01, 0.01
ARITHMETIC = 4e-6  # of the sum of its sizes: what float32 leaves of a sum that is 0
ROWS = 20  # of an embedding that a sentence names
AS_OTHERS = 0.1  # how nearly the decay of the last bias is that of its weight
ASSUMED = (
    "the loss is cross-entropy of a softmax, labels are not smoothed or mixed, and the optimizer "
    "kept nothing from earlier rounds"
)


@dataclass(frozen=True)
class Leak:
    """One thing that leaked; ``str`` is its sentence.

    Attributes
    ----------
    what
        "image", "images", "label", "input of layer 'fc1'", "rows of embedding 'words'", "running
        statistics" or "counts".
    attack
        By which: a key of ``Audit.results``, "division", "label inference" or "comparing the
        files".
    error
        How exactly: root mean square error, of pixels in [0, 1] or relative to a layer's input; of
        a search the distance between its two ends, or what is expected. NaN where none is known.
    sentence
        All of it in words.
    classes
        Of a label: those that are told.
    """

    what: str
    attack: str
    error: float
    sentence: str
    classes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Untried:
    """What could not or was not tried; ``str`` is its sentence.

    Attributes
    ----------
    what
        A key of ``records.ATTACKS``, or a kind of attack in words.
    why
        The reason.
    """

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


# Kinds of attack that the audit does not have. Which adversaries they need, ``harness.page`` says.
MISSING = (
    Untried(
        "batch-norm statistics alone",
        "where they are sent, their moves are means of what passed through the network; no attack "
        "of the audit reads them",
    ),
    Untried(
        "weights that are no matrices",
        "of weights that multiply numbers one by one, as a gate or a normalisation's scale does, "
        "with a bias beside them, no input is read",
    ),
    Untried(
        "learned priors",
        "no generative model and no public images like the client's are used; they show more where "
        "the update leaves something open",
    ),
    Untried(
        "other rounds",
        "two snapshots were looked at; several rounds on the same images show more than each",
    ),
    Untried(
        "optimiser state",
        "momentum and Adam's moments, where a client sends them too, are gradients themselves, and "
        "are not read",
    ),
    Untried(
        "an active server",
        "weights or layers that a server makes in order to see more are not tried: the weights "
        "before the round are taken as they are",
    ),
    Untried(
        "a defence that is known",
        "attacks that are told how the update was clipped, noised or thinned out are not tried",
    ),
    Untried(
        "questions about the data set",
        "whether a given image was in it, or what its images have in common, is not asked",
    ),
)


def missing() -> list[Untried]:
    """The kinds of attack that the audit does not have, and the registered attacks that no audit
    tries because they are told more than two snapshots.
    """
    more = [each for each in records.ATTACKS.values() if each.audited is None and each.told]
    told = ". ".join(f"{each.key} is told {' and '.join(each.told)}" for each in more)
    return [*MISSING, Untried("attacks that are told more than two snapshots", told)]


def of_layers(layers: Iterable[LayerInput]) -> list[Leak]:
    """The layers' inputs that stand in the update: one, or a mean of several nearly the same."""
    return [
        Leak(
            "image" if each.pixels and each.confirmed else f"input of layer {each.name!r}",
            "division",
            max(each.error, each.mixed),
            each.sentence or "",
        )
        for each in layers
        if each.alone
    ]


def of_statistics(unchanged: Unchanged) -> Leak:
    """What running statistics show that moved while no parameter did."""
    return Leak("running statistics", "comparing the files", math.nan, str(unchanged))


def of_counts(model: nn.Module, after: Mapping[str, torch.Tensor]) -> list[Leak]:
    """The buffers of whole numbers that moved, such as batch norm's count of its batches.

    Parameters
    ----------
    model
        With the buffers before.
    after
        W_{t+1}.
    """
    whole = {n: w for n, w in model.named_buffers() if n in after and not w.is_floating_point()}
    moved = [n for n, w in whole.items() if not torch.equal(w, after[n].to(w))]
    if not moved:
        return []
    many = counted(len(moved), "buffer")
    said = (
        f"{many} of whole numbers changed, {moved[0]!r} first: the client's images passed through "
        "the network, and what is counted there may tell of them; no attack here reads it alone"
    )
    return [Leak("counts", "comparing the files", math.nan, said)]


def of_embeddings(
    model: nn.Module, after: Mapping[str, torch.Tensor], coarse: Transmitted | None = None
) -> list[Leak]:
    """The rows of embeddings that moved beside others that did not: of what was looked up. A weight
    that other layers share, as a text's head may, says nothing.

    Parameters
    ----------
    model
        With the weights W_t.
    after
        W_{t+1}.
    coarse
        Precision to which W_{t+1} was rounded, where that is not its own; or some of its tensors,
        by name.
    """
    found, before, sent = [], dict(model.named_parameters()), as_sent(after, coarse)
    holders = [id(w) for _, w in model.named_parameters(remove_duplicate=False)]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        move = moved_of(before, sent, f"{name}.weight")
        if move is None or holders.count(id(module.weight)) > 1:
            continue
        rows = (move.delta.abs() > NOISE * move.variance.sqrt()).any(1)
        others = move.before.any(1) & ~rows  # decay leaves rows of zeros alone
        if rows.any() and others.any():
            found.append(_rows(name, rows.nonzero()[:, 0].tolist(), len(rows)))
    return found


def _rows(name: str, rows: list[int], number: int) -> Leak:
    named = ", ".join(map(str, rows[:ROWS])) + ", …" * (len(rows) > ROWS)
    said = (
        f"{len(rows):,} of the {number:,} rows of embedding {name!r} moved, {named}: what these "
        "stand for, such as words of a text, was in the client's data, if its network uses them "
        "for nothing but to look them up, none was drawn at random (negative samples), and its "
        "optimizer kept nothing from earlier rounds"
    )
    return Leak(f"rows of embedding {name!r}", "comparing the files", 0.0, said)


def of_label(seen: Observation, look: Look) -> Leak | None:
    """The label that the last bias's update shows, or the classes; None where it shows none, or
    where another loss or other targets than one class an image may have left it.
    """
    delta, variance = seen.head.delta_bias, seen.head.variance_bias
    size = float(delta.abs().sum())
    left = NOISE * math.sqrt(float(variance.sum())) + ARITHMETIC * size
    if any(each.halved for each in look.layers):
        left += HALF * size
    last = next((each for each in look.layers if f"{each.name}.weight" == seen.head.names[0]), None)
    # of signs the sum says nothing of a decay
    taken = 0.0 if look.kin == "adam" else _decay(seen, left, last)
    delta = delta - taken * seen.head.layer.bias.detach().to(delta)
    towards = [int(each) for each in (delta < 0).nonzero()]
    if len(delta) < 3 or not towards or left > ROUNDED * size or not seen.has_class_scores:
        return None
    by, unknown = "label inference", math.nan
    if len(towards) == 1 and last is not None and last.alone and _one_label(seen, last):
        said = (
            f"the label, class {towards[0]}: the last bias moved as one image of this class moves "
            "it by softmax and cross-entropy"
        )
        return Leak("label", by, unknown, said, (towards[0],))
    directions = 1 if last is None else max(1, last.directions)
    # of signs the sum says nothing; noise has other sizes than they
    sizes = delta.abs()
    as_signs = look.kin == "adam" and bool((sizes > sizes.max() / 2).all())
    balanced = as_signs or abs(float(delta.sum())) <= left
    if not balanced or len(towards) > directions:
        return None
    classes = f"class {towards[0]} is" if len(towards) == 1 else f"classes {_listed(towards)} are"
    # the other way round the update would speak of the other classes as well
    reversible = int((delta > 0).sum()) <= directions
    order = ", and if the files have not changed places" * reversible
    # its signs may be those of the decay of a bias that its image hardly moves, or of noise
    decay = ", and if no weight decay acts on biases and no noise was added" * (look.kin == "adam")
    if taken:
        decay = f", and if weight decay left {taken:.2g} of the last bias in its move"
    said = (
        f"{classes} among the labels, if {ASSUMED}{order}{decay} (others may be, too): "
        "the last bias moved towards no other class"
    )
    return Leak("label", by, unknown, said, tuple(towards))


def of_rows(
    layers: Sequence[LayerInput], model: nn.Module, image_shape: Sequence[int]
) -> Leak | None:
    """The same by the rows of the last layer's weight, where no bias of it moved."""
    last = layers[-1] if layers else None
    if last is None or last.odd is None:
        return None
    if not gives_class_scores(model, image_shape, last.name):
        return None
    said = (
        f"class {last.odd} is the label, or among the labels, if {ASSUMED}: "
        f"its row in {f'{last.name}.weight'!r} moved against all others"
    )
    return Leak("label", "label inference", math.nan, said, (last.odd,))


def _decay(seen: Observation, left: float, last: LayerInput | None) -> float:
    """What multiple of the last bias has to be taken off its move for this to add up to 0 but for
    what is ``left``, where the ``last`` layer's weight tells of as much weight decay; else 0.
    """
    total = float(seen.head.delta_bias.sum())
    of_all = float(seen.head.layer.bias.detach().double().sum())
    if last is None or abs(total) <= left or of_all == 0:
        return 0.0
    taken = total / of_all
    fits = abs(taken - last.decay) <= AS_OTHERS * last.decay
    return taken if taken > 0 and fits else 0.0


def _one_label(seen: Observation, last: LayerInput) -> bool:
    """Whether the last bias moved along p - e_y, by the features that its layer's update shows."""
    assert last.values is not None
    layer, delta = seen.head.layer, seen.head.delta_bias
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    expected = F.linear(last.values.to(weight), weight, bias).softmax(0)
    expected[delta.argmin()] -= 1
    rate = expected @ delta / expected.square().sum()
    rest = torch.linalg.vector_norm(delta - rate * expected)
    return bool(rate > 0 and rest <= FITS * torch.linalg.vector_norm(delta))


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
