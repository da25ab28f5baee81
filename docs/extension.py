"""Sphinx extension of the site: pages filled from code and results, readable docstrings, alt texts, MathJax without network."""

import ast
import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from sphinx.util.fileutil import copy_asset

from dlm_core.harness.trials import imported
from dlm_core.project.reproduce import title

REPOSITORY = Path(__file__).resolve().parents[1]
# The modules that are not science; whatever is new counts as science.
COMMANDS = ("reproduce", "snapshots", "lessons", "environment", "bench", "peer")
ARTIFACT = ("trials", "utility", "sweeps", "report", "figures", *COMMANDS)
FONTS = "output/chtml/fonts/woff-v2"


def setup(app):
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", readable)
    app.connect("build-finished", finish)
    keep_alt_texts()
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def fill(app, page, source):
    """Replace `<!-- generated: NAME -->` in a page by what the function NAME returns."""
    if (REPOSITORY / f"{page}.md").exists():
        source[0] = re.sub(r"<!-- generated: (\w+) -->", lambda m: GENERATED[m[1]](), source[0])


# Pages


def notebooks():
    """The notebooks in reading order, that of profiles.toml, with the verdicts on their claims."""
    catalogue = tomllib.loads((REPOSITORY / "notebooks" / "profiles.toml").read_text(encoding="utf-8"))
    claims = json.loads((REPOSITORY / "figures" / "claims.json").read_text(encoding="utf-8"))
    text = ""
    headings = {"paper": "The paper's experiments", "beyond": "Beyond the paper"}
    for chosen, heading in headings.items():
        names = [name for name, entry in catalogue.items() if entry["set"] == chosen]
        if not names:
            continue
        text += f"\n## {heading}\n\n| notebook | claims that hold | profile |\n|---|---|---|\n"
        for name in names:
            entry = claims.get(name, {"claims": [], "profile": ""})
            held = sum(claim["verdict"] == "holds" for claim in entry["claims"])
            link = f"[{title(REPOSITORY / 'notebooks' / f'{name}.ipynb')}](../notebooks/{name}.ipynb)"
            text += f"| {name[:2]}. {link} | {held} of {len(entry['claims'])} | {entry['profile']} |\n"
        text += "\n" + toctree(heading, [f"../notebooks/{name}.ipynb" for name in names])
    return text


def lessons():
    return folder("teaching", "Lessons")


def howtos():
    return folder("howto", "How to")


def folder(name, caption):
    """A list and a toctree of the notebooks in one subfolder, by file name."""
    paths = sorted((REPOSITORY / "notebooks" / name).glob("*.ipynb"))
    lines = [f"- [{title(path)}](../notebooks/{name}/{path.name})" for path in paths]
    return "\n".join(lines) + "\n\n" + toctree(caption, [f"../notebooks/{name}/{path.name}" for path in paths])


def toctree(caption, pages):
    entries = [f"{short(page)} <{page}>" for page in pages]
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```\n"


def short(page):
    """What the sidebar calls a notebook: its file's name, in words."""
    words = Path(page).stem.replace("dlm_plus", "DLM+").replace("dlm", "DLM").replace("dlg", "DLG").replace("relu", "ReLU")
    number, words = re.fullmatch(r"(\d+_)?(.*)", words).groups(default="")
    words = words.replace("_", " ")
    return f"{number.rstrip('_')} {words[0].upper()}{words[1:]}".strip()


def results():
    """Each notebook's figures with their captions, and its claims with verdict and evidence."""
    claims, manifest = (
        json.loads((REPOSITORY / "figures" / f"{n}.json").read_text("utf-8")) for n in ("claims", "manifest")
    )
    text = ""
    for name, entry in sorted(claims.items()):
        text += f"\n## {name[:2]}. {title(REPOSITORY / 'notebooks' / f'{name}.ipynb')}\n\n"
        text += f"[The notebook](../notebooks/{name}.ipynb) (profile `{entry['profile']}`).\n\n"
        for file, about in manifest.items():
            if about["notebook"] == name and file.endswith(".png"):
                caption, pdf = about["caption"], file.replace(".png", ".pdf")
                text += f"![{caption}](../figures/{file})\n\n*{caption}* [PDF](../figures/{pdf})\n\n"
        for claim in entry["claims"]:
            whose = {"paper": "the paper", "ours": "ours"}[claim["source"]]
            text += f"- **{claim['verdict'].capitalize()}** ({whose}): {plain(claim['statement'])}\n"
            text += f"  <br>{plain(claim['evidence'])}"
            text += f" Likely cause: {plain(claim['cause'])}\n" if claim["cause"] else "\n"
    return text


def plain(text):
    """Text that Markdown must not read as markup."""
    return re.sub(r"([*_$`<>\[\]|\\])", r"\\\1", text)


def halves():
    """(heading, names of dlm_core's modules) of the science and of the artifact."""
    return ("The science", modules(True)), ("The artifact", modules(False))


