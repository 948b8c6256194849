"""The preprocess kernel against its twin, emulated on the CPU and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import mmap
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamd.gpu import cuda, reference
from streamd.gpu.preprocess import preprocess
from streamd.messages import Letterbox, Picture
from streamd.models.spec import ModelSpec, ResizeRule

repeatable = settings(deadline=None, derandomize=True, max_examples=40)

PLAIN: dict[str, Any] = {"colour": "rgb", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "pad": (114.0, 114.0, 114.0)}
IMAGENET: dict[str, Any] = {
    "colour": "bgr",
    "mean": (103.53, 116.28, 123.675),
    "std": (57.4, 57.1, 58.4),
    "pad": (1.0, 60.0, 250.0),
}
TOLERANCE = 0.01  # grey levels of 255
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]
ROTATIONS: list[Literal[0, 90, 180, 270]] = [0, 90, 180, 270]
LAYOUTS: list[Literal["yuv", "nv12", "rgb"]] = ["yuv", "nv12", "rgb"]


def pitched(rng: np.random.Generator, device: torch.device, shape: tuple[int, ...], pad_bytes: int) -> Tensor:
    """Make a random plane [rows, columns, ...] whose rows are `pad_bytes` longer than their pixels."""
    rows, row_bytes = shape[0], int(np.prod(shape[1:]))
    memory = torch.from_numpy(rng.integers(0, 256, (rows, row_bytes + pad_bytes), dtype=np.uint8)).to(device)
    return memory[:, :row_bytes].unflatten(1, shape[1:])


def random_picture(
    rng: np.random.Generator,
    device: torch.device,
    layout: Literal["yuv", "nv12", "rgb"],
    size: tuple[int, int],
    *,
    chroma: tuple[int, int] | None = None,
    pad_bytes: int = 0,
    rotation: Literal[0, 90, 180, 270] = 0,
) -> Picture:
    """Make a picture of noise; chroma is half the size, rounded up, where nothing else is said."""
    small = chroma or ((size[0] + 1) // 2, (size[1] + 1) // 2)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "yuv": [size, small, small],
        "nv12": [size, (*small, 2)],
        "rgb": [(*size, 3)],
    }
    planes = tuple(pitched(rng, device, shape, pad_bytes) for shape in shapes[layout])
    matrix: Literal["bt601", "bt709"] = "bt601" if rng.integers(2) else "bt709"
    return Picture(planes, layout, matrix, bool(rng.integers(2)), rotation)


def random_letterbox(rng: np.random.Generator, height: int, width: int) -> Letterbox:
    """Place a picture anywhere in an input of height x width."""
    top, left = int(rng.integers(height)), int(rng.integers(width))
    return Letterbox(
        scale_x=1.0,
        scale_y=1.0,
        left=left,
        top=top,
        width=int(rng.integers(1, width - left + 1)),
        height=int(rng.integers(1, height - top + 1)),
    )


def whole(height: int, width: int) -> Letterbox:
    return Letterbox(1.0, 1.0, 0, 0, width, height)


def on_host(picture: Picture) -> Picture:
    planes = tuple(plane.cpu() for plane in picture.planes)
    return Picture(planes, picture.layout, picture.matrix, picture.full_range, picture.rotation)


def expected_of(pictures: list[Picture], letterboxes: list[Letterbox], size: tuple[int, int], **options: Any) -> Tensor:
    expected = torch.full((len(pictures), 3, *size), torch.nan)
    reference.preprocess([on_host(picture) for picture in pictures], letterboxes, expected, **options)
    return expected


def filled(
    pictures: list[Picture],
    letterboxes: list[Letterbox],
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    **options: Any,
) -> Tensor:
    device = pictures[0].planes[0].device
    out = torch.full((len(pictures), 3, *size), torch.nan, dtype=dtype, device=device)
    out = out.contiguous(memory_format=memory_format)
    preprocess(pictures, letterboxes, out, **options)
    return out.cpu()


@pytest.mark.parametrize("antialias", [False, True])
@repeatable
@given(seed=st.integers(0, 2**32 - 1))
def test_pictures_of_any_layout_size_and_place_come_out_as_the_twin_makes_them(
    device: torch.device, antialias: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(1, 70)), int(rng.integers(1, 200)))
    pictures = [
        random_picture(
            rng,
            device,
            LAYOUTS[rng.integers(3)],
            (int(rng.integers(1, 90)), int(rng.integers(1, 90))),
            chroma=(int(rng.integers(1, 30)), int(rng.integers(1, 30))) if rng.integers(2) else None,
            pad_bytes=int(rng.integers(4)),
            rotation=ROTATIONS[rng.integers(4)],
        )
        for _ in range(rng.integers(1, 5))
    ]
    letterboxes = [random_letterbox(rng, *size) for _ in pictures]
    options: dict[str, Any] = {
        "colour": "bgr",
        "mean": (1.0, 20.0, 300.0),
        "std": (2.0, -0.5, 50.0),
        "pad": (114.0, 114.0, 114.0),
        "antialias": antialias,
    }

    result = filled(pictures, letterboxes, size, **options)

    difference = (result - expected_of(pictures, letterboxes, size, **options)) * torch.tensor(options["std"])[
        :, None, None
    ]
    assert difference.abs().max() < TOLERANCE  # fails for NaN too: no pixel may keep what it held


@pytest.mark.parametrize("anchor", ["top_left", "center"])
@pytest.mark.parametrize("source", [(1080, 1920), (719, 1281)])
@pytest.mark.parametrize("antialias", [False, True])
def test_camera_pictures_come_out_as_the_twin_makes_them(
    device: torch.device, antialias: bool, source: tuple[int, int], anchor: Literal["top_left", "center"]
) -> None:
    spec = ModelSpec(
        name="any", task="detect", labels=("a",), input_size=(352, 416), colour="rgb", resize=ResizeRule(anchor=anchor)
    )
    picture = random_picture(np.random.default_rng(1), device, "nv12", source, pad_bytes=64)
    letterbox = spec.letterbox(source[1], source[0])
    options = {**PLAIN, "antialias": antialias}
    result = filled([picture], [letterbox], spec.input_size, **options)
    difference = result - expected_of([picture], [letterbox], spec.input_size, **options)
    assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize("width", [36, 37])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("antialias", [False, True])
def test_half_precision_is_single_precision_rounded_once(
    device: torch.device, antialias: bool, width: int, memory_format: torch.memory_format
) -> None:
    rng = np.random.default_rng(2)
    pictures = [random_picture(rng, device, layout, (30, 50)) for layout in LAYOUTS]
    letterboxes = [random_letterbox(rng, 20, width) for _ in pictures]
    options = {**IMAGENET, "antialias": antialias}
    single = filled(pictures, letterboxes, (20, width), **options)
    half = filled(pictures, letterboxes, (20, width), torch.float16, memory_format, **options)
    assert torch.equal(half, single.half())


@pytest.mark.parametrize("width", [36, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("antialias", [False, True])
def test_channels_last_holds_what_contiguous_holds(
    device: torch.device, antialias: bool, width: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(3)
    pictures = [random_picture(rng, device, layout, (30, 50)) for layout in LAYOUTS]
    letterboxes = [random_letterbox(rng, 20, width) for _ in pictures]
    planar, interleaved = (
        filled(pictures, letterboxes, (20, width), dtype, memory_format, antialias=antialias, **IMAGENET)
        for memory_format in MEMORY_FORMATS
    )
    assert torch.equal(planar, interleaved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_may_begin_at_any_element_of_its_memory(device: torch.device, dtype: torch.dtype) -> None:
    picture = random_picture(np.random.default_rng(4), device, "nv12", (30, 50))
    memory = torch.full((3 * 8 * 16 + 2,), torch.nan, dtype=dtype, device=device)
    preprocess([picture], [whole(8, 16)], memory[1:-1].view(1, 3, 8, 16), **PLAIN)
    assert torch.equal(memory[1:-1].view(1, 3, 8, 16).cpu(), filled([picture], [whole(8, 16)], (8, 16), dtype, **PLAIN))
    assert memory[0].isnan() and memory[-1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padding_is_the_twins_to_the_last_bit(device: torch.device, dtype: torch.dtype) -> None:
    picture = random_picture(np.random.default_rng(5), device, "rgb", (4, 4))
    letterbox = Letterbox(1.0, 1.0, left=3, top=2, width=6, height=5)
    result = filled([picture], [letterbox], (11, 17), dtype, **IMAGENET)
    expected = expected_of([picture], [letterbox], (11, 17), **IMAGENET).to(dtype)
    is_padding = torch.ones(11, 17, dtype=torch.bool)
    is_padding[2:7, 3:9] = False
    assert torch.equal(result[:, :, is_padding], expected[:, :, is_padding])


def test_a_picture_at_its_own_size_is_copied(device: torch.device) -> None:
    picture = random_picture(np.random.default_rng(6), device, "rgb", (19, 140), pad_bytes=1)
    result = filled([picture], [whole(19, 140)], (19, 140), **PLAIN)
    torch.testing.assert_close(result[0], picture.planes[0].cpu().permute(2, 0, 1).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("antialias", [False, True])
def test_chroma_pairs_give_the_same_bits_aligned_or_not(device: torch.device, antialias: bool) -> None:
    rng = np.random.default_rng(7)
    aligned = random_picture(rng, device, "nv12", (24, 40))
    luma, chroma = aligned.planes
    memory = torch.zeros(12, 43, dtype=torch.uint8, device=device)
    memory[:, 1:41] = chroma.flatten(1)
    shifted = Picture((luma, memory[:, 1:41].unflatten(1, (20, 2))), "nv12", aligned.matrix, aligned.full_range, 0)
    options = {**PLAIN, "antialias": antialias}
    assert torch.equal(*(filled([picture], [whole(15, 33)], (15, 33), **options) for picture in (aligned, shifted)))


def between_forbidden_pages(plane: Tensor, at_end: bool) -> Tensor:
    """Copy a plane to memory that begins or ends at a page that no one may read."""
    num_bytes, page = plane.numel(), mmap.PAGESIZE
    assert num_bytes <= page
    memory = mmap.mmap(-1, 3 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=2 * page - num_bytes if at_end else page)
    copy.copy_(plane.flatten())
    for forbidden in (start, start + 2 * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    return copy.view(plane.shape)


@pytest.mark.parametrize("at_end", [False, True], ids=["start", "end"])
@pytest.mark.parametrize("source", [(1, 1), (1, 2), (2, 1), (13, 22)])
@pytest.mark.parametrize("antialias", [False, True])
def test_no_byte_outside_a_plane_is_read(
    device: torch.device, antialias: bool, source: tuple[int, int], at_end: bool
) -> None:
    if device.type == "cuda":
        pytest.skip("needs the CPU's page protection; compute-sanitizer looks for this on a GPU")
    for layout, rotation, size in product(LAYOUTS, ROTATIONS, [(5, 7), (40, 60)]):
        loose = random_picture(np.random.default_rng(8), device, layout, source, rotation=rotation)
        planes = tuple(between_forbidden_pages(plane, at_end) for plane in loose.planes)
        tight = Picture(planes, layout, loose.matrix, loose.full_range, rotation)
        options = {**PLAIN, "antialias": antialias}
        assert torch.equal(*(filled([picture], [whole(*size)], size, **options) for picture in (loose, tight)))


def test_an_empty_batch_is_left_alone(device: torch.device) -> None:
    preprocess([], [], torch.empty(0, 3, 8, 8, device=device), **PLAIN)


class Launches:
    """Stands for the compiled module: keeps the grids of its launches and runs nothing."""

    def __init__(self) -> None:
        self.functions: list[str] = []
        self.grids: list[cuda.Extent] = []

    def launch(self, function: str, grid: cuda.Extent, block: cuda.Extent, *arguments: Tensor | np.generic) -> None:
        self.functions.append(function)
        self.grids.append(grid)


def test_a_batch_of_different_pictures_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(cuda, "load", lambda name, device: launches)
    rng, host = np.random.default_rng(9), torch.device("cpu")
    pictures = [random_picture(rng, host, layout, (8 + i, 6)) for i, layout in enumerate(LAYOUTS)]
    preprocess(pictures, [whole(33, 129)] * 3, torch.empty(3, 3, 33, 129), **PLAIN)
    assert launches.grids == [(2, 2, 3)]  # a block fills 128 x 32 pixels


def test_windows_are_read_only_where_a_picture_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(cuda, "load", lambda name, device: launches)
    pictures = [random_picture(np.random.default_rng(10), torch.device("cpu"), "nv12", (16, 16)) for _ in range(2)]
    for height in (16, 15):
        preprocess(pictures, [whole(16, 20), whole(height, 20)], torch.empty(2, 3, 16, 20), antialias=True, **PLAIN)
    assert launches.functions == ["preprocess_float32", "preprocess_float32_antialias"]


def test_calls_queued_behind_a_busy_stream_keep_their_own_pictures(device: torch.device) -> None:
    pictures = [
        Picture((torch.full((2, 2, 3), i, dtype=torch.uint8, device=device),), "rgb", "bt601", True, 0)
        for i in range(50)
    ]
    batches = [torch.empty(1, 3, 4, 4, device=device) for _ in pictures]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second, in which all calls are queued
    for picture, batch in zip(pictures, batches, strict=True):
        preprocess([picture], [whole(4, 4)], batch, **PLAIN)
    for i, batch in enumerate(batches):
        assert (batch.cpu().round() == i).all()


def test_a_call_does_not_wait_for_the_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("only on a GPU is there something to wait for")
    picture = random_picture(np.random.default_rng(10), device, "nv12", (16, 16))
    out = torch.empty(1, 3, 8, 8, device=device)
    preprocess([picture], [whole(8, 8)], out, **PLAIN)  # compiles
    torch.cuda.synchronize(device)
    torch.cuda._sleep(200_000_000)
    preprocess([picture], [whole(8, 8)], out, **PLAIN)
    assert not torch.cuda.current_stream(device).query()


def plane(*shape: int, dtype: torch.dtype = torch.uint8, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("planes", "layout", "message"),
    [
        ((plane(4, 4),), "nv12", "slot 1 is no nv12: its planes have the shapes"),
        ((plane(4, 4), plane(2, 4)), "nv12", "is no nv12"),
        ((plane(4, 4), plane(2, 2, 2), plane(2, 2)), "nv12", "is no nv12"),
        ((plane(4, 4), plane(2, 2), plane(2, 3)), "yuv", "is no yuv"),
        ((plane(4, 4, 4),), "rgb", "is no rgb"),
        ((plane(0, 4, 3),), "rgb", "is no rgb"),
        ((plane(4, 4), plane(2), plane(2)), "yuv", "is no yuv"),
        ((plane(4, 4, 3, dtype=torch.int8),), "rgb", "slot 1 is torch.int8 on cpu; preprocess reads uint8 on cpu"),
        ((plane(4, 4, 3, device="meta"),), "rgb", "slot 1 is torch.uint8 on meta.*move the picture there first"),
    ],
)
def test_a_picture_that_the_kernel_cannot_read_is_refused(
    planes: tuple[Tensor, ...], layout: Literal["yuv", "nv12", "rgb"], message: str
) -> None:
    good = Picture((plane(4, 4, 3),), "rgb", "bt601", False, 0)
    bad = Picture(planes, layout, "bt601", False, 0)
    with pytest.raises(ValueError, match=message):
        preprocess([good, bad], [whole(4, 4)] * 2, torch.empty(2, 3, 4, 4), **PLAIN)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(3, 4, 4), r"not \[3, 4, 4\] of torch.float32"),
        (torch.empty(1, 1, 4, 4), r"not \[1, 1, 4, 4\]"),
        (torch.empty(1, 3, 4, 4, dtype=torch.bfloat16), "of torch.bfloat16"),
        (torch.empty(1, 3, 4, 8)[..., ::2], "contiguous or channels_last"),
        (torch.empty(2, 3, 4, 4), "1 pictures and 1 letterboxes for 2 slots"),
    ],
)
def test_a_batch_that_the_kernel_cannot_fill_is_refused(out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess([Picture((plane(4, 4, 3),), "rgb", "bt601", False, 0)], [whole(4, 4)], out, **PLAIN)


@pytest.mark.parametrize(
    "letterbox",
    [
        Letterbox(1.0, 1.0, -1, 0, 4, 4),
        Letterbox(1.0, 1.0, 1, 0, 4, 4),
        Letterbox(1.0, 1.0, 0, 1, 4, 4),
        Letterbox(1.0, 1.0, 0, 0, 0, 4),
        Letterbox(1.0, 1.0, 0, 0, 4, 0),
    ],
)
def test_a_letterbox_outside_of_the_batch_is_refused(letterbox: Letterbox) -> None:
    with pytest.raises(ValueError, match="slot 0 is empty or leaves the 4 x 4 pixels"):
        preprocess(
            [Picture((plane(4, 4, 3),), "rgb", "bt601", False, 0)], [letterbox], torch.empty(1, 3, 4, 4), **PLAIN
        )
