"""The files for running replicas are valid by their own tools, and name options that exist."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config import OPTIONS
from serve.environment import OTHER_VARIABLES, environment_name

FOLDER = Path(__file__).parents[1] / "examples" / "vllm"
KNOWN = {environment_name(name) for name in OPTIONS} | set(OTHER_VARIABLES)


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")))


@pytest.mark.compose
def test_compose_file_is_valid() -> None:
    done = subprocess.run(
        ["docker-compose", "-f", "compose.yaml", "config"], cwd=FOLDER, capture_output=True,
        text=True, env=os.environ | {"PROA_API_KEY": "secret"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    replicas = [services["first"], services["second"]]
    devices = [
        set(one["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"])
        for one in replicas
    ]
    assert not devices[0] & devices[1]
    for one, ids in zip(replicas, devices, strict=True):
        assert set(one["environment"]) <= KNOWN
        assert int(one["environment"]["PROA_TENSOR_PARALLEL_SIZE"]) == len(ids)
        assert one["build"]["target"] == "vllm"


def test_compose_file_wants_a_key() -> None:
    text = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
    assert "PROA_API_KEY: ${PROA_API_KEY:?" in text


@pytest.mark.kubernetes
def test_kubernetes_manifest_is_valid() -> None:
    import kubernetes_validate

    for manifest in manifests():
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_manifest_is_of_one_piece() -> None:
    by_kind = {manifest["kind"]: manifest for manifest in manifests()}
    pod = by_kind["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    variables = {entry["name"]: entry for entry in container["env"]}
    assert set(variables) <= KNOWN
    assert "secretKeyRef" in variables["PROA_API_KEY"]["valueFrom"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert variables["PROA_TENSOR_PARALLEL_SIZE"]["value"] == gpus
    assert by_kind["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_proxy_knows_the_replicas() -> None:
    text = (FOLDER / "nginx.conf").read_text(encoding="utf-8")
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name in services.keys() - {"proxy"}:
        assert f"server {name}:8000 " in text
    assert "proxy_buffering off;" in text
