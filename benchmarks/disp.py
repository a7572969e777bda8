"""Measure DISP-LLM pruning on the demo model: searches, baselines, perplexity, healing, speed.

    python -m benchmarks.disp --search-text train.txt --test-text wiki.test.raw --work ./disp

Takes more than two hours on 2 cores. Figures are kept in `results/disp.json`, and what searches
find in `results/disp/`, after every item: a run that was killed goes on where it was, and no search
is needed twice. What is in the file already is left out unless its variant has changed or `--again`
names the stage. `benchmarks.disp_report` makes the report of the file.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapters.format import CONFIG_FILE, TENSOR_FILE, AdapterError, digest, read_config
from benchmarks.report import PROA, RESULTS, describe_run, run_command, say, warn_if_busy

KINDS = ("disp", "shared", "magnitude", "random")
SEARCHES = {"disp": "search", "shared": "search-shared", "one": "one"}
RATIOS = (20, 30)
LOOK_EVERY_S = 10.0
EXTRA_TOKENS = 8  # of a piece to heal on, cut off again: so that none ends with an end token
DEMO_MODEL = "SmolLM2-135M-Instruct"
RESULTS_FILE = RESULTS / "disp.json"


class Figures:
    """What is measured so far: a file of JSON that is written anew after every item.

    Args:
        path: of the file.
        model: what is measured.

    Raises:
        SystemExit: the file is of another model.
    """

    def __init__(self, path: Path, model: str = DEMO_MODEL) -> None:
        self._path = path
        self.content: dict[str, Any] = {"model": model, "stages": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        if self.content["model"] != model:
            raise SystemExit(f"benchmark: {path} is of {self.content['model']}, not of {model}")

    def drop(self, stage: str) -> None:
        """Forget a stage."""
        self.content["stages"].pop(stage, None)

    def begin(self, stage: str, settings: dict[str, Any]) -> None:
        """Open a stage.

        Raises:
            SystemExit: it was begun with other settings.
        """
        found = self.content["stages"].setdefault(stage, {"settings": settings, "items": {}})
        if found["settings"] != settings:
            raise SystemExit(
                f"benchmark: {stage} was begun with {found['settings']}, now {settings}; "
                f"give --again {stage} to measure all of it anew"
            )

    def items(self, stage: str) -> dict[str, Any]:
        """Return the figures of a stage by item."""
        found: dict[str, Any] = self.content["stages"].get(stage, {}).get("items", {})
        return found

    def has(self, stage: str, item: str, variant: object) -> bool:
        """Whether an item is measured, of this very variant."""
        found = self.items(stage).get(item)
        return found is not None and found["variant"] == variant

    def keep(self, stage: str, item: str, variant: object, figures: dict[str, Any]) -> None:
        """Add an item and write the file."""
        self.items(stage)[item] = {"variant": variant, **figures}
        self.note(stage, "run", describe_run())
        say(f"{stage}: {item} is kept")

    def note(self, stage: str, name: str, value: object) -> None:
        """Add what holds for a whole stage and write the file."""
        self.content["stages"][stage][name] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self._path)


class Bench:
    """The stages over a folder of variants.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.figures = Figures(options.results, options.model or DEMO_MODEL)
        self.kept_folder: Path = options.results.with_suffix("")
        self._model = ["--model", options.model] if options.model else []
        self._cache = ["--cache-dir", options.cache_dir] if options.cache_dir else []
        self.stages: dict[str, Callable[[], None]] = {
            "search": lambda: self.search("disp", RATIOS),
            "search-shared": lambda: self.search("shared", RATIOS),
            "one": lambda: self.search("one", (30,)),
            "variants": self.variants,
            "perplexity": self.perplexity,
            "heal": lambda: self.heal(
                "heal", [("base", None, None), *self.found(KINDS, RATIOS)], options.heal_steps
            ),
            "heal-long": lambda: self.heal(
                "heal-long", list(self.found(["disp"], [20])), options.long_steps
            ),
            "size": lambda: self.speed("size", rounds=0),
            "decode": lambda: self.speed("decode", rounds=options.rounds),
        }

    def folder(self, kind: str, ratio: int) -> Path:
        """Where a variant lies: kept, or while it is new where it was made."""
        kept = self.kept_folder / f"{kind}-{ratio}"
        return kept if kept.is_dir() else self.made(kind, ratio)

    def made(self, kind: str, ratio: int) -> Path:
        """Where a variant is made."""
        whole: Path = self.options.work / kind
        return whole if kind == "one" else whole / f"remove-{ratio}"

    def found(self, kinds: Sequence[str], ratios: Sequence[int]) -> Iterator[tuple[str, Path, str]]:
        """Yield name, folder and digest of the variants that are there."""
        for kind in kinds:
            for ratio in ratios:
                folder = self.folder(kind, ratio)
                with suppress(AdapterError):
                    yield f"{kind}-{ratio}", folder, digest(folder)

    def module(self, name: str, *words: object) -> dict[str, Any]:
        """Run a module of the benchmarks in a process; return the JSON object it prints."""
        command = [sys.executable, "-m", f"benchmarks.{name}", *self._model, *self._cache, *words]
        lines = run_command(command).strip().splitlines()
        figures: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return figures

    def search(self, kind: str, ratios: Sequence[int]) -> None:
        """Search for the variants of one kind, all in one run."""
        stage = SEARCHES[kind]
        output: Path = self.options.work / kind
        words = [
            "--data", self.options.search_text.resolve(), "--output", output.resolve(),
            "--remove", ",".join(f"{ratio / 100:g}" for ratio in ratios),
            "--residual", "shared" if kind == "shared" else "independent",
            *shlex.split(self.options.search_options),
        ]  # fmt: skip
        text = self.options.search_text
        settings = {"options": self.options.search_options, "text": describe_text(text)}
        self.figures.begin(stage, settings)
        names = [f"{kind}-{ratio}" for ratio in ratios]
        there = {name: found for name, _, found in self.found([kind], ratios)}
        if all(self.figures.has(stage, name, there.get(name)) for name in names):
            return
        is_resumed, start_s = output.exists(), time.monotonic()
        resume = ["--resume"] if is_resumed else []
        command = [*PROA, "prune", "disp", *self._model, *self._cache, *words, *resume]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run_command, command)
            while not wait([running], LOOK_EVERY_S).done:
                self.keep_variants(stage, kind, ratios)
            running.result()
        self.keep_variants(stage, kind, ratios)
        if not is_resumed:
            self.figures.note(stage, "run_seconds", time.monotonic() - start_s)

    def keep_variants(self, stage: str, kind: str, ratios: Sequence[int]) -> None:
        """Copy what a search has found so far, and note what is told of it."""
        for ratio in ratios:
            made, name = self.made(kind, ratio), f"{kind}-{ratio}"
            try:
                variant = digest(made)
            except AdapterError:
                continue
            if self.figures.has(stage, name, variant):
                continue
            config = read_config(made)
            kept = self.kept_folder / name
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            for file in (CONFIG_FILE, TENSOR_FILE):
                shutil.copyfile(made / file, kept / file)
            facts = {"fields": dict(config.fields), "training": dict(config.training)}
            self.figures.keep(stage, name, variant, facts)

    def variants(self) -> None:
        """Choose baselines as wide as the variants of the search."""
        self.figures.begin("variants", {"seed": self.options.seed})
        for _, like, wanted in self.found(["disp"], RATIOS):
            ratio = int(like.name.partition("-")[2])
            for kind in ("magnitude", "random"):
                folder = self.folder(kind, ratio)
                there = {n: found for n, _, found in self.found([kind], [ratio])}
                kept = self.figures.items("variants").get(f"{kind}-{ratio}", {})
                if there and kept.get("like") == wanted and kept["variant"] in there.values():
                    continue
                self.module(
                    "disp_baselines", "--like", like, "--kind", kind, "--output", folder,
                    "--seed", self.options.seed,
                )  # fmt: skip
                self.figures.keep("variants", f"{kind}-{ratio}", digest(folder), {"like": wanted})

    def perplexity(self) -> None:
        """Compute perplexities on the test text, of the base in two precisions and of variants."""
        self.figures.begin("perplexity", self.test_settings())
        dense = ["--quantization", "none", "--head", "dense"]
        for item, words in (("base", []), ("base-dense", dense)):
            if not self.figures.has("perplexity", item, None):
                self.figures.keep("perplexity", item, None, self.test(*words))
        for item, folder, variant in self.found(KINDS, RATIOS):
            if not self.figures.has("perplexity", item, variant):
                self.figures.keep("perplexity", item, variant, self.test("--variant", folder))

    def heal(
        self, stage: str, models: Sequence[tuple[str, Path | None, str | None]], steps: int
    ) -> None:
        """Train a side network on each model, base or variant, then compute perplexities."""
        options = self.options
        training = {"steps": steps, "batch_size": options.heal_batch,
                    "length": options.heal_length, "text": describe_text(options.search_text),
                    "options": options.heal_options}  # fmt: skip
        self.figures.begin(stage, {**self.test_settings(), "training": training})
        for item, folder, variant in models:
            if self.figures.has(stage, item, variant):
                continue
            output = options.work / stage / item
            seconds = self.train(output, folder, steps)
            words = ["--variant", folder] if folder else []
            figures = self.test("--adapter", output, *words)
            self.figures.keep(stage, item, variant, {"training_seconds": seconds, **figures})

    def train(self, output: Path, variant: Path | None, steps: int) -> float:
        """Train a side network; return the seconds it took."""
        options = self.options
        shutil.rmtree(output, ignore_errors=True)
        text = describe_text(options.search_text)["sha256"][:8]
        data = options.work / f"heal-{options.heal_length}-{text}.jsonl"
        if not data.exists():
            self.module(
                "disp_text", "--text", options.search_text, "--length",
                options.heal_length + EXTRA_TOKENS, "--stride", options.heal_length,
                "--output", data,
            )  # fmt: skip
        start_s = time.monotonic()
        run_command([
            *PROA, "train", "qst", *self._model, *self._cache, "--data", data.resolve(),
            "--output", output.resolve(), "--steps", steps, "--batch-size",
            options.heal_batch, "--max-length", options.heal_length, "--long", "truncate",
            "--eval-fraction", "0", *(["--on", variant.resolve()] if variant else []),
            *shlex.split(options.heal_options),
        ])  # fmt: skip
        return time.monotonic() - start_s

    def speed(self, stage: str, *, rounds: int) -> None:
        """Measure sizes, or with rounds speeds, of the base and the variants of the search."""
        self.figures.begin(stage, {"rounds": rounds})
        found = list(self.found(["disp"], RATIOS))
        words: list[object] = [
            w for name, folder, _ in found for w in ("--variant", f"{name}={folder}")
        ]
        digests = {name: variant for name, _, variant in found}
        if self.figures.has(stage, "models", digests):
            return
        figures = self.module("variant_speed", "--rounds", rounds, *words)
        self.figures.keep(stage, "models", digests, figures)

    def test_settings(self) -> dict[str, Any]:
        """Return how perplexities are computed."""
        options = self.options
        return {"windows": options.windows, "length": options.length,
                "text": describe_text(options.test_text)}  # fmt: skip

    def test(self, *words: object) -> dict[str, Any]:
        """Compute a perplexity on the test text."""
        options = self.options
        windows = ["--windows", options.windows] if options.windows else []
        return self.module(
            "perplexity", "--text", options.test_text, "--length", options.length, *windows, *words
        )


