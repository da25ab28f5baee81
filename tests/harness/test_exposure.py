"""How much would my update tell? ``dlm bound``, a client's own audit of its images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dlm_core import data, information
from dlm_core.__main__ import main
from dlm_core.beyond import preprocessing
from dlm_core.harness import exposure, photos

IMAGES, LABELS, *_ = data.load("digits", n=2)
SHAPE = (1, 8, 8)

OWN = """
from torch import nn
def network():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(18, 12), nn.ReLU(), nn.Linear(12, 10),
    )
class Left(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10))
    def forward(self, x):
        return self.inner(x[..., :4])
"""


@pytest.fixture(scope="module")
def own():
    made: dict = {}
    exec(OWN, made)
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch, own):
    """Where an owner keeps network, weights and images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_of_bound.py").write_text(OWN)
    torch.manual_seed(0)
    torch.save(own["network"]().state_dict(), "weights.pt")
    np.savez("both.npz", images=IMAGES.numpy(), labels=LABELS.numpy())
    return tmp_path


def picture_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def bound(*arguments):
    network = ["--model", "own_of_bound:network", "--image-shape", "1,8,8"]
    return main(["bound", "weights.pt", *arguments, *network, "--learning-rate", "0.1"])


def test_the_command_says_what_of_update_finds(folder, own, capsys):
    """As its owner calls it."""
    assert bound("both.npz", "--json", "b.json") == 0
    out = capsys.readouterr().out
    model = own["network"]()
    model.load_state_dict(torch.load("weights.pt"))
    found = information.of_update(model, IMAGES, LABELS, learning_rate=0.1)
    said = json.loads((folder / "b.json").read_text())
    assert said["size"] == 128 and said["directions"]["0.05"] == found.directions(0.05)
    assert said["better_than_prior"] == found.better_than_prior
    for prior in ("white", "smooth"):
        posterior = found.posterior(prior)
        assert said["priors"][prior]["bound_psnr"] == pytest.approx(posterior.psnr)
        assert said["priors"][prior]["layers"] == pytest.approx(dict(posterior.known))
        assert f"{posterior.psnr:.1f} dB" in out
    assert f"{found.directions():,} to half a grey level" in out
    assert f"{found.directions(0.05):,} to 0.05" in out
    assert picture_of("exposure.png").shape[1] >= 16


