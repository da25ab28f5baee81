"""Where many starts are one batch, an audit's search is made from many: here on a CPU."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from dlm_core import federated, models, records
from dlm_core.harness import many_starts
from dlm_core.harness.audit import audit
from dlm_core.harness.belief import Belief, Verdict
from dlm_core.results import Explains


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(many_starts, "STARTS", {"cpu": 4})


@pytest.fixture
def digit():
    from dlm_core import data

    images, labels, *_ = data.load("digits", n=1)
    return images, labels


def lenet():
    return models.build("lenet", (1, 8, 8), 10, seed=3)


def asked(model, digit, tmp_path, **options):
    seen = federated.train_locally(model, *digit, learning_rate=0.05)
    out = tmp_path / "picture.png"
    told = {"model": model, "image_shape": (1, 8, 8), "attack": "dlm_plus", "out": out}
    return audit(model.state_dict(), seen.weights_after, **told, **options)


def test_an_audit_says_where_many_starts_end(fast, digit, tmp_path, capsys):
    found = asked(lenet(), digit, tmp_path)
    said = "4 of 4 starts (51 to 100 %) ended at the picture of lowest loss"
    assert said in capsys.readouterr().out and any(said in note for note in found.notes)
    assert found.verdict is Verdict.LEAKED


def test_on_a_cpu_it_does_not(digit, tmp_path, capsys):
    asked(lenet(), digit, tmp_path)
    assert "starts (" not in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_an_audit_computes_on_the_device_that_is_named(device, fast, digit, tmp_path):
    found = asked(lenet(), digit, tmp_path, device=device)
    assert found["dlm_plus"].images.device.type == device
    assert found.verdict is Verdict.LEAKED and found.about.asked["device"] == device


@pytest.mark.parametrize("wrong", ["gpu", *["cuda"] * (not torch.cuda.is_available())])
def test_a_device_that_is_not_here_is_refused_before_anything_is_read(wrong):
    with pytest.raises(ValueError, match=f"DEVICE is '{wrong}'"):
        audit("absent.pt", "absent.pt", device=wrong)


def test_where_different_pictures_explain_the_update_none_is_believed(
    fast, digit, tmp_path, capsys
):
    """Behind global pooling many images leave one update."""
    torch.manual_seed(0)
    pooled = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(2, 10)),
    )
    found = asked(pooled, digit, tmp_path)
    assert found.verdict is not Verdict.LEAKED
    said = capsys.readouterr().out
    assert "4 different pictures explain the update" in said


def tried(model, digit, until=math.inf):
    seen = federated.train_locally(model, *digit, learning_rate=0.05)
    record = records.ATTACKS["dlm_plus"]
    run = partial(record, seen, num_images=1, restarts=2, max_evaluations=60)
    return many_starts.survey_where_fast(run, record, run(), until)


def test_fewer_starts_where_memory_holds_no_more(fast, digit, monkeypatch):
    sizes, survey = [], many_starts.survey

    def limited(*given, starts, **options):
        sizes.append(starts)
        if starts > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return survey(*given, starts=starts, **options)

    monkeypatch.setattr(many_starts, "STARTS", {"cpu": 12})
    monkeypatch.setattr(many_starts, "survey", limited)
    assert len(tried(lenet(), digit).found) == 3 and sizes == [12, 3]


class Branching(nn.Module):
    """No batch computes it: what it does depends on the image."""

    def __init__(self):
        super().__init__()
        self.layers = lenet()

    def forward(self, images):
        return self.layers(images) if images.mean() > -1 else self.layers(-images)


def test_what_no_batch_computes_is_not_searched_one_after_the_other(fast, digit):
    assert tried(Branching(), digit) is None


def test_nothing_is_begun_that_the_time_does_not_hold(fast, digit):
    assert tried(lenet(), digit, until=-math.inf) is None


def test_a_doubt_takes_belief_away_and_gives_none():
    full = Belief(Explains.FULLY, None, False, 1e-6, 40.0)
    little = Belief(Explains.LITTLE, None, False, 1.0)
    several, one = (many_starts.against(type("Ends", (), {"explaining": n})) for n in (2, 1))
    assert full.less(one) == full
    assert full.less(several).grade is Explains.PARTLY
    assert "2 different pictures" in full.less(several).doubt
    assert little.less(several).grade is Explains.LITTLE
