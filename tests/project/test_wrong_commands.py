"""Wrong command lines: each ends in one line that says why, in exit status 2 (of ``attack`` in 64,
since 2 is a verdict), and nothing runs.
"""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from dlm_core import data, federated, models, records
from dlm_core.__main__ import main
from dlm_core.harness import sweeps
from dlm_core.harness.paths import REPOSITORY
from dlm_core.project import bench, environment, kernel, lessons

HUGE = "1" + 400 * "0"
NO_NUMBER = ["", "x", "1.5", "nan", "1e3", "0x1"]
NO_COUNT = [*NO_NUMBER, "0", "-1"]
NO_DEVICE = ["", "gpu", *([] if torch.cuda.is_available() else ["cuda"])]
NO_FOLDER = ["", "a file", "a file/below", str(REPOSITORY), "/proc/none"]
NO_FOLDER += [str(REPOSITORY / name) for name in ("notebooks", "dlm_core/harness", ".git")]
FILES = ["before.pt", "after.pt"]
SHAPE = ["--image-shape", "1,8,8"]

# {command: (what it needs besides, {option: its wrong values})}
WRONG = {
    "figures": (
        [],
        {
            "--profile": ["", "quik", "QUICK", "all", "1"],
            "--only": ["", ",", "77", "01_attack_compared", "01,77", "../00_quickstart", "dlm"],
            "--set": ["", "papers", "01"],
            "--jobs": [*NO_COUNT, "5000", HUGE],
            "--device": NO_DEVICE,
            "--out": NO_FOLDER,
            "--scheduler": ["", "nowhere", "tcp://", "tcp://127.0.0.1:9", "http://127.0.0.1:9"],
        },
    ),
    "figures --only 03": (
        [],
        {
            "--parameter": [
                *("", " ", "seeds", "seeds=", "=3", "2=3", "seeds=1 seeds=2", "seed=100"),
                *("seeds=1 seed=2", "images=many", "images=1.5", "images=True", "images=[1]"),
                *("profile=paper", "errors=1.0", "errors=['a']", "errors=[1.0", "source=3"),
            ],
        },
    ),
    "figures --only 01": (
        [],
        {
            "--parameter": [
                "published_evaluations=3",
                "published_evaluations={'lenet': 1}",
                "published_evaluations={'lenet': 1, 'mlp': 1, 'ig': 1, 'resnet': 1}",
                "published_evaluations={'lenet': 'a', 'mlp': 1, 'ig': 1}",
            ],
        },
    ),
    "verify": (
        [],
        {
            "--profile": ["", "quik", "all"],
            "--only": ["", ",", "77", "01,77"],
            "--set": ["", "papers"],
            "--jobs": [*NO_COUNT, "5000", HUGE],
            "--device": NO_DEVICE,
            "--against": ["", "absent", "a file", "folder.png", "of paper"],
            "--out": [*NO_FOLDER, str(REPOSITORY / "figures")],
            "--parameter": ["seeds=1"],
            "": ["figures"],
        },
    ),
    "verify --profile paper": ([], {"--out": [str(REPOSITORY / "figures")]}),
    "verify --no-run": ([], {"--against": ["absent"], "--out": ["", "absent", "a file"]}),
    "test": ([], {"--only": ["01"]}),
    "site": ([], {"--out": NO_FOLDER, "--theme": ["x"]}),
    "assignment": ([], {"--out": NO_FOLDER}),
    "assignment-check": ([], {"--only": ["01"], "": ["01"]}),
    "lessons": ([], {"--only": ["", "zzz", "01_gradients_remember_their_data.ipynb", "/"]}),
    "lab": ([], {"--port": ["1"]}),  # what Jupyter is to have stands after --
    "animation": ([], {"--out": NO_FOLDER, "": ["x"]}),
    "env": ([], {"--force": ["x"], "": ["x"]}),
    "bench": (
        [],
        {
            "--num-images": [*NO_NUMBER, "-1", "21", HUGE],
            "--images": ["-1", "21"],
            "--peer-images": [*NO_NUMBER, "-1"],
            "--device": NO_DEVICE,
        },
    ),
    "clean": ([], {"--al": [], "--a": [], "--everything": [], "": ["build"]}),
    "attack": (
        [*FILES, *SHAPE],
        {
            "--model": [
                *(
                    "",
                    "lennet",
                    "LeNet",
                    "mlp",
                    "resnet18",
                    ":",
                    "mine:",
                    ":network",
                    "a b:network",
                ),
                *("absent:network", "mine:absent", "mine:number", "mine:raises", "mine:nothing"),
                *(
                    "mine:needs",
                    "breaks:network",
                    "leaves:network",
                    "mine:other",
                    "../mine:network",
                ),
            ],
            "--json": ["", ".", "nowhere/a.json", "a file/a.json", "before.pt", "./after.pt"],
            "--report": ["", "folder.png", "/proc/a.html", "nowhere/a.html", "before.pt"],
            "--image-shape": [
                *("", "x", "8", "8,8", "1,8,8,8", "1,8,0", "0,8,8", "-1,8,8", "1,8,8.5", "1x8x8"),
                *(",1,8,8", "1, 8, 8", "3,8,8", "1,80,80", "1,4000,4000", "3,100000,100000"),
                *(f"1,8,{HUGE}", "1,8," + 5000 * "9"),
            ],
            "--num-classes": [*NO_COUNT, "1", "7", "10000000", HUGE],
            "--num-images": [*NO_COUNT, "1000000000", HUGE],
            "--images": ["0", "x"],
            "--minutes": ["", "0", "-1", "nan", "inf", "two"],
            "--device": NO_DEVICE,
            "--attack": ["", "dlm_pluss", "grey", "ALL", "exact,dlm_plus"],
            "--client": ["", "adan", "Adam", "3"],
            "--normalise": [
                *(
                    "",
                    "imagnet",
                    "0.5",
                    "0.5/0",
                    "0.5/x",
                    "0.1,0.2/0.3",
                    "range=1,0",
                    "range=0.1,1",
                ),
                *("range=-1,nan", "0.1307,0.3081", "imagenet", "nan/1"),
            ],
            "--out": [
                *("", ".", "found", "found.xyz", "found.pngs", "folder.png", "nowhere/found.png"),
                *("a file/found.png", "/proc/found.png"),
            ],
            "--no-such-option": ["x"],
            "--mod": ["mlp"],
            "": ["third.pt"],
        },
    ),
    "attack --json a.json": ([*FILES, *SHAPE], {"--report": ["a.json", "./a.json"]}),
    "attack --attack exact": ([*FILES, *SHAPE], {"--client": ["sgd"]}),
    "attack --images 2": ([*FILES, *SHAPE], {"--attack": ["exact", "interval_dlm"]}),
    "attack before.pt": (
        SHAPE,
        {
            "": [
                *("absent.pt", "absent.safetensors", "folder.png", "a file", "empty.pt"),
                *("other.pt", "nan.pt", "numbers.pt", "vast.pt"),
                *("compressed.pt", "a file/below"),
            ]
        },
    ),
    "": ([], {"": ["", "figure", "attak", "--versio", "--help-me"]}),
}


