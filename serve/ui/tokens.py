"""An answer as tokens in HTML: what each one is, how it was drawn, what else could have come.

Markup of later tokens only ever follows that of earlier ones, so that a growing answer is sent and
drawn piece by piece. A token has its measures as CSS variables; the style sheet makes colours of
them, between the ends that `scales_css` gives. What the details show is in `data-token`.
"""

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from serve.ui.plots import Line, Point, line_plot, make_axis, thin

# The server's words for minus infinity, which JSON has not.
SMALLEST_LOGPROB = -9999.0
MEASURES = {
    "temperature": "Temperature it was drawn at (0: greedy)",
    "entropy": "Entropy before it, nats",
    "surprise": "Surprise, nats: -log of its probability",
}
CLASSES = {
    "X": "ends in text",
    "N0": "ends in a newline",
    "N1": "ends in a newline and blanks",
    "W": "blanks only",
    "K": "nothing: special or control",
}
_MOST_POINTS = 800
_TURNS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
# Blanks and controls, which would not be seen.
_SYMBOLS = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\x7f": "\u2421"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A generated token.

    Attributes:
        text: bytes that are no whole character are spelt `\\xe2`.
        token_id: in the vocabulary.
        token_class: for AdapT; None: it has none.
        temperature: it was drawn at; None: not known.
        entropy: of the distribution, nats.
        logprob: of the token, natural logarithm.
        alternatives: text and log probability of the likeliest tokens.
    """

    text: str
    token_id: int
    token_class: str | None
    temperature: float | None
    entropy: float | None
    logprob: float | None
    alternatives: tuple[tuple[str, float], ...] = ()

    @property
    def surprise(self) -> float | None:
        """-log of its probability, nats; infinite for what cannot come."""
        if self.logprob is None:
            return None
        return math.inf if self.logprob <= SMALLEST_LOGPROB else max(-self.logprob, 0.0)

    def measure(self, name: str) -> float | None:
        """Return one of `MEASURES`; None: it is not known."""
        value: float | None = getattr(self, name)
        return None if value is None or math.isnan(value) else value


def read_tokens(choice: Mapping[str, Any]) -> list[Token]:
    """Return the tokens of a streamed choice with log probabilities and a decoding trace."""
    trace = choice.get("decoding_trace") or []
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    found = []
    for place, entry in enumerate(trace):
        top = logprobs[place].get("top_logprobs", []) if place < len(logprobs) else []
        found.append(
            Token(
                text=entry["token"],
                token_id=entry["token_id"],
                token_class=entry.get("class"),
                temperature=entry.get("temperature"),
                entropy=entry.get("entropy"),
                logprob=entry.get("logprob"),
                alternatives=tuple((t["token"], t["logprob"]) for t in top),
            )  # fmt: skip
        )
    return found


def spell(text: str) -> str:
    """Return text with symbols in place of blanks and controls."""
    return "".join(_spell_char(char) for char in text) or "(nothing)"


def render_token(token: Token, place: int) -> str:
    """Return the HTML of a token.

    Args:
        token: to show.
        place: in the answer, from 0.
    """
    style = "".join(
        f"--{name[0]}:{min(value, -SMALLEST_LOGPROB):.4g};"
        for name in MEASURES
        if (value := token.measure(name)) is not None
    )
    kind = token.token_class or ""
    shown = "".join(_show_char(char) for char in token.text)
    label = f' aria-label="{escape(spell(token.text))}"' if not token.text.strip() else ""
    return (
        f'<span class="token" role="option" tabindex="{-1 if place else 0}" data-place="{place}" '
        f'data-class="{escape(kind)}" style="{style}" data-token=\'{_details(token)}\'{label}>'
        f"{shown}</span>"
    )


def measure_range(tokens: Sequence[Token], name: str) -> tuple[float, float] | None:
    """Return the least and the greatest finite value of a measure; None: there is none."""
    values = [token.measure(name) for token in tokens]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return (min(known), max(known)) if known else None


def scales_css(tokens: Sequence[Token]) -> str:
    """Return the CSS variables that say where each colour scale begins and how far it goes."""
    parts = []
    for name in MEASURES:
        low, high = measure_range(tokens, name) or (0.0, 0.0)
        # All alike is the low end.
        parts.append(f"--{name[0]}-low:{low:.4g};--{name[0]}-span:{(high - low) or 1:.4g};")
    return "".join(parts)


def render_legend(tokens: Sequence[Token]) -> str:
    """Return what colours and marks mean; the style sheet shows the chosen measure's scale."""
    if not tokens:
        return ""
    scales = "".join(_scale(name, title, measure_range(tokens, name))
                     for name, title in MEASURES.items())  # fmt: skip
    found = [token.token_class for token in tokens]
    classes = "".join(
        f'<span class="class-key"><span class="token-sample" data-class="{name}">{name}</span> '
        f"{meaning} ({count})</span>"
        for name, meaning in CLASSES.items()
        if (count := found.count(name))
    )
    marks = f'<div class="class-keys"><strong>Class</strong>{classes}</div>' if classes else ""
    return f"<style>.tokens{{{scales_css(tokens)}}}</style>{scales}{marks}"


