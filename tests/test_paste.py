"""The kernels that paste and encode masks, against their twins: every string the same, byte by byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamd.gpu import mask_reference, ops, paste
from streamd.gpu.rle import EncodedMasks

repeatable = settings(deadline=None, derandomize=True, max_examples=25)
seeds = st.integers(0, 2**32 - 1)

INPUT_SIZE = (24, 20)
ENOUGH = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """What both kinds of masks need beside the masks themselves."""

    boxes: Tensor  # [B, N, 4]
    valid: Tensor  # [B, N]
    placements: Tensor  # [B, 8]

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return self.boxes.to(device), self.valid.to(device), self.placements.to(device)


def place(*sizes: tuple[int, int]) -> Tensor:
    """Place frames of these (width, height) into the input; the last two columns are of no use here."""
    height, width = INPUT_SIZE
    rows = [[width / w, height / h, 1.0, -2.0, w, h, torch.nan, torch.nan] for w, h in sizes]
    return torch.tensor(rows).reshape(-1, 8)


def random_objects(rng: np.random.Generator, sizes: list[tuple[int, int]], num_objects: int) -> Objects:
    """Make boxes in and around frames: some on half pixels, some empty, some larger than the frame."""
    limits = np.array(sizes, dtype=np.float64).reshape(-1, 1, 2)
    corners = rng.uniform(-0.3, 1.0, (len(sizes), num_objects, 2)) * limits
    boxes = np.concatenate((corners, corners + rng.uniform(0, 1.6, corners.shape) * limits), axis=-1)
    kind = rng.integers(0, 6, (len(sizes), num_objects))
    boxes[kind == 0] = np.round(boxes[kind == 0] * 2) / 2
    boxes[kind == 1] = [-1e30, -1e30, 1e30, 1e30]
    boxes[kind == 2, 2:] = boxes[kind == 2, :2]
    valid = rng.random((len(sizes), num_objects)) < 0.8
    return Objects(torch.from_numpy(boxes).float(), torch.from_numpy(valid), place(*sizes))


def random_prototypes(
    rng: np.random.Generator, objects: Objects, num: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Make prototypes whose mixtures are exact, so that no order of a sum shows."""
    prototypes = rng.integers(-40, 41, (len(objects.boxes), num, *grid)) / 8
    coefficients = rng.integers(-2, 3, (*objects.valid.shape, num))
    return torch.from_numpy(prototypes).float(), torch.from_numpy(coefficients).float()


def assert_same(ours: EncodedMasks, twins: EncodedMasks) -> None:
    assert int(ours.num_runs) == int(twins.num_runs)
    assert ours.offsets.tolist() == twins.offsets.tolist()
    num_characters = int(twins.offsets[-1])
    torch.testing.assert_close(ours.characters[:num_characters].cpu(), twins.characters[:num_characters])


def assert_prototypes_same(
    device: torch.device, prototypes: Tensor, coefficients: Tensor, objects: Objects, **options: Any
) -> EncodedMasks:
    """Encode by kernel and by twin, and return what the twin gave."""
    options = {"input_size": INPUT_SIZE, "threshold": 0.4, "capacity": ENOUGH, **options}
    basis = (prototypes.to(device), coefficients.to(device))
    ours = paste.encode_prototype_masks(*basis, *objects.to(device), **options)
    twins = mask_reference.encode_prototype_masks(
        prototypes, coefficients, objects.boxes, objects.valid, objects.placements, **options
    )
    assert_same(ours, twins)
    return twins


def assert_boxes_same(device: torch.device, masks: Tensor, objects: Objects, **options: Any) -> EncodedMasks:
    options = {"threshold": 0.5, "capacity": ENOUGH, **options}
    ours = paste.encode_box_masks(masks.to(device), *objects.to(device), **options)
    twins = mask_reference.encode_box_masks(masks, objects.boxes, objects.valid, objects.placements, **options)
    assert_same(ours, twins)
    return twins


