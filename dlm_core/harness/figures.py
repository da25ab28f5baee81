"""One look for all figures: size, colours, and grids of images."""

COLUMN = 85 / 25.4  # width of a journal column in inches
# Name, colour in seaborn's colour-blind palette, and marker of each attack, the same in every figure.
ATTACKS = {
    "dlg": ("DLG", 0, "o"),
    "idlg": ("iDLG", 9, "v"),
    "inverting_gradients": ("IG", 2, "s"),
    "dlm": ("DLM", 1, "D"),
    "dlm_plus": ("DLM+", 4, "P"),
    "exact": ("exact", 3, "*"),
    "unrolled_dlm": ("unrolled DLM+", 5, "X"),
    "exact_batch": ("exact, batch", 3, "H"),
    "interval_dlm": ("DLM on bounds", 2, "^"),
    "sign_dlm": ("signs alone", 8, "<"),
    "statistics": ("DLM+ with statistics", 3, "^"),
}
STYLE = {
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


def style():
    """Set matplotlib's defaults for the session: column width, 6 to 7 pt text, colour-blind safe colours."""
    import matplotlib
    import seaborn

    seaborn.set_theme(context="paper", style="ticks", palette="colorblind", rc=STYLE)
    matplotlib.rcParams.update(STYLE)


def name(attack):
    """An attack's name as the papers write it."""
    return ATTACKS[attack][0]


def look(attack):
    """Keyword arguments (label, color, marker) that draw an attack the same way everywhere."""
    import seaborn

    label, colour, marker = ATTACKS[attack]
    return {"label": label, "color": seaborn.color_palette("colorblind")[colour], "marker": marker}


def show(figure, alt):
    """Display a matplotlib figure with ``alt`` as its description, and close it."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def show_images(rows, row_names, column_names=(), cell=0.42):
    """A grid of images, one list of [C, H, W] tensors in [0, 1] per row (clamped for display). Returns the figure."""
    import matplotlib.pyplot as plt

    columns = max(map(len, rows))
    size = (min(2 * COLUMN, cell * columns + 0.8), cell * len(rows) + 0.2)
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if j < len(row) and row[j] is not None:
                pixels = row[j].detach().cpu().clamp(0, 1).permute(1, 2, 0)
                axis.imshow(pixels.expand(-1, -1, 3) if pixels.shape[-1] == 1 else pixels)
            if i == 0 and j < len(column_names):
                axis.set_title(column_names[j], pad=2, fontsize=6)
        axes[i][0].set_ylabel(row_names[i], rotation=0, ha="right", va="center", fontsize=6)
    return figure
