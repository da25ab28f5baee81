"""Where many starts of one search ended: in a sentence, and as pictures."""

from typing import Any

from dlm_core import check
from dlm_core.beyond.starts import Ends
from dlm_core.harness import figures, tables


@check.arguments
def sentence(ends: Ends) -> str:
    """How many starts ended at the best picture, with a 95 % interval, and what the others found.

    Parameters
    ----------
    ends
        Of ``starts.survey``.
    """
    n, hits = len(ends.found), ends.counts[0]
    low, high = (100 * each for each in tables.wilson(hits, n))
    said = (
        f"{hits} of {n} starts ({low:.0f} to {high:.0f} %) ended at the picture of lowest loss, "
        f"within {ends.spread:.2g} of each other"
    )
    others = len(ends.counts) - 1
    if others:
        said += f"; the others at {tables.counted(others, 'other picture')}"
    if not ends.explaining:
        return f"{said}. None converged: nothing says that one of them is the client's"
    if ends.explaining == 1:
        return f"{said}. One picture explains the update to the search's tolerance"
    return (
        f"{said}. {ends.explaining} different pictures explain the update to the search's "
        "tolerance: it does not tell which is the client's"
    )


@check.arguments
def show(ends: Ends, most: check.Count = 8) -> Any:
    """Draw the picture of each cluster, the best one first, and return the matplotlib figure.

    Parameters
    ----------
    ends
        Of ``starts.survey``.
    most
        How many clusters are drawn. Above each stands how many starts ended there, and the lowest
        loss of these; a batch's images stand below each other, in the order of the best one's.
    """
    kept = ends.clusters[:most]
    pictures = [ends.ordered(found) for found in kept]
    names = [
        f"{count} of {len(ends.found)}\nloss {found.loss:.1e}"
        for count, found in zip(ends.counts, kept)
    ]
    rows = [list(row) for row in zip(*pictures)]
    labels = [""] if len(rows) == 1 else [f"image {i + 1}" for i in range(len(rows))]
    return figures.show_images(rows, labels, names, cell=0.6)
