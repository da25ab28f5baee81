"""One command, every figure: run the notebooks through papermill, show progress, and say what came
out.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from dlm_core import check
from dlm_core.harness import evidence, report
from dlm_core.harness.evidence import Verdict
from dlm_core.harness.interrupts import kept_from_workers
from dlm_core.harness.paths import REPOSITORY, checkout, writable
from dlm_core.project import kernel, paper
from dlm_core.project import parameters as cells

NOTEBOOKS = REPOSITORY / "notebooks"
PROFILES = ("smoke", "quick", "paper")
SETS = ("paper", "beyond", "all")
# Of the environment, that workers need as they are now.
SETTINGS = ("SCHEDULER", "JUPYTER_PATH")
MOST_JOBS = 4096


class Run(NamedTuple):
    """One notebook to run: where it is, where its executed version goes, its parameters' values,
    what the output calls it.
    """

    source: Path
    target: Path
    values: Mapping[str, Any]
    heading: str


def catalogue() -> dict[str, dict[str, Any]]:
    """{notebook name: its entry in notebooks/profiles.toml}: the set it belongs to and each
    profile's parameters.
    """
    return report.catalogue(NOTEBOOKS)


def choose(only: str | None = None, chosen_set: str = "paper") -> list[str]:
    """Names of the notebooks to run.

    Parameters
    ----------
    only
        A name, its number ("01") or several, comma-separated; None takes those of the set.
    chosen_set
        One of SETS.

    Raises
    ------
    ValueError
        For names that are unknown, with the near ones.
    """
    check.one_of("SET", chosen_set, SETS)
    entries = catalogue()
    if only is None:
        return [name for name, entry in entries.items() if chosen_set in ("all", entry["set"])]
    chosen = []
    for wanted in only.split(","):
        wanted = wanted.strip().removesuffix(".ipynb").removeprefix("notebooks/")
        by_number = [name for name in entries if name.split("_")[0] == wanted]
        if not by_number:
            check.one_of("notebook", wanted, entries)
        chosen += by_number or [wanted]
    return chosen


def run(
    profile: str = "quick",
    *,
    only: str | None = None,
    chosen_set: str = "paper",
    parameters: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    out: str | Path | None = None,
    scheduler: str | None = None,
    in_place: bool = False,
) -> list[str]:
    """Run the chosen notebooks under ``profile``; return the names of those that failed.

    Parameters
    ----------
    profile
        One of PROFILES.
    only, chosen_set
        Which notebooks, as for ``choose``.
    parameters
        {name: value} that replace those of the profile, as {"seeds": 100}; each chosen notebook
        must have them.
    jobs
        Worker processes; None means one per core.
    out
        Folder for figures and tables (default figures/); executed notebooks go to its subfolder
        notebooks/.
    scheduler
        Address of a Dask scheduler to run the trials on.
    in_place
        Replace the notebooks in notebooks/ by their executed versions, as they are committed.

    Raises
    ------
    ValueError, ConnectionError, FileNotFoundError
        For what cannot be run as asked, before anything runs.

    Notes
    -----
    A notebook that fails does not stop the others. Finished trials are kept in the store and never
    computed twice.
    """
    checkout("figures")
    check.one_of("PROFILE", profile, PROFILES)
    names = choose(only, chosen_set)
    asked = dict(parameters or {})
    for name in names if asked else ():
        cells.check_values(name, asked, defaults(name))
    figures = _prepare(profile, jobs, out, scheduler)
    began = time.time()
    runs = []
    for position, name in enumerate(names, 1):
        values = {**values_of(name, profile), **asked}
        target = figures / "notebooks" / f"{name}.ipynb"
        runs.append(
            Run(NOTEBOOKS / f"{name}.ipynb", target, values, f"[{position}/{len(names)}] {name}")
        )
    failed = []
    for each, (problem, seconds) in zip(runs, _outcomes(runs, profile)):
        name = each.source.stem
        if problem:
            failed.append(name)
            print(f"{each.heading}: FAILED after {seconds:.0f} s: {problem}", flush=True)
            continue
        print(f"{each.heading}: done in {seconds:.0f} s", flush=True)
        if stale := _untouched(figures, name, since=began):
            print(f"{each.heading}: left of an earlier run: {', '.join(stale)}", flush=True)
        _note_seconds(figures, name, seconds, but=stale)
        if in_place:
            shutil.copy(each.target, each.source)
    if figures == REPOSITORY / "figures":
        fill_readme(figures)
        paper.fill(figures)
    _summary(figures, names, failed, time.time() - began, profile)
    return failed


def defaults(name: str) -> dict[str, Any]:
    """{parameter: value} as they stand in a notebook's parameters cell."""
    return report.parameters(NOTEBOOKS / f"{name}.ipynb")


def values_of(name: str, profile: str) -> dict[str, Any]:
    """The values that a profile gives a notebook's parameters: those of quick, which names all that
    any profile changes, and its own instead.
    """
    return report.values_of(catalogue()[name], profile)


