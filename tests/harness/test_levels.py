"""Clients whose W_t was rounded on its way into a file."""

import copy

import pytest
import torch
from torch import nn

from dlm_core import metrics
from dlm_core.harness import account, levels
from tests.harness.audited import IMAGES, LABELS, asked, linear, network, snapshots

NETWORK = network(linear(64, 32), nn.ReLU, linear(32, 10))


def rounded(weights, dtype):
    return {name: w.to(dtype).to(w.dtype) for name, w in weights.items()}


def in_eight_bits(weights):
    """Whole multiples of a step for each tensor."""
    steps = {name: w.abs().max() / 127 for name, w in weights.items()}
    return {name: (w / steps[name]).round() * steps[name] for name, w in weights.items()}


def psnr(found):
    return float(metrics.psnr(found["exact"].images.float(), IMAGES[:1], data_range=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_client_that_trained_from_finer_weights_is_recovered(dtype, tmp_path, capsys):
    before, after = snapshots(NETWORK)
    found = asked(NETWORK, (rounded(before, dtype), after), tmp_path, attack="exact")
    assert found.verdict == "leaked" and psnr(found) > 35
    assert "4 of 4 tensors of W_t (before) are rounded" in capsys.readouterr().out


def test_eight_bits_hide_no_image_but_may_hide_a_second(tmp_path):
    before, after = snapshots(NETWORK)
    found = asked(NETWORK, (in_eight_bits(before), after), tmp_path, attack="exact")
    assert found.verdict == "partly" and psnr(found) > 35
    assert "two images of one class" in found.beliefs["exact"].doubt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_that_trained_from_the_rounded_weights_is_recovered_exactly(dtype, tmp_path):
    model = copy.deepcopy(NETWORK)
    model.load_state_dict(rounded(NETWORK.state_dict(), dtype))
    found = asked(model, snapshots(model), tmp_path, attack="exact")
    assert found.verdict == "leaked" and psnr(found) > 80


def test_of_two_images_none_is_believed(tmp_path):
    before, after = snapshots(NETWORK, IMAGES[:2], LABELS[:2])
    sent = rounded(before, torch.bfloat16), after
    assert asked(NETWORK, sent, tmp_path, attack="exact").verdict != "leaked"


@pytest.mark.parametrize("rounding", [in_eight_bits, lambda w: rounded(w, torch.bfloat16)])
def test_where_no_image_is_shown_the_rounding_is_said_to_hide_one_perhaps(
    rounding, tmp_path, capsys
):
    """A step far smaller than what was rounded away."""
    model = network(linear(64, 32), nn.Sigmoid, linear(32, 10))
    before, after = snapshots(model)
    after = {name: before[name] + 0.001 * (after[name] - before[name]) for name in after}
    sent = rounding(before), after
    found = asked(model, sent, tmp_path, attack="exact")
    assert found.verdict != "leaked" and "may hide a leak" in found.sentence
    assert "may hide a leak" in capsys.readouterr().out
    assert "may hide a leak" in account.account(found)["sentence"]


def by_tensor(w):
    return w.abs().max() / 127


def by_row(w):
    return w.abs().amax(1, keepdim=True) / 127


@pytest.mark.parametrize("scale", [by_tensor, by_row])
def test_eight_bits_are_seen(scale):
    fine = torch.rand(6, 20, generator=torch.Generator().manual_seed(0)) - 0.5
    step = scale(fine)
    variance = levels.rounding_of({"w": (fine / step).round() * step})["w"]
    assert torch.allclose(variance, (step.double() ** 2 / 12).expand(6, 20), rtol=1e-5)
    assert levels.rounding_of({"w": fine}) == {}


@pytest.mark.parametrize(
    "w",
    [
        torch.ones(30),  # batch norm's
        torch.full((30,), 0.1),
        torch.zeros(30),
        torch.tensor([0.1234567, *[0.0] * 29]),
        torch.rand(30, 1),  # a scale for each of its outputs is the weight itself
        torch.arange(30),
    ],
)
def test_round_numbers_are_no_sign_of_rounding(w):
    assert levels.rounding_of({"w": w}) == {}
