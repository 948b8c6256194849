"""The messages on the wire, for both ends: JSON or msgpack from one set of structs.

    python -m streamd.wire > streamd/wire.schema.json       make the JSON Schema again

Readers skip fields that they do not know, so a field may be added without a new schema number and old clients live on.
Imports neither torch nor av nor numpy, so that a subscriber starts fast.
"""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, overload

import msgspec
from msgspec import Meta, Struct

from streamd.errors import WireError

if TYPE_CHECKING:
    import numpy as np
    import supervision as sv

SCHEMA: Literal[1] = 1  # raised only when an old client would misread a message; a new field does not raise it

MAX_PAYLOAD_BYTES = 64 << 20  # of a message; one of a thousand masks has 1 MB
MAX_PIXELS = 1 << 27  # of a frame: a message that says more would have the reader make room for them

Kind = Literal["detections", "status"]
Format = Literal["json", "msgpack"]
KINDS: tuple[Kind, ...] = ("detections", "status")

_MAX_LABEL = 1024  # characters
_MAX_INT = 2**63 - 1  # what numpy takes
_Id = Annotated[int, Meta(ge=-_MAX_INT, le=_MAX_INT)]

Point = Annotated[
    tuple[float, float, float],
    Meta(description="x and y in source pixels, not clipped to the frame; score in 0..1, high where the point is sure"),
]
Utc = Annotated[str, Meta(description="ISO 8601 in UTC with microseconds, for example 2026-01-31T10:00:00.123456Z")]


class Mask(Struct, frozen=True, kw_only=True):
    """A binary mask at source size as COCO run lengths, as pycocotools reads them."""

    size: Annotated[tuple[int, int], Meta(description="height, width in source pixels")]
    counts: Annotated[str, Meta(description="COCO's compressed run lengths, column by column")]

    def decode(self) -> np.ndarray:
        """Return the mask as bool [height, width]; raise WireError where the size or the run lengths are damaged.

        pycocotools would leave pixels that no run covers uninitialised.
        """
        import numpy as np

        height, width = self.size
        if min(height, width) < 0 or height * width > MAX_PIXELS:
            raise WireError(f"damaged mask: its size is {height} x {width}, want {MAX_PIXELS} pixels at most")
        runs = np.array(_run_lengths(self.counts), dtype=np.int64)
        if runs.sum() != height * width:
            raise WireError(f"damaged mask: the run lengths do not add up to {height} x {width} pixels")
        columns = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height)
        return np.ascontiguousarray(columns.T)


