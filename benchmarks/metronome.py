"""Say how late the machine wakes a process that does nothing: the yardstick of everybody else's load.

python -m benchmarks.metronome     prints the p99 of a minute's delays, in ms, each minute
"""

from __future__ import annotations

import time

from benchmarks.measure import percentile

BEAT_S = 0.01
MINUTE_S = 60.0


def main() -> None:
    """Beat until it is killed."""
    while True:
        delays_ms: list[float] = []
        ends_at = time.monotonic() + MINUTE_S
        while (began := time.monotonic()) < ends_at:
            time.sleep(BEAT_S)
            delays_ms.append((time.monotonic() - began - BEAT_S) * 1e3)
        print(f"{percentile(delays_ms, 0.99):.3f}", flush=True)


if __name__ == "__main__":
    main()
