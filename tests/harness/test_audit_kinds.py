"""Kinds of clients on which an audit once said too much or too little, each by what is right."""

import copy
import random
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, label_inference, metrics, models
from dlm_core.beyond import inputs, weighted
from dlm_core.harness import symmetries
from dlm_core.observation import observe
from tests.harness.audited import (
    IMAGES,
    LABELS,
    SHAPE,
    asked,
    linear,
    network,
    psnr,
    sgd,
    snapshots,
    trained,
)

SAME = torch.tensor([3, 3])
HINGE = F.multi_margin_loss
MLP = (linear(64, 32), nn.ReLU, linear(32, 10))


def absolute(scores, labels):
    return F.l1_loss(scores, 2.0 * F.one_hot(labels, 10) - 1)


@pytest.mark.parametrize("loss", [HINGE, absolute])
def test_without_an_activation_a_hinge_s_mean_of_two_is_no_image(loss, tmp_path):
    model = network(linear(64, 32), linear(32, 10))
    found = asked(model, snapshots(model, IMAGES[[0, 2]], SAME, loss=loss), tmp_path)
    assert psnr(found["division"].images, IMAGES[[0, 2]].mean(0, keepdim=True)) > 100
    assert found.verdict == "partly" and not any(each.what == "image" for each in found.leaks)


@pytest.mark.parametrize("seed", range(5))
def test_the_last_layer_s_input_of_two_is_a_mean_under_a_hinge(seed, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), *(layer() for layer in MLP))
    seen = observe(model, *snapshots(model, IMAGES[:2], SAME, loss=HINGE), SHAPE)
    last = inputs.layer_inputs(seen)[-1]
    assert last.values is not None and not last.alone
    assert "or a mean of several inputs" in (last.sentence or "")


def half(images):
    return (images - 0.5) / 0.5


@pytest.mark.parametrize("change", [half, lambda images: (images - 0.13) / 0.31])
def test_pixels_outside_0_and_1_that_a_search_finds_are_not_cut_off(change, tmp_path, capsys):
    strided = partial(nn.Conv2d, 8, 8, 3, stride=2, padding=1)
    layers = partial(nn.Conv2d, 1, 8, 3, padding=1), nn.ReLU, strided, nn.ReLU, nn.Flatten
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*(layer() for layer in layers), nn.Linear(128, 10))
    image = change(IMAGES[:1])
    found = asked(model, snapshots(model, image), tmp_path, attack="weighted")
    off = (found["weighted"].images - image).abs().max()
    assert found.verdict == "leaked" and off < 1e-3
    assert "outside [0, 1]: the client normalised its images" in capsys.readouterr().out


def rates(factor, client):
    """Biases at another rate than weights."""
    groups = [[w for w in client.parameters() if (w.ndim > 1) is large] for large in (True, False)]
    return [torch.optim.SGD(group, lr=lr) for group, lr in zip(groups, (0.1, factor * 0.1))]


