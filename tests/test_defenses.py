import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_core import (
    attacks,
    data,
    defenses,
    federated,
    information,
    label_inference,
    models,
    records,
)
from dlm_core.beyond import adaptive
from dlm_core.harness.trials import Trial
from dlm_core.harness.utility import Federation


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": 0.0, "distribution": "gaussian"}])
def test_zero_noise_is_the_identity(seen, options):
    weights = seen.model.state_dict()
    defended = defenses.noise(weights, **options)
    assert all(torch.equal(defended[name], weights[name]) for name in weights)


def test_zero_sparsity_is_the_identity(seen):
    weights = seen.model.state_dict()
    assert all(
        torch.equal(value, weights[name])
        for name, value in defenses.sparsify(weights, percent=0).items()
    )


@settings(max_examples=30, deadline=None)
@given(hundredths=st.integers(0, 10_000), size=st.integers(1, 200))
def test_sparsify_zeroes_exactly_the_smallest(hundredths, size):
    percent = hundredths / 100
    weights = {"w": torch.randn(size, generator=torch.Generator().manual_seed(size))}
    kept = defenses.sparsify(weights, percent=percent)["w"]
    dropped = kept == 0
    assert dropped.sum() == size * hundredths // 10_000
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
    weights = models.build("lenet").state_dict()
    added = torch.cat(
        [(v - weights[k]).flatten() for k, v in defenses.noise(weights, scale=1e-5).items()]
    )
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
        assert not torch.allclose(
            noise_before, channel.weights_after[name] - seen.weights_after[name]
        )


def test_nothing_is_changed_in_place(seen):
    before = {name: tensor.clone() for name, tensor in seen.weights_after.items()}
    defenses.defend(seen, defenses.noise, scale=0.1)
    defenses.defend(seen, defenses.sparsify, percent=50)
    assert all(torch.equal(before[name], tensor) for name, tensor in seen.weights_after.items())


def test_the_server_sees_the_undefended_delta_where_weights_are_kept(seen):
    server = defenses.defend(seen, defenses.sparsify, percent=30, observer="server")
    names = [name for name, _ in seen.model.named_parameters()]
    for name, plain, defended in zip(names, seen.delta, server.delta):
        kept = server.weights_after[name] != 0
        assert torch.equal(plain[kept], defended[kept])


def test_buffers_pass_through(device):
    weights = models.build("resnet18_bn", (1, 8, 8), 10).to(device).state_dict()
    defended = defenses.noise(weights, scale=1.0, parameters=["1.weight"])
    assert not torch.equal(defended["1.weight"], weights["1.weight"])
    assert defended["1.running_var"] is weights["1.running_var"]


@pytest.mark.parametrize(
    "defence, options, message",
    [
        (defenses.noise, {"scale": -1}, r"scale is -1; it takes a finite number in \[0, inf\)"),
        (
            defenses.noise,
            {"scale": 1, "distribution": "laplac"},
            "distribution is 'laplac'; it takes 'laplace' or 'gaussian'",
        ),
        (
            defenses.sparsify,
            {"percent": 101},
            r"percent is 101; it takes a finite number in \[0, 100\]",
        ),
        (
            defenses.noise,
            {"scale": 1, "observer": "sever"},
            "observer is 'sever'; it takes 'channel' or 'server'",
        ),
        (defenses.sparsify, {"percent": 100}, "equals the model's weights"),
        (
            defenses.clip_and_noise,
            {"clip": 0},
            r"clip is 0; it takes a finite number in \(0, inf\)",
        ),
        (defenses.top_k, {"percent": -1}, r"percent is -1; it takes a finite number in \[0, 100\]"),
        (defenses.quantise, {"bits": 1}, r"bits is 1; it takes a .*\[2, 53\]"),
        (defenses.quantise, {"repeats": 0}, "repeats is 0; it takes a whole number of at least 1"),
        (
            lambda weights, **_: weights.clear(),
            {"observer": "server"},
            "what defence '<lambda>' returned is None; it takes a dict",
        ),
    ],
)
def test_bad_input_is_named(seen, defence, options, message):
    with pytest.raises(ValueError, match=message):
        defenses.defend(seen, defence, **options)


# --- what each defence does at its ends, by arithmetic

W = [3.0, -1.0, 0.5, 2.0, -4.0, 0.1, 0.0, -0.2]  # in order of magnitude: 6 5 7 2 1 3 0 4
LENGTH = sum(w * w for w in W) ** 0.5


def without(*places):
    return [0.0 if i in places else w for i, w in enumerate(W)]


