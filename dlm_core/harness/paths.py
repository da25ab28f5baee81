"""Where this copy of ``dlm_core`` lies, and whether the repository lies around it."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]  # in an installed copy: the folder of all packages


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
