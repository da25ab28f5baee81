"""The simulated client against torch.optim, its derivatives, and the attack through it."""

import math

import pytest
import torch

from dlm_core import attacks, coordinates, data, federated, metrics, models, objectives, records
from dlm_core.beyond import clients, unrolled
from dlm_core.harness.trials import Trial, run_trial
from dlm_core.results import ClientEstimate, Reconstruction, SearchEvidence, Status
from tests.networks import Idle

FAMILIES = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("adam", {}),
    ("adam", {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.01}),
    ("adamw", {"weight_decay": 0.1}),
    ("rmsprop", {}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-4, "weight_decay": 0.01}),
]


@pytest.fixture
def digits(device):
    images, labels, *_ = data.load("digits", n=3)
    return images.double().to(device), labels.to(device)


@pytest.fixture
def tiny(device):
    """A network of 26 weights, for finite differences."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3, stride=2),
        torch.nn.Sigmoid(),
        torch.nn.Flatten(),
        torch.nn.Linear(2, 2),
    )
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.rand(p.shape, generator=generator) - 0.5
    return model.double().to(device)


@pytest.mark.parametrize("name, options", FAMILIES)
@pytest.mark.parametrize("steps, batch_size", [(1, None), (4, None), (4, 2)])
def test_the_simulated_client_is_the_client(small, digits, name, options, steps, batch_size):
    images, labels = digits
    model, size = (
        small.double(),
        {"local_steps": steps, "batch_size": batch_size, "optimizer_options": options},
    )
    seen = federated.train_locally(
        model, images, labels, learning_rate=0.02, client_optimizer=name, **size
    )
    ours = clients.update(
        model,
        federated.loss,
        images,
        labels,
        learning_rate=0.02,
        client_optimizer=clients.OPTIMIZERS[name],
        **size,
    )
    for simulated, real in zip(ours, seen.delta):
        torch.testing.assert_close(simulated.detach(), real, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "name, options",
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("adam", {"eps": 0.1}),
        ("rmsprop", {"eps": 0.1}),
    ],
)
def test_derivatives_by_finite_differences(tiny, device, name, options, checkpointed):
    generator = torch.Generator().manual_seed(1)
    images, observed = (
        torch.rand(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((2, 1, 3, 3), (26,))
    )
    observed = observed.split([p.numel() for p in tiny.parameters()])
    settings = {
        "local_steps": 3,
        "client_optimizer": clients.OPTIMIZERS[name],
        "optimizer_options": options,
        "checkpointed": checkpointed,
    }

    def objective(images, log_rate):
        update = clients.update(
            tiny,
            federated.loss,
            images,
            torch.tensor([0, 1], device=device),
            learning_rate=log_rate.exp(),
            **settings,
        )
        return objectives.normalised_distance([layer.flatten() for layer in update], observed)

    log_rate = torch.tensor(-1.0, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(objective, (images.requires_grad_(), log_rate))


def test_adam_s_derivatives_are_finite_where_a_gradient_vanishes(tiny, device):
    images = torch.zeros(
        1, 1, 3, 3, dtype=torch.float64, device=device, requires_grad=True
    )  # the convolution's gradient is 0
    for optimizer in (clients.adam, clients.rmsprop):
        update = clients.update(
            tiny,
            federated.loss,
            images,
            torch.tensor([0], device=device),
            learning_rate=0.1,
            local_steps=2,
            client_optimizer=optimizer,
        )
        assert (update[0] == 0).all()
        (slope,) = torch.autograd.grad(sum(layer.sum() for layer in update), images)
        assert slope.isfinite().all()


def test_checkpoints_change_nothing_but_memory(small, digits):
    images, labels = digits[0].requires_grad_(), digits[1]
    results = []
    for checkpointed in (False, True):
        update = clients.update(
            small.double(),
            federated.loss,
            images,
            labels,
            learning_rate=0.05,
            local_steps=6,
            checkpointed=checkpointed,
        )
        results.append(
            [
                *update,
                *torch.autograd.grad(
                    objectives.squared_distance(update, [0 * u for u in update]), images
                ),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_image_rate_and_steps_are_found_untold(small, digit, momentum):
    seen = federated.train_locally(
        small, *digit, learning_rate=0.2, local_steps=3, optimizer_options={"momentum": momentum}
    )
    found = attacks.unrolled_dlm(seen, optimizer_options={"momentum": momentum})
    psnr = metrics.psnr(found.images, digit[0], data_range=1.0)
    assert psnr > 30
    assert found.local_steps == 3
    assert found.learning_rate == pytest.approx(0.2, rel=0.01)
    assert found.k == 1 / found.learning_rate
    as_published = attacks.dlm_plus(seen, max_evaluations=200)
    assert metrics.psnr(as_published.images, digit[0], data_range=1.0) < psnr - 5
    assert found.loss == min(found.losses) == min(loss for _, loss in found.tried)
    assert found.evaluations == len(found.losses)
    assert {2, 3} <= {steps for steps, _ in found.tried}


def test_the_length_of_the_update_keeps_the_learning_rate_from_running_away(seen):
    """A simulated update twice as long is no fit, unlike in DLM+.

    Without that, η once ended at thirty times the truth.
    """
    update = [layer.double() for layer in seen.delta]
    twice = [2 * layer for layer in update]
    assert float(objectives.normalised_distance(twice, update)) < 1e-20
    assert float(unrolled._relative_distance(twice, update)) > 0.5
    assert float(unrolled._relative_distance(update, update)) == 0


def ended(steps, loss, status=Status.STALLED):
    """What a search at E = ``steps`` returns."""
    return Reconstruction(
        images=torch.zeros(1),
        labels=torch.zeros(1),
        status=status,
        vouched=torch.zeros(1, dtype=torch.bool),
        evidence=SearchEvidence(losses=[loss], loss=loss),
        client=ClientEstimate(local_steps=steps),
    )


@pytest.mark.parametrize(
    "losses, tried",
    [
        ({2: 1.0}, 4),  # twice the best
        ({2: 1.0, 4: 0.5}, 8),
        ({2: 1.0, 4: 0.5, 8: 0.7}, 6),  # until that is worse: then halfway, above first
        ({2: 1.0, 4: 0.5, 8: 0.7, 6: 0.6}, 5),
        ({2: 1.0, 4: 0.5, 8: 0.7, 6: 0.6, 5: 0.6}, 3),
        ({2: 1.0, 4: 0.5, 8: 0.7, 6: 0.6, 5: 0.6, 3: 0.6}, None),
        ({2: 1.0, 4: 1.0}, 3),  # the first of equals is the best
        ({1: 1.0, 2: 2.0}, None),  # no client of zero steps
        ({4: 1.0, 2: math.inf, 6: math.inf}, 5),
    ],
)
def test_the_next_steps_to_try_follow_from_the_losses(losses, tried):
    assert unrolled.next_steps(losses, max_local_steps=64) == tried


def test_a_search_that_ended_in_nan_is_not_the_best(seen):
    assert unrolled.next_steps({2: math.nan, 4: 1.0}, 64) == unrolled.next_steps(
        {2: math.inf, 4: 1.0}, 64
    )
    tried = []

    def from_nan_once(shape, like, generator):
        start, to_images = coordinates.pixels(shape, like, generator)
        tried.append(start)
        return (start if len(tried) > 1 else start * math.nan), to_images

    budget = {"max_local_steps": 2, "max_evaluations": 3, "whole_budget": True}
    found = unrolled.unrolled_dlm(seen, coordinates=from_nan_once, **budget)
    assert math.isnan(found.tried[0][1]) and math.isfinite(found.loss)


def test_the_next_steps_keep_to_the_largest_allowed_and_to_the_grain():
    assert unrolled.next_steps({2: 1.0}, max_local_steps=3) == 3
    assert unrolled.next_steps({2: 1.0, 3: 0.5}, max_local_steps=3) is None
    losses = {16: 0.5, 14: 1.0, 18: 1.0}
    assert unrolled.next_steps(losses, max_local_steps=64) == 17
    assert unrolled.next_steps(losses, max_local_steps=64, finest=16) == 17
    assert unrolled.next_steps(losses, max_local_steps=64, finest=8) is None


def test_searches_that_are_cut_short_come_to_an_end():
    """Each ends a little lower than the one before, so that E wandered for an hour."""
    losses = []

    def search(steps, best=None, **limits):
        losses.append(1 / (len(losses) + 1))
        return ended(steps, losses[-1], Status.BUDGET)

    searches = unrolled.find_steps(search, max_local_steps=64)
    assert len(searches) == len(losses) < 2 * unrolled.MOST


def test_a_search_that_converged_is_the_last():
    def search(steps, best=None, **limits):
        return ended(steps, 1 / steps, Status.CONVERGED if steps == 4 else Status.STALLED)

    assert [each.local_steps for each in unrolled.find_steps(search, max_local_steps=64)] == [2, 4]


def test_steps_told_are_not_searched(seen):
    found = attacks.unrolled_dlm(seen, local_steps=1, max_evaluations=200)
    assert [steps for steps, _ in found.tried] == [1] and found.learning_rate == pytest.approx(
        0.05, rel=0.05
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"client_optimizer": "sdg"}, "client_optimizer 'sdg' is unknown.*did you mean sgd"),
        ({"local_steps": 0}, "local_steps is 0; it takes a whole number of at least 1"),
        ({"max_local_steps": 2.5}, "max_local_steps is 2.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_evaluations": 0}, "max_evaluations is 0"),
        ({"num_images": 0}, "num_images is 0"),
        (
            {"num_images": 2, "labels": torch.tensor([0.5, 1.0])},
            "labels is .*; it takes .* class indices",
        ),
        ({"num_images": 2, "labels": [3]}, r"labels has shape \[1\]; it takes 2 class indices"),
        (
            {"optimizer_options": {"momentun": 0.9}},
            "optimizer_options 'momentun' is unknown: choose from momentum, dampening, nesterov",
        ),
        ({"optimizer_options": {"momentum": -0.9}}, "momentum is -0.9; it takes a finite number"),
        ({"scale": 2.0}, "option of unrolled_dlm 'scale' is unknown"),
    ],
)
def test_bad_options_are_named(seen, options, message):
    with pytest.raises(ValueError, match=message):
        attacks.unrolled_dlm(seen, **options)


def test_as_a_trial():
    client = {"learning_rate": 0.2, "local_steps": 2}
    trial = Trial(
        attack="unrolled_dlm",
        attack_options={"local_steps": 2, "max_evaluations": 5},
        dataset="digits",
        client=client,
    )
    record = run_trial(trial)
    assert record["local_steps"] == 2
    assert math.isfinite(record["learning_rate"])
    assert record["evaluations"] == 5


def test_the_labels_of_a_batch_are_inferred_for_several_steps():
    images, truth, *_ = data.load("cifar100", n=8, source="bundled")
    seen = federated.train_locally(
        models.build("lenet", seed=0), images, truth, learning_rate=0.01, local_steps=2
    )
    for labels in ({}, {"labels": "inferred"}, {"labels": truth.sort().values}):
        found = attacks.unrolled_dlm(seen, local_steps=2, num_images=8, max_evaluations=1, **labels)
        assert found.labels.tolist() == sorted(truth.tolist())


@pytest.mark.parametrize("true", [1, 2, 3, 7])
def test_the_search_for_the_steps_tries_no_client_of_zero_steps(true):
    def search(steps, best=None, **limits):
        return ended(steps, 1.0 + abs(steps - true))

    searches = unrolled.find_steps(search, max_local_steps=16)
    best = min(searches, key=lambda each: each.loss)
    assert best.local_steps == true
    assert min(each.local_steps for each in searches) >= 1


def test_a_loss_that_hardly_falls_ends_the_search_for_the_steps():
    calls = []

    def creeping(steps, best=None, **limits):
        calls.append(steps)
        return ended(steps, 1 - 1e-6 * len(calls))

    unrolled.find_steps(creeping, max_local_steps=64)
    assert len(calls) < 20


def test_short_searches_start_where_the_best_ended():
    calls = []

    def search(steps, best=None, **limits):
        calls.append((steps, best and best.local_steps, limits))
        return ended(steps, 1.0 + abs(steps - 3))

    unrolled.find_steps(search, max_local_steps=64)
    short = {"evaluations": unrolled.SHORT, "patience": unrolled.HURRY}
    assert calls[:3] == [(2, None, {"patience": unrolled.HURRY}), (4, 2, short), (3, 2, short)]
    assert calls[3:] == [(3, 3, {}), (4, 3, short), (2, 3, short)]


def test_a_client_optimizer_of_ones_own_is_simulated(small, digit, monkeypatch):
    def halved(weight, gradient, state, rate, *, factor=0.5):
        return weight - factor * rate * gradient, state

    own = records.ClientOptimizer(
        key="halved", function=torch.optim.SGD, title="halved", step=halved
    )
    monkeypatch.setitem(records.CLIENT_OPTIMIZERS, "halved", own)
    seen = federated.train_locally(small, *digit, learning_rate=0.2)
    told = {"client_optimizer": "halved", "optimizer_options": {"factor": 1.0}}
    found = attacks.unrolled_dlm(seen, **told, local_steps=1, max_evaluations=1)
    assert found.client.optimizer == "halved"
    unsimulated = records.ClientOptimizer(key="plain", function=torch.optim.SGD, title="plain")
    monkeypatch.setitem(records.CLIENT_OPTIMIZERS, "plain", unsimulated)
    with pytest.raises(ValueError, match="client_optimizer 'plain' is unknown: choose from sgd"):
        attacks.unrolled_dlm(seen, client_optimizer="plain")


def test_the_former_names_serve(seen):
    told = {"client": "sgd", "client_options": {"momentum": 0.5}, "steps": 1, "max_steps": 3}
    found = attacks.unrolled_dlm(seen, **told, max_evaluations=2)
    again = attacks.unrolled_dlm(
        seen,
        client_optimizer="sgd",
        optimizer_options={"momentum": 0.5},
        local_steps=1,
        max_local_steps=3,
        max_evaluations=2,
    )
    assert torch.equal(found.images, again.images)


def test_labels_of_any_whole_type_train_the_simulated_client(digit):
    model = models.build("mlp", (1, 8, 8), 10, seed=0).to(digit[0].device)
    told = [digit[1], digit[1].to(torch.int32), digit[1].to(torch.uint8)]
    first, *others = [
        clients.update(model, federated.loss, digit[0], each, learning_rate=0.1) for each in told
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("optimizer, options", [("sgd", {"momentum": 0.9}), ("adamw", {})])
def test_a_frozen_and_an_unused_layer_stay_in_the_simulation(digit, optimizer, options):
    model = Idle().double().to(digit[0].device)
    training = {"learning_rate": 0.1, "local_steps": 3}
    options = {**options, "weight_decay": 0.1}
    seen = federated.train_locally(
        model, *digit, **training, client_optimizer=optimizer, optimizer_options=options
    )
    images = digit[0].double().requires_grad_()
    for checkpointed in (False, True):
        update = clients.update(
            model,
            federated.loss,
            images,
            digit[1],
            **training,
            client_optimizer=clients.OPTIMIZERS[optimizer],
            optimizer_options=options,
            checkpointed=checkpointed,
        )
        for simulated, real in zip(update, seen.delta, strict=True):
            torch.testing.assert_close(simulated.detach(), real, rtol=1e-6, atol=1e-12)
        (slope,) = torch.autograd.grad(update[-2].square().sum(), images)
        assert slope.isfinite().all() and slope.any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.full((2, 9), 1 / 9)}, "labels has shape .* or a distribution over"),
        ({"labels": torch.tensor([1])}, "labels has shape .*; it takes 2 class indices"),
        ({"labels": torch.tensor([1, 10])}, "labels run from 1 to 10; the model has classes 0"),
        ({"learning_rate": 0}, "learning_rate is 0; it takes"),
        ({"optimizer_options": {"nestrov": True}}, "optimizer_options 'nestrov' is unknown"),
    ],
)
def test_a_simulation_of_nothing_sensible_is_refused(small, change, message):
    told = {"labels": torch.full((2, 10), 0.1), "learning_rate": 0.1, **change}
    device = next(small.parameters()).device
    images = torch.rand(2, 1, 8, 8, device=device)
    labels = told.pop("labels").to(device)
    with pytest.raises(ValueError, match=message):
        clients.update(small, federated.loss, images, labels, **told)


@pytest.mark.parametrize(
    "attack, options",
    [
        ("unrolled_dlm", {"max_local_steps": 4}),
        ("shuffled_dlm", {"local_steps": 2}),
        ("order_invariant", {"learning_rate": 0.05, "num_epochs": 2, "batch_size": 1}),
    ],
)
def test_a_network_with_dropout_is_attacked_from_the_seed_alone(attack, options):
    torch.manual_seed(0)
    images, labels, *_ = data.load("digits", n=1)
    layers = torch.nn.Linear(64, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 10)
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    seen = federated.train_locally(model, images, labels, learning_rate=0.05, local_steps=2)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(records.ATTACKS[attack](seen, max_evaluations=3, **options))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0].images, found[1].images) and found[0].loss == found[1].loss
