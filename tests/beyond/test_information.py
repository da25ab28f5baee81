"""What an update tells of its images: against finite differences, exact recovery, and reason."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from dlm_core import data, exact, federated, information, models
from dlm_core.beyond import fisher, jacobian, lanczos, priors
from dlm_core.beyond.clients import OPTIMIZERS
from dlm_core.beyond.precision import precision
from dlm_core.harness import exposure

IMAGES, LABELS, *_ = data.load("digits", n=2)
CLASSES = 10


def convolutions(channels=3):
    """ReLU and max-pooling, as tutorials have it."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * channels, 20), nn.ReLU(), nn.Linear(20, CLASSES)),
    )


class Tokens(nn.Module):
    """Rows of the image as tokens, and a layer that serves twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Linear(8, 30), nn.Linear(30, 30)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(30, CLASSES)

    def forward(self, x):
        tokens = self.mix(self.mix(self.embed(x[:, 0]).tanh()).tanh())
        return {"logits": self.head(self.drop(tokens.mean(1)))}


class Attending(nn.Module):
    """Rows of the image as tokens that attend to each other, by torch's fused kernel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attend = nn.TransformerEncoderLayer(
            *(8, 2, 16), dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(8, CLASSES)
        # biases of 0 are sent more finely than finite differences are
        nn.init.normal_(self.attend.self_attn.in_proj_bias, std=0.1)

    def forward(self, x):
        return self.head(self.attend(x[:, 0]).mean(1))


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(72, CLASSES))
    )


def finite_differences(client, images):
    """[m, n] of Δ, column by column."""

    def update(flat):
        return torch.cat([d.flatten() for d in client.update(flat.reshape(images.shape)).values()])

    flat, step = images.flatten(), 1e-6
    unit = torch.eye(len(flat)).double()
    return torch.stack(
        [(update(flat + step * e) - update(flat - step * e)) / (2 * step) for e in unit], 1
    )


def cross_entropy(scores, labels):
    return nn.functional.cross_entropy(scores, labels)


def client_of(model, labels, **training):
    told = {"learning_rate": 0.1, "local_steps": 1, "batch_size": None, **training}
    step = OPTIMIZERS[told.pop("client_optimizer", "sgd")]
    options = told.pop("optimizer_options", {})
    return jacobian.Client(model, labels, cross_entropy, step, options, **told)


CLIENTS = {
    "one step": (convolutions, 1, {}),
    "a batch": (convolutions, 2, {}),
    "tokens, dropout, a layer that serves twice": (Tokens, 1, {}),
    "attention": (Attending, 1, {}),
    "batch norm": (normalised, 2, {}),
    "steps of one image": (convolutions, 2, {"local_steps": 3, "batch_size": 1}),
    "momentum and decay": (
        *(convolutions, 1),
        {"local_steps": 2, "optimizer_options": {"momentum": 0.9, "weight_decay": 0.1}},
    ),
    "Adam": (
        *(convolutions, 1),
        {"client_optimizer": "adam", "optimizer_options": {"eps": 1e-3}, "learning_rate": 0.01},
    ),
    "fewer weights than pixels": (
        lambda: nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3)),
        1,
        {},
    ),
}


@pytest.mark.parametrize("build, count, training", CLIENTS.values(), ids=CLIENTS)
def test_it_is_that_of_the_jacobian_by_finite_differences(build, count, training):
    """Whether a layer is given by its factors or not, forward or back."""
    model = build()
    images = 0.8 * IMAGES[:count] + 0.1 + 0.01 * torch.rand(count, 1, 8, 8)
    labels = LABELS[:count] % 3
    given = {"learning_rate": 0.1, **training}
    found = information.of_update(
        *(model, images, labels),
        transmitted=torch.bfloat16,
        loss=cross_entropy,
        **given,
    )
    sent = copy.deepcopy(model)
    sent.load_state_dict({n: w.bfloat16().to(w.dtype) for n, w in model.state_dict().items()})
    x, client = images.double(), client_of(sent, labels, **given)
    J = finite_differences(client, x)
    update = jacobian.Jacobian(client, x).update
    seen = precision(sent, client, x, update, torch.bfloat16).of_entries
    A = torch.cat([p.flatten() for p in seen.values()])[:, None] * J
    inverse = torch.linalg.inv(A.T @ A + torch.eye(A.shape[1]).double() / priors.STD**2)
    variance = found.posterior("white").variance.flatten()
    assert torch.allclose(variance, inverse.diagonal(), rtol=1e-4)
    eigenvalues = torch.linalg.eigvalsh(A.T @ A)
    for std in (0.2, 0.05, 0.5 / 255):
        near = ((eigenvalues * std**2).log().abs() < 1e-3).sum()
        assert abs(found.directions(std) - int((eigenvalues >= std**-2).sum())) <= near


