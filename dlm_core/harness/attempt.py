"""One attack of an audit, within its time, with what it had found when it was cut off."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dlm_core import records
from dlm_core.beyond.attention import plain_attention
from dlm_core.beyond.inputs import Ratio
from dlm_core.coordinates import cosines
from dlm_core.harness import pairs, symmetries
from dlm_core.harness.belief import Belief, against, believe
from dlm_core.harness.foretell import SEARCHES, foretold
from dlm_core.harness.look import Look
from dlm_core.harness.second import closer, goes_on, twice
from dlm_core.harness.tables import counted
from dlm_core.harness.watch import OutOfTime, Watch
from dlm_core.observation import Observation
from dlm_core.results import Explains, Reconstruction
from dlm_core.threads import one_thread


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How an attack went.

    Attributes
    ----------
    result
        What it found; None where it was cut off before it had anything.
    belief
        How far that is believed; None where there is nothing.
    evaluations
        Of all its searches until it was stopped, the second included; 0 where it came to its end.
    cut_off
        Whether its time was over before it had ended.
    interrupted
        Whether the user ended it.
    """

    result: Reconstruction | None
    belief: Belief | None = None
    evaluations: int = 0
    cut_off: bool = False
    interrupted: bool = False

    @property
    def stopped(self) -> str | None:
        """What ended it before its end, in words; None for nothing."""
        if not (self.cut_off or self.interrupted):
            return None
        how = "interrupted" if self.interrupted else "cut off, as its time was over,"
        return f"{how} after {counted(self.evaluations, 'evaluation')}"


def attempt(
    run: partial[Reconstruction],
    record: records.Attack,
    until: float,
    say: Callable[[str], None],
    seen: Observation,
    look: Look,
) -> Attempt:
    """Run an attack, and a second time if it searches.

    Parameters
    ----------
    run
        The attack, with its options.
    record
        Its record.
    until
        When it has to end, on the clock ``time.monotonic``; infinite for no limit.
    say
        Takes the sentences of how long it will take, before it begins.
    seen, look
        What the observer sees, and the first look at it.

    Raises
    ------
    NoTime
        Where its time is too short to begin.
    Exception
        What the attack raises.
    """
    watch = Watch(record.key, until)
    # searches side by side on several threads each slow down tenfold
    with one_thread(), plain_attention():
        try:
            search, sentences = foretold(run, record, until)
            for sentence in sentences:
                say(sentence)
            if record.key in SEARCHES:
                coordinates = search.keywords.get("coordinates", cosines)
                search = partial(search, coordinates=watch.noting(coordinates))
            with watch:
                found, agreement = twice(search, record, watch, say, partial(against, look=look))
                found, belief = _held(search, record, found, agreement, watch, seen, look)
        except (OutOfTime, KeyboardInterrupt) as stop:
            interrupted, so_far = isinstance(stop, KeyboardInterrupt), watch.so_far
            return Attempt(
                result=so_far,
                belief=None if so_far is None else _unheld(so_far, look),
                evaluations=len(watch.taken),
                cut_off=not interrupted,
                interrupted=interrupted,
            )
        finally:
            watch.close()
    return Attempt(result=found, belief=belief)


def _held(
    run: partial[Reconstruction],
    record: records.Attack,
    found: Reconstruction,
    agreement: float | None,
    watch: Watch,
    seen: Observation,
    look: Look,
) -> tuple[Reconstruction, Belief]:
    """A result, and how far it is believed when held against two images in the place of each. A
    search that may come closer to the update goes on before that counts.
    """
    belief = believe(found, agreement, look)
    if belief.grade is not Explains.FULLY:
        return found, belief
    doubt: str | None = pairs.UNASKED
    with contextlib.suppress(OutOfTime):
        doubt = pairs.against(seen, found, look)
        if doubt and goes_on(record, found) and not pairs.signs_alone(found, look):
            found, agreement = closer(run, found, agreement, watch)
            belief = believe(found, agreement, look)
            whole = belief.grade is Explains.FULLY
            doubt = pairs.against(seen, found, look) if whole else None
        read = isinstance(found.evidence, Ratio)  # pixel by pixel
        doubt = doubt or (None if read else symmetries.against(seen))
    return found, belief.less(doubt)


def _unheld(found: Reconstruction, look: Look) -> Belief:
    """How far a result is believed that was not held against two images, nor searched for again."""
    belief = believe(found, None, look)
    asked = belief.grade is Explains.FULLY and not isinstance(found.evidence, Ratio)
    return belief.less(pairs.UNASKED) if asked else belief
