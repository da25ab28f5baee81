"""How close an estimate comes to the true images; and how the released code measured it.

Every function takes images [N, C, H, W] of any floating dtype, on any device, tensors or NumPy
arrays, and changes nothing it is given; 8-bit ones at data_range 255. Except for the two
``released_`` ones, estimates are first clamped to [0, data_range], as any viewer does; a NaN in
them stays and makes the metric NaN. The float returned is the mean over the N images;
``per_image=True`` gives all N instead (float64, CPU).

Each raises ValueError for unequal shapes, for true images that leave [0, data_range], and for
images in [0, 1] or of 8 bits where the range is that of the other kind: these would make the range
a lie.
"""

import functools
import warnings
from typing import Any

import torch
from torch import nn

from dlm_core import check, data
from dlm_core.arrays import WHOLE, Pictures
from dlm_core.threads import own_generator

Score = Any  # a float, or [N] float64 with ``per_image``
CIFAR100_STD = (0.2673342823982239, 0.2564384639263153, 0.2761504650115967)


@check.arguments
def psnr(
    estimate: Pictures, truth: Pictures, *, data_range: check.Positive, per_image: bool = False
) -> Score:
    """10·log10(data_range²/MSE) in dB; infinite for identical images.

    Parameters
    ----------
    estimate, truth
        [N, C, H, W]; each image has one MSE, over all its channels.
    data_range
        The value of white, above 0.
    per_image
        Return [N] float64 instead of their mean, a float.
    """
    estimate, truth = _pair(estimate, truth, data_range)
    mse = (estimate - truth).square().flatten(1).mean(1)
    return _result(10 * torch.log10(data_range**2 / mse), per_image)


@check.arguments
def ssim(
    estimate: Pictures, truth: Pictures, *, data_range: check.Positive, per_image: bool = False
) -> Score:
    """Structural similarity in [-1, 1], mean over the channels.

    Parameters
    ----------
    estimate, truth
        [N, C, H, W], at least 3x3. The window is uniform, 7x7 or the largest odd one that fits.
    data_range
        The value of white, above 0.
    per_image
        Return [N] float64 instead of their mean, a float.
    """
    estimate, truth = _pair(estimate, truth, data_range)
    smallest = min(truth.shape[2:])
    if smallest < 3:
        raise ValueError(f"images are {truth.shape[2]}x{truth.shape[3]}; ssim takes 3x3 or more")
    window = min(7, smallest - 1 + smallest % 2)
    return _result(_ssim(estimate, truth, win_size=window, data_range=data_range), per_image)


@check.arguments
def lpips(
    estimate: Pictures,
    truth: Pictures,
    *,
    data_range: check.Positive = 1.0,
    per_image: bool = False,
) -> Score:
    """Learned perceptual distance (Zhang et al. 2018, AlexNet, v0.1); 0 for identical images.

    Parameters
    ----------
    estimate, truth
        [N, C, H, W] with C 1 or 3; grey images are repeated to three channels. At least 31x31,
        below which AlexNet has no pixel left. Enlarging images changes the distance, so do it
        openly.
    data_range
        The value of white, above 0.
    per_image
        Return [N] float64 instead of their mean, a float.

    Notes
    -----
    The scale depends on the size: unrelated photographs are about 0.3 apart at 32x32, 0.55 at
    64x64. Values are scaled to [-1, 1] as the network expects (the released code passes them in
    [0, 1]).
    """
    estimate, truth = _pair(estimate, truth, data_range)
    if min(truth.shape[2:]) < 31 or truth.shape[1] not in (1, 3):
        raise ValueError(
            f"images have shape {list(truth.shape[1:])}; "
            "lpips takes 1 or 3 channels and 31x31 pixels or more"
        )
    network = _lpips_network()
    first, second = ((2 * x / data_range - 1).float() for x in (estimate, truth))
    with torch.no_grad():
        distance = network(first.expand(-1, 3, -1, -1), second.expand(-1, 3, -1, -1))
    return _result(distance.flatten().double(), per_image)


@check.arguments
def exact_pixel_rate(estimate: Pictures, truth: Pictures) -> float:
    """Share of the values (pixel by channel) equal after rounding to 8 bits.

    Parameters
    ----------
    estimate, truth
        [N, C, H, W] in [0, 1]. A NaN equals nothing.
    """
    estimate, truth = (torch.round(255 * images) for images in _pair(estimate, truth, 1.0))
    return float((estimate == truth).double().mean())


@check.arguments
def success(psnr_value: float | torch.Tensor, threshold: check.Finite = 20.0) -> bool:
    """Whether an attack counts as successful: PSNR of at least ``threshold`` dB. NaN does not."""
    if isinstance(psnr_value, torch.Tensor) and psnr_value.numel() != 1:
        raise ValueError(f"psnr_value is {check.shown(psnr_value)}; it takes one number")
    return bool(psnr_value >= threshold)


