"""The client, the observation, and that nothing of the truth travels with it."""

import gc
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dlm_core import attacks, data, federated, models, objectives
from tests.networks import Idle


@settings(max_examples=10, deadline=None)
@given(rate=st.floats(1e-3, 1.0))
def test_one_sgd_step_with_known_rate_is_the_gradient(rate):
    images, labels, *_ = data.load("digits", n=2)
    model = models.build("lenet", (1, 8, 8), 10, seed=3).double()
    seen = federated.train_locally(model, images.double(), labels, learning_rate=rate)
    for delta, g in zip(
        seen.delta, objectives.gradient(model, federated.loss, images.double(), labels), strict=True
    ):
        torch.testing.assert_close(delta / rate, g, rtol=1e-9, atol=1e-12)


def test_steps_clear_gradients_and_the_released_client_does_not(small, digit):
    model = small
    expected = models.build("lenet", (1, 8, 8), 10, seed=3).to(digit[0].device)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        federated.loss(expected(digit[0]), digit[1]).backward()
        optimizer.step()
    seen = federated.train_locally(model, *digit, learning_rate=0.1, local_steps=3)
    assert all(torch.equal(seen.weights_after[name], p) for name, p in expected.named_parameters())
    released = federated.train_locally(
        model, *digit, learning_rate=0.1, local_steps=3, clear_gradients=False
    )
    longer, plain = (sum(d.square().sum() for d in s.delta) for s in (released, seen))
    assert longer > 2 * plain  # 1 + 2 + 3 gradients instead of 3


def test_the_former_names_still_serve_and_both_are_refused(small, digit):
    seen = federated.train_locally(small, *digit, learning_rate=0.1, local_steps=2)
    former = federated.train_locally(small, *digit, lr=0.1, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(seen.delta, former.delta))
    with pytest.raises(TypeError, match="lr is the former name of learning_rate; give one of them"):
        federated.train_locally(small, *digit, lr=0.1, learning_rate=0.1)
    with pytest.raises(
        TypeError, match="steps is the former name of local_steps; give one of them"
    ):
        federated.train_locally(small, *digit, learning_rate=0.1, steps=2, local_steps=2)


def test_batches_are_taken_in_order_and_cyclically():
    images, labels, *_ = data.load("digits", n=3)
    model = models.build("mlp", (1, 8, 8), 10, seed=0)
    seen = federated.train_locally(
        model, images, labels, learning_rate=0.1, local_steps=2, batch_size=2
    )
    first = federated.train_locally(model, images[:2], labels[:2], learning_rate=0.1)
    model.load_state_dict(first.weights_after)
    second = federated.train_locally(model, images[[2, 0]], labels[[2, 0]], learning_rate=0.1)
    assert all(
        torch.equal(seen.weights_after[name], second.weights_after[name])
        for name in second.weights_after
    )


@pytest.mark.parametrize(
    "optimizer, options",
    [(torch.optim.Adam, None), (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1})],
)
def test_any_torch_optimizer(small, digit, optimizer, options):
    seen = federated.train_locally(
        small,
        *digit,
        learning_rate=0.01,
        local_steps=2,
        client_optimizer=optimizer,
        optimizer_options=options,
    )
    assert all(delta.isfinite().all() for delta in seen.delta)


def test_the_model_given_is_left_as_it_was(small, digit):
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    federated.train_locally(small, *digit, learning_rate=1.0, local_steps=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())
    assert all(p.grad is None for p in small.parameters())


def test_no_ground_truth_is_reachable_from_an_observation(small, digit):
    images, labels = digit
    federated.loss(
        small(images), labels
    ).backward()  # even where the caller's model carries gradients of the data
    seen = federated.train_locally(small, images, labels, learning_rate=0.05, local_steps=2)
    todo, known, tensors = [seen], set(), []
    while todo:
        thing = todo.pop()
        if (
            id(thing) in known
            or isinstance(thing, type)
            or type(thing).__module__ == "builtins"
            and callable(thing)
        ):
            continue
        known.add(id(thing))
        if isinstance(thing, torch.Tensor):
            tensors += [thing, *([thing.grad] if thing.grad is not None else [])]
            assert thing.grad is None and thing.grad_fn is None
        elif isinstance(thing, (dict, list, tuple, torch.nn.Module, federated.Observation)):
            todo += gc.get_referents(thing)
    allowed = {
        *(id(p) for p in seen.model.state_dict(keep_vars=True).values()),
        *(id(t) for t in seen.weights_after.values()),
    }
    assert tensors and {id(tensor) for tensor in tensors} <= allowed
    assert all(tensor.shape != images.shape for tensor in tensors)


