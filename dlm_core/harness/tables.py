"""What notebooks ask of their tables: rows that are chosen by name, and what to say of them in a
sentence.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch

from dlm_core import check

# pandas is imported where it is used: its objects are known by an attribute.
Frame = Annotated[Any, check.Must("a pandas DataFrame", lambda x: hasattr(x, "columns"))]
Column = Annotated[Any, check.Must("a pandas Series", lambda x: hasattr(x, "std"))]

Z = 1.959963984540054  # of a normal distribution 95 % lie within so many standard deviations

# How every share and every median counts a trial that ended without a picture, because its client
# diverged or did not change, or the attack's equations are singular.
WITHOUT_A_PICTURE = (
    "a trial without a picture is a failure in the shares and the worst in the medians"
)


@check.arguments
def where(frame: Frame, **columns: Any) -> Any:
    """The rows in which each column has the value given, or one of several (a list, a range, a
    Series); None takes the gaps, and a dict is one value. Dots in names are written as "__".
    """
    for name, value in columns.items():
        name = name.replace("__", ".")
        check.one_of("column", name, frame.columns)
        frame = frame[_has(frame[name], value)]
    return frame


def _has(of: Any, value: Any) -> Any:
    """Which entries of a column are that value, or one of several; gaps are alike."""
    import pandas

    if isinstance(value, Mapping):
        return of.map(lambda each: each == value).astype(bool)
    several = isinstance(value, Iterable) and not isinstance(value, str)
    values = list(value) if several else [value]
    chosen = of.isin(values) if several else of == value
    gaps = pandas.Series(values, dtype=object).isna().any()
    return chosen | of.isna() if gaps else chosen


@check.arguments
def only(frame: Frame, **columns: Any) -> Any:
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


@check.arguments
def success(frame: Frame, threshold: check.Finite = 20.0) -> float:
    """Share of a table's trials that reach ``threshold`` dB; one without a picture is a failure."""
    return float((psnrs(frame) >= threshold).mean())


@check.arguments
def said(frame: Frame, threshold: check.Finite = 20.0) -> str:
    """A table's trials in words: "40% of 10 at 20 dB, median 17.9 dB", or "not run" for none."""
    if not len(frame):
        return "not run"
    share = f"{success(frame, threshold):.0%} of {len(frame)} at {threshold:g} dB"
    middle = quantile(psnrs(frame), 0.5)
    return f"{share}, median {f'{middle:.1f} dB' if middle == middle else 'without a picture'}"


@check.arguments
def psnrs(frame: Frame) -> Any:
    """The PSNR in dB of each of a table's trials; that of one without a picture is -inf.

    Raises
    ------
    ValueError
        Where the table is none of trials, as ``sweeps.table`` makes it.
    """
    if "psnr" not in frame and "stop_reason" not in frame:
        raise ValueError("frame has no column 'psnr'; it takes a table of trials")
    return column(frame, "psnr").fillna(-math.inf)


def column(frame: Frame, name: str) -> Any:
    """A column of numbers, gaps as NaN; a column that a table lacks, since none of its trials has a
    picture, is all gaps.
    """
    import pandas

    if name not in frame:
        return pandas.Series(math.nan, index=frame.index)
    return frame[name].astype(float)


def quantile(values: Column, share: float, worst: float = -math.inf) -> float:
    """A quantile among values of which some may be infinite; NaN where it falls on or beside one of
    the ``worst``, which stands for a trial without a picture.

    Parameters
    ----------
    values
        A pandas Series.
    share
        0.5 for the median.
    worst
        Infinite.
    """
    low, high = (values.quantile(share, interpolation=side) for side in ("lower", "higher"))
    if worst in (low, high):
        return math.nan
    return float(high if low == high or math.isinf(high) else values.quantile(share))


@check.arguments
def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % by Student's t; NaN for the limits of a single value."""
    from scipy import stats

    numbers = check.fitting("values", list(values), list[check.Finite])
    if not numbers:
        raise ValueError("values is empty; it takes at least one number")
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return mean, math.nan, math.nan
    half = float(stats.sem(numbers) * stats.t.ppf(0.975, len(numbers) - 1))
    return mean, mean - half, mean + half