@pytest.mark.parametrize("image", range(4))
def test_biases_of_0_at_half_the_rate_leave_no_image_of_twice_the_brightness(image, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(image)
        model = nn.Sequential(nn.Flatten(), *(layer() for layer in MLP))
    for layer in (model[1], model[3]):
        nn.init.zeros_(layer.bias)
    one = slice(image, image + 1)
    sent = trained(model, partial(rates, 0.5), IMAGES[one], LABELS[one])
    found = asked(model, sent, tmp_path, attack="division")
    off = (found["division"].images - 2 * IMAGES[one]).abs().max()
    assert off < 1e-4 and found.verdict == "partly"


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_in_the_middle_does_not_make_black_pixels_untrained(share, tmp_path, capsys):
    model = network(*MLP[:2], partial(nn.Dropout, share), linear(32, 16), nn.ReLU, linear(16, 10))
    found = asked(model, snapshots(model), tmp_path)
    assert found.verdict == "leaked" and psnr(found["division"].images, IMAGES[:1]) > 120
    assert "They are black, unless" in capsys.readouterr().out


def centralised(client):
    for w in client.parameters():
        if w.ndim > 1:
            w.grad -= w.grad.mean(1, keepdim=True)


def test_an_input_without_its_mean_is_not_called_the_input(tmp_path, capsys):
    model = network(*MLP[:2], nn.Dropout, MLP[2])
    found = asked(model, trained(model, sgd, change=centralised), tmp_path, attack="division")
    assert "but for its mean: its numbers add up to 0" in capsys.readouterr().out
    assert found.verdict == "partly"
    assert not any(each.what.startswith(("image", "input of layer '1'")) for each in found.leaks)


def test_an_input_behind_layer_norm_has_no_mean_to_lose(tmp_path):
    model = network(*MLP[:1], partial(nn.LayerNorm, 32), MLP[2])
    found = asked(model, snapshots(model), tmp_path)
    assert "input of layer '3'" in {each.what for each in found.leaks}


def adam_s_biases(client):
    weights, biases = ([w for w in client.parameters() if (w.ndim > 1) is a] for a in (True, False))
    return [torch.optim.SGD(weights, lr=0.1), torch.optim.Adam(biases, lr=1e-3)]


def test_a_bias_that_moves_by_another_rule_leaves_the_direction_of_the_image(tmp_path, capsys):
    model = network(*MLP)
    found = asked(model, trained(model, adam_s_biases), tmp_path, minutes=0.2)
    first = found.look.layers[0]
    assert first.bias_apart and not first.alone and not first.scaled
    image = IMAGES[0].flatten().double()
    assert F.cosine_similarity(first.values, image, 0) > 1 - 1e-6
    assert "and the bias moved by another rule" in capsys.readouterr().out
    assert found.verdict == "partly"


def test_a_black_image_is_said_to_be_one_perhaps(tmp_path, capsys):
    model = network(*MLP)
    asked(model, snapshots(model, torch.zeros(1, 1, 8, 8)), tmp_path, minutes=0.2)
    assert "its input was 0 (a black image), or the client did not train" in capsys.readouterr().out


def test_one_step_of_adam_tells_the_label_and_which_pixels_are_black(tmp_path, capsys):
    model = network(*MLP)
    found = asked(model, trained(model, adam), tmp_path, minutes=0.2)
    said, black = capsys.readouterr().out, int((IMAGES[0] == 0).sum())
    assert f"{black} of the 64 weights' columns of layer '1' did not move" in said
    assert [each.classes for each in found.leaks] == [(int(LABELS[0]),)]
    assert found.verdict == "partly"


def clipped(client):
    for w in client.parameters():
        w.grad.clamp_(-0.03, 0.03)


def masked(client):
    draw = torch.Generator().manual_seed(0)
    for w in client.parameters():
        if w.ndim > 1:
            w.grad *= torch.rand(w.shape, generator=draw) < 0.5


@pytest.mark.parametrize("change, width", [(clipped, 32), (clipped, 64), (masked, 64)])
def test_an_image_shows_in_the_entries_that_were_left(change, width, tmp_path, capsys):
    model = network(linear(64, width), nn.ReLU, linear(width, 10))
    found = asked(model, trained(model, sgd, change=change), tmp_path, attack="division")
    assert psnr(found["division"].images, IMAGES[:1]) > 80
    assert "by the entries that agree on it" in capsys.readouterr().out
    assert found.verdict == "partly"


def adam(client):
    return [torch.optim.Adam(client.parameters(), lr=1e-3)]


@pytest.mark.parametrize("count, optimizer", [(2, sgd), (3, sgd), (5, sgd), (1, adam), (4, adam)])
def test_the_entries_of_several_images_and_of_signs_agree_on_none(count, optimizer):
    model = network(linear(64, 64), nn.ReLU, linear(64, 10))
    sent = trained(model, optimizer, IMAGES[:count], LABELS[:count])
    assert inputs.layer_inputs(observe(model, *sent, SHAPE))[0].values is None


class Disturbed(nn.Linear):
    """Noise on its input, in training."""

    def forward(self, x):
        return super().forward(x + 0.3 * torch.randn_like(x) if self.training else x)


class Dropping(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.3, self.training))


