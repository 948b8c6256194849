"""Write what was found: JSON, and the tables of docs/faults.md between their marks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.faults.observe import Observation, Rule, windows_of_rows
from benchmarks.measure import ROOT, Machine

PAGE = ROOT / "docs" / "faults.md"
RESULT = ROOT / "benchmarks" / "results" / "faults.json"
BEGIN, END = "<!-- begin: python -m benchmarks.faults -->", "<!-- end -->"
HEAD = (
    "| # | fault | what was done | frames/s of the others | their p99, ms | back after, s | memory, MiB | descriptors "
    "| threads | tries | result |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def write(found: Sequence[Observation], rule: Rule, machine: Machine) -> None:
    """Put everything into RESULT and the tables into PAGE."""
    rows = [{**asdict(one), "failure": rule.failure(one)} for one in found]
    text = json.dumps({"machine": asdict(machine), "rows": rows}, indent=1)
    RESULT.write_text(text.replace("NaN", "null") + "\n")  # a row that was not run has no p99, and JSON no NaN
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{_tables(found, rule, machine)}\n\n{END}{after}")


def last_tries(found: Sequence[Observation]) -> list[Observation]:
    """Keep of each row what counts, its last try."""
    return sorted({one.number: one for one in found if one.number}.values(), key=lambda one: one.number)


def _tables(found: Sequence[Observation], rule: Rule, machine: Machine) -> str:
    rows = last_tries(found)
    ran = [one for one in rows if not one.absent]
    num_passed = sum(not rule.failure(one) for one in ran)
    quiet_ms, under_ms = (statistics.median(one.p99_ms for one in windows) for windows in windows_of_rows(found))
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    minutes = sum(one.seconds for one in found) / 60
    ratios = sorted(rule.ratio(one) for one in rule.controls)
    return "\n".join(
        (
            f"{machine.cpu}, {machine.cores} cores, Linux {machine.kernel}, Python {machine.python}, {packages}; "
            f"streamd {machine.revision}, {machine.date}.",
            "",
            f"- {num_passed} of {len(ran)} rows pass; {len(rows) - len(ran)} could not be run here. "
            f"{len(found)} runs with {len(rule.controls)} controls, {minutes:.0f} minutes within the rows.",
            f"- Over all runs of rows the median of the others' p99 was {under_ms:.0f} ms, and {quiet_ms:.0f} ms in "
            f"the quiet times before them ({under_ms / quiet_ms - 1:+.0%}).",
            f"- The controls, in which a healthy stream was added, have {ratios[0]:.0%} to {ratios[-1]:.0%} of the p99 "
            "around them: that is this machine's noise.",
            "",
            HEAD,
            *(_line(one, rule, sum(one.number == each.number for each in found)) for one in rows),
        )
    )


def _line(one: Observation, rule: Rule, num_tries: int) -> str:
    if one.absent:
        cells = [str(one.number), one.fault, "", *[""] * 7, f"not run: {one.absent}"]
        return f"| {' | '.join(cells)} |"
    before, after = one.usage_before, one.usage_after
    failure = rule.failure(one)
    cells = [
        str(one.number),
        one.fault,
        one.done,
        f"{one.before.frames_per_s:.1f} -> {one.during.frames_per_s:.1f}",
        f"{rule.reference_ms(one):.0f} -> {one.during.p99_ms:.0f} ({rule.ratio(one) - 1:+.0%})",
        "" if one.outcome.recovered_s is None else f"{one.outcome.recovered_s:.1f}",
        f"{before.memory_mib:.1f} -> {after.memory_mib:.1f}",
        f"{before.descriptors} -> {after.descriptors}",
        f"{before.threads} -> {after.threads}",
        str(num_tries),
        f"**fails**: {failure}" if failure else f"passes{f': {one.outcome.note}' if one.outcome.note else ''}",
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
