"""Sphinx extension of the site: pages filled from code and results, alt texts, MathJax without
network.
"""

import ast
import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from sphinx.util.fileutil import copy_asset

from dlm_core.harness.sources import imported
from dlm_core.project.reproduce import title

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "dlm_core"
FONTS = "output/chtml/fonts/woff-v2"
# The package's folders in the order in which they build on each other, and what they are called.
FOLDERS = {
    "": "The paper",
    "beyond": "Beyond the paper",
    "harness": "The harness of the experiments",
    "project": "The project's own commands",
}


def setup(app):
    app.connect("source-read", fill)
    app.connect("autodoc-skip-member", foreign)
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
    catalogue = tomllib.loads(
        (REPOSITORY / "notebooks" / "profiles.toml").read_text(encoding="utf-8")
    )
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
            link = (
                f"[{title(REPOSITORY / 'notebooks' / f'{name}.ipynb')}](../notebooks/{name}.ipynb)"
            )
            text += (
                f"| {name[:2]}. {link} | {held} of {len(entry['claims'])} | {entry['profile']} |\n"
            )
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
    return (
        "\n".join(lines)
        + "\n\n"
        + toctree(caption, [f"../notebooks/{name}/{path.name}" for path in paths])
    )


def toctree(caption, pages):
    entries = [f"{short(page)} <{page}>" for page in pages]
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```\n"


def short(page):
    """What the sidebar calls a notebook: its file's name, in words."""
    words = (
        Path(page)
        .stem.replace("dlm_plus", "DLM+")
        .replace("dlm", "DLM")
        .replace("dlg", "DLG")
        .replace("relu", "ReLU")
    )
    number, words = re.fullmatch(r"(\d+_)?(.*)", words).groups(default="")
    words = words.replace("_", " ")
    return f"{number.rstrip('_')} {words[0].upper()}{words[1:]}".strip()


def results():
    """Each notebook's figures with their captions, and its claims with verdict and evidence."""
    claims, manifest = (
        json.loads((REPOSITORY / "figures" / f"{n}.json").read_text("utf-8"))
        for n in ("claims", "manifest")
    )
    text = ""
    for name, entry in sorted(claims.items()):
        text += f"\n## {name[:2]}. {title(REPOSITORY / 'notebooks' / f'{name}.ipynb')}\n\n"
        text += f"[The notebook](../notebooks/{name}.ipynb) (profile `{entry['profile']}`).\n\n"
        for file, about in manifest.items():
            if about["notebook"] == name and file.endswith(".png"):
                caption, pdf = plain(about["caption"]), file.replace(".png", ".pdf")
                text += (
                    f"![{caption}](../figures/{file})\n\n*{caption}* [PDF](../figures/{pdf})\n\n"
                )
        for claim in entry["claims"]:
            named = {"released": "released experiment", "abstract": "the abstract, as we read it"}
            whose = named.get(claim["whose"], "ours")
            text += (
                f"- **{claim['verdict'].capitalize()}** ({whose}): {plain(claim['statement'])}\n"
            )
            if claim["criterion"]:
                text += f"  <br>Criterion: {plain(claim['criterion'])}\n"
            text += f"  <br>{plain(claim['evidence'])}"
            text += f" Likely cause: {plain(claim['cause'])}\n" if claim["cause"] else "\n"
    return text


def plain(text):
    """Text, in one line, that Markdown must not read as markup."""
    return re.sub(r"([*_$`<>\[\]|\\&!~{}])", r"\\\1", " ".join(text.split()))


