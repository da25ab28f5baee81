"""The shared search, and the named attacks on a small network."""

import copy
import dataclasses
import math

import pytest
import torch

from dlm_core import (
    attacks,
    coordinates,
    data,
    federated,
    label_inference,
    metrics,
    models,
    objectives,
    optimizers,
    records,
)
from dlm_core.results import Status
from dlm_core.search import preparing, reconstruct


def psnr(found, truth):
    return metrics.psnr(found.images, truth, data_range=1.0)


@pytest.fixture(scope="module")
def lenet_case():
    """A real CIFAR-100 image through the paper's LeNet."""
    images, truth_labels, *_ = data.load("cifar100", n=1, source="bundled")
    return (
        federated.train_locally(
            models.build("lenet", seed=0), images, truth_labels, learning_rate=0.01
        ),
        images,
        truth_labels,
    )


def test_dlm_plus_recovers_a_real_image_from_two_snapshots(lenet_case):
    seen, images, truth_labels = lenet_case
    found = attacks.dlm_plus(seen, seed=0)
    assert psnr(found, images) > 30
    assert (
        torch.equal(found.labels, truth_labels)
        and found.k is None
        and found.stop_reason == "converged"
    )


def test_dlm_s_k_is_one_over_eta_at_the_optimum(lenet_case):
    seen, images, _ = lenet_case
    found = attacks.dlm(seen, k0=70, seed=0)
    assert found.k == pytest.approx(100, rel=0.01) and psnr(found, images) > 25


def test_dlm_with_free_labels_collapses_to_k_zero(lenet_case):
    seen, images, _ = lenet_case
    found = attacks.dlm(seen, k0=100, seed=0, labels="optimised")
    assert psnr(found, images) < 15 and abs(found.k) < 5


def test_dlg_told_the_rate_recovers_and_told_a_tenth_of_it_does_not(lenet_case):
    seen, images, _ = lenet_case
    assert psnr(attacks.dlg(seen, learning_rate=0.01, seed=0), images) > 30
    assert psnr(attacks.dlg(seen, learning_rate=0.001, seed=0, max_evaluations=200), images) < 15


def test_inverting_gradients_runs_its_full_budget_in_the_box(seen, digit):
    found = attacks.inverting_gradients(seen, max_evaluations=300, total_variation=1e-3)
    assert found.evaluations == 300 and found.stop_reason in ("budget", "converged")
    assert found.images.min() >= 0 and found.images.max() <= 1
    assert found.loss < found.losses[0] / 5


def test_the_returned_image_has_the_returned_loss(seen):
    for attack, distance in (
        (attacks.dlm_plus, objectives.normalised_distance),
        (attacks.inverting_gradients, None),
    ):
        found = attack(seen, max_evaluations=60)
        assert found.loss == min(found.losses) and found.evaluations == len(found.losses) <= 60
        if distance:
            g = objectives.gradient(seen.model.double(), federated.loss, found.images, found.labels)
            assert float(distance(g, seen.delta).detach()) == pytest.approx(found.loss, rel=1e-9)


def test_same_seed_same_bits_and_other_seed_other_start(seen):
    first, again, other = (
        attacks.dlm_plus(seen, seed=seed, max_evaluations=30) for seed in (1, 1, 2)
    )
    assert first.losses == again.losses and torch.equal(first.images, again.images)
    assert first.losses[0] != other.losses[0]


def test_the_attack_leaves_the_observation_and_the_global_generator_alone(seen):
    before = [p.detach().clone() for p in seen.model.parameters()]
    state = torch.get_rng_state()
    attacks.dlm_plus(seen, max_evaluations=10)
    assert all(torch.equal(a, b) for a, b in zip(before, seen.model.parameters()))
    assert torch.equal(torch.get_rng_state(), state) and seen.model[0].weight.dtype == torch.float32


def test_stops_when_converged_and_not_before(seen):
    found = attacks.dlm_plus(seen, max_evaluations=400)
    assert found.stop_reason == "converged"
    assert found.loss <= 1e-5 * found.losses[0] < found.losses[-2] * 2
    fine = attacks.dlm_plus(seen, tolerance=1e-12, max_evaluations=400)
    assert fine.evaluations > found.evaluations and fine.losses[: found.evaluations] == found.losses


