"""A federated training under a defence is a value: same value, same result; the defence reaches
what is averaged.
"""

from dataclasses import replace

import pytest
import torch

from dlm_core import federated, records
from dlm_core.defenses import Setting
from dlm_core.harness import sweeps
from dlm_core.harness.utility import Federation
from dlm_core.threads import own_generator

TINY = Federation(
    model="mlp",
    model_options={"init": "default", "hidden": 8},
    num_clients=2,
    num_rounds=3,
    client={"learning_rate": 0.5, "local_steps": 2},
)


def test_training_learns_and_is_reproducible(tmp_path):
    plan = [TINY, replace(TINY, seed=1), TINY]
    first, other, again = sweeps.sweep(plan, jobs=1, store=tmp_path)
    assert first == again and first["accuracies"] != other["accuracies"]
    assert len(first["accuracies"]) == 3 and first["stop_reason"] == "finished"
    longer = replace(TINY, num_rounds=30).run()
    assert longer["accuracy"] > 0.5 > 0.2 > first["accuracies"][0]


def test_the_defence_is_applied_to_what_is_averaged():
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    from dlm_core import models

    model = models.build("mlp", (1, 8, 8), 10)
    calls = []

    def silence(seen, number, client):
        calls.append((number, client))
        return (
            seen
            if client
            else replace(seen, weights_after={k: v + 1 for k, v in seen.weights_after.items()})
        )

    clients = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    ((plain, seen),) = federated.rounds(model, clients, num_rounds=1, learning_rate=0.1)
    ((shifted, sent),) = federated.rounds(
        model, clients, num_rounds=1, learning_rate=0.1, defend=silence
    )
    assert calls == [(0, 0), (0, 1)]
    for name, weight in plain.state_dict().items():
        assert torch.allclose(shifted.state_dict()[name], weight + 0.5, atol=1e-6)


def test_strong_noise_costs_the_accuracy_and_weak_noise_does_not():
    plain = replace(TINY, num_rounds=20)
    noise = {"name": "clip_and_noise", "clip": 10.0}
    weak, strong = (
        replace(plain, defence={**noise, "noise_multiplier": z}).run()["accuracy"]
        for z in (1e-6, 10.0)
    )
    assert weak == pytest.approx(plain.run()["accuracy"], abs=0.02)
    assert strong < 0.4


