"""One look for all figures: size, colours, thresholds, headings, medians, and grids of images."""

import html
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch

from dlm_core import check, records
from dlm_core.harness import registry, tables  # noqa: F401, the registry fills the tables

# Width of a journal column in inches.
COLUMN = 85 / 25.4
# seaborn's colour-blind safe colours in its order, which a record's ``colour`` counts; yellow, pale
# pink and the three lightest are darkened, to be read on white.
PALETTE = (
    *("#0173b2", "#c77700", "#029e73", "#c44e00", "#b5519f"),
    *("#8a5a2b", "#882255", "#767676", "#6b6b00", "#3e9bd6"),
)
# Where the colour that a record names means another attack in the same artifact.
OWN = {"interval_dlm": "#332288", "statistics": "#882255", "weighted": "#3e9bd6"}
# A client's learning rates, light to dark; the same colour in every notebook.
RATES = {1e-4: "#9ccfc0", 1e-3: "#62b6a5", 1e-2: "#2a9089", 1e-1: "#1f4e79", 1.0: "#14142b"}
# Medians of fewer trials are drawn as points, without line and quartiles.
FEWEST = 5
# Error of pixels rounded to whole grey levels, at most half of one: 20 log10(255 sqrt(12)).
EIGHT_BITS = 58.9
OVERSHOT = 8.0  # mean of an image without negative pixels, from which its pixels run to 255
INK = "0.35"
# What ``medians`` and ``strip`` take of a look.
OF_A_LINE = {"color", "ls", "lw", "marker", "ms", "mfc", "mec", "mew", "fillstyle", "alpha"}
OF_A_LINE |= {"label", "zorder"}
# Lines of a released search, where colour tells clients apart.
RELEASED = {"color": "0.15", "ls": "--", "marker": "D"}
STYLE: dict[str, Any] = {
    "figure.figsize": (COLUMN, 0.7 * COLUMN),
    "figure.dpi": 200,
    "savefig.dpi": 300,
    "figure.constrained_layout.use": True,
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "legend.fontsize": 6,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    "axes.titlelocation": "left",
    **{f"{x}tick.major.size": 3 for x in "xy"},
    **{f"{x}tick.minor.size": 1.5 for x in "xy"},
    **{f"{x}tick.{kind}.width": 0.6 for x in "xy" for kind in ("major", "minor")},
    "pdf.fonttype": 42,
    "image.interpolation": "nearest",
}


def style() -> None:
    """Set matplotlib's defaults for the session: column width, 6 to 7 pt text, colour-blind safe
    colours.
    """
    import matplotlib.style
    import seaborn

    seaborn.set_theme(context="paper", style="ticks", palette=PALETTE, rc=STYLE)
    matplotlib.style.use(STYLE)


Kind = Literal["attack", "defence"]
Named = Literal["attack", "defence", "network", "data set"]


@check.arguments
def name(key: str, kind: Named | None = None) -> str:
    """The name of a registered attack or defence, or of the network or data set that ``kind``
    says, as the papers write it; None as in ``look``.
    """
    return _record(key, kind).title


@check.arguments
def look(key: str, kind: Kind | None = None) -> dict[str, Any]:
    """Keyword arguments (label, color, marker) that draw a registered attack or defence the same
    way everywhere.

    Parameters
    ----------
    key
        Of ``records.ATTACKS`` or ``records.DEFENCES``.
    kind
        Which of the two; None takes the attack where both have the key, as "noise".
    """
    record = _record(key, kind)
    colour = PALETTE[record.colour % len(PALETTE)]
    if isinstance(record, records.Attack):
        colour = OWN.get(key, colour)
    return {"label": record.title, "color": colour, "marker": record.marker}


@check.arguments
def shade(learning_rate: check.Positive) -> str:
    """The colour of a client's learning rate: the darker, the larger. Rates between two powers of
    ten take the nearer one's.
    """
    return RATES[min(RATES, key=lambda rate: abs(math.log(rate / learning_rate)))]


@check.arguments
def weights(init: str) -> dict[str, Any]:
    """Keyword arguments (label, color, marker) of an initialisation: "paper" or "default"."""
    looks = {
        "paper": {"label": "the paper's initial weights", "color": "#4b2e83", "marker": "o"},
        "default": {"label": "PyTorch's initial weights", "color": "#7a9a01", "marker": "s"},
    }
    check.one_of("init", init, looks)
    return looks[init]


Axes = Annotated[Any, check.Must("matplotlib's axes", lambda x: hasattr(x, "axhline"))]
Figure = Annotated[Any, check.Must("a matplotlib figure", lambda x: hasattr(x, "savefig"))]


