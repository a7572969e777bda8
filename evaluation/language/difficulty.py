"""How hard each token of code and of prose is to predict, by where it stands in its line.

A model is shown what people wrote, and the loss of each token is read. Within a text, a token's
prediction difficulty is the rank of its loss, from 0 to 1. AdapT claims that tokens which begin a
line of code are the hard ones.

Source: Zhu et al., "Hot or Cold? Adaptive Temperature Sampling for Code Generation with Large
Language Models", AAAI 2024, for the question; the exact measure of that paper is not public.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from evaluation.language.scoring import read_echo
from evaluation.records import Record, RecordLog, spread
from evaluation.server import Arm, Servers, run_each
from evaluation.tables import describe_estimate, table
from stats.bootstrap import bootstrap_mean

CODE, PROSE = "code", "prose"
LINE, BLOCK, COLUMN0, BLANK, INSIDE = (
    "line-initial", "block-initial", "column 0", "line end and blanks", "inside a line",
)  # fmt: skip
PLACES = (BLOCK, LINE, COLUMN0, BLANK, INSIDE)
"""Of a token of code: the first text of an indented line after one that opens a block, of another
indented line, of a line that is not indented; a token without text; any other."""

_OPENERS = (":", "{", "(", "[")
_SURE = 0.01
_BINS = 60
_LARGEST = 12.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A text that is shown.

    Attributes:
        name: of it, unique.
        kind: `code` or `prose`.
        context: what it follows; its tokens do not count.
        text: whose tokens count.
    """

    name: str
    kind: str
    context: str
    text: str


def place_of(before: str, token: str) -> str:
    """Return where a token of code stands, given all text before it."""
    if not token.strip():
        return BLANK
    # A token may hold the end of one line and the beginning of the next.
    head = before + token[: len(token) - len(token.lstrip())]
    line_start = head.rfind("\n") + 1
    indent = head[line_start:]
    if indent.strip():
        return INSIDE
    if not indent:
        return COLUMN0
    lines = [line for line in head[:line_start].splitlines() if line.strip()]
    return BLOCK if lines and lines[-1].rstrip().endswith(_OPENERS) else LINE


async def measure_difficulty(
    samples: Sequence[Sample],
    arm: Arm,
    log: RecordLog,
    servers: Servers,
    *,
    concurrency: int,
    progress: Callable[[str, int], None],
) -> list[Record]:
    """Show the texts and read the losses; those in the log are not shown again.

    Args:
        samples: that are shown.
        arm: the model.
        log: of the losses.
        servers: of the arm, which must echo log probabilities.
        concurrency: requests under way at once.
        progress: told `text` and how many more are there.

    Returns:
        Of each text its kind, and `losses` and `places` of its tokens.

    Raises:
        RunError: the server refuses, is gone, or echoes no log probabilities.
    """
    await servers.check([arm])
    there = {record["name"] for record in log.records}
    progress("text", len(there))

    async def show(sample: Sample) -> None:
        prompt = sample.context + sample.text
        log.add(await read_echo(arm, prompt, servers, partial(_read, sample)))
        progress("text", 1)

    await run_each([s for s in samples if s.name not in there], show, concurrency=concurrency)
    return log.records


