"""Options: where their values come from, what is refused, and what "auto" becomes."""

import dataclasses
from pathlib import Path

import pytest

from serve.api.settings import ApiSettings
from serve.backends import BACKENDS
from serve.config import OPTIONS, ServeConfig, build_config
from serve.engine.limits import EngineLimits
from serve.environment import client_settings, data_folder, environment_name, unknown_variables
from serve.options import ConfigError
from serve.resolve import (
    resolve_access,
    resolve_adapters,
    resolve_capacity,
    resolve_connections,
    resolve_votes,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "proa.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_dataclass_ones() -> None:
    assert build_config({}, environ={}) == ServeConfig()


@pytest.mark.parametrize(
    ("arguments", "environ", "file", "expected"),
    [
        ({"port": "1"}, {"PROA_PORT": "2"}, "port: 3", 1),
        ({}, {"PROA_PORT": "2"}, "port: 3", 2),
        ({}, {"PROA_PORT": ""}, "port: 3", 3),
        ({}, {}, "max-context: 64", 8000),
    ],
    ids=["command line first", "then environment", "then file", "then default"],
)
def test_precedence(
    arguments: dict, environ: dict, file: str, expected: int, tmp_path: Path
) -> None:
    config = build_config(arguments, environ=environ, file=write(tmp_path, file))
    assert config.port == expected


def test_every_option_can_be_set_from_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "other", "other")
    texts = {
        "model": "m", "served_model_name": "n", "quantization": "none", "head": "nf4",
        "cache_dir": "c", "adapter": "a=d", "adapter_root": "r", "adapter_memory_bytes": "3MB",
        "variant": "b=e", "dequantize": "on",
        "admin_key": "s", "admin_key_file": "t", "host": "::1", "port": "1",
        "api_key": "k", "api_key_file": "f",
        "allowed_host": "h", "allowed_origin": "https://o", "max_connections": "7",
        "max_header_bytes": "3KiB", "write_timeout_s": "2.5",
        "backend": "other", "device": "cpu", "kernels": "reference", "threads": "3",
        "kv": "float32", "kv_cache_tokens": "320", "block_size": "32",
        "max_running_sequences": "5", "max_batch_tokens": "17", "max_waiting_requests": "9",
        "prefix_caching": "off", "max_context": "11",
        "max_waiting_tokens": "12", "max_sequences_per_prompt": "13",
        "max_sequences_per_request": "14",
        "max_body_bytes": "2KiB", "unknown_fields": "ignore", "drain_timeout_s": "1.5",
        "log_level": "debug", "ui": "off", "votes": "v", "experiments": "x",
        "experiment_data": "y", "tensor_parallel_size": "2", "executor": "mp",
    }  # fmt: skip
    assert texts.keys() == OPTIONS.keys()
    from_arguments = build_config(texts, environ={})
    from_environment = build_config({}, environ={environment_name(n): t for n, t in texts.items()})
    lines = "\n".join(f'{name.replace("_", "-")}: "{text}"' for name, text in texts.items())
    from_file = build_config({}, environ={}, file=write(tmp_path, lines))
    assert from_arguments == from_environment == from_file
    changed = {n for n in texts if getattr(from_file, n) != getattr(ServeConfig(), n)}
    assert changed == OPTIONS.keys()


def test_yaml_numbers_and_booleans_are_values(tmp_path: Path) -> None:
    text = "port: 80\nprefix_caching: false\ndrain_timeout_s: 2\napi_key: [one, two]\n"
    config = build_config({}, environ={}, file=write(tmp_path, text))
    assert (config.port, config.prefix_caching, config.drain_timeout_s) == (80, False, 2.0)
    assert config.api_key == ("one", "two")