@check.arguments
def thresholds(
    axis: Axes,
    grey: check.Finite | None = None,
    *,
    success: bool = True,
    eight_bits: bool = False,
    along: Literal["x", "y"] = "y",
    labelled: bool = True,
) -> None:
    """Draw what a PSNR is compared with, the same in every figure, named at the axes' edge.

    Parameters
    ----------
    axis
        Of matplotlib.
    grey
        PSNR in dB of a grey square, drawn dotted; None leaves it out.
    success
        Draw 20 dB, dashed and dotted.
    eight_bits
        Draw the PSNR of pixels rounded to whole grey levels, dashed.
    along
        Which axis has the PSNR.
    labelled
        Write the names: at the right, or above where ``along`` is "x". False where the axes beside
        have them.
    """
    beneath = grey is not None and grey < 20
    outer = ("top", "bottom") if beneath else ("bottom", "top")
    lines = [("grey square", grey, ":", outer[0], "right")] if grey is not None else []
    if success:
        lines.append(("success: 20 dB", 20.0, "-.", outer[1], "left"))
    if eight_bits:
        lines.append(("8-bit rounding", EIGHT_BITS, "--", "center", "left"))
    for text, level, style, vertical, horizontal in lines:
        drawn = axis.axhline if along == "y" else axis.axvline
        drawn(level, color=INK, lw=0.8, ls=style, zorder=1.5)
        if not labelled:
            continue
        near: dict[str, Any] = {"textcoords": "offset points", "fontsize": 5.5, "color": INK}
        if along == "y":
            near |= {"xytext": (2, 0), "xycoords": ("axes fraction", "data"), "va": vertical}
            text = text.replace(" ", "\n", 1)
            axis.annotate(text, (1, level), annotation_clip=False, linespacing=0.95, **near)
        else:
            near |= {"xytext": (0, 2), "xycoords": ("data", "axes fraction"), "ha": horizontal}
            named = axis.annotate(text, (level, 1), annotation_clip=False, **near)
            named.set_gid("above")


@check.arguments
def heading(axis: Axes, letter: str, text: str = "") -> None:
    """Write a panel's letter in bold and what it shows above it: call it after ``thresholds``."""
    above = any(each.get_gid() == "above" for each in axis.texts)
    title = f"$\\mathbf{{{letter}}}$  {text}" if letter else text
    axis.set_title(title, loc="left", pad=9 if above else 3)


@check.arguments
def medians(
    axis: Axes, x: Sequence[check.Finite] | tables.Column, rows: tables.Frame, **look: Any
) -> None:
    """Draw medians of the PSNR with their quartiles as a band; medians of fewer than five trials
    as points alone.

    Parameters
    ----------
    axis
        Of matplotlib.
    x
        Where each row is drawn.
    rows
        Of ``sweeps.summarise``: columns n, psnr_25, psnr_50 and psnr_75.
    **look
        As for ``axis.plot``.
    """
    for each in look:
        check.one_of("argument", each, sorted(OF_A_LINE))
    if rows.n.min() < FEWEST:
        look |= {"ls": ""}
    axis.plot(x, rows.psnr_50, **look)
    if rows.n.min() >= FEWEST and look.get("ls") != "":
        band = {"color": look.get("color"), "alpha": 0.15, "lw": 0}
        axis.fill_between(x, rows.psnr_25, rows.psnr_75, **band)


@check.arguments
def counted(rows: tables.Frame, of: str = "images") -> str:
    """How many trials rows of ``sweeps.summarise`` count: "n = 10 images", "n = 3 to 10 images"."""
    least, most = int(rows.n.min()), int(rows.n.max())
    return f"n = {least if least == most else f'{least} to {most}'} {of}"


@check.arguments
def strip(
    axis: Axes, place: check.Finite, values: Sequence[check.Finite] | tables.Column, **look: Any
) -> None:
    """Draw one row of trials: each as a dot at its PSNR, and their median where they are five or
    more.

    Parameters
    ----------
    axis
        Of matplotlib; the PSNR lies along x.
    place
        Height of the row.
    values
        PSNR in dB of each trial; a trial without a picture (-inf or NaN) has no dot and counts as
        the worst in the median.
    **look
        color, marker and label, as ``look`` returns them.
    """
    import pandas

    for name in look:
        check.one_of("argument", name, sorted(OF_A_LINE))
    every = pandas.Series(list(values), dtype=float).fillna(-math.inf)
    finite = every[every > -math.inf]
    look = {"marker": "o", "color": INK, **look}
    few = len(every) < FEWEST
    label = look.pop("label", None)
    each = {"ms": 3, "alpha": 0.8} if few else {"ms": 2.2, "alpha": 0.45, "mew": 0}
    dots = {**look, "marker": look["marker"] if few else "o", **each}
    axis.plot(finite, [place] * len(finite), ls="", label=label if few else None, **dots)
    if not few:
        middle = {"ls": "", "ms": 4.5, "mec": "white", "mew": 0.5, **look, "label": label}
        axis.plot(tables.quantile(every, 0.5), place, zorder=3, **middle)


