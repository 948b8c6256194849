"""The control socket: a Unix socket that the daemon's own user and root may talk to."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from streamd.changes import Changes
from streamd.control_messages import Answer, AnswerError, Request, decode_request, encode
from streamd.errors import ConfigError, StreamdError
from streamd.redact import redact
from streamd.threads import name_thread

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 << 10
MAX_CONNECTIONS = 32
READ_TIMEOUT_S = 10.0  # for the next whole line of a client, and for a client to take its answer
_MAX_PATH_BYTES = 107  # of a Unix socket on Linux
# Of the event loop, from an accepted connection to `_connected`: a server that is closed between loses it, still open.
_TURNS_TO_CONNECT = 3
_THREAD_NAME = "control"

Handle = Callable[[Request], Answer | Future[Changes]]  # quick, and raises StreamdError where it refuses


def find_path(wanted: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Say where the socket is: where it is asked for or, for `auto`, in the folder that the system gives for such."""
    if wanted != "auto":
        return Path(wanted)
    if runtime := environment.get("RUNTIME_DIRECTORY"):  # systemd separates several by colons
        return Path(runtime.split(":")[0]) / "control.sock"
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "streamd" / "control.sock"
    return None


class ControlServer:
    """Answer requests in one thread, from `start` to `stop`; whatever a client does, only its connection suffers."""

    def __init__(self, path: Path, handle: Handle, on_crash: Callable[[Exception], None]) -> None:
        self._path = path
        self._handle = handle
        self._on_crash = on_crash
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: asyncio.Event | None = None
        self._running = threading.Event()
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._run, name=_THREAD_NAME)

    def start(self) -> None:
        """Bind and listen. Raises ConfigError where the path cannot be had."""
        self._socket = _listen(self._path)
        self._thread.start()
        self._running.wait()
        logger.info("control socket: %s", self._path)

    def stop(self) -> None:
        """Close the socket and every connection."""
        if self._socket is None:
            return
        if self._loop is not None and self._over is not None:
            with suppress(RuntimeError):  # the loop is closed already: the thread crashed
                self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        name_thread(_THREAD_NAME)
        try:
            asyncio.run(self._serve())
        except Exception as err:
            logger.exception("%s crashed", _THREAD_NAME)
            self._on_crash(err)
        finally:
            self._running.set()

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_unix_server(self._connected, sock=self._socket, limit=MAX_REQUEST_BYTES)
        self._running.set()
        try:
            await self._over.wait()
        finally:
            assert self._socket is not None, "start() has made it"
            self._loop.remove_reader(self._socket)
            for _ in range(_TURNS_TO_CONNECT):
                await asyncio.sleep(0)
            server.close()
            for writer in self._connections:
                writer.transport.abort()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._attend(reader, writer))
        self._connections[writer] = task
        task.add_done_callback(lambda _: self._connections.pop(writer))

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._connections) > MAX_CONNECTIONS:
                await _send(writer, Answer(error=f"{MAX_CONNECTIONS} connections are open already"))
            elif user_of(writer.get_extra_info("socket")) not in (0, os.geteuid()):
                await _send(writer, Answer(error="only the daemon's own user and root may ask", is_final=True))
            else:
                await self._converse(reader, writer)
        except (OSError, TimeoutError):
            pass  # the client is gone, or stuck: its own loss
        except Exception as err:
            logger.exception("%s crashed", _THREAD_NAME)
            self._on_crash(err)
        finally:
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    line = await reader.readline()
            except ValueError:  # asyncio's sign for a line beyond the limit
                await _send(writer, Answer(error=f"a request is longer than {MAX_REQUEST_BYTES >> 10} KiB"))
                return
            if not line.endswith(b"\n"):
                return  # the client hung up, perhaps within a line
            await _send(writer, await self._answer(line))

    async def _answer(self, line: bytes) -> Answer:
        try:
            answer = self._handle(decode_request(line))
            if isinstance(answer, Answer):
                return answer
            changes: asyncio.Future[Changes] = asyncio.wrap_future(answer)
            return Answer(done=redact(str(await changes)))
        except AnswerError as err:
            return Answer(error=f"not a request: {err}")
        except StreamdError as err:
            # Without a kind of its own an error is of the moment: models are still loading, the daemon is stopping.
            return Answer(error=redact(str(err)), is_final=type(err) is not StreamdError)


async def _send(writer: asyncio.StreamWriter, answer: Answer) -> None:
    writer.write(encode(answer))
    async with asyncio.timeout(READ_TIMEOUT_S):
        await writer.drain()
        while writer.transport.get_write_buffer_size():  # or closing would lose it
            await asyncio.sleep(0.01)


def user_of(connection: socket.socket) -> int:
    """Ask the kernel whose process is at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return int(user)


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise ConfigError(f"control socket {path}: longer than {_MAX_PATH_BYTES} bytes, which is all that Linux allows")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _remove_stale(path)
        listener.bind(str(path))
        path.chmod(0o600)  # before `listen`: until then every connection is refused
        listener.listen(MAX_CONNECTIONS)
    except OSError as err:
        listener.close()
        raise ConfigError(f"control socket {path}: {err.strerror or err}; choose another path") from err
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that was killed; never that of one that lives, nor what is no socket."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"control socket {path}: there is a file that is no socket; choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
        raise ConfigError(f"control socket {path}: another daemon answers there; choose another path")