class Columns(nn.Linear):
    """Without half of its columns, in training."""

    def forward(self, x):
        kept = 2.0 * (torch.rand(self.in_features) < 0.5) if self.training else 1.0
        return F.linear(x, kept * self.weight, self.bias)


@pytest.mark.parametrize("kind", [Disturbed, Dropping, Columns])
def test_what_a_layer_does_to_its_input_in_training_is_not_the_image(kind, tmp_path):
    model = network(partial(kind, 64, 32), nn.ReLU, linear(32, 10))
    found = asked(model, snapshots(model), tmp_path, minutes=0.05)
    assert found.verdict == "partly" and "division" not in found and "exact" not in found
    assert not any("'1'" in each.what for each in found.leaks)


class Sometimes(nn.Module):
    """Turns an image over by chance, in training; ``draw`` says by whose."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x.flip(-1) if self.training and self.draw() < 0.1 else x


CHANCES = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: numpy.random.random(),  # noqa: NPY002
    "python": random.random,
}


@pytest.mark.parametrize("draw", CHANCES.values(), ids=CHANCES)
def test_an_image_that_a_network_may_turn_over_is_not_read_off_its_first_layer(draw):
    model = nn.Sequential(Sometimes(draw), nn.Flatten(), *(layer() for layer in MLP))
    first = inputs.layer_inputs(observe(model, *snapshots(model), SHAPE))[0]
    assert first.values is not None and first.image is None and not first.pixels


class Idle(nn.Module):
    """Two heads; the one that is called last trains nothing."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 16))
        self.used, self.idle = nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x):
        features = self.body(x)
        used = self.used(features)
        return self.idle(features), used


@pytest.mark.parametrize("seed", range(2))
def test_a_hinge_is_thought_of_where_the_last_layer_did_not_move(seed, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        frozen = nn.Sequential(
            nn.Flatten(), *(nn.Linear(*n) for n in [(64, 32), (32, 16), (16, 10)])
        )
        idle = Idle()
    frozen[-1].requires_grad_(False)
    of_second = lambda returned, labels: HINGE(returned[1], labels)  # noqa: E731
    for model, loss in ((frozen, HINGE), (idle, of_second)):
        sent = snapshots(model, IMAGES[[0, 2]], SAME, loss=loss)
        found = asked(model, sent, tmp_path, attack="division")
        assert psnr(found["division"].images, IMAGES[[0, 2]].mean(0, keepdim=True)) > 100
        assert found.verdict == "partly" and not found["division"].vouched.any()


def test_behind_an_activation_one_image_is_still_read_where_the_last_layer_is_frozen(tmp_path):
    model = network(linear(64, 32), nn.Sigmoid, linear(32, 10))
    model[-1].requires_grad_(False)
    found = asked(model, snapshots(model), tmp_path, attack="division")
    assert psnr(found["division"].images, IMAGES[:1]) > 100
    assert "mean of several" not in found["division"].evidence.said


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_biases_at_nearly_the_weights_rate_are_not_said_to_have_it(factor, tmp_path):
    model = network(*MLP)
    sent = trained(model, partial(rates, factor))
    found = asked(model, sent, tmp_path, attack="division")
    assert "or a multiple of it" in found["division"].evidence.said and found.verdict == "partly"


class Mirrored(nn.Module):
    """The same of an image and of its mirror image."""

    def __init__(self):
        super().__init__()
        strided = nn.Conv2d(8, 4, 3, stride=2, padding=1)
        layers = nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), strided, nn.Sigmoid(), nn.Flatten()
        self.body, self.head = nn.Sequential(*layers), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body(x) + self.body(x.flip(-1)))