def command_lines():
    yield []
    yield ["attack"]
    yield ["attack", "before.pt"]
    for command, (others, options) in WRONG.items():
        for option, values in options.items():
            # Values may begin with a dash, or be empty.
            chosen = [[f"{option}={value}"] if option else [value] for value in values]
            for given in chosen or [[option]]:
                after = (others, given) if option else (given, others)
                yield [*command.split(), *after[0], *after[1]]
            if option and values and command:
                yield [*command.split(), *others, option]  # without its value


LINES = list(command_lines())
OWN = {  # modules of a user's
    "mine": """
from torch import nn
number = 3
def network(): return nn.Linear(1, 1)
def raises(): raise RuntimeError("no such\nnetwork")
def nothing(): return None
def needs(width): return nn.Linear(width, 1)
def other(image_shape): return nn.Sequential(nn.Flatten(), nn.Linear(image_shape[0], 10))
""",
    "breaks": "1 / 0",
    "leaves": "raise SystemExit(0)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Snapshots of a client, files that are none, and places where nothing can be written."""
    here = tmp_path_factory.mktemp("here")
    images, labels, *_ = data.load("digits", n=1)
    model = models.build("lenet", (1, 8, 8), 10, seed=0)
    seen = federated.train_locally(model, images, labels, learning_rate=0.05)
    state = model.state_dict()
    for name, content in {
        "before": state,
        "after": seen.weights_after,
        "other": models.build("mlp", (1, 8, 8), 10).state_dict(),
        "nan": {**state, "7.bias": torch.full((10,), float("nan"))},
        "numbers": [1, 2, 3],
        "vast": {**state, "0.weight": torch.zeros(1).expand(10**6, 10**6)},
    }.items():
        torch.save(content, here / f"{name}.pt")
    write_compressed(here)
    (here / "empty.pt").touch()
    for name, text in OWN.items():
        (here / f"{name}.py").write_text(text)
    (here / "a file").write_text("no folder, and no weights")
    (here / "folder.png").mkdir()
    of_paper = here / "of paper"
    of_paper.mkdir()
    claims = json.loads((REPOSITORY / "figures" / "claims.json").read_text("utf-8"))
    claims = {name: {**entry, "profile": "paper"} for name, entry in claims.items()}
    (of_paper / "claims.json").write_text(json.dumps(claims))
    return here


def write_compressed(here):
    with (
        zipfile.ZipFile(here / "before.pt") as plain,
        zipfile.ZipFile(here / "compressed.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))


@pytest.fixture
def idle(folder, monkeypatch):
    """The folder, in which nothing may run: no process, no kernel, no measurement, no attack; and
    nothing is removed.
    """

    def began(*given, **named):
        raise AssertionError("it began")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sweeps, "PATIENCE", "100ms")
    for module, name in (
        *((subprocess, "Popen"), (shutil, "rmtree"), (kernel, "own"), (environment, "ensure")),
        *((lessons, "run"), (lessons, "students"), (records.Attack, "__call__")),
        *((bench, "ProcessPoolExecutor"), (bench, "threads"), (bench, "cost_of_steps")),
    ):
        monkeypatch.setattr(module, name, began)
    return folder


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line)[:60])
def test_a_wrong_command_is_refused_in_a_line_and_nothing_runs(line, idle, capsys):
    before = {path: path.stat().st_mtime_ns for path in idle.rglob("*")}
    status = outcome(line)
    said = capsys.readouterr()
    assert status == (64 if line[:1] == ["attack"] else 2), (
        status,
        said.out[-300:],
        said.err[-300:],
    )
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and len(said.err) < 800
    assert "Traceback" not in said.err and said.out == ""
    assert {path: path.stat().st_mtime_ns for path in idle.rglob("*")} == before


def outcome(line):
    """The exit status of the command."""
    try:
        return main(line)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "x")]
)
def test_a_full_disk_is_a_sentence(tmp_path, capsys, monkeypatch, error):
    import nbformat

    def full(*given, **named):
        raise type(error)(error.errno, error.strerror, "lesson.ipynb")

    monkeypatch.setattr(nbformat, "write", full)
    assert main(["assignment", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {error.strerror}: lesson.ipynb\n"


def test_a_full_disk_at_the_end_of_an_attack_is_a_sentence(folder, capsys, monkeypatch):
    import torchvision.utils

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(torchvision.utils, "save_image", full)
    assert main(["attack", *FILES, *SHAPE, "--attack", "exact"]) == 1  # the verdict is not lost
    said = capsys.readouterr()
    why = "error: out 'reconstruction.png' could not be written: No space left on device"
    assert said.err == f"{why}\n" and "what it shows has leaked" in said.out
