"""Who may import whom, what never appears in the source, and what imports must not load."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [
    name
    for name in (
        "client",
        "stats",
        "models",
        "decoding",
        "adapters",
        "text",
        "serve",
        "evaluation",
    )
    if (ROOT / name).is_dir()
]
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}

# Package or subpackage: what of ours it may import. The longest matching entry counts.
MAY_IMPORT = {
    "client": ("client",),
    "stats": ("stats",),
    "decoding": ("decoding",),
    "models": ("models",),
    "adapters": ("adapters", "models"),
    "evaluation": ("evaluation", "client", "stats"),
    "text": ("text",),
    # Records become the examples that adapters are trained on; adapters know no text.
    "text.training_data": ("text", "adapters.qst.examples"),
    "serve": (
        "serve",
        "models",
        "decoding",
        "adapters",
        "text",
        "client",
        "stats",
        "evaluation",
    ),
    "serve.environment": (),
    "serve.machine": (),
    "serve.options": ("serve.environment",),
    "serve.model_options": ("serve.options",),
    # Training, checks and benchmarks load models without the server's options.
    "serve.base_model": (
        "serve.machine",
        "serve.model_options",
        "serve.options",
        "models",
        "decoding",
        "adapters",
        "text",
    ),
    "serve.attachments": (
        "serve.attachments",
        "serve.backends.protocol",
        "serve.engine",
        "serve.base_model",
        "serve.config",
        "serve.machine",
        "serve.options",
        "models",
        "adapters",
    ),
    "serve.requests": ("decoding",),
    "serve.engine": ("serve.engine", "serve.requests", "models", "decoding"),
    "serve.engine.scheduler": ("serve.engine",),
    "serve.backends": (
        "serve.backends",
        "serve.attachments",
        "serve.engine",
        "serve.requests",
        "models",
        "decoding",
    ),
    "serve.backends.protocol": ("serve.requests", "adapters.kinds"),
    "serve.backends.building": ("serve.backends", "serve.config", "text"),
    "serve.backends.native_builder": ("serve", "models", "decoding", "text"),
    "serve.backends.vllm": ("serve", "models", "decoding", "adapters", "text"),
    "serve.api": (
        "serve.api",
        "text",
        "serve.backends.protocol",
        "serve.experiments",
        "serve.requests",
        "serve.version",
        "decoding",
        "stats",
    ),
    "serve.bench": (
        "serve.bench",
        "serve.backends.protocol",
        "serve.requests",
        "decoding",
        "client",
        "stats",
    ),
    "serve.experiments": ("serve.experiments", "stats"),
    "serve.ui": ("serve.ui", "client"),
}

# Third-party modules of the packages that keep their own short list.
THIRD_PARTY = {
    "client": {"httpx"},
    "stats": {"numpy"},
    "decoding": {"torch"},
    "adapters": {"torch", "safetensors", "tqdm", "matplotlib", "transformers", "PIL"},
    "models": {
        "torch", "safetensors", "bitsandbytes", "transformers", "tokenizers", "gguf",
        "huggingface_hub", "numpy", "triton",
    },
    "serve.engine": {"torch"},
    "serve.engine.scheduler": set(),
    "serve.bench": set(),
    "serve.experiments": set(),
    "evaluation": {"matplotlib", "tqdm", "yaml", "markdown_it"},
    "serve.ui": {"gradio", "fastapi", "starlette", "markdown_it", "pygments"},
}  # fmt: skip

# What may be imported inside a function: optional, or too slow for the paths that do not need it.
SLOW_OR_OPTIONAL = {
    "transformers", "bitsandbytes", "gguf", "huggingface_hub", "numpy", "triton", "readline",
    "models.checkpoints", "models.checkpoints.conversion", "models.kernels.cuda.executor",
    "serve.server", "serve.bench.engine", "serve.cli.adapter_folders", "serve.cli.train_run",
    "serve.cli.temperature_run",
    "serve.cli.compress_run", "serve.cli.prune_run", "matplotlib", "gradio", "gradio.routes",
    "serve.ui.app", "serve.cli.quantize_run", "serve.cli.ui_run", "serve.cli.vision_run", "PIL",
    "vllm", "zmq", "serve.backends.vllm", "models.kernels.cuda.four_bit",
    "evaluation.code.plots", "evaluation.chat.plots",
    "evaluation.comparison.plots", "evaluation.language.difficulty_plot",
}  # fmt: skip

# Requirements that nothing imports by name.
IMPLIED_REQUIREMENTS = {"numpy", "uvloop", "httptools", "sentencepiece", "protobuf"}
IMPORT_NAMES = {
    "markdown-it-py": "markdown_it",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module, node.lineno
            for alias in node.names:
                path = ROOT / node.module.replace(".", "/") / alias.name
                if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
                    yield f"{node.module}.{alias.name}", node.lineno


def is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def rule_for(module: str, rules: dict) -> object | None:
    matching = [prefix for prefix in rules if is_within(module, prefix)]
    return rules[max(matching, key=len)] if matching else None


def test_packages_import_only_what_they_may() -> None:
    breaches = []
    for path, tree in TREES.items():
        allowed = rule_for(module_name(path), MAY_IMPORT)
        assert isinstance(allowed, tuple), path
        for name, line in imported(tree):
            if name.split(".")[0] not in PACKAGES or name in PACKAGES:
                is_fine = name not in PACKAGES or any(is_within(a, name) for a in allowed)
            else:
                is_fine = any(is_within(name, a) or is_within(a, name) for a in allowed)
            if not is_fine:
                breaches.append(f"{path}:{line} imports {name}")
    assert breaches == []


def find_circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that import each other, directly or by way of others."""
    reach = {start: set(found) for start, found in arrows.items()}
    for middle in reach:
        for found in reach.values():
            if middle in found:
                found |= reach[middle]
    groups = {
        frozenset(other for other in found if start in reach[other])
        for start, found in reach.items()
        if start in found
    }
    return sorted(map(set, groups), key=min)


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {module_name(path): tree for path, tree in TREES.items()}
    arrows = {
        name: {found for found, _ in imported(tree) if found in modules and found != name}
        for name, tree in modules.items()
    }
    assert find_circles(arrows) == []