def modules(science):
    """Names of dlm_core's modules of one half, science or artifact, those imported by others first."""
    names = {path.stem for path in (REPOSITORY / "dlm_core").glob("*.py") if not path.stem.startswith("__")}
    names = {name for name in names if (name not in ARTIFACT) == science}
    order = []
    while names - set(order):
        order += sorted(name for name in names - set(order) if imports(name) & names <= set(order)) or sorted(
            names - set(order)
        )
    return order


def imports(name):
    """The modules of dlm_core that a module imports."""
    return imported(ast.parse((REPOSITORY / "dlm_core" / f"{name}.py").read_text(encoding="utf-8")))


def code_map():
    """Both halves of the package: what each module is, how long, and which it builds on."""
    text = ""
    for heading, names in halves():
        text += f"\n## {heading}\n\n| module | lines | builds on | what it is |\n|---|---|---|---|\n"
        for name in names:
            code = (REPOSITORY / "dlm_core" / f"{name}.py").read_text(encoding="utf-8")
            about = " ".join(ast.get_docstring(ast.parse(code)).split("\n\n")[0].split())
            used = ", ".join(sorted(imports(name))) or "–"
            text += f"| [{name}](api.md#dlm-core-{name}) | {len(code.splitlines())} | {used} | {plain(about)} |\n"
    return text


def api():
    """The reference, one section per module."""
    text = ""
    for heading, names in halves():
        text += f"\n## {heading}\n"
        for name in names:
            text += f"\n### dlm_core.{name}\n\n```{{eval-rst}}\n.. automodule:: dlm_core.{name}\n```\n"
    return text


def bibtex():
    """CITATION.cff as BibTeX: this software, and the paper."""
    cff = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cff["preferred-citation"]
    people = " and ".join(f"{person['family-names']}, {person['given-names']}" for person in paper["authors"])
    notes = ", ".join(each["value"] for each in paper["identifiers"])
    where = f"  url = {{{cff['repository-code']}}},\n" if "repository-code" in cff else ""
    return (
        f"```bibtex\n@inproceedings{{zhao{paper['year']}deep,\n  title = {{{paper['title']}}},\n  author = {{{people}}},\n"
        f"  booktitle = {{{paper['collection-title']}}},\n  year = {{{paper['year']}}},\n  note = {{{notes}}},\n}}\n\n"
        f"@software{{dlm_artifact,\n  title = {{{cff['title']}}},\n  author = {{{{{cff['authors'][0]['name']}}}}},\n"
        f"{where}  version = {{{cff['version']}}},\n}}\n```"
    )


GENERATED = {f.__name__: f for f in (notebooks, lessons, howtos, results, code_map, api, bibtex)}

# Docstrings: plain text with aligned lists of arguments


def readable(app, what, name, subject, options, lines):
    """Turn a docstring of ours into reStructuredText: paragraphs as they are, aligned lists as tables, displays as they are."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines[:] = "\n\n".join(map(block, blocks)).split("\n") + [""]


def block(text):
    rows = text.split("\n")
    if all(row.startswith("    ") for row in rows):
        return "::\n\n" + text
    entries = aligned(rows)
    if not entries:
        return escape(" ".join(row.strip() for row in rows))
    table = [".. list-table::", "   :class: arguments", "   :widths: auto", ""]
    for term, about in entries:
        table += [f"   * - ``{term}``", f"     - {escape(about)}"]
    return "\n".join(table)


def aligned(rows):
    """[(name, text)] of a block like "name   what it is", with several in a line where wide gaps part them; None for prose."""
    entries = []
    for row in rows:
        if row.startswith(" "):
            if not entries:
                return None
            entries[-1][1] += " " + row.strip()
            continue
        if not re.match(r"\S+(, \S+)*\s{2,}\S", row):
            return None
        for part in re.split(r"\s{4,}(?=\w+(?:, \w+)*\s{2,}\S)", row):
            entries.append(list(re.split(r"\s{2,}", part, maxsplit=1)))
    return entries


def escape(text):
    """Nothing is markup but ``code``."""
    parts = re.split(r"(``.+?``)", text)
    return "".join(part if part.startswith("``") else re.sub(r"([\\*_|`])", r"\\\1", part) for part in parts)


# Images, equations, the front page's address


def keep_alt_texts():
    """An image output keeps the description that its metadata carries; myst-nb reads size alone from there."""
    from myst_nb.core.render import NbElementRenderer

    render = NbElementRenderer.render_image

    def with_alt(self, data):
        images = render(self, data)
        for image in images:
            image["alt"] = data.output_metadata.get(data.mime_type, {}).get("alt", image.get("alt", ""))
        return images

    NbElementRenderer.render_image = with_alt


def finish(app, error):
    """Copy MathJax with its fonts, and let the root's index.html lead to the front page."""
    if error or app.builder.format != "html":
        return
    package = metadata.distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax")
    static = Path(app.outdir, "_static", "mathjax")
    copy_asset(package / "tex-chtml-full.js", static)
    copy_asset(package / FONTS, static / FONTS)
    front, name = app.config.root_doc + ".html", app.config.project
    Path(app.outdir, "index.html").write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta http-equiv="refresh" content="0; url={front}"></head><body><a href="{front}">{name}</a></body></html>\n',
        encoding="utf-8",
    )
