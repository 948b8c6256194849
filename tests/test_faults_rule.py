"""When a row of the catalogue of faults passes: each measure can fail it, and only beyond what the controls show."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

from benchmarks.faults.observe import CONTROL, Observation, Rule, Window, windows_of_rows
from benchmarks.faults.row import Outcome
from benchmarks.measure import ROOT, Usage

QUIET = Window(10.0, 400, 20.0, 10.0, 0.1, True)
RESTING = Usage(380.0, 26, 15)


def observed(number: int, during: Window = QUIET, after: Usage = RESTING, missed: str = "") -> Observation:
    return Observation(number, "fault", "done", 8.0, "", missed, Outcome(), "small", QUIET, during, RESTING, after)


def failure(row: Observation, *controls: Observation) -> str:
    return Rule([*controls, row]).failure(row)


def test_a_row_that_changes_nothing_passes() -> None:
    assert failure(observed(1)) == ""


def test_each_measure_can_fail_a_row() -> None:
    assert failure(observed(1, missed="it did not recover")) == "it did not recover"
    assert "lost a message" in failure(observed(1, replace(QUIET, is_unbroken=False)))
    assert "frame rate fell to 90%" in failure(observed(1, replace(QUIET, num_results=360)))
    assert "p99 rose by 10%" in failure(observed(1, replace(QUIET, p99_ms=22.0)))
    assert "kept 1 descriptors" in failure(observed(1, after=replace(RESTING, descriptors=27)))
    assert "kept 2 threads" in failure(observed(1, after=replace(RESTING, threads=17)))
    assert "kept 20.0 MiB" in failure(observed(1, after=replace(RESTING, memory_mib=400.0)))


def test_a_p99_may_rise_as_much_as_that_of_a_control() -> None:
    noisy = observed(CONTROL.number, replace(QUIET, p99_ms=24.0))
    assert failure(observed(1, replace(QUIET, p99_ms=23.0)), noisy) == ""
    assert "p99 rose by 25%" in failure(observed(1, replace(QUIET, p99_ms=25.0)), noisy)


def test_a_row_is_held_against_the_quiet_times_around_it_and_not_against_one() -> None:
    lucky = replace(observed(1), before=replace(QUIET, p99_ms=5.0))
    found = [observed(2), observed(3), lucky, observed(4), observed(5)]
    assert Rule(found).failure(lucky) == ""


def test_controls_are_no_rows_and_a_machine_that_stood_still_is_no_control() -> None:
    still = replace(observed(CONTROL.number), before=replace(QUIET, num_results=0, p99_ms=float("nan")))
    found = [observed(CONTROL.number), still, observed(1)]
    assert windows_of_rows(found) == ([QUIET], [QUIET])
    assert Rule(found).controls == [found[0]]
    assert failure(observed(1), still) == ""


def test_the_bench_leaves_the_cores_to_what_it_measures() -> None:
    program = "import os, threading; from benchmarks.faults.bench import step_back; stop = threading.Event()\n"
    program += "threading.Thread(target=stop.wait).start(); step_back()\n"
    program += "print({os.sched_getscheduler(int(one)) for one in os.listdir('/proc/self/task')}); stop.set()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str({os.SCHED_IDLE}), done.stderr


def test_a_row_is_held_against_quiet_times_with_the_same_cameras() -> None:
    crowd = [replace(observed(number), load="row 42", before=replace(QUIET, p99_ms=60.0)) for number in (42, 42, 42)]
    assert Rule([*crowd, observed(1)]).reference_ms(observed(1)) == QUIET.p99_ms
    assert "p99 rose by 25%" in failure(replace(crowd[0], during=replace(QUIET, p99_ms=75.0)))
