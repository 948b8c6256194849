"""The process and its host: rows 51 to 54."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RLIMIT_NOFILE, prlimit

import redis
import yaml

from benchmarks.faults.bench import CLIP, FPS, WITNESSES, Bench
from benchmarks.faults.hang import find_thread, hung
from benchmarks.faults.listener import Listener
from benchmarks.faults.row import Missed, Outcome, Row, expect, wait_until
from benchmarks.faults.second import moved, second_config, second_daemon
from streamd import wire
from streamd.control_messages import ReloadRequest
from streamd.errors import ConfigError
from tests.redis_server import RedisServer
from tests.rtsp_faults import Camera

BACK_WITHIN_S = 20.0
STOP_S = 20.0
FEW = 8  # descriptors: each number below it is taken from the start on
WATCHDOG_WITHIN_S = 60.0  # the daemon calls a batch of more than 30 s a hang, and looks every 5 s


def bad_reload(bench: Bench) -> Outcome:
    """The file has an unknown key in one stream and a new stream; then it is right again."""
    config_path, right = bench.daemon.config_path, bench.daemon.config_path.read_text()
    wrong = yaml.safe_load(right)
    wrong["streams"][WITNESSES[1]]["fsp"] = 5
    wrong["streams"]["fresh"] = {"url": bench.camera(Camera(bench.clip))}
    config_path.write_text(yaml.safe_dump(wrong))
    line = next(number for number, text in enumerate(config_path.read_text().splitlines(), 1) if "fsp" in text)
    try:
        bench.ask(ReloadRequest())
    except ConfigError as err:
        told = str(err)
    else:
        raise Missed("the reload was accepted")
    finally:
        config_path.write_text(right)
    expect("fsp" in told and f"line {line}" in told, f"the refusal does not name key and line: {told}")
    expect("fresh" not in bench.metrics_text(), "a part of the refused file is at work")
    bench.ask(ReloadRequest())
    return Outcome(note="refused whole; key and line are named")


def signals(bench: Bench) -> Outcome:
    """200 SIGHUPs; then a second daemon with a spool is killed (SIGKILL), started again, and ended (SIGTERM)."""
    offset = bench.log_size()
    for _ in range(200):
        os.kill(bench.daemon.pid, signal.SIGHUP)
    bench.ask(ReloadRequest())
    reloads = bench.log_since(offset).count("reloaded: ")
    expect(1 <= reloads <= 10, f"{reloads} reloads for 200 signals")

    with redis_away(bench) as (url, start_redis):
        streams = {"kept": {"url": str(CLIP), "loop": True, "delivery": "stored"}}
        config = second_config(bench, streams, url)
        with second_daemon(bench, config) as daemon:
            with Listener(config["publish"]["zeromq"]["bind"]) as listener:
                listener.wait_for(lambda message: message.stream == "kept", time.time(), 30.0)
                time.sleep(2.0)
            daemon.stop(signal.SIGKILL)
        accepted = _spooled(Path(config["publish"]["spool"]["path"]))
        expect(accepted > FPS, f"only {accepted} entries were accepted before the kill")
        client = start_redis()
        with client, second_daemon(bench, moved(config)) as daemon:
            began = time.monotonic()
            key = wire.stream_key("kept")
            wait_until(lambda: client.xlen(key) >= accepted, BACK_WITHIN_S, "what was accepted does not arrive")
            recovered_s = time.monotonic() - began
            told = time.monotonic()
            code = daemon.stop()
            drained_s = time.monotonic() - told
    expect(code == 0, f"it ended with {code} after SIGTERM")
    return Outcome(recovered_s, f"{reloads} reloads; {accepted} entries outlived SIGKILL; drained in {drained_s:.1f} s")


def hung_inference(bench: Bench) -> Outcome:
    """The inference thread of a second daemon is stopped where it stands; the bench acts as systemd would."""
    config = second_config(bench, {"cam": {"url": str(CLIP), "loop": True, "pace": "fast"}})  # always a batch in hand
    with second_daemon(bench, config) as daemon, Listener(config["publish"]["zeromq"]["bind"]) as listener:
        expect(listener.wait_for(_is_result, time.time(), 30.0), "it publishes nothing")
        wait_until(lambda: daemon.watchdog_at > 0, BACK_WITHIN_S, "WATCHDOG=1 is never sent")
        with hung(find_thread(daemon.pid, "infer")):
            hung_s = time.monotonic()
            silent_s = 0.0
            while silent_s < 12.0:  # two rounds of the main loop and more
                expect(time.monotonic() - hung_s < WATCHDOG_WITHIN_S, "WATCHDOG=1 is still sent")
                time.sleep(0.5)
                silent_s = time.monotonic() - daemon.watchdog_at
            noticed_s = daemon.watchdog_at - hung_s
            os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait(STOP_S)
    with second_daemon(bench, moved(config)) as daemon:
        code = daemon.stop()
    expect(code == 0, f"the next one ended with {code}")
    return Outcome(note=f"the last WATCHDOG=1 came {noticed_s:.0f} s after the hang; the restart works")


def no_descriptors(bench: Bench) -> Outcome:
    """The limit of descriptors falls far below what is open, and a stream has to reconnect; then it is set back."""
    with bench.stream(bench.camera(Camera(bench.clip))) as victim:
        victim.delivers()
        soft, hard = prlimit(bench.daemon.pid, RLIMIT_NOFILE)
        prlimit(bench.daemon.pid, RLIMIT_NOFILE, (FEW, hard))
        try:
            failed_at = time.time()
            bench.cameras.hang_up("cam")
            victim.fails()
            time.sleep(2.0)
            reasons = {status.reason for status in victim.statuses(failed_at) if status.retry_in_s is not None}
        finally:
            prlimit(bench.daemon.pid, RLIMIT_NOFILE, (soft, hard))
        recovered_s = victim.recovers(time.time(), 35.0)
        clear = [reason for reason in reasons if "files can be opened" in reason]
        expect(clear, f"no reason says that descriptors are used up: {reasons}")
    return Outcome(recovered_s, clear[0])


@contextmanager
def redis_away(bench: Bench) -> Iterator[tuple[str, Callable[[], redis.Redis]]]:
    """Give the URL of a server that is not there, and a call that starts it and connects."""
    server = RedisServer()
    try:

        def start() -> redis.Redis:
            server.start()
            return server.client()

        yield server.url, start
    finally:
        server.stop()


def _spooled(path: Path) -> int:
    with sqlite3.connect(path) as database:
        (count,) = database.execute("SELECT count(*) FROM entries").fetchone()
    return int(count)


def _is_result(message: wire.Message) -> bool:
    return isinstance(message, wire.DetectionsMessage)


ROWS = (
    Row(51, "bad configuration on reload", bad_reload, in_ci=True, in_soak=True, stand_in=None),
    Row(52, "SIGHUP storm; SIGTERM; SIGKILL", signals, stand_in=None),
    Row(53, "inference thread hangs", hung_inference, stand_in=None),
    Row(54, "descriptor limit reached", no_descriptors, in_ci=True, in_soak=True),
)
