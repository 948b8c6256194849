"""The command of this package; see its docstring."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.faults import page
from benchmarks.faults.bench import running_bench, step_back
from benchmarks.faults.catalogue import ROWS
from benchmarks.faults.observe import Observation, Plan, Rule, observe_all
from benchmarks.faults.row import Row
from benchmarks.measure import ROOT, describe_machine

PACKAGES = ("torch", "av", "pyzmq", "redis", "msgspec")

QUICK = Plan(control_every=1000, quiet_s=1.0, num_tries=1)

console = Console()


def say(text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def show(found: Observation) -> None:
    """Say what a row found, as far as it is known before all controls are."""
    recovered = "" if found.outcome.recovered_s is None else f", back after {found.outcome.recovered_s:.1f} s"
    say(f"{found.number:2} {found.fault}: {found.seconds:.0f} s{recovered}")
    say(f"   {found.absent or found.missed or found.outcome.note}", "red" if found.missed else None)
    say(
        f"   witnesses {found.before.frames_per_s:.1f} -> {found.during.frames_per_s:.1f} frames/s,"
        f" p99 {found.before.p99_ms:.0f} -> {found.during.p99_ms:.0f} ms,"
        f" silent {found.during.longest_silence_s:.2f} s{'' if found.during.is_unbroken else ', BROKEN'};"
        f" {found.usage_before} -> {found.usage_after} {found.leaks()}"
    )


def chosen(numbers: str) -> list[Row]:
    """Pick rows by a list like 1,10-12; all of them where it is empty."""
    wanted: set[int] = set()
    for part in filter(None, numbers.split(",")):
        first, _, last = part.partition("-")
        wanted |= set(range(int(first), int(last or first) + 1))
    return [row for row in ROWS if not wanted or row.number in wanted]


def main(
    rows: Annotated[str, typer.Option(help="Some rows only, such as 1,10-12.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="One try, short quiet times: to see what a row finds.")
    ] = False,
) -> None:
    """Run the catalogue of faults against a daemon."""
    machine = describe_machine(sys.argv[1:], "benchmarks.faults", PACKAGES)  # before the page makes the checkout dirty
    with running_bench() as bench:
        step_back()
        for found in observe_all(bench, chosen(rows), QUICK if quick else Plan(), show):
            rule = Rule(found)
            if not rows:
                page.write(found, rule, machine)
                say(f"written: {page.PAGE.relative_to(ROOT)}, {page.RESULT.relative_to(ROOT)}")
    say(f"controls: p99 {', '.join(f'{rule.ratio(one):.0%}' for one in rule.controls)}")
    failures = {one.number: rule.failure(one) for one in page.last_tries(found) if not one.absent}
    for number, failure in failures.items():
        if failure:
            say(f"row {number} fails: {failure}", "red")
    raise typer.Exit(1 if any(failures.values()) else 0)


if __name__ == "__main__":
    typer.run(main)