@pytest.fixture(scope="module", autouse=True)
def _few_parts() -> Iterator[None]:
    """Cut masks into few parts, since the emulator takes a millisecond for each; one test tries other numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paste, "_MAX_PARTS", 8)
        yield


@repeatable
@given(
    seed=seeds,
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=3),
    num_objects=st.integers(0, 4),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    threshold=st.sampled_from([0.0, 0.4, 0.5, 1.0]),
)
def test_prototype_masks_of_any_batch_are_those_of_the_twin(
    device: torch.device,
    seed: int,
    sizes: list[tuple[int, int]],
    num_objects: int,
    grid: tuple[int, int],
    threshold: float,
) -> None:
    rng = np.random.default_rng(seed)
    objects = random_objects(rng, sizes, num_objects)
    basis = random_prototypes(rng, objects, 3, grid)
    assert_prototypes_same(device, *basis, objects, threshold=threshold)


@repeatable
@given(
    seed=seeds,
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=3),
    num_objects=st.integers(0, 4),
    size=st.sampled_from([1, 2, 7, 28]),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7]),
)
def test_box_masks_of_any_batch_are_those_of_the_twin(
    device: torch.device, seed: int, sizes: list[tuple[int, int]], num_objects: int, size: int, threshold: float
) -> None:
    rng = np.random.default_rng(seed)
    objects = random_objects(rng, sizes, num_objects)
    masks = torch.from_numpy(rng.random((*objects.valid.shape, size, size))).float()
    assert_boxes_same(device, masks, objects, threshold=threshold)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 70, 65),  # the whole frame
        (0, 0, 70, 64),
        (0, 1, 70, 65),
        (69, 64, 70, 65),  # the last pixel
        (0, 0, 1, 1),
        (33, 0, 34, 65),  # one column
        (69, 0, 70, 65),
        (0, 64, 70, 65),  # one row
        (5, 32, 40, 65),
        (5, 0, 40, 32),  # a whole word
        (5, 1, 40, 33),
        (5, 0, 40, 31),
        (38, 10, 70, 65),
        (3, 3, 3.2, 3.3),  # no pixel's centre
    ],
)
def test_full_masks_at_the_edges_of_frame_and_words_are_those_of_pycocotools(
    device: torch.device, box: tuple[float, float, float, float]
) -> None:
    objects = Objects(torch.tensor([[box]]).float(), torch.ones(1, 1, dtype=torch.bool), place((70, 65)))
    twins = assert_prototypes_same(device, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1), objects)
    x1, y1, x2, y2 = map(round, box)
    frame = np.zeros((65, 70), dtype=np.uint8, order="F")
    frame[y1:y2, x1:x2] = 1
    assert twins.strings() == [coco.encode(frame)["counts"]]


@pytest.mark.parametrize(
    "box",
    [
        [7990.5, 7900, 8100, 8100],  # over the corner
        [100, -50, 103.5, 9000],  # from top to bottom
        [-9, 4000.2, 8010, 4003],  # from side to side
        [0, 0, 2, 8000],
        [7998, 0, 8000, 8000],
    ],
)
def test_frames_of_8000_pixels_are_encoded_as_by_the_twin(device: torch.device, box: list[float]) -> None:
    rng = np.random.default_rng(3)
    objects = Objects(torch.tensor([[box]]).float(), torch.ones(1, 1, dtype=torch.bool), place((8000, 8000)))
    assert_prototypes_same(device, *random_prototypes(rng, objects, 2, (160, 150)), objects)
    assert_boxes_same(device, torch.from_numpy(rng.random((1, 1, 28, 28))).float(), objects)


@pytest.mark.parametrize("num_parts", [1, 2, 64])
def test_parts_and_tiles_join_without_a_seam(
    device: torch.device, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paste, "_MIN_PARTS", num_parts)
    monkeypatch.setattr(paste, "_MAX_PARTS", num_parts)
    rng = np.random.default_rng(4)
    # Tiles hold 4096 words: 1365 columns of 3, then 26 of 157; parts are 32 columns wide at least.
    objects = random_objects(rng, [(1500, 90), (120, 5000), (33, 40)], 2)
    objects = replace(objects, valid=torch.ones_like(objects.valid))
    objects.boxes[:2, 0] = torch.tensor([-1.0, -1.0, 9000.0, 9000.0])
    assert_prototypes_same(device, *random_prototypes(rng, objects, 2, (40, 40)), objects)


def test_a_mask_of_noise_has_a_run_for_nearly_each_pixel(device: torch.device) -> None:
    rng = np.random.default_rng(5)
    objects = Objects(torch.tensor([[[0.0, 0.0, 100.0, 95.0]]]), torch.ones(1, 1, dtype=torch.bool), place((100, 95)))
    # As many rows and columns as pixels, and the input as large as the frame: each pixel is its own.
    objects.placements[:, :4] = torch.tensor([20 / 100, 24 / 95, 0.0, 0.0])
    twins = assert_prototypes_same(device, *random_prototypes(rng, objects, 1, (95, 100)), objects)
    assert int(twins.num_runs) > 95 * 100 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_are_read_in_the_precision_of_the_model(device: torch.device, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(6)
    objects = random_objects(rng, [(50, 40), (70, 64)], 8)
    prototypes, coefficients = random_prototypes(rng, objects, 1, (5, 6))
    twins = assert_prototypes_same(device, prototypes.to(dtype), coefficients.to(dtype), objects)
    assert int(twins.num_runs) > 100
    masks = torch.from_numpy(rng.random((2, 8, 7, 7))).to(dtype)
    twins = assert_boxes_same(device, masks, objects)
    assert int(twins.num_runs) > 100


@pytest.mark.parametrize("box", [(2.5, 3.5, 10.5, 9.5), (2, 3, 11, 10)])
def test_a_logit_at_the_limit_is_outside_and_a_probability_at_the_threshold_inside(
    device: torch.device, box: tuple[float, float, float, float]
) -> None:
    objects = Objects(torch.tensor([[box]]).float(), torch.ones(1, 1, dtype=torch.bool), place((20, 15)))
    twins = assert_prototypes_same(device, torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1), objects, threshold=0.5)
    assert int(twins.num_runs) == 1
    twins = assert_boxes_same(device, torch.full((1, 1, 2, 2), 0.5), objects)
    assert int(twins.num_runs) > 1


def test_values_that_are_not_finite_are_treated_as_by_the_twin(device: torch.device) -> None:
    rng = np.random.default_rng(7)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
    boxes = torch.tensor([5.0, 6.0, 30.0, 35.0]).repeat(1, 4, 5, 1)
    for corner in range(4):
        boxes[0, corner, :, corner] = odd
    objects = Objects(boxes.flatten(1, 2), torch.ones(1, 20, dtype=torch.bool), place((50, 40)))
    prototypes, _ = random_prototypes(rng, objects, 1, (5, 6))
    prototypes[0, 0, :, 3] = odd
    assert_prototypes_same(device, prototypes, torch.ones(1, 20, 1), objects)
    masks = torch.from_numpy(rng.random((1, 20, 5, 5))).float()
    masks[..., 2] = odd
    assert_boxes_same(device, masks, objects)


def test_views_with_strides_are_read_as_they_are(device: torch.device) -> None:
    rng = np.random.default_rng(8)
    objects = random_objects(rng, [(50, 40), (30, 64)], 3)
    table = torch.cat((objects.boxes, torch.full((2, 3, 4), torch.nan)), dim=-1)
    strided = Objects(table[..., :4], objects.valid.T.contiguous().T, objects.placements.T.contiguous().T)
    assert not strided.boxes.is_contiguous() and not strided.valid.is_contiguous()
    masks = torch.from_numpy(rng.random((2, 6, 7, 7))).float()[:, ::2]
    assert_boxes_same(device, masks, strided)
    prototypes, coefficients = random_prototypes(rng, objects, 2, (7, 6))
    assert_prototypes_same(device, prototypes.mT.contiguous().mT, coefficients.mT.contiguous().mT, strided)


def test_too_little_room_is_told_and_enough_is_enough(device: torch.device) -> None:
    rng = np.random.default_rng(9)
    objects = random_objects(rng, [(50, 40), (30, 64)], 3)
    basis = random_prototypes(rng, objects, 2, (7, 6))
    num_runs = int(assert_prototypes_same(device, *basis, objects).num_runs)
    for capacity in (0, 1, num_runs - 1):
        short = assert_prototypes_same(device, *basis, objects, capacity=capacity)
        assert int(short.num_runs) == num_runs and short.offsets[-1] == 0
    assert assert_prototypes_same(device, *basis, objects, capacity=num_runs).offsets[-1] > 0


def test_what_does_not_fit_together_is_refused(device: torch.device) -> None:
    rng = np.random.default_rng(10)
    objects = random_objects(rng, [(50, 40), (30, 64)], 3)
    prototypes, coefficients = (one.to(device) for one in random_prototypes(rng, objects, 2, (7, 6)))
    boxes, valid, placements = objects.to(device)
    options: dict[str, Any] = {"input_size": INPUT_SIZE, "threshold": 0.5, "capacity": 10}
    with pytest.raises(ValueError, match=r"coefficients must be torch.float32 \[2, 3, 2\], not .* \[2, 2, 2\]"):
        paste.encode_prototype_masks(prototypes, coefficients[:, :2], boxes, valid, placements, **options)
    with pytest.raises(ValueError, match=r"coefficients must be torch.float32 .* not torch.float16"):
        paste.encode_prototype_masks(prototypes, coefficients.half(), boxes, valid, placements, **options)
    with pytest.raises(ValueError, match=r"boxes must be torch.float32 .* not torch.float64"):
        paste.encode_prototype_masks(prototypes, coefficients, boxes.double(), valid, placements, **options)
    with pytest.raises(ValueError, match=r"valid must be torch.bool"):
        paste.encode_prototype_masks(prototypes, coefficients, boxes, valid.int(), placements, **options)
    with pytest.raises(ValueError, match=r"placements must be torch.float32 \[2, 6\], not torch.float32 \[1, 6\]"):
        paste.encode_prototype_masks(prototypes, coefficients, boxes, valid, placements[:1], **options)
    masks = torch.zeros(2, 3, 4, 5, device=device)
    with pytest.raises(ValueError, match=r"masks must be torch.float32 \[2, 3, 5, 5\]"):
        paste.encode_box_masks(masks, boxes, valid, placements, threshold=0.5, capacity=10)
    with pytest.raises(TypeError, match=r"masks are float32, float16 or bfloat16, not torch.float64"):
        paste.encode_box_masks(masks[..., :4].double(), boxes, valid, placements, threshold=0.5, capacity=10)


def test_masks_on_a_cpu_go_to_the_twin() -> None:
    rng = np.random.default_rng(11)
    objects = random_objects(rng, [(50, 40)], 3)
    prototypes, coefficients = random_prototypes(rng, objects, 2, (7, 6))
    options: dict[str, Any] = {"input_size": INPUT_SIZE, "threshold": 0.5, "capacity": ENOUGH}
    given = (prototypes, coefficients, objects.boxes, objects.valid, objects.placements)
    assert_same(ops.encode_prototype_masks(*given, **options), mask_reference.encode_prototype_masks(*given, **options))


class _NoWaiting(TorchDispatchMode):
    """Refuse the operators that wait for a device."""

    WAITING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "item", "equal"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, name
        indices = args[1] if name == "index" else ()
        assert all(index is None or index.dtype != torch.bool for index in indices), "index by bool"
        return func(*args, **(kwargs or {}))


def encode_both(
    objects: Objects, basis: tuple[Tensor, Tensor], masks: Tensor, device: torch.device
) -> Iterator[Callable[[], EncodedMasks]]:
    given = objects.to(device)
    yield lambda: paste.encode_prototype_masks(*basis, *given, input_size=INPUT_SIZE, threshold=0.5, capacity=ENOUGH)
    yield lambda: paste.encode_box_masks(masks, *given, threshold=0.5, capacity=ENOUGH)


def test_nothing_waits_for_the_device(device: torch.device) -> None:
    rng = np.random.default_rng(12)
    objects = random_objects(rng, [(50, 40)], 3)
    prototypes, coefficients = (one.to(device) for one in random_prototypes(rng, objects, 2, (7, 6)))
    masks = torch.from_numpy(rng.random((1, 3, 5, 5))).float().to(device)
    for encode in encode_both(objects, (prototypes, coefficients), masks, device):
        with _NoWaiting():
            encode()


@pytest.mark.gpu
def test_encoding_can_be_captured_and_replayed_with_other_masks() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    device, rng = torch.device("cuda", 0), np.random.default_rng(13)
    objects = random_objects(rng, [(640, 360), (1920, 1080)], 10)
    basis = tuple(one.to(device) for one in random_prototypes(rng, objects, 2, (40, 50)))
    masks = torch.from_numpy(rng.random((2, 10, 28, 28))).float().to(device)
    for encode in encode_both(objects, (basis[0], basis[1]), masks, device):
        encode()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = encode()
        for tensor in (basis[1], masks):
            tensor.copy_(tensor.flip(1))
        graph.replay()
        fresh = encode()
        torch.cuda.synchronize()
        assert_same(captured, EncodedMasks(fresh.characters.cpu(), fresh.offsets.cpu(), fresh.num_runs.cpu()))