def _prepare(profile: str, jobs: int | None, out: str | Path | None, scheduler: str | None) -> Path:
    """Check the settings, hand them to the notebooks through the environment, and return the folder
    for figures.
    """
    if jobs is not None:
        check.fitting("JOBS", jobs, Annotated[int, check.Range(1, MOST_JOBS)])
    if profile == "smoke":
        jobs = jobs or 1  # its trials are over before workers have started
    for name, given in (("OUT", out), ("SCHEDULER", scheduler)):
        if given == "":
            raise ValueError(f"{name} is empty; leave it unset for the default")
    figures = writable(Path(out or REPOSITORY / "figures").resolve())
    scheduler = scheduler or os.environ.get("SCHEDULER")
    if scheduler:
        from dlm_core.harness import sweeps

        with sweeps.engine(scheduler, jobs=1):
            pass  # an unreachable scheduler is said now, not after the first notebook's start
    for name, value in {"DLM_FIGURES": figures, "DLM_JOBS": jobs, "SCHEDULER": scheduler}.items():
        if value:
            os.environ[name] = str(value)
    (figures / "notebooks").mkdir(exist_ok=True)
    return figures


def _outcomes(runs: list[Run], profile: str) -> Iterable[tuple[str | None, float]]:
    """What ``_execute`` returns of each run, in their order, as they finish.

    Smoke notebooks are all start-up: one per core runs. Others run in turn and share the cores by
    their trials.
    """
    import joblib

    workers = min(os.cpu_count() or 1, len(runs)) if profile == "smoke" else 1
    with kernel.own():
        settings = {n: v for n, v in os.environ.items() if n.startswith("DLM_") or n in SETTINGS}
        work = (joblib.delayed(_execute)(each, settings, workers == 1) for each in runs)
        if workers == 1:
            yield from joblib.Parallel(n_jobs=1, return_as="generator")(work)
            return
        with kept_from_workers():
            outcomes = joblib.Parallel(n_jobs=workers, return_as="generator")(work)
        yield from outcomes


def results_table(figures: Path | str) -> str:
    """The README's results in Markdown, from ``figures``/claims.json.

    One row per notebook, its title (what it finds) and how many claims hold, by what they are
    about; then each claim about a released experiment or the abstract that does not hold, with
    the numbers.
    """
    whose = {
        "released": "about a released experiment",
        "abstract": "about the abstract, as we read it",
        "ours": "ours alone",
    }
    rows = [
        f"| what we find | {' | '.join(whose.values())} | profile |",
        "|---|---|---|---|---|",
    ]
    failed: dict[str, list[str]] = {"released": [], "abstract": []}
    for name, entry in sorted(report.read_json(Path(figures) / "claims.json").items()):
        claims = entry["claims"]
        link = f"{name[:2]}. [{title(NOTEBOOKS / f'{name}.ipynb')}](notebooks/{name}.ipynb)"
        counts = " | ".join(evidence.summary(claims, each) for each in whose)
        rows.append(f"| {link} | {counts} | {entry['profile']} |")
        for claim in claims:
            if claim["whose"] in failed and claim["verdict"] == Verdict.FAILS:
                statement = f"{name[:2]}. {claim['statement']}"
                cells = statement, claim["evidence"], claim["cause"]
                failed[claim["whose"]].append(report.row(cells))
    page = ["Claims that hold, of how many, by what they are about:", "", *rows]
    said = {
        "released": "Sentences of ours on what to expect of the released experiments, each in its "
        "own setting, that do not hold:",
        "abstract": "What does not hold of the abstract, as we read it, in a setting of ours:",
    }
    for each, lines in failed.items():
        if lines:
            head = ["| claim | found | likely cause |", "|---|---|---|"]
            page += ["", said[each], "", *head, *lines]
    return "\n".join(page)


def title(path: Path) -> str:
    """A notebook's title: the first line of its first cell."""
    return _read(path)["cells"][0]["source"].splitlines()[0].lstrip("# ")


def fill_readme(figures: Path, readme: Path = REPOSITORY / "README.md") -> None:
    """Put the results table between the README's markers."""
    table = results_table(figures)
    with report.locked(readme):
        text = readme.read_text(encoding="utf-8")
        between = r"(<!-- results -->\n).*?(\n<!-- /results -->)"
        filled = re.sub(between, lambda m: m[1] + table + m[2], text, flags=re.DOTALL)
        if filled != text:
            report.write_atomically(readme, filled)


