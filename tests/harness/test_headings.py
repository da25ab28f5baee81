"""Tables as readers see them."""

import math

import pandas
import pytest

from dlm_core import records
from dlm_core.harness import headings, sweeps


@pytest.fixture
def frame():
    trials = {"attack": ["dlm_plus"] * 4, "num_images": [1] * 4, "psnr": [10.0, 18.0, 25.0, 37.0]}
    found = sweeps.summarise(pandas.DataFrame(trials), ["attack", "num_images"])
    return found.assign(chi2=[8.25e14], over_rounding=[3.0])


def test_a_share_stands_beside_its_interval_and_a_median_beside_its_quartiles(frame):
    shown = headings.shown(frame, digits=1)
    assert shown["share at 20 dB [95 %]"].tolist() == ["50 % [15, 85]"]
    assert shown["median PSNR, dB [quartiles]"].tolist() == ["21.5 [16.0, 28.0]"]
    assert not {"low_20", "high_20", "psnr_25", "psnr_75"} & set(shown.columns)


def test_keys_have_their_titles_and_columns_their_headings(frame):
    shown = headings.shown(frame, digits=1)
    assert shown["attack"].tolist() == ["DLM+"]
    assert shown["images in a step"].tolist() == [1]
    assert shown["χ²/N"].tolist() == ["8.25e+14"]
    assert shown["over_rounding"].tolist() == ["3"]  # a name of the notebook's own stays


def test_a_word_that_is_a_key_of_two_tables_goes_by_its_column():
    shown = headings.shown(pandas.DataFrame({"attack": ["noise"], "defence": ["noise"]}), 1)
    assert shown.iloc[0].tolist() == [records.ATTACKS["noise"].title, "noise (released)"]


def test_gaps_are_empty_and_infinity_is_a_word():
    frame = pandas.DataFrame({"psnr": [math.nan, math.inf, 0.25], "why": ["nan", math.nan, "a|b"]})
    shown = headings.shown(frame, digits=1)
    assert shown["PSNR, dB"].tolist() == ["", "inf", "0.2"]
    assert shown["why"].tolist() == ["", "", "a|b"]


def test_a_median_of_counts_that_ends_in_a_half_leaves_the_others_whole():
    frame = pandas.DataFrame({"evaluations": [200.0, 65.5, math.nan], "psnr": [20.0, 30.5, 10.0]})
    shown = headings.shown(frame, digits=2)
    assert shown["evaluations"].tolist() == ["200", "65.5", ""]
    assert shown["PSNR, dB"].tolist() == ["20.00", "30.50", "10.00"]


@pytest.mark.parametrize("missing", ["low_20", "psnr_75"])
def test_half_an_interval_is_shown_as_it_is(frame, missing):
    shown = headings.shown(frame.drop(columns=missing), digits=1)
    ((name, (low, high, _)),) = [one for one in headings.INTERVALS.items() if missing in one[1]]
    (left,) = {low, high} - {missing}
    assert headings.HEADINGS[name] in shown.columns and left in shown.columns


def test_two_columns_of_one_heading_keep_apart():
    shown = headings.shown(pandas.DataFrame({"bound": [1.5], "bound_psnr": [2.5]}), digits=1)
    assert shown.columns.tolist() == ["bound, dB", "bound_psnr"]


def test_the_frame_is_left_as_it_was(frame):
    before = frame.copy()
    headings.shown(frame, digits=1)
    pandas.testing.assert_frame_equal(frame, before)
