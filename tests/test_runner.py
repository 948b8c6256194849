"""A runner takes frames to detections; while one batch is finished the next is begun, and no more than its slots."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from streamd.errors import ModelError
from streamd.infer import Model
from streamd.messages import Detections, Frame, RawOutput
from streamd.models import artifact
from streamd.models.spec import ModelSpec, NmsRule
from streamd.runner import Runner, assemble
from tests.fakes import in_threads, make_frame

RULE = NmsRule(score_threshold=1e-5)  # an untrained head gives about 1e-4


@pytest.fixture(scope="module")
def model(untrained_artifact: Path) -> Model:
    return Model(untrained_artifact, "cpu")


@pytest.fixture(scope="module")
def frames() -> Sequence[Frame]:
    return [noise(seq) for seq in range(8)]


def noise(seq: int, width: int = 80, height: int = 60) -> Frame:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seq), dtype=torch.uint8)
    frame = make_frame(seq=seq)
    return replace(frame, picture=replace(frame.picture, planes=(pixels,)), width=width, height=height)


def run(runner: Runner, frames: Sequence[Frame]) -> list[Detections]:
    return runner.finish(runner.begin(frames))


def assert_same(found: Detections, expected: Detections) -> None:
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.1)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_a_batch_gives_what_its_frames_give_alone(model: Model, frames: Sequence[Frame]) -> None:
    runner = Runner(model, RULE, max_batch=4)
    together = run(runner, frames[:4])
    for frame, found in zip(frames, together, strict=False):
        assert_same(found, run(runner, [frame])[0])


def test_a_batch_that_is_on_its_way_is_not_touched_by_the_next(model: Model, frames: Sequence[Frame]) -> None:
    alone = [run(Runner(model, RULE, 4), [frame])[0] for frame in frames[:2]]
    runner = Runner(model, RULE, 4, num_slots=2)
    first = runner.begin(frames[:1])
    second = runner.begin(frames[1:2])
    assert first.batch.images.data_ptr() != second.batch.images.data_ptr()
    assert_same(runner.finish(second)[0], alone[1])
    assert_same(runner.finish(first)[0], alone[0])


def test_no_more_batches_are_begun_than_there_are_slots(model: Model, frames: Sequence[Frame]) -> None:
    runner = Runner(model, RULE, 4, num_slots=2)
    running = [runner.begin(frames[:1]), runner.begin(frames[1:2])]
    begun = threading.Event()

    def begin_third() -> None:
        running.append(runner.begin(frames[2:3]))
        begun.set()

    third = threading.Thread(target=begin_third, daemon=True)
    third.start()
    assert not begun.wait(0.2), "there is no third slot"
    runner.finish(running[0])
    assert begun.wait(10)
    third.join()
    assert running[2].batch.images.data_ptr() == running[0].batch.images.data_ptr(), "the first slot, again"


def test_one_thread_begins_and_another_finishes(model: Model, frames: Sequence[Frame]) -> None:
    alone = [run(Runner(model, RULE, 1), [frame])[0] for frame in frames]
    runner = Runner(model, RULE, 1, num_slots=2)
    begun: list[object] = []
    came, found = threading.Semaphore(0), []

    def begin() -> None:
        for frame in frames:
            begun.append(runner.begin([frame]))
            came.release()

    def finish() -> None:
        for index in range(len(frames)):
            assert came.acquire(timeout=10)
            found.extend(runner.finish(begun[index]))  # type: ignore[arg-type]

    in_threads([begin, finish], timeout_s=60)
    for got, expected in zip(found, alone, strict=True):
        assert_same(got, expected)


def test_only_the_wanted_labels_come_out(model: Model, frames: Sequence[Frame]) -> None:
    (everything,) = run(Runner(model, RULE, 1), frames[:1])
    wanted = int(everything.labels[0])
    (found,) = run(Runner(model, RULE, 1, labels=frozenset({wanted})), frames[:1])
    assert set(found.labels) == {wanted}
    assert len(found) == (everything.labels == wanted).sum()


def test_a_batch_that_fails_gives_its_slot_back(model: Model, frames: Sequence[Frame]) -> None:
    class Failing(Model):
        def __init__(self) -> None:
            self.device, self.dtype, self.spec = model.device, model.dtype, model.spec

        def run(self, images: torch.Tensor, sizes: torch.Tensor) -> RawOutput:
            raise ModelError("forward failed")

    runner = Runner(Failing(), RULE, 1)
    for _ in range(3):  # with one slot, a lost one would hang the second
        with pytest.raises(ModelError):
            runner.begin(frames[:1])


def test_frames_are_letterboxed_into_the_first_slots_of_the_memory_that_is_given() -> None:
    spec = ModelSpec(name="m", task="detect", labels=("a",), input_size=(4, 6), colour="rgb")
    images = torch.full((3, 3, 4, 6), -1.0)
    batch = assemble([make_frame("gate"), make_frame("yard")], spec, images)
    assert [frame.stream for frame in batch.frames] == ["gate", "yard"]
    assert batch.images.data_ptr() == images.data_ptr() and batch.images.shape == (2, 3, 4, 6)
    assert [box.scale_x for box in batch.letterboxes] == [4.0, 4.0]
    assert torch.all(images[:2, :, :, :4] == 0), "the black pixel, scaled up"
    assert torch.all(images[:2, :, :, 4:] == 114), "the padding"
    assert torch.all(images[2] == -1), "not asked for"


class Halves(nn.Module):
    """Call the left half of every input the first label and the right half the second."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        left = images[:, :1, ::4, ::4] * 0 + (torch.arange(24) < 12)
        return {"semantic": torch.cat((left, 1 - left), dim=1)}


def test_segments_of_a_semantic_model_come_out_at_the_pictures_size(tmp_path: Path, frames: Sequence[Frame]) -> None:
    spec = ModelSpec(name="halves", task="semantic", labels=("left", "right"), input_size=(72, 96), colour="rgb")
    artifact.export(Halves(), spec, tmp_path / "halves.pt")
    for found in run(Runner(Model(tmp_path / "halves.pt", "cpu"), RULE, max_batch=2), frames[:2]):
        assert found.segments is not None and len(found) == 0
        assert [(segment.label, segment.is_thing, segment.area) for segment in found.segments] == [
            (0, False, 40 * 60),
            (1, False, 40 * 60),
        ]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def gpu_model(untrained_artifact: Path) -> Model:
    return Model(untrained_artifact, "cuda", "fp32")


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_finds_what_the_cpu_finds(model: Model, gpu_model: Model, frames: Sequence[Frame]) -> None:
    runner = Runner(gpu_model, RULE, max_batch=4)
    runner.capture()
    for num_frames in (1, 3, 4):  # 3 runs in the graph of 4
        expected = run(Runner(model, RULE, 4), frames[:num_frames])
        for found, wanted in zip(run(runner, frames[:num_frames]), expected, strict=True):
            assert len(found) == len(wanted)
            np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_nothing_waits_for_the_whole_device_once_the_model_is_warm(gpu_model: Model, frames: Sequence[Frame]) -> None:
    runner = Runner(gpu_model, RULE, max_batch=4)
    runner.capture()
    run(runner, frames[:4])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            run(runner, frames[:4])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_the_network_is_a_graph_at_every_size_of_the_ladder(gpu_model: Model) -> None:
    runner = Runner(gpu_model, RULE, max_batch=6)
    runner.capture()
    assert all(sorted(slot.graphs) == [1, 2, 4, 6] for slot in runner._slots)