def test_dlm_stops_at_the_same_misfit_whatever_k0(seen):
    for k0 in (5, 20, 80):
        found = attacks.dlm(seen, k0=k0, max_evaluations=1000)
        size = sum(float((found.k * d).square().sum()) for d in seen.delta)
        assert found.stop_reason == "converged" and found.loss <= 1e-6 * size < 100 * found.loss


def test_a_start_that_fits_well_already_is_not_taken_for_the_answer(digit):
    model = models.build("lenet", (1, 8, 8), 10, seed=3, init="default").to(
        digit[0].device
    )  # its update hardly shows the image
    found = attacks.dlm_plus(
        federated.train_locally(model, *digit, learning_rate=0.05), max_evaluations=200
    )
    assert found.evaluations > 20 and found.loss < 1e-4 * found.losses[0]


def test_never_fits_below_the_rounding_of_the_weights(seen, digit):
    from dataclasses import replace

    coarse = {name: tensor.bfloat16() for name, tensor in seen.weights_after.items()}
    coarse = replace(seen, model=seen.model.bfloat16(), weights_after=coarse)
    found = attacks.dlm_plus(coarse, tolerance=0.0, max_evaluations=2000, patience=2000)
    floor = coarse.rounding_share
    unit = sum(
        float((d / objectives.mean_norm(delta)).square().sum())
        for delta in [coarse.delta]
        for d in delta
    )
    assert floor > 1e-6 and (found.loss > 0.5 * floor * unit)


def test_stalled_budget_and_diverged(seen):
    def flat(g, d):
        return sum((a * 0).sum() for a in g) + sum(x.square().sum() for x in d)

    found = reconstruct(seen, flat, patience=7)
    assert found.stop_reason == "stalled" and found.evaluations == 8
    assert attacks.dlm_plus(seen, max_evaluations=5).stop_reason == "budget"

    calls = []

    def breaks(g, d):
        calls.append(1)
        return objectives.squared_distance(g, d) * (math.nan if len(calls) > 5 else 1.0)

    found = reconstruct(seen, breaks)
    assert (
        found.stop_reason == "diverged" and found.evaluations == 5
    )  # the first call measures the unit
    assert found.images.isfinite().all() and math.isfinite(found.loss)


def test_jumping_away_for_good_is_divergence(seen):
    calls = []

    def away(g, d):
        calls.append(1)
        return objectives.squared_distance(g, d) * (1e6 if len(calls) > 4 else 1.0)

    found = reconstruct(seen, away, patience=10, optimizer=optimizers.adam)
    assert found.stop_reason == "diverged"


def test_restarts_are_chosen_by_attack_loss(seen):
    single = [attacks.dlm_plus(seen, seed=10_007 * i, max_evaluations=20) for i in range(3)]
    found = attacks.dlm_plus(seen, seed=0, max_evaluations=20, restarts=3)
    assert found.loss == min(each.loss for each in single)
    assert found.losses in [each.losses for each in single]


def test_a_restart_is_returned_where_the_first_start_ends_in_nan(seen):
    tried = []

    def from_nan_once(shape, like, generator):
        start, to_images = coordinates.pixels(shape, like, generator)
        tried.append(start)
        return (start if len(tried) > 1 else start * math.nan), to_images

    found = reconstruct(
        seen,
        objectives.normalised_distance,
        coordinates=from_nan_once,
        optimizer=optimizers.adam,
        restarts=2,
        max_evaluations=5,
        whole_budget=True,
    )
    assert len(tried) == 2 and math.isfinite(found.loss) and found.images.isfinite().all()


def test_a_start_that_converges_is_returned_whatever_the_others_lost(seen):
    """DLM's loss at k = 0 is lower than where it has found the image."""
    with preparing():
        search = attacks.dlm(seen, k0=60, labels="optimised", restarts=2)
    ended = []
    for restart, (status, loss) in enumerate([(Status.STALLED, 0.0), (Status.CONVERGED, 1e-5)]):
        variables, to_images = search.start(restart)
        trace = search.trace()
        trace.status, trace.loss, trace.best = status, loss, variables
        ended.append((trace, to_images))
    found = search.result(ended, seconds=0.0)
    assert found.status is Status.CONVERGED and found.loss == 1e-5


