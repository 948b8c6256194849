"""A group put into a file of its own gives exactly the frames that the stream gives, or an error that says why not."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from PIL import Image

from streamd.decode.gop import Gop, GopError, GopSplitter, nal_length_size, nal_units, parameter_sets
from streamd.decode.remux import Chunk, Remuxer, jpeg_size
from streamd.messages import Packet
from streamd.sources import Source
from tests.clips import drawing, turn, write_clip
from tests.decoding import packets_of, recode

Times = list[tuple[int | None, np.ndarray]]


def gops_of(source: Source, packets: list[Packet]) -> list[Gop]:
    context = source.video.codec_context
    splitter = GopSplitter(context.name, context.extradata)
    return [*(gop for packet in packets for gop in splitter.feed(packet)), *splitter.flush()]


def chunks_of(path: Path) -> list[Chunk]:
    with packets_of(path) as (source, packets):
        remuxer = Remuxer(source.video)
        chunks = [remuxer.chunk(gop) for gop in gops_of(source, packets)]
        remuxer.close()
        return chunks


def decoded(chunks: list[Chunk]) -> Times:
    """Decode each chunk by itself and give its frames the times of their packets."""
    frames: Times = []
    for chunk in chunks:
        with av.open(io.BytesIO(chunk.data), "r") as file:
            pictures = [frame.to_ndarray() for frame in file.decode(video=0)]
        assert chunk.num_bytes == len(pictures) * 3 * file_size(chunk)
        frames += zip((packet.data.pts for packet in chunk.packets), pictures, strict=True)
    return frames


def file_size(chunk: Chunk) -> int:
    with av.open(io.BytesIO(chunk.data), "r") as file:
        return file.streams.video[0].width * file.streams.video[0].height


def assert_exact(path: Path, num_chunks: int | None = None) -> list[Chunk]:
    chunks = chunks_of(path)
    assert num_chunks is None or len(chunks) == num_chunks
    with av.open(str(path)) as file:
        expected = [(frame.pts, frame.to_ndarray()) for frame in file.decode(video=0)]
    frames = decoded(chunks)
    assert [pts for pts, _ in frames] == [pts for pts, _ in expected]
    assert all(np.array_equal(picture, other) for (_, picture), (_, other) in zip(frames, expected, strict=True))
    return chunks


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts", "clip.mkv"])
@pytest.mark.parametrize("b_frames", [0, 3])
def test_chunks_of_h264_give_the_frames_of_the_stream(tmp_path: Path, name: str, b_frames: int) -> None:
    options = {"x264-params": "b-adapt=0"} if b_frames else None
    assert_exact(write_clip(tmp_path / name, 24, gop=8, b_frames=b_frames, options=options), 3)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts"])
@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 0), ("libx264", 2), ("libx265", 0), ("libx265", 2)])
def test_chunks_of_real_scenes_give_the_frames_of_the_stream(
    shared: Path, tmp_path: Path, codec: str, b_frames: int, name: str
) -> None:
    scene = shared / "videos" / "bikes.mp4"
    clip = recode(scene, tmp_path / name, codec, num_frames=40, size=(320, 180), gop=16, b_frames=b_frames)
    assert_exact(clip, 3)


@pytest.mark.parametrize("name", ["bikes.mp4", "pose2sim-multi-cam01.mp4"])
def test_chunks_of_other_people_s_files_give_their_frames(shared: Path, name: str) -> None:
    assert_exact(shared / "videos" / name)


def test_chunks_of_open_groups_give_the_frames_of_the_stream(demo_clip: Path, tmp_path: Path) -> None:
    clip = recode(
        demo_clip, tmp_path / "c.mp4", "libx265", num_frames=24, size=(160, 144), gop=8, b_frames=2, open_gop=True
    )
    assert_exact(clip, 1)


def test_chunks_of_vp9_give_the_frames_of_the_stream(tmp_path: Path) -> None:
    options = {"deadline": "realtime", "g": "8", "keyint_min": "8", "lag-in-frames": "0"}
    assert_exact(write_clip(tmp_path / "clip.mkv", 24, codec="libvpx-vp9", options=options), 3)


def test_a_chunk_s_file_says_how_many_frames_it_holds_and_shows_all_of_them(tmp_path: Path) -> None:
    """DALI allocates by the header's count, leaves out negative times, and tells frames apart by their times."""
    clip = write_clip(tmp_path / "clip.mp4", 24, gop=8, b_frames=3, options={"x264-params": "b-adapt=0"})
    for chunk in chunks_of(clip):
        with av.open(io.BytesIO(chunk.data), "r") as file:
            packets = [packet for packet in file.demux(video=0) if packet.size]
            assert file.streams.video[0].frames == len(packets) == 8
        shown = sorted(packets, key=lambda packet: packet.pts or 0)
        assert shown != packets, "the clip has no B-frames"
        assert [bytes(packet) for packet in shown] == [bytes(packet.data) for packet in chunk.packets]
        assert len({packet.pts for packet in packets}) == 8 and shown[0].pts is not None and shown[0].pts >= 0
        assert not any(packet.is_discard for packet in packets)


