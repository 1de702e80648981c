"""The site: pip install -e '.[docs]' && sphinx-build -W -b html docs docs/_build/html.

The tutorials are run when the site is built, and again when their pages change; remove docs/_build
where the package has changed. Their cache is for one process: no -j. DOCS_SMALL=1 runs them anew
with small sizes, which show that all works and demand no accuracy; DOCS_RUN=off runs nothing.
"""

import importlib
import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
SMALL = os.environ.get("DOCS_SMALL", "") not in ("", "0")
sys.path.insert(0, str(HERE))
# What the tutorials' own processes see: the folder of their helper.
seen = [str(HERE / "tutorials"), str(HERE.parent), os.environ.get("PYTHONPATH")]
if SMALL:  # and that of what makes the tests' runs small
    seen.append(str(HERE.parent / "tests"))
    sys.path.append(seen[-1])
    os.environ.update(importlib.import_module("compiling").settings(HERE / "_build" / "compiled"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, seen))

project = "pyro_interpolant"
author = "the authors of pyro_interpolant"
copyright = author  # noqa: A001 (Sphinx's name)
release = version = version_of("pyro-interpolant")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "pyro_interpolant"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
# Small runs have no cache: processes that read pages in parallel would break one they share.
nb_execution_mode = "force" if SMALL else "cache"
if os.environ.get("DOCS_RUN") == "off":
    nb_execution_mode = "off"
nb_execution_cache_path = str(HERE / "_build" / "cache")
nb_execution_timeout = 600
suppress_warnings = ["myst-nb.lexer"] if nb_execution_mode == "off" else []
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "none"  # signatures without types: the docstrings have shapes besides
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "inherited-members": True}
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # nor are those of attributes shown

PACKAGE = "pyro_interpolant"
ROOMS = sorted({page.stem for page in HERE.glob("reference/*.md")} - {"index"})


def of_the_package(_app, _what, _name, value, skip, _options):
    """Leave out what classes inherit from torch and Pyro, and the fields of tuples."""
    value = getattr(value, "fget", value)
    module = getattr(value, "__module__", None) or ""
    return None if module.startswith(PACKAGE) and not skip else True


def find_by_room(app, environment, node, content):
    """Resolve a name as docstrings say it, at the top or in its file, to the page of its room."""
    target = node.get("reftarget", "")
    ours = target.startswith(f"{PACKAGE}.") or "." not in target
    if node.get("refdomain") != "py" or not ours:
        return None
    *owner, name = target.removeprefix(f"{PACKAGE}.").split(".")
    domain = environment.get_domain("py")
    # A room that is named comes first, and last the twin, which has names of other rooms too.
    for room in sorted(ROOMS, key=lambda room: (room not in owner, room == "numpyro")):
        for middle in ("", *owner[-1:]):  # of a method, its class
            found = ".".join(filter(None, (PACKAGE, room, middle, name)))
            if found in domain.objects:
                page = node["refdoc"]
                return domain.resolve_xref(
                    environment, page, app.builder, "obj", found, node, content
                )
    return None


def setup(app):
    """Connect both, and import what is documented: names of rooms are lazy."""
    for name in ROOMS:
        room = importlib.import_module(f"{PACKAGE}.{name}")
        for public in room.__all__:
            getattr(room, public)
    # It adds a folder of static files, and does not say that pages may be read in parallel.
    app.extensions["sphinx-mathjax-offline"].parallel_read_safe = True
    app.connect("autodoc-skip-member", of_the_package)
    app.connect("missing-reference", find_by_room)
