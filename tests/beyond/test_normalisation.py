"""Running statistics tell the client's batch.

Against PyTorch's own, by finite differences, and in an attack.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dlm_core import attacks, defenses, federated, models, objectives, records
from dlm_core.beyond import normalisation

SHAPE, CLASSES = (3, 16, 16), 5


@pytest.fixture
def images():
    return torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.arange(4)


@pytest.fixture
def model():
    return models.build("resnet18_bn", SHAPE, CLASSES, seed=0, init="default", width=4, blocks=1)


def entering(model, images):
    """What enters each batch-norm layer, by PyTorch alone."""
    inputs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(
                lambda layer, given, out, name=name: inputs.update({name: given[0].detach()})
            )
    model(images)
    return inputs


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_the_snapshots_hold_the_batch_s_statistics(model, images, labels, momentum):
    model = model.double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum
    model.load_state_dict(
        federated.train_locally(
            model, images.double().flip(0), labels, learning_rate=0.1
        ).weights_after
    )  # r moved
    seen = federated.train_locally(model, images.double(), labels, learning_rate=0.1)
    found, inputs = normalisation.batch_statistics(seen), entering(model, images.double())
    assert found.keys() == inputs.keys() and len(found) == 12
    for name, x in inputs.items():
        channels = x.transpose(0, 1).flatten(1)
        torch.testing.assert_close(found[name][0], channels.mean(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[name][1], channels.var(1), rtol=1e-9, atol=1e-9)


def test_several_batches_give_a_weighted_mean_and_their_number(model, images, labels):
    seen = federated.train_locally(
        model.double(), images.double(), labels, learning_rate=1e-12, local_steps=2, batch_size=2
    )
    assert set(normalisation.local_batches(seen).values()) == {2}
    first, second = (
        entering(model, half)["1"].transpose(0, 1).flatten(1).mean(1)
        for half in images.double().split(2)
    )
    expected = (0.9 * first + second) / 1.9  # the later batch counts for more
    torch.testing.assert_close(
        normalisation.batch_statistics(seen)["1"][0], expected, rtol=1e-8, atol=1e-8
    )


def test_eval_mode_sends_none(model, images, labels):
    seen = federated.train_locally(model.eval(), images, labels, learning_rate=0.1)
    assert not seen.model.training
    assert normalisation.local_batches(seen) == {} == normalisation.batch_statistics(seen)
    with pytest.raises(ValueError, match="seen holds no batch statistics"):
        normalisation.reconstruct(seen)
    lenet = federated.train_locally(
        models.build("lenet", SHAPE, CLASSES), images, labels, learning_rate=0.1
    )
    assert normalisation.batch_statistics(lenet) == {}


def test_what_moved_without_a_count_is_said_so(model, images, labels):
    seen = federated.train_locally(model, images, labels, learning_rate=0.1)
    counts = {name: w * 0 for name, w in seen.weights_after.items() if name.endswith("tracked")}
    uncounted = replace(seen, weights_after={**seen.weights_after, **counts})
    assert normalisation.batch_statistics(uncounted) == {}
    with pytest.raises(ValueError, match="'1' moved its running mean, but counts no batch"):
        normalisation.reconstruct(uncounted)


def test_statistics_that_never_move_are_none(model, images, labels):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0
    seen = federated.train_locally(model, images, labels, learning_rate=0.1)
    assert normalisation.local_batches(seen) == {} == normalisation.batch_statistics(seen)


def test_the_mean_of_several_answers_keeps_the_statistics(model, images, labels):
    """An average of counts of one was once none: the statistics were lost."""
    seen = federated.train_locally(model, images, labels, learning_rate=0.1)
    noise = {"scale": 1e-4, "observer": "server"}
    sent = defenses.defend(seen, "noise", **noise, repeats=6)
    assert normalisation.local_batches(sent) == normalisation.local_batches(seen)
    for name, expected in normalisation.batch_statistics(seen).items():
        for ours, theirs in zip(normalisation.batch_statistics(sent)[name], expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_part_of_what_is_sent_and_averaged(model, images, labels):
    clients = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    (after, seen), *_ = federated.rounds(model, clients, num_rounds=1, learning_rate=0.1)
    assert torch.equal(seen[0].model.state_dict()["1.running_mean"], torch.zeros(4))
    means = [each.weights_after["1.running_mean"] for each in seen]
    assert not torch.equal(*means)
    torch.testing.assert_close(after.state_dict()["1.running_mean"], sum(means) / 2)


def test_the_objective_vanishes_at_the_truth_and_its_gradient_is_right(model, images, labels):
    model, images, labels = model.double(), images.double()[:1], labels[:1]
    seen = federated.train_locally(model, images, labels, learning_rate=0.1)
    targets = normalisation.batch_statistics(seen)
    update_of = normalisation.gradient_and_statistics(list(targets))
    distance = normalisation.matched(objectives.normalised_distance, targets, weight=10.0)
    update = seen.delta

    def objective(x):
        return distance(update_of(seen.model, federated.loss, x, labels), update)

    assert objective(images).item() < 1e-15
    start = torch.full_like(images, 0.5) + 0.1 * images.roll(1, -1)
    direction = torch.randn(
        images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    x = start.clone().requires_grad_()
    slope = (torch.autograd.grad(objective(x), x)[0] * direction).sum()
    h = 1e-6
    numeric = (objective(start + h * direction) - objective(start - h * direction)) / (2 * h)
    torch.testing.assert_close(slope.detach(), numeric.detach(), rtol=1e-5, atol=0)


def test_the_weight_counts_the_statistics_alone(model, images, labels):
    model, images, labels = model.double(), images.double()[:1], labels[:1]
    seen = federated.train_locally(model, images, labels, learning_rate=0.1)
    targets, update = normalisation.batch_statistics(seen), seen.delta
    both = normalisation.gradient_and_statistics(list(targets))(
        seen.model, federated.loss, 0.5 * images, labels
    )
    g, statistics = both[: len(update)], both[len(update) :]
    none, one, two = (
        float(
            normalisation.matched(objectives.normalised_distance, targets, w)(both, update).detach()
        )
        for w in (0.0, 1.0, 2.0)
    )
    assert none == float(objectives.normalised_distance(g, update).detach())
    flat = [t for pair in targets.values() for t in pair]
    units = [u for _, v in targets.values() for u in (v.sum(), (v**2).sum())]
    expected = sum(
        float(((s - t) ** 2).sum().detach() / u) for s, t, u in zip(statistics, flat, units)
    ) / len(flat)
    assert two - one == pytest.approx(expected) and one - none == pytest.approx(expected)


def test_statistics_show_more_of_the_image_than_the_weights_alone():
    y, x = torch.meshgrid(torch.linspace(0, 3, 16), torch.linspace(0, 3, 16), indexing="ij")
    image = torch.stack([x.sin(), y.cos(), (x * y).sin()])[None] / 2 + 0.5
    model = models.build("resnet18_bn", SHAPE, CLASSES, seed=0, init="default", width=8, blocks=1)
    seen = federated.train_locally(model, image, torch.tensor([2]), learning_rate=0.01)
    options = {"max_evaluations": 40, "dtype": torch.float32}
    without, with_them = (
        attacks.dlm_plus(seen, **options),
        normalisation.reconstruct(seen, **options),
    )
    assert without.labels.tolist() == with_them.labels.tolist() == [2]
    errors = [(found.images - image).square().mean() for found in (without, with_them)]
    assert errors[1] < errors[0]
    assert all(not layer._forward_pre_hooks for layer in seen.model.modules())


def test_what_it_is_told_is_declared():
    assert records.ATTACKS["statistics"].told == ("that the client took one batch",)