def test_circles_are_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"e", "a"}}
    assert find_circles(arrows) == [{"b", "c"}, {"e", "f"}]


def test_benchmarks_use_no_command() -> None:
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    assert files
    breaches = [
        f"{path.name}:{line} imports {name}"
        for path in files
        for name, line in imported(ast.parse(path.read_text(encoding="utf-8")))
        if is_within(name, "serve.cli")
    ]
    assert breaches == []


def test_packages_use_only_their_third_party_modules() -> None:
    breaches = []
    for path, tree in TREES.items():
        allowed = rule_for(module_name(path), THIRD_PARTY)
        for name, line in imported(tree):
            top = name.split(".")[0]
            if allowed is not None and top not in sys.stdlib_module_names and top not in PACKAGES:
                assert isinstance(allowed, set)
                if top not in allowed:
                    breaches.append(f"{path}:{line} imports {name}")
    assert breaches == []


def test_scheduler_has_no_clock() -> None:
    names = {name for name, _ in imported(TREES["serve/engine/scheduler.py"])}
    assert names.isdisjoint({"time", "datetime", "asyncio", "torch"})


def test_endpoints_do_not_import_one_another() -> None:
    endpoints = {
        path
        for path, text in SOURCES.items()
        if path.startswith("serve/api/") and re.search(r"^def build_\w+_router", text, re.MULTILINE)
    }
    assert len(endpoints) > 5
    modules = {module_name(path) for path in endpoints}
    breaches = [
        f"{path}:{line} imports {name}"
        for path in endpoints
        for name, line in imported(TREES[path])
        if name in modules
    ]
    assert breaches == []


def test_imports_inside_functions_are_slow_or_optional_ones() -> None:
    breaches = []
    for path, tree in TREES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                breaches += [
                    f"{path}:{line} imports {name}"
                    for name, line in imported(function)
                    if not any(is_within(name, allowed) for allowed in SLOW_OR_OPTIONAL)
                ]
    assert breaches == []


