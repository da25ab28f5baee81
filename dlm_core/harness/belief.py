"""How far a result is believed, and what an audit concludes.

There is no truth to compare with. An exact attack judges itself, as does ``weighted`` where it
meets all of the update; another search is made twice, from starts far from each other, so that what
the update leaves open differs: that both end at the same images, which explain the update, is the
evidence. Nothing is believed against the update's ranks, or where the update has too few numbers
for the image.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch

from dlm_core import metrics
from dlm_core.beyond.batches import Reason, Traces
from dlm_core.beyond.exact import Fit
from dlm_core.beyond.inputs import Ratio
from dlm_core.beyond.weighted import Told
from dlm_core.coordinates import Start, cosines
from dlm_core.harness.about import About
from dlm_core.harness.leaks import Leak, Untried, of_layers
from dlm_core.harness.look import Look
from dlm_core.harness.tables import counted
from dlm_core.results import Explains, Reconstruction, Status

# An attack's loss up to which its images explain the update: all of it, some of it.
EXPLAINED, PARTLY = 1e-3, 0.1
# dB between the images of two searches, from which on they count as the same. Not enough alone: two
# that end at the mean of two images agree to 60 dB and more (notebook 22).
AGREED = 25.0
# What is to be said of a batch that its reason does not confirm.
UNCONFIRMED = {
    Reason.NOT_ONE_STEP: (
        "one step on these images does not explain the update; several steps "
        "may, or images of which one is a darker copy of another"
    ),
    Reason.UNTESTED: "rounding alone may have left such an update, so nothing confirms it",
    Reason.UNSETTLED: "no test confirms that these are images and not mixtures of them",
}
FAR = 10.0  # a second search starts so much further from grey


class Verdict(StrEnum):
    """What an audit concludes. That nothing was shown is never that nothing leaks."""

    LEAKED = "leaked"
    PARTLY = "partly"
    NOT_SHOWN = "not shown"
    NOTHING_SENT = "nothing was sent"

    @property
    def sentence(self) -> str:
        """What it means, for whoever reads nothing else."""
        return _SENTENCES[self]

    @property
    def exit_status(self) -> int:
        """Of an audit that came to its end. 1 and 2 are also what a shell or a Python that fails
        leaves: no failure is taken for "not shown".
        """
        return {Verdict.NOTHING_SENT: 0, Verdict.LEAKED: 1, Verdict.PARTLY: 2}.get(self, 3)


_SENTENCES = {
    Verdict.LEAKED: "An image that the client's network was fed was read from what it sent.",
    Verdict.PARTLY: (
        "Something about the client's data was read from what it sent, or may have been; "
        "of no image it is certain."
    ),
    Verdict.NOT_SHOWN: (
        "No leak was shown. That does not make the client safe: each attack is for one kind of "
        "client, and what was not tried is listed."
    ),
    Verdict.NOTHING_SENT: (
        "The client sent back the weights and statistics that it had received: they say nothing "
        "about its images."
    ),
}


@functools.total_ordering
@dataclass(frozen=True)
class Belief:
    """How far a result is believed; the greater one is shown.

    Attributes
    ----------
    grade
        How much the images explain, and for a search whether nothing else does as well.
    doubt
        Why it is believed no further, in a sentence; None for nothing that is known.
    judged
        Whether an exact attack judged itself.
    loss
        Of a search.
    agreement
        PSNR in dB between a search's images and those of a second one from another start; None
        where there was none.
    expected
        PSNR in dB that a search's picture should have, by what the update tells of it; None where
        the search does not say.
    """

    grade: Explains
    doubt: str | None
    judged: bool
    loss: float
    agreement: float | None = None
    expected: float | None = None

    def __lt__(self, other: "Belief") -> bool:
        return self._place < other._place

    def less(self, doubt: str | None) -> "Belief":
        """The same, or in part at most, where there is something that speaks against more."""
        if doubt is None:
            return self
        return replace(self, grade=min(self.grade, Explains.PARTLY), doubt=doubt)

    @property
    def _place(self) -> tuple[int, bool, bool, float]:
        some = self.grade > Explains.LITTLE
        return self.grade, self.judged and some, self.expected is not None and some, -self.loss


@dataclass(frozen=True, kw_only=True, eq=False)  # a mapping's equality is its own
class Audit(Mapping[str, Reconstruction]):
    """What an audit found: a mapping of each attack to its result, with the verdict.

    Attributes
    ----------
    results
        {attack: its result}.
    beliefs
        {attack: how far it is believed}.
    look
        The first look.
    notes
        What was done to the files, why attacks did not apply, and which were cut off.
    known
        What the files show before any attack beside layers' inputs: labels, embeddings' rows,
        running statistics.
    untried
        What was not tried, or could not be, each with its reason; kinds of attack that the audit
        does not have, too.
    unchanged
        Whether the client sent what it had received.
    interrupted
        Whether the user ended it.
    about
        What was asked, of which files, with which software; None where that is not known.
    caution
        What may hide a leak, in a sentence; None for nothing that is known.
    """

    results: dict[str, Reconstruction] = field(repr=False)
    beliefs: dict[str, Belief]
    look: Look = field(repr=False)
    notes: list[str]
    known: list[Leak] = field(default_factory=list)
    untried: list[Untried] = field(repr=False, default_factory=list)
    unchanged: bool = False
    interrupted: bool = False
    about: About | None = field(repr=False, default=None)
    caution: str | None = None

    def __getitem__(self, attack: str) -> Reconstruction:
        return self.results[attack]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def exit_status(self) -> int:
        """Of ``python -m dlm_core attack``: 0 to 3 by the verdict, 130 where it was interrupted."""
        return 130 if self.interrupted else self.verdict.exit_status

    @property
    def sentence(self) -> str:
        """The verdict in words, with what may hide more."""
        unsure = self.verdict in (Verdict.PARTLY, Verdict.NOT_SHOWN) and self.caution
        return f"{self.verdict.sentence} {unsure}" if unsure else self.verdict.sentence

    @property
    def tried(self) -> list[str]:
        """The attacks that came to a result, in their order: the keys of ``results``."""
        return list(self.results)

    @property
    def leaks(self) -> list[Leak]:
        """What has leaked: labels and running statistics, layers' inputs that stand in the update
        (one, or a mean of several nearly the same), and images that explain it.
        """
        images = [
            _leaked(name, self.results[name], each)
            for name, each in self.beliefs.items()
            if each.grade is Explains.FULLY
        ]
        divided = any(each.attack == "division" for each in images)
        layers = [
            each for each in of_layers(self.look.layers) if each.what != "image" or not divided
        ]
        return [*images, *layers, *self.known]

    @property
    def verdict(self) -> Verdict:
        """Leaked where an image did; partly where something else did, where something stands in the
        update that may be a mean of several, or where images explain it in part or not alone.
        """
        if self.unchanged:
            return Verdict.NOTHING_SENT
        if any(each.what in ("image", "images") for each in self.leaks):
            return Verdict.LEAKED
        best = max((each.grade for each in self.beliefs.values()), default=Explains.LITTLE)
        partly = best is Explains.PARTLY or self.look.shown or self.known
        return Verdict.PARTLY if partly else Verdict.NOT_SHOWN


def attack_of(key: str) -> str:
    """The attack of an ``Audit``'s entry: "dlm_plus" of "dlm_plus, 2 images"."""
    return key.split(",")[0]


