"""The released experiments side by side: the authors' code where it runs, ours as released, and
ours with our search. Fills the tables of docs/paper.md.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from scipy.stats import binomtest

from dlm_core.harness import report
from dlm_core.harness.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "paper.md"


class Ran(NamedTuple):
    """What the authors' code gave, once, outside of this repository: images at 20 dB, of how many,
    and their median PSNR in dB.
    """

    hits: int
    n: int
    psnr: float


class Found(NamedTuple):
    """A row of a notebook's table: the values of columns that name it. ``together``: how many of
    its images are one unit, for the interval.
    """

    table: str
    columns: Mapping[str, str]
    together: int = 1


class Line(NamedTuple):
    """One line of an experiment's table."""

    what: str
    code: Ran | None
    as_released: Found | None
    ours: Found | None


def _compared(model: str, attack: str, search: str) -> Found:
    names = {"dataset": "cifar100", "model": model, "attack": attack, "search": search}
    return Found("01_attacks_compared", names)


def _factor(model: str, told: str) -> Found:
    names = {"model": model, "attack": "dlg_factor", "search": "as released", "told": told}
    return Found("03_dlg_needs_the_learning_rate", names)


def _guess(network: str, k0: str, search: str, label: str) -> Found:
    names = {"network": network, "attack": "dlm", "k0": k0, "search": search, "label": label}
    return Found("04_dlm_and_its_initial_guess", names)


def _batch(network: str, way: str) -> Found:
    names = {"network": network, "way": way, "num_images": "2"}
    return Found("06_batches", names, together=2)


def _steps(model: str, steps: str, search: str) -> Found:
    names = {"model": model, "client": "released", "learning_rate": "0.1", "local_steps": steps}
    return Found("07_local_steps", {**names, "search": search})


def _noise(model: str, scale: str, search: str) -> Found:
    seen = ("laplace", "channel") if float(scale) else ("", "")
    names = {"model": model, "learning_rate": "0.1", "search": search, "scale": scale}
    return Found("08_defence_noise", {**names, "distribution": seen[0], "observer": seen[1]})


def _sparse(model: str, percent: str, search: str) -> Found:
    names = {"model": model, "learning_rate": "0.1", "search": search, "percent": percent}
    seen = "channel" if float(percent) else ""
    return Found("09_defence_sparsification", {**names, "observer": seen})


RELEASED, OURS = "as released", "our search"
LEFT_OUT = "our search, zeros left out"
LENET, MLP = "LeNet", "MLP"

# By experiment, each with its lines. The page says in which points the columns differ.
EXPERIMENTS = {
    "dlg": [
        Line(
            LENET,
            Ran(7, 10, 44.10),
            _compared("lenet", "dlg", RELEASED),
            _compared("lenet", "dlg", OURS),
        ),
        Line(
            MLP,
            Ran(0, 4, 6.85),
            _compared("mlp", "dlg", RELEASED),
            _compared("mlp", "dlg", OURS),
        ),
    ],
    "factor": [
        Line(f"{name}, k starts at {told}", None, _factor(name.lower(), told), None)
        for name in (LENET, MLP)
        for told in ("0.9", "1.1")
    ],
    "dlm": [
        Line(
            f"{LENET}, k₀ = {k0}",
            Ran(0, 10, 5.58) if k0 == "100" else None,
            _guess(LENET, k0, RELEASED, "optimised"),
            _guess(LENET, k0, OURS, "inferred"),
        )
        for k0 in ("60", "100", "180", "240")
    ]
    + [
        Line(
            f"{MLP}, k₀ = {k0}",
            None,
            _guess(MLP, k0, RELEASED, "optimised"),
            _guess(MLP, k0, OURS, "inferred"),
        )
        for k0 in ("60", "100", "240")
    ],
    "dlm_plus": [
        Line(
            name,
            code,
            _compared(name.lower(), "dlm_plus", RELEASED),
            _compared(name.lower(), "dlm_plus", OURS),
        )
        for name, code in ((LENET, Ran(9, 10, 36.00)), (MLP, Ran(0, 4, 9.67)))
    ],
    "cosine": [
        Line(
            LENET,
            Ran(6, 10, 22.87),
            _compared("lenet", "inverting_gradients", RELEASED),
            _compared("lenet", "inverting_gradients", OURS),
        )
    ],
    "batch": [
        Line(name, None, _batch(name, RELEASED), _batch(name, OURS)) for name in (LENET, MLP)
    ],
    "noise": [
        Line(
            f"{LENET}, scale {scale}" if float(scale) else f"{LENET}, no noise",
            Ran(9, 10, 35.65) if not float(scale) else None,
            _noise("lenet", scale, RELEASED),
            _noise("lenet", scale, OURS),
        )
        for scale in ("0", "1e-05", "0.0001", "0.001")
    ]
    + [
        Line(
            f"{MLP}, scale {scale}" if float(scale) else f"{MLP}, no noise",
            None,
            _noise("mlp", scale, RELEASED),
            None,
        )
        for scale in ("0", "1e-05", "0.0001", "0.001")
    ],
    "sparsification": [
        Line(
            f"{LENET}, {percent} %",
            None,
            _sparse("lenet", percent, RELEASED),
            _sparse("lenet", percent, OURS),
        )
        for percent in ("0", "1", "5", "9")
    ]
    + [
        Line(
            f"{LENET}, {percent} %, zeros left out", None, None, _sparse("lenet", percent, LEFT_OUT)
        )
        for percent in ("5", "10", "20")
    ]
    + [
        Line(f"{MLP}, {p} %", None, _sparse("mlp", p, RELEASED), None) for p in ("0", "1", "5", "9")
    ],
    "steps": [
        Line(
            f"{LENET}, E = {steps}",
            None,
            _steps("lenet", steps, RELEASED),
            _steps("lenet", steps, OURS),
        )
        for steps in ("1", "20", "100")
    ]
    + [
        Line(f"{MLP}, E = {steps}", None, _steps("mlp", steps, RELEASED), None)
        for steps in ("1", "20", "100")
    ],
}


