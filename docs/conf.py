"""Settings of the site, which `make site` builds into build/site. extension.py fills pages from
code and results.
"""

import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
# dlm_core, and this folder's extension
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

CITATION = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))

project = "Deep Leakage from Model"
author = CITATION["authors"][0]["name"]
release = CITATION["version"]
language = "en"

# The source folder is the repository's root, so that links between files are the same here and in
# the repository.
root_doc = "docs/index"
include_patterns = ["docs/*.md", "notebooks/**.ipynb", "data/README.md", "CHANGELOG.md"]
exclude_patterns = [
    ".git",
    ".venv",
    ".store",
    "build",
    "dlm_core",
    "tests",
    "**/.ipynb_checkpoints",
]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "extension",
]
nb_execution_mode = "off"  # notebooks are committed with their outputs
# Widgets need a kernel; their pages show a figure instead, and load nothing from the network.
nb_ipywidgets_js = {}
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
autodoc_preserve_defaults = True  # PLACE, not the path that it is on one machine
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "description"  # beside what the docstrings say of shapes and ranges
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = False
napoleon_use_rtype = False
suppress_warnings = ["ref.python"]  # fields of several classes share names
napoleon_use_ivar = True  # a field stands once, among its class's
nitpicky = True
# Types of other packages, and names that exist for the type checker alone, have no page here.
nitpick_ignore_regex = [("py:.*", r"(?!dlm_core).*"), ("py:class", r".*\.(Annotated|Strategy)")]
# extension.py copies it from a package: equations need no network
mathjax_path = "mathjax/tex-chtml-full.js"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_last_updated_fmt = None  # the same sources give the same site
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "extra_footer": "Code under the MIT licence; bundled images under their own terms. "
    "Use it on data you may use.",
}
# Launch links need to know where the notebooks can be fetched.
if repository := CITATION.get("repository-code"):
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": "main",
        "path_to_docs": "",
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        },
    }
