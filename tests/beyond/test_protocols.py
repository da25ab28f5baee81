"""Other ways to learn together.

What their observers hold is the gradient, the mean or the mixture that mathematics says.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dlm_core import attacks, data, defenses, federated, metrics, models, objectives, records
from dlm_core.beyond import adaptive, exact, normalisation, protocols


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
    with pytest.raises(
        ValueError, match="number of clients is 1; it takes a whole number of at least 2"
    ):
        protocols.aggregate(model, clients[:1], curious=True, learning_rate=0.5)


def of_sizes(clients, *sizes):
    """The images of single ones as clients of these sizes."""
    images, labels = (torch.cat(parts) for parts in zip(*clients))
    return list(zip(images.split(sizes), labels.split(sizes)))


@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (2, 3), (1, 1, 3), (2, 2, 1)])
def test_clients_of_unequal_size_count_by_their_images(model, clients, sizes):
    unequal = of_sizes(clients, *sizes)
    seen = protocols.aggregate(model, unequal, learning_rate=0.5)
    assert_update(seen, [0.5 * g for g in gradient(model, clients)])
    curious = protocols.aggregate(model, unequal, curious=True, learning_rate=0.5)
    assert_update(
        curious, [0.5 * g for g in gradient(model, clients[: sum(sizes[:-1])])], atol=1e-6
    )


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("own", range(1, 5))
def test_the_others_of_any_share_are_told_from_the_mean(size, own):
    draws = torch.Generator().manual_seed(size)
    theirs, mine = torch.randn(2, 3, generator=draws, dtype=torch.float64)
    mean = (size * theirs + own * mine) / (size + own)
    (found,) = protocols.others([mean], [mine], (size + own) / own)
    torch.testing.assert_close(found, theirs)


def test_an_aggregate_of_batch_norm_clients_holds_their_batches(clients):
    """Six counts of one batch were once averaged to none."""
    model = models.build("resnet18_bn", (1, 8, 8), 10, seed=0, width=2, blocks=1)
    pairs = of_sizes([*clients, clients[0]] * 2, *[2] * 6)
    seen = protocols.aggregate(model, pairs, learning_rate=0.01)
    assert set(normalisation.local_batches(seen).values()) == {1}
    each = [federated.train_locally(model, *pair, learning_rate=0.01) for pair in pairs]
    found = normalisation.batch_statistics(seen)
    for name, (mean, variance) in found.items():
        alone = [normalisation.batch_statistics(one)[name] for one in each]
        torch.testing.assert_close(mean, sum(m for m, _ in alone) / 6, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, sum(v for _, v in alone) / 6, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, options", [(3, {}), (5, {"turn": 2, "accomplice": True})])
def test_peers_count_their_batches_whole(clients, size, options):
    model = models.build("resnet18_bn", (1, 8, 8), 10, seed=0, width=2, blocks=1)
    pairs = of_sizes(clients * 2, *[2] * 5)[:size]
    seen = protocols.gossip(model, pairs, learning_rate=0.01, **options)
    assert set(normalisation.local_batches(seen).values()) == {1}


def test_an_aggregate_of_defended_clients_is_that_of_what_they_send(model, clients):
    def defend(seen, turn, client):
        return defenses.defend(seen, "top_k", percent=50)

    sent = [
        defend(federated.train_locally(model, *client, learning_rate=0.5), 0, 0)
        for client in clients[:2]
    ]
    both = protocols.aggregate(model, clients[:2], defend=defend, learning_rate=0.5)
    assert_update(both, [(a + b) / 2 for a, b in zip(*(each.delta for each in sent))])
    other = protocols.aggregate(model, clients[:2], curious=True, defend=defend, learning_rate=0.5)
    assert_update(other, sent[0].delta, atol=1e-6)
    assert "defend" in records.PROTOCOLS["aggregate"].options


def idle():
    """A network with a frozen layer, and with a parameter that is never used."""
    flatten, first, head = torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Linear(16, 10)
    network = torch.nn.Sequential(flatten, first.requires_grad_(False), torch.nn.Tanh(), head)
    network.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
    return network


def told_the_first(seen):
    """An attack of an omniscient listener, on the peer between."""
    image, label = data.load("digits", n=5)[:2]
    found = attacks.grey(seen)
    client = replace(found.client, learning_rate=0.5)
    return replace(found, images=image[4:], labels=label[4:], client=client)


@pytest.mark.parametrize(
    "key, options",
    [
        ("fedsgd", {"num_rounds": 2}),
        ("aggregate", {"curious": True}),
        ("rounds", {"num_rounds": 2}),
        ("gossip", {"turn": 1, "accomplice": True}),
        ("two_hops", {"attack": told_the_first}),
        ("data_parallel", {"num_rounds": 2}),
    ],
)
def test_every_protocol_lives_with_a_frozen_and_an_unused_layer(clients, key, options):
    seen = records.PROTOCOLS[key].function(idle(), clients, learning_rate=0.5, **options)
    for each in seen if isinstance(seen, list) else [seen]:
        moved = {name for name, layer in each.delta_by_name.items() if layer.abs().max() > 1e-6}
        assert moved == {"3.weight", "3.bias"}


BAD = {
    "no clients": ([], "number of clients is 0"),
    "no pair": ([1, 2], "clients is .*, and not 1 in it"),
    "of 0 to 255": ([(torch.full((1, 1, 8, 8), 255.0), torch.tensor([1]))] * 4, "clients is"),
    "no class": ([(torch.rand(1, 1, 8, 8), torch.tensor([10]))] * 4, "labels run from 10 to 10"),
    "of unlike length": ([(torch.rand(2, 1, 8, 8), torch.tensor([1]))] * 4, "labels has shape"),
}


@pytest.mark.parametrize("key", sorted(records.PROTOCOLS))
@pytest.mark.parametrize("bad, message", BAD.values(), ids=BAD)
def test_every_protocol_refuses_what_are_no_clients(model, key, bad, message):
    record = records.PROTOCOLS[key]
    told = {"num_rounds": 1} if "num_rounds" in record.demands else {}
    with pytest.raises(ValueError, match=message) as caught:
        record.function(model, bad, learning_rate=0.1, **told)
    assert "\n" not in str(caught.value)


def test_a_listener_s_own_attack_is_found_in_a_fresh_process():
    script = (
        "from dlm_core import data, models, protocols;"
        "images, labels, *_ = data.load('digits', n=4);"
        "clients = list(zip(images.split(1), labels.split(1)));"
        "model = models.build('mlp', (1, 8, 8), 10, seed=3, activation='tanh');"
        "print(protocols.two_hops(model, clients, learning_rate=0.1))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("Observation("), done.stderr


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


@pytest.mark.parametrize("name", ["noise", "clip_and_noise"])
def test_a_curious_client_subtracts_what_it_sent_itself(model, clients, name):
    """On the channel others see W_t with noise, which it received without."""

    def defend(seen, turn, client):
        return defenses.defend(seen, name, seed=client, **records.DEFENCES[name].example)

    found = protocols.aggregate(model, clients[:2], curious=True, learning_rate=0.1, defend=defend)
    other = defend(federated.train_locally(model, *clients[0], learning_rate=0.1), 0, 0)
    own = federated.observe(model, model.state_dict(), other.weights_after, other.image_shape)
    for a, b in zip(found.delta, own.delta):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("curious", [False, True])
def test_an_aggregate_of_half_precision_is_that_of_what_the_clients_received(
    model, clients, curious
):
    """Δ held the rounding of W_t as well, which no client had taken part in."""
    sent = {"learning_rate": 0.01, "transmitted": torch.bfloat16}
    several = clients[: 1 + curious]
    seen = protocols.aggregate(model, several, curious=curious, **sent)
    alone = federated.train_locally(model, *several[0], **sent)
    for ours, theirs in zip(seen.delta, alone.delta):
        assert torch.allclose(ours, theirs, atol=1e-7 if curious else 0)
    received = alone.model.state_dict()
    assert all(torch.equal(w, received[name]) for name, w in seen.model.state_dict().items())