ENDS = [
    # defence, its options, one tensor, the same defended
    ("noise", {"scale": 0}, W, W),
    ("noise", {"scale": 0.5, "distribution": "gaussian"}, [], []),
    ("sparsify", {"percent": 0}, W, W),
    ("sparsify", {"percent": 12.4}, W, W),
    ("sparsify", {"percent": 12.5}, W, without(6)),
    ("sparsify", {"percent": 62.9}, W, without(6, 5, 7, 2, 1)),
    ("sparsify", {"percent": 99.9}, W, without(6, 5, 7, 2, 1, 3, 0)),
    ("sparsify", {"percent": 100}, W, [0.0] * 8),
    ("sparsify", {"percent": 99.9}, [5.0], [5.0]),
    ("sparsify", {"percent": 100.0}, [5.0], [0.0]),
    ("sparsify", {"percent": 50}, [1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 1.0, -1.0]),
    ("sparsify", {"percent": 50}, [], []),
    ("clip_and_noise", {"clip": 1e300}, W, W),
    ("clip_and_noise", {"clip": LENGTH / 2}, W, [w / 2 for w in W]),
    ("clip_and_noise", {"clip": 1e-3}, [-5.0], [-1e-3]),
    ("clip_and_noise", {"clip": 1.0}, [0.0, 0.0], [0.0, 0.0]),
    ("clip_and_noise", {"clip": 1.0, "noise_multiplier": 1.0}, [], []),
    ("top_k", {"percent": 0.0}, W, W),
    ("top_k", {"percent": 37.5}, W, without(6, 5, 7)),
    ("top_k", {"percent": 99.99}, W, without(6, 5, 7, 2, 1, 3, 0)),
    ("top_k", {"percent": 100}, W, [0.0] * 8),
    ("top_k", {"percent": 99.9}, [5.0], [5.0]),
    ("top_k", {"percent": 50}, [], []),
    ("quantise", {"bits": 2}, [5.0, -5.0, 0.0], [5.0, -5.0, 0.0]),
    ("quantise", {"bits": 3}, [3.0, 2.0, -1.0], [3.0, 2.0, -1.0]),
    ("quantise", {"bits": 8}, [5.0], [5.0]),
    ("quantise", {"bits": 8}, [0.0, 0.0], [0.0, 0.0]),
    ("quantise", {"bits": 53}, [1.0, -0.5], [1.0, -0.5]),
    ("quantise", {}, [], []),
]


def of_one_tensor(name, tensor, options):
    """What a registered defence makes of weights, or of an update, of one tensor."""
    record = records.DEFENCES[name]
    if record.acts_on == "snapshot":
        return record.function({"w": tensor}, **options)["w"]
    return record.function([tensor], **options)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, options, given, expected", ENDS)
def test_each_defence_at_its_ends(name, options, given, expected, dtype):
    given, expected = (torch.tensor(each, dtype=dtype) for each in (given, expected))
    found = of_one_tensor(name, given, options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    zeroed, unmoved = expected == 0, expected == given
    assert torch.equal(found == 0, zeroed)
    if name != "quantise":
        assert torch.equal(found[unmoved], given[unmoved])


def test_every_defence_of_what_is_sent_has_its_ends_tested():
    sent = {key for key, record in records.DEFENCES.items() if record.acts_on != "training"}
    assert {name for name, *_ in ENDS} == sent


@pytest.mark.parametrize("percent", [0.57, 0.29, 1.1, 4.35, 33.3, 99.99])
def test_a_percentage_that_no_binary_number_is_drops_what_it_says(percent):
    for name in ("sparsify", "top_k"):
        found = of_one_tensor(name, torch.linspace(1, 2, 10_000), {"percent": percent})
        assert (found == 0).sum() == round(percent * 100)


STRENGTHS = {
    "noise": {"scale": 1e-3},
    "sparsify": {"percent": 30},
    "clip_and_noise": {"clip": 0.5, "noise_multiplier": 0.1},
    "top_k": {"percent": 30},
    "quantise": {"bits": 4},
}


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize(
    "layout",
    [
        lambda w: w.to(memory_format=torch.channels_last),
        lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
        lambda w: w[:, :1].expand(4, 3, 2, 5),
        lambda w: w.repeat(2, 1, 1, 1)[::2],
    ],
)
def test_the_layout_of_a_tensor_does_not_matter(name, layout):
    weights = layout(torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)))
    before = weights.clone()
    found = of_one_tensor(name, weights, STRENGTHS[name])
    expected = of_one_tensor(name, before.contiguous(), STRENGTHS[name])
    torch.testing.assert_close(found, expected)
    assert torch.equal(weights, before)


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_scalars_and_tensors_of_nothing_are_defended_like_the_rest(name, shape, dtype):
    found = of_one_tensor(name, torch.full(shape, 0.25, dtype=dtype), STRENGTHS[name])
    assert found.shape == shape and found.dtype == dtype and found.isfinite().all()


