"""How the documentation is built: `make docs`."""

from __future__ import annotations

from vitalfew import __version__

project = "vitalfew"
author = "The vitalfew developers"
project_copyright = "The vitalfew developers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"vitalfew {release}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "py:obj"  # one backtick in a docstring names one of our objects
suppress_warnings = ["ref.python"]  # a field such as `nbytes` is one of several classes' and links to the first
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
