"""Messages to people as HTML."""

from html import escape


def render_message(text: str, *, is_problem: bool = False) -> str:
    """Return what came of an action, or what is wrong."""
    kind, role = ("problem", "alert") if is_problem else ("success", "status")
    return f'<div class="{kind}" role="{role}">{escape(text)}</div>'


def render_problem(text: str) -> str:
    """Return what is wrong."""
    return render_message(text, is_problem=True)
