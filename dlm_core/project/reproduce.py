"""One command, every figure: run the notebooks through papermill, show progress, and say what came out."""

import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path

import joblib
import papermill
from papermill.exceptions import PapermillExecutionError

from dlm_core import check
from dlm_core.harness import report
from dlm_core.harness.paths import REPOSITORY
from dlm_core.project.lessons import QUIET

NOTEBOOKS = REPOSITORY / "notebooks"
PROFILES = ("smoke", "quick", "paper")
SETS = ("paper", "beyond", "all")


def catalogue():
    """{notebook name: its entry in notebooks/profiles.toml}: the set it belongs to and each profile's parameters."""
    return tomllib.loads((NOTEBOOKS / "profiles.toml").read_text(encoding="utf-8"))


def choose(only=None, chosen_set="paper"):
    """Names of the notebooks to run. ``only`` is a name, its number ("01") or several, comma-separated.

    Raises ValueError for names that are unknown, with the near ones.
    """
    check.one_of("SET", chosen_set, SETS)
    entries = catalogue()
    if not only:
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
    profile="quick", *, only=None, chosen_set="paper", parameters=None, jobs=None, out=None, scheduler=None, in_place=False
):
    """Run the chosen notebooks under ``profile``; return the names of those that failed.

    parameters  {name: value} that replace those of the profile, as {"seeds": 100}; each chosen notebook must have them.
    out         folder for figures and tables (default figures/); executed notebooks go to its subfolder notebooks/.
    in_place    replace the notebooks in notebooks/ by their executed versions, as they are committed.

    A notebook that fails does not stop the others. Finished trials are kept in the store and never computed twice.
    """
    check.one_of("PROFILE", profile, PROFILES)
    names = choose(only, chosen_set)
    for name in names if parameters else ():
        for parameter in parameters:
            check.one_of(f"parameter of {name}", parameter, papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb"))
    figures = _prepare(profile, jobs, out, scheduler)
    began, runs = time.time(), []
    for position, name in enumerate(names, 1):
        values = {"profile": profile, **catalogue()[name][profile], **(parameters or {})}
        source, target = NOTEBOOKS / f"{name}.ipynb", figures / "notebooks" / f"{name}.ipynb"
        runs.append((source, target, values, f"[{position}/{len(names)}] {name}"))
    # Smoke notebooks are all start-up: run one per core. Others run in turn and share the cores by their trials.
    workers = min(os.cpu_count(), len(runs)) if profile == "smoke" else 1
    settings = {name: value for name, value in os.environ.items() if name.startswith("DLM_") or name == "SCHEDULER"}
    execute = joblib.delayed(_execute)
    outcomes = joblib.Parallel(n_jobs=workers, return_as="generator")(
        execute(*each, settings, workers == 1) for each in runs
    )
    failed = []
    for name, (source, target, _, heading), (problem, seconds) in zip(names, runs, outcomes):
        if problem:
            failed.append(name)
            print(f"{heading}: FAILED after {seconds:.0f} s: {problem}", flush=True)
            continue
        print(f"{heading}: done in {seconds:.0f} s", flush=True)
        _note_seconds(figures, name, seconds)
        if in_place:
            shutil.copy(target, source)
    if figures == REPOSITORY / "figures":
        fill_readme(figures)
    _summary(figures, names, failed, time.time() - began, profile)
    return failed


def _prepare(profile, jobs, out, scheduler):
    """Check the settings, hand them to the notebooks through the environment, and return the folder for figures."""
    if jobs is not None:
        check.at_least("JOBS", jobs, 1)
    if profile == "smoke":
        jobs = jobs or 1  # its trials are over before workers have started
    figures = Path(out or REPOSITORY / "figures").resolve()
    for name, value in {"DLM_FIGURES": figures, "DLM_JOBS": jobs, "SCHEDULER": scheduler}.items():
        if value:
            os.environ[name] = str(value)
    report.folder()
    if os.environ.get("SCHEDULER"):
        from dlm_core.harness import sweeps

        with sweeps.engine(os.environ["SCHEDULER"], jobs=1):
            pass  # an unreachable scheduler is said now, not after the first notebook's start
    (figures / "notebooks").mkdir(exist_ok=True)
    return figures


def results_table(figures):
    """The README's results in Markdown, from ``figures``/claims.json: one row per notebook, its title (what it finds) and how
    many claims hold; then each claim of the paper that does not hold, with the numbers."""
    rows = ["| what we find | command | the paper's claims that hold | ours that hold | profile |", "|---|---|---|---|---|"]
    failed = ["| the paper's claim | on our data | likely cause |", "|---|---|---|"]
    for name, entry in sorted(report.read_json(Path(figures) / "claims.json").items()):
        link = f"{name[:2]}. [{title(NOTEBOOKS / f'{name}.ipynb')}](notebooks/{name}.ipynb)"
        held = [[c["verdict"] == "holds" for c in entry["claims"] if c["source"] == whose] for whose in ("paper", "ours")]
        counts = " | ".join(f"{sum(each)} of {len(each)}" if each else "–" for each in held)
        rows.append(f"| {link} | `make figures ONLY={name[:2]}` | {counts} | {entry['profile']} |")
        failed += [
            f"| {name[:2]}. {claim['statement']} | {claim['evidence']} | {claim['cause']} |"
            for claim in entry["claims"]
            if claim["source"] == "paper" and claim["verdict"] != "holds"
        ]
    return "\n".join([*rows, "", "Where the paper does not hold on our data:", "", *failed])


def title(path):
    """A notebook's title: the first line of its first cell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(cells[0]["source"]).splitlines()[0].lstrip("# ")


def fill_readme(figures, readme=REPOSITORY / "README.md"):
    """Put the results table between the README's markers."""
    text = readme.read_text(encoding="utf-8")
    filled = re.sub(
        r"(<!-- results -->\n).*?(\n<!-- /results -->)",
        lambda m: m[1] + results_table(figures) + m[2],
        text,
        flags=re.DOTALL,
    )
    if filled != text:
        report.write_atomically(readme, filled)


def _execute(source, target, parameters, heading, settings, show_progress):
    """Run one notebook; return (None or one line that says what went wrong, seconds)."""
    started, problem = time.time(), None
    os.environ.update(settings)  # a worker process may be older than they are
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DLM_PROGRESS"] = str(Path(scratch, "progress"))
        finished = threading.Event()
        watcher = threading.Thread(target=_watch, args=(Path(os.environ["DLM_PROGRESS"]), heading, finished), daemon=True)
        if show_progress:
            watcher.start()
        quiet = {"progress_bar": False, "log_output": False, "extra_arguments": QUIET}
        try:
            papermill.execute_notebook(source, target, parameters, kernel_name="python3", cwd=REPOSITORY, **quiet)
            _tidy(target)
        except PapermillExecutionError as error:
            problem = f"cell {error.exec_count}: {error.ename}: {error.evalue} (see {target.name} in {target.parent.name}/)"
        except Exception as error:  # a kernel that dies or a notebook that cannot be read must not stop the others
            problem = f"{type(error).__name__}: {error}"
        finally:
            finished.set()
            if show_progress:
                watcher.join()
            os.environ.pop("DLM_PROGRESS", None)
    return problem, time.time() - started


def _watch(path, heading, finished):
    """Show the trials of the notebook under way, with the time left."""
    from tqdm import tqdm

    bar = None
    while not finished.wait(0.5):
        if path.exists():
            done, total = map(int, path.read_text().split())
            if bar is None or total != bar.total or done < bar.n:
                if bar is not None:
                    bar.close()
                bar = tqdm(
                    total=total,
                    initial=done,
                    desc=heading,
                    unit="trial",
                    mininterval=1 if sys.stderr.isatty() else 20,
                    leave=False,
                    dynamic_ncols=True,
                )
            bar.update(done - bar.n)
    if bar is not None:
        bar.close()


def _tidy(path):
    """Drop what papermill notes about this machine and moment, so that the same run leaves the same notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"].pop("papermill", None)
    for cell in notebook["cells"]:
        for name in ("papermill", "execution"):
            cell["metadata"].pop(name, None)
    report.write_atomically(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def _note_seconds(figures, name, seconds):
    with report.shared(figures / "manifest.json") as manifest:
        for entry in manifest.values():
            if entry["notebook"] == name:
                entry["seconds"] = round(seconds, 1)


def _summary(figures, names, failed, seconds, profile):
    claims = report.read_json(figures / "claims.json")
    print(f"\n{len(names) - len(failed)} of {len(names)} notebooks in {seconds / 60:.1f} min. Figures and tables: {figures}")
    few = "" if profile == "paper" else ", which has few trials to judge by (those committed are in figures/claims.md)"
    print(f"Claims under the profile {profile}{few}:")
    for name in names:
        for claim in claims.get(name, {}).get("claims", []):
            print(f"  {name.split('_')[0]}  {claim['verdict']:>13}: {claim['statement']}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
