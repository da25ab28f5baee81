"""What a notebook leaves behind: figures, tables and checked claims, each with its provenance, in
the figures folder.
"""

import ast
import contextlib
import dataclasses
import inspect
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dlm_core import check, data, records
from dlm_core.harness import figures, settings
from dlm_core.harness.paths import REPOSITORY, home
from dlm_core.observation import Observation

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "matplotlib",
    "seaborn",
    "lpips",
    "scikit-image",
    "papermill",
)


def folder() -> Path:
    """Where results go: DLM_FIGURES, or figures/ in the repository. Raises ValueError where it
    cannot be written.
    """
    path = Path(os.environ.get("DLM_FIGURES") or home() / "figures")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output folder {str(path)!r} cannot be written ({error.strerror}); set OUT to another"
        ) from None
    return path


def start(notebook: str) -> "Report":
    """The Report of the notebook that calls this, with the parameters that its cell tagged
    "parameters" names.

    Parameters
    ----------
    notebook
        Its name in notebooks/, without the suffix. The values are those that the caller's variables
        have now.

    Raises
    ------
    ValueError
        Where there is no such notebook.
    """
    folder_of_notebooks = REPOSITORY / "notebooks"
    path = folder_of_notebooks / f"{notebook}.ipynb"
    if not path.is_file():
        check.one_of(
            "notebook", notebook, [each.stem for each in folder_of_notebooks.glob("*.ipynb")]
        )
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    values = frame.f_back.f_globals
    return Report(notebook, **{name: values[name] for name in parameters(path)})