@pytest.mark.parametrize("name", STRENGTHS)
def test_nothing_sent_is_nothing_defended(name):
    nothing = {} if records.DEFENCES[name].acts_on == "snapshot" else []
    assert records.DEFENCES[name].function(nothing, **STRENGTHS[name]) == nothing


@pytest.mark.parametrize("name", ["noise", "sparsify"])
def test_counts_in_a_state_dict_are_no_weights(name):
    weights = {"w": torch.ones(3, 3), "num_batches_tracked": torch.tensor(7)}
    found = records.DEFENCES[name].function(weights, **STRENGTHS[name])
    assert found["num_batches_tracked"] == 7 and not torch.equal(found["w"], weights["w"])
    with pytest.raises(ValueError, match="parameters 'ww' is unknown.*did you mean w"):
        records.DEFENCES[name].function(weights, parameters=["ww"], **STRENGTHS[name])


def test_quantisation_of_single_precision_is_unbiased_and_leaves_the_grid_alone():
    grid = [torch.linspace(-1, 1, 2**4 - 1)]
    for seed in range(300):
        torch.testing.assert_close(defenses.quantise(grid, bits=4, seed=seed), grid)


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_network_with_a_scalar_a_frozen_and_an_unused_layer_is_defended(name, digit):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))
            self.first, self.head = torch.nn.Linear(64, 16), torch.nn.Linear(16, 10)
            self.unused = torch.nn.Linear(3, 3)
            self.first.requires_grad_(False)

        def forward(self, x):
            return self.head(self.scale * self.first(x.flatten(1)).tanh())

    seen = federated.train_locally(Odd().to(digit[0].device), *digit, learning_rate=0.1)
    for observer in ("server", "channel"):
        setting = defenses.Setting(name, STRENGTHS[name], observer=observer)
        sent = setting.defend(seen, seed=1)
        assert all(layer.isfinite().all() for layer in sent.delta)
        assert all(v >= 0 for v in setting.noise_variance(sent))


# --- a defence as a value


def test_a_setting_is_a_value_of_its_content():
    given = {"name": "noise", "observer": "server", "scale": 0.1, "repeats": 2}
    setting = defenses.Setting.of(given)
    assert setting == defenses.Setting("noise", {"scale": 0.1}, observer="server", repeats=2)
    assert hash(setting) == hash(defenses.Setting.of(dict(reversed(given.items()))))
    assert defenses.Setting.of(setting) is setting
    assert setting != defenses.Setting("noise", {"scale": 0.2}, observer="server", repeats=2)


def of_federation(defence):
    return Federation(defence=defence)


def of_trial(defence):
    return Trial("aware_dlm_plus", defence=defence)


AWARE = ["dlm_plus", "recover", "combined", "unrolled_dlm"]


@pytest.mark.parametrize("take", [defenses.Setting.of, of_federation, of_trial, *AWARE])
@pytest.mark.parametrize(
    "defence, message",
    [
        ({"name": "sparsity", "percent": 10}, "defence 'sparsity' is unknown.*mean sparsify"),
        ({"percent": 10}, "defence is {'percent': 10}; it takes a Setting or a dict with a name"),
        ({"name": "sparsify"}, "defence 'sparsify' must be told percent"),
        ({"name": "sparsify", "percnt": 10}, "sparsify 'percnt' is unknown.*did you mean percent"),
        ({"name": "noise", "scale": 1e-3, "observr": "server"}, "noise 'observr' is unknown"),
        ({"name": "noise", "scale": 1e-3, "observer": "sever"}, "observer is 'sever'; it takes"),
        ({"name": "noise", "scale": 1e-3, "repeats": 0}, "repeats is 0"),
        ({"name": "noise", "scale": 1e-3, "repeats": -2}, "repeats is -2"),
        ({"name": "noise", "scale": -1e-3}, "scale is -0.001; it takes a finite number"),
        ({"name": "noise", "scale": "0.1"}, "scale is '0.1'; it takes a finite number"),
        ({"name": "noise", "scale": 1, "distribution": "gauss"}, "distribution is 'gauss'; it tak"),
        ({"name": "sparsify", "percent": 110}, r"percent is 110; it takes .*\[0, 100\]"),
        ({"name": "quantise", "bits": 64}, r"bits is 64; it takes .*\[2, 53\]"),
        ({"name": "noise", "scale": 1e-3, "seed": 3}, "'seed' is no part of a setting"),
        ({"name": "noise", "scale": 1e-3, "parameters": []}, "'parameters' is no part of a sett"),
        ({"name": "dp_sgd", "clip": 1.0}, "'dp_sgd' replaces the client's training: call train_"),
        ("noise", "defence is 'noise'; it takes a Setting or a "),
    ],
)
def test_a_misspelt_defence_is_an_error_and_never_no_noise(seen, take, defence, message):
    with pytest.raises(ValueError, match=message) as caught:
        if callable(take):
            take(defence)
        else:
            given = [seen, seen] if take == "combined" else seen
            told = {"learning_rate": 0.1, "local_steps": 2} if take == "unrolled_dlm" else {}
            getattr(adaptive, take)(given, defence=defence, **told)
    assert "\n" not in str(caught.value)


