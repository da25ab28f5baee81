"""What the update of a trial's client tells: the same as ``information`` says, kept by a sweep."""

from dataclasses import replace

import pytest
import torch

from dlm_core import data, information, models
from dlm_core.harness import bounds, sweeps
from dlm_core.harness.trials import Trial

TRIAL = Trial(dataset="digits", model="mlp", client={"learning_rate": 0.1, "dtype": "float32"})
SENT = replace(TRIAL, client={"learning_rate": 0.1, "transmitted": "bfloat16"})
NOISY = {"name": "clip_and_noise", "clip": 1.0, "noise_multiplier": 1e-3}


def mlp_and_digit():
    images, labels, *_ = data.load("digits", n=1)
    return models.build("mlp", (1, 8, 8), 10, seed=0), images, labels


def test_it_is_the_information_of_the_trial_s_client(tmp_path):
    (record,) = sweeps.sweep([bounds.Bound(SENT)], jobs=1, store=tmp_path)
    given = {"learning_rate": 0.1, "transmitted": torch.bfloat16}
    found = information.of_update(*mlp_and_digit(), **given)
    assert record["white"] == pytest.approx(found.bound_psnr)
    assert record["smooth"] == pytest.approx(found.posterior("smooth").psnr)
    assert (record["fixed"], record["size"]) == (found.directions(0.05), 64)
    assert torch.allclose(record["arrays"]["map"].double(), found.map(), atol=1e-6)
    (kept,) = sweeps.sweep([bounds.Bound(SENT)], jobs=1, store=tmp_path)
    assert kept["seconds"] == record["seconds"]  # it was not computed again


def test_trials_of_one_client_have_one_bound_and_others_their_own():
    of_another = replace(TRIAL, attack="exact", attack_options={"max_steps": 0})
    assert bounds.Bound(TRIAL).key == bounds.Bound(of_another).key
    for change in ({"seed": 1}, {"defence": NOISY}, {"client": {"learning_rate": 0.2}}):
        assert bounds.Bound(replace(TRIAL, **change)).key != bounds.Bound(TRIAL).key


def test_the_noise_that_is_enough_is_the_client_s_without_its_defence():
    given = mlp_and_digit()
    wanted = information.noise_for(*given, learning_rate=0.1, psnr=25.0)
    noise = bounds.Noise(replace(TRIAL, defence=NOISY), psnr=25.0).run()
    assert noise["noise"] == pytest.approx(wanted)
    under = {**NOISY, "clip": 10 * noise["length"]}
    under["noise_multiplier"] = wanted / under["clip"]
    bound = bounds.Bound(replace(TRIAL, defence=under)).run()
    assert bound["smooth"] == pytest.approx(25, abs=0.1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"protocol": {"name": "rounds"}}, "protocol 'rounds'"),
        ({"client": {"clear_gradients": False}}, "clear_gradients"),
    ],
)
def test_what_it_does_not_know_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        bounds.Bound(replace(TRIAL, **change))
