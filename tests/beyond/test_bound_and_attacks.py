"""No attack passes the bound: more than 200 of them, of all kinds, on images that are as varied as
the bound's prior, where the noise is known (rounding to few bits, or noise that a defence adds).
"""

import math
from functools import cache

import pytest
import torch
from torch import nn

from dlm_core import attacks, exact, federated, information, inputs, models
from dlm_core.beyond import adaptive, priors
from dlm_core.beyond.weighted import weighted
from dlm_core.defenses import Setting

DRAWS, CLASSES = 15, 10
FEW = {"max_evaluations": 30}
RATE = 0.1


def mlp(seed):
    return models.build("mlp", (1, 8, 8), CLASSES, seed=seed)


def lenet(seed):
    return models.build("lenet", (1, 8, 8), CLASSES, seed=seed)


def pooled(seed):
    """ReLU and max-pooling, as tutorials have it."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, CLASSES)),
    )


def rounding(dtype):
    return {"transmitted": dtype}


def noise(std):
    return {"defence": {"name": "clip_and_noise", "clip": 1e3, "noise_multiplier": std / 1e3}}


def told(attack, dtype):
    return lambda seen: attack(seen, transmitted=dtype)


def under(std):
    return lambda seen: adaptive.recover(seen, **noise(std))


BF16, F16 = torch.bfloat16, torch.float16
KINDS = {
    "division, bfloat16": (mlp, rounding(BF16), told(inputs.division, BF16)),
    "division, float16": (mlp, rounding(F16), told(inputs.division, F16)),
    "exact, bfloat16": (mlp, rounding(BF16), told(exact.recover, BF16)),
    "exact, LeNet, float16": (lenet, rounding(F16), told(exact.recover, F16)),
    "exact, little noise": (mlp, noise(1e-5), under(1e-5)),
    "exact, much noise": (mlp, noise(1e-3), under(1e-3)),
    "exact, LeNet, noise": (lenet, noise(1e-5), under(1e-5)),
    "DLM+": (mlp, {}, lambda seen: attacks.dlm_plus(seen, **FEW)),
    "DLM+, LeNet": (lenet, {}, lambda seen: attacks.dlm_plus(seen, **FEW)),
    "DLM+, LeNet, noise": (lenet, noise(1e-3), lambda seen: attacks.dlm_plus(seen, **FEW)),
    "DLG, LeNet": (lenet, {}, lambda seen: attacks.dlg(seen, learning_rate=RATE, **FEW)),
    "DLM+, pooled": (pooled, {}, lambda seen: attacks.dlm_plus(seen, **FEW)),
    "weighted, pooled": (pooled, {}, lambda seen: weighted(seen, max_steps=6)),
    "grey": (pooled, {}, attacks.grey),
}


def over_the_bound(build, sent, attack, seed):
    """The mean squared error of an attack, in units of what the bound allows."""
    generator = torch.Generator().manual_seed(seed)
    # uniform, of the prior's mean and variance: nothing is clamped
    image = 0.5 + math.sqrt(3) * priors.STD * (2 * torch.rand(1, 1, 8, 8, generator=generator) - 1)
    label = torch.tensor([seed % CLASSES])
    model = build(seed)
    allowed = information.of_update(model, image, label, learning_rate=RATE, **sent)
    setting = Setting.of(sent["defence"]) if "defence" in sent else None
    training = {"transmitted": sent.get("transmitted"), "learning_rate": RATE}
    seen = federated.train_locally(model, image, label, **training)
    try:
        found = attack(seen if setting is None else setting.defend(seen, seed))
    except (ValueError, torch.linalg.LinAlgError):  # it says that it sees nothing
        return None
    variance = allowed.posterior("white").variance.mean()
    return float((found.images.double().cpu() - image).square().mean() / variance)


@cache
def ratios(name):
    """Of each draw where the attack shows an image."""
    found = [over_the_bound(*KINDS[name], seed) for seed in range(DRAWS)]
    return torch.tensor([each for each in found if each is not None]).double()


@pytest.mark.parametrize("name", KINDS)
def test_no_kind_of_attack_passes_the_bound(name):
    """In the mean over draws, to three of its standard errors."""
    found = ratios(name)
    assert len(found) >= DRAWS - 1
    error = found.std() / math.sqrt(len(found))
    assert found.mean() >= 1 - 3 * error


@pytest.mark.parametrize("name", ["exact, bfloat16", "exact, little noise"])
def test_the_bound_is_one_that_an_attack_comes_near(name):
    """Else nothing would be shown by attacks that do not pass it."""
    assert ratios(name).median() < 2


def test_there_are_more_than_two_hundred():
    assert len(KINDS) * DRAWS > 200