def table(figures: Path, experiment: str) -> str:
    """One experiment's table in Markdown.

    Parameters
    ----------
    figures
        The folder of the notebooks' tables. What is not in them, as after a run under a small
        profile, is a dash.
    experiment
        A key of EXPERIMENTS.
    """
    head = ["", "the authors' code", "ours, as released", "ours, our search", "from"]
    rows = [report.row(head), "|---" * len(head) + "|"]
    for line in EXPERIMENTS[experiment]:
        found = [each for each in (line.as_released, line.ours) if each]
        names = dict.fromkeys(each.table for each in found)
        links = ", ".join(f"[{name[:2]}](../notebooks/{name}.ipynb)" for name in names)
        ours = [_said(figures, each) for each in (line.as_released, line.ours)]
        rows.append(report.row([line.what, _ran(line.code), *ours, links]))
    return "\n".join(rows)


def fill(figures: Path, page: Path = PAGE) -> None:
    """Put the tables between the markers of docs/paper.md, which have the experiments' names."""
    with report.locked(page):
        text = page.read_text(encoding="utf-8")
        between = r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)"
        filled = re.sub(
            between,
            lambda m: m[1] + "\n" + table(figures, m[2]) + "\n\n" + m[3],
            text,
            flags=re.DOTALL,
        )
        if filled != text:
            report.write_atomically(page, filled)


def _ran(code: Ran | None) -> str:
    """A result of the authors' code in words."""
    if code is None:
        return "–"
    return _words(code.hits / code.n, *_interval(code.hits, code.n), code.n, code.psnr)


def _said(figures: Path, found: Found | None) -> str:
    """A row of a table in words; the interval and n count images, or units of several."""
    row = found and _row(figures, found)
    if not found or not row:
        return "–"
    share, n = float(row["success_20"]), int(row.get("images") or row["n"])
    ends = (float(row["low_20"]), float(row["high_20"]))
    if found.together > 1:
        n //= found.together
        ends = _interval(round(share * n), n)
    return _words(share, *ends, n, float(row["psnr_50"]))


def _row(figures: Path, found: Found) -> dict[str, str] | None:
    """The one row that the columns name; None where there is none.

    Raises
    ------
    LookupError
        Where they name several, or a column that the table does not have.
    """
    path = figures / f"{found.table}.csv"
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    fits = [row for row in rows if all(row[name] == v for name, v in found.columns.items())]
    if len(fits) > 1:
        raise LookupError(f"{path.name}: {len(fits)} rows have {dict(found.columns)}, want one")
    return fits[0] if fits else None


def _interval(hits: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share."""
    ends = binomtest(hits, n).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def _words(share: float, low: float, high: float, n: int, psnr: float) -> str:
    interval = f"[{100 * low:.0f}, {100 * high:.0f}]"
    return f"{100 * share:.0f} % {interval}, n = {n}; {psnr:.1f} dB"
