"""Where this copy of ``dlm_core`` lies, and whether the repository lies around it."""

from __future__ import annotations

import os
import secrets
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
        probe(folder)
    except OSError as error:
        raise ValueError(f"{refused} ({error.strerror}); set OUT to another") from None
    return folder


def probe(folder: Path) -> None:
    """Make a folder where it does not exist; OSError where nothing can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".writable-{secrets.token_hex(8)}"
    file.touch()
    file.unlink()


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace a file in one step, so that an interrupt leaves the old one or the new one, whole;
    of several processes that write it, one is the last.
    """
    path = Path(path)
    # A name of its own: a process, or another thread of this one, may be writing the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
