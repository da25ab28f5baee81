"""How a table of results is shown to readers: headings in words, titles in place of keys, a share
beside its interval, a median beside its quartiles. The CSV keeps the names that code uses.
"""

import math
from collections.abc import Mapping
from typing import Any

from dlm_core import records
from dlm_core.harness import tables

HEADINGS = {
    "dataset": "data set",
    "model": "network",
    "num_images": "images in a step",
    "local_steps": "local steps",
    "learning_rate": "learning rate",
    "client.learning_rate": "learning rate",
    "success_20": "share at 20 dB",
    "success_30": "share at 30 dB",
    "psnr": "PSNR, dB",
    "psnr_50": "median PSNR, dB",
    "psnr_mean": "mean PSNR, dB",
    "psnr_std": "its standard deviation",
    "psnr_max": "largest PSNR, dB",
    "psnr_unaware": "PSNR of DLM+, not told, dB",
    "at_truth": "loss at the truth",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "released_psnr": "released PSNR, dB",
    "released_20": "share at a released PSNR of 20",
    "released_25": "share at a released PSNR of 25",
    "refitted": "PSNR with brightness fitted, dB",
    "refitted_20": "share at 20 dB with brightness fitted",
    "labels_right": "labels right",
    "exact_pixels": "8-bit pixels right",
    "bound_psnr": "bound, dB",
    "bound": "bound, dB",
    "chi2": "χ²/N",
    "identifiable": "directions fixed",
    "half_grey": "directions to half a grey level",
    "better_than_prior": "directions better than the prior",
    "fixed_whole": "share of images with all directions fixed",
    "fixed_share": "share of directions fixed, median",
    "told_nothing": "share of images of which nothing is told",
    "bound_smooth": "bound, smooth prior, dB",
    "own_attack": "its own attack",
    "own_psnr": "median of its own attack, dB",
    "seen": "share that some attack shows",
    "ig_of_few": "IG on the first few, dB",
    "stop_reason": "how it ended",
}
# {column: (the ends of its interval, in brackets behind it, and what they are)}.
INTERVALS = {
    "success_20": ("low_20", "high_20", "95 %"),
    "success_30": ("low_30", "high_30", "95 %"),
    "psnr_50": ("psnr_25", "psnr_75", "quartiles"),
}
COUNTS = ("evaluations", "identifiable", "half_grey", "better_than_prior")
PER_CENT = [f"{part}_{threshold}" for part in ("success", "low", "high") for threshold in (20, 30)]
LARGE = 1e5  # from which a number is shown by its leading digits


def shown(frame: tables.Frame, digits: int) -> Any:
    """A table for display.

    Parameters
    ----------
    frame
        A pandas DataFrame, such as ``sweeps.summarise`` returns.
    digits
        Decimals of its numbers. Counts have none, and their medians at most one. Shares of
        successes are in per cent.

    Returns
    -------
    pandas.DataFrame
        Of words.
    """
    import pandas

    columns: dict[str, Any] = {}
    cells = {name: _cells(frame, name, digits) for name in frame.columns}
    whole = {name: each for name, each in INTERVALS.items() if {name, *each[:2]} <= {*cells}}
    behind = {end for low, high, _ in whole.values() for end in (low, high)}
    for name in (each for each in cells if each not in behind):
        heading, column = heading_of(name), cells[name]
        if name in whole:
            low, high, what = whole[name]
            heading = f"{heading} [{what}]"
            column = [f"{a} [{b}, {c}]" for a, b, c in zip(column, cells[low], cells[high])]
        columns[str(name) if heading in columns else heading] = column
    return pandas.DataFrame(columns, index=frame.index)


def heading_of(name: Any) -> str:
    """A column's heading: in words, or an attack's title, or its name as it is."""
    attack = records.ATTACKS.get(name)
    return HEADINGS.get(name, attack.title if attack else str(name))


def _cells(frame: Any, name: Any, digits: int) -> list[Any]:
    """A column as it is shown."""
    values = frame[name]
    if name in PER_CENT:
        unit = " %" if name in INTERVALS else ""
        return [_number(100 * value, 0) + unit for value in values]
    if values.dtype.kind == "f":
        counts = name in COUNTS or all(each.is_integer() for each in values if math.isfinite(each))
        if counts and not str(name).startswith("psnr"):  # a median of counts may end in a half
            return [
                _number(value, int(math.isfinite(value) and not value.is_integer()))
                for value in values
            ]
        return [_number(value, digits) for value in values]
    titles = {key: each.title for table in _tables(name) for key, each in table.items()}
    return [_word(value, titles) for value in values]


def _word(value: Any, titles: Mapping[str, str]) -> Any:
    if str(value) == "nan":  # a number, or one that its notebook has written out
        return ""
    return titles.get(value, value) if isinstance(value, str) else value


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3g}" if LARGE <= abs(value) < math.inf else f"{value:.{digits}f}"


def _tables(name: Any) -> list[Mapping[str, Any]]:
    """The records whose keys may stand in a column; "noise" is an attack and a defence."""
    attacks, defences = records.ATTACKS, records.DEFENCES
    others: list[Any] = [records.NETWORKS, records.DATA_SETS, records.CLIENT_OPTIMIZERS]
    return [*others, defences, attacks] if name == "attack" else [*others, attacks, defences]