def test_dp_sgd_clients_draw_new_noise_each_time():
    private = replace(
        TINY, num_rounds=2, client={"learning_rate": 0.5, "clip": 1.0, "noise_multiplier": 1.0}
    )
    assert private.run() == private.run()
    assert private.run()["accuracies"] != replace(private, seed=1).run()["accuracies"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_rounds": 0}, "num_rounds is 0"),
        ({"num_clients": 0}, "num_clients is 0"),
        ({"defence": {"name": "topk"}}, "defence 'topk' is unknown.*did you mean top_k"),
        (
            {"defence": {"name": "top_k", "percnt": 9}},
            "option of top_k 'percnt' is unknown.*percent",
        ),
        ({"client": {"lr": 0.1}}, "client setting 'lr' is unknown.*choose from learning_rate"),
        ({"model": "lenett"}, "model 'lenett' is unknown.*did you mean lenet"),
        ({"dataset": "digit"}, "dataset 'digit' is unknown.*did you mean digits"),
        ({"model_options": {"dpth": 2}}, "option of mlp 'dpth' is unknown.*did you mean depth"),
        ({"model_options": {"depth": 0}}, "depth is 0"),
        ({"model_options": {"init": "papr"}}, "init 'papr' is unknown.*did you mean paper"),
        ({"client": {"learning_rate": -1}}, "learning_rate is -1; it takes a finite number in"),
        ({"client": {"local_steps": 0}}, "local_steps is 0"),
        ({"client": {"batch_size": 0.5}}, "batch_size is 0.5"),
        ({"client": {"clip": 1.0}}, "clip and noise_multiplier go together"),
        (
            {"client": {"clip": 1.0, "noise_multiplier": 1.0, "batch_size": 3}},
            "batch_size is 3; DP-SGD takes all images",
        ),
        ({"defence": {"name": "sparsify", "percent": 110}}, "percent is 110"),
        (
            {"defence": {"name": "noise", "scale": 0.1, "distribution": "gauss"}},
            "distribution is 'gauss'; it takes 'laplace' or 'gaussian'",
        ),
        (
            {"defence": {"name": "noise", "scale": 0.1, "observer": "sever"}},
            "observer is 'sever'; it takes 'channel' or 'server'",
        ),
        ({"defence": {}}, "defence is {}; it takes a Setting or a dict with a name"),
        ({"num_clients": 1439}, "num_clients is 1439; digits has 1438 images to train on"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_each_client_may_have_one_image():
    every = replace(TINY, num_clients=1438, num_rounds=1)
    assert every.num_clients == 1438


def test_a_set_too_small_to_hold_images_out_is_refused():
    @records.data_set("four", title="Four", image_shape=(1, 8, 8), num_classes=10)
    def four():
        return torch.rand(4, 1, 8, 8), torch.arange(4)

    try:
        with pytest.raises(ValueError, match="dataset 'four' has 4 images: too few to hold some"):
            replace(TINY, dataset="four")
    finally:
        del records.DATA_SETS["four"]


def test_only_what_diverges_is_said_to(monkeypatch):
    wild = replace(TINY, client={"learning_rate": 1e38}).run()
    assert wild["stop_reason"] == "diverged" and wild["accuracy"] < 0.2
    overflown = replace(TINY, defence={"name": "noise", "scale": 1e38}).run()
    assert overflown["stop_reason"] == "diverged"

    def broken(*given, **options):
        raise ValueError("a fault of ours")

    monkeypatch.setattr(federated, "average", broken)
    with pytest.raises(ValueError, match="a fault of ours"):
        TINY.run()


@pytest.mark.parametrize("name, rounds", [("top_k", 1), ("sparsify", 2)])
def test_a_training_in_which_nothing_moves_has_the_accuracy_of_its_model(name, rounds):
    still = replace(TINY, num_rounds=5, defence={"name": name, "percent": 100}).run()
    assert still["stop_reason"] == "stalled" and len(still["accuracies"]) == rounds
    assert still["accuracy"] == still["accuracies"][-1]
    if name == "top_k":
        barely = replace(TINY, num_rounds=1, client={"learning_rate": 1e-6}).run()
        assert still["accuracy"] == pytest.approx(barely["accuracy"], abs=0.01)


def test_who_looks_on_changes_no_accuracy():
    noise = {"name": "noise", "scale": 1e-3}
    plain, server, channel, setting = (
        replace(TINY, defence=defence)
        for defence in (
            noise,
            {**noise, "observer": "server"},
            {**noise, "observer": "channel"},
            Setting("noise", {"scale": 1e-3}),
        )
    )
    assert plain == server == channel == setting
    assert plain.defence.observer == "server" and plain.key == setting.key


def test_a_network_with_dropout_is_measured_without_it_and_the_same_each_time(dropping):
    """In training it draws from the seed, and leaves the caller's generator as it was."""
    training = replace(TINY, model=dropping, model_options={})
    before = torch.get_rng_state()
    first, again = training.run(), training.run()
    assert first == again and torch.equal(torch.get_rng_state(), before)
    (images, labels), held_out, _ = training.split()
    with own_generator(training.seed):
        *_, last = training.rounds(images, labels)
    right = last.eval()(held_out[0]).argmax(1) == held_out[1]
    assert first["accuracies"][-1] == pytest.approx(float(right.double().mean()))


def test_training_on_samples_of_a_data_set_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no FashionMNIST in"):
        replace(TINY, dataset="fashion_mnist").run()