def wilson(hits: float, n: int) -> tuple[float, float]:
    """(low, high): Wilson's 95 % interval of a share; ``hits`` may be a sum of shares."""
    p, spread = hits / n, Z * Z / n
    centre = (p + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # p is in it


def paired(differences: Iterable[float]) -> tuple[float, float]:
    """(low, high): 95 % interval of a difference of two shares of the same n, whose pairs differ
    by -1, 0 or 1, or by something between where a pair is a mean of several runs: of n pairs and
    one more each way (Bonett and Price, J. Educ. Behav. Stat. 2012). It has a width where all
    pairs are alike, as Student's has not.
    """
    pairs = [*differences, 1.0, -1.0]
    centre = sum(pairs) / len(pairs)
    variance = sum((each - centre) ** 2 for each in pairs) / len(pairs)
    half = Z * math.sqrt(variance / len(pairs))
    return max(-1.0, centre - half), min(1.0, centre + half)


@check.arguments
def rms(tensors: Sequence[torch.Tensor]) -> float:
    """Root mean square over all entries of several tensors; NaN where there are none."""
    total = sum(float(t.double().square().sum()) for t in tensors)
    count = sum(t.numel() for t in tensors)
    return math.sqrt(total / count) if count else math.nan


@check.arguments
def per_image(frame: Frame) -> Any:
    """One row per image instead of one per trial: "psnr" is the image's, not the batch's mean. A
    batch without a picture has as many rows as images.

    Raises
    ------
    ValueError
        Where a trial has a "psnr" and no "psnrs", one for each image.
    """
    counts = frame["num_images"] if "num_images" in frame else [1] * len(frame)
    found = frame["psnrs"] if "psnrs" in frame else [None] * len(frame)
    each = [_of_images(*one) for one in zip(found, column(frame, "psnr"), counts)]
    images = frame.assign(psnrs=each).drop(columns="psnr", errors="ignore")
    return images.rename(columns={"psnrs": "psnr"}).explode("psnr").astype({"psnr": float})


def _of_images(psnrs: Any, mean: float, count: float) -> list[float]:
    """The PSNR of each image of a trial."""
    if isinstance(psnrs, str):  # as a file of records has them
        psnrs = [float(each) for each in psnrs.split()]
    elif isinstance(psnrs, float) and not math.isnan(psnrs):  # as a file of single images has it
        psnrs = [psnrs]
    if isinstance(psnrs, Sequence) and psnrs:
        return list(psnrs)
    if not math.isnan(mean):
        raise ValueError(
            f"frame has a trial with psnr {mean:g} and no psnrs; it takes a table of trials, which "
            "has one number for each image in psnrs"
        )
    return [math.nan] * (1 if math.isnan(count) else int(count))


@check.arguments
def over_networks(frame: Frame, columns: Mapping[str, str]) -> tuple[Any, dict[Any, Any]]:
    """What differs between the networks that each image was attacked on.

    Parameters
    ----------
    frame
        Trials. Those of one image that have a network in common have the hundreds of their seeds in
        common: 100 and 117 are of one set of networks, 217 is of another.
    columns
        {column: its title}: each combination of their values has a row.

    Returns
    -------
    tuple
        A DataFrame: how many images reach 20 dB on all of their networks, on some and on none, and
        of each image's least and greatest PSNR in dB what the lowest and the median image have.
        And {the columns' values: a pandas Series of the median over the images, in dB, for each
        set of networks}, the value itself where there is one column.
    """
    import pandas

    for name in columns:
        check.one_of("column", name, frame.columns)
    rows, medians = [], {}
    image = [name for name in ("dataset", "index") if name in frame]
    for values, some in frame.groupby(list(columns), sort=False, dropna=False):
        psnr, of_image = psnrs(some), [some[name] for name in image]
        least, greatest = (psnr.groupby(of_image).agg(end) for end in ("min", "max"))
        values = tuple(None if pandas.isna(each) else each for each in values)
        of_networks = psnr.groupby(some["seed"] // 100).median()
        medians[values if len(columns) > 1 else values[0]] = of_networks
        row = dict(zip(columns.values(), values))
        row |= {"images": len(least), "networks each": len(of_networks)}
        row["at 20 dB on all"] = (least >= 20).sum()
        row["on some"] = ((greatest >= 20) & (least < 20)).sum()
        row["on none"] = (greatest < 20).sum()
        row["least PSNR, lowest image"] = least.min()
        row["least PSNR, median image"] = least.median()
        rows.append(row | {"greatest PSNR, median image": greatest.median()})
    return pandas.DataFrame(rows), medians


@check.arguments
def brief(values: Iterable[float], digits: check.Count = 6) -> list[str]:
    """Numbers as short as ``digits`` significant ones can be told, "0.03"; a gap as nothing."""
    return [f"{value:.{digits}g}" if value == value else "" for value in values]


@check.arguments
def listed(texts: Iterable[str], separator: str = "; ") -> str:
    """Texts in a row; "none" where there are none."""
    return separator.join(texts) or "none"


def counted(n: int, what: str) -> str:
    """A count in words: "1 image", "4 images"."""
    return f"{n} {what}{'s' * (n != 1)}"
