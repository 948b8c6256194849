"""What systemd needs for a configuration: which files, and what stands in them."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from streamd.errors import ConfigError

if TYPE_CHECKING:
    from streamd.config import Config

Hardware = Literal["cpu", "gpu"]

CONFIG_FOLDER = Path("/etc/streamd")
CREDENTIALS = CONFIG_FOLDER / "credentials"
MARK = "# Written, and removed, by `streamd service install` and `uninstall`; change it with `systemctl edit`.\n"
UNIT_FOLDER = Path("/etc/systemd/system")
SYSUSERS = Path("/etc/sysusers.d/streamd.conf")
TMPFILES = Path("/etc/tmpfiles.d/streamd.conf")
TEMPLATE = UNIT_FOLDER / "streamd@.service"
_NVIDIA = Path("/dev/nvidiactl")
_SHIPPED_PROGRAM = "/opt/streamd/bin/streamd"
_SHIPPED_CONFIG = "/etc/streamd/streamd.yaml"
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # by ProtectHome= and PrivateTmp=


@dataclass(frozen=True, slots=True)
class Service:
    """The systemd side of one configuration."""

    config: Path  # absolute
    name: str  # of the unit
    files: Mapping[Path, str]  # what is to stand where
    hardware: Hardware

    @property
    def unit(self) -> Path:
        """The file that the unit is read from."""
        return TEMPLATE if "@" in self.name else UNIT_FOLDER / self.name

    @property
    def drop_ins(self) -> Path:
        """The folder of what this unit alone has."""
        return UNIT_FOLDER / f"{self.name}.d"


def service_of(path: Path, config: Config | None, program: Path, hardware: Hardware = "gpu") -> Service:
    """Say what systemd needs for the configuration at `path`; without `config` (it is wrong) what is sure.

    /etc/streamd/NAME.yaml is an instance of the template; /etc/streamd/streamd.yaml, or a file elsewhere, is
    streamd.service.
    """
    path = path.absolute()
    name = unit_name(path)
    unit = TEMPLATE if "@" in name else UNIT_FOLDER / name
    text = _shipped(unit.name).replace(_SHIPPED_PROGRAM, _quoted(program))
    files = {
        SYSUSERS: _shipped("sysusers.conf"),
        TMPFILES: _shipped("tmpfiles.conf"),
        unit: text if unit == TEMPLATE else text.replace(_SHIPPED_CONFIG, _quoted(path)),
    }
    drop_ins = UNIT_FOLDER / f"{name}.d"
    if hardware == "cpu":
        files[drop_ins / "cpu.conf"] = _shipped("cpu.conf")
    if config and any(one.url.get_secret_value().startswith("v4l2://") for one in config.streams.values()):
        files[drop_ins / "v4l2.conf"] = _shipped("v4l2.conf")
    return Service(path, name, {file: MARK + text for file, text in files.items()}, hardware)


def unit_name(path: Path) -> str:
    """Name the unit of a configuration. Raises ConfigError where systemd would not take the name."""
    if path.parent != CONFIG_FOLDER or path.stem == "streamd":
        return "streamd.service"
    if path.suffix != ".yaml":
        raise ConfigError(f"{path}: an instance's configuration ends with .yaml; rename it to {path.stem}.yaml")
    if not re.fullmatch(r"[A-Za-z0-9_.:][A-Za-z0-9_.:-]*", path.stem):
        raise ConfigError(f"{path}: '{path.stem}' is to name an instance; use letters, digits, '_', '.' and '-'")
    return f"streamd@{path.stem}.service"


def hardware_of(config: Config) -> Hardware:
    """Tell whether a model is to run on a GPU; `auto` is decided by the driver's device."""
    devices = {model.device for model in config.models.values()}
    on_gpu = any(device.startswith("cuda") for device in devices) or ("auto" in devices and _NVIDIA.exists())
    return "gpu" if on_gpu else "cpu"


def hidden(config_path: Path, config: Config, programs: Mapping[str, Path]) -> Iterator[str]:
    """Say of each file that the service would need, and cannot see, what to do."""
    paths = {**programs, "the configuration": config_path, **dict(inputs(config))}
    for what, path in paths.items():
        if folder := next((folder for folder in _HIDDEN if path.resolve().is_relative_to(folder)), None):
            yield f"{what}, {path}: the service sees nothing under {folder}; {_advice(what)}"


def unwritable(config: Config) -> Iterator[str]:
    """Name the folders in which the configuration wants files and the unit allows none."""
    publish, metrics, control = config.publish, config.metrics, config.control
    paths = {
        "publish.spool.path": publish.spool.path,
        "publish.zeromq.bind": publish.zeromq.bind.partition("ipc://")[2] if publish.zeromq else None,
        "metrics.listen": (metrics.listen or "").partition("unix://")[2],
        "control.path": control.path if control and control.path != "auto" else None,
    }
    for key, text in paths.items():
        if text and not text.startswith(("/run/streamd", "/var/lib/streamd", "/var/cache/streamd", "@")):
            yield f"{key}: the service may not write to {Path(text).parent} unless ReadWritePaths= allows it"


def foreign_variables(text: str) -> Iterator[str]:
    """Say what of the operator's environment a configuration's text names: the service does not have it."""
    for name in dict.fromkeys(re.findall(r"(?<!\$)\$\{([A-Za-z_][A-Za-z0-9_]*)\}", text)):
        yield f"${{{name}}}: the service has not your environment; use ${{file:credentials/...}} instead"


def inputs(config: Config) -> Iterator[tuple[str, Path]]:
    """Name the files that the configuration reads."""
    for name, model in config.models.items():
        if "/" in model.path:
            yield f"the model {name}", Path(model.path)
        if model.gate and model.gate.data:
            yield f"the gate's data of {name}", Path(model.gate.data)
    for name, stream in config.streams.items():
        if stream.is_file:
            yield f"the stream {name}", Path(stream.url.get_secret_value().removeprefix("file://"))
        if stream.ca_file:
            yield f"the certificates of {name}", Path(stream.ca_file)


def secret_files(path: Path, text: str) -> Iterator[Path]:
    """Name the files that a configuration's text takes secrets from, except what systemd hands over."""
    for name in dict.fromkeys(re.findall(r"(?<!\$)\$\{file:([^}]*)\}", text)):
        file = path.parent / name
        if not file.is_relative_to(CREDENTIALS):
            yield file


def _advice(what: str) -> str:
    if what in ("the program", "its Python"):
        return "install streamd where every user can read it, for example: python3 -m venv /opt/streamd"
    return f"copy it to {CONFIG_FOLDER if what == 'the configuration' else '/srv or /var/lib/streamd'}"


def _shipped(name: str) -> str:
    return (importlib.resources.files("streamd.systemd") / name).read_text()


def _quoted(path: Path) -> str:
    """Write a path as systemd reads words of a command line."""
    text = str(path).replace("\\", "\\\\").replace("%", "%%").replace("$", "$$").replace('"', '\\"')
    return f'"{text}"' if re.search(r"[\s;'\\]", text) else text
