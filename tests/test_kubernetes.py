"""The manifest: by Kubernetes' own schemas, against what the daemon says of itself, and run as a node would run it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from streamd.config import Config
from streamd.config_file import parse
from streamd.daemon import SHUTDOWN_DEADLINE_S
from streamd.models import weights
from tests.conftest import ROOT
from tests.pod import Pod, missing_for_pods

MANIFEST = ROOT / "configs" / "kubernetes" / "streamd.yaml"
VERSIONS = ("1.29", "1.33", "1.37")  # the oldest in which ReadWriteOncePod is stable, and what came since
PARTS: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST.read_text()))


def part(kind: str) -> dict[str, Any]:
    (found,) = [one for one in PARTS if one["kind"] == kind]
    return found


def pod_spec() -> dict[str, Any]:
    spec: dict[str, Any] = part("StatefulSet")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod_spec()["containers"]
    assert isinstance(only, dict)
    return only


def pod_names() -> list[str]:
    stateful = part("StatefulSet")
    return [f"{stateful['metadata']['name']}-{index}" for index in range(stateful["spec"]["replicas"])]


@pytest.fixture
def configurations(tmp_path: Path) -> list[Config]:
    """Read each pod's configuration, with the secrets elsewhere."""
    for name, secret in part("Secret")["stringData"].items():
        (tmp_path / name).write_text(secret)
    texts = part("ConfigMap")["data"]
    return [
        parse(texts[f"{name}.yaml"].replace("/run/secrets/streamd", str(tmp_path)), tmp_path / f"{name}.yaml")
        for name in pod_names()
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [one["kind"] for one in PARTS])
def test_the_manifest_is_what_kubernetes_schemas_allow(kind: str, version: str) -> None:
    kubernetes_validate.validate(part(kind), version, strict=True)


def test_each_pod_has_a_configuration_and_no_camera_is_in_two(configurations: list[Config]) -> None:
    assert part("ConfigMap")["data"].keys() == {f"{name}.yaml" for name in pod_names()}
    assert container()["command"] == ["streamd", "run", "/etc/streamd/$(POD_NAME).yaml"]
    names = [name for config in configurations for name in config.streams]
    assert len(names) == len(set(names))
    for config in configurations:
        assert config.stored_streams == config.streams.keys()
        assert all(weights.resolve(model.path, download=False).is_file() for model in config.models.values())


def test_the_probes_find_the_exporter_from_outside(configurations: list[Config]) -> None:
    (port,) = container()["ports"]
    probes = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/healthz",
    }
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert {config.metrics.listen for config in configurations} == {f"tcp://0.0.0.0:{port['containerPort']}"}
    (ingress,) = part("NetworkPolicy")["spec"]["ingress"]
    assert ingress["from"] and ingress["ports"] == [{"protocol": "TCP", "port": port["name"]}]


def test_there_is_time_to_drain() -> None:
    assert pod_spec()["terminationGracePeriodSeconds"] > SHUTDOWN_DEADLINE_S


def test_every_selector_finds_the_pods() -> None:
    labels = part("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert part("StatefulSet")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert part("Service")["spec"]["selector"].items() <= labels.items()
    assert part("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert part("StatefulSet")["spec"]["serviceName"] == part("Service")["metadata"]["name"]


def test_what_the_daemon_writes_is_on_volumes_and_nothing_else_can_be_written() -> None:
    writable = {mount["mountPath"] for mount in container()["volumeMounts"] if not mount.get("readOnly")}
    environment = {one["name"]: one.get("value") for one in container()["env"]}
    folders = {environment[name] for name in ("STATE_DIRECTORY", "CACHE_DIRECTORY", "RUNTIME_DIRECTORY", "HOME")}
    assert folders | {"/tmp"} == writable
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    declared = {volume["name"] for volume in pod_spec()["volumes"]}
    declared |= {claim["metadata"]["name"] for claim in part("StatefulSet")["spec"]["volumeClaimTemplates"]}
    assert declared == {mount["name"] for mount in container()["volumeMounts"]}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder that the pod's user can reach, which pytest's are not."""
    made = Path(tempfile.mkdtemp(prefix="streamd-pod-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.mark.slow
def test_the_container_runs_as_the_manifest_says_is_ready_without_cameras_and_drains_in_time(folder: Path) -> None:
    if missing := missing_for_pods():
        pytest.skip(missing)
    files = {"configuration": part("ConfigMap")["data"], "secrets": part("Secret")["stringData"]}
    port = container()["ports"][0]["containerPort"]
    with Pod(pod_spec(), pod_names()[0], files, folder) as pod:
        pod.wait_until(container()["startupProbe"]["httpGet"]["path"], port)
        assert pod.get(container()["livenessProbe"]["httpGet"]["path"], port) == 200
        status = pod.status()
        assert set(status["Uid"].split()) == {str(pod_spec()["securityContext"]["runAsUser"])}
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"
        assert "ro" in pod.mount_options("/") and "rw" in pod.mount_options("/var/lib/streamd")
        said = pod.exec("streams", "list", "--json")
        assert said.returncode == 0 and "gate" in said.stdout, said.stderr
        reloaded = pod.exec("reload")
        assert reloaded.returncode == 0 and "nothing" in reloaded.stdout, reloaded.stdout + reloaded.stderr
        assert pod.stop(pod_spec()["terminationGracePeriodSeconds"]) == 0
    log = pod.log_path.read_text()
    assert "change-me" not in log and "going on without" not in log
