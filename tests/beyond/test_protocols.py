"""Other ways to learn together.

What their observers hold is the gradient, the mean or the mixture that mathematics says.
"""

import subprocess
import sys

import pytest
import torch

from dlm_core import data, defenses, federated, metrics, models, objectives
from dlm_core.beyond import adaptive, exact, protocols


@pytest.fixture
def clients():
    images, labels, *_ = data.load("digits", n=5)
    return list(zip(images.split(1), labels.split(1)))


@pytest.fixture
def model():
    return models.build("lenet", (1, 8, 8), 10, seed=3, depth=2)


def gradient(model, clients):
    """Of the mean loss over the clients' images together."""
    images, labels = (torch.cat(parts) for parts in zip(*clients))
    return torch.autograd.grad(federated.loss(model(images), labels), list(model.parameters()))


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


def assert_update(seen, expected, atol=2e-7):
    torch.testing.assert_close(flat(seen.delta), flat(expected), rtol=0, atol=atol)


def test_fedsgd_shows_the_gradient_at_the_server_s_weights(model, clients):
    assert_update(
        protocols.fedsgd(model, clients[:2], learning_rate=0.1), gradient(model, clients[:1])
    )
    later = protocols.fedsgd(model, clients[:2], learning_rate=0.1, num_rounds=2)
    step = [0.1 * g for g in gradient(model, clients[:2])]
    moved = [p - s for p, s in zip(model.parameters(), step)]
    torch.testing.assert_close(flat(later.model.parameters()), flat(moved), rtol=0, atol=2e-7)
    assert_update(later, gradient(later.model, clients[:1]))


def test_an_aggregate_is_a_step_on_the_joint_batch(model, clients):
    seen = protocols.aggregate(model, clients, learning_rate=0.5)
    images, labels = (torch.cat(parts) for parts in zip(*clients))
    assert_update(seen, federated.train_locally(model, images, labels, learning_rate=0.5).delta)


def test_a_curious_client_of_two_holds_the_other_s_update(model, clients):
    seen = protocols.aggregate(model, clients[:2], curious=True, learning_rate=0.5, local_steps=3)
    assert_update(
        seen, federated.train_locally(model, *clients[0], learning_rate=0.5, local_steps=3).delta
    )
    three = protocols.aggregate(model, clients[:3], curious=True, learning_rate=0.5)
    assert_update(three, [0.5 * g for g in gradient(model, clients[:2])])
    with pytest.raises(ValueError, match="number is 1; it takes a whole number of at least 2"):
        protocols.aggregate(model, clients[:1], curious=True, learning_rate=0.5)


def test_a_data_parallel_worker_subtracts_its_own_gradient(model, clients):
    before = [p.clone() for p in model.parameters()]
    seen = protocols.data_parallel(model, clients[:2], learning_rate=0.5, num_rounds=2)
    first = gradient(
        model, clients[:2]
    )  # all_reduce's mean is that of the joint batch: the workers' weights after a step
    torch.testing.assert_close(
        flat(seen.model.parameters()),
        flat([p - 0.5 * g for p, g in zip(before, first)]),
        rtol=0,
        atol=2e-7,
    )
    assert_update(seen, gradient(seen.model, clients[:1]))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_no_data_parallel_worker_outlives_a_failure(model, clients, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *given, **how: started.append(popen(*given, **how)) or started[-1],
    )
    with pytest.raises(TimeoutError, match="has not ended within 0.2 seconds"):
        protocols.data_parallel(model, clients[:2], learning_rate=0.5, timeout=0.2)
    assert len(started) == 2 and all(worker.poll() is not None for worker in started)


def test_data_parallel_refuses_bad_input_before_it_starts_processes(model, clients):
    with pytest.raises(ValueError, match="number of clients is 1"):
        protocols.data_parallel(model, clients[:1], learning_rate=0.5)
    with pytest.raises(ValueError, match="learning_rate is 0; it takes"):
        protocols.data_parallel(model, clients, learning_rate=0)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_mixing_conserves_the_mean_and_gradients_move_it(model, clients, size):
    starts = [protocols.shuffled(model, i) for i in range(size)]
    messages = protocols.exchange(starts, clients[:size], learning_rate=0.5, num_rounds=1)
    before, after = (
        torch.stack([flat(each.values()) for each in turn]).mean(0) for turn in messages
    )
    steps = [flat(gradient(start, [client])) for start, client in zip(starts, clients)]
    torch.testing.assert_close(after, before - 0.5 * torch.stack(steps).mean(0), rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    "size, options",
    [
        (5, {}),
        (2, {"turn": 2}),
        (3, {"turn": 2, "private": True}),
        (5, {"turn": 2, "accomplice": True, "private": True}),
    ],
)
def test_whoever_hears_all_that_a_peer_mixes_sees_its_step(model, clients, size, options):
    seen = protocols.gossip(model, clients[:size], learning_rate=0.5, **options)
    assert_update(seen, [0.5 * g for g in gradient(seen.model, clients[:1])], atol=1e-6)