@pytest.mark.parametrize("learning_rate", [0.01, 0.3])
@pytest.mark.parametrize(
    "name, options",
    [("lenet", {}), ("lenet", {"activation": "tanh"}), ("mlp", {}), ("mlp", {"depth": 2})],
)
def test_it_agrees_with_exact_recovery_where_that_knows_the_network(name, options, learning_rate):
    model = models.build(name, (1, 8, 8), CLASSES, seed=0, **options)
    given = (IMAGES[:1], LABELS[:1])
    seen = federated.train_locally(model, *given, learning_rate=learning_rate)
    found = information.of_update(model, *given, learning_rate=learning_rate)
    bound = exact.bound(seen, *given, learning_rate)
    assert found.bound_psnr == pytest.approx(bound, abs=0.01)
    assert found.directions() == found.size == 64


def test_the_update_is_the_one_that_a_client_sends():
    """Steps, batches, momentum: as torch.optim takes them."""
    model = convolutions().double()
    training = {
        **{"learning_rate": 0.1, "local_steps": 3, "batch_size": 1},
        "optimizer_options": {"momentum": 0.9, "weight_decay": 0.1},
    }
    seen = federated.train_locally(model, IMAGES, LABELS, **training)
    client = client_of(model, LABELS, **training)
    for name, delta in client.update(IMAGES.double()).items():
        assert torch.allclose(delta, seen.delta_by_name[name], atol=1e-12)


def test_what_the_network_does_not_see_stays_hidden():
    """The map is an image: the prior's deviation where nothing looks, less where something does."""

    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = models.build("mlp", (1, 8, 4), CLASSES, seed=0)

        def forward(self, x):
            return self.inner(x[..., :4])

    found = information.of_update(Left(), IMAGES[:1], LABELS[:1], learning_rate=0.01)
    assert found.exposed.shape == (1, 1, 8, 8)
    assert torch.allclose(found.exposed[..., 4:], torch.tensor(priors.STD).double())
    assert found.exposed[..., :4].max() < 1e-3
    assert found.directions() == found.better_than_prior == 32
    # half of the pixels are known, the others as far as the prior goes
    assert found.bound_psnr == pytest.approx(12.04 + 3.01, abs=0.01)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_is_no_obstacle_and_a_patch_embedding_tells_every_pixel(mode):
    model = models.build("vit", (1, 8, 8), CLASSES, seed=0, init="default", patch=2, width=16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("embed", "position")))
    model.train(mode == "train")
    found = information.of_update(model, IMAGES[:1], LABELS[:1], learning_rate=0.01)
    assert found.directions(0.05) == found.size == 64


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18_bn", {"width": 2, "blocks": 1, "activation": "relu"}),
        ("vgg", {"width": 4}),
        ("vit", {"width": 8, "blocks": 1, "heads": 2}),
    ],
)
def test_networks_that_people_have_are_told_what_they_give_away(name, options, mode, tmp_path):
    """The same by the library and by ``dlm bound``."""
    image = torch.nn.functional.interpolate(IMAGES[:1], scale_factor=2, mode="bilinear")
    given = {"images": image, "labels": LABELS[:1], "learning_rate": 0.01}
    model = models.build(name, (1, 16, 16), CLASSES, seed=0, init="default", **options)
    model.train(mode == "train")
    found = information.of_update(model, **given)
    assert 0 < found.directions(0.05) <= found.size == 256
    assert found.bound_psnr > fisher.PRIOR_PSNR
    told = exposure.bound(model.state_dict(), model=model, out=tmp_path / "map.png", **given)
    assert told.information.bound_psnr == pytest.approx(found.bound_psnr)


def test_layers_account_for_all_that_is_known():
    found = information.of_update(convolutions(), IMAGES[:1], LABELS[:1], learning_rate=0.01)
    assert set(found.layers) == {"0", "4", "6"}
    shares = found.posterior("white").shares
    assert sum(found.layers.values()) == pytest.approx(float((1 - shares).sum()), rel=1e-6)


@pytest.mark.parametrize(
    "weaker, stronger",
    [
        ({}, {"transmitted": torch.bfloat16}),
        ({"transmitted": torch.float16}, {"transmitted": torch.bfloat16}),
        *(
            ({}, {"defence": {"name": name, **options}})
            for name, options in (
                ("noise", {"scale": 1e-4, "observer": "server"}),
                ("clip_and_noise", {"clip": 0.01, "noise_multiplier": 0.01}),
                ("sparsify", {"percent": 90.0}),
                ("top_k", {"percent": 90.0}),
                ("quantise", {"bits": 4}),
            )
        ),
        (
            {"defence": {"name": "clip_and_noise", "clip": 0.01, "noise_multiplier": 0.01}},
            {"defence": {"name": "clip_and_noise", "clip": 0.01, "noise_multiplier": 1.0}},
        ),
    ],
)
def test_what_hides_an_update_leaves_less_of_it(weaker, stronger):
    given = (convolutions(), IMAGES[:1], LABELS[:1])
    more, less = (
        information.of_update(*given, learning_rate=0.01, **o) for o in (weaker, stronger)
    )
    assert less.bound_psnr < more.bound_psnr
    assert less.directions(0.01) <= more.directions(0.01)


