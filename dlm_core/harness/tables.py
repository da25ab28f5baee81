"""What notebooks ask of their tables: rows that are chosen by name, and what to say of them in a
sentence.
"""

import math
from collections.abc import Sequence
from typing import Any


def where(frame: Any, **columns: Any) -> Any:
    """The rows in which each column has the value given, or one of a list of values; dots in names
    are written as "__".
    """
    for name, value in columns.items():
        column = frame[name.replace("__", ".")]
        several = isinstance(value, (list, tuple, set))
        frame = frame[column.isin(list(value))] if several else frame[column == value]
    return frame


def only(frame: Any, **columns: Any) -> Any:
    """The one row of ``where``.

    Raises
    ------
    ValueError
        Where there is none, or more than one.
    """
    rows = where(frame, **columns)
    if len(rows) != 1:
        raise ValueError(f"{columns} chooses {len(rows)} rows; it takes exactly one")
    return rows.iloc[0]


def success(frame: Any, threshold: float = 20.0) -> float:
    """Share of a table's trials that reach ``threshold`` dB; one without a picture is a failure."""
    return float((frame["psnr"].fillna(-math.inf) >= threshold).mean())


def said(frame: Any, threshold: float = 20.0) -> str:
    """A table's trials in words: "40% of 10 at 20 dB, median 17.9 dB", or "not run" for none."""
    if not len(frame):
        return "not run"
    psnr = frame["psnr"].fillna(-math.inf)
    share = f"{success(frame, threshold):.0%} of {len(frame)} at {threshold:g} dB"
    return f"{share}, median {psnr.median():.1f} dB"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % by Student's t; NaN for the limits of a single value."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return mean, mean - half, mean + half


def rms(tensors: Sequence[Any]) -> float:
    """Root mean square over all entries of several tensors."""
    total = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(total / sum(t.numel() for t in tensors))


def per_image(frame: Any) -> Any:
    """One row per image instead of one per trial: "psnr" is the image's, not the batch's mean."""
    images = frame.drop(columns="psnr").rename(columns={"psnrs": "psnr"})
    return images.explode("psnr").astype({"psnr": float})


def brief(values: Sequence[float], digits: int = 6) -> list[str]:
    """Numbers as short as ``digits`` significant ones can be told, "0.03"; a gap as nothing."""
    return [f"{value:.{digits}g}" if value == value else "" for value in values]


def listed(texts: Sequence[str], separator: str = "; ") -> str:
    """Texts in a row; "none" where there are none."""
    return separator.join(texts) or "none"


def spread(values: Any, unit: str = "dB") -> str:
    """A column in words: "41.3 ± 2.1 dB (n 10)", mean and standard deviation; or "not run"."""
    if not len(values):
        return "not run"
    deviation = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{deviation} {unit} (n {len(values)})"
