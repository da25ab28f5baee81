"""How close an estimate comes to the true images, [N, C, H, W] both; and how the released code measured it.

Every function takes any floating dtype and device and changes nothing it is given. Except for the two ``released_`` ones,
estimates are first clamped to [0, data_range], as any viewer does; a NaN in them stays and makes the metric NaN. Where
several images are given, the float returned is the mean over the images; ``per_image=True`` gives all N (float64, CPU).

Raises ValueError for unequal shapes, and for true images that leave [0, data_range]: they would make the range a lie.
"""

import functools
import math
import warnings

import torch

from dlm_core import check, data

CIFAR100_STD = (0.2673342823982239, 0.2564384639263153, 0.2761504650115967)


def psnr(estimate, truth, *, data_range, per_image=False):
    """10·log10(data_range²/MSE) in dB, one MSE per image over all its channels; infinite for identical images."""
    estimate, truth = _pair(estimate, truth, data_range)
    mse = (estimate - truth).square().flatten(1).mean(1)
    return _result(10 * torch.log10(data_range**2 / mse), per_image)


def ssim(estimate, truth, *, data_range, per_image=False):
    """Structural similarity in [-1, 1], mean over the channels; uniform 7x7 window, or the largest odd one that fits.

    Raises ValueError for images below 3x3.
    """
    estimate, truth = _pair(estimate, truth, data_range)
    smallest = min(truth.shape[2:])
    if smallest < 3:
        raise ValueError(f"images are {truth.shape[2]}x{truth.shape[3]}; ssim takes 3x3 or more")
    window = min(7, smallest - 1 + smallest % 2)
    return _result(_ssim(estimate, truth, win_size=window, data_range=data_range), per_image)


def lpips(estimate, truth, *, data_range=1.0, per_image=False):
    """Learned perceptual distance (Zhang et al. 2018, AlexNet, v0.1); 0 for identical images.

    The scale depends on the size: unrelated photographs are about 0.3 apart at 32x32, 0.55 at 64x64. Grey images are
    repeated to three channels, values scaled to [-1, 1] as the network expects (the released code passes them in [0, 1]).
    Raises ValueError below 31x31, where AlexNet has no pixel left: enlarging images changes the distance, so do it openly.
    """
    estimate, truth = _pair(estimate, truth, data_range)
    if min(truth.shape[2:]) < 31 or truth.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {list(truth.shape[1:])}; lpips takes 1 or 3 channels and 31x31 pixels or more")
    network = _lpips_network()
    with torch.no_grad():
        distance = network(*((2 * x / data_range - 1).float().expand(-1, 3, -1, -1) for x in (estimate, truth)))
    return _result(distance.flatten().double(), per_image)


def exact_pixel_rate(estimate, truth):
    """Share of the values (pixel by channel) equal after rounding to 8 bits; 8-bit images in [0, 1]. A NaN equals nothing."""
    estimate, truth = (torch.round(255 * images) for images in _pair(estimate, truth, 1.0))
    return float((estimate == truth).double().mean())


def success(psnr_value, threshold=20.0):
    """Whether an attack counts as successful: PSNR of at least ``threshold`` dB. NaN does not."""
    return bool(psnr_value >= threshold)


def match(estimates, truths):
    """The order [N] in which ``estimates[order]`` fits ``truths`` best: least total MSE over all orders.

    A batch's gradient does not tell the order of its images. Images in [0, 1]; a NaN is taken for black.
    """
    from scipy.optimize import linear_sum_assignment

    estimates, truths = (images.nan_to_num().flatten(1) for images in _pair(estimates, truths, 1.0))
    cost = torch.cdist(truths, estimates, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def released_psnr(estimate, truth):
    """PSNR as in the released code: mean over channels of 10·log10(σ_c⁻²/MSE), σ_c CIFAR-100's standard deviations.

    One MSE over all images given, in [0, 1] and not clamped: 11.49 dB above the standard value of the same error.
    """
    _check_shapes(estimate, truth)
    mse = (estimate.detach().cpu().double() - truth.detach().cpu().double()).square().mean()
    return float((10 * torch.log10(torch.tensor(CIFAR100_STD, dtype=torch.float64) ** -2 / mse)).mean())


def released_ssim(estimate, truth):
    """SSIM as in the released code: Gaussian 11x11 window, data_range 255 for images in [0, 1], no clamping.

    The constants that stabilise the quotient then outweigh every variance, so that any pair of images scores near 1.
    Mean over the images. Raises ValueError for images below 11x11.
    """
    _check_shapes(estimate, truth)
    if min(truth.shape[2:]) < 11:
        raise ValueError(f"images are {truth.shape[2]}x{truth.shape[3]}; released_ssim takes 11x11 or more")
    released = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return float(_ssim(*(images.detach().cpu().double() for images in (estimate, truth)), **released).mean())


def _ssim(estimate, truth, **options):
    from skimage.metrics import structural_similarity

    pairs = zip(estimate.numpy(), truth.numpy())
    return torch.tensor([structural_similarity(a, b, channel_axis=0, **options) for a, b in pairs], dtype=torch.float64)


@functools.cache
def _lpips_network():
    """LPIPS with the bundled weights, float32 on the CPU; the global random generator is left as it was."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # lpips still calls torchvision by deprecated names
        import lpips as package
        from safetensors.torch import load_file

        network = package.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).float()
    network.load_state_dict(load_file(data.bundled_file("lpips_alex.safetensors")))
    return network.requires_grad_(False)


def _pair(estimate, truth, data_range):
    """Both as float64 on the CPU, the estimate clamped."""
    check.in_range("data_range", data_range, 0, math.inf, open_low=True)
    _check_shapes(estimate, truth)
    estimate, truth = (images.detach().cpu().double() for images in (estimate, truth))
    low, high = float(truth.min()), float(truth.max())
    if not -1e-6 * data_range <= low <= high <= (1 + 1e-6) * data_range:
        raise ValueError(
            f"truth runs from {low:g} to {high:g}; data_range {data_range:g} needs values in [0, {data_range:g}]"
        )
    return estimate.clamp(0, data_range), truth


def _check_shapes(estimate, truth):
    if estimate.shape != truth.shape or truth.ndim != 4 or truth.numel() == 0:
        shapes = f"{list(estimate.shape)} and truth {list(truth.shape)}"
        raise ValueError(f"estimate has shape {shapes}; they take the same [N, C, H, W], N at least 1")


def _result(values, per_image):
    return values if per_image else float(values.mean())
