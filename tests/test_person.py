"""The benchmark on people takes its figures from the evaluation, and says which it could not measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from benchmarks.person import Row, batches, markdown, rows_of
from streamd.evaluation.evaluate import EagerModel, evaluate
from tests.fakes import make_frames
from tests.train_data import ColourSegmenter, make_shapes, segmenter_spec


def test_the_figures_are_those_of_the_label_person(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(segmenter_spec(), labels=("square", "person"))
    shapes = replace(make_shapes(tmp_path, num_pictures=4), labels=("square", "person"))
    scores = evaluate(EagerModel(ColourSegmenter(), spec, torch.device("cpu")), shapes).scores
    assert scores.boxes is not None and scores.masks is not None
    rows = list(rows_of(scores))
    values = [row.value for row in rows]
    boxes, masks = scores.boxes.per_class["person"], scores.masks.per_class["person"]
    assert values == [boxes.ap50, boxes.ap, masks.ap50, masks.ap]
    assert boxes != scores.boxes.per_class["square"]
    text = markdown("person.pt", scores, rows)
    assert "`python -m benchmarks.person person.pt`" in text
    assert f"| persons/val boxes AP50 | {100 * (boxes.ap50 or 0):.1f} | 60.0 | 4 |" in text
    without = list(rows_of(msgspec.structs.replace(scores, masks=None)))
    assert without[-1] == Row("persons/val masks AP50", None, 0.45, 0)
    assert without[-1].cells == ("persons/val masks AP50", "-", "45.0", "0")


@pytest.mark.parametrize("count", [0, 4, 5])
def test_frames_come_in_batches_and_none_is_lost(count: int) -> None:
    frames = make_frames(count)
    grouped = list(batches(iter(frames), 4))
    assert [frame for batch in grouped for frame in batch] == frames
    assert all(1 <= len(batch) <= 4 for batch in grouped)
