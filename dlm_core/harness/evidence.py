"""What a claim rests on: a number with its 95 % interval and n, a criterion, and the verdict that
follows from these and from nothing else.

    plus = where(results, attack="dlm_plus")
    run.claim("DLM+ …", evidence.share(plus, "DLM+").at_least(0.9), whose="released")

n counts images. Where an image was attacked on several networks, its median (of shares: its mean)
is one number. So intervals say what other images would give.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy

from dlm_core import check
from dlm_core.harness import tables

ENOUGH = 10  # n below which nothing is decided


class Verdict(StrEnum):
    """What the evidence says of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A criterion, and whether it is met.

    Attributes
    ----------
    criterion
        In words: "share at 20 dB of at least 90 %".
    evidence
        The numbers that decide it, in words.
    verdict
        Holds where the whole interval meets the criterion, does not hold where none of it does;
        undecided between, and where n is below 10.
    interval
        The 95 % interval that decides it; both ends are equal for what is computed and not sampled.
        None where a notebook kept its verdict alone.
    n
        Independent samples, as ``units`` calls them; None for what is computed.
    units
        What n counts: "images, 20 networks".
    """

    criterion: str
    evidence: str
    verdict: Verdict
    interval: tuple[float, float] | None
    n: int | None
    units: str

    def __bool__(self) -> bool:
        raise TypeError("a finding is no bool: it may be undecided; ask for its verdict")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number with its 95 % interval.

    Attributes
    ----------
    label
        Of what: "DLM+".
    quantity
        What was measured: "median PSNR".
    value, low, high
        The number and its interval, NaN where so few numbers have none.
    unit
        "dB"; "%" for shares, which are kept between 0 and 1.
    n, units
        As in ``Finding``.
    """

    label: str
    quantity: str
    value: float
    low: float
    high: float
    unit: str = ""
    n: int | None = None
    units: str = ""

    def __str__(self) -> str:
        if self.n is None:
            return f"{self.label}: {self._number(self.value)}"
        ends = f"[{self._number(self.low, bare=True)}, {self._number(self.high, bare=True)}]"
        shown = "[no interval of so few]" if math.isnan(self.low) else ends
        return f"{self.label}: {self._number(self.value)} {shown}"

    def at_least(self, bound: float) -> Finding:
        """The finding that it is ``bound`` or more."""
        return self._finding(
            f"at least {self._number(bound)}", self.low >= bound, self.high < bound
        )

    def above(self, bound: float) -> Finding:
        """The finding that it is more than ``bound``."""
        return self._finding(f"above {self._number(bound)}", self.low > bound, self.high <= bound)

    def at_most(self, bound: float) -> Finding:
        """The finding that it is ``bound`` or less."""
        return self._finding(f"at most {self._number(bound)}", self.high <= bound, self.low > bound)

    def below(self, bound: float) -> Finding:
        """The finding that it is less than ``bound``."""
        return self._finding(f"below {self._number(bound)}", self.high < bound, self.low >= bound)

    def _finding(self, wanted: str, holds: bool, fails: bool) -> Finding:
        few = self.n is not None and self.n < ENOUGH
        verdict = Verdict.HOLDS if holds else Verdict.FAILS if fails else Verdict.UNDECIDED
        return Finding(
            criterion=f"{self.quantity} {wanted}",
            evidence=f"{self}{'' if self.n is None else f' (n = {self.n} {self.units})'}",
            verdict=Verdict.UNDECIDED if few else verdict,
            interval=(self.low, self.high),
            n=self.n,
            units=self.units,
        )

    def _number(self, value: float, *, bare: bool = False) -> str:
        if math.isinf(value):
            return "no picture" if value < 0 and self.unit == "dB" else f"{value:g}"
        if self.unit == "%":
            return f"{100 * value:.0f}{'' if bare else ' %'}"
        text = f"{value:.1f}" if self.unit == "dB" else f"{value:.3g}"
        return text if bare or not self.unit else f"{text} {self.unit}"


@check.arguments
def share(
    frame: tables.Frame,
    label: str,
    *,
    at: check.Finite = 20.0,
    of: Any = None,
    quantity: str | None = None,
    units: str | None = None,
) -> Measured:
    """Share of a table's images for which something is true, with its Wilson interval.

    Parameters
    ----------
    frame
        Of trials, as ``sweeps.table`` makes it.
    label
        Whose share it is.
    at
        A PSNR of so many dB or more is what is asked, where ``of`` is not given.
    of
        A pandas Series of bool, one for each row, where something else is asked; then ``quantity``
        names it.
    units
        What n counts, where an ``index`` in the table is no image.

    Raises
    ------
    ValueError
        For an ``of`` that is not of these rows, in this order, or not of True and False alone.
    """
    hits = tables.psnrs(frame) >= at if of is None else _of_rows(of, frame)
    numbers, counted = _each_image(frame, hits.astype(float), numpy.mean)
    ends = tables.wilson(sum(numbers), len(numbers))
    return _shares(numbers, ends, label, quantity or f"share at {at:g} dB", units or counted)


