"""How far a result is believed, and what an audit concludes.

There is no truth to compare with. An exact attack judges itself; a search is made twice, from
starts far from each other, so that what the update leaves open differs: that both end at the same
images, which explain the update, is the evidence. Nothing is believed against the update's ranks,
or where the update has too few numbers for the image.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

import torch

from dlm_core import metrics, records
from dlm_core.beyond.batches import Reason, Traces
from dlm_core.beyond.inputs import Ratio
from dlm_core.coordinates import Start, cosines
from dlm_core.harness.look import Look
from dlm_core.results import Explains, Reconstruction, SearchEvidence

# An attack's loss up to which its images explain the update: all of it, some of it.
EXPLAINED, PARTLY = 1e-3, 0.1
# dB between the images of two searches that found the same: right ones 40 and more, wrong below 20.
AGREED = 25.0
FAR = 10.0  # a second search starts so much further from grey
# Of unrolled searches once their steps are known.
CLOSER = {"tolerance": 0.0, "patience": 200, "max_evaluations": 1000}


class Verdict(StrEnum):
    """What an audit concludes. That nothing was shown is never that nothing leaks."""

    LEAKED = "leaked"
    PARTLY = "partly"
    NOT_SHOWN = "not shown"


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
    """

    grade: Explains
    doubt: str | None
    judged: bool
    loss: float

    def __lt__(self, other: "Belief") -> bool:
        return self._place < other._place

    @property
    def _place(self) -> tuple[int, bool, float]:
        return self.grade, self.judged and self.grade > Explains.LITTLE, -self.loss


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
        Why attacks did not apply, in sentences.
    """

    results: dict[str, Reconstruction] = field(repr=False)
    beliefs: dict[str, Belief]
    look: Look = field(repr=False)
    notes: list[str]

    def __getitem__(self, attack: str) -> Reconstruction:
        return self.results[attack]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def leaks(self) -> list[str]:
        """What has leaked: layers' inputs that stand in the update and are no mean of several, and
        images that explain it.
        """
        named = [name for name, each in self.beliefs.items() if each.grade is Explains.FULLY]
        return [*self.look.leaked, *(f"the images that {name} found" for name in named)]

    @property
    def verdict(self) -> Verdict:
        """Leaked where an image did; partly where something stands in the update, or where images
        explain it in part or not alone.
        """
        best = max((each.grade for each in self.beliefs.values()), default=Explains.LITTLE)
        if best is Explains.FULLY:
            return Verdict.LEAKED
        partly = best is Explains.PARTLY or self.look.shown
        return Verdict.PARTLY if partly else Verdict.NOT_SHOWN


def twice(
    run: Callable[..., Reconstruction], record: records.Attack
) -> tuple[Reconstruction, float | None]:
    """(the result, PSNR in dB between its images and those of a search from another start, far
    away, so that what the update leaves open differs; None for exact attacks, and for those that
    have one start).
    """
    found = run()
    if not isinstance(found.evidence, SearchEvidence):
        return found, None
    if found.local_steps is not None:
        run = partial(run, local_steps=found.local_steps, **CLOSER)
        found = run()
    if not record.seeded:
        return found, None
    start = {"coordinates": far} if "coordinates" in record.options else {}
    again = run(seed=1, **start)
    images, others = (each.images.double().cpu() for each in (found, again))
    matched = images[metrics.match(images, others)]
    errors = (matched - others).square().flatten(1).mean(1)
    return found, float((-10 * errors.clamp(min=1e-30).log10()).median())


def far(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> Start:
    """Coordinates like ``cosines`` with a start far from grey: spread over natural images."""
    start, to_images = cosines(shape, like, generator)
    return FAR * start, to_images


def believe(found: Reconstruction, agreement: float | None, look: Look) -> Belief:
    """How far to believe a result.

    Parameters
    ----------
    found, agreement
        As ``twice`` returns them.
    look
        The first look at the update.
    """
    grade, doubt = _by_itself(found, agreement), None
    if grade is Explains.FULLY and not isinstance(found.evidence, Ratio):
        doubt = _doubt(found, look)
    judged = found.evidence.explains is not None
    return Belief(Explains.PARTLY if doubt else grade, doubt, judged, found.evidence.loss)


def _by_itself(found: Reconstruction, agreement: float | None) -> Explains:
    """How much it explains by its own evidence, and by a second search."""
    if found.evidence.explains is not None:
        return found.evidence.explains
    agreed = agreement is not None and agreement >= AGREED
    if found.evidence.loss <= EXPLAINED and agreed:
        return Explains.FULLY
    return Explains.PARTLY if found.evidence.loss <= PARTLY or agreed else Explains.LITTLE


def _doubt(found: Reconstruction, look: Look) -> str | None:
    """What else than these images may have left the update; None for nothing that is known."""
    count, pixels = len(found.images), found.images.numel()
    steps = found.local_steps or 1
    if look.directions > count * steps:
        return (
            f"the update has {look.directions} directions, "
            f"and {_images(count)} in {steps} step{'s' * (steps > 1)} leave {count * steps} at most"
        )
    if isinstance(found.evidence, Traces) and found.evidence.reason is Reason.NOT_ONE_STEP:
        return (
            "one step on these images does not explain the update; several steps "
            "may, or images of which one is a darker copy of another"
        )
    if look.numbers < pixels:
        return f"{look.numbers:,} weights moved, too few to fix {pixels:,} pixels"
    if look.num_classes <= 2 and not look.one_input:
        return "with two classes several images leave an update like that of one, their mean"
    if look.blends and count == 1:
        return (
            f"several images may leave such an update, which shows their mean: layer "
            f"{look.blends[0].name!r} does not tell them apart"
        )
    return None


def _images(count: int) -> str:
    return f"{count} image{'s' * (count > 1)}"
