"""Make the project's own environment, .venv in the repository, from the pins. Standard library only, since it runs first."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from dlm_core.harness.paths import REPOSITORY

PINS = ("requirements.txt", "constraints.txt")


def ensure(folder=None):
    """Return the environment's Python; make the environment first where it is absent or its pins have changed."""
    if sys.version_info < (3, 11):
        raise SystemExit(
            f"Python {sys.version.split()[0]} is too old: the project needs 3.11 or newer (set PYTHON=python3.x)"
        )
    folder = Path(folder or REPOSITORY / ".venv")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "pins"
    pins = hashlib.sha256(b"".join((REPOSITORY / name).read_bytes() for name in PINS) + sys.version.encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == pins:
        return python
    print(
        f"Making the environment in {folder.name}/ from {' and '.join(PINS)}: several minutes and GB, once.", file=sys.stderr
    )
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--progress-bar", "off"]
        subprocess.run([*install, "-r", REPOSITORY / PINS[0], "-c", REPOSITORY / PINS[1]], check=True, stdout=sys.stderr)
        where = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"the environment could not be made (exit {error.returncode} of: {' '.join(map(str, error.cmd[:5]))} …); "
            "what went wrong stands above; running the same command again starts afresh"
        ) from None
    (Path(where.strip()) / "dlm_core_repository.pth").write_text(
        f"{REPOSITORY}\n"
    )  # notebooks import dlm_core from anywhere
    stamp.write_text(pins)
    return python
