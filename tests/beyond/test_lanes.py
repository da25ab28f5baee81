"""Many searches as one: each lane finds what its search finds by itself."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import attacks, data, defenses, federated, metrics, models, objectives, optimizers
from dlm_core.beyond import ablation, adaptive, signlike, stacked, surrogate
from dlm_core.search import reconstruct

SHAPE, RATE = (1, 8, 8), 0.05


def observed(model, i, **client):
    images, labels, *_ = data.load("digits", indices=[i])
    place = next(model.parameters())
    given = images.to(place), labels.to(place.device)
    return federated.train_locally(model, *given, learning_rate=RATE, **client)


@pytest.fixture(scope="module", params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def several(request):
    """Four clients, each with weights and an image of its own."""
    networks = [models.build("lenet", SHAPE, 10, seed=3 + i).to(request.param) for i in range(4)]
    return [observed(model, i) for i, model in enumerate(networks)]


def each_alone(attack, several, options):
    for i, seen in enumerate(several):
        lists = (list, range)
        own = {name: v[i] if isinstance(v, lists) else v for name, v in options.items()}
        yield attack(seen, **own)


SEARCHES = {
    "dlm_plus": (attacks.dlm_plus, {"seed": [0, 1, 2, 3]}),
    "soft labels": (attacks.dlm_plus, {"labels": "optimised"}),
    "dlg": (attacks.dlg, {"learning_rate": [0.05, 0.04, 0.03, 0.02]}),
    "dlm": (attacks.dlm, {"k0": [20.0, 10.0, 15.0, 30.0]}),
    "inverting_gradients": (
        attacks.inverting_gradients,
        {"total_variation": [0.0, 0.01, 0.02, 0.03], "seed": [0, 1, 2, 3]},
    ),
    "released": (
        attacks.dlm_plus,
        {
            **{"optimizer": optimizers.released_lbfgs, "whole_budget": True},
            **{"max_iterations": [1, 2, 1, 2], "max_evaluations": 60},
        },
    ),
    "adam": (
        attacks.dlm,
        {
            **{"optimizer": optimizers.adam, "whole_budget": True, "k0": 20.0, "relative": False},
            **{"max_iterations": [5, 10, 15, 60], "keep_every": 4},
        },
    ),
    "restarts": (attacks.dlm_plus, {"restarts": 3, "max_evaluations": 12}),
    "a search of one's own": (partial(reconstruct, distance=objectives.cosine_distance), {}),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_each_lane_is_its_search_by_itself(several, name):
    attack, options = SEARCHES[name]
    options = {"max_evaluations": 25, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one after the other
        many = attack(several, **options)
    for found, alone in zip(many, each_alone(attack, several, options), strict=True):
        assert found.status == alone.status and found.evaluations == alone.evaluations
        assert found.losses == pytest.approx(alone.losses, rel=1e-4)
        assert found.loss == pytest.approx(alone.loss, rel=1e-4)
        assert torch.allclose(found.images, alone.images, atol=1e-4)
        assert torch.equal(found.labels, alone.labels)
        assert found.ks == pytest.approx(alone.ks) and len(found.history) == len(alone.history)
        assert found.point.keys() == alone.point.keys()


def test_one_lane_is_the_search_too(several):
    (found,), alone = attacks.dlm_plus(several[:1]), attacks.dlm_plus(several[0])
    assert found.losses == pytest.approx(alone.losses, rel=1e-3)
    assert found.status == alone.status == "converged"


def test_a_history_that_is_full_forgets_its_oldest_step(several):
    """As PyTorch's does: the ring of a lane begins anew."""

    def short(variables, max_evaluations):
        return torch.optim.LBFGS(
            variables, max_iter=60, history_size=4, line_search_fn="strong_wolfe"
        )

    options = {"optimizer": short, "max_evaluations": 22, "tolerance": 0.0}
    many = attacks.dlm_plus(several, **options)
    for found, alone in zip(many, each_alone(attacks.dlm_plus, several, options)):
        assert found.losses == pytest.approx(alone.losses, rel=1e-4)


def test_many_starts_of_one_observation(several):
    many = attacks.dlm_plus(several[0], seed=[0, 7], max_evaluations=15)
    for seed, found in zip((0, 7), many):
        alone = attacks.dlm_plus(several[0], seed=seed, max_evaluations=15)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4)


def breaking(limit, g, d):
    """DLM+'s distance, which is no number below ``limit``."""
    loss = objectives.normalised_distance(g, d)
    return loss + torch.where(loss.detach() < limit, math.nan, 0.0)