def without_sets(packet: Packet) -> Packet:
    """Leave the parameter sets out of an Annex B packet, as cameras do that send them in the SDP alone."""
    kept = [unit for unit in nal_units(bytes(packet.data), 0) if unit[0] & 0x1F not in (7, 8)]
    data = av.Packet(b"".join(b"\0\0\0\1" + unit for unit in kept))
    data.pts, data.dts, data.time_base = packet.data.pts, packet.data.dts, packet.data.time_base
    data.is_keyframe = packet.keyframe
    return replace(packet, data=cast("av.Packet[av.VideoStream]", data))


def test_parameter_sets_are_remembered_where_only_the_first_key_frame_has_them(tmp_path: Path) -> None:
    with packets_of(write_clip(tmp_path / "clip.ts", 16, gop=8)) as (source, packets):
        source.video.codec_context.extradata = None
        expected = decoded([Remuxer(source.video).chunk(gop) for gop in gops_of(source, packets)])
        remuxer = Remuxer(source.video)
        gops = gops_of(source, [packets[0], *map(without_sets, packets[1:])])
        frames = decoded([remuxer.chunk(gop) for gop in gops])
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(frames, expected, strict=True))


def test_parameter_sets_are_taken_from_the_sdp_where_no_key_frame_has_them(tmp_path: Path) -> None:
    with packets_of(write_clip(tmp_path / "clip.ts", 16, gop=8)) as (source, packets):
        sets = parameter_sets(list(nal_units(bytes(packets[0].data), 0)), "h264")
        source.video.codec_context.extradata = b"".join(b"\0\0\0\1" + unit for unit in sets)
        remuxer = Remuxer(source.video)
        assert len(decoded([remuxer.chunk(gop) for gop in gops_of(source, list(map(without_sets, packets)))])) == 16


def test_without_parameter_sets_a_group_is_refused(tmp_path: Path) -> None:
    with packets_of(write_clip(tmp_path / "clip.ts", 8, gop=8)) as (source, packets):
        source.video.codec_context.extradata = None
        (gop,) = gops_of(source, list(map(without_sets, packets)))
        with pytest.raises(GopError, match="no SPS and PPS"):
            Remuxer(source.video).chunk(gop)


def test_a_new_picture_size_begins_with_a_new_header(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "small.ts", 8, gop=8, size=(64, 48))
    large = write_clip(tmp_path / "large.ts", 8, gop=8, size=(96, 720))
    with packets_of(small) as (source, packets), packets_of(large) as (_, others):
        remuxer = Remuxer(source.video)
        gops = [gop for part in (packets, others, packets) for gop in gops_of(source, part)]
        chunks = [remuxer.chunk(gop) for gop in gops]
        assert [file_size(chunk) for chunk in chunks] == [64 * 48, 96 * 720, 64 * 48]
        assert [chunk.look.matrix for chunk in chunks] == ["bt601", "bt709", "bt601"]
        assert [picture.shape[1] for _, picture in decoded(chunks)] == [64] * 8 + [96] * 8 + [64] * 8


def refused(path: Path, change: Callable[[list[Packet]], list[Packet]] = lambda packets: packets) -> str:
    with packets_of(path) as (source, packets):
        gop = Gop(tuple(change(packets)))
        with pytest.raises(GopError) as caught:
            Remuxer(source.video).chunk(gop)
        return str(caught.value)