def test_a_float32_point_goes_on_in_the_precision_asked_for(seen):
    first = attacks.dlm_plus(seen, dtype=torch.float32, max_evaluations=5)
    found = attacks.dlm_plus(seen, resume=first.point, max_evaluations=2)
    assert all(tensor.dtype == torch.float64 for tensor in found.point.values())


def test_labels_named_inferred_leave_out_what_is_not_trusted(seen):
    """An entry that a defence spoilt decided the label."""
    label = int(attacks.dlm_plus(seen, max_evaluations=1).labels)
    other, (_, bias) = (label + 1) % seen.num_classes, seen.head.names
    after = {name: tensor.clone() for name, tensor in seen.weights_after.items()}
    after[bias][other] += 1.0  # moved against the gradient, as the label's own is
    spoilt = dataclasses.replace(seen, weights_after=after)
    trusted = [torch.ones_like(p, dtype=torch.bool) for p in seen.model.parameters()]
    trusted[seen.parameter_names.index(bias)][other] = False
    found = attacks.dlm_plus(spoilt, trusted=trusted, labels="inferred", max_evaluations=1)
    assert found.labels.tolist() == [label]


@pytest.mark.parametrize("attack", [attacks.dlm_plus, attacks.inverting_gradients])
def test_a_distance_without_a_scale_takes_none(seen, attack):
    with pytest.raises(ValueError, match="'scale' is unknown"):
        attack(seen, scale=2.0)


def test_a_result_does_not_share_the_caller_s_labels(seen):
    labels = torch.tensor([1])
    found = attacks.dlm_plus(seen, labels=labels, max_evaluations=1)
    found.labels[0] = 9
    assert labels.tolist() == [1]


@pytest.mark.parametrize(
    "point, message",
    [
        ({"image": torch.zeros(1)}, "variable in resume 'image' is unknown.*did you mean images"),
        ({"images": torch.zeros(2, 3)}, r"resume has 'images' of shape \[2, 3\]; it takes \["),
    ],
)
def test_a_point_of_another_search_is_refused(seen, point, message):
    with pytest.raises(ValueError, match=message):
        attacks.dlm_plus(seen, resume=point, max_evaluations=2)


def test_the_whole_budget_ends_at_its_last_point_whatever_was_reached(seen):
    options = {"whole_budget": True, "optimizer": optimizers.released_lbfgs, "seed": 1}
    found = attacks.dlm_plus(seen, max_iterations=20, max_evaluations=500, **options)
    assert found.stop_reason == Status.WHOLE and 20 <= found.evaluations <= 500
    del options["whole_budget"]
    early = attacks.dlm_plus(seen, max_evaluations=500, **options)
    assert early.evaluations < found.evaluations
    assert early.losses == found.losses[: early.evaluations]
    model = copy.deepcopy(seen.model).double()
    g = objectives.gradient(model, federated.loss, found.images, found.labels)
    loss = objectives.normalised_distance(g, [layer.double() for layer in seen.delta])
    assert found.loss == float(loss.detach())
    options["whole_budget"] = True
    short = attacks.dlm_plus(seen, max_iterations=1, max_evaluations=500, **options)
    assert short.evaluations <= 25  # one step of L-BFGS


def test_dlm_s_own_variable_is_k_over_k0_and_the_released_one_is_k(seen, digit):
    options = {"k0": 30.0, "max_evaluations": 100, "seed": 1}
    for relative in (True, False):
        found = attacks.dlm(seen, relative=relative, optimizer=optimizers.lbfgs, **options)
        assert found.ks[0] == 30.0 and found.k == pytest.approx(
            float(found.point["growth"]) * (30 if relative else 1)
        )
    one_step = attacks.dlm(seen, relative=False, optimizer=optimizers.adam, **options)
    assert abs(one_step.ks[1] - 30.0) == pytest.approx(0.1, rel=1e-3)


