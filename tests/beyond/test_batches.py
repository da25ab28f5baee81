"""Exact recovery of batches against known truth, on small networks."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from dlm_core import data, metrics, models, records
from dlm_core.beyond import batches, sparse_traces
from dlm_core.federated import train_locally
from dlm_core.harness.trials import Trial, observe, run_trial
from dlm_core.results import Explains

SHAPE, CLASSES = (1, 8, 8), 10


def client(
    size,
    *,
    hidden=100,
    init="default",
    dtype=torch.float32,
    learning_rate=0.01,
    labels=None,
    images=None,
    **training,
):
    """(Observation, images, labels) of ``size`` random 8-bit images of random classes."""
    draws = torch.Generator().manual_seed(size)
    images = (
        torch.randint(0, 256, (size, *SHAPE), generator=draws) / 255.0 if images is None else images
    )
    labels = (
        torch.randint(CLASSES, (size,), generator=draws) if labels is None else torch.tensor(labels)
    )
    model = models.build("mlp", SHAPE, CLASSES, hidden=hidden, init=init, seed=size).to(dtype)
    return (
        train_locally(model, images.to(dtype), labels, learning_rate=learning_rate, **training),
        images,
        labels,
    )


def picture():
    return torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(5))


def errors(found, images):
    """(order, root mean square error of each image [B]) after matching."""
    order = metrics.match(found.images, images.double())
    return order, (found.images[order] - images).square().flatten(1).mean(1).sqrt()


@pytest.mark.parametrize("init", ["default", "paper"])
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_float64_snapshots_give_everything(size, init):
    seen, images, labels = client(size, init=init, dtype=torch.float64)
    found = batches.recover_batch(seen)
    order, error = errors(found, images)
    assert error.max() < 1e-10
    assert torch.equal(found.labels[order], labels)
    assert found.learning_rate == pytest.approx(0.01, rel=1e-10)
    assert found.k == pytest.approx(100, rel=1e-10)
    assert found.rank == found.num_recovered == size
    assert found.verdict.startswith(f"{size} of {size} images recovered: one SGD step")


@pytest.mark.parametrize(
    "init, learning_rate", [("default", 1e-3), ("default", 0.01), ("paper", 0.01), ("paper", 1.0)]
)
def test_float32_snapshots_give_them_to_the_error_it_states(init, learning_rate):
    seen, images, labels = client(4, init=init, learning_rate=learning_rate)
    found = batches.recover_batch(seen, num_images=4)
    order, error = errors(found, images)
    assert (error < 3 * found.image_error[order]).all()
    assert (error > found.image_error[order] / 3).all()
    assert error.max() < 1e-3
    assert torch.equal(found.labels[order], labels)
    assert found.learning_rate == pytest.approx(learning_rate, rel=1e-4)
    assert 0.3 < found.chi2 < 4
    assert found.recovered.all() and (found.agreement > 0.95).all()


def test_deeper_networks():
    draws = torch.Generator().manual_seed(0)
    images, labels = torch.rand(3, *SHAPE, generator=draws), torch.tensor([1, 2, 3])
    model = models.build("mlp", SHAPE, CLASSES, hidden=100, depth=2, init="default")
    found = batches.recover_batch(train_locally(model, images, labels, learning_rate=0.1))
    order, error = errors(found, images)
    assert error.max() < 1e-4
    assert torch.equal(found.labels[order], labels)
    assert found.learning_rate == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(
    "training",
    [
        {"local_steps": 3},
        {"local_steps": 3, "optimizer_options": {"momentum": 0.9}},
        {"local_steps": 4, "batch_size": 1},
    ],
    ids=str,
)
def test_images_survive_several_local_steps_and_the_learning_rate_is_not_claimed(training):
    seen, images, _ = client(4, **training)
    found = batches.recover_batch(seen)
    assert errors(found, images)[1].max() < 1e-4
    assert found.learning_rate is None
    assert found.k is None
    assert found.chi2 > 100
    assert "not one SGD step" in found.verdict


def test_an_image_that_occurs_twice_is_counted_twice():
    images = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))[[0, 1, 1, 2]]
    seen, images, labels = client(4, images=images, labels=[5, 6, 6, 7])
    for told in (None, 4):
        found = batches.recover_batch(seen, num_images=told)
        order, error = errors(found, images)
        assert error.max() < 1e-4
        assert found.labels.sort().values.tolist() == [5, 6, 6, 7]
        assert found.learning_rate == pytest.approx(0.01, rel=1e-4)
        assert found.rank == 3


def test_an_image_without_a_trace_stays_grey():
    seen, images, labels = client(3, init="paper")
    certain = seen.model(images).argmax(1)
    with torch.no_grad():  # certain of its class: the loss of the first image has no gradient
        seen.model[-1].weight.mul_(100), seen.model[-1].bias.mul_(100)
    seen = train_locally(
        seen.model,
        images,
        torch.cat([certain[:1], (certain[1:] + 1) % CLASSES]),
        learning_rate=1e-4,
    )
    found = batches.recover_batch(seen, num_images=3)
    assert found.recovered.tolist() == [True, True, False]
    assert found.verdict.endswith("the others left no trace")
    assert (found.images[2] == 0.5).all()
    assert found.labels[2] == -1
    assert found.learning_rate == pytest.approx(1e-4, rel=1e-3)


def test_a_first_layer_that_stayed_gives_no_images_and_no_error():
    seen, *_ = client(4)
    first = {
        name: parameter.detach() for name, parameter in list(seen.model.named_parameters())[:2]
    }
    found = batches.recover_batch(
        dataclasses.replace(seen, weights_after={**seen.weights_after, **first}), num_images=4
    )
    assert found.num_recovered == 0 and found.rank == 0 and (found.images == 0.5).all()
    assert "no unit" in found.verdict and found.stop_reason == "stalled"


def test_starts_orthogonal_to_all_that_was_found_go_elsewhere():
    # The first round finds every axis. Then nothing is left of a start that is made orthogonal to
    # all of them.
    basis = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    noise = torch.full((12, 4), 1e-12, dtype=torch.float64)
    mixture = sparse_traces.Mixture(basis, noise)
    moved = sparse_traces.MovedUnits(basis, -basis[:, 0], basis, basis.sum(1), *[noise[:, 0]] * 2)
    rounds = sparse_traces.sparse_directions(mixture, moved, max_rounds=3, seed=0)
    for directions in rounds:
        assert directions.isfinite().all()


@pytest.mark.parametrize("size, hidden", [(4, 12), (8, 40)], ids=["too few units", "too few zeros"])
def test_what_cannot_be_told_apart_is_grey(size, hidden):
    seen, images, _ = client(size, hidden=hidden)
    found = batches.recover_batch(seen, num_images=size, max_rounds=2)
    assert found.num_recovered == int(found.recovered.sum()) < size
    assert (found.images[~found.recovered] == 0.5).all()
    assert found.stop_reason == "stalled"
    done = {"too few units": "recovered", "unsettled": "shown"}[found.evidence.reason]
    assert found.verdict.startswith(
        f"{found.num_recovered} of {size} images {done}: Δ has rank {size}"
    )


def test_sixteen_images_behind_two_hundred_units_come_back():
    """More than a random search for zeros alone finds: the last traces come from the images."""
    draws = torch.Generator().manual_seed(1)
    images = torch.rand(16, *SHAPE, generator=draws)
    labels = torch.arange(16)
    model = models.build("mlp", SHAPE, 100, hidden=200, init="default", seed=1)
    seen = train_locally(model, images, labels, learning_rate=0.01)
    found = batches.recover_batch(seen, num_images=16, max_rounds=10)
    order, error = errors(found, images)
    assert error.max() < 1e-3 and torch.equal(found.labels[order], labels)
    assert found.recovered.all()


def test_the_same_signal_from_two_images_is_not_taken_for_a_recovery():
    """Trace d_i = D_i v with one v for both.

    Their difference vanishes in more units than either of them.
    """
    seen, images, _ = client(2)
    model, after = seen.model.double(), {}
    signal = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = images.flatten(1).double()
    traces = signal * (model[1](x) > 0).T
    for name, tensor in model.state_dict().items():
        after[name] = tensor - 1e-3 * {"1.weight": traces @ x, "1.bias": traces.sum(1)}.get(
            name, 0 * tensor
        )
    found = batches.recover_batch(dataclasses.replace(seen, model=model, weights_after=after))
    order, error = errors(found, images)
    assert not (found.recovered[order] & (error > 0.01)).any()


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("init", ["default", "paper"])
@pytest.mark.parametrize("size", [2, 4, 6])
def test_where_rounding_drowns_the_zeros_no_image_stands_for_two(size, init, learning_rate):
    """Two traces that were fitted to the same zeros are one: their difference is noise."""
    seen, images, labels = client(size, init=init, learning_rate=learning_rate)
    found = batches.recover_batch(seen, max_rounds=5)
    if found.learning_rate is None:
        assert "one SGD step on these images explains" not in found.verdict
        return
    order, error = errors(found, images)
    assert torch.equal(found.labels[order], labels)
    assert found.learning_rate == pytest.approx(learning_rate, rel=0.02)
    assert (error < 3 * found.image_error[order]).all() and error.max() < 0.1


def test_a_mixture_that_the_zeros_do_not_settle_is_vouched_for_by_nothing():
    seen, *_ = client(8, hidden=60)
    found = batches.recover_batch(seen, max_rounds=5)
    assert found.reason is batches.Reason.UNSETTLED and found.recovered.any()
    assert not found.vouched.any()


@pytest.mark.parametrize("transmitted", [torch.float16, torch.bfloat16])
def test_in_half_precision_no_wrong_picture_is_vouched_for(transmitted):
    """Rounding of weights W_t to half precision and of W_{t+1} drowns small traces."""
    for size in (2, 3, 4):
        seen, images, _ = client(size, hidden=200, transmitted=transmitted)
        found = batches.recover_batch(seen, num_images=size, max_rounds=3)
        order, error = errors(found, images)
        assert not (found.vouched[order] & (error > 0.1)).any()


SHARING = {  # a batch in which one direction stands for two images
    "black": torch.cat([picture(), torch.zeros(1, *SHAPE)]),
    "a darker copy": torch.cat([picture(), 0.5 * picture()]),
    "two greys": torch.cat([torch.full((1, *SHAPE), 0.3), torch.full((1, *SHAPE), 0.7)]),
}


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("images", SHARING.values(), ids=SHARING)
def test_a_direction_that_images_share_is_vouched_for_as_none_of_them(images, local_steps):
    """What is found has neither's brightness; the bias moved by more than its trace."""
    seen, *_ = client(2, images=images, labels=[3, 4], local_steps=local_steps)
    found = batches.recover_batch(seen)
    assert found.rank == 1 and found.reason is batches.Reason.SHARED
    assert not found.vouched.any() and found.evidence.explains is not Explains.FULLY
    assert "not one SGD step on these images" in found.verdict
    assert found.verdict.startswith("1 of 1 images shown: ")
    assert "stands for several images" in found.verdict
    assert found.learning_rate is None


