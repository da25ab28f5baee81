"""Epochs simulated on images of their own, against the published equations."""

import copy

import pytest
import torch

from dlm_core import data, federated, metrics
from dlm_core.beyond import epochs, invariant
from dlm_core.coordinates import cosines

RATE, E, B, N = 0.01, 2, 2, 4


@pytest.fixture
def client(small, device):
    """Four digits in two shuffled epochs of two batches: what is seen, images, labels."""
    images, labels, *_ = data.load("digits", n=N)
    images, labels = images.to(device), labels.to(device)
    clients = list(zip(images.split(1), labels.split(1)))
    about = {"batch_size": B, "num_epochs": E, "order": 3}
    return epochs.shuffled(small, clients, learning_rate=RATE, **about), images, labels


@pytest.mark.parametrize("over, aggregate", [("mean", torch.mean), ("max", torch.amax)])
def test_the_prior_is_the_published_one(over, aggregate):
    images = torch.rand(3, 4, 1, 5, 5, dtype=torch.float64)
    pairs = [
        (aggregate(one, dim=0) - aggregate(other, dim=0)).square().mean()
        for one in images
        for other in images
    ]
    published = torch.stack(pairs).sum() / 3**2
    assert float(invariant.epoch_prior(images, over)) == pytest.approx(float(published))


@pytest.mark.parametrize("over", ["mean", "max"])
def test_the_prior_does_not_hang_on_the_order(over):
    images = torch.rand(4, 1, 5, 5)
    same = torch.stack([images, images[[2, 0, 3, 1]]])
    assert float(invariant.epoch_prior(same, over)) == pytest.approx(0, abs=1e-12)
    assert float(invariant.epoch_prior(torch.stack([images, 1 - images]), over)) > 1e-3


def test_epochs_are_matched_before_they_are_averaged():
    images = torch.rand(4, 1, 5, 5)
    epochs_of_it = torch.stack([images + 0.01, (images - 0.01)[[2, 0, 3, 1]]]).clamp(0, 1)
    assert float((invariant.averaged(epochs_of_it) - images).abs().max()) < 0.02


def test_its_loss_is_that_of_the_client_it_simulates(client):
    seen, images, labels = client
    told = {"learning_rate": RATE, "num_epochs": E, "batch_size": B}
    about = {"num_images": N, "labels": labels, "seed": 7, "over": "mean", "weight": 0.3}
    found = invariant.order_invariant(seen, **told, **about, max_evaluations=1)
    generator = torch.Generator().manual_seed(7)
    start, to_images = cosines((E * N, *images.shape[1:]), seen.delta[0], generator)
    dummies = to_images(start)
    model = copy.deepcopy(seen.model).double()
    stepper = torch.optim.SGD(model.parameters(), lr=RATE)
    for batch, of_batch in zip(dummies.split(B), found.labels.repeat(E).split(B)):
        stepper.zero_grad()
        federated.loss(model(batch), of_batch).backward()
        stepper.step()
    before = copy.deepcopy(seen.model).double().parameters()
    update = [w - after for w, after in zip(before, model.parameters())]
    square = sum((a - b).square().sum() for a, b in zip(update, seen.delta))
    unit = torch.stack([layer.norm() for layer in seen.delta]).mean() ** 2
    first, second = (each.mean(0) for each in dummies.split(N))
    prior = 0.3 * 2 * (first - second).square().mean() / E**2
    assert found.losses[0] == pytest.approx(float((square / unit + prior).detach()), rel=1e-9)
    assert sorted(found.labels.tolist()) == sorted(labels.tolist())


def test_it_finds_digits(client):
    seen, images, labels = client
    told = {"learning_rate": RATE, "num_epochs": E, "batch_size": B}
    about = {"num_images": N, "labels": labels, "max_evaluations": 100}
    found = invariant.order_invariant(seen, **told, **about)
    order = metrics.match(found.images, images)
    grey = metrics.psnr(torch.full_like(images, 0.5), images, data_range=1.0)
    assert metrics.psnr(found.images[order], images, data_range=1.0) > grey + 3


def test_searched_labels_are_refused(client):
    with pytest.raises(ValueError, match="labels is 'optimised'"):
        invariant.order_invariant(
            client[0],
            learning_rate=RATE,
            num_epochs=E,
            batch_size=B,
            num_images=N,
            labels="optimised",
        )


@pytest.mark.parametrize("seed", range(3))
def test_labels_do_not_stand_in_the_order_of_a_client_with_the_same_seed(small, seed):
    images, labels, *_ = data.load("digits", n=8)
    model = small.to(images)
    seen = federated.train_locally(model, images, labels, learning_rate=0.05)
    told = {"learning_rate": 0.05, "num_epochs": 1, "batch_size": 4}
    classes = torch.arange(8)
    found = invariant.order_invariant(
        seen, num_images=8, labels=classes, seed=seed, max_evaluations=1, **told
    )
    assert found.labels.tolist() != classes[epochs.orders(8, 1, seed)[0]].tolist()
