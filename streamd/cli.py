"""The command line. Imports of what is heavy stand inside the commands, so that `--help` is quick."""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from streamd import __version__, control_commands
from streamd.allocator import keep_freed_memory, take_huge_pages
from streamd.errors import ConfigError, ModelError, PublishError, StreamdError
from streamd.eval_command import evaluate
from streamd.hard_end import end_within
from streamd.import_commands import import_app, read_labels
from streamd.key_commands import keys_app
from streamd.service_commands import service_app
from streamd.train_commands import data_app, train

EXIT_CODES = """
Exit codes: 0 all went well, 1 something failed while running (systemd restarts the daemon), 2 wrong usage,
69 a publisher could not be set up (a port is taken), 78 the configuration or a model file is wrong (systemd does not
restart), 130 interrupted.
"""

_LEAVE_S = 10.0

app = typer.Typer(
    name="streamd",
    help="Cameras in, detections and masks out, on ZeroMQ and Redis." + "\n\n" + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="About configuration files.", no_args_is_help=True, rich_markup_mode=None)

ConfigPath = Annotated[Path, typer.Argument(help="The YAML file.", metavar="CONFIG")]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="How much is logged to stderr.")]


_SERVER_KEY, _SECRET_KEY = "STREAMD_SERVER_KEY", "STREAMD_SECRET_KEY"  # environment variables


def main() -> None:
    """Run a command and translate errors into exit codes; the message is one plain line or list, never a trace."""
    keep_freed_memory()
    take_huge_pages()
    try:
        app(prog_name="streamd")
    except StreamdError as err:
        from streamd.redact import redact

        print(f"streamd: {redact(str(err))}", file=sys.stderr)
        raise SystemExit(exit_code_of(err)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `streamd watch --json | head` is over
        sys.stderr.close()
        raise SystemExit(0) from None
    except Exception:  # a bug: its trace may quote a password, as libraries quote their arguments
        import traceback

        from streamd.redact import redact

        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        raise SystemExit(1) from None


def exit_code_of(err: StreamdError) -> int:
    """Map an error to the documented exit code."""
    if isinstance(err, ConfigError | ModelError):
        return 78
    return 69 if isinstance(err, PublishError) else 1


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"streamd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def run(config: ConfigPath, log_level: LogLevel = "info") -> None:
    """Run the daemon until SIGTERM or SIGINT.

    Example: streamd run /etc/streamd/streamd.yaml
    """
    from streamd import logs
    from streamd.config_file import load

    logs.set_up(log_level)
    if not faulthandler.is_enabled():  # where every thread was when a watchdog, or a library's fault, ends the process
        faulthandler.enable()
    tree = load(config)
    gc.disable()  # what modules make stays: looking for garbage in it takes 0.4 s of the start
    from streamd.daemon import Daemon

    gc.freeze()  # nor is it looked through later, while frames wait
    gc.enable()
    exit_code = Daemon(tree, path=config).run()
    end_within(_LEAVE_S)  # the interpreter waits for nobody at its end, but a lost GPU's driver may
    raise SystemExit(exit_code)


@app.command()
def check(
    config: ConfigPath,
    up_to: Annotated[
        Literal["config", "models", "streams"],
        typer.Option(help="How far: read the file; load its models too; connect its streams as well."),
    ] = "streams",
    log_level: LogLevel = "warning",
) -> None:
    """Do what `run` does, up to the first frame of each stream: one line for each model and stream.

    Exits with 78 if the file or a model is wrong, and with 1 if a stream gives no frame.

    Example: streamd check cameras.yaml --up-to models
    """
    from streamd import logs
    from streamd.config_file import load

    logs.set_up(log_level)
    tree = load(config)
    if up_to == "config":
        print(f"ok    {config}: {len(tree.models)} model(s), {len(tree.streams)} stream(s)")
        return
    from streamd.check import check as check_config

    raise SystemExit(check_config(tree, Console(), connect=up_to == "streams"))


@app.command()
def watch(
    stream: Annotated[str | None, typer.Option(help="Only this stream.")] = None,
    zmq: Annotated[str | None, typer.Option(help="ZeroMQ address [default: tcp://127.0.0.1:5555]")] = None,
    redis: Annotated[str | None, typer.Option(help="Redis URL instead of ZeroMQ.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print each message as a line of JSON.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Stop after so long.")] = None,
    server_key: Annotated[
        Path | None,
        typer.Option(help="For ZeroMQ with keys: the file of the daemon's public one.", envvar=_SERVER_KEY),
    ] = None,
    secret_key: Annotated[
        Path | None, typer.Option(help="A file, too: the own secret key.", envvar=_SECRET_KEY)
    ] = None,
) -> None:
    """Subscribe to a running daemon and show what it publishes.

    Example: streamd watch --stream gate --redis redis://localhost:6379
    """
    if zmq and redis:
        raise typer.BadParameter("give --zmq or --redis, not both")
    if (server_key is None) != (secret_key is None):
        raise typer.BadParameter("give --server-key and --secret-key together")
    from streamd.curve import ClientKeys
    from streamd.watch import watch as watch_url

    keys = ClientKeys.read(server_key, secret_key) if server_key and secret_key and not redis else None
    watch_url(redis or zmq or "tcp://127.0.0.1:5555", stream, json_lines, Console(), seconds, keys)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="An artifact (.pt), a checkpoint (.pth) or a known name.")],
    files: Annotated[list[Path], typer.Argument(help="Pictures, videos, or folders of them.")],
    json_lines: Annotated[bool, typer.Option("--json", help="Print the wire messages as lines of JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write annotated pictures and videos here.")] = None,
    score_threshold: Annotated[float | None, typer.Option(min=0, max=1, help="Instead of the model's own.")] = None,
) -> None:
    """Run a model on pictures and videos, through exactly the daemon's path.

    Example: streamd predict yolox_s holiday.jpg street.mp4 --out annotated
    """
    from streamd import logs

    logs.set_up("error")
    from streamd.predict import predict as predict_files

    raise SystemExit(
        predict_files(model, files, json_lines=json_lines, out=out, score_threshold=score_threshold, console=Console())
    )


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="An artifact, a checkpoint or a known name.")] = "streamd-person",
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 30,
    out: Annotated[Path, typer.Option(help="Where the annotated video and the contact sheet go.")] = Path("demo-out"),
) -> None:
    """Run the daemon on a clip as if it were cameras, with a live table, and leave a video and a contact sheet.

    Example: streamd demo yolox_s --seconds 10
    """
    from streamd import logs

    logs.set_up("warning")
    from streamd.demo import demo as run_demo

    raise SystemExit(run_demo(model, seconds=seconds, out=out, console=Console()))


