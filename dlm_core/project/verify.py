"""Do the results come out again? Run the notebooks once more, without a stored trial, and compare.

What is compared with: ``figures/`` under the profile of what is committed; under the others the
first verification's results, which it keeps for that.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from dlm_core import check
from dlm_core.harness import report
from dlm_core.harness.paths import REPOSITORY, checkout, writable
from dlm_core.project import reproduce
from dlm_core.project.compare import Difference, compare, results, tables

FIGURES = REPOSITORY / "figures"
BUILD = REPOSITORY / "build" / "verify"
COMMITTED = "paper"
# In a folder of results, of an interrupted verification alone.
STORE = ".verify"
# What the last bits depend on: where all of it is the reference's, every digit has to be too.
MACHINE = ("processor", "blas", "threads", "versions")


def verify(
    profile: str = "quick",
    *,
    only: str | None = None,
    chosen_set: str = "paper",
    jobs: int | None = None,
    against: str | Path | None = None,
    out: str | Path | None = None,
    run: bool = True,
) -> bool:
    """Run the chosen notebooks again, compare with the reference, and print what differs.

    Parameters
    ----------
    profile
        One of ``reproduce.PROFILES``.
    only, chosen_set, jobs
        As for ``reproduce.run``.
    against
        Folder of figures that is the reference. By default, figures/ for the profile of what is
        committed; for others build/verify/PROFILE/reference, where a notebook that it lacks is
        recorded.
    out
        Folder for the run's own figures (default build/verify/PROFILE/now).
    run
        False compares what lies in ``out`` already.

    Returns
    -------
    bool
        Whether every notebook ran and every value is the reference's, or within its tolerance.

    Raises
    ------
    ValueError
        For what cannot be compared as asked, before anything runs.
    """
    checkout("verify")
    check.one_of("PROFILE", profile, reproduce.PROFILES)
    names = list(dict.fromkeys(reproduce.choose(only, chosen_set)))
    if jobs is not None:
        check.fitting("JOBS", jobs, Annotated[int, check.Range(1, reproduce.MOST_JOBS)])
    for option, given in (("AGAINST", against), ("OUT", out)):
        if given == "":
            raise ValueError(f"{option} is empty; leave it unset for the default")
    ours = BUILD / profile / "reference"
    kept = FIGURES if profile == COMMITTED else ours
    reference = Path(against).resolve() if against is not None else kept
    now = Path(out or BUILD / profile / "now").resolve()
    new = [name for name in names if run and reference == ours and not _has(ours, name)]
    known = [name for name in names if name not in new]
    _comparable("the reference" if against is None else "AGAINST", reference, known, profile)
    if now in (reference, FIGURES):
        raise ValueError(f"OUT is {str(now)!r}, which is compared with; set OUT to another folder")
    if not run:
        _comparable("OUT", now, known, profile)
        return _compared(reference, now, known)
    writable(now)
    failed = _recorded(ours, new, profile, jobs) if new else []
    if known:
        print(f"Running {len(known)} again, to compare with {reference}")
        failed += _run(now, known, profile, jobs)
    passed = _compared(reference, now, [name for name in known if name not in failed])
    if failed:
        print(f"FAILED, and not compared: {', '.join(failed)}")
    return passed and not failed


def _recorded(folder: Path, names: list[str], profile: str, jobs: int | None) -> list[str]:
    """Run notebooks that have no reference yet, as what later runs are compared with."""
    print(
        f"No results of the profile {profile} are committed: this first run of {len(names)} is "
        f"kept as the reference, in {folder}. The same command compares with it from now on."
    )
    failed = _run(folder, names, profile, jobs)
    _forget(folder, failed)
    return failed


def _run(folder: Path, names: Sequence[str], profile: str, jobs: int | None) -> list[str]:
    """Run notebooks into a folder, with a store of their own; return those that failed.

    The store lives as long as the run, over interrupts: the next verification computes all again.
    """
    store = writable(folder) / STORE
    if store.exists():
        print(f"It goes on from an interrupted one; remove {store} to run all of it again")
    _forget(folder, names)
    os.environ["DLM_STORE"] = str(store)
    failed = reproduce.run(profile, only=",".join(names), jobs=jobs, out=folder)
    print()
    if not failed:
        shutil.rmtree(store, ignore_errors=True)
    return failed


def _forget(folder: Path, names: Iterable[str]) -> None:
    """Remove former results: what a notebook no longer writes would pass for new."""
    with report.shared(folder / "claims.json") as claims:
        for name in names:
            claims.pop(name, None)
            for path in tables(folder, name):
                path.unlink()


def _has(folder: Path, name: str) -> bool:
    return name in report.read_json(folder / "claims.json")


def _comparable(what: str, folder: Path, names: Sequence[str], profile: str) -> None:
    """Raise ValueError where a folder lacks one of these notebooks, or has it at other sizes."""
    try:
        claims = report.read_json(folder / "claims.json")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what} is {str(folder)!r}, whose claims cannot be read: {error}"
        ) from None
    for name in names:
        if name not in claims:
            raise ValueError(
                f"{what} is {str(folder)!r}, without results of {name}; it takes a folder that "
                f"`make figures PROFILE={profile} ONLY={name[:2]} OUT=folder` wrote"
            )
        if claims[name]["profile"] != profile:
            raise ValueError(
                f"{what} is {str(folder)!r}, which holds {name} under the profile "
                f"{claims[name]['profile']!r} and not {profile!r}; compare runs of one profile"
            )


def _compared(reference: Path, now: Path, names: Sequence[str]) -> bool:
    """Print each notebook's outcome, and both machines; return whether nothing differs."""
    outcomes: dict[str, list[str]] = {}
    sides = {
        folder: {name: _provenance(folder, name) for name in names} for folder in (reference, now)
    }
    for said, folder in (("reference", reference), ("now", now)):
        for described, those in _grouped(sides[folder]).items():
            print(f"{said:>9}: {described} ({', '.join(name[:2] for name in those)})")
    for name in names:
        other = unlike(sides[reference][name], sides[now][name])
        found = compare(reference, now, name, identical=not other)
        word, lines = outcome(found, sum(map(len, _rows(reference, name))), other)
        outcomes.setdefault(word, []).append(name)
        print(f"{name}: {lines}")
    if names:
        print("; ".join(f"{len(those)} {word}" for word, those in outcomes.items()))
    return "DIFFERENT" not in outcomes


