"""A client that shuffles its images in each epoch."""

import copy

import pytest
import torch

from dlm_core import data, federated
from dlm_core.beyond import epochs


@pytest.fixture
def clients(device):
    images, labels, *_ = data.load("digits", n=4)
    images, labels = images.to(device), labels.to(device)
    return list(zip(images.split(1), labels.split(1)))


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
def test_the_client_is_torch_s_sgd_on_shuffled_batches(small, clients, options):
    drawn = epochs.orders(4, 3, seed=5)
    client = copy.deepcopy(small)
    stepper = torch.optim.SGD(client.parameters(), lr=0.1, **options)
    for batch in [each for epoch in drawn for each in epoch.split(2)]:
        stepper.zero_grad()
        images, labels = (torch.cat([clients[i][part] for i in batch]) for part in (0, 1))
        federated.loss(client(images), labels).backward()
        stepper.step()
    seen = epochs.shuffled(
        small,
        clients,
        batch_size=2,
        num_epochs=3,
        order=5,
        learning_rate=0.1,
        optimizer_options=options,
    )
    for name, after in client.state_dict().items():
        torch.testing.assert_close(seen.weights_after[name], after, rtol=0, atol=0)


def test_each_epoch_takes_every_image_once_and_in_an_order_of_its_own():
    drawn = epochs.orders(20, 3, seed=1)
    assert (drawn.sort(1).values == torch.arange(20)).all()
    assert len({tuple(each) for each in drawn.tolist()}) == 3
    assert (epochs.orders(20, 3, seed=2) != drawn).any()


def test_without_a_seed_the_images_stay_in_order(small, clients):
    whole = [torch.cat(parts) for parts in zip(*clients)]
    plain = federated.train_locally(small, *whole, learning_rate=0.1, local_steps=4, batch_size=2)
    seen = epochs.shuffled(small, clients, batch_size=2, num_epochs=2, learning_rate=0.1)
    assert all(map(torch.equal, seen.delta, plain.delta))


def test_batches_that_do_not_fill_an_epoch_are_refused(small, clients):
    with pytest.raises(ValueError, match="batch_size is 3; it takes a number that divides 4"):
        epochs.shuffled(small, clients, batch_size=3, learning_rate=0.1)
