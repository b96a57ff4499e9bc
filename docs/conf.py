"""Sphinx: this folder, the README and the docstrings, as one site. `.ci/docs` writes it to build/docs.

The build needs no network, writes nowhere but into its output, and takes every warning for an error.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

sys.dont_write_bytecode = True
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # importing the package must not look anything up
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fastalign"
author = copyright = "the fastalign authors"
release = version("fastalign")
version = release

extensions = ["sphinx.ext.autodoc", "myst_parser", "docstrings", "reference"]
exclude_patterns = ["_ext"]
highlight_language = "none"  # of blocks that name no language: formulas, tables of names, command lines
nitpicky = True  # a reference that leads nowhere is an error ...
nitpick_ignore_regex = [("py:class", ".*")]  # ... but for the types in signatures, many of which are other libraries'

autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # what transformers says of a method stands in transformers' documentation
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
add_module_names = False
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

smartquotes = False  # "mean" and 'sum' are code

html_theme = "furo"
html_title = f"fastalign {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["fastalign.css"]
