"""When a picture counts as shown: one threshold a data set, and what guesses of no observer reach.

A picture is shown when an attack comes nearer to it than an observer who looks at nothing, or at
other images. On digits of 8x8 pixels that is much: the most similar of 1,697 other digits has 17 dB
in the median, more than a digit's class says (14 dB). So 15 dB means "a digit like this one", and
20 dB, which 8 of 100 digits have a neighbour at, means "this image". Below 20 dB a digit may be
recognised all the same: of the pictures that notebook 18 shows, from about 17 dB on.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dlm_core import check, data, metrics
from dlm_core.harness import tables

# dB of standard PSNR, decided once: what notebooks 18, 19 and 20 count by.
SHOWN = {"digits": 20.0, "cifar100": 20.0, "fashion_mnist": 20.0}


@check.arguments
def shown(dataset: str) -> float:
    """The PSNR in dB from which on an image of the data set counts as shown.

    Parameters
    ----------
    dataset
        Key of ``SHOWN``.
    """
    check.one_of("dataset", dataset, SHOWN)
    return SHOWN[dataset]


@check.arguments
def guesses(
    dataset: str, attacked: Sequence[check.Whole], *, reserved: check.Count, source: str = "auto"
) -> Any:
    """How near guesses come that have seen nothing of a client: one row an image and guess.

    Parameters
    ----------
    dataset, source
        Of ``data.load``.
    attacked
        Indices of the images that are guessed.
    reserved
        The guesses know the images from this index on; of a set that has no more, all but the one
        that is guessed.

    Returns
    -------
    pandas.DataFrame
        "dataset", "index", "guess", "psnr" (dB) and "ssim". The nearest other image is chosen with
        the truth in hand: no guess by another image is better.

    Raises
    ------
    ValueError
        For an unknown data set, an index out of range, and for no indices.
    """
    import pandas

    shown(dataset)
    check.at_least("number of attacked images", len(attacked), 1)
    everything = data.load(dataset, source=source)
    count = len(everything.labels)
    if max(attacked) >= count:
        raise ValueError(f"attacked has {max(attacked)}; {dataset} has {count} images")
    known = range(reserved, count) if reserved < count else range(count)
    rows = []
    for i in attacked:
        others = torch.tensor([j for j in known if j != i])
        for guess, image in _guessed(everything, others, i).items():
            pair = image[None], everything.images[i][None]
            near = {"psnr": float(metrics.psnr(*pair, data_range=1.0))}
            near["ssim"] = float(metrics.ssim(*pair, data_range=1.0))
            rows.append({"dataset": dataset, "index": i, "guess": guess, **near})
    return pandas.DataFrame(rows)


@check.arguments
def baselines(guessed: tables.Frame) -> Any:
    """``guesses`` in short, one row a guess: medians of "psnr" and "ssim", the "highest" PSNR, the
    share of the images "at the threshold", and n.
    """
    limit = shown(guessed["dataset"].iloc[0])
    groups = guessed.groupby("guess", sort=False)
    found = groups[["psnr", "ssim"]].median()
    found["highest"] = groups.psnr.max()
    found["at the threshold"] = groups.psnr.apply(lambda near: float((near >= limit).mean()))
    found["n"] = groups.size()
    return found.reset_index()


def _guessed(everything: Any, others: torch.Tensor, i: int) -> dict[str, torch.Tensor]:
    """{what is guessed: image [C, H, W]}; those by class where another image has it."""
    truth, label = everything.images[i], everything.labels[i]
    images = everything.images[others]
    found = {"grey square": torch.full_like(truth, 0.5), "mean image": images.mean(0)}
    alike = images[everything.labels[others] == label]
    if len(alike):
        found |= {"mean of its class": alike.mean(0), "another of its class": alike[0]}
    distances = (images - truth).square().flatten(1).sum(1)
    return {**found, "nearest other image": images[distances.argmin()]}