def test_defend_takes_keys_records_functions_and_any_other_function(seen):
    by_key = defenses.defend(seen, "sparsify", percent=30)
    by_function = defenses.defend(seen, defenses.sparsify, percent=30)
    assert all(torch.equal(a, b) for a, b in zip(by_key.delta, by_function.delta))

    def halves(weights, *, factor, parameters, seed):
        return {**weights, **{name: factor * weights[name] for name in parameters}}

    halved = defenses.defend(seen, halves, factor=0.5)
    assert all(torch.equal(a, 0.5 * b) for a, b in zip(halved.delta, seen.delta))
    with pytest.raises(ValueError, match="option of halves 'facto' is unknown.*did you mean facto"):
        defenses.defend(seen, halves, facto=0.5)
    with pytest.raises(ValueError, match="defence 'halves' must be told factor"):
        defenses.defend(seen, halves)
    with pytest.raises(ValueError, match="defence 'sparsity' is unknown.*did you mean sparsify"):
        defenses.defend(seen, "sparsity", percent=30)
    with pytest.raises(ValueError, match="'dp_sgd' replaces the client's training"):
        defenses.defend(seen, "dp_sgd", learning_rate=1.0, clip=1.0, noise_multiplier=1.0)


def test_a_defence_of_the_update_that_works_in_place_spoils_no_delta(seen):
    @records.defence("mine", title="Mine", acts_on="update", random=False)
    def mine(update):
        for layer in update:
            layer.mul_(0.5)
        return update

    try:
        before = [layer.clone() for layer in seen.delta]
        defenses.defend(seen, "mine")
    finally:
        del records.DEFENCES["mine"]
    assert all(torch.equal(a, b) for a, b in zip(before, seen.delta))


def scaled_update(update, *, factor=0.5):
    return [factor * layer for layer in update]


@pytest.mark.parametrize(
    "function, about, message",
    [
        (scaled_update, {"acts_on": "update"}, "defence 'mine' takes no seed, and defend gives"),
        (
            lambda update: update[:-1],
            {"acts_on": "update", "random": False},
            "what defence 'mine' returned has shapes",
        ),
        (
            lambda update: [layer.flatten() for layer in update],
            {"acts_on": "update", "random": False},
            "what defence 'mine' returned has shapes",
        ),
        (
            lambda update: None,
            {"acts_on": "update", "random": False},
            "what defence 'mine' returned is None; it takes a Sequence",
        ),
        (
            lambda update: [3] * len(update),
            {"acts_on": "update", "random": False},
            "what defence 'mine' returned is .*, and not 3 in it",
        ),
        (lambda weights: weights, {"random": False}, "defence 'mine' takes no parameters"),
        (lambda weights, parameters: weights, {}, "defence 'mine' takes no seed"),
        (
            lambda weights, parameters: {"w": 3},
            {"random": False},
            "what defence 'mine' returned is a dict of 'w', no state dict",
        ),
        (
            lambda weights, parameters: dict(list(weights.items())[1:]),
            {"random": False},
            "what defence 'mine' returned does not fit the model: it lacks",
        ),
    ],
)
def test_a_defence_that_is_none_is_told_so_in_a_sentence(seen, function, about, message):
    records.defence("mine", **about)(function)
    try:
        with pytest.raises(ValueError, match=message) as caught:
            defenses.defend(seen, "mine")
    finally:
        del records.DEFENCES["mine"]
    assert "\n" not in str(caught.value)


def test_a_setting_knows_the_defaults_of_its_defence():
    assert defenses.Setting("noise", {"scale": 1.0}).strength == {
        "scale": 1.0,
        "distribution": "laplace",
        "clip": 0.2,
    }
    assert defenses.Setting("quantise").strength == {"bits": 8}


def test_noise_that_overflows_is_no_bad_argument(seen):
    with pytest.raises(FloatingPointError, match="what defence 'noise' returned overflows"):
        defenses.defend(seen, "noise", scale=1e38)


