"""A search weighted by what an update tells: the walk that it rests on, and what it finds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, federated, information, metrics, models
from dlm_core.beyond.front import Front
from dlm_core.beyond.weighted import weighted

IMAGES, LABELS, *_ = data.load("digits", n=3)


def pooled():
    """ReLU and max-pooling twice, as tutorials have it."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 10)),
    )


class Functional(nn.Module):
    """The same kind, written with functions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(1, 4, 3), nn.Linear(36, 10)

    def forward(self, x):
        x = F.max_pool2d(self.conv(x).relu(), 2)
        return self.out(x.view(x.size(0), -1))


def smooth():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        nn.Linear(4, 10),
    )


def step(model, k=0, **training):
    given = {"learning_rate": 0.01, **training}
    return federated.train_locally(model, IMAGES[k : k + 1], LABELS[k : k + 1], **given)


NETWORKS = {"pooled": (pooled, "7"), "functions": (Functional, "out"), "smooth": (smooth, "4")}


@pytest.mark.parametrize("build, name", NETWORKS.values(), ids=NETWORKS)
def test_the_walk_gives_the_gradients_of_the_network(build, name):
    model = build().double()
    image, label = IMAGES[:1].double(), LABELS[:1]
    heard = []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    loss = F.cross_entropy(model(image), label)
    (signal,) = torch.autograd.grad(loss, heard[0], retain_graph=True)
    front = Front(model, (1, 8, 8), name)
    h = heard[0].detach()
    # what a ReLU stopped sends nothing back
    passed = front.passed(
        image, torch.where(h[0] > 0, signal[0], signal[0] * (not front.rectified))
    )
    assert torch.allclose(passed.features.relu() if front.rectified else passed.features, h)
    weights = [model.get_submodule(stage.name).weight for stage in front.stages]
    for found, true in zip(passed.gradients, torch.autograd.grad(loss, weights)):
        assert torch.allclose(found[0], true.flatten(), atol=1e-12)
    assert torch.allclose(front.head(h[0]), model(image))


@pytest.mark.parametrize("build, name", [NETWORKS["pooled"], NETWORKS["functions"]])
def test_on_a_piece_of_the_network_all_is_linear_in_the_image(build, name):
    """With the slopes and signals there, the walk along a direction is the difference."""
    front = Front(build(), (1, 8, 8), name)
    image, signal = (
        0.8 * IMAGES[:1].double() + 0.1,
        torch.ones(front.model.get_submodule(name).in_features),
    )
    moved = 1e-7 * torch.randn(1, 1, 8, 8).double()
    here, there = (front.passed(x, signal.double()) for x in (image, image + moved))
    features, gradients = front.along(
        moved, [s[0] for s in here.slopes], [s[0] for s in here.signals]
    )
    assert torch.allclose(there.features - here.features, features, atol=1e-12)
    for a, b, along in zip(here.gradients, there.gradients, gradients):
        assert torch.allclose(b - a, along, atol=1e-12)


@pytest.mark.parametrize("k", range(3))
def test_it_finds_the_image_where_the_update_tells_it(k):
    """Far from grey, below the bound of the same prior, and with the learning rate found."""
    seen = step(pooled(), k)
    found = weighted(seen)
    told = information.of_update(pooled(), IMAGES[k : k + 1], LABELS[k : k + 1], learning_rate=0.01)
    bound = told.posterior("smooth").psnr
    reached = float(metrics.psnr(found.images, IMAGES[k : k + 1], data_range=1.0))
    grey = float(metrics.psnr(torch.full((1, 1, 8, 8), 0.5), IMAGES[k : k + 1], data_range=1.0))
    assert grey + 2.5 < reached <= bound, (reached, grey, bound)
    assert found.client.learning_rate == pytest.approx(0.01, rel=1e-4)
    assert found.labels.tolist() == LABELS[k : k + 1].tolist()
    assert not found.vouched.any() and found.loss == min(found.losses)


def test_pixels_are_those_before_the_clients_normalisation():
    from dlm_core.beyond.preprocessing import normalised

    seen = step(normalised(pooled(), ([0.3], [0.5])))
    reached = metrics.psnr(weighted(seen).images, IMAGES[:1], data_range=1.0)
    assert float(reached) > 13


def test_a_seed_is_a_result():
    seen = step(pooled())
    one, two, other = (weighted(seen, seed=seed, max_steps=2) for seed in (0, 0, 1))
    assert torch.equal(one.images, two.images) and not torch.equal(one.images, other.images)


class Parted(Functional):
    def forward(self, x):
        a = self.conv(x)
        return self.out(F.max_pool2d(a.relu() + a, 2).flatten(1))


def batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    ).eval()


def overlapping():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(16, 10))
    )


@pytest.mark.parametrize(
    "build, words",
    [
        (Parted, "ways that part"),
        (batch_norm, "other layers"),
        (overlapping, "mixes its outputs"),
        (lambda: models.build("mlp", (1, 8, 8), 10, seed=0), "a division shows"),
    ],
)
def test_another_network_is_refused_in_a_sentence(build, words):
    model = build()
    seen = step(model)
    with pytest.raises(ValueError, match=words) as error:
        weighted(seen)
    assert "\n" not in str(error.value)


def test_several_images_are_refused_in_a_sentence():
    seen = federated.train_locally(pooled(), IMAGES, LABELS, learning_rate=0.01)
    with pytest.raises(ValueError, match="as that of one image does"):
        weighted(seen)