@check.arguments
def legend(figure: Figure, ncols: check.Count = 3) -> None:
    """One legend below all of a figure's axes: each label once, in the order drawn."""
    named: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            named.setdefault(label, handle)
    long = {"handlelength": 2.8}  # so that a dash shows beside the marker
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=ncols, **long)


def _record(key: str, kind: Named | None) -> Any:
    found: dict[str | None, dict[str, Any]] = {
        "attack": records.ATTACKS,
        "defence": records.DEFENCES,
        "network": records.NETWORKS,
        "data set": records.DATA_SETS,
        None: {**records.DEFENCES, **records.ATTACKS},
    }
    every = found[kind]
    check.one_of("key", key, every)
    return every[key]


def caption(text: str) -> None:
    """Display a caption under the figure that was shown last, for notebooks and the site."""
    from IPython.display import display

    written = f'<p class="caption" style="font-style: italic">{html.escape(text)}</p>'
    display({"text/html": written, "text/plain": text}, raw=True)


def show(figure: Any, alt: str) -> None:
    """Display a matplotlib figure with ``alt`` as its description, and close it."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


@check.arguments
def show_images(
    rows: Sequence[Sequence[torch.Tensor | None] | torch.Tensor],
    row_names: Sequence[str],
    column_names: Sequence[str] = (),
    cell: check.Positive = 0.42,
    below: Sequence[Sequence[float | None]] = (),
) -> Any:
    """Draw a grid of images, and return the matplotlib figure.

    Parameters
    ----------
    rows
        Of [C, H, W] tensors, C 1 or 3, in [0, 1] or of bytes; what overshoots is clamped for
        display. None leaves a place empty.
    row_names
        One per row, at its left.
    column_names
        Above the first row; there may be fewer than columns.
    cell
        Width and height of a place in inches.
    below
        Rows of PSNRs in dB, written to one decimal under the images; None writes none.

    Raises
    ------
    ValueError
        For images of another shape, and pixels that are not in [0, 1] but in [0, 255].
    """
    import matplotlib.pyplot as plt

    if not any(len(row) for row in rows):
        raise ValueError("rows holds no image; it takes at least one")
    if len(row_names) != len(rows):
        raise ValueError(f"row_names has {len(row_names)} names; rows has {len(rows)} rows")
    shown = [[_shown(image) for image in row] for row in rows]
    columns = max(map(len, shown))
    size = (min(2 * COLUMN, cell * columns + 0.8), cell * len(shown) + 0.2)
    figure, axes = plt.subplots(len(shown), columns, figsize=size, squeeze=False)
    for i, row in enumerate(shown):
        for j, axis in enumerate(axes[i]):
            axis.set(xticks=[], yticks=[])
            pixels = row[j] if j < len(row) else None
            # A frame tells a white picture from an empty place.
            axis.spines[:].set(visible=pixels is not None, color="0.8", linewidth=0.4)
            if pixels is not None:
                axis.imshow(pixels)
            if i == 0 and j < len(column_names):
                axis.set_title(column_names[j], loc="center", pad=2, fontsize=6)
        for number, axis in zip(below[i] if i < len(below) else (), axes[i]):
            if number is not None:
                axis.set_xlabel(f"{number:.1f} dB", fontsize=5.5, labelpad=1)
        axes[i][0].set_ylabel(row_names[i], rotation=0, ha="right", va="center", fontsize=6)
    return figure


def _shown(image: torch.Tensor | None) -> torch.Tensor | None:
    """An image as matplotlib draws it, [H, W, 3] in [0, 1]."""
    if image is None:
        return None
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise ValueError(
            f"rows holds {check.shown(image)}; it takes images [C, H, W] with C 1 or 3"
        )
    pixels = image.detach().cpu()
    if pixels.dtype == torch.uint8:
        pixels = pixels / 255
    elif pixels.dtype not in (torch.float32, torch.float64):
        pixels = pixels.float()
    # what a search overshoots is a few times too bright, or has pixels below 0 as well
    if pixels.min() >= 0 and pixels.mean() > OVERSHOT:
        raise ValueError(
            f"rows holds an image of mean {pixels.mean():.3g}; it takes pixels in [0, 1], "
            "and those of 0 to 255 divided by 255"
        )
    return pixels.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3)
