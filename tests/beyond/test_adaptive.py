"""What is declared of the attackers who know the defence.

What they find is tested beside the defences.
"""

import pytest
import torch

from dlm_core import defenses, federated, records
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
