"""Measure decoding strategies on models that can program: HumanEval(+), MBPP(+), MT-Bench.

    python -m benchmarks.adapt --model 0.5b.gguf --larger 1.5b.gguf --humaneval HumanEval.jsonl.gz \
        --humaneval-plus HumanEvalPlus-OriginFmt.jsonl.gz --mbpp mbpp.jsonl \
        --mbpp-plus MbppPlus-OriginFmt.jsonl.gz --questions question.jsonl \
        --references gpt-4.jsonl --variant small=./small --work ./adapt

Parameters are chosen on every second task of HumanEval and reported on the others, and on every
fourth task of MBPP+. Takes hours on 2 cores: samples lie below `--work`, and a run that was killed
goes on there. What became of each sample is kept in `results/adapt.json`, a digit for each, of
which `benchmarks.adapt_report` makes the report.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from adapters.format import digest
from benchmarks.disp import Figures, run_stages
from benchmarks.report import PROA, RESULTS, ROOT, run_command, say
from benchmarks.serving import running_server
from evaluation.code.problems import normal_id
from evaluation.folder import file_names
from evaluation.records import read_records
from stats.pass_at_k import pass_at_k

RESULTS_FILE = RESULTS / "adapt.json"
SMALL, LARGE = "Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct"
DEMO = "smollm2"
TUNED_FOR = 5  # k of the pass@k that parameters are chosen by
Fields = dict[str, Any]

PLAIN = "temperature"


def _adapt(policy: str) -> list[Fields]:
    pairs = ((0.8, 0.3), (1.0, 0.6), (1.3, 0.8))
    return [{"decoding": {"strategy": "adapt", "policy": policy, "a": a, "b": b}} for a, b in pairs]


FAMILIES: Mapping[str, Sequence[Fields]] = {
    PLAIN: [{"temperature": t} for t in (0.2, 0.4, 0.6, 0.8, 1.0)],
    "top-p": [{"temperature": t, "top_p": p} for t, p in ((0.8, 0.95), (1.0, 0.95))],
    "AdapT, line_initial": _adapt("line_initial"),
    "AdapT, block_initial": _adapt("block_initial"),
    "dynatemp": [
        {"temperature": t, "decoding": {"strategy": "dynatemp", "range": r}}
        for t, r in ((0.6, 0.4), (0.8, 0.5))
    ],
    "EDT": [
        {"temperature": t, "decoding": {"strategy": "edt", "theta": theta}}
        for t, theta in ((0.8, 0.1), (1.0, 0.3))
    ],
}
GREEDY: Mapping[str, Fields] = {"greedy": {"temperature": 0}}
LOOK_AHEAD = "look-ahead"
# Greedy but for what it looks ahead for: one sample tells all.
LOOK_AHEAD_ARMS = [
    {"temperature": 0, "decoding": {"strategy": "look_ahead", "threshold": t}}
    for t in (0.5, 1.0, 1.5)
]
# What is reported; of HumanEval the other half chose parameters.
PARTS = {"humaneval": "2/2", "mbpp": "2/4"}
LEARNED = "learned"
HEAD = "warm"


class Bench:
    """The stages.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.figures = Figures(options.results, SMALL)
        self.stages: dict[str, Callable[[], None]] = {
            "tune": self.tune,
            "head": self.head,
            "humaneval": partial(self.report, "humaneval"),
            "mbpp": partial(self.report, "mbpp"),
            "larger": self.larger,
            "chat": self.chat,
        }

    def tune(self) -> None:
        """Try every setting of every family on the first half of HumanEval."""
        arms = self.tuned_arms()
        self.measure("tune", "humaneval", "1/2", arms, self.options.tuning_samples)
        ahead = {describe(LOOK_AHEAD, fields): fields for fields in LOOK_AHEAD_ARMS}
        self.measure("tune", "humaneval", "1/2", {**GREEDY, **ahead}, 1)

    def head(self) -> None:
        """Train a temperature head on what the best plain temperature drew there."""
        label = self.best(PLAIN)
        folder = self.options.work / HEAD
        if (folder / "report.json").exists():
            return
        drawn = self.folder("tune", self.options.tuning_samples, self.tuned_arms())
        run_command([
            *PROA, "train", "temperature", "--model", self.options.model.resolve(), "--evaluation",
            drawn, "--arm", label, "--data", self.options.humaneval, "--output", folder,
        ])  # fmt: skip
        self.figures.begin("head", {"arm": label})
        facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        self.figures.keep("head", HEAD, digest(folder), facts)

    def report(self, task: str) -> None:
        """Run the chosen settings on the other half."""
        ahead = self.best(LOOK_AHEAD)
        known = {describe(LOOK_AHEAD, fields): fields for fields in LOOK_AHEAD_ARMS}
        self.measure(task, task, PARTS[task], {**GREEDY, ahead: known[ahead]}, 1)
        arms = {**self.chosen(), LEARNED: {"model": f"model:{HEAD}"}}
        is_first = task == "humaneval"
        samples = self.options.samples if is_first else self.options.other_samples
        self.measure(task, task, PARTS[task], arms, samples)

    def larger(self) -> None:
        """Run the best three, the best plain temperature and greedy with the larger model."""
        best = sorted(
            (label for label in self.chosen() if not label.startswith(PLAIN)),
            key=lambda label: -score(self.figures.items("humaneval")[label]),
        )
        chosen = self.chosen()
        plain = next(label for label in chosen if label.startswith(PLAIN))
        arms = {label: chosen[label] for label in (plain, *best[:3])}
        model = self.options.larger
        self.measure("larger", "humaneval", "2/2", GREEDY, 1, model=model)
        self.measure("larger", "humaneval", "2/2", arms, self.options.other_samples, model=model)

    def chat(self) -> None:
        """Let the larger model grade the demo model's chats: alone, adapted, as variants."""
        options = self.options
        names = ["", ":roleplay", *(f":{name.partition('=')[0]}" for name in options.variant)]
        models = [f"{DEMO}{name}" for name in names]
        self.figures.begin("chat", {"of_each_category": options.chats, "judge": LARGE})
        if all(model in self.figures.items("chat") for model in models):
            return
        folder = options.work / f"chat-{digest_of({model: {} for model in models})}"
        words = ["--adapter", f"roleplay={ROOT / 'examples' / 'roleplay' / 'adapter'}"]
        words += [word for name in options.variant for word in ("--variant", name)]
        larger = [str(options.larger.resolve()), "--served-model-name", "judge"]
        with running_server(words) as server, running_server(larger) as judge:
            run_command([
                *PROA, "eval", "mt-bench", "--questions", options.questions, "--references",
                options.references, "--model", ",".join(models), "--url", server.url, "--judge",
                "judge", "--judge-url", judge.url, "--limit", options.chats, "--max-tokens", 512,
                "--output", folder,
            ])  # fmt: skip
        for model in models:
            grades = {
                f"{record['question_id']}/{record['turn']}": record["score"]
                for _, record in read_records(folder / "model_judgment" / "single.jsonl")
                if record["model"] == model
            }
            self.figures.keep("chat", model, None, {"grades": grades})

    def chosen(self) -> dict[str, Fields]:
        """Return the best setting of each family by label."""
        kept = self.figures.items("tune")
        found = {}
        for family, settings in FAMILIES.items():
            of = {describe(family, fields): fields for fields in settings}
            if missing := [label for label in of if label not in kept]:
                raise SystemExit(f"benchmark: {missing[0]!r} is not tuned; run the stage tune")
            label = self.best(family)
            found[label] = of[label]
        return found

    def best(self, family: str) -> str:
        """Return the label of the setting of a family that did best; the first of equals."""
        kept = self.figures.items("tune")
        return max(
            (label for label in kept if label.startswith(f"{family} ")),
            key=lambda label: score(kept[label]),
        )

    def tuned_arms(self) -> dict[str, Fields]:
        """Return all settings by label."""
        return {
            describe(family, fields): fields
            for family, settings in FAMILIES.items()
            for fields in settings
        }

    def folder(self, stage: str, samples: int, arms: Mapping[str, Fields]) -> Path:
        """Return where the samples of arms are."""
        work: Path = self.options.work
        return work / f"{stage}-{samples}-{digest_of(arms)}"

    def measure(
        self,
        stage: str,
        task: str,
        part: str,
        arms: Mapping[str, Fields],
        samples: int,
        *,
        model: Path | None = None,
    ) -> None:
        """Let arms answer a half of a data set, and keep what is not kept yet."""
        options = self.options
        settings = {"task": task, "part": part, "prompt": "completion", "seed": 0}
        self.figures.begin(stage, settings)
        kept = self.figures.items(stage)
        missing = {label: fields for label, fields in arms.items() if label not in kept}
        if not missing:
            return
        # Two arms at least make a comparison.
        asked = missing if len(missing) > 1 else {**missing, "again": next(iter(missing.values()))}
        folder = self.folder(stage, samples, asked)
        listed = [{"model": "model", **of, "label": label} for label, of in asked.items()]
        arms_file = folder.with_suffix(".yaml")
        arms_file.write_text(yaml.safe_dump({"arms": listed}), encoding="utf-8")
        path = (model or options.model).resolve()
        words = [str(path), "--served-model-name", "model"]
        if LEARNED in missing:
            words += ["--adapter", f"{HEAD}={options.work / HEAD}"]
        with running_server(words) as server:
            run_command([
                *PROA, "compare", "--arms", arms_file, "--task", task, "--data",
                getattr(options, task), "--plus", getattr(options, f"{task}_plus"), "--part", part,
                "--samples", samples, "--prompt", "completion", "--max-tokens", 384, "--output",
                folder, "--url", server.url, "--allow-code-execution",
            ])  # fmt: skip
        names = file_names(list(asked))
        for label, fields in missing.items():
            facts = read_outcomes(folder, names[label])
            self.figures.keep(stage, label, None, {"fields": fields, "samples": samples, **facts})


