"""Chunks of many streams are decoded together; a bad one spoils no other, and the end leaves nobody waiting."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from streamd.decode import dali_service
from streamd.decode.dali_service import DaliRunner, DaliService, Decoded
from streamd.decode.gop import GopError, GopSplitter
from streamd.decode.remux import Remuxer
from tests.clips import drawing, write_clip
from tests.decoding import need_dali, packets_of

WITHIN_S = 10
BAD = b"bad"


class FakeRunner:
    """Decode a sample of n bytes to n frames of one pixel; fail where one is bad; may be held at a gate."""

    max_batch = 4

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def decode(self, samples: Sequence[bytes]) -> list[torch.Tensor]:
        self.entered.release()
        assert self.gate.wait(WITHIN_S)
        self.batches.append(list(samples))
        if BAD in samples:
            raise RuntimeError("Critical error in pipeline:\nencountered:\n\nthe sample is bad\nCurrent pipeline ...")
        return [torch.full((len(sample), 1, 1, 3), sample[0], dtype=torch.uint8) for sample in samples]


class BrokenRunner(FakeRunner):
    def decode(self, samples: Sequence[bytes]) -> list[torch.Tensor]:
        raise ZeroDivisionError("a bug")


@contextmanager
def service_with(runner: FakeRunner, max_wait_s: float = 0.05) -> Iterator[DaliService]:
    with closing(DaliService("dali test", runner, max_wait_s)) as service:
        yield service


def first_value(future: Future[Decoded]) -> int:
    return int(future.result(WITHIN_S).frames[0, 0, 0, 0])


@contextmanager
def held(runner: FakeRunner, service: DaliService) -> Iterator[Future[Decoded]]:
    """Hold the service at a first chunk, so that what is submitted meanwhile waits."""
    runner.gate.clear()
    first = service.submit(b"\0", 1)
    assert runner.entered.acquire(timeout=WITHIN_S)
    yield first
    runner.gate.set()


def test_chunks_that_wait_are_decoded_together_and_each_gets_its_own_frames() -> None:
    runner = FakeRunner()
    with service_with(runner) as service:
        with held(runner, service):
            futures = [service.submit(bytes([number] * number), number) for number in (1, 2, 3)]
        assert [first_value(future) for future in futures] == [1, 2, 3]
        assert [len(future.result().frames) for future in futures] == [1, 2, 3]
    assert [len(batch) for batch in runner.batches] == [1, 3]


def test_a_chunk_waits_for_others_only_so_long() -> None:
    runner = FakeRunner()
    with service_with(runner, max_wait_s=0.001) as service:
        assert first_value(service.submit(b"\7", 1)) == 7
    assert runner.batches == [[b"\7"]]


def test_a_full_batch_does_not_wait() -> None:
    runner = FakeRunner()
    with service_with(runner, max_wait_s=WITHIN_S * 10) as service:
        futures = [service.submit(bytes([number]), 1) for number in range(runner.max_batch)]
        assert [first_value(future) for future in futures] == list(range(runner.max_batch))


def test_batches_are_bounded_in_number_and_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_service, "_MAX_BYTES", 100)
    runner = FakeRunner()
    with service_with(runner) as service:
        with held(runner, service):
            sizes = [60, 40, 60, 300, 10, 10, 10, 10, 10]
            futures = [service.submit(bytes([number]), size) for number, size in enumerate(sizes, start=1)]
        assert [first_value(future) for future in futures] == list(range(1, 10))
    batches = [[sample[0] for sample in batch] for batch in runner.batches[1:]]
    assert batches == [[1, 2], [3], [4], [5, 6, 7, 8], [9]], "one that is too large by itself goes alone"


def test_a_bad_chunk_spoils_no_other() -> None:
    runner = FakeRunner()
    with service_with(runner) as service:
        with held(runner, service):
            futures = [service.submit(sample, 1) for sample in (b"\1", BAD, b"\2")]
        assert first_value(futures[0]) == 1 and first_value(futures[2]) == 2
        with pytest.raises(GopError, match=r"^DALI cannot decode it: the sample is bad$"):
            futures[1].result(WITHIN_S)
        assert first_value(service.submit(b"\3", 1)) == 3


def test_the_time_that_a_frame_took_is_told() -> None:
    runner = FakeRunner()
    with service_with(runner) as service:
        with held(runner, service) as first:
            pass
        assert first.result(WITHIN_S).ms_per_frame > 0


def test_chunks_of_a_stream_that_has_ended_are_not_decoded() -> None:
    runner = FakeRunner()
    with service_with(runner) as service:
        with held(runner, service):
            gone, kept = service.submit(b"\1", 1), service.submit(b"\2", 1)
            assert gone.cancel()
        assert first_value(kept) == 2
        with pytest.raises(CancelledError):
            gone.result(WITHIN_S)
    assert runner.batches == [[b"\0"], [b"\2"]]


def test_shutting_down_leaves_nobody_waiting_and_no_thread() -> None:
    runner = FakeRunner()
    service = DaliService("dali test", runner)
    with held(runner, service) as first:
        waiting = service.submit(b"\1", 1)
        closer = threading.Thread(target=service.close)
        closer.start()
        with pytest.raises(GopError, match="shut down"):
            waiting.result(WITHIN_S)
    closer.join(WITHIN_S)
    assert first_value(first) == 0, "the batch in hand is finished"
    with pytest.raises(GopError, match="shut down"):
        service.submit(b"\2", 1).result(WITHIN_S)
    assert not any(thread.name == "dali test" for thread in threading.enumerate())


def test_a_service_that_nobody_uses_has_no_thread() -> None:
    with service_with(FakeRunner()):
        assert not any(thread.name == "dali test" for thread in threading.enumerate())


def test_a_bug_is_told_to_those_who_wait_and_to_those_who_come(caplog: pytest.LogCaptureFixture) -> None:
    with service_with(BrokenRunner()) as service:
        for _ in range(2):
            with pytest.raises(GopError, match="DALI crashed: ZeroDivisionError: a bug"):
                service.submit(b"\1", 1).result(WITHIN_S)
    assert "dali test crashed" in caplog.text


@pytest.fixture
def images() -> Iterator[DaliService]:
    need_dali()
    with closing(DaliService("dali images", DaliRunner("images", torch.device("cpu")))) as service:
        yield service


def jpeg(index: int, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(drawing(index, size)).save(out, "jpeg", quality=95)
    return out.getvalue()


def test_dali_decodes_jpegs_of_many_sizes_in_order(images: DaliService) -> None:
    sizes = [(64 + number, 48 + number) for number in range(20)]
    futures = [images.submit(jpeg(number, size), 1) for number, size in enumerate(sizes)]
    for number, (size, future) in enumerate(zip(sizes, futures, strict=True)):
        frames = future.result(WITHIN_S).frames
        assert frames.shape == (1, size[1], size[0], 3)
        assert np.abs(frames[0].numpy().astype(int) - drawing(number, size)).mean() < 2


@pytest.mark.parametrize("bad", [b"no picture at all", jpeg(3, (64, 48))[:200]], ids=["noise", "truncated"])
def test_dali_survives_a_bad_jpeg_and_so_do_its_neighbours(images: DaliService, bad: bytes) -> None:
    for _ in range(2):
        futures = [images.submit(sample, 1) for sample in (jpeg(1, (64, 48)), bad, jpeg(2, (64, 48)))]
        assert futures[0].result(WITHIN_S).frames.shape == futures[2].result(WITHIN_S).frames.shape
        with pytest.raises(GopError, match="DALI cannot decode it: "):
            futures[1].result(WITHIN_S)


def test_a_pipeline_that_failed_is_not_used_again() -> None:
    """DALI says that it is no longer valid; its CPU build would still work."""
    need_dali()
    runner = DaliRunner("images", torch.device("cpu"))
    runner.decode([jpeg(1, (64, 48))])
    first = runner._pipeline
    runner.decode([jpeg(2, (64, 48))])
    assert runner._pipeline is first, "one that works is kept"
    with pytest.raises(RuntimeError):
        runner.decode([b"noise" * 20])
    runner.decode([jpeg(3, (64, 48))])
    assert runner._pipeline is not first


def test_frames_stay_whole_while_dali_goes_on(images: DaliService) -> None:
    frames = images.submit(jpeg(1, (64, 48)), 1).result(WITHIN_S).frames
    before = frames.clone()
    for number in range(2, 12):
        images.submit(jpeg(number, (64, 48)), 1).result(WITHIN_S)
    assert torch.equal(frames, before)


def test_dali_decodes_chunks_of_video_in_order(tmp_path: Path) -> None:
    """VP9, because DALI's CPU build decodes neither H.264 nor H.265."""
    need_dali()
    options = {"deadline": "realtime", "g": "8", "keyint_min": "8", "lag-in-frames": "0"}
    clip = write_clip(tmp_path / "clip.mkv", 24, codec="libvpx-vp9", options=options)
    with packets_of(clip) as (source, packets):
        splitter, remuxer = GopSplitter("vp9", None), Remuxer(source.video)
        gops = [*(gop for packet in packets for gop in splitter.feed(packet)), *splitter.flush()]
        chunks = [remuxer.chunk(gop) for gop in gops]
    with closing(DaliService("dali videos", DaliRunner("videos", torch.device("cpu")))) as service:
        futures = [service.submit(chunk.data, chunk.num_bytes) for chunk in chunks]
        cut = service.submit(chunks[0].data[:300], 1)
        frames = torch.cat([future.result(WITHIN_S).frames for future in futures])
        with pytest.raises(GopError, match="DALI cannot decode it: "):
            cut.result(WITHIN_S)
        again = service.submit(chunks[1].data, chunks[1].num_bytes).result(WITHIN_S).frames
    assert torch.equal(again, frames[8:16]), "DALI goes on after an error"
    assert frames.shape == (24, 48, 64, 3)
    expected = np.stack([drawing(index, (64, 48)) for index in range(24)])
    assert np.abs(frames.numpy().astype(int) - expected).mean(axis=(1, 2, 3)).max() < 3
