"""The mean of two images that an update does not tell from one has not leaked as an image."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from dlm_core import data, metrics, models
from dlm_core.beyond import exact
from dlm_core.beyond.unrolled import unrolled_dlm
from dlm_core.harness import pairs
from dlm_core.observation import observe
from tests.harness.audited import SHAPE, asked, snapshots

ZEROS = data.load("digits", n=11).images[[0, 10]]
LABELS = torch.tensor([3, 3])


def lenet(init="default"):
    return models.build("lenet", SHAPE, 10, seed=10, init=init)


def trained(model, images, labels, optimizer, steps):
    """(W_t, W_{t+1}) of several steps on all images."""
    client = copy.deepcopy(model).train()
    run = optimizer(client.parameters())
    for _ in range(steps):
        run.zero_grad()
        F.cross_entropy(client(images), labels).backward()
        run.step()
    return copy.deepcopy(model.state_dict()), client.state_dict()


def fours():
    """Two of one class, 12 dB from each other: of the first, those that differ most."""
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


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


@pytest.mark.parametrize(
    "attack, optimizer, steps, init",
    [
        ("dlm_plus", sgd(0.01), 1, "default"),
        ("weighted", sgd(0.1), 1, "default"),
        ("all", sgd(0.01), 1, "default"),
        ("unrolled_dlm", sgd(0.1), 2, "default"),
    ],
)
def test_a_search_that_finds_the_mean_of_two_has_shown_no_image(
    attack, optimizer, steps, init, tmp_path
):
    """Each of these was called leaked, 13 dB from the nearer of the two."""
    images, labels = fours(), torch.tensor([4, 4])
    sent = trained(lenet(init), images, labels, optimizer, steps)
    found = asked(lenet(init), sent, tmp_path, attack=attack, minutes=10)
    assert found.verdict == "partly"
    best = max(found.beliefs.values())
    assert "two images of one class" in (best.doubt or "")


@pytest.mark.parametrize(
    "attack, optimizer, steps, init",
    [
        ("unrolled_dlm", sgd(0.1), 2, "paper"),
        ("dlm_plus", sgd(0.1), 1, "paper"),
    ],
)
def test_a_search_whose_image_explains_more_than_two_would_is_believed(
    attack, optimizer, steps, init, tmp_path
):
    image, label = fours()[:1], torch.tensor([4])
    sent = trained(lenet(init), image, label, optimizer, steps)
    found = asked(lenet(init), sent, tmp_path, attack=attack, minutes=10)
    assert found.verdict == "leaked"
    assert metrics.psnr(found[attack].images, image.double(), data_range=1.0) > 40


@pytest.mark.parametrize("optimizer, kin, steps", [(sgd(0.01), "sgd", 5), (adam, "adam", 3)])
def test_the_client_s_own_steps_are_taken_with_twice_as_many(optimizer, kin, steps):
    model, images, labels = lenet("default" if kin == "adam" else "paper"), fours(), [4, 4]
    for count in (1, 2):
        sent = trained(model, images[:count], torch.tensor(labels[:count]), optimizer, steps)
        seen = observe(model, *sent, SHAPE)
        patient = {"tolerance": 0.0, "patience": 200, "max_evaluations": 1000}
        found = unrolled_dlm(seen, local_steps=steps, client_optimizer=kin, **patient)
        assert (pairs.doubt(seen, found, kin) is None) == (count == 1)


def squared(scores, labels):
    return (scores - F.one_hot(labels, 10)).square().mean()


@pytest.mark.parametrize("loss", [partial(F.cross_entropy, label_smoothing=0.1), squared])
def test_of_an_unknown_loss_a_search_is_believed_from_rounding_on(loss, tmp_path):
    images, labels = fours(), torch.tensor([4, 4])
    for count, rate, verdict in ((1, 1.0, "leaked"), (2, 1.0, "partly"), (2, 1e-3, "partly")):
        sent = snapshots(lenet(), images[:count], labels[:count], loss=loss, lr=rate)
        assert asked(lenet(), sent, tmp_path, attack="weighted").verdict == verdict


def test_in_half_precision_the_mean_of_two_is_none(tmp_path):
    before, after = snapshots(lenet("paper"), fours(), torch.tensor([4, 4]), lr=1.0)
    sent = before, {name: w.half() for name, w in after.items()}
    assert asked(lenet("paper"), sent, tmp_path, attack="dlm_plus").verdict == "partly"


def test_weight_decay_that_the_layers_show_is_taken_off_first(tmp_path):
    how = {"lr": 0.1, "weight_decay": 5e-4}
    sent = snapshots(lenet("paper"), fours()[:1], torch.tensor([4]), **how)
    assert asked(lenet("paper"), sent, tmp_path, attack="dlm_plus").verdict == "leaked"


@pytest.mark.parametrize("init, rate", [("default", 0.1), ("paper", 1e-3), ("paper", 0.1)])
def test_where_two_images_would_have_shown_one_is_believed(init, rate):
    model = lenet(init)
    seen = observe(model, *snapshots(model, ZEROS[:1], LABELS[:1], lr=rate), SHAPE)
    before = copy.deepcopy(seen.model.state_dict())
    assert pairs.doubt(seen, exact.recover(seen), "sgd") is None
    assert all(torch.equal(w, before[name]) for name, w in seen.model.state_dict().items())
