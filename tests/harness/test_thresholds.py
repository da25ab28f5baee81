"""When a picture counts as shown."""

import pytest

from dlm_core import data
from dlm_core.harness import thresholds
from dlm_core.harness.all_rounds import RESERVED


def baselines(dataset, count, **how):
    guessed = thresholds.guesses(dataset, range(count), **how)
    return guessed, thresholds.baselines(guessed).set_index("guess")


def test_twenty_db_is_this_digit_and_no_other():
    _, table = baselines("digits", 40, reserved=RESERVED)
    nearest = table.loc["nearest other image"]
    assert table.loc["grey square"].psnr < table.loc["mean image"].psnr < nearest.psnr
    assert 15 < nearest.psnr < thresholds.shown("digits")  # 15 dB is reached by another digit
    assert nearest["at the threshold"] < 0.3


def test_on_colour_images_no_guess_is_near():
    guessed, table = baselines("cifar100", 20, reserved=20, source="bundled")
    assert (table["at the threshold"] == 0).all()
    assert not {0.0, float("inf")} & set(guessed.psnr)  # none is guessed by itself


def test_a_guess_knows_no_reserved_image():
    guessed, _ = baselines("digits", 3, reserved=1796)
    last = data.load("digits").images[1796]
    error = (data.load("digits").images[0] - last).square().mean()
    (nearest,) = guessed[(guessed["index"] == 0) & (guessed.guess == "nearest other image")].psnr
    assert nearest == pytest.approx(-10 * float(error.log10()), abs=1e-3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: thresholds.shown("lfw"), "lfw"),
        (lambda: thresholds.guesses("digits", [], reserved=100), "at least 1"),
        (lambda: thresholds.guesses("digits", [1797], reserved=100), "digits has 1797 images"),
    ],
)
def test_what_is_not_there_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
