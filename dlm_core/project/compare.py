"""Two folders of results, value by value: what differs, and whether by more than another processor
explains.
"""

import csv
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dlm_core.harness import report

Row = Mapping[str, str]


class Tolerance(NamedTuple):
    """How far the values of a column may be from those of another processor, and why that far."""

    # Of a column's name, or of the unit that follows a number in a text.
    pattern: str
    amount: float
    # "dB", "points", "%" (of the larger), "trials" (of the row's n), "decades", "" as it is.
    kind: str
    why: str


# The first that fits; where none does, whole numbers and words are the same, see DEFAULT.
TOLERANCES = (
    Tolerance("statement|whose|verdict|criterion|units", 0, "", "what is asked, and the answer"),
    Tolerance(
        "seconds|milliseconds|minutes|ms|s|MiB", math.inf, "", "time and memory are a machine's own"
    ),
    Tolerance(
        r"(success|released)_\d+|labels_right|recovered|collapsed|exact_(images|pixels)|odd_share"
        "|of|%",
        2,
        "trials",
        "a search that stops beside a threshold may stop on its other side",
    ),
    Tolerance(r"(low|high)_\d+|ends of %", 3, "trials", "the limits move with their share"),
    Tolerance(
        r"dB|(\w+_)?psnr(_\w+)?|0\.\d+|bound|worst|lowest|median|grey|leaks|(exact_)?(un)?aware"
        "|as sent|.* repaired",
        1,
        "dB",
        "a search takes another path to the same minimum; three times as far, where it finds none",
    ),
    Tolerance("ssim|released_ssim|lpips|cosine", 0.02, "", "the same, seen by other measures"),
    Tolerance("accuracy|low|high", 0.01, "", "of a training that rounds otherwise"),
    Tolerance(r"(its )?price(_\w+)?", 1, "points", "differences of accuracies"),
    Tolerance(r"evaluations|until_\d+", 25, "%", "another path has another length"),
    Tolerance(
        r".*loss.*|.*misfit.*|.*error.*|.*truth|least entry.*|decay|eps|rounding|first_step",
        1,
        "decades",
        "what is left where a search or float32 ends: its order of magnitude is the result",
    ),
)
DEFAULT = Tolerance(".*", 2, "%", "of other numbers with decimals")
# n, where a row or a text does not tell it.
USUAL = 20
# In dB; below it, a search that failed ends anywhere.
FOUND = 20.0

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)", re.IGNORECASE)
UNIT = re.compile(r" ?(dB|%(?: of (\d+))?|of(?= \d)|seconds|minutes|MiB|ms\b|s\b)")
GAPS = ("", "nan")


@dataclass(frozen=True)
class Difference:
    """A value that is not the reference's: where it stands, what it is in both, what it may be."""

    where: str
    reference: str
    now: str
    # Its distance over its tolerance: up to 1 is within.
    moved: float = math.inf
    allowed: str = "must be the same"

    def __str__(self) -> str:
        # Of long texts, the part in which they part.
        begin = max(len(os.path.commonprefix([self.reference, self.now])) - 30, 0)
        one, other = (
            ("…" if begin else "") + text[begin : begin + 70] + ("…" if text[begin + 70 :] else "")
            for text in (self.reference or "nothing", self.now or "nothing")
        )
        return f"{self.where}: {one} in the reference, {other} now ({self.allowed})"


def compare(
    reference: Path, now: Path, notebook: str, *, identical: bool = False
) -> list[Difference]:
    """What differs between two folders' results of a notebook: its tables' cells and its claims.

    Parameters
    ----------
    reference, now
        Folders of figures, as ``make figures OUT=folder`` writes them.
    notebook
        Its name.
    identical
        Whether every digit must be the same, as on one machine, rather than within TOLERANCES.

    Returns
    -------
    list of Difference
        In the order of files, rows and columns; those within their tolerance too.
    """
    one, other = (results(folder, notebook) for folder in (reference, now))
    found = list(_missing("", list(one), list(other)))
    for file in (file for file in one if file in other):
        found += _tables(file, one[file], other[file], identical)
    return found


def results(folder: Path, notebook: str) -> dict[str, list[Row]]:
    """{file: its rows, {column: text}} of a notebook's tables, and of its claims, a row each."""
    found: dict[str, list[Row]] = {}
    for path in tables(folder, notebook):
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, restkey="cells too many", restval="")
            found[path.name] = [{name: str(cell) for name, cell in row.items()} for row in rows]
    entry = report.read_json(folder / "claims.json").get(notebook)
    if entry is not None:
        about = {name: value for name, value in entry.items() if name != "claims"}
        found["claims.json"] = [_spread(each) for each in (*entry["claims"], about)]
    return found


def tables(folder: Path, notebook: str) -> list[Path]:
    """The CSV files of a notebook."""
    return sorted([*folder.glob(f"{notebook}.csv"), *folder.glob(f"{notebook}_*.csv")])


def _spread(entry: Mapping[str, Any]) -> Row:
    """A row of texts; the parts of a list are columns of their own."""
    row: dict[str, str] = {}
    for name, value in entry.items():
        if isinstance(value, (list, tuple)):
            row |= {f"{name} {i}": str(each) for i, each in enumerate(value, 1)}
        else:
            row[name] = "" if value is None else str(value)
    return row


