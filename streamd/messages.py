"""The data that the stages hand to each other: frozen, with shape, unit and device at each field.

source -> Packet -> decode -> Frame -> batch -> Batch -> infer -> RawOutput -> postprocess -> Result -> publish
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import av
    import numpy as np
    import torch
    from torch import Tensor

    from streamd.models.spec import ModelSpec

Clock = Literal["sender", "arrival"]


class StreamState(StrEnum):
    """Where a stream is in its life; published on the status topic at each change."""

    CONNECTING = "connecting"  # opening the URL
    WAITING_KEYFRAME = "waiting_keyframe"  # connected; nothing that can be decoded yet
    RUNNING = "running"  # frames arrive
    STALLED = "stalled"  # connected, but no frame for `stall_timeout_s`
    UNREACHABLE = "unreachable"  # refused, timed out, closed, or the name does not resolve
    UNAUTHORIZED = "unauthorized"  # the camera refuses the password
    NOT_FOUND = "not_found"  # the camera or the disk has no such path
    REJECTED = "rejected"  # the camera refuses for another reason, such as too many viewers
    TLS_ERROR = "tls_error"  # the camera's certificate is not trusted, or is for another name
    PROTOCOL_ERROR = "protocol_error"  # what came is not what the URL's scheme promises
    UNSUPPORTED = "unsupported"  # the video is of a kind that cannot be decoded here
    FAILED = "failed"  # anything else, with its reason
    ENDED = "ended"  # a file came to its end, or the daemon stops


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """The pixels of one frame as the decoder left them: nothing converted, nothing scaled, nothing copied.

    `planes` are uint8 tensors on the decoder's device; rows may be pitched, so strides count.
    - yuv: three planes [H, W], [h, w], [h, w]; any chroma subsampling
    - nv12: two planes [H, W] and [h, w, 2], chroma interleaved U V
    - rgb: one plane [H, W, 3]
    """

    planes: tuple[Tensor, ...]
    layout: Literal["yuv", "nv12", "rgb"]
    matrix: Literal["bt601", "bt709"]  # how Y'CbCr maps to R'G'B'; unused for rgb
    full_range: bool  # luma 0..255 instead of 16..235; unused for rgb
    rotation: Literal[0, 90, 180, 270]  # degrees counter-clockwise that the stored picture must turn to be upright
    ready: torch.cuda.Event | None = None  # on a GPU: comes when the planes are whole, which may be later than now


@dataclass(frozen=True, slots=True)
class Stamp:
    """When a packet's picture was taken."""

    epoch: int  # counts the stream's connections and time jumps from 0; pts is comparable within one epoch
    arrived_ns: int  # monotonic clock, ns: when the packet came
    arrived_at: float  # the same as Unix time in seconds, by this machine's clock
    captured_at: float  # Unix time in seconds, by `clock`
    clock: Clock  # "sender": from the camera's RTCP sender report; "arrival": when the packet came
    unset_at: float | None = None  # what the camera's clock said, where it was never set and is not believed