def test_beside_a_black_image_no_other_is_vouched_for():
    """The bias of a black image's units is given to the others' traces, and with it brightness."""
    _, images, _ = client(2)
    with_black = torch.cat([images, torch.zeros(1, *SHAPE)])
    seen, *_ = client(3, images=with_black, labels=[0, 1, 2])
    found = batches.recover_batch(seen)
    assert found.rank == 2 and not found.vouched.any()


@pytest.mark.parametrize("local_steps", [3, 10])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_after_several_steps_images_with_a_direction_each_are_vouched_for(size, local_steps):
    seen, images, _ = client(size, local_steps=local_steps)
    found = batches.recover_batch(seen, num_images=size)
    assert found.reason is batches.Reason.NOT_ONE_STEP and found.vouched.all()
    assert errors(found, images)[1].max() < 1e-3
    assert "at one rate" in found.verdict


def test_a_unit_that_an_image_hardly_turns_on_says_nothing_against_one_step():
    """The image's error, 4e-6, turns one of 200 units off: chi square was 4e5."""
    trial = Trial(
        "exact_batch",
        **{"dataset": "digits", "index": 16, "num_images": 8, "seed": 2, "model": "mlp"},
        model_options={"hidden": 200, "init": "default"},
        client={"learning_rate": 0.01},
    )
    seen, images, _ = observe(trial)
    found = batches.recover_batch(seen, num_images=8, seed=2)
    assert errors(found, images)[1].max() < 1e-5
    assert found.evidence.reason is batches.Reason.EXPLAINED and found.evidence.chi2 < 3
    assert found.vouched.all() and found.learning_rate == pytest.approx(0.01, rel=1e-3)