@check.arguments
def median(
    frame: tables.Frame,
    label: str,
    *,
    column: str = "psnr",
    unit: str = "dB",
    quantity: str = "median PSNR",
) -> Measured:
    """Median over a table's images, with the interval of order statistics, which assumes no
    distribution. A trial without a picture is the worst.

    Parameters
    ----------
    frame, label
        As in ``share``.
    column, unit, quantity
        What is measured.

    Raises
    ------
    ValueError
        Where another column than the PSNR has gaps: what they count as is the caller's to say.
    """
    numbers, units = _each_image(frame, _column(frame, column), _centre)
    return middle(numbers, label, quantity=quantity, unit=unit, units=units)


@check.arguments
def difference(
    first: tables.Frame,
    second: tables.Frame,
    label: str,
    *,
    column: str = "psnr",
    unit: str = "dB",
    quantity: str = "median difference in PSNR",
    units: str | None = None,
) -> Measured:
    """Median over images of what the first table has more than the second, image by image.

    Parameters
    ----------
    first, second
        As in ``share``; of images that only one of them has nothing is used.
    label
        "DLM+ over DLG".
    column, unit, quantity
        What is measured.
    units
        As in ``share``.
    """
    values = [_column(each, column) for each in (first, second)]
    pairs, counted = _pairs(first, second, values, _centre)
    gained = [0.0 if ours == theirs else ours - theirs for ours, theirs in pairs]
    return middle(gained, label, quantity=quantity, unit=unit, units=units or counted)


@check.arguments
def share_difference(
    first: tables.Frame, second: tables.Frame, label: str, *, at: check.Finite = 20.0
) -> Measured:
    """Mean over images of how much more often the first table reaches ``at`` dB than the second;
    as ``difference`` else. The interval is that of ``tables.paired``; of an image that has several
    rows its share counts.
    """
    hits = [(tables.psnrs(each) >= at).astype(float) for each in (first, second)]
    pairs, units = _pairs(first, second, hits, numpy.mean)
    gained = [ours - theirs for ours, theirs in pairs]
    quantity = f"difference in the share at {at:g} dB"
    return _shares(gained, tables.paired(gained), label, quantity, units)


@check.arguments
def middle(
    values: Iterable[float], label: str, *, quantity: str, unit: str = "", units: str = "images"
) -> Measured:
    """Median of independent numbers, with the interval of order statistics; fewer than six have
    none, since even all of their range misses the median more often than in 5 %.

    Parameters
    ----------
    values
        One for each of ``units``.
    label, quantity, unit, units
        As in ``Measured``.
    """
    from scipy.stats import binom

    numbers = numpy.sort(_numbers(values))
    rank = int(binom.ppf(0.025, len(numbers), 0.5))
    return Measured(
        label=label,
        quantity=quantity,
        value=_centre([*numbers]),
        low=float(numbers[rank - 1]) if rank else math.nan,
        high=float(numbers[-rank]) if rank else math.nan,
        unit=unit,
        n=len(numbers),
        units=units,
    )


@check.arguments
def mean(
    values: Iterable[float], label: str, *, quantity: str, unit: str = "", units: str = "images"
) -> Measured:
    """Mean of independent numbers, with Student's interval; as ``middle`` else."""
    numbers = _numbers(values)
    value, low, high = tables.interval([float(each) for each in numbers])
    return Measured(
        label=label,
        quantity=quantity,
        value=value,
        low=low,
        high=high,
        unit=unit,
        n=len(numbers),
        units=units,
    )


@check.arguments
def computed(value: float, label: str, *, quantity: str, unit: str = "") -> Measured:
    """A number that is computed and not sampled: it has no n, and its interval is itself."""
    value = float(value)
    if math.isnan(value):
        raise ValueError("value is nan; it takes a number")
    return Measured(label=label, quantity=quantity, value=value, low=value, high=value, unit=unit)


def every(findings: Iterable[Finding]) -> Finding:
    """The finding that all hold: it fails where one does."""
    return _joined(list(findings), Verdict.HOLDS, Verdict.FAILS, "each: ")


def some(findings: Iterable[Finding]) -> Finding:
    """The finding that one holds at least: it fails where all do."""
    return _joined(list(findings), Verdict.FAILS, Verdict.HOLDS, "at least one: ")


