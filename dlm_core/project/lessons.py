"""The course and the how-tos: run them, make the students' versions, and prove that the exercises'
tests can pass and fail.

Lessons carry nbgrader's markers and cell metadata, and nbgrader's own preprocessors strip them, so
that a lesson can be put into an nbgrader course as it is. Their parameters are small; they know no
profiles.
"""

import asyncio
import copy
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dlm_core.harness import report
from dlm_core.harness.paths import REPOSITORY, writable
from dlm_core.project import kernel

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDERS = ("teaching", "howto")
GLOSSARY = "docs/glossary.md"
WIDGET = "application/vnd.jupyter.widget-view+json"


def paths(*folders: str) -> list[Path]:
    """The notebooks in the given subfolders of notebooks/ (default: all), by name."""
    found: list[Path] = []
    for folder in folders or FOLDERS:
        found += sorted((REPOSITORY / "notebooks" / folder).glob("*.ipynb"))
    return found


def refresh(only: str | None = None) -> None:
    """Run the notebooks and replace them by their executed versions.

    Parameters
    ----------
    only
        A part of the names of those wanted; None takes all.

    Raises
    ------
    ValueError
        Where none has such a name.
    """
    wanted = [path for path in paths() if only is None or (only and only in path.stem)]
    if not wanted:
        names = ", ".join(path.stem for path in paths())
        raise ValueError(f"--only is {only!r}; it takes a part of one of these names: {names}")
    for path in wanted:
        notebook = run(_read(path))
        print(f"{path.stem}: run", flush=True)
        report.write_atomically(
            path, json.dumps(_tidy(notebook), indent=1, ensure_ascii=False) + "\n"
        )


def run(notebook: "NotebookNode", *, allow_errors: bool = False) -> "NotebookNode":
    """Execute a notebook's cells in a fresh kernel, in the repository, and return the notebook.

    Parameters
    ----------
    notebook
        As nbformat reads it; it is changed.
    allow_errors
        Go on after a cell that fails.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        At the first cell that fails, unless ``allow_errors``.
    """
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook,
        kernel_name=kernel.NAME,
        timeout=600,
        allow_errors=allow_errors,
        resources={"metadata": {"path": str(REPOSITORY)}},
        extra_arguments=kernel.QUIET,
    )
    with kernel.own(), asyncio.Runner(loop_factory=_Loop) as runner:
        loop = runner.get_loop()
        try:
            return loop.run_until_complete(client.async_execute())
        except KeyboardInterrupt:
            # The runner cancels what is under way, which ends the kernel; that it fails is no news.
            loop.set_exception_handler(lambda *_: None)
            raise


class _Loop(asyncio.SelectorEventLoop):
    """One that leaves signals to Python: nbclient's own handler ends the kernel at an interrupt,
    and goes on without it.
    """

    def add_signal_handler(self, *given: Any) -> NoReturn:  # type: ignore[override]
        """Refuse, as outside the main thread."""
        raise RuntimeError("signals are the command's own matter")


def students(notebook: "NotebookNode") -> "NotebookNode":
    """A copy without solutions, hidden tests and outputs, and with its tests locked, as nbgrader
    releases it.
    """
    from nbgrader import preprocessors as steps

    order = (
        steps.LockCells,
        steps.ClearSolutions,
        steps.ClearOutput,
        steps.ClearHiddenTests,
        steps.ComputeChecksums,
    )
    return _preprocess(notebook, *order, steps.CheckCellMetadata)


def blank(notebook: "NotebookNode") -> "NotebookNode":
    """A copy without solutions in which the hidden tests are still there: what grading an untouched
    hand-in runs.
    """
    from nbgrader import preprocessors as steps

    return _preprocess(notebook, steps.ClearSolutions)


def zeros(notebook: "NotebookNode") -> "NotebookNode":
    """A copy whose solutions return 0, with the tests that students see: none of them may pass."""
    from nbgrader import preprocessors as steps

    zero = partial(steps.ClearSolutions, code_stub={"python": "return 0"})
    return _preprocess(notebook, zero, steps.ClearHiddenTests)


