"""The benchmark of training gives both sides the same pictures, and each step of both is timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import training


@pytest.mark.slow
def test_quick_case_says_how_fast_both_are_and_their_ratio(tmp_path: Path) -> None:
    rows = list(training.compare(training.QUICK, torch.device("cpu"), tmp_path, 2, ["--quick"]))
    ours, theirs, ratio = rows
    assert ours.value is not None and theirs.value is not None and ratio.value is not None
    assert ours.unit == theirs.unit == "images/s" and "2 steps" in ours.note
    assert ratio.value == pytest.approx(ours.value / theirs.value, rel=1e-6)
    assert ratio.to_reach == training.QUICK.to_reach
