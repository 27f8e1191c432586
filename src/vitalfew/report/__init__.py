"""The receipt for people: on the terminal, as Markdown, as one HTML page; and what changed between two."""

from __future__ import annotations

from vitalfew.report.diff import Change, diff
from vitalfew.report.html import html, write_html
from vitalfew.report.markdown import markdown
from vitalfew.report.terminal import show

__all__ = ["Change", "diff", "html", "markdown", "show", "write_html"]
