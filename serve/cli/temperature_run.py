"""Run the training of a temperature head from the command line."""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from adapters.format import AdapterError
from adapters.methods import host_of
from adapters.temperature_head.head import HeadConfig, save_head
from adapters.temperature_head.training import (
    HeadResult,
    HeadTraining,
    Program,
    read_programs,
    train_head,
)
from evaluation.code.problems import HUMANEVAL, MBPP, Problem, read_problems
from evaluation.code.prompts import CHAT, build_request
from evaluation.errors import DataFileError, RunError
from evaluation.folder import SETTINGS, digest_of, file_names, write_whole
from evaluation.progress import bars
from evaluation.records import read_records
from models.checkpoints import CheckpointError
from serve.base_model import build_decoder, load_base, settle_memory
from serve.cli.arguments import CommandError, UserError, say
from serve.machine import count_processors
from serve.model_options import ModelOptions, resolve_model_options
from text.chat_template import ChatTemplateError
from text.token_bytes import TokenizerError
from text.tokenizer import Tokenizer

REPORT = "report.json"


def run_head_training(arguments: argparse.Namespace, options: ModelOptions) -> int:
    """Train as `serve.cli.train_temperature` was told; see its `run`."""
    options = resolve_model_options(
        options, has_cuda=torch.cuda.is_available(), num_processors=count_processors()
    )
    try:
        drawn_at, form, samples = read_run(arguments.evaluation, arguments.data, arguments.arm)
        config, training = _settings(arguments, drawn_at)
    except (AdapterError, DataFileError, RunError) as error:
        raise UserError(str(error)) from None
    try:
        checkpoint = load_base(options, needs_tokenizer=True, report=say)
        tokenizer = Tokenizer.from_folder(
            checkpoint.folder, num_embeddings=checkpoint.spec.vocab_size
        )
        found = [_tokenize(tokenizer, form, *sample) for sample in samples]
    except (CheckpointError, TokenizerError, ChatTemplateError) as error:
        raise UserError(str(error)) from error
    context = checkpoint.spec.max_position_embeddings
    programs = [p for p in found if p is not None and _length(p) <= context]
    if not programs:
        raise UserError(
            f"--evaluation: {arguments.evaluation} has no program that fits the model's context"
        )
    passed = sum(program.passed for program in programs)
    say(f"{arguments.evaluation}: {len(programs)} programs, {passed} passed, drawn at {drawn_at:g}")
    decoder = build_decoder(options, checkpoint)
    torch.set_num_threads(int(options.threads))
    settle_memory(checkpoint.weights_folder)
    try:
        with torch.inference_mode(), bars(sys.stderr, program=len(programs)) as progress:
            readings = read_programs(
                decoder, programs, config, training,
                progress=lambda count: progress("program", count),
            )  # fmt: skip
        with bars(sys.stderr, epoch=training.epochs) as progress:
            result = train_head(
                programs, readings, config, training,
                progress=lambda count: progress("epoch", count),
            )  # fmt: skip
    except AdapterError as error:
        raise UserError(f"--evaluation: {error}") from None
    facts = _describe(result, len(programs), training)
    try:
        save_head(
            arguments.output, result.head, host_of(checkpoint),
            description=arguments.description, training=facts,
        )  # fmt: skip
        write_whole(arguments.output / REPORT, json.dumps(facts, indent=1) + "\n")
    except (AdapterError, RunError) as error:
        raise CommandError(str(error)) from None
    low, middle, high = facts["temperatures"]
    say(
        f"{arguments.output}: epoch {result.epoch} of {training.epochs}; the objective rises by "
        f"{result.gain:.4f} on the tasks trained on, {result.held_out_gain:.4f} on the others"
    )
    if not result.epoch:
        say("warning: no epoch was better on held-out tasks than the fixed temperature, which the "
            "head gives everywhere")  # fmt: skip
    say(f"temperatures: {low:.2f} to {high:.2f} for 8 of 10 tokens, median {middle:.2f}")
    name = arguments.output.resolve().name
    say(f"serve it with: proa serve --adapter {name}={arguments.output}")
    return 0


