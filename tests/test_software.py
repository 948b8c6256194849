"""The software decoder gives every picture as it was stored, in order, uncopied, with its stamp, and marks damage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
import torch
from PIL import Image

from streamd.decode.software import SoftwareDecoder, picture_of
from streamd.errors import SourceError
from streamd.messages import Frame, Packet, Picture, Stamp
from streamd.models.spec import ModelSpec
from streamd.runner import assemble
from streamd.sources import Source, SourceOptions, Timeline, open_source
from tests.clips import REST, TOP_LEFT, drawing, turn, write_clip


def read(path: Path) -> tuple[Source, list[Packet]]:
    """Open a clip and number its packets: `arrived_ns` is the index."""
    source = open_source(SourceOptions(str(path)), Timeline())
    packets = [
        replace(packet, stamp=replace(packet.stamp, arrived_ns=index)) for index, packet in enumerate(source.packets())
    ]
    return source, packets


def decode_all(source: Source, packets: list[Packet], first_seq: int = 0) -> Iterator[Frame]:
    decoder = SoftwareDecoder("gate", source.video, first_seq)
    for packet in packets:
        yield from decoder.decode(packet)
    yield from decoder.flush()
    decoder.close()


def decode(path: Path) -> list[Frame]:
    source, packets = read(path)
    with closing(source):
        return list(decode_all(source, packets))


def damaged(packet: Packet) -> Packet:
    """Break the slice data of a packet, behind its headers."""
    data = bytearray(bytes(packet.data))
    data[len(data) // 2 :] = bytes(value ^ 0xFF for value in data[len(data) // 2 :])
    broken = av.Packet(bytes(data))
    broken.pts, broken.dts, broken.time_base = packet.data.pts, packet.data.dts, packet.data.time_base
    broken.is_keyframe = packet.keyframe
    return replace(packet, data=cast("av.Packet[av.VideoStream]", broken))


def to_rgb(picture: Picture) -> np.ndarray:
    """Convert slowly and plainly to RGB [H, W, 3], chroma by the nearest sample, by the picture's matrix and range."""
    planes = [plane.numpy().astype(np.float64) for plane in picture.planes]
    if picture.layout == "rgb":
        return planes[0]
    luma = planes[0]
    chroma = [planes[1][..., 0], planes[1][..., 1]] if picture.layout == "nv12" else planes[1:]
    rows, columns = np.indices(luma.shape)
    blue, red = (
        plane[rows * plane.shape[0] // luma.shape[0], columns * plane.shape[1] // luma.shape[1]] - 128
        for plane in chroma
    )
    if not picture.full_range:
        luma, blue, red = (luma - 16) * 255 / 219, blue * 255 / 224, red * 255 / 224
    kr, kb = (0.2126, 0.0722) if picture.matrix == "bt709" else (0.299, 0.114)
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    return np.stack([r, (luma - kr * r - kb * b) / (1 - kr - kb), b], axis=-1).clip(0, 255)


def test_every_frame_comes_once_in_order_with_its_own_stamp(tmp_path: Path) -> None:
    frames = decode(write_clip(tmp_path / "clip.mp4", 12))
    assert [frame.seq for frame in frames] == list(range(12))
    assert [frame.pts_s for frame in frames] == pytest.approx([index / 25 for index in range(12)])
    assert [frame.stamp.arrived_ns for frame in frames] == list(range(12))
    assert [frame.keyframe for frame in frames] == [index % 5 == 0 for index in range(12)]
    assert not any(frame.corrupt for frame in frames)
    assert all(frame.decode_ms > 0 for frame in frames)


def test_without_b_frames_no_packet_waits_for_the_next_one(tmp_path: Path) -> None:
    source, packets = read(write_clip(tmp_path / "clip.mp4", 12, options={"tune": "zerolatency"}))
    with closing(source):
        decoder = SoftwareDecoder("gate", source.video)
        assert [len(list(decoder.decode(packet))) for packet in packets] == [1] * 12
        assert list(decoder.flush()) == []


def test_numbering_goes_on_after_a_reconnect(tmp_path: Path) -> None:
    source, packets = read(write_clip(tmp_path / "clip.mp4", 3))
    with closing(source):
        assert [frame.seq for frame in decode_all(source, packets, first_seq=40)] == [40, 41, 42]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts", "clip.mkv"])
def test_b_frames_come_in_order_of_presentation_each_with_its_own_stamp(tmp_path: Path, name: str) -> None:
    path = write_clip(tmp_path / name, 20, gop=10, b_frames=3, options={"x264-params": "b-adapt=0"})
    source, packets = read(path)
    with closing(source):
        frames = list(decode_all(source, packets))
    pts = [frame.pts_s for frame in frames]
    arrived = [frame.stamp.arrived_ns for frame in frames]
    assert pts == sorted(pts) and len(frames) == 20
    assert arrived != sorted(arrived), "the clip has no B-frames"
    time_base = float(source.video.time_base or 0)
    for frame in frames:
        packet = packets[frame.stamp.arrived_ns].data
        assert packet.pts is not None and packet.pts * time_base == pytest.approx(frame.pts_s)


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("name", ["clip.h264", "clip.avi"])
def test_a_container_without_presentation_times_gives_rising_ones(tmp_path: Path, name: str, b_frames: int) -> None:
    pts = [frame.pts_s for frame in decode(write_clip(tmp_path / name, 20, b_frames=b_frames))]
    assert len(pts) == 20
    steps = np.diff(pts)
    assert np.median(steps) == pytest.approx(0.04, rel=0.01)
    assert np.all(steps[: 20 - b_frames - 1] > 0), "FFmpeg knows no times of the frames that it held back at the end"


EXACT = {  # formats that are handed over as they are: (codec, container) -> layout
    ("libx264", "yuv420p", "mp4"): "yuv",
    ("libx264", "yuv422p", "mkv"): "yuv",
    ("libx264", "yuv444p", "mkv"): "yuv",
    ("libx264", "yuvj420p", "mp4"): "yuv",
    ("libx265", "yuv420p", "mp4"): "yuv",
    ("mjpeg", "yuvj420p", "avi"): "yuv",
    ("mjpeg", "yuvj422p", "avi"): "yuv",
    ("mjpeg", "yuvj444p", "avi"): "yuv",
    ("ffv1", "yuv410p", "mkv"): "yuv",
    ("ffv1", "yuv411p", "mkv"): "yuv",
    ("ffv1", "yuv440p", "mkv"): "yuv",
    ("rawvideo", "nv12", "mkv"): "nv12",
    ("rawvideo", "rgb24", "nut"): "rgb",
}
CONVERTED = {
    ("libx264", "yuv420p10le", "mp4"): "yuv",
    ("libx264", "yuv422p10le", "mkv"): "yuv",
    ("libx265", "yuv420p10le", "mkv"): "yuv",
    ("libx265", "yuv422p12le", "mkv"): "yuv",
    ("ffv1", "yuv420p10le", "mkv"): "yuv",
    ("libx264rgb", "rgb24", "mkv"): "rgb",
    ("ffv1", "gray", "mkv"): "rgb",
    ("ffv1", "gray10le", "mkv"): "rgb",
    ("rawvideo", "yuyv422", "mkv"): "rgb",
    ("rawvideo", "bgr24", "avi"): "rgb",
}


def write_format(tmp_path: Path, codec: str, pixel_format: str, container: str, size: tuple[int, int]) -> Path:
    options = {"libx265": {"x265-params": "log-level=none"}, "mjpeg": {"q:v": "2"}}.get(codec, {})
    return write_clip(
        tmp_path / f"clip.{container}", 2, codec=codec, pixel_format=pixel_format, size=size, options=options
    )


@pytest.mark.parametrize(("codec", "pixel_format", "container"), [*EXACT, *CONVERTED])
def test_every_pixel_format_shows_the_picture(tmp_path: Path, codec: str, pixel_format: str, container: str) -> None:
    size = (64, 48)
    frame = decode(write_format(tmp_path, codec, pixel_format, container, size))[0]
    assert frame.picture.layout == (EXACT | CONVERTED)[codec, pixel_format, container]
    assert (frame.width, frame.height) == size
    difference = np.abs(to_rgb(frame.picture) - drawing(0, size))
    assert np.median(difference) <= 3, f"{pixel_format} became {frame.picture.layout} with wrong colours"
    assert np.percentile(difference, 90) <= 8


@pytest.mark.parametrize("size", [(320, 240), (1280, 720)])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le", "yuv422p12le", "p010le", "yuyv422"])
def test_colours_are_those_of_the_size_s_matrix_where_the_stream_names_none(
    pixel_format: str, full_range: bool, size: tuple[int, int]
) -> None:
    quarters = np.array([[(220, 40, 40), (40, 200, 60)], [(50, 60, 210), (128, 128, 128)]], np.uint8)
    colours = quarters.repeat(size[1] // 2, axis=0).repeat(size[0] // 2, axis=1)
    decoded = av.VideoFrame.from_ndarray(colours, format="rgb24").reformat(
        format=pixel_format,
        dst_colorspace="ITU709" if size[1] >= 720 else "ITU601",
        dst_color_range="JPEG" if full_range else "MPEG",
    )
    decoded.colorspace = 2  # unspecified
    picture = picture_of(decoded)
    assert picture.full_range == full_range
    inner = np.abs(to_rgb(picture) - colours)[8:-8:4, 8:-8:4]
    assert np.percentile(inner, 95) <= 6, "with the other matrix it is 20 and more"


@pytest.mark.parametrize("size", [(64, 48), (35, 27), (33, 2), (2, 2), (1, 1), (3, 1)])
@pytest.mark.parametrize(("codec", "pixel_format"), [("ffv1", "yuv420p"), ("ffv1", "yuv410p"), ("png", "rgb24")])
def test_odd_and_tiny_sizes_keep_their_size(
    tmp_path: Path, codec: str, pixel_format: str, size: tuple[int, int]
) -> None:
    if codec == "png":
        path = write_clip(tmp_path / "a.png", 1, codec=codec, pixel_format=pixel_format, size=size, container="image2")
    else:
        path = write_format(tmp_path, codec, pixel_format, "mkv", size)
    frame = decode(path)[0]
    assert (frame.width, frame.height) == size
    assert frame.picture.planes[0].shape[:2] == (size[1], size[0])
    luma = frame.picture.planes[0].numpy()
    assert luma.reshape(size[1], size[0], -1)[0, 0, 0] >= TOP_LEFT - 30


@pytest.mark.parametrize("size", [(2, 2), (34, 26), (66, 50)])
def test_small_h264_is_cropped_to_its_size(tmp_path: Path, size: tuple[int, int]) -> None:
    frame = decode(write_clip(tmp_path / "clip.mp4", 2, size=size))[0]
    assert (frame.width, frame.height) == size
    assert [tuple(plane.shape) for plane in frame.picture.planes] == [
        (size[1], size[0]),
        (size[1] // 2, size[0] // 2),
        (size[1] // 2, size[0] // 2),
    ]


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "I;16", "CMYK"])
def test_pictures_of_every_kind_become_rgb_or_yuv(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    grey = drawing(0, (64, 48))[..., 0]
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif mode == "1":
        Image.fromarray(grey).point(lambda value: 255 * (value > 128)).convert("1").save(path)
    else:
        Image.fromarray(drawing(0, (64, 48))).convert(mode).save(path)
    (frame,) = decode(path)
    rgb = to_rgb(frame.picture)
    assert rgb.shape == (48, 64, 3)
    assert rgb[4, 4].min() > TOP_LEFT - 10 and rgb[40, 60].max() < REST + 15  # a palette is coarse


def luma_quarters(frame: Frame) -> list[str]:
    """Say which quarters of the stored picture are bright."""
    luma = frame.picture.planes[0].float()
    height, width = luma.shape
    halves = {"top": slice(0, height // 2), "bottom": slice(height // 2, None)}
    sides = {"left": slice(0, width // 2), "right": slice(width // 2, None)}
    return [f"{v} {h}" for v, rows in halves.items() for h, cols in sides.items() if luma[rows, cols].mean() > 150]


CORNERS = {0: "top left", 90: "top right", 180: "bottom right", 270: "bottom left"}  # where a clockwise turn takes it


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_display_matrix_is_the_turn_that_makes_the_picture_upright(tmp_path: Path, degrees: int) -> None:
    clip = write_clip(tmp_path / "stored.mp4", 2)
    frame = decode(turn(clip, tmp_path / "turned.mp4", degrees))[0]
    assert luma_quarters(frame) == ["top left"], "the stored picture stays as it is"
    assert frame.picture.rotation == (360 - degrees) % 360, "counter-clockwise"
    assert (frame.width, frame.height) == ((64, 48) if degrees in (0, 180) else (48, 64))
    upright = np.rot90(frame.picture.planes[0].numpy(), frame.picture.rotation // 90)
    turned = replace(frame, picture=replace(frame.picture, planes=(torch.from_numpy(upright.copy()),)))
    assert luma_quarters(turned) == [CORNERS[degrees]]


@pytest.mark.parametrize(("orientation", "degrees"), [(1, 0), (6, 90), (3, 180), (8, 270)])
def test_the_orientation_of_a_photograph_is_its_rotation(tmp_path: Path, orientation: int, degrees: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(drawing(0, (64, 48))).save(tmp_path / "a.jpg", exif=exif)
    (frame,) = decode(tmp_path / "a.jpg")
    assert frame.picture.rotation == (360 - degrees) % 360
    assert (frame.width, frame.height) == ((64, 48) if degrees in (0, 180) else (48, 64))


def test_a_turned_clip_stands_upright_in_the_batch(tmp_path: Path) -> None:
    frame = decode(turn(write_clip(tmp_path / "stored.mp4", 2), tmp_path / "turned.mp4", 90))[0]
    spec = ModelSpec(name="m", task="detect", labels=("a",), input_size=(64, 48), colour="rgb")
    image = assemble([frame], spec, torch.empty(1, 3, 64, 48)).images[0]
    assert image[:, 8, 40].min() > TOP_LEFT - 10, "the bright quarter is at the top right"
    assert max(image[:, 8, 8].max(), image[:, 56, 8].max(), image[:, 56, 40].max()) < REST + 10


@pytest.mark.parametrize("pixel_format", ["yuv420p", "nv12", "rgb24"])
def test_planes_share_ffmpeg_s_memory_and_outlive_the_decoder(pixel_format: str) -> None:
    decoded = av.VideoFrame.from_ndarray(drawing(0, (34, 26)), format="rgb24").reformat(format=pixel_format)
    picture = picture_of(decoded)
    assert [plane.data_ptr() for plane in picture.planes] == [plane.buffer_ptr for plane in decoded.planes]
    assert [plane.stride(0) for plane in picture.planes] == [plane.line_size for plane in decoded.planes]
    before = [plane.clone() for plane in picture.planes]
    del decoded
    gc.collect()
    assert all(torch.equal(plane, copy) for plane, copy in zip(picture.planes, before, strict=True))


@pytest.mark.parametrize(
    ("colourspace", "height", "matrix"),
    [
        (1, 480, "bt709"),
        (5, 1080, "bt601"),
        (6, 1080, "bt601"),
        (2, 1080, "bt709"),
        (2, 720, "bt709"),
        (2, 576, "bt601"),
    ],
)
def test_the_colour_matrix_is_the_stream_s_or_that_of_its_size(colourspace: int, height: int, matrix: str) -> None:
    decoded = av.VideoFrame(64, height, "yuv420p")
    decoded.colorspace = colourspace
    assert picture_of(decoded).matrix == matrix


def test_the_range_is_full_where_the_stream_says_so() -> None:
    decoded = av.VideoFrame(64, 48, "yuv420p")
    assert not picture_of(decoded).full_range
    decoded.color_range = 2
    assert picture_of(decoded).full_range
    assert picture_of(av.VideoFrame(64, 48, "yuvj420p")).full_range


def test_frames_after_damage_are_marked_until_the_next_key_frame(tmp_path: Path) -> None:
    source, packets = read(write_clip(tmp_path / "clip.mp4", 30, gop=10, size=(128, 96)))
    packets[13] = damaged(packets[13])
    with closing(source):
        frames = {frame.stamp.arrived_ns: frame.corrupt for frame in decode_all(source, packets)}
    assert [index for index in range(30) if index not in frames or frames[index]] == list(range(13, 20))
    assert all(frames[index] for index in range(14, 20)), "they come, and they are marked"


def test_a_damaged_key_frame_spoils_its_group_and_no_other(tmp_path: Path) -> None:
    source, packets = read(write_clip(tmp_path / "clip.mp4", 30, gop=10, size=(128, 96)))
    packets[10] = damaged(packets[10])
    with closing(source):
        good = [frame.stamp.arrived_ns for frame in decode_all(source, packets) if not frame.corrupt]
    assert good == [*range(10), *range(20, 30)]


def test_with_b_frames_the_mark_stays_with_the_damaged_group(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "c.mp4", 30, gop=10, size=(128, 96), b_frames=2, options={"x264-params": "open-gop=0"})
    source, packets = read(path)
    keyframes = [index for index, packet in enumerate(packets) if packet.keyframe]
    broken = keyframes[1] + 1
    packets[broken] = damaged(packets[broken])
    with closing(source):
        good = {frame.stamp.arrived_ns for frame in decode_all(source, packets) if not frame.corrupt}
    assert good == {*range(broken), *range(keyframes[2], 30)}


def test_after_a_picture_that_lacks_a_slice_all_are_marked_until_the_next_key_frame(tmp_path: Path) -> None:
    """The decoder conceals the place and calls that picture corrupt, but none of those that refer to it."""
    path = tmp_path / "c.mp4"
    source, packets = read(write_clip(path, 30, gop=10, size=(128, 96), options={"x264-params": "slices=4"}))
    data = bytes(packets[13].data)
    first = 4 + int.from_bytes(data[:4], "big")
    lacking = av.Packet(data[first:])
    lacking.pts, lacking.dts, lacking.time_base = (
        packets[13].data.pts,
        packets[13].data.dts,
        packets[13].data.time_base,
    )
    packets[13] = replace(packets[13], data=cast("av.Packet[av.VideoStream]", lacking))
    with closing(source):
        frames = {frame.stamp.arrived_ns: frame.corrupt for frame in decode_all(source, packets)}
    assert [index for index in range(30) if index not in frames or frames[index]] == list(range(13, 20))


def test_a_long_group_of_pictures_keeps_no_packet(tmp_path: Path) -> None:
    source, packets = read(write_clip(tmp_path / "c.mp4", 400, gop=400, b_frames=2))
    with closing(source):
        decoder = SoftwareDecoder("gate", source.video)
        num_alive = []
        seen: set[int] = set()
        packets.reverse()
        while packets:
            for frame in decoder.decode(packets.pop()):
                seen.add(frame.seq)
            if len(packets) % 100 == 0:
                gc.collect()
                num_alive.append(sum(type(thing) is Stamp for thing in gc.get_objects()) - len(packets))
        seen.update(frame.seq for frame in decoder.flush())
    assert seen == set(range(400))
    assert max(num_alive) - min(num_alive) <= 8


def test_packets_that_the_transport_marked_make_corrupt_frames(tmp_path: Path) -> None:
    source, packets = read(write_clip(tmp_path / "clip.mp4", 15, gop=5))
    packets[7] = replace(packets[7], corrupt=True)
    with closing(source):
        frames = list(decode_all(source, packets))
    assert [frame.seq for frame in frames if frame.corrupt] == [7, 8, 9]


def test_a_stream_of_which_no_key_frame_can_be_decoded_is_unsupported(tmp_path: Path) -> None:
    source, packets = read(write_clip(tmp_path / "clip.mp4", 30, gop=10, size=(128, 96)))
    packets = [damaged(packet) for packet in packets]
    frames: list[Frame] = []
    with (
        closing(source),
        pytest.raises(SourceError, match="none of 3 key frames can be decoded: is the stream") as caught,
    ):
        frames.extend(decode_all(source, packets))
    assert caught.value.state == "unsupported" and caught.value.permanent


@pytest.mark.parametrize("pixel_format", ["gray32le", "yaf32le"])
def test_a_format_that_ffmpeg_does_not_convert_is_unsupported(pixel_format: str) -> None:
    with pytest.raises(SourceError, match=pixel_format) as caught:
        picture_of(av.VideoFrame(64, 48, pixel_format))
    assert caught.value.state == "unsupported"


def test_noise_in_place_of_a_packet_raises_nothing(tmp_path: Path) -> None:
    source, packets = read(write_clip(tmp_path / "clip.mp4", 20, gop=5))
    rng = np.random.default_rng(0)
    for index in range(0, 20, 2):
        noise = av.Packet(rng.bytes(int(rng.integers(1, 300))))
        packets[index] = replace(packets[index], data=cast("av.Packet[av.VideoStream]", noise))
    with closing(source):
        assert all(frame.corrupt for frame in decode_all(source, packets) if frame.stamp.arrived_ns % 5)


def test_a_resolution_that_changes_in_mid_stream_changes_the_frames(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "small.h264", 10, size=(64, 48)).read_bytes()
    large = write_clip(tmp_path / "large.h264", 10, size=(128, 96)).read_bytes()
    (tmp_path / "both.h264").write_bytes(small + large + small)
    sizes = [(frame.width, frame.height) for frame in decode(tmp_path / "both.h264")]
    assert sizes == [(64, 48)] * 10 + [(128, 96)] * 10 + [(64, 48)] * 10


def test_decoded_packets_are_freed(tmp_path: Path) -> None:
    """A packet that FFmpeg keeps a Python reference to, and that itself holds FFmpeg's, would stay for ever."""
    path = write_clip(tmp_path / "clip.mp4", 50)
    gc.collect()
    before = sum(type(thing) in (Packet, Stamp) for thing in gc.get_objects())
    decode(path)
    gc.collect()
    assert sum(type(thing) in (Packet, Stamp) for thing in gc.get_objects()) == before
