"""What an attack costs: a trial with the processor's seconds, a value that ``sweeps.sweep`` runs.

A trial's own "seconds" are those of the clock, and tell as much of what else the machine does.
"""

import time
from dataclasses import dataclass
from typing import Any

from dlm_core import check
from dlm_core.harness import scene
from dlm_core.harness.bounds import Trial
from dlm_core.harness.keys import result_key


@dataclass(frozen=True)
class Timed:
    """A trial, timed.

    Attributes
    ----------
    trial
        That is run. What its attack finds is the same as untimed.
    """

    trial: Trial

    def __post_init__(self) -> None:
        check.fields(self)

    @property
    def key(self) -> str:
        """The name of the result."""
        trial = self.trial
        return result_key(self, [__name__], trial.named, trial.dataset, trial.source)

    def run(self) -> dict[str, Any]:
        """The trial's record, and "processor_seconds": of one core, for the client's training, the
        attack and the comparison with the truth.
        """
        began = time.process_time()
        record = scene.play(self.trial)
        return {**record, "processor_seconds": time.process_time() - began}
