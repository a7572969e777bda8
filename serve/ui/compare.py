"""The Compare tab: one prompt, two to four arms side by side, and which is better."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from html import escape
from typing import Any

import gradio as gr

from client.api import ApiClient
from client.errors import RequestError
from serve.ui.answers import Answer, paint_at_times
from serve.ui.controls import MAX_NEW_TOKENS, PRIVATE, ArmControls, describe_arm, read_arm
from serve.ui.conversation import COPY_JS, with_copy_buttons
from serve.ui.markdown import render_markdown
from serve.ui.messages import render_problem
from serve.ui.unfinished import Unfinished

LETTERS = "ABCD"
_FIRST = ("fixed", "adapt")  # strategies of the arms, until others are chosen
MIN_ARMS, MAX_ARMS = 2, 4
_TIE, _BOTH_BAD = "tie", "both_bad"

# {"id": of the comparison, "order": arm shown at each place, "labels": of the arms,
#  "is_blind": names are hidden, "is_done": can be voted on, "vote": what was voted}
Round = dict[str, Any]


class CompareTab:
    """Components of the tab and what they do.

    Args:
        client: of the server.
        catalog: of the session.
        key: the API key's field.
    """

    def __init__(self, client: ApiClient, catalog: gr.State, key: gr.Textbox) -> None:
        self._client, self._key = client, key
        self._round = gr.State({})
        self._answers = gr.State([])
        self._text = gr.Textbox(
            label="Prompt for all arms", value="", lines=2, max_lines=12, elem_id="compare-text"
        )
        with gr.Row(elem_classes="composer"):
            self._run = gr.Button("Compare", variant="primary", elem_id="compare-run")
            self._stop = gr.Button("Stop", variant="stop", visible=False, elem_id="compare-stop")
        with gr.Row(elem_classes="options"):
            self._count = gr.Radio(
                [2, 3, 4], value=2, label="Arms", elem_id="compare-count", min_width=150
            )
            self._is_blind = gr.Checkbox(
                label="Blind: shuffled, names after the vote", elem_id="compare-blind"
            )
            self._is_common = gr.Checkbox(
                label="Common random numbers", value=True, elem_id="compare-common"
            )
        self._view = gr.HTML(
            render_arms([], {}), elem_id="compare-view", apply_default_css=False,
            js_on_load=COPY_JS,
        )  # fmt: skip
        with gr.Row(elem_classes="votes"):
            self._votes = [
                gr.Button(
                    f"{letter} is better", visible=i < MIN_ARMS, interactive=False,
                    elem_id=f"compare-vote-{letter.lower()}",
                )
                for i, letter in enumerate(LETTERS)
            ]  # fmt: skip
            self._votes += [
                gr.Button("Tie", interactive=False, elem_id="compare-vote-tie"),
                gr.Button("Both bad", interactive=False, elem_id="compare-vote-bad"),
            ]
        self._tally = gr.HTML(render_tally([]), elem_id="compare-tally", apply_default_css=False)
        self._arms, panels = [], []
        with gr.Row(elem_classes="arms"):
            for i, letter in enumerate(LETTERS):
                with gr.Column(min_width=240, visible=i < MIN_ARMS) as panel:
                    gr.Markdown(f"### Arm {letter}")
                    self._arms.append(
                        ArmControls(
                            catalog, elem_id=f"compare-{letter.lower()}",
                            strategy=_FIRST[i % len(_FIRST)],
                        )
                    )  # fmt: skip
                panels.append(panel)
        with gr.Accordion("For all arms", open=False):
            self._system = gr.Textbox(
                label="System prompt", value="", lines=2, elem_id="compare-system"
            )
            self._most = gr.Slider(
                1, MAX_NEW_TOKENS, value=256, step=1, label="Most new tokens",
                elem_id="compare-max-tokens",
            )  # fmt: skip
            self._seed = gr.Number(
                label="Seed (-1: another each time)", value=-1, precision=0, elem_id="compare-seed"
            )
        self._connect(panels)

    def _connect(self, panels: Sequence[gr.Column]) -> None:
        self._count.change(
            lambda count: [gr.Column(visible=i < count) for i in range(MAX_ARMS)],
            self._count, list(panels), queue=False, **PRIVATE,
        )  # fmt: skip
        controls = [component for arm in self._arms for component in arm.inputs]
        shown = [self._view, self._round, self._answers, self._run, self._stop, *self._votes]
        unfinished = Unfinished()
        running = self._run.click(
            unfinished.track(self._compare),
            [self._key, self._text, self._count, self._is_blind, self._is_common, self._system,
             self._most, self._seed, *controls],
            shown, **PRIVATE,
        )  # fmt: skip
        halted = unfinished.halt(self._stop.click, [running])
        halted.then(_stop, [self._round, self._answers], shown, **PRIVATE)
        for place, button in enumerate(self._votes):
            button.click(
                self._make_vote(place), [self._key, self._round, self._answers],
                [*shown, self._tally], **PRIVATE,
            )  # fmt: skip

    def load(self, page: gr.Blocks) -> None:
        """Show the tally that the server has kept."""
        page.load(self._load_tally, self._key, self._tally, **PRIVATE)

    async def _load_tally(self, key: str) -> str:
        try:
            rows = await self._client.entries("/v1/compare/votes", key=key)
        except RequestError as error:
            return render_problem(f"The tally cannot be had: {error}")
        return render_tally(rows)

    async def _compare(
        self, key: str, text: str, count: int, is_blind: bool, is_common: bool, system: str,
        most: float, seed: float, *controls: Any,
    ) -> AsyncIterator[tuple[Any, ...]]:  # fmt: skip
        """Ask all arms and show what comes, each in its place."""
        if not text.strip():
            yield _state([], {}, problem="Write a prompt first.")
            return
        size = len(controls) // MAX_ARMS
        arms = [read_arm(list(controls[i * size : (i + 1) * size])) for i in range(count)]
        order = random.sample(range(count), count) if is_blind else list(range(count))
        system_turn = [{"role": "system", "content": system}] if system.strip() else []
        body = {
            "arms": arms, "messages": [*system_turn, {"role": "user", "content": text}],
            "max_tokens": int(most), "common_random_numbers": is_common, "stream": True,
        }  # fmt: skip
        if seed >= 0:
            body["seed"] = int(seed)
        found: Round = {
            "id": None, "order": order, "labels": [describe_arm(arm) for arm in arms],
            "is_blind": is_blind, "is_done": False, "vote": None,
        }  # fmt: skip
        answers = [Answer() for _ in arms]
        yield _state(answers, found, is_running=True)

        def take(chunk: dict[str, Any]) -> None:
            found["id"] = chunk["id"]
            if "arm" in chunk:
                answer = answers[chunk["arm"]]
                if content := chunk["delta"].get("content"):
                    answer.add(content)
                answer.finish_reason = chunk["finish_reason"] or answer.finish_reason
            for answer, usage in zip(answers, chunk.get("usage", {}).get("arms", ()), strict=False):
                answer.num_tokens = usage["completion_tokens"]

        try:
            async with aclosing(self._client.stream("/v1/compare", body, key=key)) as stream:
                async for _ in paint_at_times(stream, take):
                    yield _state(answers, found, is_running=True)
        except RequestError as error:
            yield _state(answers, found, problem=str(error))
            return
        found["is_done"] = True
        yield _state(answers, found)

    def _make_vote(self, place: int) -> Any:
        async def vote(key: str, found: Round, answers: list[Answer]) -> tuple[Any, ...]:
            chosen = (_TIE, _BOTH_BAD)[place - MAX_ARMS] if place >= MAX_ARMS else None
            if chosen is None:
                chosen = found["order"][place]
            path = f"/v1/compare/{found['id']}/vote"
            try:
                await self._client.request("POST", path, key=key, body={"vote": chosen})
            except RequestError as error:
                return *_state(answers, found, problem=f"Not counted: {error}"), gr.skip()
            found = {**found, "vote": chosen}
            return *_state(answers, found), await self._load_tally(key)

        return vote


def render_arms(
    answers: Sequence[Answer], found: Round, *, is_running: bool = False, problem: str = ""
) -> str:
    """Return the HTML of the arms' answers, side by side in the order in which they are shown.

    Args:
        answers: of the arms.
        found: the comparison.
        is_running: whether answers still grow.
        problem: what went wrong.
    """
    message = render_problem(problem) if problem else ""
    if not answers:
        hint = "" if problem else (
            '<p class="empty">All arms answer one prompt at once. What they sit on computes it '
            "once.</p>"
        )  # fmt: skip
        return message + hint
    are_named = not found["is_blind"] or found["vote"] is not None
    parts = []
    for place, arm in enumerate(found["order"]):
        answer = answers[arm]
        is_best = found["vote"] == arm
        name = escape(found["labels"][arm]) if are_named else "hidden until you vote"
        busy = str(is_running and answer.finish_reason is None).lower()
        # The speed may give an arm away.
        note = escape(answer.describe()) if are_named else ""
        parts.append(
            f'<section class="arm{" best" if is_best else ""}" aria-busy="{busy}" '
            f'aria-label="Answer {LETTERS[place]}"><header><strong>{LETTERS[place]}</strong> '
            f'<span class="note">{name}</span></header><div class="markdown">'
            f"{with_copy_buttons(render_markdown(answer.text))}</div>"
            f'<footer class="note">{note}</footer></section>'
        )
    return f'{message}<div class="answers arms-{len(parts)}">{"".join(parts)}</div>'


def render_tally(rows: Sequence[dict[str, Any]]) -> str:
    """Return the HTML of the votes of each pair of arms."""
    if not rows:
        return '<p class="empty small">No votes yet.</p>'
    head = "".join(
        f'<th scope="col">{title}</th>'
        for title in ("First", "Second", "First won", "Second won", "Ties", "Both bad",
                      "First's win rate (95 % interval)")
    )  # fmt: skip
    body = "".join(_tally_row(row) for row in rows)
    return (
        '<div class="tally"><table><caption>Votes so far, kept by the server</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _tally_row(row: dict[str, Any]) -> str:
    first, second = (_arm_name(arm) for arm in row["arms"])
    counts = (*row["wins"], row["ties"], row["both_bad"])
    if row["win_rate"] is None:
        rate = "none yet"
    else:
        low, high = row["interval"]
        rate = (
            f'<span class="interval" aria-hidden="true"><span style="left:{low:.1%};'
            f'right:{1 - high:.1%}"></span><i style="left:{row["win_rate"]:.1%}"></i></span>'
            f"{row['win_rate']:.0%} ({low:.0%} to {high:.0%})"
        )
    numbers = "".join(f"<td>{count}</td>" for count in counts)
    return f"<tr><td>{first}</td><td>{second}</td>{numbers}<td>{rate}</td></tr>"


def _arm_name(arm: dict[str, Any]) -> str:
    fields = {k: v for k, v in arm.items() if k != "label"}
    return escape(describe_arm(fields))


def _state(
    answers: list[Answer], found: Round, *, is_running: bool = False, problem: str = ""
) -> tuple[Any, ...]:
    can_vote = bool(found) and found["is_done"]
    count = len(answers) or MIN_ARMS
    votes = [
        gr.Button(interactive=can_vote, visible=i < count or i >= MAX_ARMS)
        for i in range(MAX_ARMS + 2)
    ]
    view = render_arms(answers, found, is_running=is_running, problem=problem)
    return (
        view, found, answers, gr.Button(visible=not is_running), gr.Button(visible=is_running),
        *votes,
    )  # fmt: skip


def _stop(found: Round, answers: list[Answer]) -> tuple[Any, ...]:
    is_done = bool(found) and found["is_done"]
    problem = "" if is_done else "Stopped: what is cut short is not voted on."
    return _state(answers, found, problem=problem)
