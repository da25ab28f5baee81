"""Networks of the kinds that people federate: sizes, and images that they cannot take."""

import pytest
import torch

from dlm_core import attacks, data, federated, models, registry

assert registry  # which puts them into the table


@pytest.mark.parametrize("name, count", [("tutorial", 62_006), ("vgg", 204_570), ("vit", 74_954)])
def test_of_colour_images_and_ten_classes(name, count):
    model = models.build(name, (3, 32, 32), 10, init="default")
    assert sum(weight.numel() for weight in model.parameters()) == count
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["tutorial", "vgg", "vit"])
def test_of_oblong_images(name):
    shape = (1, 16, 24)
    model = models.build(name, shape, 3)
    assert model(torch.rand(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize(
    "name, shape, options, said",
    [
        ("tutorial", (1, 8, 32), {}, "height and width of image_shape is 8.*at least 16"),
        ("vgg", (1, 4, 32), {}, "height and width of image_shape is 4.*at least 8"),
        ("vit", (1, 8, 9), {}, "patch is 4.*one is 9"),
        ("vit", (1, 8, 8), {"heads": 3}, "heads is 3.*width, 64"),
    ],
)
def test_sizes_that_do_not_fit(name, shape, options, said):
    with pytest.raises(ValueError, match=said):
        models.build(name, shape, 10, **options)


def test_attacks_can_differentiate_a_transformer_s_gradients():
    images, labels, *_ = data.load("digits", n=1)
    model = models.build("vit", (1, 8, 8), 10, seed=0, patch=4, width=8, blocks=1, heads=2)
    seen = federated.train_locally(model, images, labels, learning_rate=0.1)
    assert attacks.dlm_plus(seen, max_evaluations=3).images.shape == images.shape