def _leaked(attack: str, found: Reconstruction, belief: Belief) -> Leak:
    """The images that an attack found, as one leak."""
    many = len(found.images) > 1
    what, their = ("images", "their pixels") if many else ("image", "its pixels")
    error, how = _error(found, belief)
    said = f"the {what} that {attack} found"
    if math.isfinite(error):
        said += f", {their} to {error:.0e} ({how})"
    return Leak(what, attack, error, said)


def _error(found: Reconstruction, belief: Belief) -> tuple[float, str]:
    """(root mean square error of the pixels, where it comes from); NaN where none is known."""
    if isinstance(found.evidence, Ratio):
        return found.evidence.error, "rounding, relative to the image"
    if isinstance(found.evidence, Traces):
        return float(found.evidence.image_error.max()), "its own standard error"
    if isinstance(found.evidence, Fit):
        return 10 ** (-found.evidence.bound_psnr / 20), "the Cramér-Rao bound"
    if belief.expected is not None:
        return 10 ** (-belief.expected / 20), "what the update leaves open, expected"
    if belief.agreement is not None:
        return 10 ** (-belief.agreement / 20), "the distance between two searches"
    return math.nan, ""


def converged(found: Reconstruction) -> bool:
    """Whether a search that says what the update tells it met all of that."""
    return isinstance(found.evidence, Told) and found.status is Status.CONVERGED


