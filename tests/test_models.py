"""The networks: their sizes, their seeds, and one of a user's own."""

import pytest
import torch
from torch import nn

from dlm_core import federated, models, records

# Those of ``beyond.architectures`` join them where the registry is imported.
OURS = [n for n, each in models.NETWORKS.items() if each.function.__module__ == models.__name__]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    "shape, classes", [((3, 32, 32), 100), ((1, 25, 25), 2), ((3, 64, 64), 200)]
)
def test_any_input_size_and_class_count(name, shape, classes):
    model = models.build(name, shape, classes, seed=1)
    assert model(torch.rand(2, *shape)).shape == (2, classes)


def test_what_a_network_sets_itself_is_no_option():
    with pytest.raises(ValueError, match="'norm' is unknown"):
        models.build("resnet18_bn", norm=nn.Identity)


def test_lenet_has_the_released_size():
    assert sum(p.numel() for p in models.build("lenet").parameters()) == 85_036


def test_seed_decides_and_global_generator_is_untouched():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (models.build("lenet", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


def test_paper_init_is_uniform_and_default_is_not():
    weight = models.build("lenet", seed=0)[-1].weight
    assert weight.abs().max() <= 0.5 and abs(weight.std().item() - 12**-0.5) < 0.002
    assert models.build("lenet", seed=0, init="default")[-1].weight.abs().max() < 0.05


def test_batch_norm_only_where_asked():
    def norms(name):
        return sum(
            isinstance(module, torch.nn.BatchNorm2d) for module in models.build(name).modules()
        )

    assert norms("resnet18") == 0 and norms("resnet18_bn") == 20


def test_a_resnet_may_be_smaller_and_have_other_activations():
    assert (
        sum(p.numel() for p in models.build("resnet18_bn", num_classes=10).parameters())
        == 11_173_962
    )  # as published
    small = models.build("resnet18_bn", width=4, blocks=1, activation="relu")
    kinds = [type(module) for module in small.modules()]
    assert (
        kinds.count(torch.nn.ReLU) == 9
        and torch.nn.Sigmoid not in kinds
        and small[-1].in_features == 32
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "lennet"}, "model 'lennet' is unknown.*did you mean lenet"),
        ({"name": "lenet", "init": "papr"}, "init 'papr' is unknown.*did you mean paper"),
        (
            {"name": "lenet", "num_classes": 1},
            "num_classes is 1; it takes a whole number of at least 2",
        ),
        ({"name": "lenet", "image_shape": (32, 32)}, "image_shape is"),
        ({"name": "mlp", "activation": "swish"}, "activation 'swish' is unknown"),
        ({"name": "mlp", "hidden": 0}, "hidden is 0"),
        ({"name": "resnet18", "width": 0}, "width is 0"),
        ({"name": "lenet", "hidden": 8}, "option of lenet 'hidden' is unknown: choose from"),
        ({"name": "mlp", "hiden": 8}, "option of mlp 'hiden' is unknown.*did you mean hidden"),
        ({"name": "resnet18_bn", "widht": 8}, "'widht' is unknown.*did you mean width"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(**arguments)


# --- a network of one's own


class Wide(nn.Module):
    def __init__(self, image_shape, num_classes, width):
        super().__init__()
        channels, height, width_of_image = image_shape
        self.layer = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * height * width_of_image, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)).sigmoid().flatten(1))


@pytest.fixture
def own_network():
    """A network registered as "mine", for this test alone."""

    @records.network("mine", title="Mine")
    def mine(image_shape, num_classes, width=4, *, broken=False):
        return "no network" if broken else Wide(image_shape, num_classes, width)

    yield mine
    del records.NETWORKS["mine"]


def test_a_network_of_one_s_own_is_built_as_ours_are(own_network):
    state = torch.get_rng_state()
    first, again = (models.build("mine", (1, 8, 8), 10, seed=1, width=6) for _ in range(2))
    other = models.build("mine", (1, 8, 8), 10, seed=2, width=6)
    assert torch.equal(torch.get_rng_state(), state), "the seed covers its construction"
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert first.layer.weight.shape == (6, 1, 3, 3) and first.training
    assert 0.45 < first.head.weight.abs().max() <= 0.5
    assert (first.norm.weight == 1).all()
    plain = models.build("mine", (1, 8, 8), 10, seed=1, init="default")
    assert plain.head.weight.abs().max() <= 256**-0.5
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([1, 3])
    seen = federated.train_locally(first, images, labels, learning_rate=0.1)
    assert seen.head.names == ("head.weight", "head.bias")


def test_a_network_of_one_s_own_has_its_options_checked(own_network):
    with pytest.raises(ValueError, match="option of mine 'widht' is unknown.*did you mean width"):
        models.build("mine", widht=6)
    with pytest.raises(ValueError, match="network 'mine' returned a str; its function returns nn"):
        models.build("mine", broken=True)
