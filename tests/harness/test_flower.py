"""Snapshots kept of a federation and their audits. What needs Flower is in with_flower.py and
with_secagg.py, and run where Flower's environment was made.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, federated, flower, flower_environment, flower_run, kept
from dlm_core.__main__ import main

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SHAPE = ["--image-shape", "1,8,8"]
OWN = """
from torch import nn
def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder of two rounds: client 7 takes one step on one image, client 11 sends back what it
    received, client 8, in round 2, takes five steps on ten.
    """
    folder = tmp_path_factory.mktemp("kept")
    images, labels, *_ = data.load("digits", n=10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    sent = arrays(model.state_dict())
    one = federated.train_locally(model, images[:1], labels[:1], learning_rate=0.1)
    kept.write(folder, 1, "7", sent, arrays(one.weights_after), {"loss": 2.5, "many": [1, 2]})
    kept.write(folder, 1, "11", sent, sent, {})
    run = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        run.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        run.step()
    kept.write(folder, 2, "8", sent, arrays(model.state_dict()), {})
    return folder


@pytest.fixture
def folder(filled, tmp_path, monkeypatch):
    (tmp_path / "flower_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(filled, tmp_path / "kept")
    return tmp_path / "kept"


def arrays(state):
    return {name: w.detach().clone().numpy() for name, w in state.items()}


def attack(*arguments):
    return main(["attack", *map(str, arguments), *SHAPE, "--model", "flower_own:network"])


def test_a_folder_is_audited_and_the_worst_verdict_is_its_status(folder, capsys):
    assert attack(folder, "--minutes", "0.05") == 1
    said = capsys.readouterr().out
    assert "round 1, client 7 (loss 2.5)" in said
    table = said.rsplit("\n\n", 1)[1].splitlines()
    assert [line.split("  ")[0] for line in table] == [
        "round 1, client 7 (loss 2.5)",
        "round 1, client 11",
        "round 2, client 8",
    ]
    assert "  leaked: image, " in table[0] and table[1].endswith("  nothing was sent")
    assert "leaked" not in table[2]
    beside = folder / "round-1"
    assert json.loads((beside / "audit-7.json").read_text())["verdict"] == "leaked"
    assert (beside / "audit-7.html").stat().st_size
    assert attack(folder / "round-2", "--minutes", "0.05") in (2, 3), "one round alone"


def test_a_federation_s_audits_are_held_against_what_was_planted(folder):
    told = {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))}
    told |= {"image_shape": (1, 8, 8), "attack": "division"}
    done = kept.audits(kept.read(folder), asked=told)
    assert (folder / "round-1" / "audit-7.png").stat().st_size
    leaks, many = done[0], done[2]

    def of(each, partition):
        pair = dataclasses.replace(each.pair, said={"partition-id": partition})
        return dataclasses.replace(each, pair=pair)

    assert flower_run.unexpected([of(leaks, 0), of(many, 2)]) == []
    said = flower_run.unexpected([of(leaks, 2), of(many, 0)])
    assert "round 1, client 7 has many images" in said[0] and "round 2, client 8 leaks" in said[1]
    unknown = kept.Audited(pair=of(leaks, 1).pair, found=None, why="it broke")
    assert "not audited: it broke" in flower_run.unexpected([unknown])[0]


def test_what_cannot_be_audited_is_said_and_is_not_safe(folder, capsys):
    shutil.rmtree(folder / "round-2")
    (folder / "round-1" / "client-7.json").unlink()
    own = kept.read(folder)[0]
    other = {"w": torch.zeros(3).numpy()}
    kept.write(folder, 1, "9", other, other, {})
    assert attack(folder) == 3, "one sent nothing, of the other nothing is known"
    assert "round 1, client 9   not audited:" in capsys.readouterr().out
    own.after.with_suffix(".json").unlink()
    assert attack(folder) == 64
    assert "1 pair kept, none audited" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "client-7.safetensors").write_bytes(b"x"), "its digest differs"),
        (lambda f: (f / "client-7.safetensors").unlink(), "which is not beside it"),
        (lambda f: (f / "client-7.json").write_text("{}"), "is no note of kept snapshots"),
        (lambda f: (f / "client-7.json").write_text("[1"), "is no note of kept snapshots"),
        (lambda f: (f / "client-7.json").rename(f / "client-3.json"), "names another client, '7'"),
    ],
)
def test_a_folder_that_was_changed_is_refused(spoil, message, folder, capsys):
    spoil(folder / "round-1")
    assert attack(folder) == 64
    assert message in capsys.readouterr().err


def test_a_note_leads_into_no_other_folder(folder, capsys):
    note = folder / "round-1" / "client-7.json"
    (folder.parent / "secret.safetensors").write_bytes(b"x")
    noted = json.loads(note.read_text())
    noted["after"]["file"] = "../../secret.safetensors"
    note.write_text(json.dumps(noted))
    assert attack(folder) == 64
    assert "names 'secret.safetensors', which is not beside it" in capsys.readouterr().err


def test_a_folder_without_snapshots_and_options_for_two_files_are_refused(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert attack(tmp_path / "empty") == 64
    assert "in which no snapshots were kept" in capsys.readouterr().err
    assert attack(folder, "--json", "found.json") == 64
    assert "--json and --report are for two files" in capsys.readouterr().err
    assert attack(folder, "--out", "found.png") == 64
    assert "--out is for two files" in capsys.readouterr().err


def test_weights_come_back_from_the_files_as_they_were(tmp_path):
    from safetensors.torch import load_file

    state = {
        "w": torch.randn(3, 4).t(),
        "count": torch.tensor(5),
        "half": torch.randn(3, dtype=torch.float16),
        "other order": torch.arange(4.0),
    }
    given = arrays(state)
    given["other order"] = given["other order"].astype(">f4")
    pair = kept.write(tmp_path, 3, "5", given, given, {})
    held = load_file(pair.after)
    assert all(torch.equal(held[name], w) for name, w in state.items())


def test_without_flower_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(ModuleNotFoundError, match="Flower is not installed .* pip install"):
        flower.keeping(object(), tmp_path / "kept", clients=1, rounds=[1])
    assert not (tmp_path / "kept").exists()


def test_the_extra_takes_the_versions_that_are_tested():
    import tomllib

    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"]["flower"] == [f"flwr>={flower.TESTED[0]}"]


def test_flower_s_own_strategies(tmp_path):
    """Under Flower's environment, if it was made: `make flower` makes it."""
    python = flower_environment.made()
    if python is None:
        pytest.skip("Flower's environment is not made; `make flower` makes it and runs this")
    settings = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": str(REPOSITORY)}
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no"]
    done = subprocess.run(
        [python, *tests, HERE / "with_flower.py", HERE / "with_secagg.py"],
        cwd=REPOSITORY,
        env=settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