def test_clip_and_noise_bounds_the_update_and_adds_its_noise():
    update = [
        torch.full((300, 100), 0.1, dtype=torch.float64),
        torch.full((100,), -0.1, dtype=torch.float64),
    ]
    length = (30_100 * 0.01) ** 0.5
    clipped = defenses.clip_and_noise(update, clip=2.0)
    assert torch.cat([layer.flatten() for layer in clipped]).norm().item() == pytest.approx(2.0)
    assert all(torch.allclose(a, b * 2.0 / length) for a, b in zip(clipped, update))
    short = defenses.clip_and_noise(update, clip=100.0)
    assert all(torch.equal(a, b) for a, b in zip(short, update))
    noisy = defenses.clip_and_noise(update, clip=2.0, noise_multiplier=0.5, seed=1)
    added = torch.cat([(a - b).flatten() for a, b in zip(noisy, clipped)])
    assert added.std().item() == pytest.approx(1.0, rel=0.02)
    kurtosis = ((added - added.mean()) ** 4).mean() / added.var() ** 2
    assert kurtosis.item() == pytest.approx(3, rel=0.1)


def test_top_k_keeps_the_largest_of_the_whole_update():
    update = [torch.tensor([[3.0, -1.0], [0.5, 2.0]]).double(), torch.tensor([-4.0, 0.1]).double()]
    kept = defenses.top_k(update, percent=50)
    assert kept[0].tolist() == [[3.0, 0.0], [0.0, 2.0]]
    assert kept[1].tolist() == [-4.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(defenses.top_k(update, percent=0), update))


def test_quantisation_is_unbiased_and_ends_on_its_grid():
    update = [torch.linspace(-1, 1, 101).double()]
    draws = torch.stack([defenses.quantise(update, bits=3, seed=seed)[0] for seed in range(2000)])
    steps = draws * 3  # 2^(3-1) - 1 steps from 0 to the largest
    assert torch.allclose(steps, steps.round())
    assert draws.abs().max() <= 1 + 1e-12
    error = (draws.mean(0) - update[0]).abs().max().item()
    assert (
        error < 5 * (1 / 3) / 2 / 2000**0.5
    )  # standard deviation of one draw: at most half a step


def test_averaging_repeats_divides_the_variance(seen):
    plain = torch.cat([layer.flatten() for layer in seen.delta])

    def variance(repeats):
        noisy = defenses.defend(
            seen, defenses.noise, scale=1e-3, observer="server", repeats=repeats
        )
        return float(
            (torch.cat([layer.flatten() for layer in noisy.delta]) - plain).square().mean()
        )

    assert variance(1) / variance(16) == pytest.approx(16, rel=0.2)


OF_UPDATES = [
    (defenses.clip_and_noise, {"clip": 1e-3}),
    (defenses.top_k, {"percent": 50}),
    (defenses.quantise, {}),
]


@pytest.mark.parametrize(
    "defence, options", OF_UPDATES, ids=lambda value: getattr(value, "__name__", "")
)
def test_defences_of_the_update_leave_inputs_alone_and_w_t_public(seen, defence, options):
    before = {name: tensor.clone() for name, tensor in seen.weights_after.items()}
    update = seen.delta
    copies = [layer.clone() for layer in update]
    expected = defence(update, **({"seed": 1} if defence is not defenses.top_k else {}), **options)
    sent = defenses.defend(seen, defence, **options)
    assert all(torch.equal(a, b) for a, b in zip(update, copies))
    assert all(torch.equal(before[name], tensor) for name, tensor in seen.weights_after.items())
    for name, raw in seen.model.state_dict().items():
        assert torch.equal(sent.model.state_dict()[name], raw)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(sent.delta, expected))


def exact_delta(epsilon, shift, deviation, rounds):
    """δ of sums that differ by ``shift``, under Gaussian noise: Balle and Wang (ICML 2018)."""
    from scipy.stats import norm

    mu = rounds**0.5 * shift / deviation
    beyond = norm.logcdf(-mu / 2 - epsilon / mu)
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + beyond)


@pytest.mark.parametrize("neighbours, shift", [("add or remove", 1.0), ("replace", 2.0)])
@pytest.mark.parametrize("multiplier, rounds", [(0.3, 1), (1.0, 50), (4.0, 100), (20.0, 5)])
def test_epsilon_is_the_gaussian_mechanism_s(multiplier, rounds, neighbours, shift):
    """An upper bound, close to the exact ε of sums that differ by one clip, or by two."""
    ours = defenses.epsilon(noise_multiplier=multiplier, num_rounds=rounds, neighbours=neighbours)
    assert 0 <= exact_delta(ours, shift, multiplier, rounds) <= 1e-5
    assert exact_delta(0.9 * ours, shift, multiplier, rounds) > 1e-5


def test_the_noise_of_clip_and_noise_hides_which_of_two_opposite_updates_was_sent():
    """What "replace" is about: two clipped updates may lie two clips apart."""
    update = [torch.tensor([3.0, -4.0], dtype=torch.float64)]
    pair = [[-layer for layer in update], update]
    one, other = (defenses.clip_and_noise(each, clip=0.5)[0] for each in pair)
    assert float((one - other).norm()) == pytest.approx(2 * 0.5)