def render_plot(tokens: Sequence[Token]) -> str:
    """Return the plot of temperature and entropy along the tokens."""
    lines = {}
    for name in ("temperature", "entropy"):
        points: list[Point] = [(i, token.measure(name)) for i, token in enumerate(tokens, 1)]
        lines[name] = thin(points, _MOST_POINTS)
    x = make_axis("token", (), least=max(len(tokens), 10), num_ticks=5, is_exact=True)
    return line_plot(
        [
            Line(name="Temperature", points=lines["temperature"]),
            Line(name="Entropy", points=lines["entropy"], is_right=True, is_area=True),
        ],
        title="Along the answer",
        x=x,
        left=make_axis("no unit", (y for _, y in lines["temperature"])),
        right=make_axis("nats", (y for _, y in lines["entropy"])),
    )


def _spell_char(char: str) -> str:
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if char < " ":
        return chr(0x2400 + ord(char))
    return char if char.isprintable() else f"\\u{ord(char):04x}"


def _show_char(char: str) -> str:
    """Return HTML of a character in the running text, where blanks stay blanks."""
    if char == "\n":
        return "<i>\u21b5</i>\n"
    is_control = unicodedata.category(char) == "Cc" and char != "\t"
    # What turns the direction of text would turn the tokens around it too.
    if is_control or unicodedata.bidirectional(char) in _TURNS:
        return _spell_char(char)
    return escape(char)


def _scale(name: str, title: str, ends: tuple[float, float] | None) -> str:
    if ends is None:
        numbers = "<span>not known</span>"
    elif ends[0] == ends[1]:
        numbers = f'<span class="scale-swatch"></span><span>{ends[0]:.2f} everywhere</span>'
    else:
        numbers = (
            f'<span>{ends[0]:.2f}</span><span class="scale-bar" aria-hidden="true"></span>'
            f"<span>{ends[1]:.2f}</span>"
        )
    return f'<div class="scale" data-measure="{name}"><strong>{title}</strong>{numbers}</div>'


def _details(token: Token) -> str:
    """Return what the details show as JSON in an attribute between single quotes."""
    rows = [(spell(text), _probability(logprob), text == token.text)
            for text, logprob in token.alternatives]  # fmt: skip
    if token.logprob is not None and not any(is_chosen for *_, is_chosen in rows):
        rows.append((spell(token.text), _probability(token.logprob), True))
    told = [
        spell(token.text), token.token_id, token.token_class, _short(token.temperature),
        _short(token.entropy), _short(token.surprise),
        None if token.logprob is None else _probability(token.logprob),
        [[text, probability, int(is_chosen)] for text, probability, is_chosen in rows],
    ]  # fmt: skip
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
    return escape(text, quote=False).replace("'", "&#39;")


def _probability(logprob: float) -> float:
    return float(f"{math.exp(min(logprob, 0.0)):.3g}")


def _short(value: float | None) -> float | str | None:
    if value is None or math.isnan(value):
        return None
    return float(f"{value:.4g}") if math.isfinite(value) else "infinite"
