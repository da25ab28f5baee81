"""One attack of an audit, within its time, with what it had found when it was cut off."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dlm_core import records
from dlm_core.beyond.attention import plain_attention
from dlm_core.coordinates import cosines
from dlm_core.harness.foretell import SEARCHES, foretold
from dlm_core.harness.second import closer, twice
from dlm_core.harness.tables import counted
from dlm_core.harness.watch import OutOfTime, Watch
from dlm_core.results import Reconstruction
from dlm_core.threads import one_thread


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How an attack went.

    Attributes
    ----------
    result
        What it found; None where it was cut off before it had anything.
    agreement
        As ``second.twice`` returns it; None where that search did not end.
    evaluations
        Of all its searches, the second included.
    cut_off
        Whether its time was over before it had ended.
    interrupted
        Whether the user ended it.
    """

    result: Reconstruction | None
    agreement: float | None = None
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
    doubted: Callable[[Reconstruction], object],
    hides: Callable[[Reconstruction], object],
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
    doubted
        Of a result, whether something speaks against it whatever a second search finds: a true
        value where it does.
    hides
        As of ``second.closer``.

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
                result, agreement = twice(search, record, watch, say, doubted)
                result, agreement = closer(search, record, result, agreement, watch, hides)
        except (OutOfTime, KeyboardInterrupt) as stop:
            interrupted = isinstance(stop, KeyboardInterrupt)
            return Attempt(
                result=watch.so_far,
                evaluations=len(watch.taken),
                cut_off=not interrupted,
                interrupted=interrupted,
            )
        finally:
            watch.close()
    return Attempt(result=result, agreement=agreement)