def _tables(
    file: str, one: Sequence[Row], other: Sequence[Row], identical: bool
) -> Iterator[Difference]:
    """What differs between two tables, whose rows are matched by their order."""
    columns = list(dict.fromkeys(name for row in one for name in row))
    there = list(dict.fromkeys(name for row in other for name in row))
    yield from _missing(f"{file}, column ", columns, there)
    labels, new = ([_label(row, columns) for row in rows] for rows in (one, other))
    if len(one) != len(other):
        yield Difference(f"{file}, number of rows", str(len(one)), str(len(other)))
        yield from _missing(f"{file}, row ", labels, new)
        return
    for number, (row, now) in enumerate(zip(one, other), 1):
        for name in (name for name in columns if name in there):
            before, after = row.get(name, ""), now.get(name, "")
            moved, allowed = _moved(name, before, after, row.get("n", ""), identical)
            if moved:
                where = f"{file}, row {number} ({labels[number - 1]}), {name}"
                yield Difference(where, before, after, moved, allowed)


def _missing(what: str, one: Sequence[str], other: Sequence[str]) -> Iterator[Difference]:
    """Of files, columns or rows: those that only one side has."""
    yield from (Difference(what + name, "there", "missing") for name in one if name not in other)
    yield from (Difference(what + name, "missing", "there") for name in other if name not in one)


def _label(row: Row, columns: Sequence[str]) -> str:
    """What tells a row from others: its first cells, up to n or the first that is measured."""
    if "statement" in row:
        return row["statement"]
    cells = []
    for name in columns:
        if name == "n" or any(re.fullmatch(each.pattern, name) for each in TOLERANCES):
            break
        cells += [f"{name} {row[name]}"] if row.get(name) else []
    return ", ".join(cells[:4]) or "no name"


def _moved(name: str, one: str, other: str, n: str, identical: bool) -> tuple[float, str]:
    """(how many tolerances a cell has moved, its tolerance in words); a text moves by the number
    in it that moves most, and infinitely where its words change.
    """
    if one == other or (one.lower() in GAPS and other.lower() in GAPS):
        return 0.0, ""
    amount, words = _tolerance(name).amount, NUMBER.split(one)
    if amount == math.inf:
        return 0.0, ""
    if amount == 0 or words != NUMBER.split(other):
        return math.inf, Difference.allowed
    moves, unit, trials = [(0.0, "")], name, float(n) if n.isdigit() and int(n) else USUAL
    for match, after in zip(NUMBER.finditer(one), NUMBER.findall(other)):
        unit, divided = _unit(name, one, match, unit, trials)
        moves.append(_number(_tolerance(unit), match[0], after, divided, identical))
    return max(moves)


def _unit(
    name: str, text: str, match: re.Match[str], last: str, trials: float
) -> tuple[str, float]:
    """(what a number of a cell is measured in, how many of it are one trial): its unit, or that of
    the number before, whose interval it ends; else the column's.
    """
    if name.startswith("interval"):  # as a claim keeps it, of shares or of dB
        return ("ends of %", trials) if 0 <= float(match[0]) <= 1 else ("dB", trials)
    if text[: match.start()].endswith("[") or text[match.end() :].startswith("]"):
        return ("ends of %", trials / 100) if last in ("%", "ends of %") else (last, trials)
    if unit := UNIT.match(text, match.end()):
        if unit[1].startswith("%"):
            return "%", float(unit[2] or trials) / 100
        return unit[1], 1.0 if unit[1] == "of" else trials
    # A text says orders of magnitude so: "1e-07".
    return "loss" if "e" in match[0] and match[0] != text else name, trials


def _number(
    tolerance: Tolerance, one: str, other: str, trials: float, identical: bool
) -> tuple[float, str]:
    """The same for a number."""
    before, after = (float(text.replace(",", "")) for text in (one, other))
    distance, larger = abs(before - after), max(abs(before), abs(after))
    if distance == 0 or tolerance.amount == math.inf:
        return 0.0, ""
    whole = tolerance is DEFAULT and all(re.fullmatch(r"[-+]?[\d,]+", t) for t in (one, other))
    if identical or whole:
        return math.inf, Difference.allowed
    amount, kind = tolerance.amount, tolerance.kind
    if kind == "dB" and min(before, after) < FOUND:
        amount *= 3
    if kind == "decades":  # of what is rounding, the sign is as well
        distance = abs(abs(before) - abs(after))
    size = {
        "trials": amount / trials,
        "%": amount / 100 * larger,
        "decades": (1 - 10**-amount) * larger,
    }.get(kind, amount)
    said = f"a factor of {10**amount:g}" if kind == "decades" else f"{amount:g} {kind}".rstrip()
    # The last of six digits is rounded, and a zero may be what float64 leaves of one.
    return distance / (size + 1e-5 * larger + 1e-12), f"tolerance {said}"


def _tolerance(name: str) -> Tolerance:
    """Of a column or a unit."""
    return next((each for each in TOLERANCES if re.fullmatch(each.pattern, name)), DEFAULT)