@dataclass(frozen=True, slots=True, eq=False)
class Packet:
    """One access unit of a stream, still compressed."""

    data: av.Packet[av.VideoStream]
    stamp: Stamp
    keyframe: bool
    corrupt: bool  # the transport saw damage
    recovers_in: int = 0  # of a key frame: pictures from it on that may still show what was before; of most none


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One decoded picture of one stream, and when it was taken."""

    stream: str
    seq: int  # counts the decoded frames of a stream from 0, over reconnects
    pts_s: float  # presentation time in the stream's own clock, seconds
    stamp: Stamp
    decode_ms: float  # time spent in the decoder for this frame
    picture: Picture
    width: int  # pixels, as displayed (after rotation)
    height: int
    keyframe: bool
    corrupt: bool  # the decoder or the transport saw damage


@dataclass(frozen=True, slots=True, eq=False)
class Letterbox:
    """How a frame was placed into the network's input: input = source * (scale_x, scale_y) + (left, top)."""

    scale_x: float  # input pixels per source pixel
    scale_y: float
    left: int  # input pixels of padding
    top: int
    width: int  # input pixels that the picture covers, without padding
    height: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Frames that go through the model together."""

    frames: tuple[Frame, ...]
    images: Tensor  # [B, 3, H, W], float32 or float16, normalised, on the model's device
    letterboxes: tuple[Letterbox, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RawOutput:
    """What a model says about a batch; the shapes are fixed by B, and nothing is on the host yet.

    Candidates are boxes with a score for each of C labels, or, where `labels` is given, pairs of a box and a label.
    """

    boxes: Tensor  # [B, K, 4] x1 y1 x2 y2 in input pixels; K is 0 where the task is semantic
    scores: Tensor  # [B, K, C] or, of pairs, [B, K]; in 0..1, or -inf for a candidate that takes no part
    prototypes: Tensor | None = None  # [B, P, h, w] mask basis over the whole input
    coefficients: Tensor | None = None  # [B, K, P]; mask logits = coefficients @ prototypes
    labels: Tensor | None = None  # [B, K] int64
    features: tuple[Tensor, ...] = ()  # [B, D, h, w] each: what the methods beside `forward` pool from
    semantic: Tensor | None = None  # [B, S, h, w] logits over the whole input


@dataclass(frozen=True, slots=True, eq=False)
class Rle:
    """A binary mask as COCO run lengths, as pycocotools reads them."""

    height: int  # source pixels
    width: int
    counts: bytes  # COCO's compressed ASCII


@dataclass(frozen=True, slots=True, eq=False)
class Chart:
    """Which point of a body's surface each cell of a box shows, as DensePose describes it."""

    box: tuple[int, int, int, int]  # x, y, width, height in whole source pixels; the cells share it evenly
    planes: np.ndarray  # [3, h, w] uint8: part from 1, or 0 for the background; its coordinates U and V in 1/255


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A region of one label; the segments of a frame do not overlap."""

    label: int  # index into ModelSpec.labels for a thing, into ModelSpec.semantic_labels for stuff
    is_thing: bool  # one object, not stuff such as grass
    area: int  # source pixels
    mask: Rle
    detection: int | None = None  # of a thing: its row in the Detections


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What is in one frame, on the host: N objects by falling score, and regions that cover the frame."""

    boxes: np.ndarray  # [N, 4] float32 x1 y1 x2 y2 in source pixels, clipped to the frame
    scores: np.ndarray  # [N] float32 in 0..1
    labels: np.ndarray  # [N] int64, index into ModelSpec.labels
    masks: tuple[Rle, ...] | None = None  # N masks at source size
    keypoints: np.ndarray | None = None  # [N, J, 3] float32 x, y in source pixels, not clipped, and score
    charts: tuple[Chart, ...] | None = None  # N, of a DensePose model
    segments: tuple[Segment, ...] | None = None  # of a panoptic or semantic model; any number

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True, slots=True, eq=False)
class StageTimes:
    """Where a frame spent its time, in milliseconds."""

    decode: float
    wait: float  # in the mailbox, until a batch took it
    infer: float  # letterbox, model and NMS, of the batch, until the device is done with them
    post: float  # what is then left for the host: fetching masks, segments
    total: float  # arrival of the packet to the end of post-processing


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What leaves the pipeline for one frame."""

    frame: Frame
    detections: Detections
    times: StageTimes
    dropped: int  # frames of this stream that were decoded but not processed since the daemon started
    model: str  # the model's name in the configuration
    spec: ModelSpec | None = None  # of the version at work; None: of the only one that has had this name


@dataclass(frozen=True, slots=True)
class Status:
    """A stream entered a state."""

    stream: str
    state: StreamState
    reason: str  # one line for the operator; empty when all is well
    decoder: str  # the chosen decoder and why, for example "software: no GPU"; empty before it is chosen
    at: float  # Unix time, seconds
    retry_in_s: float | None  # seconds until the next try, where one is planned
    reconnects: int  # connections after the first, since the daemon started
    frames: int  # decoded since the daemon started
    dropped: int  # decoded but not processed
    corrupt: int  # dropped because the decoder saw damage
    error: str = ""  # the state of the last failure, until the stream runs again
