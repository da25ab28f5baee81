"""A second search from far away, whose end speaks for the first one's picture or against it; and
searches that go on.

A search that begins far from the image may still be falling when its evaluations are over, at a
loss many times the first one's: it has found nothing, and says nothing. It then goes on, until it
comes to rest or ends at the first one's picture. What the update leaves open stays where the search
began, however long it goes on.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from dlm_core import records
from dlm_core.beyond.weighted import Told, affordable
from dlm_core.harness.belief import AGREED, EXPLAINED, converged, far, likeness
from dlm_core.harness.foretell import AT_LENGTH, FEWEST, MORE, in_words
from dlm_core.harness.watch import OutOfTime, Watch
from dlm_core.results import Reconstruction, SearchEvidence, Status

# The loss up to which a search explains the update so closely that a second one goes on: what the
# wrong number of images or steps explains best, two searches may find as well, at a loss above it.
CLOSELY = 1e-5
# A second search goes on for so many evaluations, one after the other; the first one for so many.
LONGER, FIRST = (500, 1000, 2000, 4000), 1000
PATIENT: dict[str, Any] = {"tolerance": 0.0, "patience": 200, "restarts": 1}

Run = Callable[..., Reconstruction]


def twice(
    run: Run,
    record: records.Attack,
    watch: Watch,
    say: Callable[[str], None],
    against: Callable[[Reconstruction], object],
) -> tuple[Reconstruction, float | None]:
    """Run an attack, and where it searches a second time, from far away.

    Parameters
    ----------
    run, record
        The attack with its options, and its record.
    watch
        That it runs in.
    say
        Takes a sentence of how long a second search goes on.
    against
        Of a result, what speaks against it whatever a second search finds; None for nothing.

    Returns
    -------
    tuple
        The result, and the PSNR in dB between its images and those of the second search; None where
        none was made, and where it stalled while the first one met all of the update.
    """
    found = watch.keep(run())
    if not isinstance(found.evidence, SearchEvidence):
        return found, None
    if found.local_steps is not None:
        run = partial(run, local_steps=found.local_steps, **AT_LENGTH)
        found = watch.keep(run())
    if not record.seeded or not _worth_another(found):
        return found, None
    from_afar = partial(run, seed=1, **_far(record, watch))
    again = from_afar()
    if isinstance(found.evidence, Told) and again.evidence.loss < found.evidence.loss:
        found, again = again, found
    if found.evidence.loss <= CLOSELY and "resume" in record.options and against(found) is None:
        found, again = _gone_on(run, found, from_afar, again, watch, say)
    alone = converged(found) and not converged(again)  # what stalls says nothing against it
    return found, None if alone else likeness(found.images, again.images)


def goes_on(record: records.Attack, found: Reconstruction) -> bool:
    """Whether a search ended as soon as it explained the update, and may come closer to it."""
    ended = found.status in (Status.CONVERGED, Status.BUDGET)
    return ended and isinstance(found.evidence, SearchEvidence) and "resume" in record.options


def closer(
    run: Run, found: Reconstruction, agreement: float | None, watch: Watch
) -> tuple[Reconstruction, float | None]:
    """A search that goes on, with what ``twice`` returned; OutOfTime where it has too little."""
    each = statistics.median(watch.taken or [0.0])
    further = watch.keep(_further(run, found, FIRST, each, watch))
    alike = likeness(further.images, found.images)
    return further, None if agreement is None else min(agreement, alike)


def _gone_on(
    run: Run,
    found: Reconstruction,
    from_afar: Run,
    again: Reconstruction,
    watch: Watch,
    say: Callable[[str], None],
) -> tuple[Reconstruction, Reconstruction]:
    """Both searches, each gone on, until the second one, ``again``, rests or ends at the picture of
    the first, or their time is over.
    """
    if likeness(found.images, again.images) >= AGREED:
        return found, again
    each = statistics.median(watch.taken or [0.0])
    most = in_words(each * (FIRST + sum(LONGER)))
    say(f"the second search has not found the same picture, and both go on: up to about {most}")
    try:
        found = watch.keep(_further(run, found, FIRST, each, watch))
        for evaluations in LONGER:
            again = _further(from_afar, again, evaluations, each, watch)
            rests = again.status is not Status.BUDGET
            if rests or likeness(found.images, again.images) >= AGREED:
                break
    except OutOfTime:
        say(f"the second search was not at rest when its time was over: {MORE}")
    return found, again


def _further(
    run: Run, found: Reconstruction, evaluations: int, each: float, watch: Watch
) -> Reconstruction:
    """A search that goes on from its best point, for as many as fit its time, of ``each`` second;
    OutOfTime where these are few.
    """
    left = watch.until - time.monotonic()
    fitting = evaluations if math.isinf(left) else min(evaluations, int(left / max(each, 1e-9)))
    if fitting < FEWEST:
        raise OutOfTime
    before = found.evidence
    assert isinstance(before, SearchEvidence)
    found = run(resume=before.point, max_evaluations=fitting, **PATIENT)
    assert isinstance(found.evidence, SearchEvidence)
    losses = [*before.losses, *found.evidence.losses]
    return replace(found, evidence=replace(found.evidence, losses=losses))


def _worth_another(found: Reconstruction) -> bool:
    """Whether a second search is made: of large images not where the first says what its picture is
    worth, and is not believed whatever a second finds.
    """
    told = isinstance(found.evidence, Told) and affordable(found.images.shape[1:]) == 1
    return not told or found.evidence.loss <= EXPLAINED


def _far(record: records.Attack, watch: Watch) -> dict[str, Any]:
    """What makes an attack begin far from where it began first."""
    if "coordinates" in record.options:
        return {"coordinates": watch.noting(far)}
    return {"far": True} if "far" in record.options else {}