@pytest.mark.parametrize("options", [{"turn": 1}, {"private": True}])
def test_a_peer_that_is_not_heard_hides_the_step(model, clients, options):
    seen = protocols.gossip(model, clients, learning_rate=0.5, **options)
    expected = 0.5 * flat(gradient(seen.model, clients[:1]))
    assert (flat(seen.delta) - expected).norm() > expected.norm()


def test_a_listener_reaches_through_the_peer_between(clients):
    model = models.build("mlp", (1, 8, 8), 10, seed=3, activation="tanh")
    seen = protocols.two_hops(model, clients, learning_rate=0.1)
    assert_update(seen, [0.1 * g for g in gradient(model, clients[:1])], atol=1e-6)
    found = exact.recover(seen, extra_variance=[1e-15] * 4)
    assert metrics.psnr(found.images, clients[0][0], data_range=1.0) > 60
    assert found.labels == clients[0][1]
    with pytest.raises(ValueError, match="number of clients is 3"):
        protocols.two_hops(model, clients[:3], learning_rate=0.1)


def test_rounds_are_those_of_the_first_client(model, clients):
    seen = protocols.rounds(model, clients[:3], num_rounds=2, learning_rate=0.5)
    assert len(seen) == 2
    for each in seen:
        assert_update(each, [0.5 * g for g in gradient(each.model, clients[:1])])
    mean = protocols.aggregate(model, clients[:3], learning_rate=0.5).weights_after
    torch.testing.assert_close(
        flat(seen[1].model.state_dict().values()), flat(mean.values()), rtol=0, atol=2e-7
    )


def test_the_combined_objective_is_the_sum_over_rounds(model, clients):
    seen = protocols.rounds(model, clients[:3], num_rounds=3, learning_rate=0.5)
    found = adaptive.combined(seen, defence={}, max_evaluations=3)
    label = clients[0][1]
    assert torch.equal(found.labels, label)

    def distance(each):
        g = objectives.gradient(each.model.double(), federated.loss, found.images, label)
        return objectives.normalised_distance(g, each.delta)

    torch.testing.assert_close(sum(map(distance, seen)).item(), found.loss, rtol=1e-9, atol=0)


def test_noisy_rounds_together_show_more_than_any_alone(model, clients):
    options = {"clip": 0.5, "noise_multiplier": 0.003}

    def defend(seen, turn, client):
        return defenses.defend(seen, defenses.clip_and_noise, seed=7 * turn + client, **options)

    def psnr(rounds):
        found = adaptive.combined(
            rounds, defence={"name": "clip_and_noise", **options}, max_evaluations=40
        )
        return float(metrics.psnr(found.images, clients[0][0], data_range=1.0))

    seen = protocols.rounds(model, clients[:3], num_rounds=3, learning_rate=0.5, defend=defend)
    assert psnr(seen) > max(psnr([each]) for each in seen) + 2


def test_the_listener_s_attack_is_an_argument(clients):
    model = models.build("mlp", (1, 8, 8), 10, seed=3, activation="tanh")
    heard = []

    def attack(seen):
        heard.append(seen)
        return exact.recover(seen)

    own = protocols.two_hops(model, clients, learning_rate=0.1, attack=attack)
    named = protocols.two_hops(model, clients, learning_rate=0.1)
    assert_update(heard[0], [0.1 * g for g in gradient(model, clients[-1:])], atol=1e-2)
    assert all(torch.equal(own.weights_after[n], w) for n, w in named.weights_after.items())
    assert not hasattr(protocols, "exact")


def test_two_hops_says_which_attack_does(clients):
    model = models.build("mlp", (1, 8, 8), 10, seed=3, activation="tanh")
    with pytest.raises(ValueError, match="attack 'exat' is unknown.*did you mean exact"):
        protocols.two_hops(model, clients, learning_rate=0.1, attack="exat")
    with pytest.raises(ValueError, match="attack found no learning rate"):
        protocols.two_hops(model, clients, learning_rate=0.1, attack="grey")


def test_a_worker_of_data_parallel_imports_no_attack():
    script = (
        "import sys; from dlm_core.beyond import protocols; "
        "print('dlm_core.beyond.exact' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n"