def _joined(findings: list[Finding], all_: Verdict, one: Verdict, word: str) -> Finding:
    """``all_`` where each is; ``one`` where any is; else undecided. Interval and n are those of the
    finding that decides.
    """
    if not findings:
        raise ValueError("findings is empty; it takes at least one")
    if len(findings) == 1:
        return findings[0]
    verdicts = [each.verdict for each in findings]
    verdict = Verdict.UNDECIDED
    if one in verdicts:
        verdict = one
    elif set(verdicts) == {all_}:
        verdict = all_
    counted = [each for each in findings if each.verdict is verdict]
    decides = min(counted, key=lambda each: math.inf if each.n is None else each.n)
    criteria = list(dict.fromkeys(each.criterion for each in findings))
    return Finding(
        criterion=word + "; ".join(criteria),
        evidence="; ".join(dict.fromkeys(each.evidence for each in findings)),
        verdict=verdict,
        interval=decides.interval,
        n=decides.n,
        units=decides.units,
    )


def _shares(
    numbers: list[float], ends: tuple[float, float], label: str, quantity: str, units: str
) -> Measured:
    """The mean of shares, or of differences of shares, with the interval's ``ends``."""
    return Measured(
        label=label,
        quantity=quantity,
        value=sum(numbers) / len(numbers),
        low=ends[0],
        high=ends[1],
        unit="%",
        n=len(numbers),
        units=units,
    )


def _of_rows(of: Any, frame: Any) -> Any:
    """``of``, where it is True or False of each row."""
    if not (hasattr(of, "isin") and of.index.equals(frame.index)):
        raise ValueError("of is no Series of frame's rows; it takes one value for each of them")
    if not of.isin([True, False]).all():
        raise ValueError("of has other values than True and False; it takes these alone")
    return of


def _column(frame: Any, name: str) -> Any:
    if name == "psnr":
        return tables.psnrs(frame)
    check.one_of("column", name, frame.columns)
    values = frame[name].astype(float)
    if values.isna().any():
        raise ValueError(f"column {name!r} has gaps; fill them with what they count as")
    return values


def _by_image(frame: Any, values: Any) -> dict[tuple, list[float]]:
    """{(data set, index): its numbers}, one for each network."""
    found: dict[tuple, list[float]] = {}
    for dataset, index, value in zip(frame["dataset"], frame["index"], values):
        found.setdefault((dataset, int(index)), []).append(float(value))
    return found


def _each_image(frame: Any, values: Any, reduce: Any) -> tuple[list[float], str]:
    """One number for each image, and what is counted."""
    if not len(frame):
        raise ValueError("frame is empty; it takes a table of at least one trial")
    images = _by_image(frame, values).values()
    return [float(reduce(each)) for each in images], f"{_kind(frame)}, {_networks(frame)}"


def _pairs(
    first: Any, second: Any, values: list[Any], reduce: Any
) -> tuple[list[tuple[float, float]], str]:
    """(one's, the other's) number for each image that both have, and what is counted."""
    ours, theirs = (_by_image(*each) for each in zip((first, second), values))
    both = [name for name in ours if name in theirs]
    if not both:
        raise ValueError("first and second have no image in common")
    pairs = [(float(reduce(ours[name])), float(reduce(theirs[name]))) for name in both]
    names = zip(first["dataset"], first["index"].astype(int))
    shared = first[[name in theirs for name in names]]
    return pairs, f"{_kind(shared)}, {_networks(shared)}"


def _centre(values: Sequence[float]) -> float:
    """The median of numbers of which some may be infinite; between two it is the worse of them
    where that is.
    """
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(low if math.isinf(low) else high if math.isinf(high) else (low + high) / 2)


def _numbers(values: Iterable[float]) -> Any:
    numbers = numpy.array([float(each) for each in values])
    if not len(numbers):
        raise ValueError("values is empty; it takes at least one number")
    if numpy.isnan(numbers).any():
        raise ValueError("values has gaps; fill them with what they count as")
    return numbers


def _kind(frame: Any) -> str:
    several = "num_images" in frame and frame["num_images"].max() > 1
    return "batches" if several else "images"


def _networks(frame: Any) -> str:
    """A network named with an option is another than without it, default or not."""
    of_network = ("dataset", "model", "trained", "seed")
    names = [n for n in frame.columns if n in of_network or f"{n}".startswith("model_options.")]
    count = len(frame[names].astype(str).drop_duplicates()) if names else 1
    return tables.counted(count, "network")


def summary(claims: Sequence[dict[str, Any]], whose: str) -> str:
    """ "3 of 4", with what is undecided, of the claims that are ``whose``; "–" for none."""
    verdicts = [each["verdict"] for each in claims if each["whose"] == whose]
    if not verdicts:
        return "–"
    open_ = verdicts.count(Verdict.UNDECIDED)
    return f"{verdicts.count(Verdict.HOLDS)} of {len(verdicts)}" + (
        f", {open_} undecided" if open_ else ""
    )
