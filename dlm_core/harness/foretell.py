"""How long the searches of an audit take, from one evaluation of each, and what fits its budget."""

import math
import time
from collections.abc import Iterable
from functools import partial

from dlm_core import records
from dlm_core.beyond import unrolled
from dlm_core.harness.watch import OutOfTime, Watch
from dlm_core.results import Reconstruction
from dlm_core.stopping import StopRule

# The attacks whose time is foretold. They begin in the coordinates of ``search.reconstruct``.
SEARCHES = ("interval_dlm", "dlm_plus", "unrolled_dlm")
STARTS = 2
# Those that go by few long steps.
STEPPED = ("weighted",)
# Evaluations from each start with fewer of which a search is left out; steps.
FEWEST, FEWEST_STEPS = 10, 4
# Evaluations of a search from one start, at most.
BUDGET = StopRule().max_evaluations
# How an unrolled search runs once its steps are known.
AT_LENGTH = {"tolerance": 0.0, "patience": 200, "max_evaluations": 1000}
# That an audit takes in all, unless told.
MINUTES = 5.0
MORE = "--minutes (minutes) gives more"
UNITS = {"day": 86400, "hour": 3600, "minute": 60}


class NoTime(Exception):
    """The time that is left is too little for a search; its sentence says so."""


class Budget:
    """The time that an audit may take.

    Parameters
    ----------
    minutes
        From now on; None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def until(self, attack: str, later: Iterable[str]) -> float:
        """When an attack has to end, on the clock ``time.monotonic``; infinite for no limit, as of
        the division, which was made at the first look. A search leaves half of the time to
        ``later`` ones.
        """
        if attack == "division":
            return math.inf
        every = (*SEARCHES, *STEPPED)
        shared = attack in every and any(each in every for each in later)
        return (time.monotonic() + self.end) / 2 if shared else self.end


def foretold(
    run: partial[Reconstruction], record: records.Attack, until: float
) -> tuple[partial[Reconstruction], list[str]]:
    """(a search, shortened where it must be to fit its time; what to say of how long it takes).

    Parameters
    ----------
    run
        Makes the search, from one start.
    record
        Of the attack.
    until
        When all starts have to end, on the clock ``time.monotonic``; infinite for no limit.

    Raises
    ------
    NoTime
        Where a few evaluations from each start take longer.
    Exception
        What the attack raises.
    """
    if record.key in STEPPED:
        return _by_steps(run, record, until)
    if record.key not in SEARCHES:
        return run, []
    simulated = record.key == "unrolled_dlm"
    each = _one_evaluation(run, simulated, until)
    left = max(0.0, until - time.monotonic())
    if STARTS * FEWEST * each > left:
        raise NoTime(
            f"{FEWEST} evaluations from each of {STARTS} starts would take "
            f"about {in_words(STARTS * FEWEST * each)}, and it has {in_words(left)}: {MORE}"
        )
    if simulated:
        few, many = (_simulated_steps(steps) * each / unrolled.FIRST for steps in (2, _most()))
        said = (
            f"up to about {in_words(few)} if the client took 2 local steps, {in_words(many)} if "
            f"{_most()}, and more where their number stays in doubt"
        )
        return run, [said, *_ends(many, left)]
    most = STARTS * run.keywords.get("restarts", 1) * BUDGET
    said = f"up to about {in_words(most * each)}, for {most:,} evaluations"
    if most * each <= left:
        return run, [said]
    fitting = min(BUDGET, int(left / each / STARTS))
    shorter = (
        f"shortened to {fitting} evaluations from each of {STARTS} starts, to end in time: {MORE}"
    )
    return partial(run, max_evaluations=fitting, restarts=1), [said, shorter]


def _by_steps(
    run: partial[Reconstruction], record: records.Attack, until: float
) -> tuple[partial[Reconstruction], list[str]]:
    """``foretold`` of a search by steps, each of which takes about as long."""
    began = time.monotonic()
    try:
        with Watch("a first step", until):
            run(max_steps=1, restarts=1)
    except OutOfTime:
        raise NoTime(_none("step", began, until)) from None
    each, left = time.monotonic() - began, max(0.0, until - time.monotonic())
    steps = record.parameters["max_steps"].default
    most = run.keywords.get("restarts", 1) * steps
    said = f"up to about {in_words(most * each)}, for {most} steps; a second start takes as long"
    if most * each <= left:
        return run, [said]
    fitting = min(steps, int(left / each))  # what is found first is kept
    if fitting < FEWEST_STEPS:
        raise NoTime(
            f"{FEWEST_STEPS} steps would take about {in_words(FEWEST_STEPS * each)}, and it has "
            f"{in_words(left)}: {MORE}"
        )
    shorter = f"shortened to {fitting} steps, to end in time: {MORE}"
    return partial(run, max_steps=fitting, restarts=1), [said, shorter]


def _none(what: str, began: float, until: float) -> str:
    return f"no {what} ended in {in_words(max(0.0, until - began))}: {MORE}"


def _ends(seconds: float, left: float) -> list[str]:
    if seconds <= left:
        return []
    return [f"cut off after {in_words(left)} if it has not ended: {MORE}"]


def _one_evaluation(run: partial[Reconstruction], simulated: bool, until: float) -> float:
    """Seconds of an evaluation of a search's objective and its gradient, with a client of
    ``unrolled.FIRST`` steps where one is simulated.
    """
    steps = {"local_steps": unrolled.FIRST} if simulated else {}
    began = time.monotonic()
    try:
        with Watch("a first evaluation", until) as watch:
            run(max_evaluations=2, restarts=1, **steps)  # the first may have to warm up
    except OutOfTime:
        raise NoTime(_none("evaluation", began, until)) from None
    return min(watch.taken)


def _most() -> int:
    """Local steps that an unrolled search tries at most."""
    return records.ATTACKS["unrolled_dlm"].parameters["max_local_steps"].default


def _simulated_steps(local_steps: int) -> int:
    """Steps that an unrolled search simulates at most, where it settles on ``local_steps`` at once:
    short searches at up to twice as many and at numbers between, a long one, and from two starts.
    """
    climb = unrolled.FIRST * BUDGET + 8 * local_steps * unrolled.SHORT
    return climb + local_steps * (BUDGET + STARTS * int(AT_LENGTH["max_evaluations"]))


def in_words(seconds: float) -> str:
    """A length of time in words, such as "3 minutes", rounded up.

    Parameters
    ----------
    seconds
        At least 0.
    """
    for name, length in UNITS.items():
        if seconds >= 2 * length:
            return f"{math.ceil(seconds / length)} {name}s"
    return f"{max(seconds, 0.1):.1f} seconds" if seconds < 2 else f"{math.ceil(seconds)} seconds"
