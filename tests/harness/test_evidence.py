"""Numbers with intervals, and verdicts that follow from them alone."""

import math
import random

import numpy
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial

from dlm_core.harness import evidence, report, tables
from dlm_core.harness.evidence import Verdict

PSNRS = st.floats(-20, 200)


def frame(psnrs, *, networks=1, dataset="digits"):
    """A table of trials: each image on so many networks."""
    rows = [
        {"dataset": dataset, "index": i // networks, "seed": i % networks, "psnr": value}
        for i, value in enumerate(psnrs)
    ]
    return pandas.DataFrame(rows).assign(model="lenet", num_images=1)


@settings(max_examples=100, deadline=None)
@given(st.lists(PSNRS, min_size=10, max_size=40), st.floats(-20, 200))
def test_a_verdict_follows_from_the_interval_alone(psnrs, bound):
    found = evidence.median(frame(psnrs), "DLM+")
    assert found.low <= found.value <= found.high and found.n == len(psnrs)
    at_least, below = found.at_least(bound), found.below(bound)
    expected = (
        Verdict.HOLDS if found.low >= bound
        else Verdict.FAILS if found.high < bound
        else Verdict.UNDECIDED
    )  # fmt: skip
    opposite = {Verdict.HOLDS: Verdict.FAILS, Verdict.FAILS: Verdict.HOLDS}
    assert at_least.verdict is expected
    assert below.verdict is opposite.get(expected, Verdict.UNDECIDED)
    assert at_least.interval == (found.low, found.high)


def test_intervals_cover_what_they_say():
    """95 % of intervals hold the truth, whatever the distribution."""
    draws = random.Random(0)
    missed = {"median": 0, "share": 0, "mean": 0}
    for _ in range(400):
        values = [draws.expovariate(1) for _ in range(20)]
        median = evidence.middle(values, "x", quantity="median")
        missed["median"] += not median.low <= math.log(2) <= median.high
        share = evidence.share(frame([v + 18 for v in values]), "x")  # above 2: e^-2
        missed["share"] += not share.low <= math.exp(-2) <= share.high
        mean = evidence.mean([draws.gauss(0, 1) for _ in range(20)], "x", quantity="mean")
        missed["mean"] += not mean.low <= 0 <= mean.high
    assert all(0 < count <= 36 for count in missed.values()), missed


@pytest.mark.parametrize("n", range(1, 8))
def test_a_median_of_few_has_no_interval_that_95_percent_of_samples_would_not_keep(n):
    """n numbers all lie on one side of the median in one of 2^(n-1) samples."""
    found = evidence.middle([float(i) for i in range(n)], "x", quantity="q", unit="dB")
    assert math.isnan(found.low) == math.isnan(found.high) == (0.5 ** (n - 1) > 0.05)
    assert ("no interval" in str(found)) == (n < 6)


def test_a_mean_of_one_has_no_interval():
    found = evidence.mean([3.0], "x", quantity="q", unit="dB")
    assert math.isnan(found.low) and str(found) == "x: 3.0 dB [no interval of so few]"


def test_wilson_s_interval_is_scipy_s():
    from scipy.stats import binomtest

    for hits, n in ((0, 10), (7, 20), (100, 100)):
        found = evidence.share(frame([30.0] * hits + [10.0] * (n - hits)), "x")
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_fewer_than_ten_images_decide_nothing_however_many_networks():
    many = evidence.share(frame([40.0] * 90, networks=10), "DLM+")
    assert many.n == 9 and many.at_least(0.1).verdict is Verdict.UNDECIDED
    assert many.units == "images, 10 networks"
    enough = evidence.share(frame([40.0] * 100, networks=10), "DLM+")
    assert enough.n == 10 and enough.at_least(0.5).verdict is Verdict.HOLDS


def test_a_trial_without_a_picture_is_the_worst():
    found = evidence.median(frame([math.nan] * 6 + [40.0] * 5), "x")
    assert found.value == found.low == -math.inf and found.below(20).verdict is Verdict.UNDECIDED
    assert "no picture" in str(found)
    assert evidence.share(frame([math.nan] * 5 + [40.0] * 5), "x").value == 0.5


def test_differences_are_taken_image_by_image():
    ours, theirs = frame(numpy.arange(20.0) + 3), frame(numpy.arange(20.0))
    found = evidence.difference(ours.sample(frac=1, random_state=0), theirs, "ours")
    assert (found.low, found.value, found.high) == (3, 3, 3)
    assert found.above(2).verdict is Verdict.HOLDS and found.above(3).verdict is Verdict.FAILS
    both = evidence.share_difference(ours, ours, "the same")
    assert both.value == 0 and -0.15 < both.low < -0.1 and both.high == -both.low
    most = evidence.share_difference(frame([30.0] * 9 + [0.0]), frame([0.0] * 10), "most")
    assert most.value == pytest.approx(0.9) and most.high == 1.0 and 0.4 < most.low < 0.9
    of_several = frame([30.0] * 20, networks=2)
    alike = evidence.share_difference(of_several, frame([0.0] * 10), "several runs an image")
    assert alike.value == 1 and alike.low < 0.6
    with pytest.raises(ValueError, match="no image in common"):
        evidence.difference(ours, frame([1.0], dataset="lfw"), "x")


@pytest.mark.parametrize(
    "more, less", [(0.0, 0.0), (0.05, 0.05), (0.4, 0.0), (0.3, 0.2), (0.7, 0.1)]
)
def test_the_interval_of_a_difference_of_shares_covers_it(more, less):
    """Of all that ten pairs may be, weighed by their probability."""
    covered = 0.0
    for up in range(11):
        for down in range(11 - up):
            low, high = tables.paired([1.0] * up + [-1.0] * down + [0.0] * (10 - up - down))
            chance = multinomial.pmf([up, down, 10 - up - down], 10, [more, less, 1 - more - less])
            covered += chance * (low <= more - less <= high)
    assert covered > 0.94


def test_four_pairs_of_ten_that_differ_one_way_do_not_decide():
    """As a sign test says, p = 0.125; Student's interval was 3 to 77 %."""
    found = evidence.share_difference(frame([30.0] * 10), frame([30.0] * 6 + [0.0] * 4), "x")
    assert found.value == pytest.approx(0.4) and found.above(0).verdict is Verdict.UNDECIDED


def test_networks_that_differ_in_options_or_training_are_several():
    many = frame([40.0] * 10)
    other = [many.assign(**change) for change in ({"trained": 3}, {"model_options.init": "paper"})]
    both = pandas.concat([many.assign(trained=0), *other])
    assert evidence.share(both, "DLM+").units == "images, 3 networks"


def test_of_a_difference_the_networks_of_the_images_in_common_are_counted():
    many = frame([30.0] * 20).assign(seed=range(20))  # an image each on a network of its own
    assert evidence.difference(many, many[:4], "x").units == "images, 4 networks"
    assert evidence.share_difference(many[:4], many, "x").units == "images, 4 networks"


@pytest.mark.parametrize(
    "verdicts, all_hold, one_holds",
    [
        ("HHH", Verdict.HOLDS, Verdict.HOLDS),
        ("HUH", Verdict.UNDECIDED, Verdict.HOLDS),
        ("HFU", Verdict.FAILS, Verdict.HOLDS),
        ("FUF", Verdict.FAILS, Verdict.UNDECIDED),
        ("FFF", Verdict.FAILS, Verdict.FAILS),
    ],
)
def test_all_and_one_of_several(verdicts, all_hold, one_holds):
    made = {
        "H": evidence.median(frame([30.0] * 10), "a").at_least(20),
        "F": evidence.median(frame([10.0] * 10), "b").at_least(20),
        "U": evidence.median(frame([10.0, 30.0] * 10), "c").at_least(20),
    }
    findings = [made[each] for each in verdicts]
    joined = evidence.every(findings)
    assert joined.verdict is all_hold and evidence.some(findings).verdict is one_holds
    assert joined.n == 10 or joined.n == 20
    assert joined.criterion == "each: median PSNR at least 20.0 dB"
    assert all(each.evidence in joined.evidence for each in findings)


def test_what_is_computed_has_no_n_and_is_decided():
    found = evidence.computed(9.0, "DP-SGD", quantity="epsilon").at_most(10)
    assert found.verdict is Verdict.HOLDS and found.n is None and found.interval == (9.0, 9.0)


def test_gaps_and_empty_tables_are_refused():
    with pytest.raises(ValueError, match="frame is empty"):
        evidence.share(frame([1.0]).iloc[:0], "x")
    with pytest.raises(ValueError, match="'k' has gaps"):
        evidence.median(frame([1.0]).assign(k=math.nan), "x", column="k")
    with pytest.raises(ValueError, match="values has gaps"):
        evidence.mean([1.0, math.nan], "x", quantity="q")
    with pytest.raises(ValueError, match="findings is empty"):
        evidence.every([])
    with pytest.raises(TypeError, match="undecided"):
        bool(evidence.computed(1.0, "x", quantity="q").at_least(0))


def test_a_claim_keeps_its_criterion_n_interval_and_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DLM_FIGURES", str(tmp_path))
    run = report.Report("91_works", profile="quick")
    found = evidence.median(frame([math.nan] + [30.0 + i for i in range(9)]), "DLM+ | x")
    run.claim("It works", found.at_least(20), "more", whose="released")
    run.claim("It fails", found.at_least(90), whose="ours", cause="on purpose")
    run.sentence = "Setting: two images."
    run.finish()
    holds, fails = report.read_json(tmp_path / "claims.json")["91_works"]["claims"]
    assert holds["verdict"] == "holds" and holds["criterion"] == "median PSNR at least 20.0 dB"
    assert holds["n"] == 10 and holds["units"] == "images, 1 network"
    assert holds["interval"] == [30.0, 37.0] and holds["evidence"].endswith("; more")
    assert holds["cause"] == "" and fails["cause"] == "on purpose"
    assert "criterion: median PSNR at least 20.0 dB" in capsys.readouterr().out
    page = (tmp_path / "claims.md").read_text()
    assert r"DLM+ \| x" in page  # a bar in a cell would break the table
    assert "Setting: two images.\n\n| statement" in page  # what each claim is about


@pytest.mark.parametrize("n", range(1, 60))
def test_an_interval_holds_its_share_to_the_last_bit(n):
    for hits in range(n + 1):
        frame = pandas.DataFrame({"dataset": "a", "index": range(n), "psnr": 30.0})
        frame.loc[hits:, "psnr"] = 10.0
        found = evidence.share(frame, "")
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_what_two_criteria_ask_of_is_said_once():
    found = evidence.middle([1.0] * 12, "a", quantity="b", unit="dB", units="images")
    both = evidence.every([found.at_least(-3), found.at_most(3)])
    assert both.evidence.count("a: ") == 1 and both.verdict is Verdict.HOLDS


@pytest.mark.parametrize(
    "of, said",
    [
        (lambda every: every, "no Series of frame's rows"),
        (lambda every: every[:3], "no Series of frame's rows"),
        (lambda every: list(every[every.index >= 6]), "no Series of frame's rows"),
        (lambda every: every[every.index >= 6].astype(float) * 2, "other values than True and"),
        (lambda every: every[every.index >= 6].where(every.index[6:] > 6), "other values than"),
    ],
    ids=["all rows", "fewer", "a list", "numbers", "a gap"],
)
def test_a_share_of_other_rows_is_refused(of, said):
    columns = {"dataset": "digits", "index": range(6), "seed": 0, "model": "mlp", "psnr": 9.0}
    frame = pandas.DataFrame(columns)
    both = pandas.concat([frame, frame], ignore_index=True)
    second = both[both.index >= 6]
    with pytest.raises(ValueError, match=said):
        evidence.share(second, "second", of=of(both.psnr > 8), quantity="share")
