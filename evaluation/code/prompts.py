"""What a model is asked, and the program that its answer is."""

import re
from collections.abc import Sequence
from typing import Any

from evaluation.code.problems import HUMANEVAL, Problem

COMPLETION, CHAT = "completion", "chat"

# Servers take four at most; the others are cut here.
_STOPS = {
    HUMANEVAL: ("\nclass", "\ndef", "\n#", "\nprint", "\nif", "\n@", "\n```"),
    "mbpp": ('\n"""', "\nassert", "\nprint(", "\nif __name__", "\n# Test", "\n```"),
}
_MAX_STOPS = 4
_END_OF_TEXT = ("<|endoftext|>", "<|im_end|>", "<|EOT|>", "</s>")
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def build_request(problem: Problem, form: str) -> tuple[str, dict[str, Any]]:
    """Return the path and the fields that ask for a program.

    Args:
        problem: what is asked for.
        form: `completion`, for any model, or `chat`, for one that follows instructions.

    Returns:
        The path of the endpoint, and the fields of the body without model and sampling.

    Source: the prompts of EvalPlus, followed as a definition; the stop strings of HumanEval.
    """
    if form == CHAT:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": _ask(problem)}]}
    stop = list(_STOPS[problem.kind][:_MAX_STOPS])
    return "/v1/completions", {"prompt": completion_prompt(problem), "stop": stop}


def completion_prompt(problem: Problem) -> str:
    """Return the text that a model goes on with."""
    if problem.kind == HUMANEVAL:
        return problem.prompt
    return f'"""\n{problem.prompt}\n{problem.examples[0]}\n"""\n'


def _ask(problem: Problem) -> str:
    lead = (
        "Please provide a self-contained Python script that solves the following problem in a "
        "markdown code block:\n"
    )
    if problem.kind == HUMANEVAL:
        return f"{lead}```python\n{problem.prompt.strip()}\n```"
    return f"{lead}```\n{problem.prompt}\n{problem.examples[0]}\n```"


def build_program(problem: Problem, answer: str, form: str) -> str:
    """Return the program that an answer makes, as it is run."""
    if form == CHAT:
        code = extract_code(answer, problem.names[0])
        # What the task gives stands although the answer may not repeat it: imports and helpers.
        return _preamble(problem) + code
    body = truncate(answer, _STOPS[problem.kind])
    return problem.prompt + body if problem.kind == HUMANEVAL else body


def truncate(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the strings that end a program."""
    ends = [at for stop in (*stops, *_END_OF_TEXT) if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def extract_code(answer: str, name: str) -> str:
    """Return the code of an answer: its fenced block that defines the function, else the first.

    An answer without a block is code as a whole; a block that was cut off has no end.
    """
    blocks = [str(block) for block in _FENCE.findall(answer)]
    defines = re.compile(rf"^\s*def\s+{re.escape(name)}\b", re.MULTILINE)
    blocks = [block for block in blocks if defines.search(block)] or blocks
    return blocks[0] if blocks else answer


def _preamble(problem: Problem) -> str:
    """Return what stands before the function in its prompt."""
    if problem.kind != HUMANEVAL:
        return ""
    head, found, _ = problem.prompt.rpartition(f"def {problem.names[0]}")
    return head if found else ""