def read_outcomes(folder: Path, name: str) -> dict[str, Any]:
    """Return what became of the samples of an arm: by task a digit for each, 1 is passed."""
    found: dict[str, dict[str, dict[int, str]]] = {"base": {}, "plus": {}}
    for _, record in read_records(folder / f"{name}_results.jsonl"):
        task, sample = str(record["task_id"]), int(record["sample"])
        for tests, field in (("base", "passed"), ("plus", "plus_passed")):
            if field in record:
                found[tests].setdefault(task, {})[sample] = str(int(record[field]))
    tokens = [
        int(record["completion_tokens"])
        for _, record in read_records(folder / f"{name}_samples.jsonl")
        if record.get("completion_tokens") is not None
    ]
    outcomes = {
        tests: {task: "".join(of[i] for i in sorted(of)) for task, of in sorted(by_task.items())}
        for tests, by_task in found.items()
    }
    return {**outcomes, "mean_tokens": sum(tokens) / max(1, len(tokens))}


def score(kept: Mapping[str, Any], k: int = TUNED_FOR) -> float:
    """Return the mean pass@k of an arm, all tests together."""
    digits = (kept["plus"] or kept["base"]).values()
    values = [pass_at_k(len(of), of.count("1"), min(k, len(of))) for of in digits]
    return sum(values) / len(values)


