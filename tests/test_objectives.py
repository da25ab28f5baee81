"""The distances against their definitions, their invariances, and autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dlm_core import objectives

positive = st.floats(1e-6, 1e6)


def layers(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((4, 3), (4,), (2, 4), (2,))
    ]


def test_known_values():
    g, d = (
        [torch.tensor([3.0, 4.0]), torch.tensor([0.0])],
        [torch.tensor([0.0, 0.0]), torch.tensor([2.0])],
    )
    assert objectives.squared_distance(g, d) == 29
    assert objectives.scaled_distance(g, d, 0.5) == 26
    assert objectives.mean_norm(g) == 2.5
    # g/2.5 = (1.2, 1.6, 0), d/1 = (0, 0, 2): 1.44 + 2.56 + 4
    assert objectives.normalised_distance(g, d) == pytest.approx(8.0)
    assert objectives.cosine_distance(g, d) == 1
    assert objectives.cosine_distance(g, [-x for x in g]) == pytest.approx(2)


@settings(max_examples=50, deadline=None)
@given(scale=positive, seed=st.integers(0, 1000))
def test_dlm_plus_and_cosine_ignore_positive_scale(scale, seed):
    g, d = layers(seed), layers(seed + 1)
    for distance in (objectives.normalised_distance, objectives.cosine_distance):
        expected = float(distance(g, d))
        assert float(distance([scale * x for x in g], d)) == pytest.approx(expected, rel=1e-9)
        assert float(distance(g, [scale * x for x in d])) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), k=st.floats(0.1, 200))
def test_zero_exactly_where_the_updates_agree(seed, k):
    g = layers(seed)
    assert objectives.squared_distance(g, g) == 0
    assert float(objectives.scaled_distance([k * x for x in g], g, k)) == pytest.approx(
        0, abs=1e-18
    )
    assert float(objectives.normalised_distance([k * x for x in g], g)) == pytest.approx(
        0, abs=1e-24
    )
    assert float(objectives.cosine_distance([k * x for x in g], g)) == pytest.approx(0, abs=1e-12)
    assert float(objectives.normalised_distance(g, [-x for x in g])) > 1


def test_distances_differentiate_as_finite_differences_say():
    g = [x.requires_grad_() for x in layers(0)]
    d = layers(1)
    for distance in (
        objectives.squared_distance,
        objectives.normalised_distance,
        objectives.cosine_distance,
    ):
        assert torch.autograd.gradcheck(lambda *g, distance=distance: distance(g, d), g)
    k = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k, *g: objectives.scaled_distance(g, d, k), (k, *g))


def test_gradient_of_a_linear_softmax_is_the_closed_form(device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4)).double().to(device)
    x = torch.rand(3, 1, 2, 3, dtype=torch.float64, device=device)
    y = torch.tensor([0, 3, 1], device=device)
    weight, bias = objectives.gradient(model, F.cross_entropy, x, y)
    error = (model(x).softmax(1) - F.one_hot(y, 4)) / 3
    torch.testing.assert_close(weight, error.T @ x.flatten(1))
    torch.testing.assert_close(bias, error.sum(0))


def test_total_variation():
    assert objectives.total_variation(torch.full((1, 3, 4, 4), 0.7)) == 0
    stripes = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1, 1, 4, 4)
    assert objectives.total_variation(stripes) == 1


def test_the_gradient_of_a_frozen_and_of_an_unused_parameter_is_zero():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    network.register_parameter("unused", torch.nn.Parameter(torch.ones(5)))
    x, y = torch.randn(1, 3, requires_grad=True), torch.tensor([1])
    full = objectives.gradient(network, F.cross_entropy, x, y)
    network[0].requires_grad_(False)
    found = objectives.gradient(network, F.cross_entropy, x, y)
    names = [name for name, _ in network.named_parameters()]
    for name, g, whole in zip(names, found, full, strict=True):
        frozen = name.startswith("0.") or name == "unused"
        assert torch.equal(g, torch.zeros_like(g) if frozen else whole) and g.shape == whole.shape
    loss = objectives.normalised_distance(found, [torch.ones_like(g) for g in full])
    (slope,) = torch.autograd.grad(loss, x)
    assert slope.isfinite().all() and slope.any()


DISTANCES = [
    objectives.squared_distance,
    objectives.normalised_distance,
    objectives.cosine_distance,
    lambda g, d: objectives.scaled_distance(g, d, 1.0),
]


@pytest.mark.parametrize("distance", DISTANCES)
def test_layers_that_one_list_lacks_are_not_left_out_unseen(distance):
    g = [torch.ones(3), torch.ones(2)]
    with pytest.raises(ValueError, match="2 layers and the other 1"):
        distance(g, g[:1])
    with pytest.raises(ValueError, match="1 layers and the other 2"):
        objectives.weighted(distance, [1.0])(g, g)
