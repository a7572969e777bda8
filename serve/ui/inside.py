"""The Inside tab: one answer token by token, how each was drawn and what else could have come."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from html import escape
from typing import Any

import gradio as gr

from client.api import ApiClient
from client.errors import RequestError
from serve.ui.answers import SEPARATOR, Answer, paint_at_times
from serve.ui.controls import MAX_NEW_TOKENS, PRIVATE, ArmControls, describe_arm, read_arm
from serve.ui.messages import render_problem
from serve.ui.tokens import (
    CLASSES,
    MEASURES,
    Token,
    read_tokens,
    render_legend,
    render_plot,
    render_token,
)
from serve.ui.unfinished import Unfinished

NUM_ALTERNATIVES = 8
# A long answer takes longer to draw, so it is drawn less often.
PAINT_INTERVAL_PER_TOKEN_S = 0.0007
_HINT = '<p class="empty">Run a prompt to see how each token of its answer was drawn.</p>'
_DETAILS = (
    '<div class="details" aria-live="polite"><p class="subtle">Point at a token, or go to it with '
    "Tab and the arrow keys.</p></div>"
)
# Details are made in the page, from the data at each token: no request, and text stays text.
_TOKENS_JS = """
const classes = CLASSES;
let shown = null, pinned = null, isAtEnd = true;
const list = () => element.querySelector('.tokens');
const hint = document.querySelector('#inside-details .details')?.innerHTML;