@check.arguments
def match(estimates: Pictures, truths: Pictures) -> torch.Tensor:
    """The order in which ``estimates[order]`` fits ``truths`` best, by total MSE.

    Parameters
    ----------
    estimates, truths
        [N, C, H, W] in [0, 1]; a NaN is taken for black.

    Returns
    -------
    torch.Tensor
        [N] int64.

    Notes
    -----
    A batch's gradient does not tell the order of its images.
    """
    from scipy.optimize import linear_sum_assignment

    pair = _pair(estimates, truths, 1.0)
    estimates, truths = (images.nan_to_num().flatten(1) for images in pair)
    distances = torch.cdist(truths, estimates, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.from_numpy(linear_sum_assignment(distances.square().numpy())[1])


@check.arguments
def released_psnr(estimate: Pictures, truth: Pictures) -> float:
    """PSNR as in the released code: mean over channels of 10·log10(σ_c⁻²/MSE).

    Parameters
    ----------
    estimate, truth
        [N, 3, H, W] in [0, 1], not clamped; there is one MSE over all of them.

    Notes
    -----
    σ_c are CIFAR-100's standard deviations: 11.49 dB above the standard value of the same error.
    """
    estimate, truth = _numbers(estimate, truth, 1.0)
    mse = (estimate - truth).square().mean()
    deviations = torch.tensor(CIFAR100_STD, dtype=torch.float64)
    return float((10 * torch.log10(deviations**-2 / mse)).mean())


@check.arguments
def released_ssim(estimate: Pictures, truth: Pictures) -> float:
    """SSIM as in the released code: Gaussian 11x11 window, data_range 255 for images in [0, 1].

    Parameters
    ----------
    estimate, truth
        [N, C, H, W], at least 11x11, not clamped.

    Notes
    -----
    The constants that stabilise the quotient then outweigh every variance, so that any pair of
    images scores near 1.
    """
    estimate, truth = _numbers(estimate, truth, 1.0)
    if min(truth.shape[2:]) < 11:
        raise ValueError(
            f"images are {truth.shape[2]}x{truth.shape[3]}; released_ssim takes 11x11 or more"
        )
    each = _ssim(
        estimate,
        truth,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    return float(each.mean())


def _ssim(estimate: torch.Tensor, truth: torch.Tensor, **options: Any) -> torch.Tensor:
    """[N] scikit-image's SSIM of each pair, mean over the channels."""
    from skimage.metrics import structural_similarity

    pairs = zip(estimate.numpy(), truth.numpy())
    each = [structural_similarity(a, b, channel_axis=0, **options) for a, b in pairs]
    return torch.tensor(each, dtype=torch.float64)


@functools.cache
def _lpips_network() -> nn.Module:
    """LPIPS with the bundled weights, float32 on the CPU; the global generator stays."""
    with warnings.catch_warnings(), own_generator():
        warnings.simplefilter("ignore")  # lpips still calls torchvision by deprecated names
        import lpips as package
        from safetensors.torch import load_file

        network = package.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
        network = network.float()
    network.load_state_dict(load_file(data.bundled_file("lpips_alex.safetensors")))
    return network.requires_grad_(False)


def _pair(
    estimate: torch.Tensor, truth: torch.Tensor, data_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float64 on the CPU, the estimate clamped."""
    estimate, truth = _numbers(estimate, truth, data_range)
    return estimate.clamp(0, data_range), truth


def _numbers(
    estimate: torch.Tensor, truth: torch.Tensor, data_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float64 on the CPU, once they are images of that range."""
    if estimate.shape != truth.shape or truth.ndim != 4 or truth.numel() == 0:
        shapes = f"{list(estimate.shape)} and truth {list(truth.shape)}"
        raise ValueError(
            f"estimate has shape {shapes}; they take the same [N, C, H, W], N at least 1"
        )
    for name, images in (("estimate", estimate), ("truth", truth)):
        of_bytes = images.dtype in WHOLE and data_range >= 255
        if not images.is_floating_point() and not of_bytes:
            raise ValueError(
                f"{name} has dtype {images.dtype}; "
                f"data_range {data_range:g} takes floating point in [0, {data_range:g}]"
            )
        if data_range > 2 and 0 < images.max() <= 1:
            raise ValueError(
                f"{name} runs from {images.min():g} to {images.max():g}, as images in [0, 1] do; "
                f"data_range is {data_range:g}, and theirs is 1"
            )
    estimate, truth = (images.detach().cpu().double() for images in (estimate, truth))
    low, high = float(truth.min()), float(truth.max())
    if not -1e-6 * data_range <= low <= high <= (1 + 1e-6) * data_range:
        raise ValueError(
            f"truth runs from {low:g} to {high:g}; "
            f"data_range {data_range:g} needs values in [0, {data_range:g}]"
        )
    return estimate, truth


def _result(values: torch.Tensor, per_image: bool) -> Score:
    return values if per_image else float(values.mean())
