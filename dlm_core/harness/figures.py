"""One look for all figures: size, colours, and grids of images."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from dlm_core import check, records
from dlm_core.harness import registry  # noqa: F401, it fills the tables

# Width of a journal column in inches.
COLUMN = 85 / 25.4
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
    "pdf.fonttype": 42,
    "image.interpolation": "nearest",
}


def style() -> None:
    """Set matplotlib's defaults for the session: column width, 6 to 7 pt text, colour-blind safe
    colours.
    """
    import matplotlib.style
    import seaborn

    seaborn.set_theme(context="paper", style="ticks", palette="colorblind", rc=STYLE)
    matplotlib.style.use(STYLE)


Kind = Literal["attack", "defence"]


@check.arguments
def name(key: str, kind: Kind | None = None) -> str:
    """The name of a registered attack or defence, as the papers write it; ``kind`` as in
    ``look``.
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
    import seaborn

    record = _record(key, kind)
    palette = seaborn.color_palette("colorblind")
    return {"label": record.title, "color": palette[record.colour], "marker": record.marker}


def _record(key: str, kind: Kind | None) -> records.Attack | records.Defence:
    tables: dict[str | None, dict[str, Any]] = {
        "attack": records.ATTACKS,
        "defence": records.DEFENCES,
        None: {**records.DEFENCES, **records.ATTACKS},
    }
    every = tables[kind]
    check.one_of("key", key, every)
    return every[key]


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
        Rows of numbers, written to one decimal under the images; None writes none.

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
            axis.spines[:].set_visible(False)
            pixels = row[j] if j < len(row) else None
            if pixels is not None:
                axis.imshow(pixels)
            if i == 0 and j < len(column_names):
                axis.set_title(column_names[j], pad=2, fontsize=6)
        for number, axis in zip(below[i] if i < len(below) else (), axes[i]):
            if number is not None:
                axis.set_xlabel(f"{number:.1f}", fontsize=5, labelpad=1)
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
    # What a search overshoots has a mean within [0, 1], or pixels below 0 as well.
    if pixels.min() >= 0 and pixels.mean() > 1:
        raise ValueError(
            f"rows holds an image of mean {pixels.mean():.3g}; it takes pixels in [0, 1], "
            "and those of 0 to 255 divided by 255"
        )
    return pixels.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3)