def test_environment_gives_several_keys() -> None:
    assert build_config({}, environ={"PROA_API_KEY": "a,b"}).api_key == ("a", "b")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("prot: 1", r"unknown option 'prot'; did you mean port\?"),
        ("port: many", r"port in .*: 'many' is not a whole number from 0 to 65535"),
        ("port: 1.5", r"port in .*: '1.5' is not a whole number"),
        ("port: [1, 2]", r"port in .*: \[1, 2\] is not a whole number"),
        ("port:", r"port in .*: None is not a whole number"),
        ("host: ''", r"host in .*: '' is not text"),
        ("max-context: 1\nmax_context: 2", "sets max_context twice"),
        ("- port", "must hold 'option: value' lines"),
        ("port: {", "is not a YAML file"),
        ("port: !!python/object:os.system 1", "is not a YAML file"),
    ],
    ids=["typo", "word", "fraction", "list", "nothing", "empty", "twice", "no mapping", "broken",
         "python object"],
)  # fmt: skip
def test_file_with_a_mistake_is_refused(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        build_config({}, environ={}, file=write(tmp_path, text))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*none.yaml: No such file"):
        build_config({}, environ={}, file=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("PROA_PORT", "tcp://10.0.0.1:80", "PROA_PORT: 'tcp://10.0.0.1:80' is not a whole number"),
        ("PROA_PREFIX_CACHING", "maybe", "PROA_PREFIX_CACHING: 'maybe' is not true or false"),
        ("PROA_HEAD", "int4", "PROA_HEAD: 'int4' is not one of int8, nf4, dense"),
        ("PROA_DRAIN_TIMEOUT_S", "nan", "PROA_DRAIN_TIMEOUT_S: 'nan' is not a number of seconds"),
        ("PROA_MAX_BODY_BYTES", "1 parsec", "PROA_MAX_BODY_BYTES: '1 parsec' is not a size"),
        ("PROA_THREADS", "all", "PROA_THREADS: 'all' is not a whole number or auto"),
    ],
)
def test_bad_variable_is_refused(name: str, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_config({}, environ={name: text})


def test_unknown_variable_is_reported_with_the_likely_name() -> None:
    messages = unknown_variables({"PROA_PROT": "1", "PROA_URL": "x", "PATH": "y"}, OPTIONS)
    assert messages == [
        "environment variable PROA_PROT is not one of ours (did you mean PROA_PORT?)"
    ]


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("port", 65536, "port: 65536 is not a whole number from 0 to 65535"),
        ("port", True, "port: True is not a whole number"),
        ("threads", 0, "threads: 0 is not a whole number or auto"),
        ("threads", "many", "threads: 'many' is not"),
        ("device", "tpu", "device: 'tpu' is not one of auto, cpu, cuda"),
        ("model", 5, "model: 5 is not a path"),
        ("api_key", ("",), "api_key: '' is not text"),
        ("adapter", ("a",), "adapter: 'a' is not NAME=DIR"),
        ("adapter", ("=d",), "adapter: '=d' is not NAME=DIR"),
        ("adapter", ("a=",), "adapter: 'a=' is not NAME=DIR"),
        ("adapter", ("a=d", "a=e"), "adapter, variant: two are called 'a'"),
        ("variant", ("a=d", "a=e"), "adapter, variant: two are called 'a'"),
        ("variant", ("a",), "variant: 'a' is not NAME=DIR"),
        ("adapter_memory_bytes", -1, "adapter_memory_bytes: -1 is not a size"),
        ("prefix_caching", 1, "prefix_caching: 1 is not true or false"),
    ],
)
def test_config_refuses_a_bad_value(field: str, value: object, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(ServeConfig(), **{field: value})


@pytest.mark.parametrize(
    ("kernels", "device", "match"),
    [
        ("cuda", "cpu", "'cuda' needs device"),
        ("native", "cuda", "'native' computes on the CPU"),
    ],
)
def test_contradicting_kernels_are_refused(kernels: str, device: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ServeConfig(kernels=kernels, device=device)


def test_int8_cache_is_refused_on_cuda() -> None:
    with pytest.raises(ConfigError, match="kv: 'int8' computes on the CPU; on device 'cuda' it is"):
        ServeConfig(kv="int8", device="cuda")
    assert ServeConfig(kv="int8", device="cpu").kv == "int8"


def test_keys_stay_out_of_the_representation() -> None:
    assert "hush" not in repr(ServeConfig(api_key=("hush",), admin_key=("hush",)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_open_address_without_key_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="can be reached from other machines; set an API key"):
        resolve_access(ServeConfig(host=host))
    assert resolve_access(ServeConfig(host=host, api_key=("k",))).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert resolve_access(ServeConfig(host=host)).api_key == ()


def test_key_file_adds_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n", encoding="utf-8")
    config = resolve_access(ServeConfig(api_key=("zero",), api_key_file=str(path)))
    assert config.api_key == ("zero", "one", "two")


@pytest.mark.parametrize("option", ["api_key_file", "admin_key_file"])
@pytest.mark.parametrize(
    ("content", "match"), [(None, "cannot read"), ("\n", "holds no key")], ids=["missing", "empty"]
)
def test_useless_key_file_is_refused(
    content: str | None, match: str, option: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{option}: .*{match}"):
        resolve_access(ServeConfig(**{option: str(path)}))


def test_admin_key_file_adds_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n", encoding="utf-8")
    config = resolve_access(ServeConfig(admin_key=("zero",), admin_key_file=str(path)))
    assert (config.admin_key, config.api_key) == (("zero", "one"), ())


def test_key_that_is_both_is_refused() -> None:
    with pytest.raises(ConfigError, match="admin_key: an admin key must differ from every API key"):
        resolve_access(ServeConfig(api_key=("k", "l"), admin_key=("l",)))


def test_admin_key_alone_does_not_open_the_address() -> None:
    with pytest.raises(ConfigError, match="set an API key"):
        resolve_access(ServeConfig(host="0.0.0.0", admin_key=("k",)))


def test_adapters_are_names_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a=b")
    config = ServeConfig(
        adapter=(f"x={tmp_path}/link",), adapter_root=f"{tmp_path}/../{tmp_path.name}"
    )
    config = resolve_adapters(config)
    assert config.adapters == [("x", str(tmp_path / "a=b"))]
    assert config.adapter_root == str(tmp_path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"adapter": ("x=/no/where",)}, "adapter: x: /no/where is not a folder"),
        ({"adapter_root": "/no/where"}, "adapter_root: /no/where is not a folder"),
    ],
)
def test_missing_adapter_folder_is_refused(fields: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        resolve_adapters(ServeConfig(**fields))


@pytest.mark.parametrize(
    ("config", "free_blocks", "expected"),
    [
        (ServeConfig(), 10_000, (12288, 8192)),
        (ServeConfig(max_running_sequences=1), 10_000, (8192, 8192)),
        (ServeConfig(), 200, (1600, 1600)),
        (ServeConfig(), 0, (16, 16)),
        (ServeConfig(kv_cache_tokens=1000), 0, (1008, 1008)),
        (ServeConfig(kv_cache_tokens=9000, max_context=100), 0, (9008, 100)),
        (ServeConfig(max_context=100, max_running_sequences=1), 10_000, (192, 100)),
    ],
    ids=["by sequences", "one context", "little memory", "no memory", "given", "both given",
         "short context"],
)  # fmt: skip
def test_capacity_auto(config: ServeConfig, free_blocks: int, expected: tuple[int, int]) -> None:
    resolved = resolve_capacity(
        config, model_context=8192, bytes_per_block=100, free_bytes=100 * free_blocks
    )
    assert (resolved.kv_cache_tokens, resolved.max_context) == expected


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (ServeConfig(max_context=9000), "9000 is more than the model's 8192 tokens"),
        (ServeConfig(max_context=100, kv_cache_tokens=50), "100 tokens do not fit .* of 64"),
    ],
    ids=["model", "cache"],
)
def test_impossible_context_is_refused(config: ServeConfig, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        resolve_capacity(config, model_context=8192, bytes_per_block=100, free_bytes=10**9)


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({}, "~/.local/share/proa"),
        ({"XDG_DATA_HOME": "/data"}, "/data/proa"),
        ({"XDG_DATA_HOME": "data"}, "~/.local/share/proa"),
        ({"XDG_DATA_HOME": ""}, "~/.local/share/proa"),
    ],
    ids=["unset", "set", "relative", "empty"],
)
def test_data_folder_is_the_desktop_standards(environ: dict, folder: str) -> None:
    assert data_folder(environ) == Path(folder)