def test_a_factor_on_the_dummy_gradient_is_found_along_with_the_image(seen, digit):
    found = attacks.dlg_factor(seen, learning_rate=0.05, k0=1.1, labels="inferred", seed=1)
    assert psnr(found, digit[0]) > 20 and float(found.point["k"]) == pytest.approx(1.0, rel=0.02)
    halved = attacks.dlg_factor(seen, learning_rate=0.1, k0=1.1, labels="inferred", seed=1)
    assert float(halved.point["k"]) == pytest.approx(0.5, rel=0.02)


def test_history_on_request(seen):
    found = attacks.dlm_plus(seen, max_evaluations=21, keep_every=10)
    assert [evaluation for evaluation, _ in found.history] == [0, 10, 20]
    assert found.history[0][1].shape == found.images.shape
    assert attacks.dlm_plus(seen, max_evaluations=5).history == []


def test_attacker_precision_and_label_modes(seen, digit):
    found = attacks.dlm_plus(seen, max_evaluations=10, dtype=torch.float32)
    assert found.images.dtype == torch.float32
    assert attacks.dlm_plus(seen, max_evaluations=10).images.dtype == torch.float64
    given = attacks.dlm_plus(seen, labels=torch.tensor([7]), max_evaluations=5)
    assert given.labels.tolist() == [7]
    assert (
        attacks.idlg(seen, learning_rate=0.05, max_evaluations=5).labels.tolist()
        == digit[1].tolist()
    )


@pytest.mark.parametrize("parametrisation", [coordinates.pixels, coordinates.cosines])
def test_start_is_the_seed_s_and_cosines_keep_the_box(parametrisation, device):
    like = torch.zeros((), dtype=torch.float64, device=device)
    start, to_images = parametrisation((2, 3, 5, 7), like, torch.Generator().manual_seed(0))
    again, _ = parametrisation((2, 3, 5, 7), like, torch.Generator().manual_seed(0))
    assert torch.equal(start, again) and to_images(start).shape == (2, 3, 5, 7)
    if parametrisation is coordinates.cosines:
        assert to_images(20 * start).min() > 0 and to_images(20 * start).max() < 1
        assert (to_images(0 * start) == 0.5).all()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_labels_of_a_batch_by_count(count):
    images, truth, *_ = data.load("cifar100", n=count, source="bundled")
    truth = truth.clone()
    truth[1] = truth[0]  # a class twice
    seen = federated.train_locally(models.build("lenet", seed=1), images, truth, learning_rate=0.01)
    assert label_inference.infer(seen, count).tolist() == sorted(truth.tolist())


@pytest.mark.parametrize("count, steps", [(2, 5), (8, 2), (16, 2)])
def test_labels_of_a_batch_after_several_steps(count, steps):
    images, truth, *_ = data.load("cifar100", n=count, source="bundled")
    seen = federated.train_locally(
        models.build("lenet", seed=0), images, truth, learning_rate=0.01, local_steps=steps
    )
    expected = sorted(truth.tolist())
    assert label_inference.infer(seen, count).tolist() != expected, "one step does not explain it"
    assert label_inference.infer(seen, count, local_steps=steps).tolist() == expected
    assert label_inference.infer(seen, count, local_steps=16).tolist() == expected, (
        "nor need their number be known"
    )


def test_label_of_one_image_is_the_only_negative_bias_entry(seen, digit):
    assert (seen.delta[-1] < 0).sum() == 1
    assert label_inference.infer(seen).tolist() == digit[1].tolist()


def test_a_batch_of_two_comes_back():
    images, truth, *_ = data.load("digits", n=2)
    seen = federated.train_locally(
        models.build("lenet", (1, 8, 8), 10, seed=3), images, truth, learning_rate=0.05
    )
    found = attacks.dlm_plus(seen, num_images=2, max_evaluations=1000)
    order = metrics.match(found.images, images)
    assert metrics.psnr(found.images[order], images, data_range=1.0) > 20


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": "guessed"}, "labels 'guessed' is unknown: choose from inferred, optimised"),
        ({"labels": torch.tensor([10])}, r"labels is \[10\]; the model has classes 0 to 9"),
        ({"labels": torch.tensor([1, 2])}, r"labels has shape \[2\]"),
        ({"num_images": 0}, "num_images is 0"),
        ({"max_evaluations": 0}, "max_evaluations is 0"),
        ({"restarts": -1}, "restarts is -1"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"total_variation": math.nan}, "total_variation is nan"),
        ({"keep_every": 2.5}, "keep_every is 2.5"),
    ],
)
def test_bad_options_are_named(seen, options, message):
    with pytest.raises(ValueError, match=message):
        attacks.dlm_plus(seen, **options)