def modules(folder):
    """{full name: file} of dlm_core's modules in one folder, those imported by others first."""
    files = {}
    for path in sorted((PACKAGE / folder).glob("*.py" if not folder else "**/*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 3:  # a module that is a folder
            files[".".join(parts[:-1])] = path
        elif not parts[-1].startswith("__"):
            files[".".join(parts)] = path
    order = []
    while left := sorted(files.keys() - set(order)):
        ready = [name for name in left if not imports(name, files[name]) & set(left) - {name}]
        order += ready or left
    return {name: files[name] for name in order}


def imports(name, path):
    """Full names of the modules of dlm_core that a module imports."""
    return imported(ast.parse(path.read_text(encoding="utf-8")), name)


def shortened(name):
    """A module's name without those of the package and of its folder: exact, exact.fit."""
    parts = name.split(".")[1:]
    return ".".join(parts[1:] if parts[0] in FOLDERS and len(parts) > 1 else parts)


def code_map():
    """The package by folder: what each module is, how long, and which it builds on."""
    text = ""
    for folder, heading in FOLDERS.items():
        text += f"\n## {heading}: `dlm_core/{folder}{'/' if folder else ''}`\n\n"
        text += "| module | lines | builds on | what it is |\n|---|---|---|---|\n"
        for name, path in modules(folder).items():
            code = path.read_text(encoding="utf-8")
            about = " ".join(ast.get_docstring(ast.parse(code)).split("\n\n")[0].split())
            about = re.sub(r"`` *(.+?) *``", r"\1", about)
            used = ", ".join(sorted(map(shortened, imports(name, path)))) or "–"
            link = f"[{shortened(name)}](api.md#{anchor(name)})"
            text += f"| {link} | {len(code.splitlines())} | {plain(used)} | {plain(about)} |\n"
    return text


def api():
    """The reference, one section per module."""
    text = ""
    for folder, heading in FOLDERS.items():
        text += f"\n## {heading}\n"
        for name in modules(folder):
            text += f"\n({anchor(name)})=\n\n### {plain(name)}\n\n"
            text += f"```{{eval-rst}}\n.. automodule:: {name}\n```\n"
    return text


def anchor(name):
    """The id of a module's section in the reference."""
    return re.sub(r"[._]", "-", name)


def bibtex():
    """CITATION.cff as BibTeX: this software, and the paper."""
    cff = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cff["preferred-citation"]
    people = " and ".join(
        f"{person['family-names']}, {person['given-names']}" for person in paper["authors"]
    )
    notes = ", ".join(each["value"] for each in paper["identifiers"])
    where = f"  url = {{{cff['repository-code']}}},\n" if "repository-code" in cff else ""
    return (
        f"```bibtex\n@inproceedings{{zhao{paper['year']}deep,\n"
        f"  title = {{{paper['title']}}},\n  author = {{{people}}},\n"
        f"  booktitle = {{{paper['collection-title']}}},\n  year = {{{paper['year']}}},\n"
        f"  note = {{{notes}}},\n}}\n\n"
        f"@software{{dlm_artifact,\n  title = {{{cff['title']}}},\n"
        f"  author = {{{{{cff['authors'][0]['name']}}}}},\n"
        f"{where}  version = {{{cff['version']}}},\n}}\n```"
    )


GENERATED = {f.__name__: f for f in (notebooks, lessons, howtos, results, code_map, api, bibtex)}


def foreign(app, what, name, subject, skip, options):
    """Whether to leave out a function or class that the module documented only passes on."""
    documented = app.env.temp_data.get("autodoc:module")
    return skip or what == "module" and getattr(subject, "__module__", documented) != documented


# Images, equations, the front page's address


def keep_alt_texts():
    """An image output keeps the description that its metadata carries; myst-nb reads size alone
    from there.
    """
    from myst_nb.core.render import NbElementRenderer

    render = NbElementRenderer.render_image

    def with_alt(self, data):
        images = render(self, data)
        for image in images:
            image["alt"] = data.output_metadata.get(data.mime_type, {}).get(
                "alt", image.get("alt", "")
            )
        return images

    NbElementRenderer.render_image = with_alt


def finish(app, error):
    """Copy MathJax with its fonts, and let the root's index.html lead to the front page."""
    if error or app.builder.format != "html":
        return
    package = metadata.distribution("sphinx-mathjax-offline").locate_file(
        "sphinx-mathjax-offline/static/mathjax"
    )
    static = Path(app.outdir, "_static", "mathjax")
    copy_asset(package / "tex-chtml-full.js", static)
    copy_asset(package / FONTS, static / FONTS)
    front, name = app.config.root_doc + ".html", app.config.project
    Path(app.outdir, "index.html").write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta http-equiv="refresh" content="0; url={front}"></head>'
        f'<body><a href="{front}">{name}</a></body></html>\n',
        encoding="utf-8",
    )
