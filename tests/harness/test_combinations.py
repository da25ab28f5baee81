"""Of 336 combinations of a network, a client and a file none ends in a traceback, none is called
leaked over an image that is not the client's, and none that a division shows is called not shown.

Searches are cut short: what they find is then poor, and must not be called a leak all the same.
"""

import copy
import itertools

import pytest
import torch
from combinations import CLIENTS, FILES, NETWORKS, SHAPE, client_of

from dlm_core import data, stopping
from dlm_core.beyond import unrolled
from dlm_core.harness.audit import audit
from dlm_core.results import Explains

IMAGES, LABELS, *_ = data.load("digits", n=4)
EVALUATIONS, STEPS = 2, 1  # of a search, and of the client that it simulates, at most
LEAKED, SHOWN = 20.0, 40.0  # dB

COMBINATIONS = [
    (network, client, list(FILES)[(3 * i + j) % len(FILES)])
    for (i, network), (j, client) in itertools.product(enumerate(NETWORKS), enumerate(CLIENTS))
]


@pytest.fixture
def short(monkeypatch):
    """Searches of few evaluations."""
    checked, find_steps = stopping.StopRule.__post_init__, unrolled.find_steps

    def cut(rule):
        checked(rule)
        object.__setattr__(rule, "max_evaluations", min(EVALUATIONS, rule.max_evaluations))

    monkeypatch.setattr(stopping.StopRule, "__post_init__", cut)
    monkeypatch.setattr(unrolled, "find_steps", lambda run, most: find_steps(run, STEPS))


def psnr(found, images):
    """Of the worst of the images found, beside the client's nearest."""
    apart = found.double().cpu()[:, None] - images.double()
    errors = apart.square().flatten(2).mean(2).clamp(min=1e-15)
    return float((-10 * errors.log10()).max(1).values.min())


def divided(model, after, images):
    """PSNR of what plain division shows at a layer that takes the pixels, by its first direction;
    -inf for no such layer.
    """
    before, best = model.state_dict(), float("-inf")
    for name in {key.rpartition(".")[0] for key in before}:
        weight, bias = f"{name}.weight", f"{name}.bias"
        pixels = weight in before and bias in before and before[weight].shape[1:] == (64,)
        if not pixels or torch.equal(before[bias], after[bias]):
            continue
        delta, slope = ((before[each] - after[each]).double() for each in (weight, bias))
        _, _, directions = torch.linalg.svd(torch.cat([delta, slope[:, None]], 1))
        image = directions[0, :-1] / directions[0, -1]
        best = max(best, psnr(image.reshape(1, *SHAPE), images))
    return best


def test_there_are_enough():
    assert len(COMBINATIONS) >= 300
    assert {file for *_, file in COMBINATIONS} == FILES.keys()


@pytest.mark.parametrize("network, client, file", COMBINATIONS)
def test_no_combination_breaks_the_promise(network, client, file, short, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[network]()
        images, after, told = client_of(client, model, IMAGES, LABELS)
    sent = FILES[file](tmp_path, (copy.deepcopy(model.state_dict()), after))
    out = tmp_path / "found.png"
    try:
        found = audit(*sent, model=model, image_shape=SHAPE, num_images=told, out=out)
    except ValueError as refused:
        assert "\n" not in str(refused) and len(str(refused)) > 20
        assert divided(model, after, images) < SHOWN
        return
    for name, belief in found.beliefs.items():
        if belief.grade is Explains.FULLY:
            assert psnr(found[name].images, images) > LEAKED, name
    if divided(model, after, images) > SHOWN:
        assert found.verdict in ("leaked", "partly")