def test_a_lane_that_diverges_harms_no_other(several):
    reached = reconstruct(several[2], objectives.normalised_distance, max_evaluations=8).loss
    limits = (0.0, math.inf, 1.01 * reached, 0.0)
    distances = [partial(breaking, limit) for limit in limits]
    many = reconstruct(several, distance=distances, max_evaluations=25)
    alone = [reconstruct(seen, each, max_evaluations=25) for seen, each in zip(several, distances)]
    assert [found.status for found in many] == [found.status for found in alone]
    assert [many[i].status for i in (1, 2)] == ["diverged", "diverged"]
    assert many[1].evaluations == 1 < many[2].evaluations < many[0].evaluations
    for i in (0, 2, 3):
        finite = many[i].evaluations - (i == 2)
        assert many[i].losses[:finite] == pytest.approx(alone[i].losses[:finite], rel=1e-4)
        assert many[i].images.isfinite().all()


def test_coordinates_left_out_are_each_lane_s_own(several):
    trusted = [[d.abs() > d.abs().median() for d in seen.delta] for seen in several]
    many = attacks.dlm_plus(several, trusted=trusted, max_evaluations=10)
    for seen, own, found in zip(several, trusted, many):
        alone = attacks.dlm_plus(seen, trusted=own, max_evaluations=10)
        assert found.losses == pytest.approx(alone.losses, rel=1e-4)
    shared = attacks.dlm_plus(several, trusted=trusted[0], max_evaluations=3)
    alone = attacks.dlm_plus(several[1], trusted=trusted[0], max_evaluations=3)
    assert shared[1].losses == pytest.approx(alone.losses, rel=1e-4)


def test_labels_of_each_lane_or_of_all(several):
    told = attacks.dlm_plus(several[:2], labels=[[3], torch.tensor([5])], max_evaluations=2)
    assert [found.labels.tolist() for found in told] == [[3], [5]]
    same = attacks.dlm_plus(several[:2], labels=[4], max_evaluations=2)
    assert [found.labels.tolist() for found in same] == [[4], [4]]


def test_float32_lanes_find_the_pictures_that_searches_find(several):
    """To rounding: the paths part, the pictures do not."""
    options = {"dtype": torch.float32, "max_evaluations": 120}
    many = attacks.dlm_plus(several, **options)
    for i, alone in enumerate(each_alone(attacks.dlm_plus, several, options)):
        truth, *_ = data.load("digits", indices=[i])
        psnrs = [metrics.psnr(f.images, truth, data_range=1.0) for f in (many[i], alone)]
        assert min(psnrs) > 20 and many[i].images.dtype == torch.float32


def test_networks_of_another_kind_or_shape_are_batches_of_their_own(several):
    mlp = models.build("mlp", SHAPE, 10, seed=1, activation="sigmoid")
    mixed = [several[0], observed(mlp.to(several[0].delta[0].device), 0), several[1]]
    many = attacks.dlm_plus(mixed, max_evaluations=8)
    for found, alone in zip(many, each_alone(attacks.dlm_plus, mixed, {"max_evaluations": 8})):
        assert found.losses == pytest.approx(alone.losses, rel=1e-4)