def test_fedavg_is_the_weighted_mean_of_the_clients():
    images, labels, *_ = data.load("digits", n=6)
    model = models.build("mlp", (1, 8, 8), 10, seed=0)
    clients = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    (after, seen), *_ = federated.rounds(model, clients, num_rounds=1, learning_rate=0.1)
    for name, tensor in after.state_dict().items():
        expected = (
            4 * seen[0].weights_after[name].double() + 2 * seen[1].weights_after[name].double()
        ) / 6
        torch.testing.assert_close(tensor.double(), expected)


@pytest.mark.parametrize("number", range(1, 15))
@pytest.mark.parametrize("size", [1, 3, 0.1])
def test_the_mean_of_equals_is_each_of_them(number, size):
    sent = {"w": torch.tensor([1 / 3, 7.0]), "count": torch.tensor(1), "on": torch.tensor(True)}
    mean = federated.average([sent] * number, [size] * number)
    torch.testing.assert_close(mean["w"], sent["w"], rtol=1e-7, atol=0)
    assert mean["count"].item() == 1 and mean["count"].dtype == torch.int64
    assert mean["on"].item() is True


def test_counts_are_averaged_to_the_nearest():
    sent = [{"n": torch.tensor(n)} for n in (2, 3, 9)]
    assert federated.average(sent, [1, 1, 1])["n"] == 5  # 4.67
    assert federated.average(sent, [3, 1, 0])["n"] == 2  # 2.25
    assert federated.average(sent, [0, 0, 5])["n"] == 9


@pytest.mark.parametrize(
    "snapshots, sizes, message",
    [
        ([], [], "snapshots is .*; it takes at least one state dict"),
        ([{}], [1], "snapshots is .*; it takes at least one state dict"),
        ([{"w": torch.ones(2)}], [1, 2], r"sizes is \[1, 2\]; it takes a number for each of the 1"),
        ([{"w": torch.ones(2)}] * 2, [1], r"sizes is \[1\]; it takes a number for each of the 2"),
        ([{"w": torch.ones(2)}] * 2, [0, 0.0], "sizes is .* not all of them 0"),
        ([{"w": torch.ones(2)}] * 2, [-1, 2], "sizes is .*, and not -1 in it"),
        ([{"w": torch.ones(2)}] * 2, [1, float("nan")], "sizes is .*, and not nan in it"),
        ([{"w": torch.ones(2)}, {"v": torch.ones(2)}], [1, 1], r"snapshots\[1\] does not fit.*'w'"),
        ([{"w": torch.ones(2)}, {"w": torch.ones(3)}], [1, 1], r"snapshots\[1\]\['w'\] has shape"),
    ],
)
def test_what_cannot_be_averaged_is_named(snapshots, sizes, message):
    with pytest.raises(ValueError, match=message):
        federated.average(snapshots, sizes)


def test_fedavg_learns():
    images, labels, *_ = data.load("digits", n=100)
    model = models.build("mlp", (1, 8, 8), 10, seed=0, init="default")
    *_, (after, _) = federated.rounds(
        model,
        [(images[:50], labels[:50]), (images[50:], labels[50:])],
        num_rounds=20,
        learning_rate=0.5,
        local_steps=5,
    )
    assert (after(images).argmax(1) == labels).float().mean() > 0.9