def test_chi_square_is_judged_from_both_sides(monkeypatch):
    seen, *_ = client(3)
    monkeypatch.setattr(batches, "CHI2_RANGE", (2.0, 4.0))
    low = batches.recover_batch(seen)
    assert low.chi2 < 2 and "the noise was overstated" in low.verdict
    assert low.learning_rate == pytest.approx(0.01, rel=1e-4)
    monkeypatch.setattr(batches, "CHI2_RANGE", (0.3, 0.4))
    high = batches.recover_batch(seen)
    assert "not one SGD step" in high.verdict and high.learning_rate is None
    # noise that explains the update without any step
    monkeypatch.setattr(batches, "CHI2_RANGE", (0.3, math.inf))
    vacuous = batches.recover_batch(seen)
    assert "nothing was tested" in vacuous.verdict and vacuous.learning_rate is None
    monkeypatch.setattr(batches, "CHI2_RANGE", (math.nan, math.nan))
    assert batches.recover_batch(seen).learning_rate is None


def test_with_two_classes_the_verdict_says_what_is_assumed():
    model = models.build("mlp", SHAPE, 2, hidden=100, init="default")
    seen = train_locally(model, picture(), torch.tensor([1]), learning_rate=0.01)
    found = batches.recover_batch(seen)
    assert found.verdict.startswith("1 of 1 images recovered: one SGD step")
    assert "need not be one image" in found.verdict and "hard label" in found.verdict


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8, 1), (3, 1, 16)])
def test_images_one_pixel_high_or_wide(shape):
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    model = models.build("mlp", shape, CLASSES, hidden=100, init="default")
    found = batches.recover_batch(
        train_locally(model, images, torch.tensor([1, 2, 3]), learning_rate=0.01)
    )
    assert errors(found, images)[1].max() < 1e-4
    assert found.learning_rate == pytest.approx(0.01, rel=1e-4)


