"""What is done to a finished picture."""

import math

import pytest
import torch

from dlm_core import data, metrics
from dlm_core.harness import afterwards
from dlm_core.harness.trials import Trial


@pytest.fixture
def truth():
    return data.load("cifar100", n=1).images


def test_one_factor_of_brightness_is_undone(truth):
    assert afterwards.brightness(4 * truth, truth) == pytest.approx(0.25)
    record = {"arrays": {"images": 4 * truth}}
    (after,) = afterwards.refitted_psnrs([Trial()], [record])
    assert after > 100
    (before,) = afterwards.psnrs([Trial()], [record], lambda images: images)
    assert before == pytest.approx(float(metrics.psnr(4 * truth, truth, data_range=1.0)))


def test_the_factor_fits_best(truth):
    noisy = truth + 0.3 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    best = afterwards.brightness(noisy, truth)
    errors = [float((f * noisy - truth).square().sum()) for f in (best - 0.01, best, best + 0.01)]
    assert min(errors) == errors[1]


def test_each_trial_is_compared_with_its_own_images():
    plan = [Trial(index=3), Trial(index=5, num_images=2)]
    records = [
        {"arrays": {"images": data.load("cifar100", indices=indices).images}}
        for indices in ([3], [5, 6])
    ]
    assert min(afterwards.refitted_psnrs(plan, records)) > 100
    assert max(afterwards.refitted_psnrs(plan[:1], records[:1])) > 100


def test_a_trial_without_a_picture_is_the_worst():
    records = [{"arrays": {}}]
    assert afterwards.psnrs([Trial()], records, afterwards.scaled) == [-math.inf]
    assert afterwards.refitted_psnrs([Trial()], records) == [-math.inf]


def test_a_median_takes_single_pixels_out_and_stays_within_the_range():
    images = torch.full((1, 3, 8, 8), 0.5)
    images[0, :, 4, 4] = 7.0
    assert torch.equal(afterwards.filtered(images), torch.full((1, 3, 8, 8), 0.5))


def test_the_brightest_value_becomes_white(truth):
    assert float(afterwards.scaled(3 * truth).max()) == 1.0
    assert torch.equal(afterwards.scaled(torch.zeros(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))
