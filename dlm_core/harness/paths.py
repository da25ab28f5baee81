"""Where this copy of ``dlm_core`` lies, and whether the repository lies around it."""

from __future__ import annotations

import os
from pathlib import Path

# In an installed copy: the folder of all packages.
REPOSITORY = Path(__file__).resolve().parents[2]
# Its folders that no command writes its output into.
OWN = ("dlm_core", "tests", "docs", "notebooks", "data", "binder", ".git")


def in_checkout() -> bool:
    """Whether the repository lies around this copy, rather than site-packages."""
    return (REPOSITORY / "notebooks" / "profiles.toml").is_file()


def checkout(what: str) -> Path:
    """The repository's folder, for ``what`` needs it.

    Raises
    ------
    FileNotFoundError
        Where this is an installed copy without it.
    """
    if in_checkout():
        return REPOSITORY
    raise FileNotFoundError(
        f"{what} needs a checkout of the repository, and dlm_core is installed in {REPOSITORY}; "
        "run it in the repository's folder, as python -m dlm_core"
    )


def home() -> Path:
    """Where figures and finished trials go by default: the repository, for an installed copy the
    current folder.
    """
    return REPOSITORY if in_checkout() else Path.cwd()


def writable(folder: Path) -> Path:
    """``folder``, made where it does not exist.

    Raises
    ------
    ValueError
        Where nothing can be written into it, or the repository's own files would be among what is.
    """
    refused = f"output folder {str(folder)!r} cannot be written"
    whole = folder.resolve()
    own = any(whole.is_relative_to(REPOSITORY / name) for name in OWN)
    if in_checkout() and (own or whole == REPOSITORY):
        raise ValueError(f"{refused}: the repository's own files are there; set OUT to another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{refused} ({error.strerror}); set OUT to another") from None
    return folder