def test_rounding_variance_matches_simulated_rounding():
    seen = federated.train_locally(
        models.build("mlp", (1, 8, 8), 10), *data.load("digits", n=1)[:2], learning_rate=0.01
    )
    name, weight = next(iter(seen.model.named_parameters()))
    exact = (
        weight.detach().double()
        - torch.rand(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * 0.1
    )
    error = exact.float().double() - exact
    expected = replace(
        seen, weights_after={**seen.weights_after, name: exact.float()}
    ).rounding_variance[0]
    assert (error.square() / expected).mean().item() == pytest.approx(1, rel=0.1)


def test_snapshots_that_do_not_fit_are_refused_by_name(seen):
    after = seen.weights_after
    name = next(iter(after))
    bad = {
        f"weights_after does not fit the model: it lacks '{name}'$": {
            key: value for key, value in after.items() if key != name
        },
        "it has 'extra'$": {**after, "extra": torch.zeros(1)},
        f"it lacks '{name}'.* and 6 more and has 'net.{name}'": {
            f"net.{key}": value for key, value in after.items()
        },
        rf"weights_after\['{name}'\] has shape \[1\]": {**after, name: torch.zeros(1)},
        rf"weights_after\['{name}'\] has dtype torch.float64": {
            **after,
            name: after[name].double(),
        },
        f"weights_after holds NaN or infinity in '{name}'": {
            **after,
            name: after[name] * float("nan"),
        },
        "equals the model's weights": seen.model.state_dict(),
    }
    for message, weights in bad.items():
        with pytest.raises(ValueError, match=message):
            replace(seen, weights_after=weights)


def test_an_observation_and_a_result_print_in_a_line(seen):
    found = attacks.dlm_plus(seen, max_evaluations=2, keep_every=1)
    assert re.fullmatch(r"Observation\(image_shape=.{1,30}, num_classes=10\)", repr(seen))
    assert re.fullmatch(r"Reconstruction\(labels=.{1,400}\)", repr(found))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 0}, r"learning_rate is 0; it takes a finite number in \(0, inf\)"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"local_steps": 0}, "local_steps is 0; it takes a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"labels": torch.tensor([10])}, "labels run from 10 to 10; the model has classes 0 to 9"),
        ({"labels": torch.tensor([1, 2])}, "labels has shape"),
        ({"images": torch.zeros(1, 8, 8)}, r"images is .*; it takes images \[N, C, H, W\]"),
        ({"images": torch.full((1, 1, 8, 8), float("nan"))}, "images is .* and not NaN"),
        ({"images": torch.full((1, 1, 8, 8), 255.0)}, r"images is .*\[0, 1\], and not from 255"),
        ({"client_optimizer": torch.nn.Linear}, "client_optimizer is .* or a class of Optimizer"),
        ({"client_optimizer": torch.optim.LBFGS}, "client_optimizer is LBFGS.*needs no closure"),
        ({"client_optimizer": "adan"}, "client_optimizer 'adan' is unknown.*did you mean adam"),
        (
            {"optimizer_options": {"momentun": 0.9}},
            "optimizer_options 'momentun' is unknown.*did you mean momentum",
        ),
        ({"optimizer_options": {"lr": 0.9}}, "optimizer_options 'lr' is unknown"),
        ({"optimizer_options": {"momentum": -1}}, "optimizer_options is {'momentum': -1}; SGD ref"),
        ({"optimizer_options": {"momentum": "a"}}, "optimizer_options is {'momentum': 'a'}; SGD"),
        (
            {"transmitted": torch.int8},
            "transmitted is torch.int8; it takes a dtype of floating point or None",
        ),
    ],
)
def test_bad_training_input_is_named(change, message):
    model = models.build("lenet", (1, 8, 8), 10)
    arguments = {
        "images": torch.rand(1, 1, 8, 8),
        "labels": torch.tensor([1]),
        "learning_rate": 0.1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        federated.train_locally(model, **arguments)


def test_a_client_trains_where_its_caller_takes_no_gradients(digit):
    model = models.build("lenet", (1, 8, 8), 10).to(digit[0].device)
    with torch.no_grad():
        seen = federated.train_locally(model, *digit, learning_rate=0.1)
    expected = federated.train_locally(model, *digit, learning_rate=0.1)
    assert all(map(torch.equal, seen.delta, expected.delta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_and_labels_as_users_hold_them_are_one_training(dtype):
    model = models.build("lenet", (1, 8, 8), 10, seed=3).to(dtype)
    eight_bit = torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8)
    images, labels = (eight_bit / 255).to(dtype), torch.tensor([3, 1])
    expected = federated.train_locally(model, images, labels, learning_rate=0.1)
    held = [
        (eight_bit, labels.int()),
        (eight_bit.numpy(), labels.numpy().astype("int32")),
        (eight_bit.float() / 255, labels.to(torch.uint8)),
        ((eight_bit.double() / 255).numpy(), [3, 1]),
    ]
    for pair in held:
        seen = federated.train_locally(model, *pair, learning_rate=0.1)
        for ours, theirs in zip(seen.delta, expected.delta):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_frozen_and_an_unused_layer_stay_and_the_rest_trains(digit, optimizer):
    seen = federated.train_locally(
        Idle().to(digit[0].device),
        *digit,
        learning_rate=0.1,
        local_steps=2,
        client_optimizer=optimizer,
        optimizer_options={"weight_decay": 0.1},
    )
    moved = {name for name, layer in seen.delta_by_name.items() if layer.any()}
    assert moved == {"head.weight", "head.bias"}


def test_a_model_that_cannot_train_says_so(digit):
    model = Idle().to(digit[0].device).requires_grad_(False)
    model.unused.requires_grad_(True)
    with pytest.raises(ValueError, match="model has nothing to train"):
        federated.train_locally(model, *digit, learning_rate=0.1)


def test_a_client_that_diverges_says_so(small, digit):
    with pytest.raises(FloatingPointError, match="diverged within 3 steps"):
        federated.train_locally(small, *digit, learning_rate=1e38, local_steps=3)


def test_snapshots_from_files(tmp_path, seen):
    before = {name: tensor.cpu().contiguous() for name, tensor in seen.model.state_dict().items()}
    save_file(before, tmp_path / "before.safetensors")
    torch.save(seen.weights_after, tmp_path / "after.pt")
    fresh = models.build("lenet", (1, 8, 8), 10, seed=99)
    loaded = federated.observe(
        fresh,
        federated.load_weights(tmp_path / "before.safetensors"),
        federated.load_weights(tmp_path / "after.pt"),
        (1, 8, 8),
    )
    for ours, theirs in zip(loaded.delta, seen.delta):
        assert torch.equal(ours, theirs.cpu())


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_files_that_are_no_weights_are_refused_and_never_run(tmp_path):
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3, "model": {"w": torch.zeros(1)}}, tmp_path / "checkpoint.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, message in {
        "evil.pt": "cannot be read",
        "list.pt": "is a list, no state dict",
        "checkpoint.pt": "is a dict of 'epoch', 'model', no state dict",
        "broken.safetensors": "cannot be read",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            federated.load_weights(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        federated.load_weights(tmp_path / "absent.pt")


def test_weights_can_be_rounded_on_their_way(small, digit):
    model, (images, labels) = small, digit
    before = {name: w.clone() for name, w in model.state_dict().items()}
    seen = federated.train_locally(
        model, images, labels, learning_rate=0.1, transmitted=torch.bfloat16
    )
    for name, after in seen.weights_after.items():
        assert after.dtype == torch.float32
        for sent in (after, seen.model.state_dict()[name]):
            assert torch.equal(sent, sent.to(torch.bfloat16).float())
        assert torch.equal(model.state_dict()[name], before[name])
        assert not torch.equal(before[name], seen.model.state_dict()[name])


def test_an_observation_keeps_what_was_sent_while_the_client_trains_on():
    images, labels, *_ = data.load("digits", n=1)
    model = models.build("mlp", (1, 8, 8), 10)
    client = models.build("mlp", (1, 8, 8), 10)
    with torch.no_grad():
        client[-1].bias += 1.0
    seen = federated.observe(model, model.state_dict(), client.state_dict(), (1, 8, 8))
    with torch.no_grad():
        client[-1].bias += 1.0
    assert float(seen.delta[-1].abs().max()) == pytest.approx(1.0)


def test_rounds_go_on_as_they_were_whatever_is_done_to_the_model_they_yield():
    images, labels, *_ = data.load("digits", n=4)
    torch.manual_seed(0)
    normed = [torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16)]
    model = torch.nn.Sequential(*normed, torch.nn.ReLU(), torch.nn.Linear(16, 10)).train()
    ends = []
    for measured in (False, True):
        for after, _ in federated.rounds(
            model, [(images, labels)], num_rounds=3, learning_rate=0.1
        ):
            if measured:
                after.eval()[1].weight.data.zero_()
            else:
                ends.append(after)
        if measured:
            ends.append(after)
    assert torch.equal(ends[2][4].weight, ends[3][4].weight)


def test_training_leaves_no_gradient_in_the_caller_s_images():
    images, labels, *_ = data.load("digits", n=2)
    images = images.clone().requires_grad_()
    federated.train_locally(models.build("mlp", (1, 8, 8), 10), images, labels, learning_rate=0.1)
    assert images.grad is None