def test_of_an_image_and_its_mirror_image_none_is_called_leaked(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Mirrored()
        for w in model.parameters():
            nn.init.uniform_(w, -0.5, 0.5)
    digits = data.load("digits", n=6)
    sent = snapshots(model, digits.images[5:], digits.labels[5:])
    found = asked(model, sent, tmp_path, attack="dlm_plus")
    assert psnr(found["dlm_plus"].images, digits.images[5:].flip(-1)) > 25
    assert found.verdict == "partly"
    assert "its mirror image" in found.beliefs["dlm_plus"].doubt


def test_lenet_is_no_such_network():
    model = models.build("lenet", SHAPE, 10, init="paper")
    assert symmetries.against(observe(model, *snapshots(model), SHAPE)) is None


def test_zeros_of_a_client_that_normalises_are_not_black():
    image = half(IMAGES[:1])
    image[..., 0, :] = 0.0  # padded with grey
    model = network(*MLP)
    first = inputs.layer_inputs(observe(model, *snapshots(model, image), SHAPE))[0]
    assert first.still >= 8 and "They are black" not in first.sentence
    assert "need not be black" in first.sentence


def test_gradients_at_other_weights_do_not_make_black_pixels_untrained():
    """SAM steps by the gradient at weights that are moved against it first."""
    model = network(*MLP)
    climbed = copy.deepcopy(model)
    F.cross_entropy(climbed(IMAGES[:1]), LABELS[:1]).backward()
    length = torch.stack([w.grad.norm() for w in climbed.parameters()]).norm()
    with torch.no_grad():
        for w in climbed.parameters():
            w += 0.5 * w.grad / length
    _, there = trained(climbed, lambda client: [torch.optim.SGD(client.parameters(), lr=0.1)])
    before, up = model.state_dict(), climbed.state_dict()
    sent = {name: before[name] - (up[name] - there[name]) for name in before}
    first = inputs.layer_inputs(observe(model, before, sent, SHAPE))[0]
    assert psnr(first.image, IMAGES[:1]) > 100
    assert "unless it took its gradients at other weights" in first.sentence


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_an_image_shows_in_the_weights_that_pruning_left(share, tmp_path):
    model = network(linear(64, 64), nn.ReLU, linear(64, 10))
    before, sent = snapshots(model)
    for name in ("1.weight", "3.weight"):
        smallest = sent[name].abs() <= sent[name].abs().quantile(share)
        sent[name] = sent[name].masked_fill(smallest, 0.0)
    found = asked(model, (before, sent), tmp_path, attack="division")
    assert found.verdict == "partly" and psnr(found["division"].images, IMAGES[:1]) > 80


@pytest.mark.parametrize("kind", [Disturbed, Dropping, Columns])
def test_what_a_layer_does_in_training_is_seen_beside_batch_norm_too(kind):
    model = network(partial(kind, 64, 32), lambda: nn.BatchNorm1d(32), nn.ReLU, linear(32, 10))
    client = copy.deepcopy(model).train()
    client[2].eval()  # which takes no single image in train mode
    F.cross_entropy(client(IMAGES[:1]), LABELS[:1]).backward()
    torch.optim.SGD(client.parameters(), lr=0.1).step()
    seen = observe(model, model.state_dict(), client.state_dict(), SHAPE)
    assert all(each.name != "1" for each in inputs.layer_inputs(seen))


class Cosine(nn.Module):
    """Scores are cosines with an image per class, as CLIP has them: no layer's output."""

    def __init__(self, features):
        super().__init__()
        layers = nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, features)
        self.body = nn.Sequential(nn.Flatten(), *layers)
        self.classes = nn.Parameter(torch.randn(10, features))

    def forward(self, x):
        return 10 * F.normalize(self.body(x)) @ F.normalize(self.classes).T


