"""`streamd status`, `top`, `streams`, `reload` and `rollback`: talk to a running daemon over its control socket."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live

from streamd.errors import ConfigError

if TYPE_CHECKING:
    from streamd.control_messages import Answer, DaemonState, Request

_TIMEOUT_S = 5.0
_CHANGE_TIMEOUT_S = 300.0  # a new model has to be loaded and warmed
_REFRESH_S = 1.0

SocketPath = Annotated[
    Path | None, typer.Option("--socket", help="The daemon's control socket.", show_default="the usual places")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

streams_app = typer.Typer(help="About the streams of a running daemon.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (status, top, reload, rollback):
        app.command()(command)
    app.add_typer(streams_app, name="streams")


def status(socket_path: SocketPath = None, json_lines: Json = False) -> None:
    """Say how a running daemon, its streams, models and publishers are.

    Example: streamd status --json
    """
    import msgspec

    from streamd.control_messages import StatusRequest
    from streamd.top import render

    state = _state(_ask(socket_path, StatusRequest(), _TIMEOUT_S))
    if json_lines:
        print(msgspec.json.encode(state).decode())
    else:
        Console().print(render(state, {}))


def top(
    socket_path: SocketPath = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after so long.")] = None,
) -> None:
    """Show the streams of a running daemon live, until Ctrl-C.

    Example: streamd top
    """
    from streamd.control_messages import StatusRequest
    from streamd.top import Rates, render

    rates = Rates()
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            state = _state(_ask(socket_path, StatusRequest(), _TIMEOUT_S))
            live.update(render(state, rates.update(state)), refresh=True)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(_REFRESH_S, left_s))  # nothing waits for this thread but the user's Ctrl-C


def reload(socket_path: SocketPath = None) -> None:
    """Have a running daemon read its configuration file again; exit with 78 if it refuses the file.

    Example: streamd reload
    """
    from streamd.control_messages import ReloadRequest

    print(_ask(socket_path, ReloadRequest(), _CHANGE_TIMEOUT_S).done)


def rollback(
    model: Annotated[str, typer.Argument(help="As the configuration names it.")], socket_path: SocketPath = None
) -> None:
    """Have a running daemon go back to the version of a model that it had before; exit with 78 if it has none.

    The configuration file stays as it is: it is followed again when the model's file, or a key of the model, changes.

    Example: streamd rollback people
    """
    from streamd.control_messages import RollbackRequest

    print(_ask(socket_path, RollbackRequest(model=model), _CHANGE_TIMEOUT_S).done)


@streams_app.command("list")
def list_streams(socket_path: SocketPath = None, json_lines: Json = False) -> None:
    """List the streams of a running daemon, one a line.

    Example: streamd streams list
    """
    import msgspec

    from streamd.control_messages import ListRequest

    for entry in _ask(socket_path, ListRequest(), _TIMEOUT_S).streams or ():
        if json_lines:
            print(msgspec.json.encode(entry).decode())
        else:
            reason = f": {entry.status.reason}" if entry.status.reason else ""
            print(f"{entry.status.stream}  {entry.status.state}{reason}")


@streams_app.command("add")
def add_stream(
    name: Annotated[str, typer.Argument(help="Of your choice; part of the topics.")],
    url: Annotated[str, typer.Argument(help="As in the configuration; - reads it from stdin, for passwords.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another key of the stream; may repeat.")
    ] = None,
    socket_path: SocketPath = None,
) -> None:
    """Add a stream to a running daemon; it lasts until the next reload, so write it into the file as well.

    Example: streamd streams add yard rtsp://192.0.2.11/stream1 --set fps=5
    """
    from streamd.config import is_file_url
    from streamd.control_messages import AddRequest

    wanted = dict(_setting(text) for text in settings or ())
    url = input() if url == "-" else url
    wanted["url"] = str(Path(url).absolute()) if is_file_url(url) and "://" not in url else url
    print(_ask(socket_path, AddRequest(name=name, settings=wanted), _CHANGE_TIMEOUT_S).done)
    print("until the next reload: write it into the configuration file as well")


@streams_app.command("remove")
def remove_stream(
    name: Annotated[str, typer.Argument(help="As `streamd streams list` says it.")], socket_path: SocketPath = None
) -> None:
    """Remove a stream from a running daemon; one that is in the file comes back with the next reload.

    Example: streamd streams remove yard
    """
    from streamd.control_messages import RemoveRequest

    print(_ask(socket_path, RemoveRequest(name=name), _CHANGE_TIMEOUT_S).done)
    print("until the next reload: remove it from the configuration file as well")


def _ask(path: Path | None, request: Request, timeout_s: float) -> Answer:
    """Ask the daemon; imported late, for a quick `--help`."""
    from streamd.control_client import ask as ask_daemon

    return ask_daemon(path, request, timeout_s)


def _state(answer: Answer) -> DaemonState:
    assert answer.state is not None, "the daemon answers what it was asked"
    return answer.state


def _setting(text: str) -> tuple[str, str | bool | int | float | None]:
    """Read KEY=VALUE as a line of the configuration file would be. Raises ConfigError."""
    import yaml

    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"--set {text}: must read like KEY=VALUE, for example fps=5")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {text}: the value is not YAML") from err
    if not isinstance(read, str | bool | int | float | None):
        raise ConfigError(f"--set {text}: the value must be a text, a number, true, false or null")
    return key, read
