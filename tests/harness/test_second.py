"""An audit's second search goes on where it has found nothing, and speaks for what is right."""

import math
import time

import pytest
import torch
from torch import nn

from dlm_core import metrics, records
from dlm_core.harness.belief import likeness
from dlm_core.harness.second import CLOSELY, twice
from dlm_core.harness.watch import OutOfTime, Watch
from dlm_core.results import Reconstruction, SearchEvidence, Status
from tests.harness.audited import IMAGES, asked, linear, network, snapshots

SAME = torch.full((2,), 3)


def test_two_images_that_need_it_are_found_and_believed(tmp_path, capsys):
    model = network(linear(64, 48), nn.Sigmoid, linear(48, 10))
    sent = snapshots(model, IMAGES[:2], SAME, lr=0.01)
    found = asked(model, sent, tmp_path, attack="dlm_plus", num_images=2, minutes=None)
    assert "the second search has not found the same picture" in capsys.readouterr().out
    images = found["dlm_plus"].images
    images = images[metrics.match(images, IMAGES[:2].double())]
    for one, truth in zip(images, IMAGES[:2].double()):
        assert metrics.psnr(one[None], truth[None], data_range=1.0) > 25
    assert found.verdict == "leaked"


def test_what_the_update_leaves_open_is_not_believed_however_long_it_goes_on(tmp_path, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 8, 3, 1, 1), nn.Sigmoid(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        model = nn.Sequential(*layers, nn.Linear(32, 10))
    sent = snapshots(model, IMAGES[:2], SAME, lr=0.01)
    found = asked(model, sent, tmp_path, attack="dlm_plus", num_images=2, minutes=None)
    assert "the second search has not found the same picture" in capsys.readouterr().out
    assert found.beliefs["dlm_plus"].loss < CLOSELY and found.verdict == "partly"


class Search:
    """Ends where it is told, and notes how it was called."""

    def __init__(self, ends):
        self.ends, self.calls = list(ends), []

    def __call__(self, **how):
        self.calls.append(how)
        loss, shade, status = self.ends.pop(0)
        if math.isnan(loss):
            raise OutOfTime
        images = torch.full((1, 1, 2, 2), shade, dtype=torch.float64)
        evidence = SearchEvidence(losses=[loss], loss=loss, point={"images": images})
        vouched = torch.zeros(1, dtype=torch.bool)
        return Reconstruction(
            images=images,
            labels=torch.zeros(1, dtype=torch.long),
            status=status,
            vouched=vouched,
            evidence=evidence,
        )


FIRST = (1e-6, 0.5, Status.CONVERGED)
FALLS, RESTS = (1e-3, 0.2, Status.BUDGET), (1e-3, 0.2, Status.STALLED)
MEETS, OVER = (1e-6, 0.51, Status.BUDGET), (math.nan, 0.0, Status.BUDGET)


@pytest.mark.parametrize(
    "ends, against, calls, agrees",
    [
        ([FIRST, MEETS], None, 2, True),
        ([FIRST, RESTS, FIRST, FALLS, MEETS], None, 5, True),
        ([FIRST, RESTS, FIRST, RESTS], None, 4, False),
        ([FIRST, FALLS, FIRST, *[FALLS] * 4], None, 7, False),
        ([FIRST, FALLS, OVER], None, 3, False),
        ([FIRST, FALLS], "two images may have left it", 2, False),
        ([(1e-4, 0.5, Status.STALLED), FALLS], None, 2, False),
    ],
)
def test_it_goes_on_until_it_rests_or_agrees_or_its_time_is_over(ends, against, calls, agrees):
    said: list[str] = []
    search = Search(ends)
    watch = Watch("a search", time.monotonic() + 3600)
    record = records.ATTACKS["dlm_plus"]
    found, agreement = twice(search, record, watch, said.append, lambda found: against)
    assert len(search.calls) == calls and not search.ends
    assert float(found.images[0, 0, 0, 0]) == 0.5
    assert agreement is not None and (agreement >= 25) is agrees
    assert bool(said) == (calls > 2)
    assert any("when its time was over" in each for each in said) == (OVER in ends)
    for again in search.calls[1:2] + search.calls[3:]:  # from afar
        assert again["seed"] == 1 and "coordinates" in again


def test_searches_are_as_alike_as_the_pictures_that_are_the_least():
    images = torch.stack([torch.full((1, 4, 4), shade) for shade in (0.1, 0.5, 0.9)])
    others = images.clone()
    others[2] = 0.7
    assert likeness(images, others) == pytest.approx(-20 * math.log10(0.2), abs=1e-3)
