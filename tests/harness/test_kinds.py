"""Clients of many kinds: each is trained as its kind says, and its truth is what it was given."""

import pytest
import torch

from dlm_core.harness import kinds


def test_there_are_twenty_kinds_at_least():
    assert len(kinds.KINDS) >= 20


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_client_sends_what_it_learned_and_is_the_same_each_time(kind):
    about, client, again = kinds.KINDS[kind], *(kinds.make(kind, 1) for _ in range(2))
    images = about.num_images * (about.local_steps if about.others else 1)
    assert len(client.images) == images and client.images.isfinite().all()
    assert torch.equal(client.images, again.images) and client.classes == again.classes
    assert client.before.keys() == client.after.keys() == client.network.state_dict().keys()
    assert any(not torch.equal(client.before[name], w) for name, w in client.after.items())
    for state, other in ((client.before, again.before), (client.after, again.after)):
        assert all(torch.equal(w, other[name]) for name, w in state.items())
    for name, w in client.network.state_dict().items():
        assert torch.equal(w, client.before[name])
    linear = {n for n, m in client.network.named_modules() if isinstance(m, torch.nn.Linear)}
    assert client.inputs and set(client.inputs) <= linear


def test_clients_of_a_kind_differ():
    one, other = kinds.make("LeNet", 0), kinds.make("LeNet", 1)
    assert not torch.equal(one.images, other.images)
    assert not torch.equal(one.before["0.weight"], other.before["0.weight"])


def test_what_passed_through_a_layer_is_what_the_client_trained_on():
    client = kinds.make("MLP, 4 images", 0)
    assert torch.equal(client.inputs["1"], client.images.flatten(1))
    several = kinds.make("LeNet, epoch of 3 images", 0)
    assert [len(each) for each in several.inputs.values()] == [3]


def test_kinds_are_as_they_say():
    frozen = kinds.make("LeNet, first layer frozen", 0)
    assert torch.equal(frozen.before["0.weight"], frozen.after["0.weight"])
    darker = kinds.make("MLP, image and darker copy", 0)
    assert torch.equal(darker.images[1], darker.images[0] / 2)
    assert len(kinds.make("LeNet, 2 images of a class", 0).classes) == 1
    assert kinds.make("LeNet, 2 steps, normalised", 0).images.min() < 0
    half = kinds.make("MLP, sent in half precision", 0).after["1.weight"]
    assert torch.equal(half, half.bfloat16().float())
    assert len(kinds.make("MLP, two labels an image", 0).classes) == 2


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind"):
        kinds.make("LeNett", 0)
