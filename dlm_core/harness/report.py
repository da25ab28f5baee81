"""What a notebook leaves behind: figures, tables and checked claims, each with its provenance, in
the figures folder.
"""

import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import platform
import subprocess
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dlm_core import check, data, records
from dlm_core.harness import (
    devices,
    figures,
    headings,
    machine,
    published,
    settings,
    sweeps,
    tables,
)
from dlm_core.harness.cells import parameters
from dlm_core.harness.evidence import Finding, Verdict
from dlm_core.harness.paths import (
    REPOSITORY,
    home,
    in_checkout,
    writable,
    write_atomically,
)
from dlm_core.observation import Observation

NOTEBOOKS = REPOSITORY / "notebooks"
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
    return writable(Path(os.environ.get("DLM_FIGURES") or home() / "figures"))


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
    check.fitting("notebook", notebook, str)
    path = NOTEBOOKS / f"{notebook}.ipynb"
    if not path.is_file():
        check.one_of("notebook", notebook, sorted(each.stem for each in NOTEBOOKS.glob("*.ipynb")))
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    values = frame.f_back.f_globals
    names = parameters(path)
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"notebook {notebook!r} has parameters that are not set: {', '.join(missing)}; "
            "run its cell of parameters first"
        )
    return Report(notebook, **{name: values[name] for name in names})


def catalogue(notebooks: Path = NOTEBOOKS) -> dict[str, dict[str, Any]]:
    """{notebook name: its entry in profiles.toml}: the set it belongs to, each profile's
    parameters.
    """
    path = notebooks / "profiles.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def values_of(entry: Mapping[str, Any], profile: str) -> dict[str, Any]:
    """The values that a profile gives a notebook's parameters: those of quick, which names all that
    any profile changes, and its own instead.
    """
    return {"profile": profile, **entry["quick"], **entry[profile]}


def profile_of(notebook: str, values: Mapping[str, Any]) -> str | None:
    """The profile that a run may be called by: that of its name, and what differs from it.

    Parameters
    ----------
    notebook
        Its name in notebooks/.
    values
        Of its parameters, "profile" among them.

    Returns
    -------
    str or None
        "paper"; "paper, but images = 1" where a value is not that of the profile.
    """
    profile, entry = values.get("profile"), catalogue().get(notebook)
    if entry is None or profile not in entry:
        return profile
    wanted = {**parameters(NOTEBOOKS / f"{notebook}.ipynb"), **values_of(entry, profile)}
    plain = records.plain
    others = [n for n, v in values.items() if n in wanted and plain(v) != plain(wanted[n])]
    if not others:
        return profile
    return f"{profile}, but {', '.join(f'{name} = {values[name]!r}' for name in others)}"