def test_formats_that_gpus_do_not_decode_are_refused_by_name(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 4, gop=4, pixel_format="yuv422p")
    assert refused(clip) == "yuv422p video is not decoded by DALI"
    clip = write_clip(tmp_path / "b.mp4", 4, gop=4, options={"x264-params": "interlaced=1"})
    assert refused(clip) == "interlaced video is not decoded by DALI"
    assert_exact(write_clip(tmp_path / "c.mp4", 4, gop=4, pixel_format="yuv420p10le"), 1)


def test_a_group_that_begins_in_the_middle_is_refused(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 8, gop=8)
    assert refused(clip, lambda packets: packets[1:]) == "its first picture is no IDR picture"


def test_a_first_picture_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    def spoilt(packets: list[Packet]) -> list[Packet]:
        data = bytearray(bytes(packets[0].data))
        size = nal_length_size("h264", b"\1\0\0\0\xff")
        for unit in nal_units(bytes(data), size):
            if unit[0] & 0x1F == 5:
                start = data.index(unit)
                data[start + 4 :] = bytes(value ^ 0xFF for value in data[start + 4 :])
        broken = av.Packet(bytes(data))
        broken.pts, broken.is_keyframe = packets[0].data.pts, True
        return [replace(packets[0], data=cast("av.Packet[av.VideoStream]", broken)), *packets[1:]]

    assert refused(write_clip(tmp_path / "a.mp4", 4, gop=4, size=(128, 96)), spoilt) == (
        "its first picture cannot be decoded"
    )


def test_lengths_that_dali_does_not_read_are_refused(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 2, gop=2)
    with packets_of(clip) as (source, packets):
        record = bytearray(source.video.codec_context.extradata or b"")
        record[4] = 0xFD
        source.video.codec_context.extradata = bytes(record)
        with pytest.raises(GopError, match="lengths of 2 bytes"):
            Remuxer(source.video).chunk(Gop(tuple(packets)))


@pytest.mark.parametrize(("size", "matrix"), [((64, 48), "bt601"), ((1280, 720), "bt709")])
def test_a_chunk_says_how_its_colours_are_meant(tmp_path: Path, size: tuple[int, int], matrix: str) -> None:
    (chunk,) = chunks_of(write_clip(tmp_path / "a.mp4", 2, gop=2, size=size))
    assert chunk.look.matrix == matrix and not chunk.look.full_range and chunk.look.planes == ()


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_chunk_says_how_its_pictures_must_be_turned(tmp_path: Path, degrees: int) -> None:
    clip = turn(write_clip(tmp_path / "stored.mp4", 2, gop=2), tmp_path / "turned.mp4", degrees)
    (chunk,) = chunks_of(clip)
    assert chunk.look.rotation == (360 - degrees) % 360


def jpeg(size: tuple[int, int] = (64, 48), **options: bool) -> bytes:
    out = io.BytesIO()
    Image.fromarray(drawing(0, size)).save(out, "jpeg", **options)
    return out.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
@pytest.mark.parametrize("size", [(64, 48), (35, 27), (1, 1)])
def test_a_jpeg_s_size_stands_in_its_header(size: tuple[int, int], options: dict[str, bool]) -> None:
    assert jpeg_size(jpeg(size, **options)) == size
    assert jpeg_size(jpeg(size, **options) + bytes(20)) == size, "padded by the camera"


def test_a_jpeg_that_is_not_whole_is_refused() -> None:
    whole = jpeg()
    for length in range(len(whole) - 1):
        with pytest.raises(GopError):
            jpeg_size(whole[:length])


def test_a_jpeg_without_tables_is_refused() -> None:
    data, position = bytearray(jpeg()), 0
    while (position := data.find(b"\xff\xc4")) >= 0:
        del data[position : position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")]
    with pytest.raises(GopError, match="no Huffman tables"):
        jpeg_size(bytes(data))


def test_an_mjpeg_camera_s_picture_is_its_own_file(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mkv", 3, codec="mjpeg", pixel_format="yuvj420p")
    chunks = chunks_of(path)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert isinstance(stream, VideoStream)
        assert [chunk.data for chunk in chunks] == [bytes(packet) for packet in file.demux(stream) if packet.size]
    assert [chunk.num_bytes for chunk in chunks] == [3 * 64 * 48] * 3
    assert chunks[0].look.matrix == "bt601"