# RdpAccountant of Google's dp_accounting 0.6.0, its orders, δ = 1e-5; "replace" by twice the
# sensitivity: (noise multiplier, rounds, sample rate, neighbours, ε).
RENYI = [
    (0.3, 1, 1.0, "add or remove", 20.3925),
    (1.0, 1, 1.0, "add or remove", 4.7285),
    (1.0, 1, 1.0, "replace", 10.7255),
    (1.0, 50, 1.0, "add or remove", 57.3017),
    (1.0, 50, 1.0, "replace", 166.0355),
    (10.0, 300, 1.0, "add or remove", 9.0100),
    (10.0, 300, 1.0, "replace", 21.4449),
    (1.0, 100, 0.01, "add or remove", 1.2141),
    (2.0, 500, 0.1, "add or remove", 6.0346),
]


@pytest.mark.parametrize("multiplier, rounds, rate, neighbours, theirs", RENYI)
def test_epsilon_is_another_accountant_s(multiplier, rounds, rate, neighbours, theirs):
    mechanism = {"noise_multiplier": multiplier, "num_rounds": rounds, "sample_rate": rate}
    ours = defenses.epsilon(**mechanism, neighbours=neighbours)
    assert ours == pytest.approx(theirs, rel=0.02)


def test_epsilon_at_its_ends():
    def of(**mechanism):
        usual = {"noise_multiplier": 3.0, "num_rounds": 1, "neighbours": "add or remove"}
        return defenses.epsilon(**{**usual, **mechanism})

    assert of(noise_multiplier=0) == of(noise_multiplier=1e-320) == math.inf
    assert 1e14 < of(noise_multiplier=1e-8) < math.inf
    assert 0 <= of(noise_multiplier=1e6) < 0.01
    assert of(delta=0.9) == of(delta=1 - 1e-9) == 0  # never negative
    assert of(num_rounds=10**9) < math.inf
    assert of(num_rounds=50, sample_rate=0.1) < of(num_rounds=50) / 4
    with pytest.raises(ValueError, match="sample_rate is 0.5; neighbours 'replace' takes 1"):
        of(neighbours="replace", sample_rate=0.5)


def test_dp_sgd_without_noise_and_clip_is_sgd(small, digit):
    plain = federated.train_locally(small, *digit, learning_rate=0.05, local_steps=2)
    private = defenses.train_privately(
        small, *digit, learning_rate=0.05, clip=1e6, noise_multiplier=0.0, local_steps=2
    )
    assert private.image_shape == plain.image_shape and private.num_classes == plain.num_classes
    for name, expected in plain.weights_after.items():
        assert torch.allclose(private.weights_after[name], expected, atol=1e-6)


def test_what_dp_sgd_cannot_train_it_names(digit):
    norm = models.build("resnet18_bn", (1, 8, 8), 10, width=2, blocks=1).to(digit[0].device)
    options = {"learning_rate": 0.1, "clip": 1.0, "noise_multiplier": 0.0}
    with pytest.raises(ValueError, match="model has a layer that .* not take, such as batch norm"):
        defenses.train_privately(norm, *digit, **options)

    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.idle = torch.nn.Linear(64, 10), torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.head(x.flatten(1))

    model = Idle().to(digit[0].device)
    with pytest.raises(ValueError, match="model does not use 'idle.weight'.*frozen"):
        defenses.train_privately(model, *digit, **options)
    model.idle.requires_grad_(False)
    seen = defenses.train_privately(model, *digit, **options)
    assert {n for n, layer in seen.delta_by_name.items() if layer.any()} == {
        "head.weight",
        "head.bias",
    }


def test_dp_sgd_clips_each_image_and_adds_its_noise(small):
    from dlm_core import data

    device = next(small.parameters()).device
    images, labels, *_ = data.load("digits", n=4)
    images, labels = images.to(device), labels.to(device)

    def update(**options):
        seen = defenses.train_privately(small, images, labels, learning_rate=1.0, **options)
        return torch.cat([layer.flatten() for layer in seen.delta])

    alone = []
    for image, label in zip(images, labels):
        delta = federated.train_locally(small, image[None], label[None], learning_rate=1.0).delta
        alone.append(torch.cat([layer.flatten() for layer in delta]))
    clip = 0.5 * min(float(each.norm()) for each in alone)
    expected = sum(clip * each / each.norm() for each in alone) / 4
    clipped = update(clip=clip, noise_multiplier=0.0)
    assert torch.allclose(clipped, expected, atol=1e-5)
    added = update(clip=clip, noise_multiplier=2.0) - clipped
    assert added.std().item() == pytest.approx(2.0 * clip / 4, rel=0.1)


