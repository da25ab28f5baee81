"""Inputs of linear layers by a division: exact whatever the client did, and silent where not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dlm_core import attacks, data, federated, models
from dlm_core.beyond import inputs, tracing
from dlm_core.observation import observe

SHAPE = (1, 8, 8)


def mlp(outputs=10, hidden=32, *, seed=0, activation=nn.ReLU, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, last = nn.Linear(64, hidden), nn.Linear(hidden, outputs, bias=bias)
        return nn.Sequential(nn.Flatten(), first, activation(), last)


def client(model, images, targets, loss=F.cross_entropy, *, steps=1, optimizer="SGD", **how):
    """W_{t+1} of a client that trained the network."""
    trained = copy.deepcopy(model).train()
    make = getattr(torch.optim, optimizer)
    run = make([p for p in trained.parameters() if p.requires_grad], **{"lr": 0.1, **how})
    for _ in range(steps):
        run.zero_grad()
        loss(trained(images), targets).backward()
        run.step()
    return trained.state_dict()


@pytest.fixture
def digit():
    """On the CPU, as the networks here; the battery runs the attack on a GPU as well."""
    images, labels, *_ = data.load("digits", n=1)
    return images, labels


def pictures(n, seed=0):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def smoothed(scores, labels):
    return F.cross_entropy(scores, labels, label_smoothing=0.1)


LOSSES = {
    "softmax": (F.cross_entropy, lambda n: torch.arange(n) % 10),
    "smoothed": (smoothed, lambda n: torch.arange(n) % 10),
    "multi-label": (F.binary_cross_entropy_with_logits, lambda n: torch.eye(10)[:n]),
    "squared": (F.mse_loss, lambda n: torch.eye(10)[:n]),
}


@pytest.mark.parametrize("kind", LOSSES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 4), momentum=st.sampled_from([0.0, 0.9]))
def test_the_image_is_the_ratio_whatever_loss_steps_and_momentum(kind, seed, steps, momentum):
    loss, targets = LOSSES[kind]
    model, image = mlp(seed=seed % 100), pictures(1, seed)
    after = client(model, image, targets(1), loss, steps=steps, momentum=momentum)
    first = inputs.read(model, after, SHAPE)[0]
    assert first.pixels and first.rank == 1 and first.alone and first.scaled
    error = (first.image - image).square().mean().sqrt() / image.square().mean().sqrt()
    assert error < 5 * first.error < 1e-2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6))
def test_so_many_images_so_many_directions(seed, count):
    model = mlp(hidden=64)
    first, *_ = inputs.read(model, client(model, pictures(count, seed), torch.arange(count)), SHAPE)
    assert first.rank == first.directions == count and first.values is None and not first.alone
    assert f"has {count} directions" in first.sentence and "several images" in first.sentence


def test_several_steps_on_one_image_are_no_several_images():
    model = mlp()
    first, last = inputs.read(model, client(model, pictures(1), torch.tensor([3]), steps=5), SHAPE)
    assert first.directions == 1 and last.directions > 1
    assert "several images or steps" in last.sentence


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_adam_s_kin_leave_signs_which_say_nothing(name):
    model = mlp()
    after = client(model, pictures(1), torch.tensor([3]), optimizer=name, lr=1e-3)
    for each in inputs.read(model, after, SHAPE):
        assert each.directions == 0 and each.values is None and each.sentence is None


def test_weight_decay_is_taken_off():
    model = mlp()
    picture = pictures(1)
    first, last = inputs.read(
        model, client(model, picture, torch.tensor([3]), weight_decay=1e-2), SHAPE
    )
    assert torch.allclose(first.image, picture.double(), atol=1e-4) and first.alone
    assert first.decay == pytest.approx(last.decay, rel=1e-3) and "decay" in first.sentence


@pytest.mark.parametrize(
    "outputs, activation, alone",
    [(1, nn.ReLU, False), (2, nn.ReLU, False), (1, nn.Sigmoid, True), (10, nn.ReLU, True)],
)
def test_where_several_inputs_leave_one_direction_it_is_said(outputs, activation, alone):
    model = mlp(outputs, activation=activation)
    loss = F.cross_entropy if outputs > 1 else F.binary_cross_entropy_with_logits
    target = torch.tensor([1]) if outputs > 1 else torch.ones(1, 1)
    first = inputs.read(model, client(model, pictures(1), target, loss), SHAPE)[0]
    assert first.rank == 1 and first.alone == alone
    assert ("a mean of several inputs" in first.sentence) == (not alone)
    # and so it is: the mean of two that switch the same units leaves one direction
    if (outputs, activation) == (1, nn.ReLU):
        image = pictures(1)
        near = torch.cat([image, image + 1e-3 * pictures(1, 1)])
        both = inputs.read(model, client(model, near, torch.ones(2, 1), loss), SHAPE)[0]
        assert both.rank == 1 and not both.alone


def test_a_saturated_softmax_tells_no_two_images_apart():
    model = mlp()
    with torch.no_grad():
        model[-1].bias[2] = 200.0  # every image is taken for class 2
    after = client(model, pictures(2), torch.tensor([3, 3]))
    last = inputs.read(model, after, SHAPE)[-1]
    assert last.rank == 1 and not last.alone


def test_a_layer_without_bias_gives_a_direction():
    model = mlp(bias=False)
    first, last = inputs.read(model, client(model, pictures(1), torch.tensor([3])), SHAPE)
    assert first.image is not None
    hidden = model[:3](pictures(1))[0].double()
    assert not last.scaled and "up to its length" in last.sentence
    torch.testing.assert_close(
        last.values.abs(), hidden / hidden.norm(), rtol=1e-4, atol=1e-6, check_dtype=False
    )


class Mixed(nn.Module):
    """It normalises its input and takes its pixels in another order."""

    def __init__(self, front=nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.order = torch.randperm(64)
        self.front, self.body = front(), mlp()[1:]

    def forward(self, x):
        return self.body(self.front((x - 0.4) / 0.3).flatten(1)[:, self.order])


def test_the_network_s_own_normalisation_and_order_are_undone():
    model = Mixed()
    first = inputs.read(model, client(model, pictures(1), torch.tensor([3])), SHAPE)[0]
    torch.testing.assert_close(first.image, pictures(1).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("front", [nn.Dropout, lambda: nn.BatchNorm2d(1), nn.Tanh])
def test_an_input_that_is_not_the_image_is_not_called_so(front):
    model = Mixed(front)
    first = inputs.read(model, client(model, pictures(1), torch.tensor([3])), SHAPE)[0]
    assert first.rank == 1 and first.values is not None
    assert not first.pixels and first.image is None and "the image" not in first.sentence


def test_patches_are_several_inputs_of_one_image():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Linear(16, 32), nn.Linear(32, 10)

        def forward(self, x):
            return self.head(self.embed(F.unfold(x, 4, stride=4).transpose(1, 2)).tanh().mean(1))

    model = Patches()
    embed, head = inputs.read(model, client(model, pictures(1), torch.tensor([3])), SHAPE)
    assert embed.rows == 4 and embed.directions == 0 and embed.sentence is None
    assert head.rank == 1 and head.alone


def test_what_did_not_move_says_nothing(digit):
    model = mlp()
    after = {**client(model, *digit), "1.weight": model[1].weight, "1.bias": model[1].bias}
    first, last = inputs.read(model, after, SHAPE)
    assert first.rank == 0 and first.sentence is None and last.rank == 1


def test_half_precision_is_told_from_several_images(digit):
    model = mlp()
    after = client(model, *digit)
    sent = {name: w.bfloat16().float() for name, w in after.items()}
    before = {name: w.bfloat16().float() for name, w in model.state_dict().items()}
    model.load_state_dict(before)
    first = inputs.read(model, sent, SHAPE, torch.bfloat16)[0]
    assert first.directions <= 1


def test_the_model_is_left_as_it_was(seen):
    before = {name: w.clone() for name, w in seen.model.state_dict().items()}
    state = torch.get_rng_state()
    inputs.layer_inputs(seen)
    assert all(torch.equal(w, before[name]) for name, w in seen.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_attack_vouches_for_one_image_and_says_where_there_is_none(digit):
    model = mlp()
    seen = observe(model, model.state_dict(), client(model, *digit), SHAPE)
    found = inputs.division(seen)
    assert found.vouched.all() and found.labels.tolist() == [-1]
    assert (found.images - digit[0]).abs().max() < 1e-4
    lenet = models.build("lenet", SHAPE, 10, seed=0)
    convolved = federated.train_locally(lenet, *digit, learning_rate=0.1)
    with pytest.raises(ValueError, match="no linear layer that takes the image itself"):
        inputs.division(convolved)
    two = data.load("digits", n=2)
    batch = observe(model, model.state_dict(), client(model, two.images, two.labels), SHAPE)
    several = inputs.division(batch)  # of outputs that one image alone moved
    assert not several.vouched.any()
    for each in several.images:
        assert (each - two.images).abs().flatten(1).amax(1).min() < 1e-3
    assert attacks.grey(seen).images.shape == found.images.shape


def sent_as(model, dtype):
    """A network whose weights are rounded to a dtype, and how to round others."""
    rounded = copy.deepcopy(model)

    def send(weights):
        return {name: w.to(dtype).float() for name, w in weights.items()}

    rounded.load_state_dict(send(model.state_dict()))
    return rounded, send


@pytest.mark.parametrize(
    "optimizer, steps", [("Adam", 20), ("RMSprop", 3), ("Adagrad", 8), ("NAdam", 6)]
)
def test_the_signs_that_several_steps_of_adam_s_kin_leave_are_no_image(digit, optimizer, steps):
    model = mlp()
    after = client(model, *digit, optimizer=optimizer, steps=steps, lr=1e-3)
    first = inputs.read(model, after, SHAPE)[0]
    assert first.rank == 1 and first.signs and not first.alone
    assert "or only the signs of its numbers" in first.sentence


def test_signs_that_rounding_blurs_are_no_image(digit):
    model, send = sent_as(mlp(), torch.bfloat16)
    after = send(client(model, *digit, optimizer="Adam", lr=1e-3))
    first = inputs.read(model, after, SHAPE, torch.bfloat16)[0]
    assert not first.alone


@pytest.mark.parametrize("dtype, rate", [(torch.bfloat16, 0.1), (torch.float32, 1e-5)])
def test_two_images_of_which_rounding_hides_one_are_not_called_one(dtype, rate):
    model, send = sent_as(mlp(activation=nn.Sigmoid), dtype)
    images = data.load("digits", n=2).images
    after = send(client(model, images, torch.tensor([3, 3]), lr=rate))
    first = inputs.read(model, after, SHAPE, dtype)[0]
    assert first.rank == 1 and not first.alone


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_two_classes_among_ten_leave_a_mean_as_two_of_two_do(labels):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[-1].bias[2:] = -30.0
    (only,) = inputs.read(model, client(model, pictures(2), torch.tensor(labels)), SHAPE)
    assert only.rank == 1 and not only.alone


@pytest.mark.parametrize("scale, rate", [(255.0, 1e-4), (255.0, 1e-6), (1.0, 1e-4), (1e-2, 0.1)])
def test_the_error_counts_the_rounding_of_the_bias_which_is_divided_by(digit, scale, rate):
    model = mlp()
    image = digit[0] * scale
    first = inputs.read(model, client(model, image, digit[1], lr=rate), SHAPE)[0]
    error = (first.image - image).square().mean().sqrt() / image.square().mean().sqrt()
    assert error < 3 * first.error < 0.1


def test_a_bias_that_is_too_coarse_to_move_gives_no_length(digit):
    model = mlp()
    with torch.no_grad():
        model[1].bias.add_(100.0)
    first = inputs.read(model, client(model, *digit, lr=1e-5), SHAPE)[0]
    assert first.image is None and not first.scaled and not first.alone


class Elsewhere(nn.Module):
    """It uses the weight or the bias of its first layer, or both, outside that layer as well."""

    def __init__(self, use, norm=nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.use, self.first, self.last = use, nn.Linear(64, 64), nn.Linear(64, 10)
        self.norm = norm()

    def forward(self, x):
        x = self.use(self.first, x.flatten(1))
        return self.last(self.norm(x.reshape(-1, 1, 8, 8)).flatten(1).relu())


USES = {
    "twice": lambda layer, x: F.linear(layer(x).relu(), layer.weight),
    "of the same input": lambda layer, x: layer(x) + F.linear(2 * x + 1, layer.weight),
    "bias": lambda layer, x: layer(x) + layer.bias,
}


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm2d(1)])
@pytest.mark.parametrize("use", USES)
def test_a_weight_that_is_used_elsewhere_says_nothing_of_its_layer(use, norm, digit):
    model = Elsewhere(USES[use], norm)
    found = inputs.read(model, client(model, *digit), SHAPE)
    assert [each.name for each in found] == ["last"]


class Tokens(nn.Module):
    """A layer for each row of an image, with batch norm behind it; in float32 alone or not."""

    def __init__(self, insists):
        super().__init__()
        torch.manual_seed(0)
        self.insists, self.first, self.norm = insists, nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        x = x.reshape(-1, 8, 8)
        x = self.first(x.float() if self.insists else x).transpose(1, 2)
        return self.last(self.norm(x).relu().mean(2))


@pytest.mark.parametrize("insists", [False, True])
def test_a_layer_in_front_of_batch_norm_is_a_plain_one(insists):
    """Behind it all of the gradient of its bias cancels, and what is left is rounding."""
    assert [*tracing.Traced(Tokens(insists), SHAPE).layers] == ["first", "last"]


@pytest.mark.parametrize(
    "front",
    [nn.ReLU, lambda: nn.Hardtanh(0, 1), lambda: nn.BatchNorm2d(1, track_running_stats=False)],
)
def test_what_changes_an_image_that_the_client_normalised_is_seen(front):
    model = nn.Sequential(front(), *mlp())
    after = client(model, (pictures(1) - 0.5) / 0.25, torch.tensor([3]))
    first = inputs.read(model, after, SHAPE)[0]
    assert first.rank == 1 and not first.pixels and first.image is None


@pytest.mark.parametrize(
    "loss",
    [
        lambda scores, labels: F.multi_margin_loss(scores, labels, margin=5.0),
        lambda scores, _: F.l1_loss(scores, torch.full_like(scores, 5.0)),
        lambda scores, _: scores[:, 0].mean(),
    ],
)
def test_a_loss_of_constant_slopes_leaves_a_mean(loss):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    after = client(model, pictures(4), torch.full((4,), 3), loss)
    (only,) = inputs.read(model, after, SHAPE)
    assert only.rank == 1 and not only.alone


class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.body = change, mlp()

    def forward(self, x):
        return self.body(self.change(x))


CHANGES = {
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "the mean of a batch": lambda x: x.mean(0, keepdim=True),
    "less the mean of a batch": lambda x: x - x.mean(0, keepdim=True) / 2,
}


@pytest.mark.parametrize("change", CHANGES)
def test_chance_and_other_images_in_front_leave_no_image(change):
    model = Changed(CHANGES[change])
    first = inputs.read(model, client(model, pictures(1), torch.tensor([3])), SHAPE)[0]
    assert first.rank == 1 and first.values is not None and not first.pixels


def test_the_rounding_of_many_steps_is_no_images(digit):
    model = mlp()
    first = inputs.read(model, client(model, *digit, lr=1e-4, steps=30), SHAPE)[0]
    assert first.rank > 1 and first.directions == 1 and first.pixels and not first.alone
    error = (first.image - digit[0]).square().mean().sqrt() / digit[0].square().mean().sqrt()
    assert error < 2 * first.error < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2])
def test_arithmetic_in_half_precision_is_no_images(dtype, count):
    model, images = mlp(hidden=64), pictures(count)
    trained = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=dtype):
        loss = F.cross_entropy(trained(images).float(), torch.arange(count))
    loss.backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    first = inputs.read(model, trained.state_dict(), SHAPE)[0]
    assert first.rank > count and first.directions in (0, count) and not first.alone
    if count == 1:
        assert first.directions == 1
        error = (first.image - images).square().mean().sqrt() / images.square().mean().sqrt()
        assert error < 3 * first.error < 3e-2


def test_steps_of_a_scale_in_front_are_no_images(digit):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), *mlp())
    first = inputs.read(model, client(model, *digit, steps=5), SHAPE)[0]
    assert first.directions > 1 and first.pixels and not first.fixed
    assert "several images or steps" in first.sentence


class OneByOne(nn.Module):
    """It takes one image, gives its layer a keyword, and overwrites what it returned."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        assert len(x) == 1
        return self.layers[3](torch.relu_(self.layers[1](input=x.flatten(1))))


def test_networks_of_unusual_calls_are_read(digit):
    model = OneByOne()
    first = inputs.read(model, client(model, *digit), SHAPE)[0]
    assert (first.image - digit[0]).abs().max() < 1e-4 and not first.alone
    inplace = mlp(activation=lambda: nn.ReLU(inplace=True))
    assert inputs.read(inplace, client(inplace, *digit), SHAPE)[0].alone
