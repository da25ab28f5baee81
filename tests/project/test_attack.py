"""The attack command in a federation's own checks: exit statuses, files, a network of one's own."""

import copy
import json
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data
from dlm_core.__main__ import main
from dlm_core.harness.paths import REPOSITORY

IMAGES, LABELS, *_ = data.load("digits", n=8)
SHAPE = ["--image-shape", "1,8,8"]

OWN = """
from torch import nn
def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
def of_shape(image_shape, num_classes):
    c, h, w = image_shape
    return nn.Sequential(
        nn.Flatten(), nn.Linear(c * h * w, 32), nn.ReLU(), nn.Linear(32, num_classes)
    )
class Network(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(*network())
made = network()
"""


def trained(model, images, labels, loss=F.cross_entropy):
    client = copy.deepcopy(model)
    run = torch.optim.SGD(client.parameters(), lr=0.1)
    loss(client(images), labels).backward()
    run.step()
    return client.state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Snapshots of clients that leak, leak in part, and sent what they received."""
    here = tmp_path_factory.mktemp("snapshots")
    (here / "own.py").write_text(OWN)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    before = model.state_dict()
    torch.save(before, here / "before.pt")
    after = trained(model, IMAGES[:1], LABELS[:1])
    torch.save(after, here / "leaked.pt")
    torch.save({**before, "3.bias": after["3.bias"]}, here / "partly.pt")
    noise = {name: w + 0.1 * torch.randn_like(w) for name, w in before.items()}
    torch.save(noise, here / "not shown.pt")
    torch.save(before, here / "nothing was sent.pt")
    return here


def attack(folder, *arguments, model="own:network"):
    """The command as a federation runs it."""
    run = [sys.executable, "-m", "dlm_core", "attack", *arguments, *SHAPE, "--model", model]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "verdict, status", [("nothing was sent", 0), ("leaked", 1), ("partly", 2), ("not shown", 3)]
)
def test_the_exit_status_is_the_verdict(folder, verdict, status):
    by = {"partly": "dlm_plus", "not shown": "exact"}.get(verdict, "all")
    done = attack(folder, "before.pt", f"{verdict}.pt", "--attack", by, "--json", "found.json")
    assert done.returncode == status, done.stdout + done.stderr
    assert f"verdict: {verdict}" in done.stdout and done.stderr == ""
    found = json.loads((folder / "found.json").read_text())
    assert found["verdict"] == verdict and found["exit_status"] == status


@pytest.mark.parametrize(
    "arguments",
    [
        ["before.pt"],
        ["before.pt", "absent.pt"],
        ["before.pt", "leaked.pt", "--image"],
        ["before.pt", "leaked.pt", "--images", "0"],
        ["before.pt", "leaked.pt", "third.pt"],
        ["before.pt", "leaked.pt", "--json", "nowhere/found.json"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_no_verdict(folder, arguments):
    done = attack(folder, *arguments)
    assert done.returncode == 64 and done.stderr.startswith("error: ") and done.stdout == ""


def test_an_error_of_our_own_is_no_verdict(folder, monkeypatch, capsys):
    def breaks(*given, **named):
        raise RuntimeError("a mistake of ours")

    monkeypatch.chdir(folder)
    monkeypatch.setattr("dlm_core.harness.audit.audit", breaks)
    assert main(["attack", "before.pt", "leaked.pt"]) == 70
    assert "RuntimeError: a mistake of ours" in capsys.readouterr().err


def test_the_statuses_are_in_the_help():
    run = [sys.executable, "-m", "dlm_core", "attack", "--help"]
    said = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True).stdout
    said = " ".join(said.split())
    for part in ("0 nothing was sent", "1 an image leaked", "2 something else", "3 no leak", "64 "):
        assert part in said
    assert "runs your code" in said


@pytest.mark.parametrize("model", ["own:of_shape", "own:Network", "own:made"])
def test_a_network_of_one_s_own_is_named_by_its_factory(folder, monkeypatch, capsys, model):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked = ["--model", model, "--num-classes", "10"]
    assert main(["attack", "before.pt", "leaked.pt", *SHAPE, *asked]) == 1
    assert "the image, 64 numbers" in capsys.readouterr().out


def test_a_factory_that_is_told_too_little_says_which_option_tells_it(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["attack", "before.pt", "leaked.pt", *SHAPE, "--model", "own:of_shape"]) == 64
    said = capsys.readouterr().err
    assert "calling of_shape failed" in said and "--num-classes is not given" in said


def test_json_and_report_are_written_whatever_the_disk_does_to_one(folder, monkeypatch, capsys):
    from dlm_core.harness import page

    def full(found, path):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(page, "write", full)
    files = ["--json", "all.json", "--report", "page.html"]
    asked = ["attack", "before.pt", "leaked.pt", *SHAPE, "--model", "own:network", *files]
    assert main(asked) == 1 and (folder / "all.json").stat().st_size > 0
    said = capsys.readouterr()
    assert "report 'page.html' could not be written: No space" in said.err
    assert "verdict: leaked" in said.out


def test_the_report_has_the_digests_of_both_files(folder, monkeypatch):
    monkeypatch.chdir(folder)
    asked = ["attack", "before.pt", "leaked.pt", *SHAPE, "--model", "own:network"]
    assert main([*asked, "--report", "page.html"]) == 1
    page = (folder / "page.html").read_text()
    for name in ("before.pt", "leaked.pt"):
        assert sha256((folder / name).read_bytes()).hexdigest() in page


def test_an_interrupted_run_is_no_verdict(folder, monkeypatch):
    def stops(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    monkeypatch.setattr("dlm_core.harness.audit.audit", stops)
    assert main(["attack", "before.pt", "leaked.pt"]) == 130
