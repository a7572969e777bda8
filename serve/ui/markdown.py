"""Model output as HTML: Markdown with highlighted code, and anything like markup as plain text."""

from html import escape

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

_FORMATTER = HtmlFormatter(nowrap=True)
_LIGHT, _DARK = "default", "github-dark"


def _highlight(code: str, language: str, _attributes: str) -> str:
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return escape(code)
    return str(highlight(code, lexer, _FORMATTER))


# "js-default": no raw HTML, no javascript: or data: links. Images would be fetched from elsewhere.
_MARKDOWN = MarkdownIt("js-default", {"highlight": _highlight, "breaks": True}).disable("image")


def render_markdown(text: str) -> str:
    """Return the HTML of Markdown that is not trusted."""
    return str(_MARKDOWN.render(text))


def code_css() -> str:
    """Return the colours of highlighted code, on light and on dark pages."""
    light = HtmlFormatter(style=_LIGHT).get_style_defs(".markdown pre")
    dark = HtmlFormatter(style=_DARK).get_style_defs(".dark .markdown pre")
    return f"{light}\n{dark}"
