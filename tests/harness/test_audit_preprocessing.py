"""Clients that normalise their images: told how, the audit shows them in [0, 1]; not told, it says
what it suspects, and nothing false.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, metrics, models, records
from dlm_core.__main__ import main
from dlm_core.beyond.preprocessing import KNOWN, normalised
from dlm_core.harness import kinds
from dlm_core.harness.audit import audit
from dlm_core.observation import observe

SHAPE = (3, 16, 16)
IMAGES, LABELS, *_ = data.load("cifar100", n=3, source="bundled")
IMAGES = IMAGES[..., 8:24, 8:24]  # of 8 bits
KINDS = {  # normalise: (mean, std) of what the client does
    **{name: (each.mean, each.std) for name, each in KNOWN.items()},
    "0.3,0.4,0.5/0.2,0.3,0.4": ((0.3, 0.4, 0.5), (0.2, 0.3, 0.4)),
    "range=-2,2": ((0.5,), (0.25,)),
}


def column(numbers):
    return torch.tensor(numbers)[:, None, None]


def relu_cnn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(3, 12, 5, 2, 2), nn.ReLU(), nn.Conv2d(12, 12, 5, 2, 2), nn.ReLU()
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(192, 100))


NETWORKS = {
    "mlp": lambda: models.build("mlp", SHAPE, 100, seed=0, init="default"),
    "lenet": lambda: models.build("lenet", SHAPE, 100, seed=0),
    "relu cnn": relu_cnn,
}


def client(model, kind, n=1, lr=0.01):
    """W_t and W_{t+1} of a client whose own code normalises."""
    mean, std = map(column, KINDS[kind]) if kind else (0.0, 1.0)
    trained = copy.deepcopy(model)
    F.cross_entropy(trained((IMAGES[:n] - mean) / std), LABELS[:n]).backward()
    torch.optim.SGD(trained.parameters(), lr=lr).step()
    return model.state_dict(), trained.state_dict()


def asked(kind, network, tmp_path, n=1, **options):
    model = NETWORKS[network]()
    about = {"model": model, "image_shape": SHAPE, "out": tmp_path / "found.png", "num_images": n}
    return audit(*client(model, kind, n), **about, **options)


def decibels(found):
    return metrics.psnr(found.images, IMAGES[: len(found.images)].double(), data_range=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_told_a_division_shows_the_image_in_its_range(kind, tmp_path, capsys):
    found = asked(kind, "mlp", tmp_path, normalise=kind)
    assert found.verdict == "leaked" and decibels(found["division"]) > 90
    said = capsys.readouterr().out
    assert "outside [0, 1]" not in said and "it seems" not in said


@pytest.mark.parametrize("kind", KINDS)
def test_not_told_a_division_shows_what_is_suspected(kind, tmp_path, capsys):
    found = asked(kind, "mlp", tmp_path)
    mean, std = map(column, KINDS[kind])
    values = found["division"].images
    assert torch.allclose(values, ((IMAGES[:1] - mean) / std).double(), atol=1e-3)  # unclamped
    said = capsys.readouterr().out
    assert "% of its values lie outside [0, 1]" in said and "the picture shows (value" in said
    if kind in KNOWN:
        assert f"as {kind}, it seems" in said and f"--normalise {kind} " in said
    else:
        assert "perhaps; --normalise" in said and "it seems" not in said


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bytes"])
def test_told_an_exact_attack_shows_the_image(kind, tmp_path):
    found = asked(kind, "lenet", tmp_path, attack="exact", normalise=kind)
    exact = found["exact"]
    assert found.verdict == "leaked" and decibels(exact) > 60
    assert exact.learning_rate == pytest.approx(0.01, rel=1e-3)
    error = float((exact.images - IMAGES[:1]).square().mean().sqrt())
    assert 0.2 < float(exact.pixel_error.square().mean().sqrt()) / error < 5  # in pixels as well
    assert abs(decibels(exact) - exact.bound_psnr) < 14


@pytest.mark.parametrize("kind", ["imagenet", "half"])
def test_not_told_an_exact_attack_shows_what_is_suspected(kind, tmp_path, capsys):
    found = asked(kind, "lenet", tmp_path, attack="exact")
    assert found.verdict == "leaked"
    assert torch.allclose(KNOWN[kind].pixels(found["exact"].images), IMAGES[:1].double(), atol=0.01)
    assert f"--normalise {kind} (normalise='{kind}')" in capsys.readouterr().out


def test_an_image_that_saturates_the_network_is_not_vouched_for(tmp_path):
    found = asked("bytes", "lenet", tmp_path, attack="exact", normalise="bytes")
    assert found.verdict != "leaked" or decibels(found["exact"]) > 20


@pytest.mark.parametrize("kind", ["imagenet", "half"])
def test_a_batch_is_recovered_in_pixels(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(768, 200), nn.ReLU(), nn.Linear(200, 100)
        model = nn.Sequential(*layers)
    sent, about = client(model, kind, n=3, lr=0.1), {"model": model, "image_shape": SHAPE}
    about |= {"out": tmp_path / "found.png", "attack": "exact_batch", "num_images": 3}
    found = audit(*sent, **about, normalise=kind)["exact_batch"]
    order = metrics.match(found.images, IMAGES.double())
    errors = (found.images[order] - IMAGES).square().mean((1, 2, 3)).sqrt()
    assert found.recovered.all() and (errors < 1e-3).all()
    assert (found.image_error[order] < 20 * errors).all()
    assert (found.image_error[order] > errors / 20).all()
    raw = audit(*sent, **about)["exact_batch"]
    assert torch.allclose(KNOWN[kind].pixels(raw.images), found.images, atol=1e-6)


@pytest.mark.parametrize("network, kind", [("lenet", "imagenet"), ("relu cnn", "cifar10")])
def test_searches_follow_what_was_told(network, kind, tmp_path, capsys):
    told = asked(kind, network, tmp_path, attack="dlm_plus", normalise=kind)
    said = capsys.readouterr().out
    asked(kind, network, tmp_path, attack="dlm_plus")
    other = capsys.readouterr().out
    found = told["dlm_plus"]
    assert float(found.images.min()) >= 0 and float(found.images.max()) <= 1
    assert decibels(found) > 20 or told.verdict != "leaked"
    if network == "lenet":
        assert decibels(found) > 25
    assert "what it shows has leaked" in said or f"before {kind}, as told" in said
    assert "what it shows has leaked" not in other and "--normalise (normalise) tells" in other


def test_simulated_clients_follow_too(tmp_path):
    model = NETWORKS["lenet"]()
    trained, mean, std = copy.deepcopy(model), *map(column, KINDS["imagenet"])
    run = torch.optim.SGD(trained.parameters(), lr=0.01)
    for _ in range(2):
        run.zero_grad()
        F.cross_entropy(trained((IMAGES[:1] - mean) / std), LABELS[:1]).backward()
        run.step()
    seen = observe(normalised(model, "imagenet"), model.state_dict(), trained.state_dict(), SHAPE)
    found = records.ATTACKS["unrolled_dlm"](seen, local_steps=2)
    assert decibels(found) > 25


def test_the_wrong_thing_told_is_noticed(tmp_path, capsys):
    asked("imagenet", "mlp", tmp_path, normalise="half")
    assert "as imagenet, it seems" in capsys.readouterr().out
    asked("range=-2,2", "mlp", tmp_path, normalise="half")
    assert "the client normalised otherwise, perhaps" in capsys.readouterr().out
    asked(None, "mlp", tmp_path, normalise="imagenet")
    assert "the client did not normalise its images, it seems" in capsys.readouterr().out


@pytest.mark.parametrize("network", NETWORKS)
def test_of_a_client_that_does_not_normalise_nothing_is_suspected(network, tmp_path, capsys):
    attack = {"mlp": "division", "lenet": "exact", "relu cnn": "dlm_plus"}[network]
    asked(None, network, tmp_path, attack=attack)
    said = capsys.readouterr().out
    assert "it seems" not in said and "perhaps" not in said and "outside [0, 1]" not in said


@pytest.mark.parametrize("attack", ["division", "exact", "dlm_plus"])
def test_without_it_an_attack_finds_the_same_bits(attack, tmp_path):
    network = "lenet" if attack == "dlm_plus" else "mlp"
    model, about = NETWORKS[network](), {"restarts": 2} if attack == "dlm_plus" else {}
    sent = client(model, None)
    seen = observe(model, *sent, SHAPE)
    alone = records.ATTACKS[attack](seen, **about).images
    assert torch.equal(asked(None, network, tmp_path, attack=attack)[attack].images, alone)
    nothing = observe(normalised(model, ([0.0], [1.0])), *sent, SHAPE)
    assert torch.equal(records.ATTACKS[attack](nothing, **about).images, alone)


def test_a_layer_that_shows_the_image_without_a_head_is_suspected_too(tmp_path, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 100, bias=False)
        model = nn.Sequential(*layers)
    sent, about = client(model, "imagenet"), {"model": model, "image_shape": SHAPE}
    audit(*sent, **about, out=tmp_path / "found.png")
    assert "as imagenet, it seems" in capsys.readouterr().out
    found = audit(*sent, **about, normalise="imagenet", out=tmp_path / "found.png")
    assert decibels(found["division"]) > 90
    assert "it seems" not in capsys.readouterr().out


def test_the_user_s_network_stays_as_it_is(tmp_path):
    model = NETWORKS["mlp"]()
    before = model(IMAGES)
    about = {"model": model, "image_shape": SHAPE, "out": tmp_path / "found.png"}
    audit(*client(model, "half"), **about, normalise=(-1, 1))
    assert torch.equal(model(IMAGES), before)


def test_the_command_takes_it(tmp_path, capsys):
    model = NETWORKS["mlp"]()
    files = [str(tmp_path / f"{name}.pt") for name in ("before", "after")]
    for file, weights in zip(files, client(model, "half")):
        torch.save(weights, file)
    shape = ["--model", "mlp", "--image-shape", "3,16,16", "--out", str(tmp_path / "found.png")]
    assert main(["attack", *files, *shape]) in (1, 2)  # a verdict
    assert "--normalise half (normalise='half') shows them in [0, 1]" in capsys.readouterr().out
    for given in ("half", "0.5/0.5", "0.5,0.5,0.5/0.5,0.5,0.5", "range=-1,1"):
        assert main(["attack", *files, *shape, "--normalise", given]) in (1, 2)
        assert "outside" not in capsys.readouterr().out
    assert main(["attack", "--list"]) == 0
    assert "--normalise: imagenet" in capsys.readouterr().out


def test_other_channels_than_the_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="normalise is 'imagenet', of 3 channels; .* have 1"):
        audit({}, {}, image_shape=(1, 8, 8), normalise="imagenet", out=tmp_path / "found.png")


@pytest.mark.parametrize("kind", ["linear, 2 classes, 4 images", "MLP, sent in half precision"])
def test_what_a_mean_or_rounding_may_explain_is_not_put_down_to_a_normalisation(
    kind, tmp_path, capsys
):
    client = kinds.make(kind, 0)
    how = {"model": client.network, "image_shape": tuple(client.images.shape[1:])}
    audit(client.before, client.after, **how, attack="division", out=tmp_path / "found.png")
    said = capsys.readouterr().out
    assert "the client normalised its images" not in said
    assert ("as those of a mean of several images may" in said) == kind.startswith("linear")
