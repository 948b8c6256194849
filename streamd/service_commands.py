"""`streamd service install|uninstall|status`: the daemon as a service of systemd."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from streamd import service as services
from streamd.errors import ConfigError, StreamdError

if TYPE_CHECKING:
    from streamd.config import Config
    from streamd.units import Service

service_app = typer.Typer(
    help="About the daemon as a service of systemd (docs/service.md).", no_args_is_help=True, rich_markup_mode=None
)

ConfigPath = Annotated[
    Path,
    typer.Argument(
        help="/etc/streamd/NAME.yaml is the unit streamd@NAME, streamd.yaml or any other file is streamd.",
        metavar="CONFIG",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and what would be written.")]
Root = Annotated[
    Path, typer.Option(help="Change the system in this folder instead, for example a disk image's.", metavar="DIR")
]
HardwareOption = Annotated[
    Literal["auto", "cpu", "gpu"],
    typer.Option(help="cpu forbids all devices; auto looks at the models and for NVIDIA's driver."),
]


@service_app.command()
def install(
    config: ConfigPath,
    now: Annotated[bool, typer.Option("--now", help="Start it as well, and wait until its models are warm.")] = False,
    hardware: HardwareOption = "auto",
    dry_run: DryRun = False,
    root: Root = Path("/"),
) -> None:
    """Write unit, user and folders for a configuration, and let it start with the machine; as root.

    Example: streamd service install /etc/streamd/streamd.yaml --now
    """
    from streamd.config_file import load

    if now and root != Path("/"):
        raise typer.BadParameter("--now starts it on this machine, --root is another one")
    system = services.System(root.absolute(), print, dry_run=dry_run)
    system.check()
    tree = load(config)
    wanted = _service(config, tree, hardware)
    _refuse_hidden(config, tree)
    is_new = services.install(wanted, system)
    if root == Path("/") and not dry_run:
        _check_rights(config, tree)
    _note(wanted, tree, hardware)
    if now and not dry_run:
        _start(wanted, is_new=is_new)
    elif root == Path("/"):
        print(services.line("next", f"systemctl start {wanted.name}; journalctl --follow --unit {wanted.name}"))


@service_app.command()
def uninstall(config: ConfigPath, dry_run: DryRun = False, root: Root = Path("/")) -> None:
    """Stop the service and remove what `install` wrote; configuration, state and user stay.

    Example: streamd service uninstall /etc/streamd/streamd.yaml
    """
    wanted = _service(config, None, "cpu")
    services.uninstall(wanted, services.System(root.absolute(), print, dry_run=dry_run))
    folders = "/etc/streamd, /var/lib/streamd, /var/cache/streamd"
    print(services.line("left", f"{wanted.config}, {folders} and the user {services.USER}"))


@service_app.command()
def status(config: ConfigPath, root: Root = Path("/")) -> None:
    """Say whether the service is installed, runs, and why not; exit with 1 unless it is active.

    Example: streamd service status /etc/streamd/streamd.yaml
    """
    from streamd.config_file import load

    try:
        tree: Config | None = load(config)
    except ConfigError as err:
        tree = None
        print(f"streamd: {err}", file=sys.stderr)
    drop_in = _service(config, tree, "cpu").drop_ins / "cpu.conf"
    system = services.System(root.absolute(), print)
    report = services.report(_service(config, tree, "cpu" if system.read(drop_in) else "gpu"), system)
    print("\n".join(report.lines))
    if not report.is_active:
        raise typer.Exit(1)


def _service(path: Path, config: Config | None, hardware: Literal["auto", "cpu", "gpu"]) -> Service:
    from streamd.units import hardware_of, service_of

    chosen = (hardware_of(config) if config else "gpu") if hardware == "auto" else hardware
    return service_of(path, config, _program(), chosen)


def _refuse_hidden(path: Path, config: Config) -> None:
    """Raise ConfigError with all that the service would not see."""
    import streamd
    from streamd.units import hidden

    if not _program().is_file():
        raise ConfigError(
            f"there is no {_program()}: the service needs streamd installed by pip, not run from a checkout"
        )
    programs = {"the program": Path(streamd.__file__), "its Python": Path(sys.executable)}
    if found := list(hidden(path.absolute(), config, programs)):
        raise ConfigError("\n  ".join((f"{path}: this cannot be a service", *found)))


def _check_rights(path: Path, config: Config) -> None:
    """Raise ConfigError where the service's user cannot read what it needs."""
    from streamd.file_errors import read_text
    from streamd.units import inputs, secret_files

    path = path.absolute()
    needed = [path, _program(), *dict(inputs(config)).values(), *secret_files(path, read_text(path))]
    if found := services.unreadable(needed):
        advice = f"chgrp {services.USER} FILE && chmod g+r FILE, and g+x for the folders above"
        raise ConfigError(f"the user {services.USER} cannot read {', '.join(map(str, found))}; {advice}")


def _note(service: Service, config: Config, asked: str) -> None:
    from streamd.file_errors import read_text
    from streamd.units import foreign_variables, unwritable

    if asked == "auto":
        print(services.line("note", f"for the {service.hardware.upper()}; --hardware says otherwise"))
    for sentence in (*unwritable(config), *foreign_variables(read_text(service.config))):
        print(services.line("note", sentence))


def _start(service: Service, *, is_new: bool) -> None:
    """Start or, where it runs already, have it take what is new; on failure show what it said. Raises StreamdError."""
    print(services.line("starting", f"{service.name}; its models are loaded and measured"))
    done = services.call("systemctl", "restart" if is_new else "reload-or-restart", service.name)
    if done.returncode:
        print(services.journal(service.name), file=sys.stderr)
        now = services.state(service.name)
        if now.get("ActiveState") == "active":
            raise ConfigError(f"{service.name} refuses the configuration and goes on as it was")
        raise StreamdError(f"{service.name} did not start: {services.how_it_ended(now)}")
    print("\n".join(services.unit_lines(service.name)))


def _program() -> Path:
    """Say where the program of this installation is."""
    return Path(sysconfig.get_path("scripts"), "streamd")
