"""Convolutions with ReLU and max-pooling: the audit shows a picture and says what it is worth."""

import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import metrics, records
from dlm_core.beyond.weighted import weighted
from dlm_core.harness import account, foretell, page
from dlm_core.harness.belief import believe
from dlm_core.harness.look import first_look
from dlm_core.observation import observe
from dlm_core.results import Explains, Status
from tests.harness.audited import IMAGES, LABELS, SHAPE, asked, snapshots


def stack(first=6, second=8, pool=True):
    pools = (nn.MaxPool2d(2),) if pool else ()
    features = second * (4 if pool else 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), *pools),
            *(nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), *pools, nn.Flatten()),
            *(nn.Linear(features, 20), nn.ReLU(), nn.Linear(20, 10)),
        )


POOLED, WHOLE = stack(), stack(pool=False)


def psnr(found, k=0):
    images = found["weighted"].images.to(IMAGES)
    return float(metrics.psnr(images, IMAGES[k : k + 1], data_range=1.0))


def seen_of(model, k=0):
    return observe(model, *snapshots(model, IMAGES[k : k + 1], LABELS[k : k + 1]), SHAPE)


def test_an_image_that_the_update_fixes_has_leaked(tmp_path):
    found = asked(WHOLE, snapshots(WHOLE), tmp_path)
    assert found.verdict == "leaked" and found.tried == ["weighted"]
    assert psnr(found) > 60
    (leak,) = [each for each in found.leaks if each.what == "image"]
    assert leak.attack == "weighted" and leak.error < 1e-3


@pytest.mark.parametrize("k", range(3))
def test_a_picture_that_the_update_tells_in_part_is_shown_and_is_no_leak(k, tmp_path, capsys):
    sent = snapshots(POOLED, IMAGES[k : k + 1], LABELS[k : k + 1])
    found = asked(POOLED, sent, tmp_path, attack="weighted")
    belief = found.beliefs["weighted"]
    assert found.verdict == "partly" and belief.grade is Explains.PARTLY
    assert not any(each.what == "image" for each in found.leaks)
    said = capsys.readouterr().out
    assert f"about {belief.expected:.0f} dB are expected of its picture" in said
    assert ("less if its search went astray" in said) == (belief.loss > 1e-3)
    assert abs(belief.expected - psnr(found, k)) < 6
    page.write(found, tmp_path / "audit.html")
    assert "dB expected of the picture" in (tmp_path / "audit.html").read_text()
    (row,) = account.account(found)["tried"]
    assert row["expected_db"] == belief.expected and row["numbers"]["directions"] < 64


def test_it_needs_no_loss(tmp_path):
    """The signal that comes back stands in the first linear layer's update."""
    sent = snapshots(WHOLE, IMAGES[:1], torch.eye(10)[[3]], F.mse_loss)
    found = asked(WHOLE, sent, tmp_path, attack="weighted")
    assert found.verdict == "leaked" and psnr(found) > 40
    assert found["weighted"].labels.tolist() == [-1] and found["weighted"].learning_rate is None


def test_what_is_frozen_is_left_out(tmp_path):
    model = stack(pool=False)
    model[0].requires_grad_(False)
    found = asked(model, snapshots(model), tmp_path, attack="weighted")
    assert psnr(found) > 40


@pytest.mark.parametrize("k", range(3))
def test_agreement_alone_is_no_evidence_where_much_is_open(k):
    """What the update leaves open is alike in both searches."""
    seen = seen_of(POOLED, k)
    found = weighted(seen)
    sure = replace(found, evidence=replace(found.evidence, loss=1e-9, expected_psnr=18.0))
    look = first_look(seen, 1, {})
    assert believe(sure, 60.0, look).grade is Explains.PARTLY
    assert believe(replace(sure, status=Status.CONVERGED), 60.0, look).grade is Explains.PARTLY
    told = replace(sure, evidence=replace(sure.evidence, expected_psnr=60.0))
    assert believe(told, 60.0, look).grade is Explains.FULLY
    assert believe(told, 15.0, look).grade is Explains.PARTLY
    assert believe(told, 15.0, look).expected == 15.0


def test_of_two_that_converge_apart_neither_is_believed():
    seen = seen_of(WHOLE)
    found = weighted(seen)
    look = first_look(seen, 1, {})
    assert found.status is Status.CONVERGED
    assert believe(found, None, look).grade is Explains.FULLY
    assert believe(found, 12.0, look).grade is Explains.PARTLY


def test_where_it_is_not_for_the_network_it_is_said(tmp_path):
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    )
    found = asked(model.eval(), snapshots(model), tmp_path, minutes=0.2)
    (why,) = [each.why for each in found.untried if each.what == "weighted"]
    assert "no stack of convolutions" in why


def test_its_time_is_foretold_and_kept(tmp_path, capsys):
    asked(POOLED, snapshots(POOLED), tmp_path, attack="weighted")
    assert "steps; a second start takes as long" in capsys.readouterr().out
    record = records.ATTACKS["weighted"]

    def slow(*, max_steps=16, restarts=1, **options):
        time.sleep(0.2 * max_steps)

    run, lines = foretell.foretold(partial(slow), record, time.monotonic() + 2.5)
    assert "shortened to " in lines[1] and "--minutes" in lines[1]
    assert run.keywords["max_steps"] < 16 and run.keywords["restarts"] == 1
    with pytest.raises(foretell.NoTime, match="4 steps would take"):
        foretell.foretold(partial(slow), record, time.monotonic() + 0.7)
