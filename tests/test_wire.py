"""What the wire says, in both formats, and how a reader takes what is not for it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import streamd.announce
import streamd.wire
from streamd.announce import detections_message, status_message
from streamd.errors import WireError
from streamd.messages import Chart, Result, Segment, StreamState
from streamd.wire import (
    Format,
    Kind,
    Mask,
    channel,
    decode,
    encode,
    stream_key,
    topic,
)
from tests.wire_samples import CAPTURED_AT, LABELS, body, disc, make_message, make_result, make_status, rle

pytestmark = pytest.mark.filterwarnings("ignore:OpenCV .* is not installed")  # supervision's first import

FORMATS: tuple[Format, ...] = ("json", "msgpack")


def test_json_reads_as_the_architecture_says() -> None:
    message = detections_message(make_result(masks=(rle(disc(8, 9, 3)),) * 2), 1234, LABELS, "abc")

    tree = json.loads(encode(message, "json"))

    counts = tree["objects"][0]["mask"].pop("counts")
    assert isinstance(counts, str)
    assert tree.pop("objects")[0] == {
        "label": "person",
        "label_id": 0,
        "score": 0.93,
        "box": [1.23, 2.5, 101.99, 302.0],
        "mask": {"size": [8, 9]},
    }
    assert tree == {
        "schema": 1,
        "stream": "gate",
        "seq": 1234,
        "epoch": 2,
        "pts": 41.133333,
        "captured_at": "2026-01-31T10:00:00.123456Z",
        "clock": "sender",
        "arrived_at": "2026-01-31T10:00:00.373456Z",
        "width": 1920,
        "height": 1080,
        "model": {"name": "people", "sha256": "abc"},
        "ms": {"decode": 3.12, "wait": 4.0, "infer": 6.2, "post": 0.8, "total": 15.0},
        "dropped": 3,
    }


def test_what_a_task_does_not_give_is_left_out() -> None:
    tree = json.loads(encode(make_message()))
    assert set(tree["objects"][0]) == {"label", "label_id", "score", "box"}


@pytest.mark.parametrize("format", FORMATS)
def test_detections_come_back_as_they_were_sent(format: Format) -> None:
    message = detections_message(make_result(masks=(rle(disc(8, 9, 3)),) * 2), 7, LABELS, "abc")
    assert decode(encode(message, format), "detections") == message


@pytest.mark.parametrize("format", FORMATS)
def test_a_status_comes_back_as_it_was_sent(format: Format) -> None:
    message = status_message(make_status(state=StreamState.UNREACHABLE, reason="connection refused"))
    assert decode(encode(message, format), "status") == message
    assert message.state == "unreachable" and message.at == "2026-01-31T10:00:00.123456Z"


def test_a_frame_without_objects_is_a_message_too() -> None:
    message = detections_message(make_result(num_objects=0), 0, LABELS, "")
    assert decode(encode(message), "detections").objects == ()


def test_capture_time_survives_to_the_microsecond() -> None:
    assert make_message().captured_at_s == pytest.approx(CAPTURED_AT, abs=1e-6)


@given(st.floats(min_value=0, max_value=4e9))
def test_every_time_is_written_with_microseconds(unix_s: float) -> None:
    text = streamd.announce._utc(unix_s)
    assert len(text) == len("2026-01-31T10:00:00.123456Z") and text.endswith("Z")


@pytest.mark.parametrize("format", FORMATS)
def test_an_old_client_reads_a_message_with_new_fields(format: Format) -> None:
    codec = msgspec.json if format == "json" else msgspec.msgpack
    tree = codec.decode(encode(make_message(), format))
    tree["weather"] = {"rain": True}
    tree["objects"][0]["velocity"] = [1.0, 2.0]
    assert decode(codec.encode(tree), "detections") == make_message()


@pytest.mark.parametrize("format", FORMATS)
def test_a_message_of_a_newer_schema_says_to_update(format: Format) -> None:
    codec = msgspec.json if format == "json" else msgspec.msgpack
    tree = codec.decode(encode(make_message(), format))
    with pytest.raises(WireError, match="schema 2, but this client reads schema 1: update streamd here"):
        decode(codec.encode({**tree, "schema": 2}), "detections")


@pytest.mark.parametrize("kind", ["detections", "status"])
@pytest.mark.parametrize("payload", [b"", b"{", b"hello", b"{}", b"[]", b"\x80", b"\xff\xfe\x00", b'{"schema": 1}'])
def test_garbage_is_a_wire_error_that_shows_what_came(payload: bytes, kind: Kind) -> None:
    with pytest.raises(WireError, match=f"not a streamd {kind} message"):
        decode(payload, kind)


@given(st.binary(max_size=200))
def test_no_payload_raises_anything_but_a_wire_error(payload: bytes) -> None:
    with pytest.raises(WireError):
        decode(payload, "detections")


def test_a_status_is_no_detections_message() -> None:
    with pytest.raises(WireError, match="not a streamd detections message"):
        decode(encode(status_message(make_status())), "detections")


def test_masks_decode_to_the_pixels_that_were_encoded() -> None:
    pixels = disc(108, 192, 40)
    message = detections_message(make_result(num_objects=1, masks=(rle(pixels),)), 0, LABELS, "")

    mask = decode(encode(message, "msgpack"), "detections").objects[0].mask

    assert mask is not None
    decoded = mask.decode()
    assert decoded.dtype == np.bool_ and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, pixels)


@given(npst.arrays(np.bool_, npst.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_any_mask_decodes_as_pycocotools_encoded_it(pixels: np.ndarray) -> None:
    mask = Mask(size=(pixels.shape[0], pixels.shape[1]), counts=rle(pixels).counts.decode())
    np.testing.assert_array_equal(mask.decode(), pixels)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20))
def test_damaged_run_lengths_give_a_wire_error_or_a_whole_mask(counts: str) -> None:
    try:
        assert Mask(size=(40, 50), counts=counts).decode().shape == (40, 50)
    except WireError as err:
        assert str(err).startswith("damaged mask: ")


@pytest.mark.parametrize("counts", ["", "garbage", "~~~~", "0", "\u20ac"])
def test_a_damaged_mask_is_a_wire_error(counts: str) -> None:
    with pytest.raises(WireError, match=r"damaged mask: (its run lengths are no numbers|.*do not add up to 40 x 50)"):
        Mask(size=(40, 50), counts=counts).decode()


def test_to_supervision_gives_boxes_masks_and_names() -> None:
    pixels = (disc(108, 192, 40), disc(108, 192, 20))
    message = detections_message(make_result(masks=tuple(map(rle, pixels))), 0, LABELS, "")

    detections = message.to_supervision()

    np.testing.assert_allclose(detections.xyxy[0], [1.23, 2.5, 101.99, 302.0], rtol=1e-6)
    np.testing.assert_array_equal(detections.mask, np.stack(pixels))
    assert detections.class_id is not None and detections.class_id.tolist() == [0, 1]
    assert list(detections.data["class_name"]) == ["person", "bicycle"]
    assert detections.tracker_id is None


def test_to_supervision_carries_track_ids() -> None:
    message = make_message()
    tracked = tuple(msgspec.structs.replace(found, id=17 + at) for at, found in enumerate(message.objects))
    ids = msgspec.structs.replace(message, objects=tracked).to_supervision().tracker_id
    assert ids is not None and ids.tolist() == [17, 18]


def test_to_supervision_of_no_objects_is_empty() -> None:
    assert len(detections_message(make_result(num_objects=0), 0, LABELS, "").to_supervision()) == 0


def test_names_on_zeromq_and_redis() -> None:
    assert topic("gate", "detections") == "streamd/gate/detections"
    assert channel("gate", "status") == "streamd:gate:status"
    assert stream_key("gate") == "streamd:gate"


def test_the_shipped_schema_is_that_of_the_structs() -> None:
    shipped = Path(streamd.wire.__file__).with_name("wire.schema.json")
    made = subprocess.run([sys.executable, "-m", "streamd.wire"], capture_output=True, check=True)
    remedy = "make it again: python -m streamd.wire > streamd/wire.schema.json"
    assert shipped.read_bytes() == made.stdout, remedy


@pytest.mark.parametrize("module", ["streamd.wire", "streamd.client"])
def test_a_subscriber_imports_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'av', 'numpy', 'zmq', 'redis', 'supervision', 'pycocotools'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True, env={**os.environ}
    )
    assert run.stdout.strip() == "[]"


def pose_result() -> Result:
    result = make_result(num_objects=1)
    keypoints = np.array([[[12.3456, 7.0, 0.87654], [-3.25, 2000.0, 1.0003]]], np.float32)
    return replace(result, detections=replace(result.detections, keypoints=keypoints))


def panoptic_result() -> Result:
    """Make a frame of 8 x 9 pixels: an object on the left, sky on the right of it, and a column of nothing."""
    left, right = np.zeros((8, 9), bool), np.zeros((8, 9), bool)
    left[:, :3], right[:, 3:8] = True, True
    segments = (
        Segment(label=1, is_thing=True, area=24, mask=rle(left), detection=0),
        Segment(label=2, is_thing=False, area=40, mask=rle(right)),
    )
    result = make_result(num_objects=1)
    frame = replace(result.frame, width=9, height=8)
    return replace(result, frame=frame, detections=replace(result.detections, segments=segments))


@pytest.mark.parametrize("format", FORMATS)
def test_keypoints_are_rounded_and_no_score_is_above_one(format: Format) -> None:
    message = detections_message(pose_result(), 0, LABELS, "")
    assert decode(encode(message, format), "detections") == message
    assert message.objects[0].keypoints == ((12.35, 7.0, 0.8765), (-3.25, 2000.0, 1.0))


@pytest.mark.parametrize("format", FORMATS)
def test_segments_are_named_by_their_kind_of_label(format: Format) -> None:
    message = detections_message(panoptic_result(), 0, LABELS, "", ("things", "grass", "sky"))
    assert decode(encode(message, format), "detections") == message
    assert message.segments is not None
    thing, stuff = message.segments
    assert (thing.label, thing.label_id, thing.thing, thing.area, thing.object) == ("bicycle", 1, True, 24, 0)
    assert (stuff.label, stuff.label_id, stuff.thing, stuff.area, stuff.object) == ("sky", 2, False, 40, None)


def test_a_segment_reads_as_the_documentation_says() -> None:
    message = detections_message(panoptic_result(), 0, LABELS, "", ("things", "grass", "sky"))
    thing, stuff = json.loads(encode(message))["segments"]
    assert set(thing) == {"label", "label_id", "thing", "area", "object", "mask"}
    assert set(stuff) == {"label", "label_id", "thing", "area", "mask"}
    assert set(stuff["mask"]) == {"size", "counts"}


def test_segments_make_a_map_of_their_numbers() -> None:
    message = detections_message(panoptic_result(), 0, LABELS, "", ("things", "grass", "sky"))
    numbers = message.segment_map()
    assert numbers.dtype == np.int32
    np.testing.assert_array_equal(numbers, np.tile([1, 1, 1, 2, 2, 2, 2, 2, 0], (8, 1)))


def test_a_message_without_segments_has_an_empty_map() -> None:
    assert (make_message().segment_map() == np.zeros((1080, 1920))).all()


def test_a_segment_of_another_size_than_the_frame_is_a_wire_error() -> None:
    message = detections_message(panoptic_result(), 0, LABELS, "", ("things", "grass", "sky"))
    with pytest.raises(WireError, match=r"\(8, 9\) pixels in a frame of \(8, 10\)"):
        msgspec.structs.replace(message, width=10).segment_map()


def surface_result() -> Result:
    """Make a frame with one object, whose chart is of 8 x 5 cells over 80 x 50 pixels."""
    result = make_result(num_objects=1)
    chart = Chart((1, 2, 50, 80), body(8, 5))
    return replace(result, detections=replace(result.detections, charts=(chart,)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_chart_comes_back_as_parts_and_coordinates(format: Format) -> None:
    message = detections_message(surface_result(), 0, LABELS, "")
    read = decode(encode(message, format), "detections")
    assert read == message
    chart = read.objects[0].densepose
    assert chart is not None and (chart.box, chart.size) == ((1, 2, 50, 80), (8, 5))
    part, coordinates = chart.decode()
    np.testing.assert_array_equal(part, body(8, 5)[0])
    np.testing.assert_allclose(coordinates, body(8, 5)[1:] / 255, atol=1e-6)
    assert part.dtype == np.uint8 and coordinates.dtype == np.float32


def test_a_chart_reads_as_the_documentation_says() -> None:
    (found,) = json.loads(encode(detections_message(surface_result(), 0, LABELS, "")))["objects"]
    chart = found["densepose"]
    assert set(chart) == {"box", "size", "data"}
    # The documentation's own words, with nothing of streamd.
    rows = np.frombuffer(zlib.decompress(base64.b64decode(chart["data"])), np.uint8).reshape(3, *chart["size"])
    np.testing.assert_array_equal(rows.cumsum(1, dtype=np.uint8), body(8, 5))


def test_a_chart_of_a_hostile_size_is_a_wire_error_and_the_message_is_read_all_the_same() -> None:
    sent = detections_message(surface_result(), 0, LABELS, "")
    content = json.loads(encode(sent))
    content["objects"][0]["densepose"]["size"] = [1 << 30, 1 << 30]
    read = decode(json.dumps(content).encode(), "detections")
    assert read.objects[0].box == sent.objects[0].box and read.objects[0].densepose is not None
    with pytest.raises(WireError, match="size is 1073741824 x 1073741824 cells"):
        read.objects[0].densepose.decode()


def test_a_frame_that_nothing_covers_has_segments_all_the_same() -> None:
    result = make_result(num_objects=0)
    message = detections_message(replace(result, detections=replace(result.detections, segments=())), 0, LABELS, "")
    assert json.loads(encode(message))["segments"] == []