def _read(sample: Sample, choices: Sequence[Mapping[str, Any]]) -> Record:
    whole = sample.context + sample.text
    losses, places = [], []
    logprobs = choices[0]["logprobs"]
    offsets = [int(offset) for offset in logprobs["text_offset"]]
    for index, value in enumerate(logprobs["token_logprobs"]):
        start = offsets[index]
        if value is None or start < len(sample.context) or start >= len(whole):
            continue
        end = offsets[index + 1] if index + 1 < len(offsets) else len(whole)
        losses.append(-float(value))
        places.append(PLACES.index(place_of(whole[:start], whole[start:end])))
    return {"name": sample.name, "kind": sample.kind, "losses": losses, "places": places}


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value from 0 to 1; equal ones share their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            found[place] = (start + end) / 2 / max(1, len(values) - 1)
        start = end + 1
    return found


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Return the losses of code and prose, and the difficulty of code's tokens by place.

    Returns:
        For each kind: tokens, mean and median loss, skewness, excess kurtosis, the share of tokens
        with a loss below 0.01, a histogram. For code: of each place tokens, mean and median rank
        and loss, its share of the hardest tenth; and the mean over texts of the mean rank of what
        begins an indented line less that of what stands inside one, with a 95 % interval.
    """
    summary: dict[str, Any] = {"kinds": {}, "places": {}, "gap": None}
    for kind in (CODE, PROSE):
        losses = [loss for r in records if r["kind"] == kind for loss in r["losses"]]
        if losses:
            summary["kinds"][kind] = _shape(losses)
    code = [record for record in records if record["kind"] == CODE and record["losses"]]
    by_place: dict[int, list[tuple[float, float]]] = {}
    hardest, gaps = 0, []
    for record in code:
        of_text = ranks(record["losses"])
        initial, inside = [], []
        for place, loss, rank in zip(record["places"], record["losses"], of_text, strict=True):
            by_place.setdefault(place, []).append((loss, rank))
            hardest += rank >= 0.9
            if PLACES[place] in (BLOCK, LINE):
                initial.append(rank)
            elif PLACES[place] == INSIDE:
                inside.append(rank)
        if initial and inside:
            gaps.append(fmean(initial) - fmean(inside))
    for place, name in enumerate(PLACES):
        if found := by_place.get(place):
            summary["places"][name] = {
                "tokens": len(found),
                "mean_rank": fmean(rank for _, rank in found),
                "median_rank": median(rank for _, rank in found),
                "mean_loss": fmean(loss for loss, _ in found),
                "share_of_hardest": sum(rank >= 0.9 for _, rank in found) / max(1, hardest),
            }
    if gaps:
        summary["gap"] = {"texts": len(gaps), **describe_estimate(bootstrap_mean(gaps))}
    return summary


def _shape(losses: Sequence[float]) -> dict[str, Any]:
    mean = fmean(losses)
    moments = [fmean((loss - mean) ** power for loss in losses) for power in (2, 3, 4)]
    deviation = math.sqrt(moments[0])
    counts = [0] * _BINS
    for loss in losses:
        counts[min(_BINS - 1, int(loss / _LARGEST * _BINS))] += 1
    return {
        "tokens": len(losses),
        "mean": mean,
        "median": median(losses),
        "skewness": moments[1] / deviation**3 if deviation else 0.0,
        "excess_kurtosis": moments[2] / moments[0] ** 2 - 3 if deviation else 0.0,
        "share_sure": sum(loss < _SURE for loss in losses) / len(losses),
        "histogram": {"largest": _LARGEST, "counts": counts},
    }


def to_markdown(summary: Mapping[str, Any], title: str) -> str:
    """Return the figures as a page."""
    lines = [f"# {title}", ""]
    lines += table(
        ["", "tokens", "mean loss, nats", "median", "skewness", "excess kurtosis",
         "loss below 0.01, %"],
        [
            [kind, str(of["tokens"]), f"{of['mean']:.3f}", f"{of['median']:.3f}",
             f"{of['skewness']:.2f}", f"{of['excess_kurtosis']:.1f}",
             f"{100 * of['share_sure']:.1f}"]
            for kind, of in summary["kinds"].items()
        ],
    )  # fmt: skip
    if summary["places"]:
        total = sum(of["tokens"] for of in summary["places"].values())
        lines += [
            "",
            "Tokens of code by where they stand; rank of the loss within its text, 0 to 1:",
        ]
        lines += [""] + table(
            ["", "tokens, %", "mean rank", "median rank", "mean loss", "of the hardest tenth, %"],
            [
                [name, f"{100 * of['tokens'] / total:.1f}", f"{of['mean_rank']:.3f}",
                 f"{of['median_rank']:.3f}", f"{of['mean_loss']:.3f}",
                 f"{100 * of['share_of_hardest']:.1f}"]
                for name, of in summary["places"].items()
            ],
        )  # fmt: skip
    if summary["gap"] is not None:
        gap = summary["gap"]
        lines += [
            "",
            f"What begins an indented line ranks {gap['value']:+.3f} "
            f"[{gap['low']:+.3f}, {gap['high']:+.3f}] against what stands inside one: mean over "
            f"{gap['texts']} texts, 95 % interval by bootstrap over texts.",
        ]
    return "\n".join(lines) + "\n"


def read_prose(path: Path, text: str, count: int) -> list[Sample]:
    """Return paragraphs of a text as samples.

    Args:
        path: of the text, for names.
        text: paragraphs are divided by line ends.
        count: most of them, spread over the text.
    """
    paragraphs = [line.strip() for line in text.splitlines() if len(line.split()) >= 30]
    return [
        Sample(name=f"{path.name}/{number}", kind=PROSE, context="", text=paragraph)
        for number, paragraph in enumerate(spread(paragraphs, count))
    ]
