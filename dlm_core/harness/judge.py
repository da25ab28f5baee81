"""How a reconstruction compares with the truth.

Truth enters here alone, and where a trial says that its attack is told the labels
(``scene.attack``).
"""

from typing import Any

import torch

from dlm_core import metrics
from dlm_core.results import Reconstruction, SearchEvidence


def judge(found: Reconstruction, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Return a reconstruction's own numbers and its distance from the truth.

    Parameters
    ----------
    found
        Of B images; they are matched with the true ones first.
    images, labels
        The truth, [B, C, H, W] and [B].

    Raises
    ------
    ValueError
        For another number of images than the client's, or of another size.
    """
    if found.images.shape != images.shape:
        raise ValueError(
            f"the attack returned images of shape {list(found.images.shape)}; "
            f"the client's have {list(images.shape)}"
        )
    order = metrics.match(found.images, images) if len(images) > 1 else torch.tensor([0])
    best = found.images[order]
    psnrs = metrics.psnr(best, images, data_range=1.0, per_image=True)
    wide = min(images.shape[-2:]) >= 32  # what LPIPS' network and the released SSIM's window take
    steps = history(found)
    curve = [float(metrics.psnr(then[order], images, data_range=1.0)) for _, then in steps]
    return {
        **found.numbers(),
        "psnr": float(psnrs.mean()),
        "psnrs": psnrs.tolist(),
        "ssim": float(metrics.ssim(best, images, data_range=1.0)),
        "lpips": float(metrics.lpips(best, images, data_range=1.0)) if wide else None,
        "exact_pixels": float(metrics.exact_pixel_rate(best, images)),
        "released_psnr": float(metrics.released_psnr(best, images)),
        "released_ssim": float(metrics.released_ssim(best, images)) if wide else None,
        "labels_right": sorted(found.labels.tolist()) == sorted(labels.tolist()),
        "evaluations": found.evaluations,
        "k": found.k,
        "history_evaluations": [evaluation for evaluation, _ in steps],
        "history_psnr": curve,
    }


def arrays(found: Reconstruction) -> dict[str, torch.Tensor]:
    """The reconstruction's tensors in single precision, for figures."""
    kept = {"images": found.images.float(), "losses": torch.tensor(found.evidence.losses)}
    if isinstance(found.evidence, SearchEvidence) and found.evidence.ks:
        kept["ks"] = torch.tensor(found.evidence.ks)
    if history(found):
        kept["history"] = torch.stack([images for _, images in history(found)]).float()
    return {name: tensor.contiguous().cpu() for name, tensor in kept.items()}


def history(found: Reconstruction) -> list[tuple[int, torch.Tensor]]:
    """[(evaluation, images)] of a search that kept them, else []."""
    return found.evidence.history if isinstance(found.evidence, SearchEvidence) else []
