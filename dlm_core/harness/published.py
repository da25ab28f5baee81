"""The numbers of all trials behind a notebook's figures: one row each, as a small file."""

import dataclasses
import gzip
from collections.abc import Iterable, Mapping
from typing import Any

from dlm_core.harness import sweeps


def table(finished: Iterable[Mapping[Any, Mapping[str, Any]]]) -> bytes:
    """A file .csv.gz with the columns of ``sweeps.table``, each trial once.

    Parameters
    ----------
    finished
        {trial: its record} of each sweep, as in ``sweeps.FINISHED``. A user's trials that are no
        dataclasses are left out: nothing says what their columns would be.

    Notes
    -----
    Lists stand with spaces between their entries. The same records give the same bytes.
    """
    rows = (row for each in finished for row in each.items())
    trials = {trial: record for trial, record in rows if dataclasses.is_dataclass(trial)}
    frame = sweeps.table(trials.keys(), trials.values()).map(_cell)
    text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return gzip.compress(text.encode(), mtime=0)


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return " ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in value)
    return value