def _execute(
    run: Run, settings: Mapping[str, str], show_progress: bool
) -> tuple[str | None, float]:
    """Run one notebook; return (None or one line that says what went wrong, seconds)."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    started, problem = time.time(), None
    os.environ.update(settings)  # a worker process may be older than they are
    with tempfile.TemporaryDirectory() as scratch:
        progress = Path(scratch, "progress")
        os.environ["DLM_PROGRESS"] = str(progress)
        finished = threading.Event()
        watcher = threading.Thread(
            target=_watch, args=(progress, run.heading, finished), daemon=True
        )
        if show_progress:
            watcher.start()
        quiet = {"progress_bar": False, "log_output": False, "extra_arguments": kernel.QUIET}
        where = {"kernel_name": kernel.NAME, "cwd": REPOSITORY}
        try:
            source = _with_values(run, Path(scratch))
            papermill.execute_notebook(source, run.target, **where, **quiet)
            _tidy(run.target)
        except PapermillExecutionError as error:
            seen = f"(see {run.target.name} in {run.target.parent.name}/)"
            problem = f"cell {error.exec_count}: {error.ename}: {error.evalue} {seen}"
        # A kernel that dies or a notebook that cannot be read must not stop the others.
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            finished.set()
            if show_progress:
                watcher.join()
            os.environ.pop("DLM_PROGRESS", None)
    return problem, time.time() - started


def _with_values(run: Run, folder: Path) -> Path:
    """A copy of the notebook whose parameters cell has the run's values: no second cell overrides
    the one that a reader edits.
    """
    notebook = _read(run.source)
    cell = cells.cell_of(notebook)
    cell["source"] = cells.write(cell["source"], run.values)
    copy = folder / run.source.name
    copy.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")
    return copy


def _watch(path: Path, heading: str, finished: threading.Event) -> None:
    """Show the trials of the notebook under way, with the time left."""
    from tqdm import tqdm

    bar = None
    while not finished.wait(0.5):
        if path.exists():
            done, total = map(int, path.read_text().split())
            if bar is None or total != bar.total or done < bar.n:
                if bar is not None:
                    bar.close()
                often = 1 if sys.stderr.isatty() else 20
                look = {
                    "unit": "trial",
                    "mininterval": often,
                    "leave": False,
                    "dynamic_ncols": True,
                }
                bar = tqdm(total=total, initial=done, desc=heading, **look)
            bar.update(done - bar.n)
    if bar is not None:
        bar.close()


def _read(path: Path) -> dict[str, Any]:
    """A notebook, with the source of each cell as one text."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def _tidy(path: Path) -> None:
    """Drop what papermill notes about this machine and moment, so that the same run leaves the same
    notebook.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"].pop("papermill", None)
    for cell in notebook["cells"]:
        for name in ("papermill", "execution"):
            cell["metadata"].pop(name, None)
    place_setting(notebook)
    report.write_atomically(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def place_setting(notebook: dict[str, Any]) -> None:
    """Put the sentence "Setting: …", which a cell has shown, under the notebook's title."""
    shown = [text for cell in notebook["cells"] for text in _markdown(cell)]
    sentence = next((text for text in shown if text.startswith("Setting: ")), None)
    if sentence is None:
        return
    title, *rest = "".join(notebook["cells"][0]["source"]).split("\n")
    if rest[1:2] and rest[1].startswith("*Setting: "):
        rest = rest[2:]
    lines = [title, "", f"*{sentence}*", *rest]
    notebook["cells"][0]["source"] = "\n".join(lines).splitlines(keepends=True)


def _markdown(cell: dict[str, Any]) -> list[str]:
    """The outputs of a cell that are Markdown."""
    data = [output.get("data", {}) for output in cell.get("outputs", [])]
    return ["".join(each["text/markdown"]) for each in data if "text/markdown" in each]


def _untouched(figures: Path, name: str, since: float) -> list[str]:
    """The files of notebook ``name`` that stand in the manifest and are older than ``since``, in
    seconds since the epoch: a profile or a missing package may draw fewer.
    """
    manifest = report.read_json(figures / "manifest.json")
    files = [file for file, entry in manifest.items() if entry["notebook"] == name]
    kept = [file for file in files if (figures / file).exists()]
    return [file for file in kept if (figures / file).stat().st_mtime < since]


def _note_seconds(figures: Path, name: str, seconds: float, but: Iterable[str]) -> None:
    """Note how long the notebook took in the manifest, but for files that it did not write."""
    with report.shared(figures / "manifest.json") as manifest:
        for file, entry in manifest.items():
            if entry["notebook"] == name and file not in but:
                entry["seconds"] = round(seconds, 1)


def _summary(
    figures: Path, names: list[str], failed: list[str], seconds: float, profile: str
) -> None:
    claims = report.read_json(figures / "claims.json")
    done = len(names) - len(failed)
    took = f"{done} of {len(names)} notebooks in {seconds / 60:.1f} min"
    print(f"\n{took}. Figures and tables: {figures}")
    few = ", which has few trials to judge by (those committed are in figures/claims.md)"
    print(f"Claims under the profile {profile}{'' if profile == 'paper' else few}:")
    for name in names:
        for claim in claims.get(name, {}).get("claims", []):
            print(f"  {name.split('_')[0]}  {claim['verdict']:>13}: {claim['statement']}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
