"""The GPU's check runs its parts with what is there, and says what is not; here on a CPU, with small sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from benchmarks import gpu_check, gpu_kernels, gpu_pipeline
from benchmarks.gpu_check import Machine, Part
from benchmarks.gpu_rows import Row
from streamd.models.spec import ModelSpec

CPU = torch.device("cpu")
MACHINE = Machine(gpu="a GPU, 80 GiB", driver="580", python="3.12", packages={"torch": "2.11"}, revision="abc")


@pytest.mark.parametrize("timed", gpu_kernels.TIMED)
def test_each_kernel_is_compared_before_it_is_timed(timed: gpu_kernels.Timed) -> None:
    rows = list(timed(gpu_kernels.SMALL, CPU))
    assert rows and all(row.value is not None and row.value > 0 for row in rows)


def test_a_kernel_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "torchvision_nms", lambda *candidates: [torch.tensor([1, 0])] * 2)
    with pytest.raises(AssertionError, match="not what torchvision"):
        list(gpu_kernels.time_nms(gpu_kernels.SMALL, CPU))


def test_the_bytes_that_must_move_are_those_of_the_taps() -> None:
    spec = ModelSpec(name="m", task="detect", labels=("a",), input_size=(640, 640), colour="rgb")
    moved = gpu_kernels.bytes_to_move(gpu_kernels.FULL, spec.letterbox(1920, 1080))
    # At a third, luma is read at one row of three, and chroma, at two thirds, at every row.
    assert moved == 32 * (360 * 1920 + 540 * 1920 + 3 * 2 * 640 * 640)


def test_the_pipeline_is_timed_stage_by_stage_and_as_a_whole(tmp_path: Path) -> None:
    rows = {row.what: row for row in gpu_pipeline.time_pipeline(gpu_pipeline.SMALL, "cpu", tmp_path)}
    assert rows["detector: network alone"].value and rows["segmenter: network alone"].value
    assert rows["end to end against the slowest stage alone"].to_reach == 90


def test_a_part_that_crashes_costs_only_its_own_rows() -> None:
    row = json.dumps({"what": "a", "value": 1.0, "unit": "ms", "to_reach": None, "at_least": True, "note": ""})
    crashing = Part("crash", [sys.executable, "-c", f"print('''{row}'''); raise SystemExit('no device')"], 10)
    told, lost = gpu_check.run(crashing, 30)
    assert told == Row("a", 1.0, "ms")
    assert lost.value is None and lost.note == "no device"


def test_a_part_that_hangs_is_ended_and_what_it_said_is_kept() -> None:
    row = json.dumps({"what": "a", "value": 1.0, "unit": "ms", "to_reach": None, "at_least": True, "note": ""})
    program = f"import time; print('''{row}''', flush=True); time.sleep(60)"
    rows = gpu_check.run(Part("hang", [sys.executable, "-c", program], 1), 5)
    assert [row.value for row in rows] == [1.0, None] and "not ready after" in rows[1].note


def test_a_test_run_is_one_row_that_passed_or_not() -> None:
    for code, value in ((0, 1.0), (1, 0.0)):
        (row,) = gpu_check.run(
            Part("tests", [sys.executable, "-c", f"print('said'); raise SystemExit({code})"], 9, prints_rows=False), 30
        )
        assert (row.value, row.note) == (value, "said")


def test_the_table_says_what_was_met_and_what_is_missing() -> None:
    rows = [
        Row("fast", 6.0, "x", 5),
        Row("slow", 200.0, "ms", 100, at_least=False),
        Row("DALI", None, "", note="none"),
    ]
    text = gpu_check.table(MACHINE, rows, "make gpu-check")
    assert "| fast | 6 x | >= 5 x | met |" in text
    assert "| slow | 200 ms | <= 100 ms | NOT MET |" in text
    assert "| DALI | - |  | missing; none |" in text
    assert "a GPU, 80 GiB, driver 580" in text


def test_without_a_gpu_the_check_says_so_and_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "describe", lambda: Machine("none", "none", "3.12", {}, "abc"))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert not ended.value.code
    assert "nvidia-smi finds no GPU" in capsys.readouterr().out
    assert json.loads((tmp_path / "none.json").read_text())["rows"]


def test_a_masks_way_to_the_host_agrees_with_pixels() -> None:
    masks, boxes = gpu_kernels.random_masks(gpu_kernels.SMALL, 0.5, CPU)
    strings = gpu_kernels.paste_as_detectron2(masks[0], boxes[0], *gpu_kernels.SMALL.frame)
    areas = [coco_mask.area({"size": [108, 192], "counts": counts}) for counts in strings]
    assert np.all(np.array(areas) > 100)
