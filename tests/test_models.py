import pytest
import torch

from dlm_core import models


@pytest.mark.parametrize("name", models.NETWORKS)
@pytest.mark.parametrize("shape, classes", [((3, 32, 32), 100), ((1, 25, 25), 2), ((3, 64, 64), 200)])
def test_any_input_size_and_class_count(name, shape, classes):
    model = models.build(name, shape, classes, seed=1)
    assert model(torch.rand(2, *shape)).shape == (2, classes)


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
        return sum(isinstance(module, torch.nn.BatchNorm2d) for module in models.build(name).modules())

    assert norms("resnet18") == 0 and norms("resnet18_bn") == 20


def test_a_resnet_may_be_smaller_and_have_other_activations():
    assert sum(p.numel() for p in models.build("resnet18_bn", num_classes=10).parameters()) == 11_173_962  # as published
    small = models.build("resnet18_bn", width=4, blocks=1, activation="relu")
    kinds = [type(module) for module in small.modules()]
    assert kinds.count(torch.nn.ReLU) == 9 and torch.nn.Sigmoid not in kinds and small[-1].in_features == 32


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "lennet"}, "model 'lennet' is unknown.*did you mean lenet"),
        ({"name": "lenet", "init": "papr"}, "init 'papr' is unknown.*did you mean paper"),
        ({"name": "lenet", "num_classes": 1}, "num_classes is 1; it takes a whole number of at least 2"),
        ({"name": "lenet", "image_shape": (32, 32)}, "image_shape is"),
        ({"name": "mlp", "activation": "swish"}, "activation 'swish' is unknown"),
        ({"name": "mlp", "hidden": 0}, "hidden is 0"),
        ({"name": "resnet18", "width": 0}, "width is 0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(**arguments)
