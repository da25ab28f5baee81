"""What a computation costs, measured in a process of its own: nothing that ran before counts."""

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from dlm_core import check
from dlm_core.threads import one_thread

# Of Linux.
STATUS = Path("/proc/self/status")


class Cost(NamedTuple):
    """What one call costs.

    Attributes
    ----------
    milliseconds
        Of the processor, the best of several calls.
    mebibytes
        By which the calls raised the most that the process had held until then, building what was
        needed included.
    """

    milliseconds: float
    mebibytes: float


@check.arguments
def cost(
    prepare: Callable[..., Callable[[], Any]], *arguments: Any, repeats: check.Count = 3
) -> Cost:
    """Measure one call of ``prepare(*arguments)()`` on one thread, in a process of its own.

    Parameters
    ----------
    prepare
        Builds what is needed, at no charge, and returns the function that is measured, which takes
        no arguments. It may be defined in a notebook.
    arguments
        Of ``prepare``, picklable.
    repeats
        How often it is called, at least 1.

    Raises
    ------
    ValueError
        For ``repeats`` out of range.
    """
    import cloudpickle

    work = cloudpickle.dumps((prepare, arguments))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measure, work, repeats).result()


def _measure(work: bytes, repeats: int) -> Cost:
    import cloudpickle

    prepare, arguments = cloudpickle.loads(work)
    with one_thread():
        measured = prepare(*arguments)
        before, times = peak(), []
        for _ in range(repeats):
            began = time.process_time()
            measured()
            times.append(time.process_time() - began)
    return Cost(1e3 * min(times), peak() - before)


def peak() -> float:
    """The most memory that this process has held, in MiB.

    Linux' ``ru_maxrss`` begins with the parent's, so that its own peak is read instead.
    """
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
