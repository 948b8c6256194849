"""Batches are what the daemon would feed, and a function of seed, epoch and number alone."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from streamd.datasets import data, pictures
from streamd.datasets.records import DataSet
from streamd.errors import ConfigError, DataError
from streamd.messages import Frame, Picture, Stamp
from streamd.models.spec import KeypointRule, MaskRule, ModelSpec, PanopticRule, ResizeRule
from streamd.postprocess import place
from streamd.runner import assemble
from streamd.train.augment import Augmentation
from streamd.train.loader import Loader
from streamd.train.targets import Targets, TrainBatch
from tests.train_data import LABELS, POINTS, STUFF, make_shapes

SPEC = ModelSpec(
    name="small",
    task="panoptic",
    labels=LABELS,
    input_size=(64, 64),
    size_multiple=32,
    colour="bgr",
    mean=(1.0, 2.0, 3.0),
    std=(4.0, 5.0, 6.0),
    masks=MaskRule(kind="box"),
    keypoints=KeypointRule(names=POINTS),
    panoptic=PanopticRule(stuff_labels=STUFF),
)
DETECTOR = msgspec.structs.replace(SPEC, task="detect", masks=None, keypoints=None, panoptic=None)
WILD = Augmentation(multi_scale=(0.5, 1.5), scale=(0.5, 2.0), mosaic=0.5, copy_paste=0.5)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_shapes(tmp_path_factory.mktemp("shapes"), 10)


def equal(first: TrainBatch, second: TrainBatch) -> bool:
    def same(one: Any, other: Any) -> bool:
        return (one is None and other is None) or torch.equal(one, other)

    names = Targets.__dataclass_fields__
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.sizes, second.sizes)
        and len(first.targets) == len(second.targets)
        and all(
            same(getattr(one, name), getattr(other, name))
            for one, other in zip(first.targets, second.targets, strict=True)
            for name in names
        )
    )


def all_equal(first: Iterable[TrainBatch], second: Iterable[TrainBatch]) -> bool:
    return all(equal(one, other) for one, other in zip(first, second, strict=True))


def numbers_of(batches: Iterable[TrainBatch], dataset: DataSet) -> list[list[int]]:
    """Tell the pictures of plain batches by their pixels."""
    loader = Loader(dataset, SPEC, Augmentation.none(), 1)
    known: dict[bytes, int] = {}
    for epoch in range(30):
        order = np.random.default_rng((0, epoch, 0)).permutation(len(dataset.records))
        known |= {batch.images.numpy().tobytes(): int(n) for n, batch in zip(order, loader.batches(epoch), strict=True)}
        if len(known) == len(dataset.records):
            break
    return [[known[image.numpy().tobytes()] for image in batch.images] for batch in batches]


def frame_of(pixels: np.ndarray) -> Frame:
    picture = Picture((torch.from_numpy(pixels),), "rgb", "bt601", True, 0)
    height, width = pixels.shape[:2]
    stamp = Stamp(epoch=0, arrived_ns=0, arrived_at=0.0, captured_at=0.0, clock="arrival")
    return Frame("a", 0, 0.0, stamp, 0.0, picture, width, height, keyframe=True, corrupt=False)


@pytest.mark.parametrize(
    "resize",
    [
        ResizeRule(),
        ResizeRule(anchor="center", pad=None),
        ResizeRule(kind="stretch"),
        ResizeRule(kind="shortest_edge", min_size=40, max_size=60, pad=None, antialias=True),
    ],
    ids=lambda rule: f"{rule.kind} {rule.anchor}",
)
def test_plain_batch_is_what_the_daemon_feeds(shapes: DataSet, resize: ResizeRule) -> None:
    spec = msgspec.structs.replace(SPEC, resize=resize)
    (batch,) = Loader(shapes, spec, Augmentation.none(), len(shapes.records)).batches(3)
    order = numbers_of(Loader(shapes, SPEC, Augmentation.none(), len(shapes.records)).batches(3), shapes)[0]
    frames = [frame_of(pictures.read(shapes.records[n].file, (96, 64))) for n in order]
    fed = assemble(frames, spec, torch.empty(len(frames), 3, 64, 64))
    assert torch.equal(batch.images, fed.images)
    placements = place(fed.frames, fed.letterboxes)
    assert torch.equal(batch.sizes, placements[:, 6:8])
    for number, targets, row in zip(order, batch.targets, placements, strict=True):
        expected = shapes.records[number].objects.boxes * row[:2].repeat(2).numpy() + row[2:4].repeat(2).numpy()
        np.testing.assert_allclose(targets.boxes, expected, atol=1.0)  # cut to the letterbox's whole pixels


def test_targets_are_those_that_the_spec_asks_for(shapes: DataSet) -> None:
    (batch,) = Loader(shapes, SPEC, Augmentation.none(), 10)
    for one in batch.targets:
        num = len(one.boxes)
        assert one.masks is not None and one.masks.shape == (num, 64, 64) and one.masks.dtype == torch.bool
        assert one.keypoints is not None and one.keypoints.shape == (num, len(POINTS), 3)
        assert one.semantic is not None and one.semantic.shape == (64, 64) and one.semantic.dtype == torch.int64
        assert one.labels.dtype == torch.int64 and one.crowds.shape == (0, 4)
    (batch,) = Loader(shapes, DETECTOR, Augmentation.none(), 10)
    assert all(one.masks is None and one.keypoints is None and one.semantic is None for one in batch.targets)


def test_same_seed_gives_the_same_batches_and_another_epoch_others(shapes: DataSet) -> None:
    first, second = (Loader(shapes, SPEC, WILD, 3, seed=5) for _ in range(2))
    assert all_equal(first.batches(0), second.batches(0))
    assert not any(equal(*pair) for pair in zip(first.batches(0), second.batches(1), strict=True))
    other = Loader(shapes, SPEC, WILD, 3, seed=6)
    assert not any(equal(*pair) for pair in zip(first.batches(0), other.batches(0), strict=True))
    first.set_epoch(1)
    assert all_equal(first, second.batches(1))


def test_run_that_goes_on_gets_the_batches_that_are_left(shapes: DataSet) -> None:
    whole = list(Loader(shapes, SPEC, WILD, 2).batches(4))
    assert len(whole) == 5
    loader = Loader(shapes, SPEC, WILD, 2)
    list(itertools.islice(loader.batches(0), 2))  # what was taken before does not matter
    assert all_equal(loader.batches(4, 3), whole[3:])
    assert all_equal(loader, Loader(shapes, SPEC, WILD, 2).batches(4))  # and a later epoch is whole again


def test_iterating_leaves_the_random_state_of_torch_alone(shapes: DataSet) -> None:
    before = torch.get_rng_state()
    list(Loader(shapes, DETECTOR, WILD, 2).batches(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batch_of_one_process(shapes: DataSet, world_size: int) -> None:
    size = 6 // world_size
    alone = numbers_of(Loader(shapes, SPEC, Augmentation.none(), 6, drop_last=False).batches(2), shapes)
    parts = [
        numbers_of(
            Loader(shapes, SPEC, Augmentation.none(), size, rank=rank, world_size=world_size, drop_last=False).batches(
                2
            ),
            shapes,
        )
        for rank in range(world_size)
    ]
    together = [list(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]
    assert [sorted(batch) for batch in together] == [sorted(batch) for batch in alone]
    assert sorted(itertools.chain(*together)) == list(range(10))


def test_last_batch_is_dropped_or_kept_by_choice(shapes: DataSet) -> None:
    dropping = Loader(shapes, DETECTOR, WILD, 4)
    assert len(dropping) == 2 and [len(batch.images) for batch in dropping] == [4, 4]
    keeping = Loader(shapes, DETECTOR, WILD, 4, drop_last=False)
    assert len(keeping) == 3 and [len(batch.images) for batch in keeping] == [4, 4, 2]


def test_sizes_of_a_batch_are_the_same_in_all_processes(shapes: DataSet) -> None:
    first, second = (Loader(shapes, DETECTOR, WILD, 1, rank=rank, world_size=2) for rank in range(2))
    shapes_of = [
        [batch.images.shape[2:] for epoch in range(4) for batch in one.batches(epoch)] for one in (first, second)
    ]
    assert shapes_of[0] == shapes_of[1] and len(set(shapes_of[0])) > 1


def test_last_epochs_are_plain(shapes: DataSet) -> None:
    mosaic = Augmentation(flip=0.0, hue=0.0, saturation=0.0, value=0.0, mosaic=1.0, last_epochs_plain=2)
    loader = Loader(shapes, DETECTOR, mosaic, 10, num_epochs=5)
    plain = Loader(shapes, DETECTOR, Augmentation.none(), 10)
    same = [all_equal(loader.batches(epoch), plain.batches(epoch)) for epoch in range(5)]
    assert same == [False, False, False, True, True]


def test_cached_pictures_are_read_once_and_the_cache_is_bounded(tmp_path: Path) -> None:
    dataset = make_shapes(tmp_path / "s", 6)
    cached, small = (Loader(dataset, DETECTOR, Augmentation.none(), 2, cache=True, cache_mib=mib) for mib in (100, 0))
    before = list(cached.batches(0))
    list(small.batches(0))
    shutil.rmtree(tmp_path / "s")
    assert all_equal(before, cached.batches(0))
    with pytest.raises(DataError, match="cannot read the picture: No such file"):
        list(small.batches(0))


def test_workers_give_the_batches_of_the_process_itself(tmp_path: Path) -> None:
    dataset = make_shapes(tmp_path / "s", 8)
    alone = Loader(dataset, SPEC, WILD, 2)
    loader = Loader(dataset, SPEC, WILD, 2, num_workers=2)
    try:
        next(loader.batches(7))  # left in the middle
        workers = [worker.pid for worker in multiprocessing.active_children() if worker.pid]
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        assert all_equal(loader.batches(0), alone.batches(0))
        assert all_equal(loader.batches(1, 2), alone.batches(1, 2))
        shutil.rmtree(tmp_path / "s")
        with pytest.raises(DataError, match="cannot read the segments: No such file") as caught:
            list(loader.batches(2))
        assert "Traceback" not in str(caught.value)
    finally:
        loader.close()


def test_shared_memory_that_is_too_small_is_said_before_the_workers_die(
    shapes: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 20, 0, 1 << 20))
    with pytest.raises(ConfigError, match=r"has 1 MiB free, .* need \d+ MiB: give the container more \(--shm-size\)"):
        Loader(shapes, DETECTOR, WILD, 64, num_workers=2)
    assert len(Loader(shapes, DETECTOR, WILD, 4, num_workers=0)) == 2


def test_persons_of_the_shared_folder_make_batches(shared: Path) -> None:
    dataset = data.read(shared / "data/persons", split="val")
    spec = msgspec.structs.replace(
        SPEC,
        task="segment",
        labels=dataset.labels,
        panoptic=None,
        input_size=(128, 128),
        keypoints=KeypointRule(names=dataset.keypoint_names),
    )
    batches = list(itertools.islice(Loader(dataset, spec, WILD, 8).batches(0), 3))
    targets = [one for batch in batches for one in batch.targets]
    assert sum(len(one.boxes) for one in targets) > 20
    assert any(one.masks is not None for one in targets) and any(one.masks is None for one in targets)
    for one in targets:
        assert torch.isfinite(one.boxes).all() and (one.boxes[:, 2:] > one.boxes[:, :2]).all()
