"""Many streams, and streams that come and go: rows 39 to 42."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import replace

from benchmarks.faults.bench import PATIENT, WITNESSES, Bench
from benchmarks.faults.observe import watch
from benchmarks.faults.row import Outcome, Row, expect
from streamd.errors import ConfigError
from tests.rtsp_faults import Bitstream, Camera, Delivery
from tests.rtsp_server import CameraServer

NUM_REBOOTING = 16
DOWN_S = 5.0
BACK_WITHIN_S = 15.0
NUM_CYCLES, NUM_CYCLES_BRIEF = 1000, 50
GROWTH_MIB = 8.0  # over all cycles
NUM_STREAMS = 64  # with the witnesses
DEADLINE_MS = 200.0  # max_latency_ms, from arrival to result


def all_reboot(bench: Bench) -> Outcome:
    """16 cameras of 1 frame/s are away for 5 s, with all their connections."""
    slow = Bitstream(speed=0.1)
    with CameraServer({"cam": Camera(bench.clip, bitstream=slow)}) as server, ExitStack() as streams:
        victims = [
            streams.enter_context(bench.stream(server.url("cam"), f"victim{index}")) for index in range(NUM_REBOOTING)
        ]
        for victim in victims:
            victim.delivers(1, since=victim.added_at)
        bench.rest()
        server.refuse()
        down_at = time.time()
        server.hang_up()
        for victim in victims:
            victim.enters("unreachable", since=down_at)
        time.sleep(max(0.0, DOWN_S - (time.time() - down_at)))
        server.accept()
        back_at, back_s = time.time(), time.monotonic()
        recovered_s = max(victim.recovers(back_at, 40.0) for victim in victims)
        connects = sorted(event.at_s - back_s for event in server.events(what="DESCRIBE") if event.at_s > back_s)
    expect(recovered_s <= BACK_WITHIN_S, f"the last one was back after {recovered_s:.1f} s")
    busiest = max(sum(at <= other < at + 0.1 for other in connects) for at in connects)
    expect(busiest <= NUM_REBOOTING // 2, f"{busiest} of {NUM_REBOOTING} came within 0.1 s: a herd")
    return Outcome(recovered_s, f"at most {busiest} of {NUM_REBOOTING} within 0.1 s")


def add_and_remove(bench: Bench, num_cycles: int = NUM_CYCLES) -> Outcome:
    """A stream is added, connects, and is removed, 1,000 times; the witnesses are the load."""
    url = bench.camera(Camera(bench.clip))
    for _ in range(NUM_CYCLES_BRIEF):  # what is allocated once is not counted
        with bench.stream(url):
            pass
    before = bench.usage()
    took_s = []
    for _ in range(num_cycles):
        began = time.monotonic()
        with bench.stream(url):
            pass
        took_s.append(time.monotonic() - began)
    after = bench.usage()
    grown_mib = after.memory_mib - before.memory_mib
    expect(grown_mib < GROWTH_MIB, f"memory grew by {grown_mib:.1f} MiB over {num_cycles} cycles")
    return Outcome(note=f"{grown_mib:+.1f} MiB; median {statistics.median(took_s) * 1e3:.0f} ms a cycle")


def same_url_and_name(bench: Bench) -> Outcome:
    """Two streams of one URL; a name that is taken; a stream that is removed while it waits to reconnect."""
    url = bench.camera(Camera(bench.clip))
    with bench.stream(url, "twin0") as first, bench.stream(url, "twin1") as second:
        first.delivers()
        second.delivers()
        try:
            with bench.stream(url, WITNESSES[0]):
                expect(False, "a name that is taken was accepted")
        except ConfigError as err:
            expect(WITNESSES[0] in str(err), f"the refusal does not name the stream: {err}")
    gone = bench.camera(Camera(bench.clip))
    with CameraServer({"cam": Camera(bench.clip)}) as server, bench.stream(server.url("cam")) as victim:
        victim.delivers(1)
        server.refuse()
        server.hang_up()
        victim.enters("unreachable")
        removed_at = time.monotonic()
    took_s = time.monotonic() - removed_at
    expect(took_s < 3.0, f"to remove it took {took_s:.1f} s")
    with bench.stream(gone) as again:
        again.delivers()
    return Outcome(note=f"a duplicate name is refused; removed while it waited in {took_s:.2f} s")


def one_slow_stream(bench: Bench) -> Outcome:
    """64 streams, 60 of them of 1 frame/s, of which one trickles in at 2 kB/s."""
    calm = Camera(bench.clip, bitstream=Bitstream(speed=0.1))
    names = ["slow", *(f"calm{index}" for index in range(NUM_STREAMS - len(WITNESSES) - 1))]
    with CameraServer(dict.fromkeys(names, calm)) as server, ExitStack() as streams:
        added = [streams.enter_context(bench.stream(server.url(name), name, **PATIENT)) for name in names]
        for one in added:
            one.delivers(1, since=one.added_at, within_s=30.0)
        bench.rest()
        server.set("slow", replace(calm, delivery=Delivery(bytes_per_s=2000)))
        began = time.time()
        time.sleep(8.0)
        seen = watch(bench, began, time.time())
        totals = [heard.message.ms.total for name in WITNESSES for heard in bench.listener.results(name, began)]
    late = sum(total > DEADLINE_MS for total in totals) / len(totals)
    expect(late <= 0.01, f"{late:.1%} of the witnesses' frames took longer than {DEADLINE_MS:g} ms")
    return Outcome(note=f"witnesses {seen.frames_per_s:.1f} frames/s, {late:.1%} later than {DEADLINE_MS:g} ms")


def add_and_remove_briefly(bench: Bench) -> Outcome:
    """A stream is added, connects, and is removed, 50 times."""
    return add_and_remove(bench, NUM_CYCLES_BRIEF)


ROWS = (
    Row(39, "all cameras reboot at once", all_reboot, in_ci=True, in_soak=True),
    Row(40, "1,000 add/remove cycles under load", add_and_remove, brief=add_and_remove_briefly, in_ci=True),
    Row(41, "same URL twice, duplicate name, removal while reconnecting", same_url_and_name, in_ci=True, in_soak=True),
    Row(42, "one slow stream of 64", one_slow_stream),
)
