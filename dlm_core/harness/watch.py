"""Watches the searches of one attack, whatever the attack is: progress, time, and the best images
so far.

It goes by torch's hook on optimizers, so that no search need know of it.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dlm_core.coordinates import Start
from dlm_core.harness.tables import counted
from dlm_core.results import Reconstruction, SearchEvidence, Status

RENEWED = 0.2  # seconds between two lines of progress
AGAIN = 1.0  # seconds until an alarm rings again: what is raised while garbage is collected is lost
IMPORTING = "<frozen importlib"
CLEAR = "\r\x1b[K"


class OutOfTime(BaseException):
    """Raised inside an attack when its time is over. Like an interrupt it is no error, which a
    user's code might catch.
    """


class Watch:
    """Watches the searches of one attack: counts evaluations, shows progress on a terminal, keeps
    the best images, and raises ``OutOfTime`` within the attack when its time is over.

    Parameters
    ----------
    title
        What runs, for the line of progress.
    until
        When it is over, on the clock ``time.monotonic``; infinite for no limit.

    Attributes
    ----------
    finished
        The last result that was handed to ``keep``.
    taken
        Seconds of each evaluation.
    """

    def __init__(self, title: str, until: float = math.inf) -> None:
        self.title, self.until = title, until
        self.finished: Reconstruction | None = None
        self.taken: list[float] = []
        self.losses: list[float] = []
        self._best: tuple[float, torch.Tensor] | None = None
        self._to_images: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._began = self._shown = 0.0
        self._alarmed = False
        self._grad = True
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> "Watch":
        self._began = time.monotonic()
        self._grad = torch.is_grad_enabled()
        self._hook = register_optimizer_step_pre_hook(self._before_a_step)
        self._alarmed = (
            math.isfinite(self.until)
            and hasattr(signal, "SIGALRM")
            and threading.current_thread() is threading.main_thread()
        )
        if self._alarmed:  # what descends by no closure of an optimizer is ended as well
            self._handler = signal.signal(signal.SIGALRM, _ring) or signal.SIG_DFL
            signal.setitimer(signal.ITIMER_REAL, max(self.until - self._began, 1e-3), AGAIN)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the watch, which may have ended already: an alarm may ring while it ends."""
        if self._alarmed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._handler)
            self._alarmed = False
        if self._hook is not None:
            torch.set_grad_enabled(self._grad)  # an alarm may ring between a context and its exit
            self._hook.remove()
            self._hook = None
        if self._shown:
            print(CLEAR, end="", file=sys.stderr, flush=True)
            self._shown = 0.0

    def keep(self, found: Reconstruction) -> Reconstruction:
        """Remember a result for the case that what follows is cut off, and return it."""
        self.finished = found
        return found

    def noting(self, coordinates: Callable[..., Start]) -> Callable[..., Start]:
        """The same coordinates, whose images are kept."""

        def noted(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> Start:
            start, self._to_images = coordinates(shape, like, generator)
            return start, self._to_images

        return noted

    @property
    def so_far(self) -> Reconstruction | None:
        """What stands when an attack is cut off: its last result, or else the best point of the
        search that it was at; None where there is neither.
        """
        if self.finished is not None or self._best is None or self._to_images is None:
            return self.finished
        loss, point = self._best
        images = self._to_images(point)
        return Reconstruction(
            images=images,
            labels=torch.full((len(images),), -1, device=images.device),
            status=Status.BUDGET,
            vouched=torch.zeros(len(images), dtype=torch.bool, device=images.device),
            evidence=SearchEvidence(losses=self.losses, loss=loss),
            seconds=time.monotonic() - self._began,
        )

    def _before_a_step(
        self, optimizer: Any, given: tuple, named: dict
    ) -> tuple[tuple, dict] | None:
        """Replace an optimizer's closure by one that is watched."""
        own, *rest = given
        closure = named.get("closure") or next(iter(rest), None)
        if closure is None:
            return None
        return (own, partial(self._evaluate, optimizer, closure)), {}

    def _evaluate(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Any:
        began = time.monotonic()
        if began >= self.until:
            raise OutOfTime
        try:
            value = closure()
        finally:
            self.taken.append(time.monotonic() - began)
        self._note(float(value), optimizer.param_groups[0]["params"][0])
        return value

    def _note(self, loss: float, point: torch.Tensor) -> None:
        """Keep a point if it is the best so far, and show how far the search is."""
        self.losses.append(loss)
        if math.isfinite(loss) and (self._best is None or loss < self._best[0]):
            self._best = loss, point.detach().clone()
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown >= RENEWED:
            self._shown = now
            lowest = math.inf if self._best is None else self._best[0]
            evaluations = counted(len(self.taken), "evaluation")
            passed = f"{now - self._began:.0f} s"
            line = f"    {self.title}: {evaluations}, loss {lowest:.3g}, {passed}"
            print(f"{CLEAR}{line}", end="", file=sys.stderr, flush=True)


def _ring(_: int, frame: FrameType | None) -> None:
    """Raise, but within an import, which would stay half done: the alarm rings again."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORTING):
            return
        frame = frame.f_back
    raise OutOfTime