def forbidden_calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            called in ("eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "getenv")
            or called in ("os.getenv", "__import__")
            or (called == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("shell") == "True"
            or keywords.get("trust_remote_code", "False") != "False"
        ):
            yield called, node.lineno


# Programs under test and their tests: these run inside namespaces with a filter of system calls.
RUN_IN_A_SANDBOX = {f"evaluation/code/sandboxed/{name}.py" for name in ("judge", "subject")}


def test_no_pickle_and_no_code_from_data() -> None:
    breaches = []
    for path, tree in TREES.items():
        for name, line in imported(tree):
            if name.split(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve", "joblib"):
                breaches.append(f"{path}:{line} imports {name}")
        if path not in RUN_IN_A_SANDBOX:
            breaches += [f"{path}:{line} calls {called}" for called, line in forbidden_calls(tree)]
    assert breaches == []


@pytest.mark.parametrize(
    "source",
    ["eval(x)", "torch.load(x)", "torch.load(x, weights_only=False)", "run(x, shell=True)",
     "load(x, trust_remote_code=True)"],
)  # fmt: skip
def test_forbidden_calls_are_found(source: str) -> None:
    assert list(forbidden_calls(ast.parse(source)))


def test_environment_is_read_in_one_module() -> None:
    pattern = re.compile(r"os\.environ(\[|\.get\b|\.setdefault\b)")
    found = [path for path, text in SOURCES.items() if pattern.search(text)]
    assert set(found) <= {"serve/environment.py"}


def test_methods_are_known_by_name_to_themselves_and_their_commands_only() -> None:
    names = {"qst", "disp", "mixed_rank"}
    own = (
        "adapters/qst/",
        "adapters/disp/",
        "adapters/mixed_rank/",
        "serve/cli/train.py",
        "serve/cli/prune.py",
    )
    breaches = [
        f"{path}:{node.lineno} names {node.value!r}"
        for path, tree in TREES.items()
        if not path.startswith(own)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert breaches == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    vague = {"utils.py", "util.py", "misc.py", "helpers.py", "common.py"}
    assert [str(path) for path in FILES if path.name in vague] == []


def test_no_python_file_is_too_long() -> None:
    assert {p: n for p, text in SOURCES.items() if (n := text.count("\n")) > 600} == {}


def test_sources_are_ascii() -> None:
    assert [path for path, text in SOURCES.items() if not text.isascii()] == []


def test_every_requirement_is_imported_and_every_import_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {
        re.split(r"[^\w-]", text, maxsplit=1)[0].lower() for text in project["dependencies"]
    }
    names = {IMPORT_NAMES.get(name, name) for name in required}
    used = {name.split(".")[0] for tree in TREES.values() for name, _ in imported(tree)}
    # vLLM, which brings ZeroMQ, is installed apart; torch may bring Triton.
    optional = {"triton", "vllm", "zmq"}
    third_party = used - set(sys.stdlib_module_names) - set(PACKAGES) - optional
    assert third_party - names == set()
    assert names - third_party - IMPLIED_REQUIREMENTS == set()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("decoding", {"transformers", "bitsandbytes", "vllm", "fastapi", "uvicorn", "models"}),
        ("models.decoder", {"transformers", "bitsandbytes", "vllm", "fastapi", "serve"}),
        ("client.api", {"torch", "fastapi", "serve"}),
        ("stats.timings", {"torch", "numpy", "serve"}),
        ("text.training_data", {"transformers", "fastapi", "serve"}),
        ("text.records", {"torch", "tokenizers", "adapters", "serve"}),
        ("serve.base_model", {"transformers", "fastapi", "starlette", "uvicorn", "yaml", "httpx"}),
        ("serve.api", {"transformers", "bitsandbytes", "models", "vllm"}),
        ("serve.server", {"transformers", "bitsandbytes", "gguf", "vllm", "huggingface_hub"}),
        ("serve.cli.main", {"torch", "numpy", "fastapi", "httpx", "yaml"}),
    ],
)
def test_import_in_a_fresh_process_does_not_load(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert unwanted & set(done.stdout.split()) == set()
