"""A server that keeps all rounds of one client."""

from dataclasses import replace

import pytest
import torch

from dlm_core import data, federated, models, records
from dlm_core.harness import all_rounds, options
from dlm_core.harness.all_rounds import Watched
from dlm_core.records import Options

TRAINING = options.federation("digits", num_rounds=4)
(OPTION,) = (o for o in options.menu(TRAINING, multipliers=[0.01]) if o.family.endswith("local"))
DIVISION = Options(max_steps=0)


def client(**how):
    start = {"training": OPTION.training, "shown": OPTION.shown, "attack": "aware_exact"}
    return Watched(**{**start, "attack_options": DIVISION, "averaged": True, **how})


def test_the_average_of_all_rounds_divides_to_more_than_few_do():
    one, four = (client(training=replace(OPTION.training, num_rounds=n)) for n in (1, 4))
    records = one.run(), four.run()
    assert [each["rounds"] for each in records] == [1, 4]
    assert records[1]["psnr"] > records[0]["psnr"] + 1
    assert records[1]["arrays"]["images"].shape == (1, 1, 8, 8)


def test_a_run_is_the_same_each_time():
    records = [client(index=2).run() for _ in range(2)]
    assert records[0]["psnr"] == records[1]["psnr"]
    assert torch.equal(*(each["arrays"]["images"] for each in records))


def test_with_dropout_a_run_is_the_same_whatever_ran_before(dropping):
    training = replace(OPTION.training, model=dropping, model_options=Options(), num_rounds=2)
    search = {"attack": "aware_dlm_plus", "attack_options": Options(max_evaluations=3)}
    first, again = (client(training=training, **search).run() for _ in range(2))
    assert torch.equal(first["arrays"]["images"], again["arrays"]["images"])


def test_a_network_that_is_defined_again_is_watched_anew(dropping):
    """One that was trained under the same name serves no more."""
    training = replace(OPTION.training, model=dropping, model_options=Options(), num_rounds=1)
    watched = client(training=training)
    found = []
    for width in (8, 24, 8):

        def network(image_shape, num_classes, width=width):
            return models.mlp(image_shape, num_classes, hidden=width)

        records.NETWORKS[dropping] = replace(records.NETWORKS[dropping], function=network)
        found.append(watched.run()["arrays"]["images"])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_each_so_many_th_round_is_kept():
    quick = Options(learning_rate=1.0, max_evaluations=3, training_steps=5)
    how = {"attack": "learned_prior", "attack_options": quick, "averaged": False}
    assert client(every=2, **how).run()["rounds"] == 2


def test_no_client_trains_on_an_image_that_may_be_attacked(monkeypatch):
    trained = []
    rounds = federated.rounds

    def noted(model, parts, **how):
        trained.extend(images for images, _ in parts)
        return rounds(model, parts, **how)

    monkeypatch.setattr(federated, "rounds", noted)
    all_rounds._sent.cache_clear()
    client().run()
    attacked = data.load("digits").images[: all_rounds.RESERVED].flatten(1)
    images = torch.cat(trained).flatten(1)
    assert len(images) > 1300
    assert torch.cdist(images, attacked).min() > 0


def test_a_key_covers_training_defence_attack_and_images():
    others = [
        client(index=1),
        client(local_steps=2),
        client(averaged=False, every=2),
        client(attack_options=Options(max_steps=1)),
        client(training=replace(OPTION.training, seed=1)),
        client(shown=replace(OPTION.shown, options=Options(clip=0.5))),
    ]
    keys = {each.key for each in [client(), *others]}
    assert len(keys) == len(others) + 1
    assert client().key == client().key


@pytest.mark.parametrize(
    "how, message",
    [
        ({"index": 99, "num_images": 2}, "among the first 100"),
        ({"attack": "no_such"}, "attack 'no_such' is unknown"),
        ({"attack_options": {"max_step": 0}}, "max_step"),
        ({"attack": "learned_prior", "attack_options": {}}, "must be told learning_rate"),
        ({"every": 0}, "every is 0"),
    ],
)
def test_what_cannot_be_run_is_refused_when_it_is_made(how, message):
    with pytest.raises(ValueError, match=message):
        client(**how)


def test_averaging_takes_at_least_one_round():
    with pytest.raises(ValueError, match="number of rounds is 0"):
        all_rounds.averaged([])