def test_noise_added_by_a_defence_is_not_taken_for_images():
    seen, images, _ = client(4)
    draws = torch.Generator().manual_seed(0)
    noisy = {
        name: w + 1e-2 * torch.randn(w.shape, generator=draws)
        for name, w in seen.weights_after.items()
    }
    for told in (None, 4):
        found = batches.recover_batch(
            dataclasses.replace(seen, weights_after=noisy), num_images=told, max_rounds=2
        )
        assert found.num_recovered == 0


def test_the_same_seed_gives_the_same_bits_and_leaves_the_observation_and_the_generator_alone():
    seen, _, _ = client(4)
    before = [p.detach().clone() for p in seen.model.parameters()]
    state = torch.get_rng_state()
    first, second = (batches.recover_batch(seen, seed=3) for _ in range(2))
    assert torch.equal(first.images, second.images) and first.learning_rate == second.learning_rate
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(p, q) and q.grad is None for p, q in zip(before, seen.model.parameters())
    )
    assert errors(batches.recover_batch(seen, seed=4), first.images.clamp(0, 1))[1].max() < 1e-5


def test_as_a_trial():
    options = {
        "model": "mlp",
        "model_options": {"hidden": 100, "init": "default"},
        "dataset": "digits",
        "num_images": 2,
    }
    record = run_trial(Trial("exact_batch", **options))
    assert record["psnr"] > 80
    assert record["labels_right"]
    assert record["num_recovered"] == 2


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = models.build("mlp", SHAPE, CLASSES)

    def forward(self, x):
        return self.inside(x)


