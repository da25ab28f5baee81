"""Images spread over simulated steps, against torch's SGD and finite differences."""

import pytest
import torch

from dlm_core import data, federated, metrics
from dlm_core.beyond import epochs, spread, surrogate

RATE, E, B, N = 0.05, 2, 2, 4
STEPS = E * N // B


@pytest.fixture
def digits(device):
    images, labels, *_ = data.load("digits", n=N)
    return images.to(device), labels.to(device)


def observed(model, digits, **options):
    """What is seen of a client that takes the digits in two shuffled epochs of two batches."""
    clients = list(zip(*(part.split(1) for part in digits)))
    about = {"batch_size": B, "num_epochs": E, "order": 3, "learning_rate": RATE}
    return epochs.shuffled(model, clients, **about, optimizer_options=options)


def shares_of(drawn):
    """[S, N]: of each image at the steps that took it."""
    shares = torch.zeros(STEPS, N, dtype=torch.float64)
    for step, batch in enumerate(drawn.flatten().split(B)):
        shares[step, batch] = 1 / E
    return shares


def simulated(model, digits, shares, **options):
    images, labels = digits
    return spread.simulate(
        model, federated.loss, images.double(), labels, RATE * STEPS, shares, **options
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_client_s_own_order_gives_its_update(small, digits, momentum):
    model = small.double()
    seen = observed(model, digits, **({"momentum": momentum} if momentum else {}))
    shares = shares_of(epochs.orders(N, E, seed=3)).to(seen.delta[0].device)
    for ours, true in zip(simulated(model, digits, shares, momentum=momentum), seen.delta):
        torch.testing.assert_close(ours.detach(), true, rtol=1e-8, atol=1e-12)
    other = simulated(model, digits, shares.flip(0), momentum=momentum)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(other, seen.delta))


def test_a_step_without_images_changes_nothing(small, digits):
    model = small.double()
    shares = shares_of(epochs.orders(N, E, seed=3)).to(digits[0].device)
    longer = torch.cat([shares[:1], torch.zeros_like(shares[:1]), shares[1:]])
    for one, other in zip(*(simulated(model, digits, each) for each in (shares, longer))):
        torch.testing.assert_close(one.detach(), other.detach())


def test_derivatives_by_finite_differences():
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 2)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    images = torch.rand(2, 1, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    order = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    length = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def objective(images, order, length):
        update = spread.simulate(
            model, federated.loss, images, torch.tensor([0, 1]), length, order.softmax(0), 0.5
        )
        return sum(layer.square().sum() for layer in update)

    assert torch.autograd.gradcheck(objective, (images, order, length))


def test_it_ends_closer_than_the_point_between_the_snapshots(small, digits):
    seen = observed(small, digits)
    images, labels = digits
    about = {"num_images": N, "labels": labels}
    first = surrogate.surrogate_dlm(seen, max_evaluations=400, **about)
    found = spread.shuffled_dlm(seen, max_evaluations=150, **about)

    def psnr(found):
        order = metrics.match(found.images, images)
        return metrics.psnr(found.images[order], images, data_range=1.0)

    assert psnr(found) > psnr(first) + 1
    # told neither the rate nor the number of steps, it finds their product
    assert float(found.point["log_length"].exp()) == pytest.approx(RATE * STEPS, rel=0.02)
    assert found.evaluations > 150 and found.learning_rate is None


def test_searched_labels_are_refused(small, digits):
    with pytest.raises(ValueError, match="labels is 'optimised'"):
        spread.shuffled_dlm(observed(small, digits), num_images=N, labels="optimised")
