"""The mean of two images that an update does not tell from one has not leaked as an image."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from dlm_core import data, metrics, models
from dlm_core.beyond import exact
from dlm_core.beyond.unrolled import unrolled_dlm
from dlm_core.federated import train_locally
from dlm_core.harness import pairs
from dlm_core.harness.belief import AGREED
from dlm_core.harness.look import first_look
from dlm_core.harness.watch import OutOfTime
from dlm_core.observation import observe
from tests.harness.audited import SHAPE, asked, snapshots

ZEROS = data.load("digits", n=11).images[[0, 10]]
LABELS = torch.tensor([3, 3])


def lenet(init="default"):
    return models.build("lenet", SHAPE, 10, seed=10, init=init)


def fours():
    """Two of one class, 7 dB from each other: of the first, those that differ most."""
    images, labels, *_ = data.load("digits", n=400)
    same = images[labels == 4]
    far = torch.cdist(same.flatten(1), same.flatten(1)).argmax()
    return same[[int(far) // len(same), int(far) % len(same)]]


@pytest.mark.parametrize("rate", [3e-3, 1e-3])
def test_the_mean_of_two_images_is_not_called_the_image(rate, tmp_path, capsys):
    found = asked(lenet(), snapshots(lenet(), ZEROS, LABELS, lr=rate), tmp_path, attack="exact")
    shown = found["exact"].images
    assert metrics.psnr(shown, ZEROS.mean(0, keepdim=True).double(), data_range=1.0) > 50
    assert all(metrics.psnr(shown, each[None].double(), data_range=1.0) < 22 for each in ZEROS)
    assert found.verdict == "partly"
    assert "not believed: two images of one class" in capsys.readouterr().out


def sgd(rate, steps=1):
    return {"learning_rate": rate, "local_steps": steps}


ADAM = {"learning_rate": 1e-3, "local_steps": 3, "client_optimizer": "adam"}


def sent(model, images, **how):
    """(W_t, W_{t+1}) of a client of these fours."""
    labels = torch.full((len(images),), 4)
    return model.state_dict(), train_locally(model, images, labels, **how).weights_after


@pytest.mark.parametrize(
    "attack, how",
    [
        ("dlm_plus", sgd(0.01)),
        ("weighted", sgd(0.1)),
        ("all", sgd(0.01)),
        ("unrolled_dlm", sgd(0.1, steps=3)),
    ],
)
def test_a_search_that_finds_the_mean_of_two_has_shown_no_image(attack, how, tmp_path):
    """Such means were called leaked, 13 dB from the nearer of the two. Where rounding leads the
    second search of many steps elsewhere, as it may, that is the reason instead.
    """
    both = sent(lenet(), fours(), **how)
    found = asked(lenet(), both, tmp_path, attack=attack, minutes=10)
    assert found.verdict == "partly"
    best = max(found.beliefs.values())
    apart = best.agreement is not None and best.agreement < AGREED
    assert apart and attack == "unrolled_dlm" or "two images of one class" in (best.doubt or "")


@pytest.mark.parametrize(
    "attack, how", [("unrolled_dlm", sgd(0.1, steps=2)), ("dlm_plus", sgd(0.1))]
)
def test_a_search_whose_image_explains_more_than_two_would_is_believed(attack, how, tmp_path):
    image = fours()[:1]
    one = sent(lenet("paper"), image, **how)
    found = asked(lenet("paper"), one, tmp_path, attack=attack, minutes=10)
    assert found.verdict == "leaked"
    assert metrics.psnr(found[attack].images, image.double(), data_range=1.0) > 40


@pytest.mark.parametrize(
    "init, kin, how", [("paper", "sgd", sgd(0.01, 5)), ("default", "adam", ADAM)]
)
def test_the_client_s_own_steps_are_taken_with_twice_as_many(init, kin, how):
    patient = {"tolerance": 0.0, "patience": 200, "max_evaluations": 1000}
    told = {"local_steps": how["local_steps"], "client_optimizer": kin}
    for count in (1, 2):
        model = lenet(init)
        seen = observe(model, *sent(model, fours()[:count], **how), SHAPE)
        found = unrolled_dlm(seen, **told, **patient)
        assert (pairs.against(seen, found, first_look(seen, 1, {})) is None) == (count == 1)


def squared(scores, labels):
    return (scores - F.one_hot(labels, 10)).square().mean()


@pytest.mark.parametrize("loss", [partial(F.cross_entropy, label_smoothing=0.1), squared])
def test_of_an_unknown_loss_a_search_is_believed_from_rounding_on(loss, tmp_path):
    images, labels = fours(), torch.tensor([4, 4])
    for count, rate, verdict in ((1, 1.0, "leaked"), (2, 1.0, "partly"), (2, 1e-3, "partly")):
        those = snapshots(lenet(), images[:count], labels[:count], loss=loss, lr=rate)
        assert asked(lenet(), those, tmp_path, attack="weighted").verdict == verdict


def test_in_half_precision_the_mean_of_two_is_none(tmp_path):
    before, after = snapshots(lenet("paper"), fours(), torch.tensor([4, 4]), lr=1.0)
    halved = {name: w.half() for name, w in after.items()}
    assert asked(lenet("paper"), (before, halved), tmp_path, attack="dlm_plus").verdict == "partly"


def test_weight_decay_that_the_layers_show_is_taken_off_first(tmp_path):
    how = {"lr": 0.1, "weight_decay": 5e-4}
    one = snapshots(lenet("paper"), fours()[:1], torch.tensor([4]), **how)
    assert asked(lenet("paper"), one, tmp_path, attack="dlm_plus").verdict == "leaked"


@pytest.mark.parametrize("init, rate", [("default", 0.1), ("paper", 1e-3), ("paper", 0.1)])
def test_where_two_images_would_have_shown_one_is_believed(init, rate):
    model = lenet(init)
    seen = observe(model, *snapshots(model, ZEROS[:1], LABELS[:1], lr=rate), SHAPE)
    before = copy.deepcopy(seen.model.state_dict())
    assert pairs.against(seen, exact.recover(seen), first_look(seen, 1, {})) is None
    assert all(torch.equal(w, before[name]) for name, w in seen.model.state_dict().items())


class Later:
    """In place of ``pairs.against``: raises what it is told, as an alarm or a user would."""

    def __init__(self, raised):
        self.raised = raised

    def __call__(self, *given):
        raise self.raised


@pytest.mark.parametrize("attack", ["dlm_plus", "exact"])
def test_what_was_not_held_against_two_images_in_its_time_is_partly(attack, monkeypatch, tmp_path):
    one = snapshots(lenet("paper"), ZEROS[:1], LABELS[:1], lr=0.1)
    monkeypatch.setattr(pairs, "against", Later(OutOfTime()))
    found = asked(lenet("paper"), one, tmp_path, attack=attack)
    assert found.verdict == "partly" and not found.interrupted
    assert found.beliefs[attack].doubt == pairs.UNASKED


@pytest.mark.parametrize("attack", ["dlm_plus", "exact"])
def test_an_interrupt_meanwhile_keeps_what_was_found(attack, monkeypatch, tmp_path):
    one = snapshots(lenet("paper"), ZEROS[:1], LABELS[:1], lr=0.1)
    monkeypatch.setattr(pairs, "against", Later(KeyboardInterrupt()))
    found = asked(lenet("paper"), one, tmp_path, attack=attack)
    assert found.interrupted and list(found) == [attack] and found.verdict == "partly"


def test_images_are_held_against_pairs_once_where_nothing_goes_on(monkeypatch, tmp_path):
    called, against = [], pairs.against
    monkeypatch.setattr(pairs, "against", lambda *given: called.append(given) or against(*given))
    one = snapshots(lenet("paper"), ZEROS[:1], LABELS[:1], lr=0.1)
    assert asked(lenet("paper"), one, tmp_path, attack="dlm_plus").verdict == "leaked"
    assert len(called) == 1
