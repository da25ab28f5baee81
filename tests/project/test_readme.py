"""What the README shows: its code runs as it stands, and prints what stands below it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
ROUNDING = re.compile(r"\de-\d\d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder with the README's two files, after the client's step."""
    place = tmp_path_factory.mktemp("own")
    network, client = blocks("python")[:2]
    (place / "own.py").write_text(network)
    (place / "client.py").write_text(client)
    subprocess.run([sys.executable, "client.py"], cwd=place, check=True)
    return place


def blocks(language):
    """The README's blocks of code in a language, from the top."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for named, text in fences if named == language]


def test_the_audit_prints_what_the_readme_shows(folder):
    (command,) = [each for each in blocks("sh") if "dlm_core attack" in each]
    (shown,) = blocks("")
    arguments = command.split()[1:]
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert ROUNDING.sub("N", done.stdout) == ROUNDING.sub("N", shown)
    assert (folder / "audit.html").exists() and (folder / "reconstruction.png").exists()


def test_the_attack_in_python_shows_the_image(folder):
    (attack,) = [each for each in blocks("python") if "attacks.dlm_plus" in each]
    run = [sys.executable, "-c", attack]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=True)
    psnr, status = done.stdout.split()
    assert float(psnr) > 30 and status == "converged"
