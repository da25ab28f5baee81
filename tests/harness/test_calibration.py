"""Audits judged by the truth: what is not the client's is called wrong."""

import math
from collections import Counter

import pytest

from dlm_core.harness import calibration, kinds, sweeps
from dlm_core.harness.audit import audit
from dlm_core.harness.calibration import Case


def asked(client, tmp_path, attack="all"):
    found = tmp_path / "found.png"
    shape = tuple(client.images.shape[1:])
    how = {"model": client.network, "image_shape": shape, "out": found, "attack": attack}
    return audit(client.before, client.after, **how)


def test_half_of_the_clients_of_each_kind_set_no_threshold():
    every = calibration.cases(6)
    counts = Counter((case.kind, case.half) for case in every)
    assert counts == {(k, half): 3 for k in kinds.KINDS for half in ("calibration", "test")}
    # more clients leave the others where they are, and the halves are no pattern
    assert [case.half for case in calibration.cases(2)] == [c.half for c in every if c.index < 2]
    assert len({case.half for case in every if case.index == 0}) == 2


def test_leaks_are_right_for_their_client_and_wrong_for_another(tmp_path):
    client, other = kinds.make("MLP", 0), kinds.make("MLP", 1)
    assert client.classes != other.classes
    found = asked(client, tmp_path)
    assert {each.what for each in found.leaks} == {"image", "label", "input of layer '3'"}
    for leak in found.leaks:
        assert calibration.right(leak, found, client)[0]
        assert not calibration.right(leak, found, other)[0]


def test_a_picture_is_held_against_the_nearest_image():
    client = kinds.make("MLP, 4 images", 0)
    assert calibration.quality(client.images.flip(0), client) == [300.0] * 4
    blend = client.images.mean(0, keepdim=True)
    assert calibration.quality(blend, client)[0] < calibration.RIGHT


def test_pixels_are_measured_from_the_client_s_black_to_its_white():
    client = kinds.make("LeNet, 2 steps, normalised", 0)
    grey = client.images + 0.1 / kinds.STD  # a tenth of its range
    assert calibration.quality(grey, client)[0] == pytest.approx(20.0, abs=1e-3)


def test_a_division_shows_what_leaks_without_the_audit():
    assert calibration.by_algebra(kinds.make("MLP, dropout", 0)) > 60
    assert calibration.by_algebra(kinds.make("LeNet", 0)) == -math.inf


def test_an_audited_client_is_a_record_that_is_stored(tmp_path):
    case = Case("MLP, squared loss", 0)
    record = sweeps.sweep([case], jobs=1, store=tmp_path)[0]
    assert record["verdict"] == "leaked" and all(each["right"] for each in record["leaks"])
    assert record["reached"] > 60 and record["algebra"] > 60 and not record["searches"]
    kept = sweeps.Store(tmp_path).get(case)
    assert kept is not None and kept["verdict"] == "leaked"


def test_a_search_is_compared_with_what_nobody_s_picture_shows(tmp_path):
    client = kinds.make("pooled", 0)
    found = asked(client, tmp_path, attack="dlm_plus")
    (plain,) = calibration.searches(found, client, compared=False)
    (search,) = calibration.searches(found, client)
    assert plain.items() <= search.items() and search.keys() - plain.keys() == {"chance", "near"}
    assert all(math.isfinite(search[each]) for each in ("chance", "near", "agreement"))
    # the near start leaves what is open where it was
    assert search["near"] > search["agreement"]


def test_so_is_a_search_that_takes_one_image_alone(tmp_path):
    client = kinds.make("max-pooled", 0)
    (search,) = calibration.searches(asked(client, tmp_path, attack="weighted"), client)
    assert all(math.isfinite(search[each]) for each in ("chance", "near", "agreement"))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind"):
        Case("LeNett")