class Report:
    """The results of one run of one notebook.

    Parameters
    ----------
    notebook
        Its name in notebooks/; the files' names begin with it.
    parameters
        Those of its parameters cell.

    Raises
    ------
    ValueError
        For a name that cannot be a file's, and where the folder cannot be written.
    """

    @check.arguments
    def __init__(self, notebook: str, **parameters: Any) -> None:
        if not notebook or Path(notebook).name != notebook:
            raise ValueError(f"notebook is {notebook!r}; it takes a name without folders")
        self.notebook, self.parameters = notebook, parameters
        self.claims: list[dict[str, Any]] = []
        self.folder = folder()
        self.sentence = ""
        self._swept = len(sweeps.FINISHED)  # by others, before this notebook

    @check.arguments
    def figure(self, figure: Any, alt: str, suffix: str = "") -> None:
        """Save a figure as PDF and PNG under the notebook's name, and show it with its caption.

        Parameters
        ----------
        figure
            Of matplotlib.
        alt
            What to see in it: its caption, and its description for readers who do not see it.
        suffix
            Added to the notebook's name, where it has several figures.
        """
        stem = self._stem(suffix)
        about = json.dumps({**self.provenance(), "alt": alt}, sort_keys=True)
        # The files depend on nothing but their content: neither on dates nor on software.
        undated = {"CreationDate": None, "ModDate": None}
        notes: dict[str, dict[str, Any]] = {
            "png": {"Title": stem, "Description": about, "Software": None},
            "pdf": {"Title": stem, "Subject": about, **undated},
        }
        files = {f"{stem}.{kind}": _drawn(figure, kind, note) for kind, note in notes.items()}
        figures.show(figure, alt)
        figures.caption(alt)
        self._keep(files, alt)

    @check.arguments
    def table(
        self, frame: tables.Frame, caption: str, suffix: str = "", digits: check.Whole = 2
    ) -> Any:
        """Save a table as CSV (six digits, the columns' names in code) and, as ``headings`` shows
        it to readers, as Markdown, under the notebook's name.

        Parameters
        ----------
        frame
            A pandas DataFrame. Where it has the shares of ``sweeps.summarise``, the caption also
            says how trials without a picture are counted.
        caption
            What it shows.
        suffix
            Added to the notebook's name, where it has several tables.
        digits
            Decimals in Markdown and on display.

        Returns
        -------
        pandas.io.formats.style.Styler
            The table as ``headings`` shows it.
        """
        stem = self._stem(suffix)
        if {"success_20", "success_30"} & set(frame.columns):
            caption = f"{caption}; {tables.WITHOUT_A_PICTURE}"
        shown = headings.shown(frame, digits)
        rule, rows = row(["---"] * shown.shape[1]), map(row, shown.itertuples(index=False))
        page = [caption, "", row(shown.columns), rule, *rows, ""]
        as_csv = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        self._keep({f"{stem}.csv": as_csv, f"{stem}.md": "\n".join(page)}, caption)
        # The same id each time.
        return shown.style.hide(axis="index").set_caption(caption).set_uuid(stem)

    @check.arguments
    def claim(
        self,
        statement: str,
        finding: Finding,
        evidence: str = "",
        *,
        whose: Literal["released", "abstract", "ours"],
        cause: str = "",
    ) -> None:
        """Print and keep whether a statement holds.

        Parameters
        ----------
        statement
            In words.
        finding
            Of ``harness.evidence``: criterion, numbers and verdict.
        evidence
            Further numbers.
        whose
            What it is about. "released": a released experiment, in its own setting. "abstract":
            what we read in the paper's abstract, in a setting of ours. "ours": neither.
        cause
            The likely reason where it does not hold.
        """
        if evidence:
            finding = dataclasses.replace(finding, evidence=f"{finding.evidence}; {evidence}")
        cause = cause if finding.verdict is Verdict.FAILS else ""
        self.claims.append(
            {
                "statement": statement,
                "whose": whose,
                "verdict": str(finding.verdict),
                "criterion": finding.criterion,
                "evidence": finding.evidence,
                "n": finding.n,
                "units": finding.units,
                "interval": finding.interval and [_json(each) for each in finding.interval],
                "cause": cause,
            }
        )
        lines = [f"[{finding.verdict}] {statement}"]
        lines += [f"criterion: {finding.criterion}"] if finding.criterion else []
        lines += [finding.evidence]
        lines += [f"likely cause: {cause}"] if cause else []
        print("\n    ".join(lines))

    @check.arguments
    def setting(self, trials: Iterable[Any], *, n: str | None = None) -> Any:
        """Show, and keep beside the claims, the sentence that says what the ``trials`` have in
        common.
        """
        from IPython.display import Markdown

        self.sentence = settings.sentence(trials, n=n)
        return Markdown(self.sentence)

    def finish(self) -> None:
        """Write the verdicts into claims.json and claims.md, beside those of other notebooks, and
        the numbers of all trials into records/.
        """
        profile = profile_of(self.notebook, self.parameters)
        entry: dict[str, Any] = {"profile": profile, "claims": self.claims}
        if self.sentence:
            entry["setting"] = self.sentence
        with shared(self.folder / "claims.json") as everything:
            everything[self.notebook] = entry
            write_atomically(self.folder / "claims.md", _claims_page(everything))
        if finished := sweeps.FINISHED[self._swept :]:
            (self.folder / "records").mkdir(exist_ok=True)
            about = f"The trials of notebook {self.notebook[:2]}, one row each."
            self._keep({f"records/{self.notebook}.csv.gz": published.table(finished)}, about)

    def provenance(self) -> dict[str, Any]:
        """What the results depend on beside the code: parameters, revision, data digests, versions,
        machine, and the device of the trials where one is named.
        """
        device = devices.named()
        return {
            "notebook": self.notebook,
            "parameters": self.parameters,
            "profile": profile_of(self.notebook, self.parameters),
            "revision": revision(),
            "data": {name: data.digest(name) for name in data.NAMES},
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in PACKAGES},
            },
            "machine": platform.machine(),
            **machine.description(),
            **({} if device is None else {"device": devices.description(device)}),
        }

    def _stem(self, suffix: str) -> str:
        return self.notebook + (f"_{suffix}" if suffix else "")

    def _keep(self, files: Mapping[str, str | bytes], caption: str) -> None:
        """Write files together with what the manifest says of them: other processes may write the
        same.
        """
        about = {"caption": caption, **self.provenance()}
        with shared(self.folder / "manifest.json") as manifest:
            for name, content in files.items():
                write_atomically(self.folder / name, content)
                manifest[name] = about


def _json(number: float) -> float | str:
    """JSON has no infinity and no NaN: "-inf" is the PSNR of no picture, "nan" no interval."""
    return number if math.isfinite(number) else str(number)


def _drawn(figure: Any, kind: str, notes: Mapping[str, Any]) -> bytes:
    """A figure's file: "png" or "pdf"."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=notes)
    return file.getvalue()


@check.arguments
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
    if not in_checkout():
        # The folder of all packages may lie in another repository.
        return "unknown"
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
def locked(path: Path) -> Iterator[None]:
    """Within it, no other process that asks for the same file's lock goes on."""
    from filelock import FileLock

    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


@contextlib.contextmanager
def shared(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a JSON file that several notebooks add to: read, changed by the caller,
    written back, under a lock.
    """
    with locked(path):
        content = read_json(path)
        yield content
        write_atomically(
            path, json.dumps(dict(sorted(content.items())), indent=1, ensure_ascii=False) + "\n"
        )


def row(cells: Iterable[Any]) -> str:
    """A row of a table in Markdown, whose cells may have a bar in them."""
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"


def _claims_page(everything: dict[str, Any]) -> str:
    lines = ["# Claims, checked in code by the notebooks", ""]
    for notebook, entry in sorted(everything.items()):
        lines += [
            f"## {notebook} (profile {entry['profile']})",
            "",
            *([entry["setting"], ""] if "setting" in entry else []),
            row(["statement", "about", "verdict", "criterion", "evidence"]),
            "|---|---|---|---|---|",
        ]
        for claim in entry["claims"]:
            evidence = claim["evidence"] + (
                f" Likely cause: {claim['cause']}" if claim["cause"] else ""
            )
            verdict, criterion = f"**{claim['verdict']}**", claim["criterion"]
            lines.append(row([claim["statement"], claim["whose"], verdict, criterion, evidence]))
        lines.append("")
    return "\n".join(lines)