// An attribute, because rules with :has() would be tried again for every token at each change.
function setMeasure() {
  const page = element.closest('.inside');
  const chosen = page.querySelector('#inside-color input:checked');
  if (list()?.firstElementChild) page.dataset.measure = chosen?.value ?? 'temperature';
  else delete page.dataset.measure;
}
document.addEventListener('change', (event) => {
  if (event.target.closest('#inside-color')) setMeasure();
});
function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
function percent(share) {
  if (share === 0) return '0 %';
  return share >= 0.0995 ? (share * 100).toFixed(1) + ' %' : (share * 100).toPrecision(2) + ' %';
}
function told(value) {
  return typeof value === 'number' ? String(Number(value.toPrecision(3))) : value ?? 'not known';
}
function describe(token) {
  const [text, id, kind, temperature, entropy, surprise, probability, rows] =
    JSON.parse(token.dataset.token);
  const facts = make('dl');
  const all = [['Token', text], ['Id', id], ['Place', Number(token.dataset.place) + 1],
    ['Temperature', told(temperature)], ['Entropy', told(entropy) + ' nats'],
    ['Surprise', told(surprise) + ' nats'],
    ['Probability', probability === null ? 'not known' : percent(probability)],
    ['Class', kind ? kind + ': ' + (classes[kind] ?? '') : 'none: only AdapT has one']];
  for (const [name, value] of all) {
    const fact = make('div');
    fact.append(make('dt', '', name), make('dd', name === 'Token' ? 'spelt' : '', value));
    facts.append(fact);
  }
  const ranking = make('ol', 'alternatives');
  for (const [name, share, isChosen] of rows) {
    const row = make('li', isChosen ? 'is-chosen' : '');
    const bar = make('span', 'bar-track');
    const fill = make('span', 'bar-fill');
    fill.style.width = Math.max(share * 100, 0.5) + '%';
    bar.append(fill);
    const spelt = make('span', 'spelt', name);
    spelt.title = name;
    row.append(spelt, bar, make('span', 'number', percent(share)));
    if (isChosen) row.append(make('span', 'chosen', 'drawn'));
    ranking.append(row);
  }
  const title = make('h3', '', 'Likeliest tokens here, before temperature and filters');
  return [facts, title, ranking];
}
function mark(token) {
  const plot = document.querySelector('#inside-plot .plot > svg');
  const line = plot?.querySelector('.plot-mark');
  if (!line) return;
  line.classList.toggle('is-set', Boolean(token));
  if (!token) return;
  const x = 100 * (Number(token.dataset.place) + 1 - plot.dataset.low)
    / (plot.dataset.high - plot.dataset.low);
  line.setAttribute('x1', x + '%');
  line.setAttribute('x2', x + '%');
}
function show(token) {
  shown?.classList.remove('is-shown');
  shown = token;
  shown?.classList.add('is-shown');
  const panel = document.querySelector('#inside-details .details');
  if (panel && shown) panel.replaceChildren(...describe(shown));
  else if (panel) panel.innerHTML = hint;
  mark(shown);
}
function pin(token) {
  const old = pinned ?? list()?.firstElementChild;
  old?.setAttribute('tabindex', '-1');
  old?.removeAttribute('aria-selected');
  pinned = token;
  pinned?.setAttribute('tabindex', '0');
  pinned?.setAttribute('aria-selected', 'true');
  show(pinned);
}
function nextLine(token, way) {
  const sibling = way > 0 ? 'nextElementSibling' : 'previousElementSibling';
  const from = token.getBoundingClientRect();
  let best = null, distance = Infinity, line = null;
  for (let at = token[sibling]; at; at = at[sibling]) {
    const box = at.getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) >= 4) break;
    if (Math.abs(box.left - from.left) < distance) {
      best = at; distance = Math.abs(box.left - from.left);
    }
  }
  return best;
}
element.addEventListener('pointerover', (event) => {
  const token = event.target.closest('.token');
  if (token && event.pointerType !== 'touch') show(token);
});
element.addEventListener('pointerleave', () => { if (pinned) show(pinned); });
element.addEventListener('focusin', (event) => {
  const token = event.target.closest('.token');
  if (token) pin(token);
});
element.addEventListener('click', (event) => event.target.closest('.token')?.focus());
element.addEventListener('keydown', (event) => {
  const token = event.target.closest('.token');
  if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
  const next = {
    ArrowRight: () => token.nextElementSibling, ArrowLeft: () => token.previousElementSibling,
    ArrowDown: () => nextLine(token, 1), ArrowUp: () => nextLine(token, -1),
    Home: () => list().firstElementChild, End: () => list().lastElementChild,
  }[event.key];
  if (!next) return;
  event.preventDefault();
  next()?.focus();
});
element.addEventListener('place', (event) => {
  const token = list().children[event.detail.place];
  if (!token) return;
  if (event.detail.isPinned) token.focus(); else show(token);
});
element.addEventListener('scroll', (event) => {
  const box = event.target;
  isAtEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 40;
}, true);
// A growing answer is only added to: what is there already is neither compared nor drawn again.
let drawn = '';
function draw() {
  const box = list(), value = props.value ?? '';
  if (drawn && value.startsWith(drawn)) {
    box.insertAdjacentHTML('beforeend', value.slice(drawn.length));
  } else if (value !== drawn) {
    shown = pinned = null;
    isAtEnd = true;
    box.innerHTML = value;
    show(null);
  }
  drawn = value;
  setMeasure();
  if (isAtEnd && !pinned) box.scrollTop = box.scrollHeight;
  if (shown) setTimeout(() => mark(shown), 50);
}
watch('value', draw);
draw();
"""
_TOKENS_JS = _TOKENS_JS.replace("CLASSES", json.dumps(CLASSES))
_PLOT_JS = """
function tell(event, isPinned) {
  const grid = element.querySelector('.plot-grid')?.getBoundingClientRect();
  const plot = element.querySelector('.plot > svg');
  const list = document.querySelector('#inside-tokens .tokens');
  if (!grid || !list || !grid.width) return;
  const share = (event.clientX - grid.left) / grid.width;
  if (share < -0.02 || share > 1.02) return;
  const place = Math.round(share * plot.dataset.high) - 1;
  const detail = {place: Math.min(Math.max(place, 0), list.children.length - 1), isPinned};
  list.dispatchEvent(new CustomEvent('place', {detail, bubbles: true}));
}
element.addEventListener('pointermove', (event) => {
  if (event.pointerType !== 'touch') tell(event, false);
});
element.addEventListener('click', (event) => tell(event, true));
"""


class InsideTab:
    """Components of the tab and what they do.

    Args:
        client: of the server.
        catalog: of the session.
        key: the API key's field.
    """

    def __init__(self, client: ApiClient, catalog: gr.State, key: gr.Textbox) -> None:
        self._client, self._key = client, key
        with gr.Row(elem_classes="split inside"):
            with gr.Column(scale=1, min_width=260, elem_classes="side"):
                self._arm = ArmControls(catalog, elem_id="inside", strategy="adapt")
                self._most = gr.Slider(
                    1, MAX_NEW_TOKENS, value=200, step=1, label="Most new tokens",
                    elem_id="inside-max-tokens",
                )  # fmt: skip
                self._seed = gr.Number(
                    label="Seed (-1: another each time)", value=-1, precision=0,
                    elem_id="inside-seed",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=320, elem_classes="main"):
                with gr.Row(elem_classes="composer"):
                    self._prompt = gr.Textbox(
                        label="Prompt", show_label=False, container=False, value="", lines=1,
                        max_lines=10, scale=5, elem_id="inside-prompt",
                        placeholder="Prompt (Enter runs it, Shift+Enter makes a line)",
                    )  # fmt: skip
                    self._run = gr.Button(
                        "Run", variant="primary", elem_id="inside-run", min_width=96, scale=0
                    )
                    self._stop = gr.Button(
                        "Stop",
                        variant="stop",
                        visible=False,
                        elem_id="inside-stop",
                        min_width=96,
                        scale=0,
                    )
                gr.Radio(
                    [(name.capitalize(), name) for name in MEASURES], value="temperature",
                    label="Colour by", elem_id="inside-color", interactive=True,
                )  # fmt: skip
                self._legend = _html("inside-legend", "")
                with gr.Row(elem_classes="tokens-and-details"):
                    with gr.Column(scale=3, min_width=300):
                        self._tokens = _html(
                            "inside-tokens", "",
                            html_template='<div class="tokens" role="listbox" aria-label="Tokens '
                            'of the answer" aria-orientation="horizontal"></div>',
                            js_on_load=_TOKENS_JS,
                        )  # fmt: skip
                        self._note = _html("inside-note", _HINT)
                    with gr.Column(scale=2, min_width=270, elem_classes="details-column"):
                        _html("inside-details", _DETAILS)
                self._plot = _html("inside-plot", render_plot(()), js_on_load=_PLOT_JS)
        self._connect()

    def _connect(self) -> None:
        inputs = [self._key, self._prompt, self._most, self._seed, *self._arm.inputs]
        shown = [self._tokens, self._legend, self._plot, self._note, self._run, self._stop]
        unfinished = Unfinished()
        running: list[Any] = [
            event(unfinished.track(self._answer), inputs, shown, **PRIVATE)
            for event in (self._run.click, self._prompt.submit)
        ]
        stopped = unfinished.halt(self._stop.click, running)
        stopped.then(_rest, None, [self._run, self._stop], **PRIVATE)

    async def _answer(
        self, key: str, prompt: str, most: float, seed: float, *arm: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Ask, and show the tokens as they come."""
        if not prompt.strip():
            yield _view([], "", render_problem("Write a prompt first."))
            return
        chosen = read_arm(list(arm))
        body = {
            **chosen, "messages": [{"role": "user", "content": prompt}], "max_tokens": int(most),
            "logprobs": True, "top_logprobs": NUM_ALTERNATIVES, "return_decoding_trace": True,
            "stream": True,
        }  # fmt: skip
        if seed >= 0:
            body["seed"] = int(seed)
        answer, tokens, parts = Answer(), list[Token](), list[str]()
        name = describe_arm(chosen)

        def take(chunk: dict[str, Any]) -> None:
            for choice in chunk["choices"]:
                for token in read_tokens(choice):
                    parts.append(render_token(token, len(tokens)))
                    tokens.append(token)
                    answer.add(token.text)
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason

        def view(note: str = "", *, is_running: bool = False) -> tuple[Any, ...]:
            told = _note(SEPARATOR.join(filter(None, (answer.describe(), name))))
            return _view(tokens, "".join(parts), note or told, is_running=is_running)

        yield view(is_running=True)
        painted_s = 0.0
        try:
            stream = self._client.stream("/v1/chat/completions", body, key=key)
            async with aclosing(stream):
                async for _ in paint_at_times(stream, take):
                    pause_s = PAINT_INTERVAL_PER_TOKEN_S * len(tokens)
                    if time.monotonic() - painted_s >= pause_s:
                        painted_s = time.monotonic()
                        yield view(is_running=True)
        except RequestError as error:
            yield view(render_problem(str(error)))
            return
        yield view()


def _html(elem_id: str, value: str, **options: Any) -> gr.HTML:
    options = {"js_on_load": None, **options}
    return gr.HTML(value, elem_id=elem_id, elem_classes="flush", apply_default_css=False, **options)


def _view(
    tokens: list[Token], html: str, note: str, *, is_running: bool = False
) -> tuple[Any, ...]:
    plot = render_plot(tokens)
    return html, render_legend(tokens), plot, note, *_buttons(is_running=is_running)


def _buttons(*, is_running: bool = False) -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=not is_running), gr.Button(visible=is_running)


def _rest() -> tuple[gr.Button, gr.Button]:
    return _buttons()


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