@pytest.mark.parametrize("features", [8, 10, 16])
def test_features_that_are_no_class_scores_tell_no_label(features, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Cosine(features)
    found = asked(model, snapshots(model), tmp_path)
    assert psnr(found["division"].images, IMAGES[:1]) > 80 and found.verdict == "leaked"
    assert not any(each.what == "label" for each in found.leaks)
    seen = observe(model, *snapshots(model), SHAPE)
    with pytest.raises(label_inference.Untold, match="no class scores"):
        label_inference.infer(seen)


RETURNED = {
    "as they are": lambda z: z,
    "log-softmax": lambda z: z.log_softmax(1),
    "in two axes": lambda z: z.view(-1, 5, 2),
    "without those beyond nine": lambda z: z[:, :9],
    "sigmoid": torch.sigmoid,
}


class Returning(nn.Sequential):
    """A network that makes something of its last layer's scores."""

    def forward(self, x):
        return RETURNED[self.kind](super().forward(x))


@pytest.mark.parametrize("kind", RETURNED)
def test_scores_that_a_network_returns_in_another_form_tell_the_label(kind):
    model = network(*MLP, kind=Returning)
    model.kind = kind

    def loss(returned, labels):
        return F.nll_loss(returned.flatten(1).log_softmax(1), labels)

    seen = observe(model, *snapshots(model, loss=loss), SHAPE)
    assert seen.has_class_scores and label_inference.infer(seen).tolist() == LABELS[:1].tolist()


class Rows(nn.Module):
    """Scores each row of an image, and combines the scores."""

    def __init__(self, combine):
        super().__init__()
        self.combine, self.first, self.last = combine, nn.Linear(8, 16), nn.Linear(16, 10)
        self.place = nn.Parameter(3 * torch.randn(8, 16))

    def forward(self, x):
        return self.combine(self.last(self.first(x[:, 0]).relu() + self.place))


@pytest.mark.parametrize("combine", [lambda z: z.mean(1), lambda z: z[:, -1], lambda z: z[:, 0]])
def test_scores_of_rows_that_a_network_combines_tell_the_label(combine):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Rows(combine)
    seen = observe(model, *snapshots(model), SHAPE)
    assert label_inference.infer(seen).tolist() == LABELS[:1].tolist()


def test_a_batch_of_another_loss_is_shown_without_labels(tmp_path, capsys):
    """An autoencoder has no classes; its images stand in the update nonetheless."""
    model = network(linear(64, 32), nn.ReLU, linear(32, 64))
    sent = snapshots(model, IMAGES[:2], IMAGES[:2].flatten(1), loss=F.mse_loss)
    found = asked(model, sent, tmp_path, num_images=2, attack="exact_batch")
    images = found["exact_batch"].images
    assert psnr(images[metrics.match(images, IMAGES[:2])], IMAGES[:2]) > 60
    assert found.verdict == "partly" and "labels [" not in capsys.readouterr().out


def rare():
    """A network whose first units the client's image turns on, and grey or noise do not."""
    model = network(linear(64, 32), nn.ReLU, linear(32, 16), nn.ReLU, linear(16, 10))
    centred = (IMAGES[0] - IMAGES[0].mean()).flatten()
    with torch.no_grad():
        model[1].weight.mul_(0.05).add_(centred / centred.norm())
        model[1].bias.fill_(-0.7 * float(centred.norm()))
        model[3].bias.fill_(0.1)
    return model


def test_layers_in_front_are_not_held_against_what_stands_behind_them(tmp_path):
    model = rare()
    noise = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    for image in (torch.full_like(noise, 0.5), noise):
        assert not model[:3](image).any()
    found = asked(model, snapshots(model), tmp_path)
    assert found.verdict == "leaked" and psnr(found["division"].images, IMAGES[:1]) > 80


def test_a_search_says_that_its_layer_was_fed_zeros_and_has_no_picture():
    front = (lambda: nn.Unflatten(1, SHAPE), lambda: nn.Conv2d(1, 4, 3), nn.ReLU, nn.Flatten)
    model = network(*front, linear(144, 16), nn.ReLU, linear(16, 10))
    with torch.no_grad():
        model[2].bias.fill_(-10)
    seen = observe(model, *snapshots(model), SHAPE)
    with pytest.raises(torch.linalg.LinAlgError, match="'5' moved and its weight did not"):
        weighted.weighted(seen)