class Scaled(nn.Module):
    """A network with a setting that no weight shows."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.last = factor, nn.Linear(64, 10)

    def forward(self, images):
        return self.last(self.factor * images.flatten(1).sigmoid())


class Choosing(Scaled):
    """A network whose code depends on what it sees, as no map over lanes can."""

    def forward(self, images):
        return super().forward(images if images.mean() > 0.4 else images.square())


def test_a_setting_that_no_weight_shows_is_kept_apart():
    torch.manual_seed(0)
    both = [observed(Scaled(factor), 0) for factor in (1.0, 3.0)]
    many = attacks.dlm_plus(both, max_evaluations=5)
    for found, alone in zip(many, each_alone(attacks.dlm_plus, both, {"max_evaluations": 5})):
        assert found.losses == pytest.approx(alone.losses, rel=1e-4)


def test_what_cannot_be_mapped_is_searched_one_after_the_other():
    torch.manual_seed(0)
    both = [observed(Choosing(1.0), i) for i in range(2)]
    with pytest.warns(UserWarning, match="Choosing cannot be computed for many searches at once"):
        many = attacks.dlm_plus(both, max_evaluations=5)
    for found, alone in zip(many, each_alone(attacks.dlm_plus, both, {"max_evaluations": 5})):
        assert found.losses == alone.losses


class Rescaled(torch.optim.Adam):
    """Adam on a gradient of unit length: what a lane does hangs on the others."""

    def step(self, closure):
        value = closure()
        for variable in self.param_groups[0]["params"]:
            variable.grad /= variable.grad.norm()
        super().step()
        return value


def test_an_optimizer_that_is_not_known_to_keep_lanes_apart_runs_one_after_the_other(several):
    def rescaled(variables, max_evaluations):
        return Rescaled(variables, lr=0.1)

    options = {"optimizer": rescaled, "max_evaluations": 4}
    with pytest.warns(UserWarning, match="Rescaled is no optimizer of many searches at once"):
        many = attacks.dlm_plus(several[:2], **options)
    for found, alone in zip(many, each_alone(attacks.dlm_plus, several[:2], options)):
        assert found.losses == alone.losses


class Large(Scaled):
    """A network for which memory runs out where it is mapped over lanes."""

    def forward(self, images):
        if torch._C._functorch.is_batchedtensor(images):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


def test_memory_that_runs_out_is_said_to_who_can_take_fewer():
    torch.manual_seed(0)
    both = [observed(Large(1.0), i) for i in range(2)]
    with pytest.raises(torch.OutOfMemoryError):
        attacks.dlm_plus(both, max_evaluations=2)


def test_batch_norm_in_train_mode_is_each_lane_s_own():
    images, labels, *_ = data.load("digits", n=4)
    both = []
    for i in range(2):
        model = models.build("resnet18_bn", SHAPE, 10, seed=i, width=2, blocks=1)
        pair = images[2 * i : 2 * i + 2], labels[2 * i : 2 * i + 2]
        both.append(federated.train_locally(model, *pair, learning_rate=0.1))
    before = both[1].model[1].running_mean.clone()
    options = {"num_images": 2, "max_evaluations": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = attacks.dlm_plus(both, **options)
    for found, alone in zip(many, each_alone(attacks.dlm_plus, both, options)):
        assert found.losses == pytest.approx(alone.losses, rel=1e-3)
    assert torch.equal(both[1].model[1].running_mean, before)


OTHERS = {
    "ablated": (ablation.ablated, {"objective": "global norm", "start": "noise"}),
    "dlg_factor": (attacks.dlg_factor, {"learning_rate": [0.05, 0.04], "k0": 1.0}),
    "aware": (
        adaptive.dlm_plus,
        {"defence": defenses.Setting("noise", {"scale": 1e-4}, observer="server")},
    ),
    "signs": (signlike.sign_dlm, {"total_variation": [0.1, 0.2]}),
    "sme": (surrogate.sme, {"seed": range(2)}),
    "between the snapshots": (surrogate.surrogate_dlm, {"curved": True}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_searches_take_lists_too(several, name):
    attack, options = OTHERS[name]
    options = {**options, "max_evaluations": 3}
    many = attack(several[:2], **options)
    for found, alone in zip(many, each_alone(attack, several[:2], options), strict=True):
        assert found.losses == pytest.approx(alone.losses, rel=1e-4)


@pytest.mark.parametrize("stride, padding, dilation", [(1, 0, 1), (2, 2, 1), ((2, 1), (0, 3), 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_a_product(stride, padding, dilation, bias):
    """What a GPU computes instead, with its second derivative."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    given = [draw(2, 3, 9, 8), draw(4, 3, 3, 2), *([draw(4)] if bias else [])]
    given = [each.requires_grad_() for each in given]
    both = []
    for function in (F.conv2d, stacked.convolution):
        out = function(*given, stride=stride, padding=padding, dilation=dilation)
        first = torch.autograd.grad(out.sigmoid().square().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
        both.append([out, *first, *second])
    for one, other in zip(*both, strict=True):
        assert torch.allclose(one, other)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"seed": []}, "seed is empty; it takes at least one entry"),
        ({"seed": [0, 1, 2]}, "seed has 3 entries; seen has 2"),
        ({"labels": [[1], [2], [3]]}, "labels has 3 entries; seen has 2"),
        ({"seed": [0, -1]}, "seed is -1;"),
        ({"restarts": [1, 0]}, "restarts is 0;"),
    ],
)
def test_wrong_lists_are_named(several, given, message):
    with pytest.raises(ValueError, match=message):
        attacks.dlm_plus(several[:2], **given)
    with pytest.raises(ValueError, match="seen is empty"):
        attacks.dlm_plus([])
    with pytest.raises(ValueError, match="seen is 3; it takes a Observation|seen is 3"):
        attacks.dlm_plus([several[0], 3])