def _settings(arguments: argparse.Namespace, drawn_at: float) -> tuple[HeadConfig, HeadTraining]:
    given = vars(arguments)
    known: list[dict[str, Any]] = [
        {field.name: given[field.name] for field in fields(cls) if field.name in given}
        for cls in (HeadConfig, HeadTraining)
    ]
    return HeadConfig(**known[0]), HeadTraining(drawn_at=drawn_at, **known[1])


def read_run(
    folder: Path, data: Path, label: str | None
) -> tuple[float, str, list[tuple[Problem, str, bool]]]:
    """Return the temperature and the form of an evaluation's samples, and these with their verdict.

    Args:
        folder: of `proa eval humaneval`, `mbpp` or `proa compare` with one of them.
        data: the problems.
        label: of the arm; None: the only one.

    Returns:
        Temperature, form of the prompts, and (problem, answer, passed) of each sample.

    Raises:
        UserError: the folder holds no such run, of other data, or of samples that were drawn
            otherwise; the arm is unknown.
        DataFileError, RunError: a file cannot be read.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        arms, form, digest = settings["arms"], settings["form"], settings["data"]
        labels = [arm["label"] for arm in arms]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--evaluation: {folder} holds no evaluation of programs") from None
    if digest != digest_of(data):
        raise UserError(f"--data: {data} is not the file that {folder} was run on")
    if label is None and len(labels) > 1:
        raise UserError(f"--arm: name one of {', '.join(labels)}")
    if label is not None and label not in labels:
        raise UserError(f"--arm: {folder} has {', '.join(labels)}; got {label!r}")
    arm = arms[0 if label is None else labels.index(label)]
    sampling = {name: value for name, value in arm["fields"].items() if value is not None}
    temperature = sampling.pop("temperature", None)
    if sampling or not isinstance(temperature, int | float) or not temperature:
        raise UserError(
            "--evaluation: the samples must be drawn at a plain temperature above 0, without other "
            f"fields; {arm['label']!r} has {arm['fields']}"
        )
    kind = MBPP if settings.get("task") == MBPP or _is_mbpp(data) else HUMANEVAL
    problems = {problem.task_id: problem for problem in read_problems(data, kind)}
    name = file_names(labels)[arm["label"]]
    verdicts = {
        (record["task_id"], record["sample"]): bool(record.get("plus_passed", record["passed"]))
        for _, record in read_records(folder / f"{name}_results.jsonl")
    }
    samples = []
    for _, record in read_records(folder / f"{name}_samples.jsonl"):
        key = (record["task_id"], record["sample"])
        text = record["answer" if form == CHAT else "completion"]
        if key in verdicts and text:
            samples.append((problems[str(record["task_id"])], str(text), verdicts[key]))
    return float(temperature), form, samples


def _is_mbpp(data: Path) -> bool:
    return "entry_point" not in read_records(data)[0][1]


def _tokenize(
    tokenizer: Tokenizer, form: str, problem: Problem, answer: str, passed: bool
) -> Program | None:
    _, body = build_request(problem, form)
    if form == CHAT:
        prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
    else:
        prompt = tokenizer.encode(body["prompt"], allow_special=True, add_special_tokens=True)
    drawn = tokenizer.encode(answer, add_special_tokens=False)
    if not drawn:
        return None
    return Program(task=problem.task_id, prompt_token_ids=prompt, token_ids=drawn, passed=passed)


def _length(program: Program) -> int:
    return len(program.prompt_token_ids) + len(program.token_ids)


def _describe(result: HeadResult, num_programs: int, training: HeadTraining) -> dict[str, Any]:
    quantiles = result.temperatures.quantile(torch.tensor([0.1, 0.5, 0.9]))
    return {
        "settings": asdict(training), "programs": num_programs, "telling_tasks": result.num_tasks,
        "epoch": result.epoch, "gain": result.gain, "held_out_gain": result.held_out_gain,
        "temperatures": quantiles.tolist(),
    }  # fmt: skip