def test_noise_of_a_defence_is_the_noise_of_the_bound():
    """At ten times the noise every direction is known ten times less well."""
    given = (models.build("mlp", (1, 8, 8), CLASSES, seed=0), IMAGES[:1], LABELS[:1])
    one, ten = (
        information.of_update(
            *given,
            learning_rate=0.01,
            defence={"name": "clip_and_noise", "clip": 1e3, "noise_multiplier": noise},
        )
        for noise in (1e-8, 1e-7)
    )
    assert one.bound_psnr - ten.bound_psnr == pytest.approx(20, abs=0.1)


@pytest.mark.parametrize("prior", ["white", "smooth"])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_the_noise_at_which_nobody_passes_20_db_is_where_the_bound_is(prior, clip):
    """Of the update that is sent, clipped or not."""
    given = (models.build("mlp", (1, 8, 8), CLASSES, seed=0), IMAGES[:1], LABELS[:1])
    noise = information.noise_for(*given, learning_rate=0.01, prior=prior, clip=clip)
    defence = {"name": "clip_and_noise", "clip": clip, "noise_multiplier": noise / clip}
    found = information.of_update(*given, learning_rate=0.01, defence=defence)
    assert found.posterior(prior).psnr == pytest.approx(20, abs=0.02)


def test_an_update_that_tells_less_needs_no_noise_and_no_noise_tells_less_than_the_prior():
    few = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3))
    given = {"model": few, "images": IMAGES[:1], "labels": LABELS[:1] % 3, "learning_rate": 0.01}
    assert information.noise_for(**given) == 0
    with pytest.raises(ValueError, match="psnr is 12; .* 12.04 dB"):
        information.noise_for(**given, psnr=12)


def test_a_smooth_prior_knows_more_than_a_white_one_and_both_have_the_same_variance():
    shape = (3, 8, 8)
    white, smooth = (priors.root(name, shape)[0] for name in priors.PRIORS)
    unit = torch.eye(192).double().reshape(192, *shape)
    assert smooth(unit).square().sum(0).mean() == pytest.approx(white(unit).square().sum(0).mean())
    found = information.of_update(convolutions(1), IMAGES[:1], LABELS[:1], learning_rate=1e-6)
    assert found.posterior("smooth").psnr > found.bound_psnr
    other = information.of_update(
        convolutions(1), IMAGES[:1], LABELS[:1], learning_rate=1e-6, prior="smooth"
    )
    assert other.bound_psnr == found.posterior("smooth").psnr


def test_a_priors_variance_is_that_of_its_root_and_needs_no_matrix():
    for name, shape in itertools.product(priors.PRIORS, [(3, 6, 8), (1, 5, 5)]):
        size = math.prod(shape)
        unit = torch.eye(size).double().reshape(size, *shape)
        expected = priors.root(name, shape)[0](unit).square().sum(0)
        assert torch.allclose(priors.variance(name, shape), expected)
    assert priors.variance("smooth", (3, 224, 224)).shape == (3, 224, 224)  # of a matrix, 84 GiB


def test_the_map_of_a_large_picture_needs_no_matrix_of_the_prior(monkeypatch):
    found = information.of_update(convolutions(1), IMAGES[:1], LABELS[:1], learning_rate=0.01)
    expected = found.map()
    monkeypatch.setattr(priors, "root", None)  # what a matrix of the prior is made with
    assert torch.equal(found.map(), expected)


def test_a_priors_root_and_its_transpose_belong_together():
    for name in priors.PRIORS:
        root, transposed = priors.root(name, (3, 4, 6))
        a, b = torch.randn(2, 3, 4, 6).double()
        assert (root(a) * b).sum() == pytest.approx(float((a * transposed(b)).sum()))


def test_natural_images_are_as_the_smooth_prior_says():
    """In each band of frequencies their coefficients have about its variance."""
    images, *_ = data.load("cifar100", n=20)
    root, transposed = priors.root("smooth", (3, 32, 32))
    unit = torch.eye(3072).double().reshape(-1, 3, 32, 32)
    variance = root(unit).flatten(1).square().sum(1).reshape(3, 32, 32)
    squares = (transposed(images.double() - 0.5) ** 2 / variance).mean(0)
    frequency = torch.hypot(*torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    for low, high in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16)):
        band = (frequency >= low) & (frequency < high)
        for channel in range(3):
            seen, said = squares[channel, band].sum(), variance[channel, band].sum()
            assert 1 / 4 < seen / said < 4, (low, channel)


