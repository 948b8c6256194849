"""Which files a configuration's service consists of, and what stands in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamd.config import Config
from streamd.errors import ConfigError
from streamd.units import (
    MARK,
    SYSUSERS,
    TEMPLATE,
    TMPFILES,
    UNIT_FOLDER,
    foreign_variables,
    hardware_of,
    hidden,
    secret_files,
    service_of,
    unwritable,
)

PROGRAM = Path("/opt/streamd/bin/streamd")
HOME = Path("/home") / "ann"


def make_config(**sections: Any) -> Config:
    base: dict[str, Any] = {
        "models": {"m": {"path": "/srv/m.pt"}},
        "streams": {"gate": {"url": "rtsp://192.0.2.1/x"}},
    }
    return Config.model_validate({**base, **sections})


def test_the_usual_configuration_is_streamd_service() -> None:
    service = service_of(Path("/etc/streamd/streamd.yaml"), make_config(), Path("/usr/local/bin/streamd"))
    assert service.name == "streamd.service"
    assert {*service.files} == {SYSUSERS, TMPFILES, UNIT_FOLDER / "streamd.service"}
    text = service.files[UNIT_FOLDER / "streamd.service"]
    assert text.startswith(MARK)
    assert "\nExecStart=/usr/local/bin/streamd run /etc/streamd/streamd.yaml\n" in text
    assert "\nExecReload=/usr/local/bin/streamd reload\n" in text
    assert "/opt/streamd" not in text


def test_another_name_in_the_folder_is_an_instance_of_the_template() -> None:
    service = service_of(Path("/etc/streamd/north.yaml"), make_config(), PROGRAM, "cpu")
    assert service.name == "streamd@north.service"
    assert service.unit == TEMPLATE
    assert "run /etc/streamd/%i.yaml" in service.files[TEMPLATE]
    assert UNIT_FOLDER / "streamd@north.service.d" / "cpu.conf" in service.files


def test_a_file_elsewhere_is_streamd_service_with_its_path() -> None:
    service = service_of(Path("/srv/my cameras/100%.yaml"), make_config(), PROGRAM)
    assert 'run "/srv/my cameras/100%%.yaml"\n' in service.files[service.unit]


@pytest.mark.parametrize("name", ["a b.yaml", "-x.yaml", "north.yml"])
def test_a_name_that_systemd_would_not_take_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"rename|use letters"):
        service_of(Path("/etc/streamd", name), make_config(), PROGRAM)


def test_only_a_configuration_without_gpu_gets_the_cpu_drop_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidiactl"
    monkeypatch.setattr("streamd.units._NVIDIA", driver)
    on_any, on_gpu, on_cpu = (
        make_config(models={"m": {"path": "m", "device": device}}) for device in ("auto", "cuda:1", "cpu")
    )
    assert [hardware_of(config) for config in (on_any, on_gpu, on_cpu)] == ["cpu", "gpu", "cpu"]
    driver.touch()
    assert [hardware_of(config) for config in (on_any, on_gpu, on_cpu)] == ["gpu", "gpu", "cpu"]


def test_a_v4l2_stream_gets_its_device_after_the_cpu_drop_in_took_all() -> None:
    config = make_config(streams={"desk": {"url": "v4l2:///dev/video0"}})
    service = service_of(Path("/etc/streamd/streamd.yaml"), config, PROGRAM, "cpu")
    names = sorted(path.name for path in service.files if path.parent == service.drop_ins)
    assert names == ["cpu.conf", "v4l2.conf"]


def test_what_the_service_cannot_see_is_named_with_what_to_do() -> None:
    config = make_config(
        models={"m": {"path": str(HOME / "m.pt")}, "named": {"path": "yolox_s"}},
        streams={"clip": {"url": "/tmp/clip.mp4"}, "gate": {"url": "rtsp://192.0.2.1/x"}},
    )
    found = list(hidden(Path("/root") / "cameras.yaml", config, {"its Python": Path("/opt/streamd/bin/python3")}))
    assert [line.partition(",")[0] for line in found] == ["the configuration", "the model m", "the stream clip"]
    assert "sees nothing under /home" in found[1] and "copy it to" in found[1]
    programs = {"the program": HOME / "venv/bin/streamd"}
    (line,) = hidden(Path("/etc/streamd/streamd.yaml"), make_config(), programs)
    assert "python3 -m venv /opt/streamd" in line


def test_folders_that_the_unit_does_not_allow_are_named() -> None:
    config = make_config(
        publish={"spool": {"path": "/mnt/spool.sqlite"}, "zeromq": {"bind": "ipc:///run/streamd/zmq"}},
        control={"path": "/run/other/control.sock"},
    )
    assert [line.partition(":")[0] for line in unwritable(config)] == ["publish.spool.path", "control.path"]


def test_variables_of_the_operators_environment_are_named() -> None:
    found = list(foreign_variables("a: ${GATE}\nb: ${file:x}\nc: $${PLAIN}\nd: ${GATE}"))
    assert len(found) == 1 and found[0].startswith("${GATE}: ")


def test_files_with_secrets_are_named_unless_systemd_hands_them_over() -> None:
    text = "a: ${file:credentials/gate}\nb: ${file:yard.password}\nc: ${file:/srv/key}\nd: $${file:plain}\ne: ${GATE}"
    found = list(secret_files(Path("/etc/streamd/streamd.yaml"), text))
    assert found == [Path("/etc/streamd/yard.password"), Path("/srv/key")]