def marks(notebook: "NotebookNode") -> dict[str, tuple[float, float]]:
    """{test cell: (points reached, points possible)} of an executed notebook, as nbgrader counts
    them. Questions that a person marks are left out.
    """
    from nbgrader import utils

    cells = [c for c in notebook.cells if utils.is_grade(c) and not utils.is_solution(c)]
    return {cell.metadata.nbgrader.grade_id: utils.determine_grade(cell)[:2] for cell in cells}


def release(folder: str | Path) -> list[Path]:
    """Write the lessons for teachers and for students, and return the students' versions.

    Parameters
    ----------
    folder
        Where: ``source/LESSON/`` as an nbgrader course has it, with solutions and hidden tests, and
        ``students/LESSON/`` without them. Each has the glossary beside it.
    """
    import nbformat

    folder = writable(Path(folder))
    glossary = _relinked((REPOSITORY / GLOSSARY).read_text(encoding="utf-8"), Path(GLOSSARY).parent)
    written = []
    for path in paths("teaching"):
        lesson = _read(path)
        for cell in lesson.cells:
            if cell.cell_type == "code":
                cell.source = _without_answers(cell.source)
            else:
                cell.source = _relinked(cell.source, path.parent.relative_to(REPOSITORY))
        for kind, notebook in (("source", lesson), ("students", students(lesson))):
            target = folder / kind / path.stem / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, target)
            report.write_atomically(target.parent / Path(GLOSSARY).name, glossary)
        written.append(target)
    return written


def _relinked(text: str, origin: Path) -> str:
    """Markdown, which lay in the repository's folder ``origin``, whose links are alive in a course:
    to the glossary beside it and to other lessons. Other files of the repository are named.
    """

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(origin / match[2]))
        if target == Path(GLOSSARY):
            return f"[{match[1]}]({target.name}{match[3] or ''})"
        if target.parent.name == "teaching":
            return f"[{match[1]}](../{target.stem}/{target.name})"
        return f"{match[1]} (`{target.as_posix()}`)"

    return re.sub(r"\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)", link, text)


def _without_answers(code: str) -> str:
    """Code without nbval's marks, and with figures described by what they show, not by what it
    turns out to be: up to the colon.
    """
    unmarked = code.removeprefix("# NBVAL_CHECK_OUTPUT\n")
    return re.sub(r'(figures\.show\(\s*figure,\s*"[^:)]*):[^)]*"', r'\1."', unmarked)


def check() -> list[str]:
    """Run each lesson solved, untouched, and with 0 for every answer; return what is wrong: a
    solved test that fails, another that passes.
    """
    wrong = []
    for path in paths("teaching"):
        wrong += [f"{path.stem}: {problem}" for problem in problems(_read(path))]
        print(f"{path.stem}: checked", flush=True)
    return wrong


def problems(lesson: "NotebookNode") -> list[str]:
    """The same for one lesson, as a list of sentences."""
    solved = marks(run(copy.deepcopy(lesson), allow_errors=True))
    if not solved:
        return ["it has no test"]
    untouched = marks(run(blank(lesson), allow_errors=True))
    found = []
    for name, (points, most) in solved.items():
        if points < most:
            found.append(f"{name} fails although solved")
    for name, (points, _) in untouched.items():
        if points:
            found.append(f"{name} passes although nothing was done")
    for name, (points, _) in marks(run(zeros(lesson), allow_errors=True)).items():
        if points:
            found.append(f"what students see of {name} passes although every answer is 0")
    return found


def _read(path: Path) -> "NotebookNode":
    import nbformat

    return nbformat.read(path, as_version=4)


def _preprocess(notebook: "NotebookNode", *steps: Any) -> "NotebookNode":
    """A copy after nbgrader's preprocessors, one after the other."""
    notebook, resources = copy.deepcopy(notebook), dict[str, Any]()
    for step in steps:
        notebook, resources = step().preprocess(notebook, resources)
    return notebook


def _tidy(notebook: "NotebookNode") -> "NotebookNode":
    """Drop the time of execution, and the views of widgets, which nothing but their own kernel can
    show.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if WIDGET not in output.get("data", {})
            ]
    return notebook
