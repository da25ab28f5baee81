"""Set-up on any machine: which Python, folders whose names have spaces, what make hands on."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from dlm_core.project import commands, environment

REPOSITORY = Path(__file__).parents[2]
TARGETS = ["figures", "verify", "test", "site", "assignment", "assignment-check", "lab", "bench"]


def pins(path):
    lines = (line.strip() for line in (REPOSITORY / path).read_text().splitlines())
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lists_of_pins_agree():
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert dict(line.split("==") for line in pip if "==" in line) == pins("requirements.txt")
    constraints = {normalised(name): version for name, version in pins("constraints.txt").items()}
    for name, version in pins("requirements.txt").items():
        assert constraints[normalised(name)] == version


def test_the_pythons_are_those_of_the_pins_wherever_they_are_named():
    lowest, beyond = environment.PYTHONS
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    (python,) = [each for each in conda if isinstance(each, str) and each.startswith("python=")]
    assert python == f"python={lowest[0]}.{lowest[1]}"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == f">={lowest[0]}.{lowest[1]}"
    assert project["tool"]["mypy"]["python_version"] == f"{lowest[0]}.{lowest[1]}"
    head = (REPOSITORY / "constraints.txt").read_text().splitlines()[0]
    assert f"for Python 3.{lowest[1]} to 3.{beyond[1] - 1}" in head


@pytest.mark.parametrize(
    "version", [(2, 7, 18), (3, 10, 13), (3, 11, 4), (3, 14), (3, 14, 1), (4, 0, 0)]
)
def test_a_python_that_the_pins_do_not_fit_is_refused_in_one_sentence(version):
    why = environment.refused(version)
    named = ".".join(map(str, version))
    assert why.startswith("the pinned packages are for Python 3.11.5 to 3.13")
    assert f"this is Python {named};" in why and "\n" not in why


@pytest.mark.parametrize("version", [(3, 11, 5), (3, 11, 7), (3, 12, 1), (3, 13, 0), (3, 13, 99)])
def test_a_python_that_they_fit_is_taken(version):
    assert environment.refused(version) is None


def test_a_refusal_comes_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PYTHONS", ((3, 98), (3, 99)))
    with pytest.raises(SystemExit, match="^error: the pinned packages are for Python 3.98 to 3.98"):
        environment.ensure(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_an_installation_that_fails_ends_in_one_sentence(tmp_path, monkeypatch):
    def fails(command, **options):
        raise subprocess.CalledProcessError(7, ["pip", "install"])

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(SystemExit, match=r"could not be made \(exit 7 of: pip install …\)"):
        environment.ensure(tmp_path / "venv")


@pytest.fixture
def elsewhere(tmp_path):
    """A checkout in a folder whose name has spaces and quotes, with an environment that only notes
    how it is called.
    """
    folder = tmp_path / "it's a folder"
    (folder / "notebooks").mkdir(parents=True)
    for name in ("Makefile", *environment.PINS, "notebooks/profiles.toml"):
        shutil.copy(REPOSITORY / name, folder / name)
    shutil.copytree(REPOSITORY / "dlm_core", folder / "dlm_core")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    note = f"import json, sys; json.dump(sys.argv[1:], open({str(folder / 'called')!r}, 'w'))"
    (folder / "note.py").write_text(note)
    call = shlex.join([sys.executable, str(folder / "note.py")])  # either may have spaces
    python.write_text(f'#!/bin/sh\nexec {call} "$@"\n')
    python.chmod(0o755)
    (folder / ".venv" / "pins").write_text(environment.digest(folder))
    return folder


def make(folder, *arguments):
    outer = ("SET", "PROFILE", "MAKEFLAGS", "MAKELEVEL")  # of a make that runs this test
    settings = {name: value for name, value in os.environ.items() if name not in outer}
    run = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(run, cwd=folder, env=settings, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_works_in_a_folder_whose_name_has_a_space(elsewhere, target):
    done = make(elsewhere, target)
    assert done.returncode == 0, done.stderr
    assert json.loads((elsewhere / "called").read_text())[:3] == ["-m", "dlm_core", target]


def test_make_lab_hands_arguments_on_to_jupyter(elsewhere):
    assert make(elsewhere, "lab", "ARGS=--no-browser --port=9999").returncode == 0
    called = json.loads((elsewhere / "called").read_text())
    assert called == ["-m", "dlm_core", "lab", "--", "--no-browser", "--port=9999"]


@pytest.mark.parametrize(("user", "more"), [(0, ["--allow-root"]), (1000, [])])
def test_lab_works_as_root_and_hands_arguments_on(monkeypatch, user, more):
    from dlm_core.__main__ import main

    started = []
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(commands, "_run", lambda *given: started.extend(given) or 0)
    assert main(["lab", "--", "--port=9999"]) == 0
    assert started == ["-m", "jupyter", "lab", "notebooks", *more, "--port=9999"]


def test_make_hands_on_what_it_is_given_whatever_is_in_it(elsewhere):
    given = {
        "ONLY": "03",
        "PARAMETER": "seeds=100 source='full' settings=[\"a b\"]",
        "OUT": 'a folder of "mine"',
        "PROFILE": "smoke",
        "SET": "all",
        "JOBS": "3",
        "SCHEDULER": "tcp://127.0.0.1:1",
    }
    done = make(elsewhere, "figures", *(f"{name}={value}" for name, value in given.items()))
    assert done.returncode == 0, done.stderr
    called = json.loads((elsewhere / "called").read_text())
    options = dict(zip(called[3::2], called[4::2], strict=True))
    names = {"--only": "ONLY", "--parameter": "PARAMETER", "--out": "OUT", "--profile": "PROFILE"}
    names |= {"--set": "SET", "--jobs": "JOBS", "--scheduler": "SCHEDULER"}
    assert options == {option: given[name] for option, name in names.items()}


def test_make_hands_on_what_a_verification_is_given(elsewhere):
    given = {"ONLY": "03", "OUT": 'a "folder"', "PROFILE": "smoke", "SET": "all", "JOBS": "3"}
    given |= {"AGAINST": "folder of another's"}
    done = make(elsewhere, "verify", *(f"{name}={value}" for name, value in given.items()))
    assert done.returncode == 0, done.stderr
    called = json.loads((elsewhere / "called").read_text())
    assert called[2] == "verify"
    options = dict(zip(called[3::2], called[4::2], strict=True))
    assert options == {f"--{name.lower()}": value for name, value in given.items()}


def test_help_env_and_clean_work_there_too(elsewhere):
    assert "make figures" in make(elsewhere, "help").stdout
    assert make(elsewhere, "env").returncode == 0
    (elsewhere / "build").mkdir()
    assert make(elsewhere, "clean").returncode == 0
    assert not (elsewhere / "build").exists() and (elsewhere / ".venv").exists()


def test_binder_installs_the_tested_versions():
    tested = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"][:2]
    binder = yaml.safe_load((REPOSITORY / "binder" / "environment.yml").read_text())
    assert binder["dependencies"] == tested
    script = (REPOSITORY / "binder" / "postBuild").read_text()
    assert "-r requirements.txt -c /tmp/constraints.txt" in script
    subprocess.run(["bash", "-n", REPOSITORY / "binder" / "postBuild"], check=True)