def test_votes_are_in_the_data_folder_unless_told_otherwise(tmp_path: Path) -> None:
    config = resolve_votes(ServeConfig(), data_folder=tmp_path)
    assert config.votes == str(tmp_path / "votes.sqlite3")
    config = resolve_votes(ServeConfig(votes="mine"), data_folder=tmp_path)
    assert config.votes == str(Path.cwd() / "mine")


def test_votes_begin_at_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = resolve_votes(ServeConfig(), data_folder=Path("~/share"))
    assert config.votes == "/home/me/share/votes.sqlite3"


def test_votes_in_an_unknown_home_folder_are_refused(tmp_path: Path) -> None:
    config = ServeConfig(votes="~no-such-user/votes")
    with pytest.raises(ConfigError, match="votes: ~no-such-user/votes is in an unknown home"):
        resolve_votes(config, data_folder=tmp_path)


def test_client_takes_address_and_first_key() -> None:
    assert client_settings({}) == ("http://127.0.0.1:8000", None)
    assert client_settings({"PROA_URL": "http://a", "PROA_API_KEY": "k,l"}) == ("http://a", "k")


def test_defaults_equal_those_of_the_parts() -> None:
    settings = {field.name: field.default for field in dataclasses.fields(ApiSettings)}
    settings |= {"allowed_host": settings["allowed_hosts"]}
    limits = {field.name: field.default for field in dataclasses.fields(EngineLimits)}
    del limits["num_cache_blocks"]
    shared = limits | settings
    common = shared.keys() & OPTIONS.keys()
    assert len(common) >= 11
    assert {n: shared[n] for n in common} == {n: OPTIONS[n].default for n in common}


def test_smaller_batch_than_running_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens: 8 is less than max_running_sequences"):
        ServeConfig(max_batch_tokens=8)


@pytest.mark.parametrize(
    ("asked", "max_files", "expected"),
    [("auto", 256, 160), ("auto", 50_000, 1024), ("auto", -1, 1024), (9, 256, 9), (9000, -1, 9000)],
)
def test_connections_leave_files_for_other_things(
    asked: int | str, max_files: int, expected: int
) -> None:
    config = resolve_connections(ServeConfig(max_connections=asked), max_files=max_files)
    assert config.max_connections == expected


def test_more_connections_than_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_connections: 200 is more than 160"):
        resolve_connections(ServeConfig(max_connections=200), max_files=256)


@pytest.mark.parametrize("text", ["*", "app.example", "https://app.example/", "ftp://a", "null"])
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an origin such as"):
        build_config({"allowed_origin": [text]}, environ={})