@pytest.mark.parametrize(
    "model, words",
    [
        (models.build("lenet", SHAPE, CLASSES), ["'0'", "Conv2d", "Linear"]),
        (models.build("mlp", SHAPE, CLASSES, activation="sigmoid"), ["'2'", "Sigmoid", "ReLU"]),
        (models.build("resnet18", SHAPE, CLASSES), ["'0'", "Conv2d"]),
        (
            nn.Sequential(
                nn.Flatten(), nn.Linear(64, 50, bias=False), nn.ReLU(), nn.Linear(50, CLASSES)
            ),
            ["'1'", "no bias"],
        ),
        (Wrapper(), ["is a Wrapper", "can be written as one"]),
    ],
    ids=["lenet", "sigmoid", "resnet", "no bias", "wrapper"],
)
def test_unsupported_layers_are_named(model, words):
    seen = train_locally(
        model,
        torch.rand(2, *SHAPE, generator=torch.Generator()),
        torch.tensor([1, 2]),
        learning_rate=0.01,
    )
    with pytest.raises(ValueError) as error:
        batches.recover_batch(seen)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("argument", ["num_images", "max_rounds"])
def test_counts_are_checked(argument):
    with pytest.raises(ValueError, match=f"{argument} is 0"):
        batches.recover_batch(client(2)[0], **{argument: 0})


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_the_seed_is_checked(seed):
    with pytest.raises(ValueError, match="seed is"):
        batches.recover_batch(client(2)[0], seed=seed)


def test_the_threads_of_the_caller_are_restored_and_change_no_bit():
    seen, _, _ = client(4)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(batches.recover_batch(seen))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].images, found[1].images)


def test_what_it_is_told_is_declared():
    assert "the number of images, if some left no trace" in records.ATTACKS["exact_batch"].told


def test_a_frozen_layer_behind_the_first_is_no_obstacle():
    _, images, labels = client(2, hidden=40)
    model = models.build("mlp", SHAPE, CLASSES, hidden=40, init="default", seed=2)
    list(model.modules())[-1].requires_grad_(False)
    frozen = train_locally(model, images, labels, learning_rate=0.01)
    found = batches.recover_batch(frozen, num_images=2)
    order = metrics.match(found.images, images.double())
    assert metrics.psnr(found.images[order], images.double(), data_range=1.0) > 60


@pytest.mark.parametrize("larger, images", [(24, 1), (8, 2)])
def test_large_biases_make_no_client_another(larger, images):
    """The rounding of Δ_b was left out: a client of one step was "not one SGD step"."""
    torch.manual_seed(0)
    pixels, labels, *_ = data.load("digits", indices=range(3, 3 + images))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].bias.mul_(larger)
    found = batches.recover_batch(train_locally(model, pixels, labels, learning_rate=0.01))
    assert found.vouched.all() and found.learning_rate == pytest.approx(0.01, rel=1e-3)
    order = metrics.match(found.images, pixels.double())
    actual = (found.images[order] - pixels).square().mean((1, 2, 3)).sqrt()
    assert (found.evidence.image_error[order] > actual / 3).all()


def test_of_two_classes_no_blend_is_vouched_for():
    torch.manual_seed(0)
    pixels, *_ = data.load("digits", indices=[3, 8])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)).double()
    with torch.no_grad():
        model[1].bias.fill_(3.0)  # all units are on, and the two leave one direction
    labels = torch.zeros(2, dtype=torch.long)
    found = batches.recover_batch(train_locally(model, pixels.double(), labels, learning_rate=0.01))
    assert not found.vouched.any()


def test_a_network_with_dropout_leaves_the_caller_s_generator_alone():
    torch.manual_seed(0)
    pixels, labels, *_ = data.load("digits", n=2)
    layers = nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10)
    seen = train_locally(nn.Sequential(nn.Flatten(), *layers), pixels, labels, learning_rate=0.05)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(batches.recover_batch(seen, num_images=2, max_rounds=2))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0].loss == found[1].loss or math.isnan(found[0].loss)
