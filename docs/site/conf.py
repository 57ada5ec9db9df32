"""Sphinx's configuration of the documentation; `docs/build.py` copies it beside the pages it lays out."""

from __future__ import annotations

import re
from typing import Any

import latex2mathml.converter
from docutils.nodes import SkipNode, document, entry

import hnkit

project = "hnkit"
author = "the hnkit authors"
project_copyright = "the hnkit authors, MIT licence"
version = release = hnkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["**/.*"]

myst_enable_extensions = ["dollarmath", "attrs_inline", "deflist"]
myst_dmath_double_inline = True  # the proofs write displayed equations inside their paragraphs
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page may begin below the first level

default_role = "code"  # docstrings write code in single backticks
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes as a list, so that a property described there and below is one object
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_math_renderer = "mathml"  # what browsers show by themselves: the site needs no network

smartquotes_action = "qe"  # dashes are written as meant: --kl is a flag
html_theme = "furo"
html_title = f"hnkit {release}"
html_static_path = ["_static"]
html_css_files = ["hnkit.css"]
html_show_sphinx = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

_MARKUP = re.compile(r"\||(?<= )\*(?= )|(?<=\w)_(?!\w)")
_LITERAL = re.compile(r"(`+[^`]*`+)")


def _escape(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are sentences with code in backticks and *stress*; `|f|`, `a * b` and `x_` are no markup."""
    del app, what, name, obj, options
    example = False
    for number, line in enumerate(lines):
        example = line.lstrip().startswith((">>>", "...")) or (example and bool(line.strip()))
        if not example and not line.startswith("        "):
            parts = _LITERAL.split(line)
            parts[::2] = [_MARKUP.sub(r"\\\g<0>", text) for text in parts[::2]]
            lines[number] = "".join(parts)


def _whole(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """What is said of an attribute is a sentence: napoleon would take all before its first colon for a type."""
    del app, name, obj, options
    if what in ("attribute", "data", "property") and lines:
        lines[:0] = ["..", ""]  # an empty comment, in which it looks for that colon


def _inline(translator: Any, node: Any) -> None:
    translator.body.append(latex2mathml.converter.convert(node.astext()))
    raise SkipNode


def _displayed(translator: Any, node: Any) -> None:
    equation = latex2mathml.converter.convert(node.astext(), display="block")
    translator.body.append(f'<div class="math-wrapper">{equation}</div>')
    raise SkipNode


_SENTENCE = 40
"""Characters from which a cell of a table is a sentence, for which `hnkit.css` keeps a width."""


def _sentences(app: object, doctree: document) -> None:
    del app
    for cell in doctree.findall(entry):
        if len(cell.astext()) > _SENTENCE:
            cell["classes"].append("sentence")


def setup(app: Any) -> None:
    """Register the escaping before napoleon reads the docstring, the widths of cells, and the equations."""
    app.connect("doctree-read", _sentences)
    app.connect("autodoc-process-docstring", _escape, priority=400)
    app.connect("autodoc-process-docstring", _whole, priority=401)
    app.add_html_math_renderer("mathml", (_inline, None), (_displayed, None))