def parameters(path: Path) -> dict[str, Any]:
    """{name: default} of the cell tagged "parameters" of the notebook at ``path``."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    body = ast.parse("".join(tagged[0]["source"])).body if tagged else []
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


class Report:
    """The results of one run of one notebook; ``parameters`` are those of its parameters cell."""

    def __init__(self, notebook: str, **parameters: Any) -> None:
        self.notebook, self.parameters = notebook, parameters
        self.claims: list[dict[str, str]] = []
        self.folder = folder()
        self.sentence = ""

    def figure(self, figure: Any, alt: str, suffix: str = "") -> None:
        """Save a figure as PDF and PNG under the notebook's name, and show it.

        Parameters
        ----------
        figure
            Of matplotlib.
        alt
            Its description, for readers who do not see it.
        suffix
            Added to the notebook's name, where it has several figures.
        """
        stem = self.notebook + (f"_{suffix}" if suffix else "")
        about = json.dumps({**self.provenance(), "alt": alt}, sort_keys=True)
        figure.savefig(
            self.folder / f"{stem}.png",
            metadata={"Title": stem, "Description": about, "Software": None},
        )
        dates = {
            "CreationDate": None,
            "ModDate": None,
        }  # the file depends on nothing but its content
        figure.savefig(
            self.folder / f"{stem}.pdf", metadata={"Title": stem, "Subject": about, **dates}
        )
        figures.show(figure, alt)
        self._record([f"{stem}.png", f"{stem}.pdf"], alt)

    def table(self, frame: Any, caption: str, suffix: str = "", digits: int = 2) -> Any:
        """Save a table as CSV (six digits) and Markdown under the notebook's name.

        Parameters
        ----------
        frame
            A pandas DataFrame.
        caption
            What it shows.
        suffix
            Added to the notebook's name, where it has several tables.
        digits
            Decimals in Markdown and on display.

        Returns
        -------
        pandas.io.formats.style.Styler
            The table, rounded, for display.
        """
        stem = self.notebook + (f"_{suffix}" if suffix else "")
        frame.to_csv(
            self.folder / f"{stem}.csv", index=False, float_format="%.6g", lineterminator="\n"
        )
        shown = frame.copy()
        for column in shown.select_dtypes("float"):
            shown[column] = [
                "" if value != value else f"{value:.{digits}f}" for value in shown[column]
            ]
        lines = [
            caption,
            "",
            _row(shown.columns),
            _row(["---"] * shown.shape[1]),
            *map(_row, shown.itertuples(index=False)),
        ]
        write_atomically(self.folder / f"{stem}.md", "\n".join(lines) + "\n")
        self._record([f"{stem}.csv", f"{stem}.md"], caption)
        return (
            shown.style.hide(axis="index").set_caption(caption).set_uuid(stem)
        )  # the same id each time

    def claim(
        self, statement: str, holds: bool, evidence: str, *, source: str = "paper", cause: str = ""
    ) -> None:
        """Print and keep whether a statement holds.

        Parameters
        ----------
        statement
            In words.
        holds
            Whether it does.
        evidence
            The numbers that decide it.
        source
            "paper" or "ours": whose statement it is.
        cause
            The likely reason where it does not hold.
        """
        verdict = "holds" if holds else "does not hold"
        kept = {
            "statement": statement,
            "source": source,
            "verdict": verdict,
            "evidence": evidence,
            "cause": "" if holds else cause,
        }
        self.claims.append(kept)
        print(
            f"[{verdict}] {statement}\n    {evidence}"
            + (f"\n    likely cause: {kept['cause']}" if kept["cause"] else "")
        )

    def setting(self, trials: Iterable[Any], *, n: str | None = None) -> Any:
        """Show, and keep beside the claims, the sentence that says what the ``trials`` have in
        common.
        """
        from IPython.display import Markdown

        self.sentence = settings.sentence(trials, n=n)
        return Markdown(self.sentence)

    def finish(self) -> None:
        """Write the verdicts into claims.json and claims.md, beside those of other notebooks."""
        entry: dict[str, Any] = {
            self.notebook: {"profile": self.parameters.get("profile"), "claims": self.claims}
        }
        if self.sentence:
            entry[self.notebook]["setting"] = self.sentence
        with shared(self.folder / "claims.json") as everything:
            everything.update(entry)
            write_atomically(self.folder / "claims.md", _claims_page(everything))

    def provenance(self) -> dict[str, Any]:
        """What the results depend on beside the code: parameters, revision, data digests, versions,
        machine.
        """
        return {
            "notebook": self.notebook,
            "parameters": self.parameters,
            "profile": self.parameters.get("profile"),
            "revision": revision(),
            "data": {name: data.digest(name) for name in data.NAMES},
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in PACKAGES},
            },
            "machine": platform.machine(),
        }

    def _record(self, files: Sequence[str], caption: str) -> None:
        with shared(self.folder / "manifest.json") as manifest:
            manifest.update({file: {"caption": caption, **self.provenance()} for file in files})


def knowledge(seen: Observation, attacks: Sequence[str]) -> Any:
    """Who knows what: a table of what every observer holds and what each attack is told besides,
    from its record.

    Parameters
    ----------
    seen
        What any observer sees.
    attacks
        Keys of ``records.ATTACKS``.
    """
    import pandas

    count = sum(p.numel() for p in seen.model.parameters())
    shown = ", ".join(f.name for f in dataclasses.fields(seen))
    holds = (
        f"{shown}: {count:,} weights before and after, image shape {seen.image_shape}, "
        f"{seen.num_classes} classes"
    )
    rows = [("any observer", holds)]
    for key in attacks:
        check.one_of("attack", key, records.ATTACKS)
        record = records.ATTACKS[key]
        rows.append(
            (record.title, f"and {', '.join(record.told)}" if record.told else "nothing more")
        )
    return (
        pandas.DataFrame(rows, columns=["who", "knows"])
        .style.hide(axis="index")
        .set_uuid("knowledge")
    )


@cache
def revision() -> str:
    """The git revision, with "-dirty" where code or data differ from it; "unknown" outside a
    checkout.
    """
    run: dict[str, Any] = {"cwd": REPOSITORY, "capture_output": True, "text": True, "check": True}
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "dlm_core", "data", "requirements.txt"], **run
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed.strip() else "")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@contextlib.contextmanager
def shared(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a JSON file that several notebooks add to: read, changed by the caller,
    written back, under a lock.
    """
    from filelock import FileLock

    with FileLock(path.with_name(f".{path.name}.lock")):
        content = read_json(path)
        yield content
        write_atomically(
            path, json.dumps(dict(sorted(content.items())), indent=1, ensure_ascii=False) + "\n"
        )


def write_atomically(path: str | Path, text: str) -> None:
    """Replace a file in one step, so that an interrupt leaves the old one or the new one, whole."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _claims_page(everything: dict[str, Any]) -> str:
    lines = ["# Claims, checked in code by the notebooks", ""]
    for notebook, entry in sorted(everything.items()):
        lines += [
            f"## {notebook} (profile {entry['profile']})",
            "",
            _row(["statement", "whose", "verdict", "evidence"]),
            "|---|---|---|---|",
        ]
        for claim in entry["claims"]:
            evidence = claim["evidence"] + (
                f" Likely cause: {claim['cause']}" if claim["cause"] else ""
            )
            lines.append(
                _row([claim["statement"], claim["source"], f"**{claim['verdict']}**", evidence])
            )
        lines.append("")
    return "\n".join(lines)
