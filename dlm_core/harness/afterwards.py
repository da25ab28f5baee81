"""What is done to a finished picture before it is judged.

``filtered`` and ``scaled`` need no truth: any attacker can do them. ``brightness`` looks at the
truth and is analysis: on the MLP an attack may find the private image times some factor, which PSNR
takes for a failure.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from scipy.ndimage import median_filter

from dlm_core import metrics
from dlm_core.harness import scene
from dlm_core.harness.trials import Trial

Records = Sequence[Mapping[str, Any]]
WIDTH = 3  # pixels


def filtered(images: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W], cut to [0, 1], after a median filter of 3 x 3 pixels."""
    window = (1, 1, WIDTH, WIDTH)
    return torch.from_numpy(median_filter(images.clamp(0, 1).numpy(), size=window, mode="nearest"))


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Images divided by their brightest value, so that this becomes white."""
    return images / images.max().clamp(min=1e-6)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "filtered": filtered,
    "scaled": scaled,
}


def brightness(images: torch.Tensor, truth: torch.Tensor) -> float:
    """The one factor by which the images fit the truth best, in the least squares."""
    found, true = images.flatten().double(), truth.flatten().double()
    return float((found * true).sum() / found.square().sum())


def psnrs(
    plan: Sequence[Trial], records: Records, change: Callable[[torch.Tensor], torch.Tensor]
) -> list[float]:
    """PSNR in dB of each trial's images after a change; -inf where there are none."""
    return [_psnr(images, truth, change) for images, truth in _pairs(plan, records)]


def refitted_psnrs(plan: Sequence[Trial], records: Records) -> list[float]:
    """PSNR in dB of each trial's images times their ``brightness``; -inf where there are none."""
    return [
        _psnr(images, truth, lambda found, true=truth: brightness(found, true) * found)
        for images, truth in _pairs(plan, records)
    ]


def along(
    frame: Any, records: Records, column: str, values: Iterable[Any], change: str | None = None
) -> tuple[list[torch.Tensor | None], list[float | None]]:
    """Of one image, (pictures [C, H, W], their PSNR in dB), None where there is no picture.

    Parameters
    ----------
    frame
        Of ``sweeps.table``, trials of one image, with "<change>_psnr" as ``psnrs`` gives it.
    records
        Those of the whole table, which ``frame``'s index counts.
    column, values
        What the pictures are in order of.
    change
        Key of ``CHANGES``; None for the picture as it was found.
    """
    pictures: list[torch.Tensor | None] = []
    found: list[float | None] = []
    for value in values:
        rows = frame[frame[column] == value]
        if not len(rows) or rows.psnr.isna().any():
            pictures, found = [*pictures, None], [*found, None]
            continue
        first = rows.index[0]
        images = records[first]["arrays"]["images"]
        images = CHANGES[change](images) if change else images
        pictures.append(images[0].clamp(0, 1))
        found.append(float(rows[f"{change}_psnr" if change else "psnr"].iloc[0]))
    return pictures, found


def _psnr(images: Any, truth: torch.Tensor, change: Callable[..., torch.Tensor]) -> float:
    if images is None:
        return -math.inf
    return float(metrics.psnr(change(images), truth, data_range=1.0))


def _pairs(plan: Sequence[Trial], records: Records) -> Iterator[tuple[Any, torch.Tensor]]:
    """(images that a trial found or None, the true ones)."""
    for trial, record in zip(plan, records, strict=True):
        truth, _ = scene.truth_of(trial, trial.num_images)
        yield record["arrays"].get("images"), truth
