"""On a CPU the frames of a batch go side by side, and nobody can tell from what comes out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from streamd.cpu_runner import CpuRunner, make_runner
from streamd.errors import ModelError
from streamd.infer import Model
from streamd.messages import Frame, RawOutput
from streamd.runner import Runner
from streamd.side_by_side import SideBySide
from tests.test_runner import RULE, assert_same, noise, run

WITHIN_S = 30.0


@pytest.fixture(scope="module")
def model(untrained_artifact: Path) -> Model:
    return Model(untrained_artifact, "cpu")


@pytest.fixture(scope="module")
def frames() -> Sequence[Frame]:
    return [noise(seq) for seq in range(5)]


class Watched(Model):
    """A model that notes the sizes of its batches and the threads of its operators, and fails where it is told to."""

    def __init__(self, model: Model) -> None:
        self.device, self.dtype, self.spec = model.device, model.dtype, model.spec
        self._run = model.run
        self.calls: list[tuple[int, int]] = []
        self.meet: threading.Barrier | None = None  # where calls wait for each other
        self.failure: Exception | None = None

    def run(self, images: torch.Tensor, sizes: torch.Tensor) -> RawOutput:
        self.calls.append((len(images), torch.get_num_threads()))
        if self.meet:
            self.meet.wait(WITHIN_S)
        if self.failure:
            raise self.failure
        return self._run(images, sizes)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_gives_what_its_frames_give_alone_and_in_their_order(
    model: Model, frames: Sequence[Frame], threads: int
) -> None:
    runner = CpuRunner(model, RULE, 8, threads=threads)
    done = runner.begin(frames)
    runner.wait(done)
    assert [frame.seq for frame in done.frames] == [frame.seq for frame in frames]
    assert runner.num_senseless(done) == 0
    for frame, found in zip(frames, runner.finish(done), strict=True):
        assert_same(found, run(Runner(model, RULE, 1), [frame])[0])


def test_frames_have_threads_of_their_own_and_one_frame_has_them_all(model: Model, frames: Sequence[Frame]) -> None:
    watched = Watched(model)
    runner = CpuRunner(watched, RULE, 8, threads=4)
    watched.meet = threading.Barrier(2)  # both are under way at once, or this ends in an error
    runner.begin(frames[:2])
    assert watched.calls == [(1, 2), (1, 2)]
    watched.calls.clear()
    watched.meet = None
    runner.begin(frames)
    assert watched.calls == [(1, 1)] * 5
    watched.calls.clear()
    own = torch.get_num_threads()
    runner.begin(frames[:1])
    assert watched.calls == [(1, own)], "in the calling thread, which has its number of threads"


def test_one_thread_takes_a_batch_in_one_go(model: Model, frames: Sequence[Frame]) -> None:
    watched = Watched(model)
    CpuRunner(watched, RULE, 8, threads=1).begin(frames)
    assert [size for size, _ in watched.calls] == [5]


def test_a_batch_that_fails_says_why_and_the_next_one_goes_through(model: Model, frames: Sequence[Frame]) -> None:
    watched = Watched(model)
    runner = CpuRunner(watched, RULE, 8, threads=2)
    watched.failure = ModelError("forward failed")
    for _ in range(3):
        with pytest.raises(ModelError, match="forward failed"):
            runner.begin(frames)
    watched.failure = None
    assert len(runner.finish(runner.begin(frames))) == 5


def test_frames_of_which_nothing_but_nan_is_said_are_counted(model: Model, frames: Sequence[Frame]) -> None:
    class Senseless(Watched):
        def run(self, images: torch.Tensor, sizes: torch.Tensor) -> RawOutput:
            raw = super().run(images, sizes)
            return RawOutput(raw.boxes * torch.nan, raw.scores * torch.nan)

    runner = CpuRunner(Senseless(model), RULE, 8, threads=2)
    assert runner.num_senseless(runner.begin(frames)) == 5


def test_throughput_is_measured_as_batches_are_run(model: Model) -> None:
    watched = Watched(model)
    watched._module, watched.path = model._module, model.path
    assert watched.images_per_s(workers=1, threads=2, batch=4) > 0
    assert {size for size, _ in watched.calls} == {1}
    watched.calls.clear()
    assert watched.images_per_s(workers=2, threads=1, batch=4) > 0
    assert {size for size, _ in watched.calls} == {4}


def test_the_device_decides_who_runs_a_model(model: Model) -> None:
    assert isinstance(make_runner(model, RULE, 4), CpuRunner)


def test_what_one_raises_is_raised_when_all_have_ended() -> None:
    ended: list[int] = []

    def see(number: int) -> None:
        if number == 0:
            raise ValueError("zero")
        ended.append(number)

    with pytest.raises(ValueError, match="zero"):
        SideBySide(2).each(see, range(6))
    assert sorted(ended) == [1, 2, 3, 4, 5]