def aware(seen, attack, **defence):
    """``attack`` on what the defence leaves of ``seen``, told the defence."""
    options = {name: value for name, value in defence.items() if name != "name"}
    return attack(defenses.defend(seen, defence["name"], **options), defence=defence)


@pytest.mark.parametrize("name", ["sparsify", "top_k"])
def test_sparsification_is_void_against_a_server_that_leaves_zeros_out(seen, digit, name):
    found = aware(seen, adaptive.recover, name=name, percent=30, observer="server")
    assert torch.equal((found.images * 16).round(), (digit[0] * 16).round().double())
    found = aware(seen, adaptive.dlm_plus, name=name, percent=30, observer="server")
    assert found.labels.tolist() == digit[1].tolist()
    assert float((found.images - digit[0]).square().mean()) < 1e-3
    unaware = attacks.dlm_plus(
        defenses.defend(seen, defenses.sparsify, percent=30, observer="server")
    )
    assert float((unaware.images - digit[0]).square().mean()) > 1e-2


def test_a_weight_that_a_black_pixel_leaves_alone_is_no_zeroed_one(digit):
    """Such coordinates were once left out with the zeroed ones: a prior then greyed the pixel."""
    model = models.build("mlp", (1, 8, 8), 10).to(digit[0].device)
    assert (digit[0] == 0).any()
    found = aware(
        federated.train_locally(model, *digit, learning_rate=0.1),
        adaptive.recover,
        name="sparsify",
        percent=30,
        observer="server",
    )
    assert found.identifiable == 64
    assert torch.equal((found.images * 16).round(), (digit[0] * 16).round().double())


def test_clipping_without_noise_hides_nothing(seen, digit):
    found = aware(seen, adaptive.recover, name="clip_and_noise", clip=1e-2)
    assert torch.equal((found.images * 16).round(), (digit[0] * 16).round().double())


@pytest.mark.parametrize(
    "defence",
    [
        {"name": "noise", "scale": 1e-4, "observer": "server"},
        {"name": "noise", "scale": 1e-4, "distribution": "gaussian", "observer": "channel"},
        {"name": "clip_and_noise", "clip": 0.01, "noise_multiplier": 0.1},
        {"name": "noise", "scale": 1e-4, "observer": "server", "repeats": 4},
        {"name": "quantise", "bits": 8},
    ],
)
def test_the_noise_that_the_attacker_expects_is_the_noise_that_is_there(seen, defence):
    options = {name: value for name, value in defence.items() if name != "name"}
    clean = defenses.defend(seen, defenses.clip_and_noise, clip=0.01) if "clip" in defence else seen
    setting = defenses.Setting.of(defence)
    square, expected = 0.0, 0.0
    for seed in range(20):
        sent = defenses.defend(seen, defence["name"], seed=seed, **options)
        parts = zip(sent.delta, clean.delta, setting.noise_variance(sent))
        for noisy, plain, variance in parts:
            square += float((noisy - plain).square().sum())
            expected += variance * noisy.numel()
    assert square / expected == pytest.approx(1, rel=0.5 if defence["name"] == "quantise" else 0.1)


def test_labels_with_gaps(seen, digit):
    names = [name for name, _ in seen.model.named_parameters()]
    trusted = [torch.ones_like(seen.weights_after[name], dtype=torch.bool) for name in names]
    assert label_inference.infer(seen, trusted=trusted).tolist() == digit[1].tolist()
    trusted[-1][digit[1]] = False
    assert label_inference.infer(seen, trusted=trusted).tolist() == digit[1].tolist()
    with pytest.raises(ValueError, match="num_images is 2"):
        label_inference.infer(seen, 2, trusted)


def test_the_aware_attacker_sees_through_several_steps_and_sparsification(small, digit):
    seen = federated.train_locally(small, *digit, learning_rate=0.3, local_steps=5)
    defence = {"name": "sparsify", "percent": 30, "observer": "server"}
    found = aware(seen, partial(adaptive.unrolled_dlm, learning_rate=0.3, local_steps=5), **defence)
    assert float((found.images - digit[0]).square().mean()) < 1e-4
    one_step = aware(seen, adaptive.dlm_plus, **defence)
    assert found.loss < one_step.loss / 4


def test_exact_recovery_bears_units_that_are_zero_in_both_snapshots(digit):
    model = models.build("mlp", (1, 8, 8), 10, seed=0, init="default").to(digit[0].device)
    seen = federated.train_locally(model, *digit, learning_rate=1.0)
    found = aware(seen, adaptive.recover, name="sparsify", percent=30, observer="channel")
    assert found.images.isfinite().all()


