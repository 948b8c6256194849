"""The zoo's benchmark gives both sides the same work, and says all that it promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, zoo
from benchmarks.gpu_rows import Row
from benchmarks.measure import describe_machine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[zoo.Ours, zoo.Theirs]:
    """Give both sides of the quick case."""
    folder, pictures = tmp_path_factory.mktemp("zoo"), zoo.make_pictures(zoo.QUICK)
    threshold = zoo.write_models(zoo.QUICK, folder)
    theirs = zoo.read_theirs(zoo.QUICK, folder, threshold)
    return zoo.Ours(folder / "ours.pt", pictures, CPU), zoo.Theirs(theirs, pictures, CPU)


def test_both_sides_keep_the_same_number_of_objects_and_about_as_many_as_asked_for(
    both: tuple[zoo.Ours, zoo.Theirs],
) -> None:
    ours, theirs = both
    counts = theirs.run(zoo.QUICK.batch)
    assert ours.run(zoo.QUICK.batch) == counts == theirs.run(0)
    assert all(1 <= count <= zoo.QUICK.num_objects * 3 for count in counts)
    assert ours.run(1) == counts[:1]


def test_each_repetition_of_each_side_is_timed(both: tuple[zoo.Ours, zoo.Theirs]) -> None:
    times = zoo.measure(zoo.QUICK, *both)
    for seconds in (times.ours_one, times.theirs_one, times.ours_batch, times.theirs_batch):
        assert len(seconds) == zoo.QUICK.repeats and min(seconds) > 0


def test_the_rows_hold_an_image_of_ours_against_an_image_of_theirs() -> None:
    times = zoo.Times(ours_one=[0.1], theirs_one=[0.2], ours_batch=[0.1, 0.3, 0.2], theirs_batch=[0.4])
    rows = {row.what.partition("fp32: ")[2]: row for row in zoo.time_rows("fp32", zoo.QUICK, times, CPU, "as many")}
    assert rows["an image of batch 2, ours"].value == pytest.approx(100)
    assert rows["batch 1 against torchvision's one call"].value == pytest.approx(2)
    against = rows["batch 2 against torchvision's 2 calls"]
    assert against.value == pytest.approx(2) and against.to_reach == 1.3
    assert rows["threads"].note == "as many"


def test_a_report_names_the_machine_and_every_row(tmp_path: Path) -> None:
    machine = describe_machine(["--quick"], "benchmarks.zoo", zoo.PACKAGES)
    rows = [Row("fast", 1.5, "x", 1.3, note="seen once"), Row("memory", 900.0, "MiB")]
    zoo.write(tmp_path / "here", machine, rows, CPU)
    text = (tmp_path / "here.md").read_text()
    assert text.startswith("# python -m benchmarks.zoo --quick\n") and machine.cpu in text
    assert "| fast | 1.5 x | >= 1.3 x | met; seen once |" in text and "| memory | 900 MiB |  |  |" in text
    assert [row["what"] for row in json.loads((tmp_path / "here.json").read_text())["rows"]] == ["fast", "memory"]


@pytest.mark.slow
def test_the_quick_benchmark_runs_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["zoo", "--quick", "--out", str(tmp_path / "quick")])
    zoo.main()
    rows = [Row(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 10 and all(row.value is not None and row.value > 0 for row in rows)
    assert (tmp_path / "quick.json").exists() and (tmp_path / "quick.md").exists()


def test_the_check_of_a_gpu_takes_the_zoo_along() -> None:
    assert any("benchmarks.zoo" in part.command for part in gpu_check.parts())
