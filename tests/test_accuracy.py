"""Accuracy on real input, through the published messages: nothing but the wire is looked at."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console

from streamd.predict import predict

EVERY = 20  # frames


def load_ground_truth(path: Path) -> dict[int, np.ndarray]:
    """Read MOT rows (frame from 1, id, left, top, width, height, ...) as boxes x1 y1 x2 y2 by frame."""
    boxes = defaultdict(list)
    for row in path.read_text().split():
        frame, _, left, top, width, height = (float(value) for value in row.split(",")[:6])
        boxes[int(frame)].append((left, top, left + width, top + height))
    return {frame: np.array(rows) for frame, rows in boxes.items()}


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the overlaps [len(a), len(b)]."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = (bottom_right - top_left).clip(min=0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return inside / (area_a[:, None] + area_b[None] - inside)


def average_precision_50(detections: list[tuple[int, float, list[float]]], truth: dict[int, np.ndarray]) -> float:
    """Integrate precision over recall at IoU 0.5: each detection, by falling score, takes the best box left."""
    taken = {frame: np.zeros(len(boxes), bool) for frame, boxes in truth.items()}
    hits = []
    for frame, _, box in sorted(detections, key=lambda detection: -detection[1]):
        overlaps = np.where(taken[frame], 0, iou(np.array([box]), truth[frame])[0])
        best = int(overlaps.argmax())
        hits.append(overlaps[best] >= 0.5)
        taken[frame][best] |= hits[-1]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    recall = np.cumsum(hits) / sum(len(boxes) for boxes in truth.values())
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def test_persons_in_the_reference_video_are_found_with_an_ap50_of_090(shared: Path, nano_artifact: Path) -> None:
    output = io.StringIO()
    code = predict(
        str(nano_artifact),
        [shared / "videos/vtest.avi"],
        json_lines=True,
        out=None,
        score_threshold=0.01,
        console=Console(file=output),
    )
    assert code == 0
    messages = [json.loads(line) for line in output.getvalue().splitlines()]
    assert [message["seq"] for message in messages] == list(range(795))
    truth = load_ground_truth(shared / "data/pets09_s2l1/gt.txt")
    sampled = {frame: truth[frame] for frame in range(1, 796, EVERY) if frame in truth}
    detections = [
        (message["seq"] + 1, found["score"], found["box"])
        for message in messages
        if message["seq"] + 1 in sampled
        for found in message["objects"]
        if found["label"] == "person"
    ]
    ap50 = average_precision_50(detections, sampled)
    print(f"AP50 of persons, every {EVERY}th frame: {ap50:.3f}")
    assert ap50 >= 0.90
