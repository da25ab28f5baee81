import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_core import defenses, federated


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": 0.0, "distribution": "gaussian"}])
def test_zero_noise_is_the_identity(seen, options):
    weights = seen.model.state_dict()
    defended = defenses.noise(weights, **options)
    assert all(torch.equal(defended[name], weights[name]) for name in weights)


def test_zero_sparsity_is_the_identity(seen):
    weights = seen.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in defenses.sparsify(weights, percent=0).items())


@settings(max_examples=30, deadline=None)
@given(percent=st.floats(0, 100), size=st.integers(1, 200))
def test_sparsify_zeroes_exactly_the_smallest(percent, size):
    weights = {"w": torch.randn(size, generator=torch.Generator().manual_seed(size))}
    kept = defenses.sparsify(weights, percent=percent)["w"]
    dropped = kept == 0
    assert dropped.sum() == int(size * percent / 100)
    assert torch.equal(kept[~dropped], weights["w"][~dropped])
    if dropped.any() and not dropped.all():
        assert weights["w"][dropped].abs().max() <= weights["w"][~dropped].abs().min()


@pytest.mark.parametrize("distribution, variance", [("laplace", 2.0), ("gaussian", 1.0)])
def test_noise_has_its_scale_times_the_undone_clip(distribution, variance):
    weights = {"w": torch.full((200, 100), 0.1)}  # rows of norm 1, so the clip factor is 1/0.2 = 5
    added = defenses.noise(weights, scale=1e-2, distribution=distribution)["w"] - 0.1
    assert added.var().item() == pytest.approx(variance * (5 * 1e-2) ** 2, rel=0.05)
    small = {"w": torch.full((200, 100), 0.001)}  # below the clip: factor 1
    added = defenses.noise(small, scale=1e-2, distribution=distribution)["w"] - 0.001
    assert added.var().item() == pytest.approx(variance * 1e-4, rel=0.05)
    kurtosis = ((added - added.mean()) ** 4).mean() / added.var() ** 2
    assert kurtosis.item() == pytest.approx(6 if distribution == "laplace" else 3, rel=0.2)


def test_the_released_noise_is_forty_times_its_nominal_scale():
    from dlm_core import models

    weights = models.build("lenet").state_dict()
    added = torch.cat([(v - weights[k]).flatten() for k, v in defenses.noise(weights, scale=1e-5).items()])
    assert 30 < added.std().item() / (2**0.5 * 1e-5) < 50


def test_observers_and_seeds(seen):
    channel = defenses.defend(seen, defenses.noise, scale=1e-3, seed=1)
    server = defenses.defend(seen, defenses.noise, scale=1e-3, seed=1, observer="server")
    again = defenses.defend(seen, defenses.noise, scale=1e-3, seed=1)
    for name, raw in seen.model.state_dict().items():
        assert torch.equal(server.model.state_dict()[name], raw)
        assert not torch.equal(channel.model.state_dict()[name], raw)
        assert torch.equal(channel.weights_after[name], server.weights_after[name])
        assert torch.equal(channel.weights_after[name], again.weights_after[name])
        noise_before = channel.model.state_dict()[name] - raw
        assert not torch.allclose(noise_before, channel.weights_after[name] - seen.weights_after[name])


def test_nothing_is_changed_in_place(seen):
    before = {name: tensor.clone() for name, tensor in seen.weights_after.items()}
    defenses.defend(seen, defenses.noise, scale=0.1)
    defenses.defend(seen, defenses.sparsify, percent=50)
    assert all(torch.equal(before[name], tensor) for name, tensor in seen.weights_after.items())


def test_the_server_sees_the_undefended_delta_where_weights_are_kept(seen):
    server = defenses.defend(seen, defenses.sparsify, percent=30, observer="server")
    names = [name for name, _ in seen.model.named_parameters()]
    for name, plain, defended in zip(names, federated.weight_delta(seen), federated.weight_delta(server)):
        kept = server.weights_after[name] != 0
        assert torch.equal(plain[kept], defended[kept])


def test_buffers_pass_through(device):
    from dlm_core import models

    weights = models.build("resnet18_bn", (1, 8, 8), 10).to(device).state_dict()
    defended = defenses.noise(weights, scale=1.0, parameters=["1.weight"])
    assert not torch.equal(defended["1.weight"], weights["1.weight"])
    assert defended["1.running_var"] is weights["1.running_var"]


@pytest.mark.parametrize(
    "defence, options, message",
    [
        (defenses.noise, {"scale": -1}, r"scale is -1; it takes a finite number in \[0, inf\)"),
        (defenses.noise, {"scale": 1, "distribution": "laplac"}, "distribution 'laplac' is unknown.*did you mean laplace"),
        (defenses.sparsify, {"percent": 101}, r"percent is 101; it takes a finite number in \[0, 100\]"),
        (defenses.noise, {"scale": 1, "observer": "sever"}, "observer 'sever' is unknown.*did you mean server"),
        (defenses.sparsify, {"percent": 100}, "equals the model's weights"),
    ],
)
def test_bad_input_is_named(seen, defence, options, message):
    with pytest.raises(ValueError, match=message):
        defenses.defend(seen, defence, **options)
