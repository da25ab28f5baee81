"""Many starts of an audit's search, where a GPU runs them as one batch.

That two searches agree is the evidence on a CPU. Many say what part of all starts ends at one
picture, and whether another explains the update as well.
"""

import time
import warnings
from functools import partial

import torch

from dlm_core import records
from dlm_core.beyond.attention import plain_attention
from dlm_core.beyond.starts import Ends, survey
from dlm_core.harness.belief import AGREED, PARTLY, far
from dlm_core.harness.watch import OutOfTime, Watch
from dlm_core.results import Reconstruction, SearchEvidence
from dlm_core.threads import one_thread

# {kind of device: starts}. One after the other they would take hours.
STARTS = {"cuda": 256}
# The seconds of the first search that have to be left: on an H100, 256 took those of two.
ROOM = 4.0


def survey_where_fast(
    run: partial[Reconstruction], record: records.Attack, found: Reconstruction, until: float
) -> Ends | None:
    """Where many starts ended, far from each other as an audit's second one is; None on a CPU, for
    attacks that no batch takes, where little is explained, and where time or memory is too short.

    Parameters
    ----------
    run
        The attack, with the Observation and its options.
    record
        Its record.
    found
        Its result.
    until
        When it has to end, on the clock ``time.monotonic``; infinite for no limit.
    """
    in_lanes = getattr(record.function, "in_lanes", False) and "coordinates" in record.options
    searched = isinstance(found.evidence, SearchEvidence) and found.evidence.loss <= PARTLY
    if not (in_lanes and searched):
        return None
    seen = run.args[0]
    starts = STARTS.get(next(seen.model.parameters()).device.type, 0)
    options = {name: each for name, each in run.keywords.items() if name != "restarts"}
    options |= {"coordinates": far, "alike": AGREED}
    while starts > 1 and time.monotonic() + ROOM * found.seconds < until:
        ends = _within(partial(survey, seen, record.function, starts=starts, **options), until)
        if ends is not None:
            return ends
        starts //= 4
    return None


def against(ends: Ends) -> str | None:
    """What speaks against a search's result, where different pictures explain the update; None for
    nothing.
    """
    many = ends.explaining
    return f"{many} different pictures explain the update" if many > 1 else None


def _within(run: partial[Ends], until: float) -> Ends | None:
    """What it returns; None where the device's memory or the time is over, or where the network
    cannot be computed for many at once: one search after the other would take too long.
    """
    watch = Watch(f"{run.keywords['starts']} starts", until)
    try:
        with warnings.catch_warnings(), one_thread(), plain_attention(), watch:
            warnings.filterwarnings("error", ".*one search after the other", UserWarning)
            return run()
    except (OutOfTime, torch.OutOfMemoryError, UserWarning):
        return None
    finally:
        watch.close()