def describe_text(path: Path) -> dict[str, Any]:
    """Return what tells a text from others."""
    content = path.read_bytes()
    return {
        "name": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--search-text", type=Path, required=True, help="for searches and healing")
    parser.add_argument("--test-text", type=Path, required=True, help="another one, for perplexity")
    parser.add_argument("--work", type=Path, required=True, help="folder for variants")
    parser.add_argument("--model", default=None, help="[default: the demo model]")
    parser.add_argument("--cache-dir", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=RESULTS_FILE)
    parser.add_argument(
        "--stages", default="search,search-shared,variants,perplexity,heal,heal-long,size,decode",
        help="in this order; `one` times a search for one ratio alone [default: %(default)s]",
    )  # fmt: skip
    parser.add_argument("--again", default="", help="stages to do anew, such as perplexity,decode")
    parser.add_argument("--search-options", default="", help="more options of `proa prune disp`")
    parser.add_argument("--seed", type=int, default=0, help="of the random variants")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a test window")
    parser.add_argument("--windows", type=int, default=8, help="test windows; 0: all of the text")
    parser.add_argument("--heal-steps", type=int, default=20)
    parser.add_argument("--long-steps", type=int, default=250, help="of `heal-long`, at 20 %%")
    parser.add_argument("--heal-batch", type=int, default=1)
    parser.add_argument("--heal-length", type=int, default=1024)
    parser.add_argument(
        "--heal-options", default="--reduction 4 --downsample linear",
        help="more options of `proa train qst` [default: %(default)s]",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=51, help="of the speed measurement")
    return parser.parse_args(words)


def run_stages(
    stages: Mapping[str, Callable[[], None]],
    options: argparse.Namespace,
    forget: Callable[[str], None],
) -> None:
    """Do the stages that the command line names.

    Args:
        stages: that there are.
        options: with `stages`, and with `again`: those whose figures are dropped first.
        forget: drops a stage's figures.

    Raises:
        SystemExit: there is no such stage.
    """
    again = [name for name in options.again.split(",") if name]
    wanted = options.stages.split(",")
    unknown = sorted({*wanted, *again} - set(stages))
    if unknown:
        raise SystemExit(f"benchmark: no stage {unknown[0]}; there are {', '.join(stages)}")
    warn_if_busy()
    for name in again:
        forget(name)
    for name in wanted:
        say(f"stage {name}")
        stages[name]()


def main() -> int:
    """Do the stages, keep their figures."""
    options = parse_options()
    if options.search_text.read_bytes() == options.test_text.read_bytes():
        raise SystemExit("benchmark: --search-text and --test-text must be different texts")
    bench = Bench(options)

    def forget(name: str) -> None:
        bench.figures.drop(name)
        for kind, stage in SEARCHES.items():
            if stage == name:
                shutil.rmtree(options.work / kind, ignore_errors=True)

    run_stages(bench.stages, options, forget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