def test_labels_of_a_batch_are_not_made_up(seen):
    last = list(seen.weights_after)[-1]
    still = replace(seen, weights_after={**seen.weights_after, last: seen.model.state_dict()[last]})
    with pytest.raises(ValueError, match="the last layer's bias did not change"):
        label_inference.infer(still, 2)


@pytest.mark.parametrize("observer", ["server", "channel"])
def test_a_defence_that_works_in_place_spoils_nothing(digit, observer):
    seen = federated.train_locally(
        models.build("mlp", (1, 8, 8), 10, seed=0), digit[0], digit[1], learning_rate=0.1
    )

    def pure(weights, *, parameters, seed):
        return {name: tensor + 0.01 for name, tensor in weights.items()}

    def in_place(weights, *, parameters, seed):
        for tensor in weights.values():
            tensor += 0.01
        return weights

    expected, found = (defenses.defend(seen, each, observer=observer) for each in (pure, in_place))
    for p, q in zip(expected.model.parameters(), found.model.parameters()):
        assert torch.equal(p, q)
    assert all(
        torch.equal(tensor, found.weights_after[name])
        for name, tensor in expected.weights_after.items()
    )


NOISES = [(name, scale) for name in ("laplace", "gaussian") for scale in (1e-3, 1e-2, 0.1)]


@pytest.mark.parametrize("distribution, scale", NOISES)
@pytest.mark.parametrize("owner", [True, False], ids=["owner", "observer"])
def test_the_released_noise_s_variance_is_what_it_adds_on_the_channel(owner, distribution, scale):
    """Of W_t the observer sees rows that the noise made longer, and the owner those before."""
    model = models.build("lenet", (1, 8, 8), 10).double()
    images, labels, *_ = data.load("digits", n=1)
    seen = federated.train_locally(model, images, labels, learning_rate=0.01)
    setting = defenses.Setting("noise", {"scale": scale, "distribution": distribution})
    ratios = []
    for seed in range(10):
        defended = setting.defend(seen, seed)
        said = setting.noise_variance(defended, seen.model if owner else None)
        added = [(a - b).square().mean() for a, b in zip(defended.delta, seen.delta)]
        ratios.append([float(a / s) for a, s in zip(added, said)])
    large = [p.numel() >= 100 for p in model.parameters()]
    mean = torch.tensor(ratios).mean(0)[large]
    # the longest of many noisy rows is longer than they are in the mean
    assert ((mean > (0.85 if owner else 0.55)) & (mean < 1.15)).all()


def test_an_owner_s_bound_under_noise_on_the_channel_is_that_of_a_dense_jacobian():
    model = models.build("lenet", (1, 8, 8), 10).double()
    images, labels, *_ = data.load("digits", n=1)
    images, rate, scale = images.double(), 1000.0, 0.1
    parameters = list(model.parameters())
    factors = [float(defenses.undone_clip(p.detach(), 0.2)) for p in parameters]

    def update(x):
        value = torch.nn.functional.cross_entropy(model(x), labels)
        g = torch.autograd.grad(value, parameters, create_graph=True)
        each = zip(g, factors)
        return torch.cat([(rate * a / (2**0.5 * c * scale)).flatten() for a, c in each])

    jacobian = torch.autograd.functional.jacobian(update, images).flatten(1)
    left = torch.linalg.inv(jacobian.T @ jacobian + 16 * torch.eye(64).double()).diagonal()
    defence = {"name": "noise", "scale": scale, "distribution": "gaussian"}
    found = information.of_update(model, images, labels, learning_rate=rate, defence=defence)
    assert found.bound_psnr == pytest.approx(-10 * math.log10(float(left.mean())), abs=0.1)


SENT = [n for n, each in records.DEFENCES.items() if each.acts_on in ("snapshot", "update")]


class Tied(torch.nn.Module):
    """Two layers of one weight; the state dict has it twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(torch.sigmoid(self.b(torch.sigmoid(self.a(x.flatten(1))))))


@pytest.mark.parametrize("observer", ["channel", "server"])
@pytest.mark.parametrize("name", SENT)
def test_a_weight_that_layers_share_is_sent_defended_by_all_its_names(name, observer):
    images, labels, *_ = data.load("digits", n=1)
    seen = federated.train_locally(Tied(), images, labels, learning_rate=0.1)
    example = records.DEFENCES[name].example
    sent = defenses.defend(seen, name, observer=observer, **example)
    one, other = (sent.weights_after[f"{layer}.weight"] for layer in "ab")
    assert torch.equal(one, other) and not torch.equal(one, seen.weights_after["a.weight"])
    received = sent.model.state_dict()
    assert torch.equal(received["a.weight"], received["b.weight"])
    noised = records.DEFENCES[name].acts_on == "snapshot" and observer == "channel"
    assert torch.equal(received["b.weight"], seen.model.a.weight) is not noised