def describe(family: str, fields: Fields) -> str:
    """Return the label of a setting."""
    own = {**fields, **fields.get("decoding", {})}
    words = [
        f"{name}={value:g}" if isinstance(value, float | int) else str(value)
        for name, value in own.items()
        if name not in ("decoding", "strategy", "policy")
    ]
    return f"{family} {' '.join(words)}"


def digest_of(arms: Mapping[str, Fields]) -> str:
    """Return what tells one set of arms from another."""
    return hashlib.sha256(json.dumps(arms, sort_keys=True).encode()).hexdigest()[:12]


def keep_tasks_of(data: Path, plus: Path, target: Path) -> Path:
    """Write the tasks of a data set that a second file has more tests for; return the file."""
    wanted = {normal_id(str(record["task_id"])) for _, record in read_records(plus)}
    kept = [r for _, r in read_records(data) if normal_id(str(r["task_id"])) in wanted]
    target.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return target


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help=SMALL)
    parser.add_argument("--larger", type=Path, help=LARGE)
    for task in ("humaneval", "mbpp"):
        parser.add_argument(f"--{task}", type=Path, required=True)
        parser.add_argument(f"--{task}-plus", type=Path, required=True, help="EvalPlus's tests")
    parser.add_argument("--questions", type=Path, help="MT-Bench's, for the stage chat")
    parser.add_argument("--references", type=Path, help="answers that its judge sees")
    parser.add_argument(
        "--variant", metavar="NAME=DIR", action="append", default=[],
        help="of the demo model, for the stage chat",
    )  # fmt: skip
    parser.add_argument("--chats", type=int, default=3, help="questions of each category")
    parser.add_argument("--work", type=Path, required=True, help="folder for samples")
    parser.add_argument("--results", type=Path, default=RESULTS_FILE)
    parser.add_argument("--stages", default="tune,head,humaneval,mbpp,larger,chat")
    parser.add_argument("--again", default="", help="stages to do anew")
    parser.add_argument("--tuning-samples", type=int, default=5, help="of each setting and task")
    parser.add_argument("--samples", type=int, default=10, help="of each task of HumanEval")
    parser.add_argument(
        "--other-samples", type=int, default=5, help="of each task of MBPP, and of the larger model"
    )
    return parser.parse_args()


def main() -> int:
    """Do the stages, keep their figures."""
    options = parse_options()
    for task in ("humaneval", "mbpp"):
        for name in (task, f"{task}_plus"):
            setattr(options, name, getattr(options, name).resolve())
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.mbpp = keep_tasks_of(options.mbpp, options.mbpp_plus, options.work / "mbpp.jsonl")
    bench = Bench(options)
    run_stages(bench.stages, options, bench.figures.drop)
    say(f"kept in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
