"""Classification: served adapters name the class of texts whose class is known."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.errors import RunError
from evaluation.folder import open_logs
from evaluation.records import Record
from evaluation.server import Arm, Servers, run_each
from evaluation.tables import percent, table
from stats.correlation import matthews, pearson, spearman
from stats.proportions import wilson_interval

_TEXTS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """A text and its class.

    Attributes:
        name: of it, unique in its file.
        text: that is classified.
        label: its class; for a regression a number.
    """

    name: str
    text: str
    label: str


async def ask_labels(
    examples: Sequence[Labelled],
    arms: Sequence[Arm],
    folder: Path,
    servers: Servers,
    *,
    concurrency: int,
    progress: Callable[[str, int], None],
) -> dict[str, list[Record]]:
    """Let each arm classify each text; what the folder holds is not asked again.

    Args:
        examples: with their classes.
        arms: adapters that classify, of servers with /v1/classify.
        folder: of the run.
        servers: of the arms.
        concurrency: requests under way at once.
        progress: told `text` and how many more are there.

    Returns:
        A record for each text, of each arm, by its label.

    Raises:
        RunError: a server refuses or is gone, or a file cannot be written.
    """
    await servers.check(arms)
    with ExitStack() as stack:
        logs = open_logs(folder, [arm.label for arm in arms], "_labels.jsonl", stack)
        there = {label: {r["text"] for r in log.records} for label, log in logs.items()}
        progress("text", sum(map(len, there.values())))

        async def ask(item: tuple[Arm, Sequence[Labelled]]) -> None:
            arm, part = item
            answer = await servers.ask(arm, "/v1/classify", {"input": [e.text for e in part]})
            try:
                found = sorted(answer["data"], key=lambda entry: int(entry["index"]))
                records = [_describe(e, entry) for e, entry in zip(part, found, strict=True)]
            except (KeyError, TypeError, ValueError):
                raise RunError(
                    f"arm {arm.label!r}: the server at {arm.url} gives no classes"
                ) from None
            for record in records:
                logs[arm.label].add(record)
            progress("text", len(part))

        items = []
        for arm in arms:
            missing = [e for e in examples if e.name not in there[arm.label]]
            items += [
                (arm, missing[start : start + _TEXTS_AT_ONCE])
                for start in range(0, len(missing), _TEXTS_AT_ONCE)
            ]
        await run_each(items, ask, concurrency=concurrency)
        return {label: log.records for label, log in logs.items()}


def _describe(example: Labelled, entry: dict[str, Any]) -> Record:
    label, probs, score = entry["label"], entry["probs"], entry.get("score")
    return {
        "text": example.name,
        "label": example.label,
        "predicted": None if label is None else str(label),
        "probs": [float(value) for value in probs],
        "score": None if score is None else float(score),
    }


def summarise(results: dict[str, list[Record]]) -> dict[str, Any]:
    """Return the figures that GLUE's tasks are measured by, as far as they have a meaning.

    Returns:
        Of each arm by its label: for classes `accuracy` with its Wilson interval, `matthews` and,
        with two classes, `f1` of the second; for a regression `pearson` and `spearman`.

    Raises:
        RunError: a label of a regression is no number.
    """
    return {"arms": {label: _figures(records) for label, records in results.items()}}


def _figures(records: Sequence[Record]) -> dict[str, Any]:
    if all(record["predicted"] is None for record in records):
        try:
            known = [float(record["label"]) for record in records]
        except ValueError as error:
            raise RunError(f"a regression's labels must be numbers: {error}") from None
        found = [float(record["score"]) for record in records]
        return {
            "texts": len(records),
            "pearson": pearson(known, found),
            "spearman": spearman(known, found),
        }
    pairs = [(str(record["label"]), str(record["predicted"])) for record in records]
    right = sum(known == said for known, said in pairs)
    low, high = wilson_interval(right, len(pairs))
    classes = sorted({label for pair in pairs for label in pair})
    entry: dict[str, Any] = {
        "texts": len(pairs),
        "accuracy": {"value": right / len(pairs), "low": low, "high": high},
        "matthews": matthews(pairs),
    }
    if len(classes) == 2:
        both = sum(pair == (classes[1], classes[1]) for pair in pairs)
        said_or_known = sum((known == classes[1]) + (said == classes[1]) for known, said in pairs)
        entry["f1"] = 2 * both / said_or_known if said_or_known else 0.0
    return entry


def to_markdown(summary: dict[str, Any], title: str) -> str:
    """Return the figures as a page."""
    arms = summary["arms"]
    columns = [
        name
        for name in ("accuracy", "f1", "matthews", "pearson", "spearman")
        if any(name in of for of in arms.values())
    ]

    def cell(of: dict[str, Any], name: str) -> str:
        if name == "accuracy":
            return percent(of.get(name))
        value = of.get(name)
        return "" if value is None or math.isnan(value) else f"{100 * value:.2f}"

    rows = [
        [f"`{label}`", str(of["texts"]), *(cell(of, name) for name in columns)]
        for label, of in arms.items()
    ]
    lines = [f"# {title}", "", *table(["", "texts", *columns], rows), ""]
    lines.append("All times 100. Brackets: 95 % intervals by Wilson.")
    return "\n".join(lines) + "\n"