class SurfaceChart(Struct, frozen=True, kw_only=True):
    """Which point of a body's surface each cell of a box shows, as DensePose describes it."""

    box: Annotated[
        tuple[int, int, int, int],
        Meta(description="x, y, width, height in whole source pixels; the cells share it evenly"),
    ]
    size: Annotated[tuple[int, int], Meta(description="height, width in cells, 128 at most; small boxes: one a pixel")]
    data: Annotated[
        bytes, Meta(description="zlib of three planes of uint8, part, U, V; each row less the row above, modulo 256")
    ]

    def decode(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the part of each cell, uint8 [height, width], and its U and V, float32 [2, height, width] in 0..1.

        Part 0 is the background, where U and V mean nothing. Raises WireError where the bytes are damaged.
        """
        import numpy as np

        from streamd import charts

        part, *coordinates = charts.unpack(self.data, self.size)
        return part, np.stack(coordinates).astype(np.float32) / 255


class DetectedObject(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One object of a frame; what the model's task does not give is left out."""

    id: Annotated[_Id | None, Meta(description="track id, unique within the stream and epoch")] = None
    label: str
    label_id: Annotated[int, Meta(ge=0, le=_MAX_INT, description="index into the model's labels")]
    score: Annotated[float, Meta(description="0..1")]
    box: Annotated[tuple[float, float, float, float], Meta(description="x1, y1, x2, y2 in source pixels")]
    mask: Mask | None = None
    keypoints: Annotated[tuple[Point, ...] | None, Meta(description="in the model's order")] = None
    densepose: SurfaceChart | None = None


class Segment(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A region of one label; the segments of a frame do not overlap."""

    label: str
    label_id: Annotated[
        int,
        Meta(ge=0, description="index into the model's labels; for a panoptic model's stuff into its stuff labels"),
    ]
    thing: Annotated[bool, Meta(description="one object, not stuff such as grass")]
    area: Annotated[int, Meta(description="source pixels")]
    object: Annotated[int | None, Meta(description="of a thing: its index in `objects`")] = None
    mask: Mask


class ModelName(Struct, frozen=True, kw_only=True):
    """Which model saw the objects."""

    name: Annotated[str, Meta(description="its name in the daemon's configuration")]
    sha256: Annotated[str, Meta(description="of the weights, empty where it is not known")]


class Milliseconds(Struct, frozen=True, kw_only=True):
    """Where the frame spent its time in the daemon."""

    decode: float
    wait: Annotated[float, Meta(description="until a batch took the frame")]
    infer: Annotated[float, Meta(description="letterbox, model and suppression, of the whole batch")]
    post: Annotated[float, Meta(description="what is then left for the host: masks, segments")]
    total: Annotated[float, Meta(description="arrival of the packet to the end of post-processing")]


class DetectionsMessage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one model saw in one frame of one stream."""

    schema: Literal[1]
    stream: str
    seq: Annotated[int, Meta(description="counts this stream's detections messages; a jump is a loss")]
    epoch: Annotated[int, Meta(description="counts connections and time jumps; pts compares within one epoch")]
    pts: Annotated[float, Meta(description="presentation time in the stream's own clock, seconds")]
    captured_at: Utc
    clock: Annotated[
        Literal["sender", "arrival"],
        Meta(description="captured_at is the camera's own time (sender) or when the packet came (arrival)"),
    ]
    arrived_at: Annotated[
        str, Meta(description="when the packet came, by the daemon's clock; as captured_at, but empty if not told")
    ] = ""
    width: Annotated[int, Meta(description="of the frame as displayed, pixels")]
    height: int
    model: ModelName
    objects: Annotated[tuple[DetectedObject, ...], Meta(description="by falling score")]
    segments: Annotated[
        tuple[Segment, ...] | None, Meta(description="of a panoptic or semantic model: what the frame is made of")
    ] = None
    ms: Milliseconds
    dropped: Annotated[int, Meta(description="frames of the stream decoded but not processed since the daemon started")]

    @property
    def captured_at_s(self) -> float:
        """When the frame was taken, Unix time in seconds. Raises WireError."""
        try:
            return datetime.fromisoformat(self.captured_at).timestamp()
        except (ValueError, OverflowError) as err:
            raise WireError(f"damaged message: captured_at is {self.captured_at!r:.40}, which is no time") from err

    def segment_map(self) -> np.ndarray:
        """Return int32 [height, width]: the number of each pixel's segment, from 1; 0 where there is none.

        Raises WireError where a mask is damaged.
        """
        import numpy as np

        if min(self.height, self.width) < 0 or self.height * self.width > MAX_PIXELS:
            raise WireError(f"damaged message: its frame has {self.height} x {self.width} pixels")
        numbers = np.zeros((self.height, self.width), dtype=np.int32)
        for number, segment in enumerate(self.segments or (), start=1):
            pixels = segment.mask.decode()
            if pixels.shape != numbers.shape:
                raise WireError(f"damaged mask: {pixels.shape} pixels in a frame of {numbers.shape}")
            numbers[pixels] = number
        return numbers

    def to_supervision(self) -> sv.Detections:
        """Return the objects as supervision.Detections, with masks and track ids where every object has one.

        Raises WireError where a mask is damaged, or a number or label is none of the daemon's.
        """
        import numpy as np
        import supervision as sv

        objects = self.objects
        if any(len(found.label) > _MAX_LABEL for found in objects):  # numpy gives each as much room as the longest
            raise WireError(f"damaged message: a label of more than {_MAX_LABEL} characters")
        masks = [found.mask.decode() for found in objects if found.mask is not None]
        if len({mask.shape for mask in masks}) > 1:
            raise WireError("damaged message: its masks differ in size")
        ids = [found.id for found in objects if found.id is not None]
        try:
            with np.errstate(over="ignore"):  # beyond float32 is infinite, which supervision refuses
                corners = np.array([found.box for found in objects], dtype=np.float32).reshape(-1, 4)
                scores = np.array([found.score for found in objects], dtype=np.float32)
            return sv.Detections(
                xyxy=corners,
                mask=np.stack(masks) if masks and len(masks) == len(objects) else None,
                confidence=scores,
                class_id=np.array([found.label_id for found in objects], dtype=np.int64),
                tracker_id=np.array(ids, dtype=np.int64) if ids and len(ids) == len(objects) else None,
                data={"class_name": np.array([found.label for found in objects], dtype=np.str_)},
            )
        except ValueError as err:
            raise WireError(f"damaged message: {err}") from err


class StatusMessage(Struct, frozen=True, kw_only=True):
    """A stream entered a state."""

    schema: Literal[1]
    stream: str
    state: Annotated[str, Meta(description="a value of StreamState; a newer daemon may name others")]
    reason: Annotated[str, Meta(description="one line for the operator; empty when all is well")]
    decoder: Annotated[str, Meta(description="the decoder and why it was chosen; empty before")]
    at: Utc
    retry_in_s: Annotated[float | None, Meta(description="until the next try, where one is planned")]
    reconnects: Annotated[int, Meta(description="connections after the first")]
    frames: Annotated[int, Meta(description="decoded since the daemon started")]
    dropped: Annotated[int, Meta(description="decoded but not processed")]
    corrupt: Annotated[int, Meta(description="dropped because the decoder saw damage")]
    error: Annotated[str, Meta(description="the code of the last failure, until the stream runs again; or empty")] = ""


Message: TypeAlias = DetectionsMessage | StatusMessage


class _Envelope(Struct, frozen=True):
    schema: int


_JSON_ENCODER = msgspec.json.Encoder()
_MSGPACK_ENCODER = msgspec.msgpack.Encoder()
_STRUCTS: dict[Kind, type[Message]] = {"detections": DetectionsMessage, "status": StatusMessage}
_JSON_DECODERS = {kind: msgspec.json.Decoder(struct) for kind, struct in _STRUCTS.items()}
_MSGPACK_DECODERS = {kind: msgspec.msgpack.Decoder(struct) for kind, struct in _STRUCTS.items()}


def topic(stream: str, kind: Kind) -> str:
    """Name the ZeroMQ topic."""
    return f"streamd/{stream}/{kind}"


def channel(stream: str, kind: Kind) -> str:
    """Name the Redis pub/sub channel."""
    return f"streamd:{stream}:{kind}"


def stream_key(stream: str) -> str:
    """Name the Redis Stream, which holds all kinds."""
    return f"streamd:{stream}"


def encode(message: Message, format: Format = "json") -> bytes:
    """Return the payload."""
    return _JSON_ENCODER.encode(message) if format == "json" else _MSGPACK_ENCODER.encode(message)


@overload
def decode(payload: bytes, kind: Literal["detections"]) -> DetectionsMessage: ...
@overload
def decode(payload: bytes, kind: Literal["status"]) -> StatusMessage: ...
@overload
def decode(payload: bytes, kind: Kind) -> Message: ...
def decode(payload: bytes, kind: Kind) -> Message:
    """Read a payload of either format; the topic or channel says the kind.

    Raises WireError where it is no message of this kind, its schema is not ours, or it is too long.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise WireError(f"not a streamd {kind} message: {len(payload)} bytes, want {MAX_PAYLOAD_BYTES} at most")
    is_json = payload[:1] == b"{"  # in msgpack 0x7b is a bare number, never the map that a message is
    decoder = (_JSON_DECODERS if is_json else _MSGPACK_DECODERS)[kind]
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise WireError(_why_unreadable(payload, is_json, kind, err)) from err


def json_schema() -> dict[str, object]:
    """Return the JSON Schema of both messages; the one to use is under `$defs`."""
    references, definitions = msgspec.json.schema_components(_STRUCTS.values(), ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "streamd messages",
        "anyOf": list(references),
        "$defs": definitions,
    }


def _run_lengths(counts: str) -> list[int]:
    """Read COCO's compressed run lengths: alternately background and object, down the columns.

    Each is a little-endian number of 5-bit digits, sign-extended, in characters from "0" on, of which bit 5 says that
    more follow; from the fourth on it is the difference to the length two before (pycocotools, rleToString).
    Raises WireError.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        digit = ord(character) - ord("0")
        if not 0 <= digit < 64 or shift > 40:
            raise WireError("damaged mask: its run lengths are no numbers")
        value |= (digit & 0x1F) << shift
        shift += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << shift
        value += lengths[-2] if len(lengths) > 2 else 0
        if not 0 <= value <= MAX_PIXELS:
            raise WireError(f"damaged mask: a run of {value} pixels")
        lengths.append(value)
        value = shift = 0
    return lengths


def _why_unreadable(payload: bytes, is_json: bool, kind: Kind, err: Exception) -> str:
    codec = msgspec.json if is_json else msgspec.msgpack
    try:
        schema = codec.decode(payload, type=_Envelope).schema
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        schema = SCHEMA
    if schema != SCHEMA:
        advice = "update streamd here" if schema > SCHEMA else "update the daemon"
        return f"{kind} message of schema {schema}, but this client reads schema {SCHEMA}: {advice}"
    return f"not a streamd {kind} message: {err} ({len(payload)} bytes that begin with {payload[:24]!r})"


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(json_schema()), indent=2) + b"\n")