def test_bad_told_values_are_named(seen):
    with pytest.raises(ValueError, match="learning_rate is 0;"):
        attacks.dlg(seen, learning_rate=0)
    with pytest.raises(ValueError, match="k0 is -5;"):
        attacks.dlm(seen, k0=-5)


def test_models_without_a_biased_last_layer_are_refused(digit):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False)).to(
        digit[0].device
    )
    with pytest.raises(ValueError, match="does not end in an nn.Linear layer with bias"):
        federated.train_locally(model, *digit, learning_rate=0.1)


def test_batch_norm_in_train_mode_is_attackable(device):
    images, truth, *_ = data.load("digits", n=2)
    seen = federated.train_locally(
        models.build("resnet18_bn", (1, 8, 8), 10).to(device),
        images.to(device),
        truth.to(device),
        learning_rate=0.1,
    )
    stats = seen.model[1].running_mean.clone()
    found = attacks.dlm_plus(seen, num_images=2, max_evaluations=3)
    assert math.isfinite(found.loss) and torch.equal(seen.model[1].running_mean, stats)


# --- what is told about a client only where it is known


def test_dlm_tells_a_learning_rate_only_where_k_has_settled(seen):
    """A search cut short, or one that collapsed to k = 0, has no 1/k worth the name."""
    short = attacks.dlm(seen, k0=20.0, max_evaluations=3)
    assert short.k is not None and short.learning_rate is None
    settled = attacks.dlm(seen, k0=20.0)
    assert settled.status == "converged"
    assert settled.learning_rate == pytest.approx(1 / settled.k)


def test_labels_may_be_a_list_an_array_or_of_any_whole_dtype(seen, digit):
    _, labels = digit
    expected = attacks.dlm_plus(seen, labels=labels, max_evaluations=3)
    for given in (labels.tolist(), labels.cpu().numpy(), labels.int(), labels.to(torch.uint8)):
        found = attacks.dlm_plus(seen, labels=given, max_evaluations=3)
        assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize("key", ["grey", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_baseline_is_of_the_model_s_precision_and_knows_no_label(small, digit, key, dtype):
    images, labels = digit
    seen = federated.train_locally(small.to(dtype), images.to(dtype), labels, learning_rate=0.05)
    found = records.ATTACKS[key](seen, num_images=3)
    assert found.images.dtype == dtype and found.images.device == images.device
    assert found.labels.tolist() == [-1, -1, -1]
    assert found.vouched.device == found.labels.device == images.device


def test_a_variable_of_the_search_s_own_is_no_unknown_of_the_client(seen):
    for name in ("growth", "images", "logits"):
        with pytest.raises(ValueError, match=f"unknowns has '{name}'"):
            attacks.dlm_plus(seen, unknowns={name: 1.0})


@pytest.mark.parametrize("shape", [(1, 1, 12), (1, 12, 1), (3, 1, 1)])
@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_images_one_pixel_high_or_wide_are_searched(shape, weight):
    """They have no vertical or no horizontal neighbours, and total variation is a number."""
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    model = models.build("mlp", shape, 4, activation="sigmoid")
    seen = federated.train_locally(model, image, torch.tensor([2]), learning_rate=0.05)
    found = attacks.dlm_plus(seen, total_variation=weight)
    assert math.isfinite(found.loss) and found.status != "diverged"
    assert weight or psnr(found, image) > 30


def test_dropout_in_a_search_draws_from_its_seed_and_leaves_the_caller_s_generator():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 32), torch.nn.Sigmoid(), torch.nn.Dropout(0.5)]
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(32, 10)).train()
    image, label, *_ = data.load("digits", n=1)
    seen = federated.train_locally(model, image, label, learning_rate=0.1)
    found = []
    for elsewhere in (1, 2):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        found.append(attacks.dlm_plus(seen, seed=0, max_evaluations=20).images)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)
