"""What is declared of the attackers who know the defence.

What they find is tested beside the defences.
"""

from dataclasses import replace

import pytest
import torch

from dlm_core import attacks, data, defenses, federated, metrics, models, records
from dlm_core.beyond import adaptive

AWARE = ["aware_exact", "aware_dlm_plus", "aware_unrolled_dlm", "aware_combined"]


@pytest.mark.parametrize("key", AWARE)
def test_an_aware_attack_is_told_the_defence(key):
    record = records.ATTACKS[key]
    assert "defence" in record.demands
    assert "defence" in record.told
    assert "defended" in record.client


def test_the_unrolled_one_is_told_what_a_server_prescribes():
    told = records.ATTACKS["aware_unrolled_dlm"].told
    assert {"learning rate", "local steps", "that the client ran plain SGD"} <= set(told)


@pytest.mark.parametrize("key", AWARE)
def test_a_misspelt_option_is_refused(key):
    with pytest.raises(ValueError, match="defense.*is unknown.*did you mean defence"):
        records.ATTACKS[key].check_options("option", {"defense": {}})


def test_a_defence_is_told_as_a_setting_or_as_a_mapping(seen):
    told = {"name": "sparsify", "percent": 30, "observer": "server"}
    sent = defenses.defend(seen, "sparsify", percent=30, observer="server")
    options = {"max_evaluations": 5}
    found = [
        adaptive.dlm_plus(sent, defence=defence, **options)
        for defence in (told, defenses.Setting.of(told))
    ]
    assert torch.equal(found[0].images, found[1].images)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": 0.0, "local_steps": 2}, "learning_rate is 0.0"),
        ({"learning_rate": 0.1, "local_steps": 0}, "local_steps is 0"),
    ],
)
def test_bad_options_are_named(seen, options, message):
    with pytest.raises(ValueError, match=message):
        adaptive.unrolled_dlm(seen, defence={"name": "sparsify", "percent": 30}, **options)


def test_the_former_name_of_local_steps_serves(small, digit):
    seen = federated.train_locally(small, *digit, learning_rate=0.3, local_steps=2)
    told = {"defence": {"name": "sparsify", "percent": 0}, "learning_rate": 0.3}
    found = adaptive.unrolled_dlm(seen, **told, steps=2, max_evaluations=1)
    again = adaptive.unrolled_dlm(seen, **told, local_steps=2, max_evaluations=1)
    assert torch.equal(found.images, again.images)


def noisy(seen, seed=0):
    return defenses.defend(seen, "noise", scale=1e-4, observer="server", seed=seed)


NOISE = {"name": "noise", "scale": 1e-4, "observer": "server"}
SHORT = {"max_evaluations": 3}


def test_rounds_may_be_of_one_and_the_same_model(seen):
    sent = noisy(seen)
    options = {"defence": NOISE, "total_variation": 0.0, **SHORT}
    together, alone = (adaptive.combined(each, **options) for each in ([sent, sent], [sent]))
    assert together.labels.tolist() == alone.labels.tolist()
    assert together.losses[0] == pytest.approx(2 * alone.losses[0], rel=1e-9)


def test_the_labels_of_several_rounds_are_told_or_inferred(seen, digit):
    rounds = [noisy(seen, 0), noisy(seen, 1)]
    inferred, default, told = (
        adaptive.combined(rounds, defence=NOISE, **SHORT, **labels)
        for labels in ({"labels": "inferred"}, {}, {"labels": digit[1].tolist()})
    )
    assert torch.equal(inferred.images, default.images)
    assert inferred.labels.tolist() == told.labels.tolist() == digit[1].tolist()


@pytest.mark.parametrize(
    "defence", [None, {}, {"name": "noise", "scale": 0.0}, {"name": "clip_and_noise", "clip": 9.0}]
)
def test_a_defence_that_adds_no_noise_is_none_to_several_rounds(seen, defence):
    found = adaptive.combined([seen, seen], defence=defence, **SHORT)
    assert found.losses == adaptive.combined([seen, seen], defence=None, **SHORT).losses


def test_what_several_rounds_cannot_bear_is_named(seen, digit):
    other = federated.train_locally(
        models.build("mlp", (1, 8, 8), 10).to(digit[0].device), *digit, learning_rate=0.1
    )
    sparse = {"name": "sparsify", "percent": 30}
    for rounds, defence, message in (
        ([], NOISE, "number of rounds is 0"),
        ([seen, other], NOISE, "rounds holds Observations of networks of different architecture"),
        ([seen], sparse, "defence 'sparsify' zeroes entries, which combined cannot leave out"),
        (seen, NOISE, "rounds is Observation.*; it takes a Sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            adaptive.combined(rounds, defence=defence)


def test_a_layer_without_noise_among_noise_counts_like_the_least(seen, digit):
    """A quantised update of zeros, as a frozen layer's, has no noise: once a division by zero."""
    last = seen.parameter_names[0]
    still = replace(seen, weights_after={**seen.weights_after, last: seen.model.state_dict()[last]})
    sent = defenses.defend(still, "quantise", bits=6)
    assert defenses.Setting("quantise", {"bits": 6}).noise_variance(sent)[0] == 0
    for attack in (adaptive.dlm_plus, lambda each, **told: adaptive.combined([each], **told)):
        found = attack(sent, defence={"name": "quantise", "bits": 6}, **SHORT)
        assert found.images.isfinite().all()


@pytest.mark.parametrize(
    "key, option",
    [
        ("aware_exact", "trusted"),
        ("aware_exact", "extra_variance"),
        ("aware_dlm_plus", "distance"),
        ("aware_unrolled_dlm", "update_of"),
        ("aware_combined", "update_of"),
    ],
)
def test_what_an_aware_attack_fills_in_itself_is_refused(seen, key, option):
    record = records.ATTACKS[key]
    told = {"defence": NOISE, "learning_rate": 0.1, "local_steps": 1}
    told = {name: told[name] for name in record.demands}
    with pytest.raises(ValueError, match=f"'{option}' is unknown"):
        record.function([seen] if key == "aware_combined" else seen, **told, **{option: None})


def test_a_defence_that_adds_noise_and_leaves_out_is_met_in_both():
    @records.defence(
        "mine",
        title="Mine",
        acts_on="update",
        leaves_out=True,
        variance=lambda seen, told: [told.strength["std"] ** 2] * len(seen.delta),
        example={"std": 1e-4},
    )
    def half_of_it(update, *, std: float, seed: int = 0):
        draws = torch.Generator().manual_seed(seed)
        noise = [std * torch.randn(u.shape, generator=draws, dtype=u.dtype) for u in update]
        return [(u + n) * (u.abs() > u.abs().median()) for u, n in zip(update, noise)]

    try:
        images, labels, *_ = data.load("digits", n=1)
        model = models.build("mlp", (1, 8, 8), 10, seed=0)
        seen = federated.train_locally(model, images, labels, learning_rate=0.01)
        told = {"name": "mine", "std": 1e-4}
        sent = defenses.defend(seen, "mine", std=1e-4, seed=5)
        assert 0.5 < adaptive.recover(sent, defence=told).chi2 < 2
        found = adaptive.dlm_plus(sent, defence=told, total_variation=0.0)
        by_noise_alone = attacks.dlm_plus(sent, labels=found.labels)
        gained = [metrics.psnr(f.images, images, data_range=1.0) for f in (found, by_noise_alone)]
        assert gained[0] > gained[1] + 1
    finally:
        records.DEFENCES.pop("mine")
