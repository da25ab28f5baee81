"""The mean of two images that an update does not tell from one has not leaked as an image."""

import copy

import pytest
import torch

from dlm_core import data, metrics, models
from dlm_core.beyond import exact
from dlm_core.harness import pairs
from dlm_core.observation import observe
from tests.harness.audited import SHAPE, asked, snapshots

ZEROS = data.load("digits", n=11).images[[0, 10]]
LABELS = torch.tensor([3, 3])


def lenet(init="default"):
    return models.build("lenet", SHAPE, 10, seed=10, init=init)


@pytest.mark.parametrize("rate", [3e-3, 1e-3])
def test_the_mean_of_two_images_is_not_called_the_image(rate, tmp_path, capsys):
    found = asked(lenet(), snapshots(lenet(), ZEROS, LABELS, lr=rate), tmp_path, attack="exact")
    shown = found["exact"].images
    assert metrics.psnr(shown, ZEROS.mean(0, keepdim=True).double(), data_range=1.0) > 50
    assert all(metrics.psnr(shown, each[None].double(), data_range=1.0) < 22 for each in ZEROS)
    assert found.verdict == "partly"
    assert "not believed: two images of one class" in capsys.readouterr().out


def test_of_a_search_for_one_image_it_is_said_that_two_explain_the_update_as_well(tmp_path):
    sent = snapshots(lenet(), ZEROS, LABELS, lr=0.01)
    found = asked(lenet(), sent, tmp_path, attack="dlm_plus", minutes=10)
    assert found.verdict in ("leaked", "partly")
    assert any("it may be the mean of two such images" in each for each in found.notes)


@pytest.mark.parametrize("init, rate", [("default", 0.1), ("paper", 1e-3), ("paper", 0.1)])
def test_where_two_images_would_have_shown_one_is_believed(init, rate):
    model = lenet(init)
    seen = observe(model, *snapshots(model, ZEROS[:1], LABELS[:1], lr=rate), SHAPE)
    before = copy.deepcopy(seen.model.state_dict())
    assert pairs.doubt(seen, exact.recover(seen)) is None
    assert all(torch.equal(w, before[name]) for name, w in seen.model.state_dict().items())