def test_the_map_is_white_where_the_update_shows_the_pixels(own, tmp_path, capsys):
    torch.manual_seed(0)
    model = own["Left"]()
    found = exposure.bound(
        *(model.state_dict(), IMAGES[:1], LABELS[:1]),
        learning_rate=0.1,
        model=model,
        out=tmp_path / "map.png",
    )
    shown = found.map("white")
    assert shown.shape == (1, 1, 8, 8)
    assert shown[..., :4].min() > 0.9 and shown[..., 4:].max() < 1e-6
    picture = picture_of(tmp_path / "map.png")
    assert picture[:, : picture.shape[1] // 2].mean() > 5 * picture[:, -60:-40].mean()


def test_a_network_that_draws_at_random_is_named(own, tmp_path, capsys):
    """Dropout: another draw tells another part. Without chance, not a word of it."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    told = {"learning_rate": 0.1, "model": model, "out": tmp_path / "map.png"}
    for mode in (True, False):
        model.train(mode)
        found = exposure.bound(model.state_dict(), IMAGES[:1], LABELS[:1], **told)
        assert any("at random" in note for note in found.notes) == mode
        assert ("at random" in capsys.readouterr().out) == mode


def layers():
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)
    return nn.Sequential(nn.BatchNorm2d(1, affine=False).eval(), *layers)


def test_the_observer_of_a_defence_is_named_and_is_the_server_unless_told(tmp_path, capsys):
    """Who knows W_t sees the more: the other's bound would comfort wrongly."""
    model = layers()
    given = (model.state_dict(), IMAGES[:1], LABELS[:1])
    told = {"learning_rate": 0.1, "model": model, "out": tmp_path / "map.png"}
    found = {}
    for observer in (None, "server", "channel"):
        defence = {"name": "noise", "scale": 1e-4} | ({"observer": observer} if observer else {})
        found[observer] = exposure.bound(*given, defence=defence, **told)
        assert f"the observer is {'on the channel' if observer == 'channel' else 'the server'}" in (
            capsys.readouterr().out
        )
    bounds = {who: each.information.bound_psnr for who, each in found.items()}
    assert bounds[None] == bounds["server"] > bounds["channel"]
    update = {"name": "clip_and_noise", "clip": 1, "noise_multiplier": 0.1, "observer": "channel"}
    exposure.bound(*given, defence=update, **told)
    assert "both snapshots defended" not in capsys.readouterr().out  # W_t is as public as before


def test_weights_in_half_precision_are_taken_to_be_sent_in_it(tmp_path, capsys):
    buffers = dict(layers().named_buffers())  # batch norm's, which stay in float32
    given = ({**layers().half().state_dict(), **buffers}, IMAGES[:1], LABELS[:1])
    told = {"learning_rate": 1e-3, "model": layers(), "out": tmp_path / "map.png"}
    found = exposure.bound(*given, **told)
    assert "taken to send float16" in capsys.readouterr().out
    asked = exposure.bound(*given, transmitted=torch.float16, **told)
    whole = exposure.bound(*given, transmitted=torch.float32, **told)
    assert "taken to send" not in capsys.readouterr().out
    assert found.information.bound_psnr == asked.information.bound_psnr
    assert whole.information.bound_psnr > found.information.bound_psnr + 3


def test_the_bound_is_not_said_of_a_single_image(folder, own, capsys):
    """It holds in the mean over what a prior draws; a smoother image passes it."""
    assert bound("both.npz") == 0
    said = capsys.readouterr().out
    assert "no bound for a single image" in said and "bounded by" not in said


CLIENTS = {
    "--precision bfloat16": {"transmitted": torch.bfloat16},
    "--defence clip_and_noise:clip=1,noise_multiplier=0.1": {
        "defence": {"name": "clip_and_noise", "clip": 1, "noise_multiplier": 0.1}
    },
    "--client sgd:momentum=0.9 --steps 2 --batch-size 1": {
        **{"optimizer_options": {"momentum": 0.9}, "local_steps": 2, "batch_size": 1}
    },
    "--client adam:eps=1e-3": {"client_optimizer": "adam", "optimizer_options": {"eps": 1e-3}},
    "--normalise half": {},
}


@pytest.mark.parametrize("options, told", CLIENTS.items(), ids=CLIENTS)
def test_precision_defence_client_and_normalisation_are_counted(folder, own, capsys, options, told):
    assert bound("both.npz", "--json", "b.json", *options.split()) == 0
    model = own["network"]()
    model.load_state_dict(torch.load("weights.pt"))
    if "normalise" in options:
        model = preprocessing.normalised(model, "half")
    found = information.of_update(model, IMAGES, LABELS, learning_rate=0.1, **told)
    said = json.loads((folder / "b.json").read_text())
    assert said["priors"]["white"]["bound_psnr"] == pytest.approx(found.bound_psnr, abs=1e-6)
    assert said["priors"]["white"]["layers"] == pytest.approx(dict(found.layers), abs=1e-4)


WAYS = {
    "8-bit, channels last": lambda: np.save(
        "i.npy", np.uint8(255 * IMAGES.numpy())[:, 0, :, :, None]
    ),
    "one channel left out": lambda: np.save("i.npy", IMAGES.numpy()[:, 0]),
    "one entry": lambda: np.savez("i.npz", pictures=IMAGES.numpy()),
    "a torch file": lambda: torch.save(IMAGES, "i.pt"),
    "safetensors": lambda: save_file({"images": IMAGES}, "i.safetensors"),
    "pictures": lambda: [
        Image.fromarray(np.uint8(255 * each[0].numpy())).save(f"{k}.png")
        for k, each in enumerate(IMAGES)
    ],
}


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
def test_images_come_as_people_have_them(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write()
    images, labels = photos.read(sorted(tmp_path.iterdir()), SHAPE)
    assert torch.allclose(images.float(), IMAGES, atol=1.001 / 255) and labels is None


class Runs:
    def __reduce__(self):
        return print, ("run",)


def saved_as(path, **arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)


BROKEN = {
    "absent": (lambda: None, "does not exist"),
    "code": (lambda: torch.save({"images": Runs()}, "i.pt"), "cannot be read"),
    "objects": (lambda: saved_as("i.pt", images=np.array([Runs()])), "cannot be read"),
    "another size": (lambda: torch.save(IMAGES[..., :7], "i.pt"), r"\[2, 1, 8, 7\]"),
    "another range": (lambda: torch.save(3 * IMAGES, "i.pt"), r"\[0, 1\]"),
    "names": (lambda: torch.save({"a": IMAGES, "b": LABELS}, "i.pt"), "'a', 'b'"),
    "labels": (lambda: torch.save({"x": IMAGES, "y": LABELS[:1]}, "i.pt"), "1 labels"),
    "noise": (lambda: Path("i.pt").write_bytes(b"noise"), "cannot be read"),
}


@pytest.mark.parametrize("write, words", BROKEN.values(), ids=BROKEN)
def test_a_file_that_has_no_such_images_is_refused(tmp_path, monkeypatch, capsys, write, words):
    monkeypatch.chdir(tmp_path)
    write()
    with pytest.raises(ValueError, match=words) as error:
        photos.read(["i.pt"], SHAPE)
    assert "\n" not in str(error.value) and "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["absent.npz"], "absent.npz"),
        (["both.npz", "--labels", "3;5"], "--labels is '3;5'"),
        (["both.npz", "--labels", "3"], "labels has shape (1,)"),
        (["both.npz", "--labels", "3,10"], "classes 0 to 9"),
        (["both.npz", "--steps", "0"], "local_steps is 0"),
        (["both.npz", "--client", "sdg"], "sgd"),
        (["both.npz", "--client", "sgd:momentum"], "OPTION=VALUE"),
        (["both.npz", "--client", "sgd:momentun=0.9"], "momentum"),
        (["both.npz", "--defence", "nose:scale=1"], "noise"),
        (["both.npz", "--precision", "int8"], "float16"),
        (["both.npz", "--normalise", "nothing"], "normalise"),
        (["both.npz", "--out", "nowhere/map.png"], "its folder does not exist"),
        (["both.npz", "--out", "map.txt"], "suffix"),
        (["both.npz", "--json", "nowhere/b.json"], "its folder does not exist"),
        (["both.npz", "--json", "weights.pt"], "weights as well"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_any_work(
    folder, capsys, monkeypatch, arguments, words
):
    monkeypatch.setattr("dlm_core.beyond.fisher.precision", lambda *_: pytest.fail("long work"))
    assert bound(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said
