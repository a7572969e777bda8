"""Multiple choice by log-likelihood: the likeliest continuation is the model's answer."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from evaluation.folder import open_logs
from evaluation.language.scoring import score_continuations
from evaluation.language.tasks import Question
from evaluation.records import Record
from evaluation.server import Arm, Servers, run_each
from evaluation.tables import describe_estimate, percent, table, tested_points
from stats.bootstrap import bootstrap_difference
from stats.proportions import mcnemar_p, wilson_interval

METRICS = ("acc", "acc_norm")
"""Shares of questions whose right choice is the likeliest, and the likeliest a character."""


async def ask_choices(
    questions: Sequence[Question],
    arms: Sequence[Arm],
    folder: Path,
    servers: Servers,
    *,
    concurrency: int,
    progress: Callable[[str, int], None],
) -> dict[str, list[Record]]:
    """Score the choices of each question; what the folder holds is not asked again.

    Args:
        questions: of one task.
        arms: who is asked; their servers must echo log probabilities.
        folder: of the run.
        servers: of the arms.
        concurrency: requests under way at once.
        progress: told `question` and how many more are there.

    Returns:
        A record for each question, of each arm, by its label.

    Raises:
        RunError: a server refuses or is gone, or a file cannot be written.
    """
    await servers.check(arms)
    with ExitStack() as stack:
        logs = open_logs(folder, [arm.label for arm in arms], "_choices.jsonl", stack)
        there = {label: {r["question"] for r in log.records} for label, log in logs.items()}
        progress("question", sum(map(len, there.values())))

        async def ask(item: tuple[Arm, Question]) -> None:
            arm, question = item
            found = await score_continuations(arm, question.pairs, servers)
            logs[arm.label].add(_describe(question, [score.logprob for score in found]))
            progress("question", 1)

        items = [(a, q) for q in questions for a in arms if q.name not in there[a.label]]
        await run_each(items, ask, concurrency=concurrency)
        return {label: log.records for label, log in logs.items()}


def _describe(question: Question, logprobs: Sequence[float]) -> Record:
    normed = [value / max(1, n) for value, n in zip(logprobs, question.lengths, strict=True)]
    return {
        "question": question.name,
        "subject": question.subject,
        "logprobs": list(logprobs),
        "answer": question.answer,
        "acc": logprobs.index(max(logprobs)) == question.answer,
        "acc_norm": normed.index(max(normed)) == question.answer,
    }


def summarise(results: dict[str, list[Record]]) -> dict[str, Any]:
    """Return accuracies with Wilson intervals, by subject too, and differences to the first arm."""
    summary: dict[str, Any] = {"arms": {}, "differences": {}}
    labels = list(results)
    for label, records in results.items():
        entry: dict[str, Any] = {"questions": len(records), "subjects": {}}
        for metric in METRICS:
            right = sum(record[metric] for record in records)
            low, high = wilson_interval(right, len(records))
            entry[metric] = {"value": right / len(records), "low": low, "high": high}
        subjects = dict.fromkeys(record["subject"] for record in records if record["subject"])
        for subject in subjects:
            of = [record["acc"] for record in records if record["subject"] == subject]
            entry["subjects"][subject] = {"questions": len(of), "acc": sum(of) / len(of)}
        summary["arms"][label] = entry
    for label in labels[1:]:
        summary["differences"][label] = {
            metric: _difference(results[labels[0]], results[label], metric) for metric in METRICS
        }
    return summary


def _difference(first: Sequence[Record], second: Sequence[Record], metric: str) -> dict[str, float]:
    ours = {record["question"]: bool(record[metric]) for record in first}
    theirs = {record["question"]: bool(record[metric]) for record in second}
    shared = [name for name in ours if name in theirs]
    estimate = bootstrap_difference([ours[n] for n in shared], [theirs[n] for n in shared])
    only_first = sum(ours[n] and not theirs[n] for n in shared)
    only_second = sum(theirs[n] and not ours[n] for n in shared)
    return {**describe_estimate(estimate), "p": mcnemar_p(only_first, only_second)}


def to_markdown(summary: dict[str, Any], title: str) -> str:
    """Return the figures as a page."""
    lines = [f"# {title}", ""]
    lines += table(
        ["", "questions", *METRICS],
        [
            [f"`{label}`", str(of["questions"]), *(percent(of[metric]) for metric in METRICS)]
            for label, of in summary["arms"].items()
        ],
    )
    if summary["differences"]:
        first = next(iter(summary["arms"]))
        lines += ["", f"Difference to `{first}`, in points, p by McNemar's exact test:", ""]
        lines += table(
            ["", *METRICS],
            [
                [
                    f"`{label}`",
                    *(tested_points(of[metric]) for metric in METRICS),
                ]
                for label, of in summary["differences"].items()
            ],
        )
    subjects = next(iter(summary["arms"].values()))["subjects"]
    if len(subjects) > 1:
        lines += ["", "Accuracy by subject, in %:", ""]
        lines += table(
            ["", "questions", *(f"`{label}`" for label in summary["arms"])],
            [
                [subject, str(of["questions"])]
                + [
                    f"{100 * arm['subjects'][subject]['acc']:.1f}"
                    for arm in summary["arms"].values()
                ]
                for subject, of in subjects.items()
            ],
        )
    lines += ["", "Brackets: 95 % intervals by Wilson; of differences by bootstrap."]
    return "\n".join(lines) + "\n"