@app.command()
def export(
    variant: Annotated[str, typer.Argument(help="One of those above, for example yolox_s.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The artifact to write.")],
    weights: Annotated[Path | None, typer.Option(help="A checkpoint; the official weights by default.")] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file, one label a line; COCO's by default.")] = None,
    prototypes: Annotated[int, typer.Option(min=0, help="Mask prototypes of the checkpoint; 0 for boxes only.")] = 0,
) -> None:
    """Turn a checkpoint into a TorchScript artifact that the daemon runs.

    Variants: yolox_nano, yolox_tiny, yolox_s, yolox_m, yolox_l, yolox_x.

    Example: streamd export yolox_s --weights yolox_s.pth -o gate.pt
    """
    from streamd.models.weights import export_checkpoint, find

    names = read_labels(labels)
    spec = export_checkpoint(variant, weights or find(variant), out, labels=names, num_prototypes=prototypes)
    print(
        f"{out}: {spec.name}, {spec.task}, {len(spec.labels)} labels, input {spec.input_size[1]}x{spec.input_size[0]}"
    )


@app.command()
def models() -> None:
    """List the models that can be had by name, and those on this machine.

    Example: streamd models
    """
    from streamd.known_models import show

    show(Console())


@app.command()
def doctor(
    json_lines: Annotated[bool, typer.Option("--json", help="Print the findings as lines of JSON.")] = False,
) -> None:
    """Say what this machine can do, what is missing, and how to get it.

    Example: streamd doctor
    """
    from streamd.doctor import doctor as examine

    raise SystemExit(examine(Console(), json_lines=json_lines))


@config_app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors.

    Example: streamd config schema > streamd.schema.json
    """
    from streamd.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


control_commands.register(app)  # `--help` lists commands in this order
app.command()(train)
app.command("eval")(evaluate)
app.add_typer(service_app, name="service")
app.add_typer(keys_app, name="keys")
app.add_typer(config_app, name="config")
app.add_typer(import_app, name="import")
app.add_typer(data_app, name="data")


if __name__ == "__main__":
    main()
