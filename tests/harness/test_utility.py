"""A federated training under a defence is a value: same value, same result; the defence reaches
what is averaged.
"""

from dataclasses import replace

import pytest
import torch

from dlm_core import federated
from dlm_core.harness import sweeps
from dlm_core.harness.utility import Federation

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
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_training_on_samples_of_a_data_set_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no FashionMNIST in"):
        replace(TINY, dataset="fashion_mnist").run()
