"""An interrupt from the keyboard reaches every process of a terminal; only the one that started the
others answers it.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def kept_from_workers() -> Iterator[None]:
    """Within it, processes and threads started here are spared SIGINT for life: a worker ends when
    its master ends it.

    Notes
    -----
    A process inherits the signal mask of the thread that starts it, so it is deaf from its first
    instruction; a handler set by the worker itself would come too late for an interrupt that
    arrives while it still imports. What this thread gets meanwhile is delivered at the end; another
    thread of this process may get it at once. Where there are no such masks (Windows) nothing
    happens.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ended_with_us() -> Iterator[None]:
    """Where an error or an interrupt leaves it, the worker processes that were started within it
    are ended at once, whatever they are at: whoever shuts them down need not wait.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
        raise
