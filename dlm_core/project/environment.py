"""Make the project's own environment, .venv in the repository, from the pins. Standard library
only, since it runs first.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from dlm_core.harness.paths import checkout

PINS = ("requirements.txt", "constraints.txt")
# The Pythons for which every pin has a wheel, and on which the artifact was tried: from the first,
# below the second. pyproject.toml, environment.yml and binder/ repeat what they need of it; a test
# compares them.
PYTHONS = ((3, 11, 5), (3, 14))


def refused(version: tuple[int, ...] | None = None) -> str | None:
    """One sentence that says why the pins do not fit this Python; None where they do.

    Parameters
    ----------
    version
        Of Python, as ``sys.version_info``; None means the one that runs.
    """
    this = version or sys.version_info[:3]
    lowest, beyond = PYTHONS
    if lowest <= this < beyond:
        return None
    newest = f"{beyond[0]}.{beyond[1] - 1}"
    return (
        f"the pinned packages are for Python {_dotted(lowest)} to {newest}, "
        f"and this is Python {_dotted(this)}; "
        f"name another, as make PYTHON=python{newest} or python{newest} -m dlm_core"
    )


def ensure(folder: Path | None = None) -> Path:
    """Return the environment's Python; make the environment first where it is absent or its pins
    have changed.

    Parameters
    ----------
    folder
        Of the environment; None means .venv in the repository.

    Raises
    ------
    SystemExit
        With one sentence, before anything is installed for a Python that the pins do not fit.
    """
    repository = checkout("env")
    why = refused()
    if why:
        raise SystemExit(f"error: {why}")
    folder = Path(folder or repository / ".venv")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "pins"
    pins = digest(repository)
    if python.exists() and stamp.exists() and stamp.read_text() == pins:
        return python
    print(
        f"Making the environment in {folder.name}/ from {' and '.join(PINS)}: "
        "several minutes and GB, once.",
        file=sys.stderr,
    )
    try:
        packages = _install(repository, folder, python)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"error: the environment could not be made (exit {error.returncode} of: "
            f"{' '.join(map(str, error.cmd[:5]))} …); what went wrong stands above; "
            "running the same command again starts afresh"
        ) from None
    # Notebooks import dlm_core from anywhere.
    (packages / "dlm_core_repository.pth").write_text(f"{repository}\n")
    stamp.write_text(pins)
    return python


def digest(repository: Path) -> str:
    """Names what is installed: the pins and this Python."""
    content = b"".join((repository / name).read_bytes() for name in PINS)
    return hashlib.sha256(content + sys.version.encode()).hexdigest()


def _install(repository: Path, folder: Path, python: Path) -> Path:
    """Make the environment afresh, and return the folder of its packages."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    quietly = ["-q", "--disable-pip-version-check", "--progress-bar", "off"]
    wanted, pinned = (str(repository / name) for name in PINS)
    chosen = ["-r", wanted, "-c", pinned, "--only-binary", ":all:"]
    subprocess.run(
        [python, "-m", "pip", "install", *quietly, *chosen], check=True, stdout=sys.stderr
    )
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-c", ask], text=True).strip())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
