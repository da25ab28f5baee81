"""The metrics against known values and independent formulas; their inputs stay as they were."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dlm_core import data, metrics

CIFAR = data.load("cifar100", source="bundled").images
RANGED = {"psnr": metrics.psnr, "ssim": metrics.ssim, "lpips": metrics.lpips}
PAIRED = [
    *(lambda e, t, f=f: f(e, t, data_range=1.0) for f in RANGED.values()),
    metrics.exact_pixel_rate,
]
PAIRED += [metrics.released_psnr, metrics.released_ssim, metrics.match]


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- PSNR


@pytest.mark.parametrize(
    "offset, decibels", [(0.1, 20), (0.01, 40), (0.5, 20 * math.log10(2)), (1.0, 0)]
)
def test_psnr_of_a_constant_error(offset, decibels):
    truth = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    value = metrics.psnr(truth + offset, truth, data_range=1.0)
    assert type(value) is float and value == pytest.approx(decibels, abs=1e-9)
    assert metrics.psnr(255 * (truth + offset), 255 * truth, data_range=255) == pytest.approx(
        decibels, abs=1e-9
    )


def test_psnr_agrees_with_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio

    estimate = noise(20, 3, 32, 32)
    each = metrics.psnr(estimate, CIFAR, data_range=1.0, per_image=True)
    expected = [
        peak_signal_noise_ratio(t, e, data_range=1)
        for e, t in zip(estimate.double().numpy(), CIFAR.double().numpy())
    ]
    assert each.shape == (20,) and each.dtype == torch.float64
    assert each.tolist() == pytest.approx(expected, abs=1e-9)
    assert metrics.psnr(estimate, CIFAR, data_range=1.0) == pytest.approx(
        np.mean(expected), abs=1e-9
    )


def test_psnr_of_identical_images_is_infinite():
    assert metrics.psnr(CIFAR, CIFAR, data_range=1.0) == math.inf


def test_estimates_are_clamped_as_a_viewer_does():
    truth = torch.ones(1, 1, 4, 4)
    assert metrics.psnr(truth + 5, truth, data_range=1.0) == math.inf
    assert metrics.psnr(truth * math.inf, truth, data_range=1.0) == math.inf
    assert metrics.psnr(truth - 9, truth, data_range=1.0) == 0


@given(seed=st.integers(0, 1000), scale=st.floats(0.5, 300))
@settings(deadline=None, max_examples=25)
def test_psnr_is_symmetric_and_knows_no_units(seed, scale):
    a, b = noise(2, 1, 3, 5, 4, seed=seed).double()
    value = metrics.psnr(a, b, data_range=1.0)
    assert value >= 0
    assert metrics.psnr(b, a, data_range=1.0) == pytest.approx(value)
    assert metrics.psnr(scale * a, scale * b, data_range=scale) == pytest.approx(value)


@given(seed=st.integers(0, 1000), factor=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=25)
def test_psnr_rises_as_the_error_shrinks(seed, factor):
    truth, estimate = noise(2, 1, 3, 5, 4, seed=seed).double()
    closer = truth + factor * (estimate - truth)
    gain = metrics.psnr(closer, truth, data_range=1.0) - metrics.psnr(
        estimate, truth, data_range=1.0
    )
    assert gain == pytest.approx(-20 * math.log10(factor))


# --- SSIM


def test_ssim_is_one_for_identical_and_near_zero_for_unrelated_images():
    assert metrics.ssim(CIFAR, CIFAR, data_range=1.0) == pytest.approx(1)
    assert abs(metrics.ssim(noise(20, 3, 32, 32), CIFAR, data_range=1.0)) < 0.05


def test_ssim_agrees_with_its_definition():
    # One 7x7 image has one window, and with unbiased σ² and cov
    # SSIM = (2 μμ' + C1)(2 cov + C2) / ((μ² + μ'² + C1)(σ² + σ'² + C2)).
    a, b = noise(2, 1, 1, 7, 7, seed=3).double()
    c1, c2 = 0.01**2, 0.03**2
    covariance = torch.cov(torch.stack([a.flatten(), b.flatten()]))
    brightness = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
    structure = (2 * covariance[0, 1] + c2) / (covariance[0, 0] + covariance[1, 1] + c2)
    assert metrics.ssim(a, b, data_range=1.0) == pytest.approx(
        float(brightness * structure), abs=1e-9
    )
    assert metrics.ssim(255 * a, 255 * b, data_range=255) == pytest.approx(
        float(brightness * structure), abs=1e-9
    )


@pytest.mark.parametrize("size", [(3, 3), (4, 9), (6, 6), (8, 8), (25, 25)])
def test_ssim_of_small_images(size):
    truth = noise(2, 1, *size)
    assert metrics.ssim(truth, truth, data_range=1.0) == pytest.approx(1)
    assert metrics.ssim(1 - truth, truth, data_range=1.0) < 0.2


def test_ssim_refuses_images_without_a_window():
    with pytest.raises(ValueError, match="images are 2x9; ssim takes 3x3 or more"):
        metrics.ssim(noise(1, 1, 2, 9), noise(1, 1, 2, 9), data_range=1.0)


# --- LPIPS


@pytest.mark.parametrize(
    "first, second, distance", [(0, 1, 0.2309), (0, 2, 0.1806), (1, 3, 0.1479)]
)
def test_lpips_golden_values(first, second, distance):
    a, b = CIFAR[first : first + 1], CIFAR[second : second + 1]
    assert metrics.lpips(a, b) == pytest.approx(distance, abs=6e-5)
    assert metrics.lpips(b, a) == pytest.approx(distance, abs=6e-5)
    assert metrics.lpips(255 * a, 255 * b, data_range=255) == pytest.approx(distance, abs=6e-5)


def test_lpips_of_several_images_and_of_grey_ones():
    each = metrics.lpips(CIFAR[:3], CIFAR[[1, 2, 2]], per_image=True)
    assert each[0] == pytest.approx(0.2309, abs=6e-5) and each[2] == 0
    assert metrics.lpips(CIFAR[:3], CIFAR[[1, 2, 2]]) == pytest.approx(float(each.mean()))
    a, b = CIFAR[:1, :1], CIFAR[1:2, :1]
    assert metrics.lpips(a, b) == metrics.lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)) > 0.01


def test_lpips_heads_are_those_of_the_lpips_package():
    import lpips

    shipped = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth",
        map_location="cpu",
        weights_only=True,
    )
    loaded = metrics._lpips_network().state_dict()
    assert len(shipped) == 5
    for name, tensor in shipped.items():
        assert torch.equal(loaded[name], tensor)


def test_lpips_loads_silently_and_leaves_the_global_generator_alone():
    metrics._lpips_network.cache_clear()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.lpips(CIFAR[:1], CIFAR[:1])
    assert torch.equal(torch.get_rng_state(), before)
    network = metrics._lpips_network()
    assert not network.training and not any(
        parameter.requires_grad for parameter in network.parameters()
    )
    assert network is metrics._lpips_network(), "read once"


def test_lpips_smallest_size():
    assert metrics.lpips(noise(1, 3, 31, 31), noise(1, 3, 31, 31, seed=1)) > 0
    for shape in ((1, 3, 30, 40), (1, 1, 25, 25), (1, 2, 32, 32)):
        with pytest.raises(
            ValueError, match="lpips takes 1 or 3 channels and 31x31 pixels or more"
        ):
            metrics.lpips(noise(*shape), noise(*shape))


# --- 8-bit pixels, success, matching


def test_exact_pixel_rate():
    assert metrics.exact_pixel_rate(CIFAR + 0.49 / 255, CIFAR) == 1
    assert metrics.exact_pixel_rate(CIFAR - 0.49 / 255, CIFAR) == 1
    truth = torch.full((1, 3, 4, 4), 100 / 255)
    assert metrics.exact_pixel_rate(truth + 0.51 / 255, truth) == 0
    for wrong in (101 / 255, math.nan, 7.0):
        estimate = truth.clone()
        estimate[0, 1, 2, 3] = wrong
        assert metrics.exact_pixel_rate(estimate, truth) == pytest.approx(47 / 48)


def test_success():
    assert metrics.success(20.0) is True and metrics.success(19.99) is False
    assert metrics.success(29.9, threshold=30) is False and metrics.success(math.inf) is True
    assert metrics.success(math.nan) is False
    assert metrics.success(torch.tensor(25.0)) is True


@given(order=st.permutations(range(6)), level=st.floats(0, 0.05))
@settings(deadline=None, max_examples=25)
def test_match_undoes_any_order(order, level):
    truths = CIFAR[:6]
    shuffled = (
        truths + level * torch.randn(truths.shape, generator=torch.Generator().manual_seed(0))
    )[list(order)]
    found = metrics.match(shuffled, truths)
    assert found.dtype == torch.int64
    assert [order[i] for i in found.tolist()] == list(range(6))


def test_match_gives_each_image_away_once_and_bears_nan():
    truths = torch.tensor([0.5, 0.6, 1.0])[:, None, None, None].expand(3, 1, 2, 2)
    estimates = torch.tensor([0.58, math.nan, 0.9])[:, None, None, None].expand(3, 1, 2, 2)
    # Both 0.58 and 0.9 are nearest to 0.6 or 1.0: the broken one is left with 0.5, though it
    # fits nothing.
    assert metrics.match(estimates, truths).tolist() == [1, 0, 2]


# --- as the released code measures


def released_formula(estimate, truth):
    """The released PSNR, in numpy."""
    mse = np.mean((estimate.numpy() - truth.numpy()) ** 2)
    return np.mean(
        [
            10 * np.log10((1 / std) ** 2 / mse)
            for std in (0.2673342823982239, 0.2564384639263153, 0.2761504650115967)
        ]
    )


def test_released_psnr_is_11_5_dB_above_the_standard():
    estimate = noise(1, 3, 32, 32).double()
    truth = CIFAR[:1].double()
    value = metrics.released_psnr(estimate, truth)
    assert value == pytest.approx(released_formula(estimate, truth), abs=1e-9)
    assert value - metrics.psnr(estimate, truth, data_range=1.0) == pytest.approx(11.49, abs=0.01)


def test_released_psnr_neither_clamps_nor_separates_images():
    truth = CIFAR[:2].double()
    estimate = truth.clone()
    estimate[0] += 3
    assert metrics.released_psnr(estimate, truth) == pytest.approx(
        released_formula(estimate, truth), abs=1e-9
    )
    assert metrics.released_psnr(estimate, truth) == pytest.approx(
        11.4854 - 10 * math.log10(4.5), abs=1e-3
    )
    assert metrics.released_psnr(truth, truth) == math.inf


def gaussian_ssim(x, y, data_range):
    """SSIM with an 11x11 Gaussian window of σ 1.5 and no padding, as pytorch-msssim computes it."""
    window = torch.exp(-(torch.arange(-5.0, 6, dtype=x.dtype) ** 2) / (2 * 1.5**2))
    kernel = torch.outer(window, window)[None, None] / window.sum() ** 2

    def mean(images):
        return F.conv2d(images.flatten(0, 1)[:, None], kernel)

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    brightness = (2 * mean(x) * mean(y) + c1) / (mean(x) ** 2 + mean(y) ** 2 + c1)
    return float((brightness * (2 * covariance + c2) / (variances + c2)).mean())


def test_released_ssim_agrees_with_pytorch_msssim():
    unrelated = torch.randn(
        2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    truth = CIFAR[:2].double()
    assert metrics.released_ssim(unrelated, truth) == pytest.approx(
        gaussian_ssim(unrelated, truth, 255), abs=1e-9
    )
    # Recorded from pytorch-msssim 1.0.0, ssim(..., data_range=255), images 1 and 2 against 0 and 1.
    assert metrics.released_ssim(CIFAR[1:3], CIFAR[:2]) == pytest.approx(0.98971, abs=1e-5)


def test_released_ssim_calls_noise_a_success():
    unrelated = noise(1, 3, 32, 32)
    assert (
        metrics.released_ssim(unrelated, CIFAR[:1]) > 0.95
        and metrics.ssim(unrelated, CIFAR[:1], data_range=1.0) < 0.1
    )
    with pytest.raises(ValueError, match="images are 8x8; released_ssim takes 11x11 or more"):
        metrics.released_ssim(noise(1, 3, 8, 8), noise(1, 3, 8, 8))


# --- what holds for all


@pytest.mark.parametrize("metric", PAIRED)
def test_unequal_or_misshapen_images_are_refused(metric):
    for estimate, truth in ((CIFAR[:1], CIFAR[:2]), (CIFAR[0], CIFAR[0]), (CIFAR[:0], CIFAR[:0])):
        with pytest.raises(
            ValueError,
            match=r"estimate has shape \[.*\] and truth \[.*\]; they take the same \[N, C, H, W\]",
        ):
            metric(estimate, truth)


@pytest.mark.parametrize("metric", PAIRED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_and_inputs_stay_as_they_were(metric, dtype):
    estimate, truth = noise(2, 3, 32, 32).to(dtype).requires_grad_(), CIFAR[:2].to(dtype)
    kept = estimate.detach().clone(), truth.clone()
    value = metric(estimate, truth)
    assert torch.as_tensor(value).tolist() == pytest.approx(
        torch.as_tensor(metric(kept[0].double(), kept[1].double())).tolist()
    )
    assert (
        torch.equal(estimate, kept[0]) and torch.equal(truth, kept[1]) and estimate.dtype == dtype
    )


@pytest.mark.parametrize("name", RANGED)
def test_nan_stays_visible_and_in_its_own_image(name):
    estimate = CIFAR[:3].clone()
    estimate[1, 0, 5, 5] = math.nan
    each = RANGED[name](estimate, CIFAR[:3], data_range=1.0, per_image=True)
    assert each.isnan().tolist() == [False, True, False]
    assert math.isnan(RANGED[name](estimate, CIFAR[:3], data_range=1.0))


@pytest.mark.parametrize("name", RANGED)
def test_a_wrong_data_range_is_refused(name):
    for wrong in (0, -1, math.inf, math.nan, "1"):
        with pytest.raises(ValueError, match="data_range is"):
            RANGED[name](CIFAR[:1], CIFAR[:1], data_range=wrong)
    with pytest.raises(
        ValueError, match=r"truth runs from .* to .*; data_range 1 needs values in \[0, 1\]"
    ):
        RANGED[name](CIFAR[:1], 2 * CIFAR[:1] - 1, data_range=1.0)
    with pytest.raises(ValueError, match="truth runs from"):
        RANGED[name](255 * CIFAR[:1], 255 * CIFAR[:1], data_range=1.0)
    with pytest.raises(ValueError, match="truth runs from"):
        RANGED[name](CIFAR[:1], CIFAR[:1] * math.nan, data_range=1.0)


BYTES = (CIFAR[:2] * 255).round().to(torch.uint8)


@pytest.mark.parametrize("name", RANGED)
def test_bytes_and_shares_are_not_mixed(name):
    metric = RANGED[name]
    for estimate, truth in ((BYTES, CIFAR[:2]), (BYTES, BYTES), (BYTES.numpy(), CIFAR[:2])):
        with pytest.raises(ValueError, match="estimate has dtype torch.uint8; data_range 1 takes"):
            metric(estimate, truth, data_range=1.0)
    with pytest.raises(ValueError, match="estimate runs from .*in .0, 1.* data_range is 255"):
        metric(CIFAR[:2], CIFAR[:2], data_range=255)
    with pytest.raises(ValueError, match="truth runs from .*in .0, 1.* data_range is 255"):
        metric(BYTES, CIFAR[:2], data_range=255)
    assert metric(BYTES, 255 * CIFAR[:2], data_range=255) == pytest.approx(
        metric(BYTES / 255, CIFAR[:2], data_range=1.0), rel=1e-4
    )


@pytest.mark.parametrize("metric", PAIRED)
def test_numpy_arrays_are_taken(metric):
    found = metric(CIFAR[:2].numpy(), CIFAR[1:3].numpy())
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(metric(CIFAR[:2], CIFAR[1:3])))


@pytest.mark.parametrize("metric", PAIRED)
def test_a_truth_outside_its_range_is_refused_by_all(metric):
    for wrong in (CIFAR[:2] * 255, CIFAR[:2] - 1):
        with pytest.raises(ValueError, match="truth runs from"):
            metric(CIFAR[:2], wrong)


def test_success_is_of_one_number():
    for wrong in ("20", None, torch.tensor([20.0, 30.0])):
        with pytest.raises(ValueError, match="psnr_value is"):
            metrics.success(wrong)
