"""What an update says under noise: its leading direction, and how far that is from the truth."""

import pytest
import torch
from torch import nn

from dlm_core import models
from dlm_core.beyond.inputs import layer_inputs
from dlm_core.beyond.noisy import noisy_inputs
from dlm_core.harness import kinds
from dlm_core.harness.look import first_look
from dlm_core.observation import observe
from tests.harness.audited import IMAGES, LABELS, SHAPE, asked, linear, network, snapshots

NETWORKS = {
    "mlp": lambda: network(linear(64, 48), nn.ReLU, linear(48, 10)),
    "deep": lambda: network(linear(64, 80), nn.ReLU, linear(80, 40), nn.ReLU, linear(40, 10)),
    "regression": lambda: network(linear(64, 10)),
    "lenet": lambda: models.build("lenet", SHAPE, 10, seed=0),
}


def noised(sent, share, seed=0):
    """(W_t, W_{t+1} with noise of so much of the update's root mean square)."""
    before, after = sent
    draw = torch.Generator().manual_seed(seed)
    update = torch.cat([(before[name] - w).flatten() for name, w in after.items()])
    scale = share * update.square().mean().sqrt()
    return before, {n: w + scale * torch.randn(w.shape, generator=draw) for n, w in after.items()}


def said(model, sent):
    seen = observe(model, sent[0], sent[1], SHAPE)
    return noisy_inputs(seen, layer_inputs(seen))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_of_a_first_layer_is_known_within_a_factor_of_two(name, share):
    model = NETWORKS[name]()
    with kinds.Inputs(model) as inputs:
        model(IMAGES[:1])
    first = said(model, noised(snapshots(model), share))[0]
    (truth,) = inputs.seen()[first.name].double()
    error = float((first.values - truth).norm() / truth.norm())
    assert 0.5 < error / first.error < 2 and first.pixels == (name != "lenet")


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_said_of_what_is_exact_of_several_images_and_of_noise_alone(name):
    model = NETWORKS[name]()
    assert said(model, snapshots(model)) == []
    assert said(model, noised(snapshots(model), 30.0)) == []
    if name in ("mlp", "deep"):
        several = snapshots(model, IMAGES[:3], LABELS[:3])
        assert "1" not in {each.name for each in said(model, noised(several, 0.02))}


@pytest.mark.parametrize("index", range(4))
def test_the_signs_that_adam_leaves_are_no_input(index):
    client = kinds.make("MLP, Adam, 3 steps", index)
    sent = client.before, client.after
    rounded = client.before, {name: w.bfloat16().float() for name, w in client.after.items()}
    for each in (rounded, noised(sent, 0.05), noised(sent, 0.3)):
        assert first_look(observe(client.network, each[0], each[1], SHAPE), 1, {}).noisy == []


def test_an_audit_says_it_and_calls_it_no_leak(tmp_path, capsys):
    model = NETWORKS["mlp"]()
    found = asked(model, noised(snapshots(model), 0.1), tmp_path, attack="dlm_plus")
    assert found.verdict == "partly" and "image" not in {each.what for each in found.leaks}
    out = capsys.readouterr().out
    assert "the update of layer '1' is one direction and noise" in out
    assert "(the image, 64 numbers) stands in the update up to an error of about " in out
