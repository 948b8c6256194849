"""`streamd keys`: make the keys of ZeroMQ's CURVE."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from streamd import curve
from streamd.errors import OutputError
from streamd.replacing import replacing

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

keys_app = typer.Typer(
    help="Keys for ZeroMQ: who may subscribe, from everywhere, with all that is published encrypted (CURVE).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Out = Annotated[Path, typer.Option("--out", help="The folder of the keys; the daemon's configuration names it.")]
Force = Annotated[bool, typer.Option("--force", help="Replace keys that are there: who has the old ones is shut out.")]


@keys_app.command()
def server(out: Out = Path("keys"), force: Force = False) -> None:
    """Make the daemon's pair of keys.

    Example: streamd keys server --out /etc/streamd/keys
    """
    secret, public = out / f"server{curve.SECRET_SUFFIX}", out / f"server{curve.PUBLIC_SUFFIX}"
    make_pair(secret, public, force)
    clients = out / "clients"
    clients.mkdir(exist_ok=True)
    print(f"{secret}  the daemon's own: it stays here, readable by the daemon's user alone")
    print(f"{public}  not secret: every client needs it")
    print("In the daemon's configuration, then restart it:")
    print(f'  publish: {{zeromq: {{bind: "tcp://*:5555", curve: {{secret_key: "${{file:{secret.absolute()}}}",')
    print(f"    clients: {clients.absolute()}}}}}}}")
    print(f"Next: streamd keys client NAME --out {out}")


@keys_app.command()
def client(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Of your choice, for the daemon's log.")],
    out: Out = Path("keys"),
    force: Force = False,
) -> None:
    """Make a pair of keys for each client.

    Example: streamd keys client dashboard recorder --out /etc/streamd/keys
    """
    for name in names:
        if not _NAME.fullmatch(name) or name == "server":
            raise typer.BadParameter(
                f"'{name}': a name holds 1 to 64 letters, digits, '_', '.' and '-', begins with a letter or digit, "
                "and is not 'server'"
            )
    for name in names:
        secret, public = out / f"{name}{curve.SECRET_SUFFIX}", out / "clients" / f"{name}{curve.PUBLIC_SUFFIX}"
        make_pair(secret, public, force)
        print(f"{secret}  for the client alone: move it there, with {out / f'server{curve.PUBLIC_SUFFIX}'}")
        print(f"{public}  stays with the daemon; `streamd reload` lets the client in, and out when it is deleted")
    print(f"The client: streamd watch --zmq tcp://HOST:5555 --server-key server.public --secret-key {names[0]}.secret")


def make_pair(secret_file: Path, public_file: Path, force: bool) -> None:
    """Write a new pair. Raises OutputError where one is there and `force` is not given."""
    import zmq

    public, secret = (key.decode() for key in zmq.curve_keypair())
    files = (secret_file, public_file)
    try:
        if there := [file for file in files if not force and file.exists()]:
            raise OutputError(f"{there[0]} is there already; --force replaces it, and shuts out who has the old key")
        for file, key, mode in ((secret_file, secret, 0o600), (public_file, public, 0o644)):
            with replacing(file, mode) as new:
                new.write_text(f"{key}\n")
    except OSError as err:
        raise OutputError(f"cannot write {err.filename}: {err.strerror}") from err