def outcome(found: Sequence[Difference], count: int, other: Sequence[str]) -> tuple[str, str]:
    """(the word for a notebook's comparison, what is said of it).

    Parameters
    ----------
    found
        What ``compare`` returns.
    count
        Of the values compared.
    other
        What is not the same of the two machines: tolerances apply where there is something.
    """
    if not found:
        return "the same", f"the same, all {count} values"
    beyond = [each for each in found if each.moved > 1]
    if not beyond:
        most = max(found, key=lambda each: each.moved)
        return "within tolerance", (
            f"within tolerance, {len(found)} of {count} values differ, most of all, by "
            f"{most.moved:.2g} of what is allowed: {most}"
        )
    where = f"beyond tolerance, on another machine ({', '.join(other)})"
    head = f"DIFFERENT {where if other else 'on the same machine'}, {len(beyond)} of {count} values"
    return "DIFFERENT", "\n  ".join([head, *map(str, beyond)])


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What of MACHINE two runs do not have in common, or have not recorded, and the device that one
    of them names.
    """
    found = [name for name in MACHINE if name not in one or one[name] != other.get(name)]
    return found + ["device"] * (one.get("device") != other.get("device"))


def _rows(folder: Path, name: str) -> list[Mapping[str, str]]:
    return [row for rows in results(folder, name).values() for row in rows]


def _provenance(folder: Path, name: str) -> dict[str, Any]:
    """What the manifest says of a notebook's tables."""
    manifest = report.read_json(folder / "manifest.json")
    return next((manifest[p.name] for p in tables(folder, name) if p.name in manifest), {})


def _grouped(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """{a run in words: the notebooks of it}."""
    found: dict[str, list[str]] = {}
    for name, about in entries.items():
        found.setdefault(_described(about), []).append(name)
    return found


def _described(about: Mapping[str, Any]) -> str:
    machine = f"{about.get('machine', 'a machine')}, processor and BLAS not recorded"
    if "processor" in about:
        machine = (
            f"{about['processor']}, {about['cores']} cores, {about['threads']} threads; "
            f"{about['blas']}"
        )
    if "device" in about:
        machine += f"; trials on {about['device']}"
    versions = ", ".join(f"{key} {value}" for key, value in about.get("versions", {}).items())
    revision, dash, dirty = about.get("revision", "unknown").partition("-")
    return (
        f"{machine}; revision {revision[:12]}{dash}{dirty}; {versions or 'versions not recorded'}"
    )