def test_too_large_a_matrix_is_estimated(monkeypatch):
    model = convolutions()
    given = {"learning_rate": 0.01, "transmitted": torch.bfloat16}
    formed = information.of_update(model, IMAGES, LABELS, **given)
    monkeypatch.setattr(fisher, "LARGEST_FLOAT", 0)
    estimated = information.of_update(model, IMAGES, LABELS, **given)
    assert estimated.estimated and not formed.estimated
    assert estimated.directions(0.05) == pytest.approx(formed.directions(0.05), rel=0.1)
    assert estimated.bound_psnr == pytest.approx(formed.bound_psnr, abs=0.5)
    assert sum(estimated.layers.values()) == pytest.approx(sum(formed.layers.values()), rel=0.1)
    assert "about" in estimated.summary and "about" not in formed.summary


def test_lanczos_finds_the_spectrum():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.zeros(20), torch.logspace(-3, 6, 40)]).double()
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator).double()).Q
    matrix = basis * values @ basis.T
    found = lanczos.lanczos(lambda z: z @ matrix, 60, starts=3, steps=60, seed=0, like=values)
    assert float(found.counts.sum()) == pytest.approx(60)
    inverse = torch.linalg.inv(matrix + torch.eye(60).double())
    assert torch.allclose(found.apply(lambda v: 1 / (1 + v)), found.starts @ inverse, atol=1e-6)


def test_the_network_and_chance_are_left_as_they_were():
    model = Tokens()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    first, second = (
        information.of_update(model, IMAGES[:1], LABELS[:1], learning_rate=0.01) for _ in range(2)
    )
    assert first.bound_psnr == second.bound_psnr
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": LABELS[:2]}, "labels has shape"),
        ({"labels": torch.tensor([10])}, "classes 0 to 9"),
        ({"images": torch.rand(1, 3, 5, 5)}, "images has shape"),
        ({"client_optimizer": "sdg"}, "sgd"),
        ({"optimizer_options": {"momentun": 0.9}}, "momentum"),
        ({"prior": "grey"}, "white"),
        ({"defence": {"name": "nose"}}, "noise"),
        ({"model": convolutions().requires_grad_(False)}, "frozen"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(change, words):
    given = {"model": convolutions(), "images": IMAGES[:1], "labels": LABELS[:1]}
    with pytest.raises(ValueError, match=words) as error:
        information.of_update(**{**given, "learning_rate": 0.01, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_under_noise_the_bound_is_of_sgd_alone(optimizer):
    """Of Adam it called 29 directions fixed under noise of ten times the whole update."""
    model = models.build("mlp", (1, 8, 8), CLASSES, seed=0)
    client = {"learning_rate": 1e-3, "client_optimizer": optimizer}
    noise = {"name": "clip_and_noise", "clip": 1.0, "noise_multiplier": 1.0}
    with pytest.raises(ValueError, match=f"client_optimizer is '{optimizer}'; under noise"):
        information.of_update(model, IMAGES[:1], LABELS[:1], defence=noise, **client)
    with pytest.raises(ValueError, match=f"client_optimizer is '{optimizer}'; under noise"):
        information.noise_for(model, IMAGES[:1], LABELS[:1], **client)


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_that_is_frozen_in_training_stays_frozen(frozen):
    """``model.train(); bn.eval()``, as in fine-tuning, was computed as if it used the batch's."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.Flatten(), nn.Linear(72, CLASSES))
    model(IMAGES * 3)  # running statistics unlike the batch's
    norm.train(not frozen)
    client = fisher.Client(model, LABELS, federated.loss, OPTIMIZERS["sgd"], {}, 0.01, 1, None)
    simulated = client.update(IMAGES.double())
    seen = federated.train_locally(model, IMAGES, LABELS, learning_rate=0.01)
    for name, delta in seen.delta_by_name.items():
        assert torch.allclose(simulated[name], delta, rtol=1e-3, atol=1e-7)


def test_a_clip_alone_is_no_noise():
    model = models.build("mlp", (1, 8, 8), CLASSES, seed=0)
    clip = {"name": "clip_and_noise", "clip": 1.0}
    told = {"learning_rate": 1e-3, "client_optimizer": "adam"}
    assert information.of_update(model, IMAGES[:1], LABELS[:1], defence=clip, **told).directions()


def test_batch_norm_with_layers_of_its_own_is_a_batch_norm():
    class Activated(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), Activated(2), nn.Flatten(), nn.Linear(72, CLASSES)
    found = information.of_update(nn.Sequential(*layers), IMAGES, LABELS, learning_rate=0.01)
    assert found.directions() > 0
