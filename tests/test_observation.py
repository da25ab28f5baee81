"""What an observer holds, and the last layer that is found by tracing the network."""

import contextlib
import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import attacks, data, federated, label_inference, models
from dlm_core.observation import Observation, find_head, observe
from tests.networks import Standardised

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """Two linear layers; ``output`` makes what the network returns of its scores."""

    def __init__(self, output=lambda scores: scores):
        super().__init__()
        self.body, self.head = nn.Linear(64, 10), nn.Linear(10, 10)
        self.output = output

    def forward(self, x):
        return self.output(self.head(self.body(x.flatten(1)).sigmoid()))


@pytest.fixture
def client():
    images, labels, *_ = data.load("digits", n=1)
    return images, labels


@pytest.mark.parametrize(
    "output",
    [
        lambda s: s,
        lambda s: (s, None),
        lambda s: [s],
        lambda s: {"loss": None, "logits": s},
        lambda s: OrderedDict(scores=s),
        lambda s: SimpleNamespace(logits=s),
    ],
)
def test_scores_are_found_among_what_a_network_returns(output):
    assert find_head(Net(output), SHAPE)[0] == "head"


@pytest.mark.parametrize("returned", [{}, [], (), None, "scores", {"logits": None}, (3,)])
def test_a_network_without_scores_is_told_so(returned):
    with pytest.raises(ValueError, match="^the model returns .*, which are no class scores") as e:
        find_head(Net(lambda s: returned), SHAPE)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "error", [AttributeError("no\nsuch"), AssertionError(), KeyError("x"), RuntimeError("size")]
)
def test_whatever_a_network_raises_ends_in_a_sentence(error, client):
    def fail(scores):
        raise error

    for call in (
        lambda: find_head(Net(fail), SHAPE),
        lambda: federated.train_locally(Net(fail), *client, learning_rate=0.1),
    ):
        with pytest.raises(ValueError, match="model does not take such an image") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_tracing_leaves_the_global_generator_alone():
    net = Net(F.dropout)
    before = torch.get_rng_state()
    find_head(net, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_that_shares_its_weights_is_found(client):
    net = Net()
    net.body = nn.Sequential(nn.Linear(64, 10), nn.Sigmoid(), nn.Linear(10, 10))
    net.head.weight = net.body[2].weight
    seen = federated.train_locally(net, *client, learning_rate=0.1)
    assert seen.head.names == ("body.2.weight", "head.bias")
    assert label_inference.infer(seen).tolist() == client[1].tolist()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_shape": (3, 8, 8)}, r"image_shape is \(3, 8, 8\); the model does not take"),
        ({"image_shape": (8, 8)}, r"image_shape is \(8, 8\); it takes \(channels, height, width\)"),
        ({"num_classes": 7}, "num_classes is 7; the model has 10 classes"),
        ({"num_classes": "10"}, "num_classes is '10'; it takes a whole number"),
        ({"model": None}, "model is None; it takes a Module"),
        ({"weights_after": 3}, "weights_after is 3; it takes a state dict of tensors"),
    ],
)
def test_an_observation_is_of_its_network(client, wrong, message):
    model = models.build("lenet", SHAPE, 10)
    seen = federated.train_locally(model, *client, learning_rate=0.1)
    own = {"model": model, "weights_after": seen.weights_after}
    with pytest.raises(ValueError, match=message):
        Observation(**{**own, "image_shape": SHAPE, "num_classes": 10, **wrong})
    made = Observation(model, seen.weights_after, list(SHAPE), 10)
    assert made.image_shape == SHAPE, "a list of numbers will do"
    assert observe(model, model.state_dict(), seen.weights_after, SHAPE).num_classes == 10


def test_trusted_has_an_entry_of_each_parameter_s_shape(client):
    seen = federated.train_locally(models.build("lenet", SHAPE, 10), *client, learning_rate=0.1)
    masks = [torch.ones_like(layer) > 0 for layer in seen.delta]
    for trusted, message in (
        (masks[:1], "trusted has 1 entries; the model has 8 parameters"),
        ([masks[1], *masks[1:]], r"trusted has shape \[12\] for '0.weight'"),
    ):
        for call in (label_inference.infer, attacks.dlm_plus):
            with pytest.raises(ValueError, match=message):
                call(seen, trusted=trusted)
        with pytest.raises(ValueError, match=message):
            attacks.dlm_plus(seen, trusted=trusted, labels=client[1])


@pytest.mark.parametrize("label", [1, 7])
def test_the_label_is_read_where_the_last_bias_is_frozen(label):
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = models.build("mlp", (1, 8, 8), 10)
    model[-1].bias.requires_grad_(False)
    seen = federated.train_locally(model, image, torch.tensor([label]), learning_rate=0.1)
    assert label_inference.infer(seen).tolist() == [label]


def test_no_label_is_made_up_where_the_last_layer_is_frozen():
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = models.build("mlp", (1, 8, 8), 10)
    model[-1].requires_grad_(False)
    seen = federated.train_locally(model, image, torch.tensor([1]), learning_rate=0.1)
    with pytest.raises(ValueError, match="the last layer did not change"):
        label_inference.infer(seen)


def test_no_labels_of_a_batch_are_read_where_every_bias_rose():
    """As no cross-entropy leaves it: a loss that pulls each score up."""
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = models.build("mlp", (1, 8, 8), 10)
    trained = copy.deepcopy(model)
    (-trained(images).sum()).backward()
    torch.optim.SGD(trained.parameters(), lr=0.01).step()
    after = trained.state_dict()  # each bias of the last layer rose, all Δ are negative
    seen = observe(model, model.state_dict(), after, (1, 8, 8))
    with pytest.raises(ValueError, match="labels cannot be read off it: give them"):
        label_inference.infer(seen, 2)


@pytest.mark.parametrize("num_images", [2, 24])
@pytest.mark.parametrize("rows_as", [1.0, -1.0])
@pytest.mark.parametrize("signs", ["as they are", "positive", "negative"])
def test_whatever_the_last_layer_did_a_batch_has_its_labels_or_a_sentence(
    num_images, rows_as, signs
):
    """As of updates with gaps, or of other losses."""
    model = models.build("mlp", (1, 8, 8), 10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        move = torch.randn(10, generator=generator)
        move *= torch.rand(10, generator=generator) < 0.8
        move *= 10 ** (4 * torch.rand(1, generator=generator) - 3)
        if signs != "as they are":
            move = move.abs() * (1 if signs == "positive" else -1)
        after = copy.deepcopy(model.state_dict())
        *_, weight, bias = after
        after[bias] -= move
        after[weight] -= rows_as * move[:, None] * torch.rand(1, generator=generator)
        seen = observe(model, model.state_dict(), after, (1, 8, 8))
        with contextlib.suppress(label_inference.Untold):
            assert len(label_inference.infer(seen, num_images)) == num_images


def test_the_label_is_read_behind_an_image_s_standardisation(client):
    images, labels = client
    model = nn.Sequential(Standardised(), models.build("mlp", tuple(images.shape[1:]), 10))
    seen = federated.train_locally(model, images, labels, learning_rate=0.1)
    assert seen.has_class_scores
    assert label_inference.infer(seen).tolist() == labels.tolist()


def test_a_head_whose_weight_is_made_of_others_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.utils.parametrizations.weight_norm(model[1])
    after = {name: tensor + 0.1 for name, tensor in model.state_dict().items()}
    seen = observe(model, model.state_dict(), after, (3, 2, 2))
    with pytest.raises(ValueError, match="the last layer's weight is no parameter"):
        seen.head  # noqa: B018
