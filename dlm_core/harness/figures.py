"""One look for all figures: size, colours, and grids of images."""

from collections.abc import Sequence
from typing import Any

import torch

from dlm_core import check, records
from dlm_core.harness import registry  # noqa: F401, it fills the tables

COLUMN = 85 / 25.4  # width of a journal column in inches
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


def name(key: str) -> str:
    """The name of a registered attack or defence, as the papers write it."""
    return _record(key).title


def look(key: str) -> dict[str, Any]:
    """Keyword arguments (label, color, marker) that draw a registered attack or defence the same
    way everywhere.
    """
    import seaborn

    record = _record(key)
    palette = seaborn.color_palette("colorblind")
    return {"label": record.title, "color": palette[record.colour], "marker": record.marker}


def _record(key: str) -> records.Attack | records.Defence:
    """An attack's record, or a defence's that has another key than every attack."""
    check.one_of("attack or defence", key, [*records.ATTACKS, *records.DEFENCES])
    return records.ATTACKS.get(key) or records.DEFENCES[key]


def show(figure: Any, alt: str) -> None:
    """Display a matplotlib figure with ``alt`` as its description, and close it."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def show_images(
    rows: Sequence[Sequence[torch.Tensor | None]],
    row_names: Sequence[str],
    column_names: Sequence[str] = (),
    cell: float = 0.42,
) -> Any:
    """Draw a grid of images, and return the matplotlib figure.

    Parameters
    ----------
    rows
        Of [C, H, W] tensors in [0, 1], clamped for display; None leaves a place empty.
    row_names
        One per row, at its left.
    column_names
        Above the first row; there may be fewer than columns.
    cell
        Width and height of a place in inches.
    """
    import matplotlib.pyplot as plt

    columns = max(map(len, rows))
    size = (min(2 * COLUMN, cell * columns + 0.8), cell * len(rows) + 0.2)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            image = row[j] if j < len(row) else None
            if image is not None:
                pixels = image.detach().cpu().clamp(0, 1).permute(1, 2, 0)
                axis.imshow(pixels.expand(-1, -1, 3) if pixels.shape[-1] == 1 else pixels)
            if i == 0 and j < len(column_names):
                axis.set_title(column_names[j], pad=2, fontsize=6)
        axes[i][0].set_ylabel(row_names[i], rotation=0, ha="right", va="center", fontsize=6)
    return figure
