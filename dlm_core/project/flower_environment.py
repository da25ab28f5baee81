"""Flower in an environment of its own, .venv-flower/: some of its pins are older than ours. Torch
and all else that it does not bring are those of the Python that makes it.
"""

import hashlib
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from dlm_core.harness.flower import TESTED
from dlm_core.harness.paths import checkout

FOLDER = ".venv-flower"
PIN = f"flwr=={TESTED[-1]}"


def made() -> Path | None:
    """The Python of Flower's environment; None where it is not made, or was made of other pins."""
    folder = checkout("flower") / FOLDER
    stamp = folder / "pins"
    whole = stamp.is_file() and stamp.read_text(encoding="utf-8") == _pins()
    return folder / "bin" / "python" if whole else None


def environment() -> Path:
    """The same; it is made where it is not.

    Raises
    ------
    ChildProcessError
        Where Flower cannot be installed, with what to do.
    """
    python = made()
    if python is not None:
        return python
    folder = checkout("flower") / FOLDER
    print(f"Making Flower's environment in {FOLDER}/: a minute or a few, once.", file=sys.stderr)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as why:
        raise ChildProcessError(f"{FOLDER}/ could not be made: {why}") from None
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    # After its own packages, so that what Flower pins comes first.
    (packages / "artifact.pth").write_text(f"import site; site.addsitedir({_ours()!r})\n")
    quietly = ("-q", "--disable-pip-version-check", "--progress-bar", "off", "--no-warn-conflicts")
    done = subprocess.run(
        [python, "-m", "pip", "install", *quietly, "--only-binary", ":all:", PIN],
        stdout=sys.stderr,
    )
    if done.returncode:
        raise ChildProcessError(
            f"{PIN} could not be installed (above); it needs a package registry"
        )
    (folder / "pins").write_text(_pins(), encoding="utf-8")
    return python


def _ours() -> str:
    """The folder of packages that Flower's environment stands on."""
    return sysconfig.get_path("purelib")


def _pins() -> str:
    """Names what was installed, and on what."""
    return hashlib.sha256(json.dumps([PIN, _ours(), sys.version]).encode()).hexdigest()
