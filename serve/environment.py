"""Read the process environment; nothing else in the server does.

Every option of `serve.config` has a variable named `PROA_` and its name in capitals.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from pathlib import Path

PREFIX = "PROA_"

JUDGE_KEY = PREFIX + "JUDGE_API_KEY"

_LEAVE = "_PROA_LEAVE_WITH_PARENT"
_BIND, _BOUND = "VLLM_CPU_OMP_THREADS_BIND", "_PROA_CORES"

# Variables that are no server option: what clients in the terminal use.
OTHER_VARIABLES = ("PROA_URL", JUDGE_KEY)


def environment_name(option: str) -> str:
    """Return the variable of an option: `max_context` gives `PROA_MAX_CONTEXT`."""
    return PREFIX + option.upper()


def read_options(environ: Mapping[str, str], options: Iterable[str]) -> dict[str, str]:
    """Return the text of every option the environment sets; an empty variable counts as unset."""
    names = {option: environment_name(option) for option in options}
    return {option: environ[name] for option, name in names.items() if environ.get(name)}


def data_folder(environ: Mapping[str, str]) -> Path:
    """Return where the server keeps what it must not lose; `~` is the home folder.

    As the XDG base directory specification wants it, a relative XDG_DATA_HOME counts as unset.
    """
    base = Path(environ.get("XDG_DATA_HOME", ""))
    return (base if base.is_absolute() else Path("~/.local/share")) / "proa"


def let_threads_sleep(environ: MutableMapping[str, str]) -> None:
    """Let torch's threads sleep when they have nothing to do; call it before torch is imported.

    By default they spin for a while, on the cores that the native kernels' threads then need.
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def let_gradio_stay_silent(environ: MutableMapping[str, str]) -> None:
    """Keep Gradio and its libraries from reporting home; call it before they are imported."""
    environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def prepare_vllm(
    environ: MutableMapping[str, str], *, cores: Sequence[Sequence[int]], is_verbose: bool
) -> None:
    """Set what vLLM reads, unless somebody has; call it before vLLM is imported.

    It then reports nothing home, and warns of nothing that is set on purpose.

    Args:
        environ: the process environment, which vLLM's processes inherit.
        cores: of each rank, on the CPU; else none.
        is_verbose: let it tell everything.
    """
    environ[_LEAVE] = "1"
    environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    environ.setdefault("VLLM_LOGGING_LEVEL", "DEBUG" if is_verbose else "ERROR")
    # What was set here, for an engine before, is set anew.
    if cores and environ.get(_BIND) == environ.get(_BOUND):
        lists = "|".join(",".join(map(str, of_rank)) for of_rank in cores)
        environ[_BIND] = environ[_BOUND] = lists


def leaves_with_parent(environ: Mapping[str, str]) -> bool:
    """Whether a process of vLLM's is to end when the one that started it has died."""
    return _LEAVE in environ


def unknown_variables(environ: Mapping[str, str], options: Iterable[str]) -> list[str]:
    """Describe variables with our prefix that nothing reads, with the likely name meant.

    They are reported and not refused, because container platforms add variables of their own (a
    Kubernetes service called `proa` gives every pod a `PROA_SERVICE_HOST`).
    """
    known = [environment_name(option) for option in options] + list(OTHER_VARIABLES)
    messages = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            messages.append(f"environment variable {name} is not one of ours{hint}")
    return messages


def client_settings(environ: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the address and the key that a client in the terminal uses unless told otherwise.

    Of several server keys it takes the first.
    """
    keys = environ.get(environment_name("api_key"), "").split(",")
    return environ.get("PROA_URL") or "http://127.0.0.1:8000", keys[0] or None


def judge_key(environ: Mapping[str, str]) -> str | None:
    """Return the key of the server whose model judges, if it has its own."""
    return environ.get(JUDGE_KEY) or None
