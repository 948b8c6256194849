"""Follow changes of the configuration while the daemon runs: one at a time, each as a whole or not at all."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from streamd.changes import Changes, difference
from streamd.config import Config
from streamd.config_file import load, with_stream, without_stream
from streamd.errors import ConfigError, StreamdError
from streamd.notify import Notifier
from streamd.redact import redact
from streamd.threads import name_thread

logger = logging.getLogger(__name__)

_MAX_WAITING = 16
_THREAD_NAME = "reload"

# What else there is to say; raises StreamdError where the change cannot be made, and then none was made.
Follow = Callable[[Config, Changes], tuple[str, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    work: Callable[[], Changes]
    done: Future[Changes] = field(default_factory=Future)


class Reloader:
    """Carry out what is asked from any thread, in one of its own, since a model takes seconds to load.

    Only the answers' futures tell who asked; the operator's log is told once as well.
    """

    def __init__(
        self,
        config: Config,
        path: Path | None,
        follow: Follow,
        notifier: Notifier,
        on_crash: Callable[[Exception], None],
        replaced: Callable[[Config], Collection[str]] = lambda config: (),
    ) -> None:
        """`path` is the file that `reload` reads; None where the configuration came from elsewhere.

        `replaced` names the models whose path means another file by now.
        """
        self._config = config
        self._path = path
        self._follow = follow
        self._notifier = notifier
        self._on_crash = on_crash
        self._replaced = replaced
        self._lock = threading.Lock()
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._num_waiting = 0
        self._next_reload: _Request | None = None  # asked for and not begun: who asks again shares it
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=_THREAD_NAME, daemon=True)  # a load cannot be stopped

    @property
    def config(self) -> Config:
        """The configuration at work."""
        return self._config

    def start(self) -> None:
        self._thread.start()

    def stop(self, deadline_s: float) -> None:
        """Refuse what waits and wait for what is under way; a model that is still loading is left alone."""
        with self._lock:
            self._is_stopping = True
        self._requests.put(None)
        if self._thread.ident:
            self._thread.join(deadline_s)

    def reload(self) -> Future[Changes]:
        """Read the file again."""
        with self._lock:
            if self._next_reload is None:
                request = self._enqueue(_Request(self._read_file))
                if request.done.done():  # refused
                    return request.done
                self._next_reload = request
            return self._next_reload.done

    def add_stream(self, name: str, settings: Mapping[str, object]) -> Future[Changes]:
        """Add a stream until the file is read again."""
        return self.ask(lambda: self._change_to(with_stream(self._config, name, settings)))

    def remove_stream(self, name: str) -> Future[Changes]:
        """Remove a stream until the file is read again."""
        return self.ask(lambda: self._change_to(without_stream(self._config, name)))

    def ask(self, work: Callable[[], Changes], *, is_urgent: bool = False) -> Future[Changes]:
        """Have a change made in its turn that leaves the configuration as it is; `is_urgent` is never one too many."""
        with self._lock:
            return self._enqueue(_Request(work), is_urgent=is_urgent).done

    def _enqueue(self, request: _Request, *, is_urgent: bool = False) -> _Request:
        if self._is_stopping:
            request.done.set_exception(StreamdError("the daemon is stopping"))
        elif self._num_waiting >= _MAX_WAITING and not is_urgent:
            request.done.set_exception(StreamdError(f"{_MAX_WAITING} changes are waiting already; try again later"))
        else:
            request.done.set_running_or_notify_cancel()  # others may share it: nobody cancels it
            self._num_waiting += 1
            self._requests.put(request)
        return request

    def _read_file(self) -> Changes:
        if self._path is None:
            raise ConfigError("there is nothing to reload: this daemon was not started from a file")
        config = load(self._path)
        return self._change_to(config, self._replaced(config))

    def _change_to(self, config: Config, replaced: Collection[str] = ()) -> Changes:
        changes = difference(self._config, config, replaced)
        changes = replace(changes, notes=self._follow(config, changes))
        self._config = config
        logger.info("reloaded: %s", changes)
        return changes

    def _run(self) -> None:
        name_thread(_THREAD_NAME)
        try:
            while (request := self._requests.get()) is not None:
                with self._lock:
                    self._num_waiting -= 1
                    if request is self._next_reload:
                        self._next_reload = None
                self._carry_out(request)
        except Exception as err:
            logger.exception("%s crashed", _THREAD_NAME)
            self._on_crash(err)

    def _carry_out(self, request: _Request) -> None:
        self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reloading")
        try:
            if self._is_stopping:
                raise StreamdError("the daemon is stopping")
            changes = request.work()
        except StreamdError as err:
            logger.error("the change is refused and everything goes on as it was: %s", err)
            request.done.set_exception(type(err)(redact(str(err))))
        except Exception as err:
            request.done.set_exception(StreamdError(f"a bug: {type(err).__name__}; the daemon stops"))
            raise
        else:
            request.done.set_result(changes)
        finally:
            if not self._is_stopping:  # STOPPING=1 has the last word
                self._notifier.send("READY=1", "STATUS=running")