def likeness(images: torch.Tensor, others: torch.Tensor) -> float:
    """PSNR in dB between two searches' images, [N, C, H, W] each: the worst of the best pairs, as
    all of them are believed together.
    """
    images, others = images.double().cpu(), others.double().cpu()
    matched = images[metrics.match(images.clamp(0, 1), others.clamp(0, 1))]
    errors = (matched - others).square().flatten(1).mean(1)
    return float(-10 * errors.max().clamp(min=1e-30).log10())


def far(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> Start:
    """Coordinates like ``cosines`` with a start far from grey: spread over natural images."""
    start, to_images = cosines(shape, like, generator)
    return FAR * start, to_images


def believe(found: Reconstruction, agreement: float | None, look: Look) -> Belief:
    """How far to believe a result.

    Parameters
    ----------
    found, agreement
        As ``second.twice`` returns them.
    look
        The first look at the update.
    """
    judged, loss = found.evidence.explains is not None, found.evidence.loss
    grade, expected = _by_itself(found, agreement), _expected(found, agreement)
    belief = Belief(grade, None, judged, loss, agreement, expected)
    whole = grade is Explains.FULLY and not isinstance(found.evidence, Ratio)
    return belief.less(against(found, look) if whole else None)


def _expected(found: Reconstruction, agreement: float | None) -> float | None:
    """What a picture should have by its search, and no more than a second one leaves it."""
    if not isinstance(found.evidence, Told):
        return None
    return min(found.evidence.expected_psnr, math.inf if agreement is None else agreement)


def settled(found: Audit, count: int) -> str | None:
    """Why no search for ``count`` images can be believed further than a result that was found;
    None where one may be.

    Parameters
    ----------
    found
        So far.
    count
        Of images.

    Notes
    -----
    That result explains the update to its rounding, and what speaks against it speaks against
    any other images as well.
    """
    for name, each in found.items():
        explains = each.evidence.explains is Explains.FULLY and len(each.images) == count
        if explains and _limit(count, each.images.numel(), found.look):
            return f"{name} explains the update already, and no search can be believed further"
    return None


def _by_itself(found: Reconstruction, agreement: float | None) -> Explains:
    """How much it explains by its own evidence, and by a second search."""
    if found.evidence.explains is not None:
        return found.evidence.explains
    agreed = agreement is not None and agreement >= AGREED
    expected = _expected(found, agreement)
    if expected is not None:  # what is left open is alike in both of its searches
        agreed = (agreed or converged(found)) and expected >= AGREED
    if found.evidence.loss <= EXPLAINED and agreed:
        return Explains.FULLY
    return Explains.PARTLY if found.evidence.loss <= PARTLY or agreed else Explains.LITTLE


def against(found: Reconstruction, look: Look) -> str | None:
    """What speaks against a result, whatever it explains: what else than these images may have left
    the update; None for nothing that is known.

    Parameters
    ----------
    found
        A result.
    look
        The first look at the update.
    """
    count, pixels = len(found.images), found.images.numel()
    steps = found.local_steps or 1
    if look.directions > count * steps:
        return (
            f"the update has {look.directions} directions, "
            f"and {counted(count, 'image')} in {counted(steps, 'step')} "
            f"leave {count * steps} at most"
        )
    if isinstance(found.evidence, Traces) and found.evidence.reason in UNCONFIRMED:
        return UNCONFIRMED[found.evidence.reason]
    return _limit(count, pixels, look)


def _limit(count: int, pixels: int, look: Look) -> str | None:
    """The same as far as it holds for any images, whatever they explain."""
    if look.numbers < pixels:
        return f"{look.numbers:,} weights moved, too few to fix {pixels:,} pixels"
    if look.num_classes <= 2 and not look.one_input:
        return (
            "with two classes several images leave an update like that of one, "
            "their mean or a difference between them"
        )
    if look.blends and count == 1:
        return (
            f"several images may leave such an update, which shows their mean or a difference "
            f"between them: layer {look.blends[0].name!r} does not tell them apart"
        )
    return None
