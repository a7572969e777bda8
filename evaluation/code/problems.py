"""Data sets of programming problems: HumanEval's layout and MBPP's, also with EvalPlus's tests."""

import ast
import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.errors import DataFileError
from evaluation.records import Record, read_records, shown, text_field

HUMANEVAL, MBPP = "humaneval", "mbpp"

# Tests of EvalPlus's files that no program passes, as its own checker has them.
_MENDED = {
    "assert _poly(*candidate(*inp), inp) <= 0.0001": (
        "assert abs(_poly(*inp, candidate(*inp))) <= 0.0001"
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A problem with its tests.

    Attributes:
        task_id: as the data set has it.
        kind: `humaneval`: a function to be completed; `mbpp`: a program asked for in words.
        prompt: the beginning of a function, or what is asked for.
        names: what the tests use of the program, at least one; the first is the function that a
            task in words is about.
        setup: code whose names the tests may use.
        tests: sources, run in turn.
        examples: tests that are shown with the task, for `mbpp`.
        reference: a program that solves it, if the data set has one.
    """

    task_id: str
    kind: str
    prompt: str
    names: tuple[str, ...]
    setup: str
    tests: tuple[str, ...]
    examples: tuple[str, ...] = ()
    reference: str | None = None


def read_problems(path: Path, kind: str) -> list[Problem]:
    """Return the problems of a file, in its order.

    Args:
        path: JSON lines, packed by gzip or not.
        kind: the layout, `humaneval` (fields task_id, prompt, entry_point, test and perhaps
            canonical_solution) or `mbpp` (task_id, text or prompt, test_list or test, and perhaps
            code, test_setup_code, test_imports). A file of MBPP in HumanEval's layout is read as
            `humaneval` is.

    Raises:
        DataFileError: the file cannot be read; the line, the field and the reason are named.
    """
    problems = []
    seen: dict[str, int] = {}
    for number, record in read_records(path):
        place = f"{path}, line {number}"
        problem = _read(record, kind, place)
        if problem.task_id in seen:
            raise DataFileError(
                f"{place}: task_id {shown(problem.task_id)} stands in line {seen[problem.task_id]}"
            )
        seen[problem.task_id] = number
        problems.append(problem)
    return problems


def normal_id(task_id: str) -> str:
    """Return what is equal for one task in all files of a data set, such as `Mbpp/2` and `2`."""
    return re.sub(r"^\D*", "", task_id) or task_id


def join_tests(problems: Sequence[Problem], path: Path, kind: str) -> dict[str, Problem]:
    """Return the problems that a second file has more tests for, by their first file's task ids.

    Raises:
        DataFileError: as `read_problems`, or the file has none of the problems.
    """
    more = {normal_id(problem.task_id): problem for problem in read_problems(path, kind)}
    found = {
        problem.task_id: more[key]
        for problem in problems
        if (key := normal_id(problem.task_id)) in more
    }
    if not found:
        raise DataFileError(f"{path} has tests for none of the problems")
    return found


def _read(record: Record, kind: str, place: str) -> Problem:
    task_id = record.get("task_id")
    if isinstance(task_id, bool) or not isinstance(task_id, str | int):
        raise DataFileError(f"{place}: task_id must be a text or a number, got {shown(task_id)}")
    if kind == HUMANEVAL or "entry_point" in record:
        return _read_function(record, str(task_id), place)
    return _read_words(record, str(task_id), place)


def _read_function(record: Record, task_id: str, place: str) -> Problem:
    prompt, entry_point, test = (
        text_field(record, name, place) for name in ("prompt", "entry_point", "test")
    )
    entry_point = entry_point.strip()  # blanks are in files that are in use
    if not entry_point.isidentifier():
        raise DataFileError(f"{place}: entry_point must be a name, got {shown(entry_point)}")
    for wrong, right in _MENDED.items():
        test = test.replace(wrong, right)
    if "check" not in test:
        raise DataFileError(f"{place}: test must define check(candidate)")
    solution = record.get("canonical_solution")
    return Problem(
        task_id=task_id,
        kind=HUMANEVAL,
        prompt=prompt,
        names=(entry_point,),
        setup=prompt,
        tests=(f"{test}\ncheck({entry_point})\n",),
        reference=prompt + solution if isinstance(solution, str) else None,
    )


def _read_words(record: Record, task_id: str, place: str) -> Problem:
    prompt = text_field(record, "text" if "text" in record else "prompt", place)
    examples = record.get("test_list")
    if (
        not isinstance(examples, list)
        or not examples
        or not all(isinstance(item, str) for item in examples)
    ):
        raise DataFileError(f"{place}: test_list must be a list of texts, got {shown(examples)}")
    code, test = record.get("code"), record.get("test")
    imports = record.get("test_imports")
    setup = "\n".join(
        [
            *(item for item in imports or () if isinstance(item, str)),
            str(record.get("test_setup_code") or ""),
        ]
    )
    tests = (test,) if isinstance(test, str) else tuple(examples)
    names = _tested_names(examples, (setup, *tests), code, place)
    return Problem(
        task_id=task_id,
        kind=MBPP,
        prompt=prompt,
        names=names,
        setup=setup,
        tests=tests,
        examples=tuple(examples),
        reference=code if isinstance(code, str) else None,
    )


def _tested_names(
    examples: Sequence[str], sources: Sequence[str], code: object, place: str
) -> tuple[str, ...]:
    """Return what the tests use of the program, what the examples call first.

    That is what the reference defines, which may be called like a built-in function, and without a
    reference what nothing else gives.
    """
    try:
        read = {
            node.id
            for node in ast.walk(ast.parse("\n".join(sources)))
            if isinstance(node, ast.Name)
        }
        called = [
            node.func.id
            for example in examples
            for node in ast.walk(ast.parse(example.strip()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        given = _defined("\n".join(sources))
        defined = _defined(code) if isinstance(code, str) else set(called) - set(dir(builtins))
    except (SyntaxError, ValueError) as error:
        raise DataFileError(f"{place}: the tests or the code are no Python: {error}") from None
    names = (read & defined) - given
    if not names:
        raise DataFileError(f"{place}: the tests call no function of the program")
    first = [name for name in dict.fromkeys(called) if name in names]
    return (*first, *sorted(names - set(first)))


def _defined(source: str) -> set[str]:
    """Return the names that code defines or imports at its top level."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found
