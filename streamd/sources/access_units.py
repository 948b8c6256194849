"""Join what FFmpeg's RTP demuxer gives for H.264 and H.265 into access units, without waiting for the next picture.

FFmpeg's own parser knows that a picture is whole only when the next one begins: one frame time of latency, 40 ms at
25 frames/s. RTP marks a picture's last packet, but the demuxer hides the mark. It still gives one piece for each RTP
packet, and that is enough: a unit that was fragmented (RFC 6184 and 7798, FU) ends with a piece that is shorter than
the others, and a camera cuts every picture into the same number of slices. Both are learnt and checked on each
connection before they are relied on, and given up when they fail; the next picture's time stamp then ends a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

START_CODE = b"\0\0\0\1"
_NUM_TO_LEARN = 25  # pictures in a row that the rule must have ended right before it is relied on
_MAX_MISTAKES = 3  # in a connection, before the rule is given up for good
# Of one picture: a camera that never ends one must not fill the memory.
_MAX_BYTES = 16 << 20
_MAX_PIECES = 1 << 16  # each takes 100 bytes of its own

Codec = Literal["h264", "hevc"]


@dataclass(frozen=True, slots=True)
class AccessUnit:
    """One picture, still compressed."""

    data: bytes  # Annex B: each NAL unit begins with a start code
    pts: int | None  # in the stream's time base
    keyframe: bool
    sender_at: float | None  # Unix seconds, by the camera's clock
    corrupt: bool  # a part of it is missing
    recovers_in: int = 0  # pictures from this key frame on that may show what was before


@dataclass(slots=True)
class _Picture:
    """What has come of one picture."""

    pts: int | None = None
    sender_at: float | None = None
    pieces: list[bytes] = field(default_factory=list)
    num_bytes: int = 0
    num_pieces: int = 0
    num_slices: int = 0  # that have begun
    keyframe: bool = False
    recovers_in: int = 0
    whole_after: int | None = None  # pieces after which the rule first said that it was whole
    let_go: bool = False
    last_piece: bytes = b""
    follows_loss: bool = False  # packets before its first piece were lost, which may have been its own


class AccessUnits:
    """Join pieces into access units; one for each connection."""

    def __init__(self, codec: Codec, *, may_repeat: bool = False) -> None:
        """`may_repeat`: the network may bring a packet twice, and FFmpeg lets the repetition of the last one pass."""
        self._is_hevc = codec == "hevc"
        self._may_repeat = may_repeat
        self._picture = _Picture()
        self._longest_fragment = 0  # bytes; 0 until a fragmented unit was seen
        self._num_slices = 0  # of the last whole picture
        self._num_right = 0  # pictures in a row that the rule ended right
        self._num_mistakes = 0
        self._truncated = False  # the next unit lacks a part, or is the rest of one that was let go too early

    @property
    def ends_early(self) -> bool:
        """Tell whether pictures are let go before the next one begins."""
        return self._num_right >= _NUM_TO_LEARN and self._num_mistakes < _MAX_MISTAKES

    @property
    def pts(self) -> int | None:
        """Say which picture is being joined."""
        return self._picture.pts

    def feed(
        self, piece: bytes, pts: int | None, sender_at: float | None = None, *, after_loss: bool = False
    ) -> Sequence[AccessUnit]:
        """Take what came in one RTP packet; return the pictures that it completes.

        `after_loss`: packets between this one and the one before are missing.
        """
        picture = self._picture
        completed: list[AccessUnit] | tuple[()] = ()
        if self._may_repeat and pts == picture.pts and piece == picture.last_piece and not _is_filler(piece):
            return completed
        if pts != picture.pts or (picture.num_slices and self._begins_picture(piece)):
            if picture.pieces:
                if after_loss:
                    self._truncated = True  # its end may be among what is missing
                else:
                    self._learn(picture)
                completed = [self._unit(picture)]
            picture = self._picture = _Picture(pts, sender_at, follows_loss=after_loss)
        elif after_loss:
            self._truncated = True
        elif picture.let_go:
            self._note_mistake(picture)
        picture.last_piece = piece
        self._add(picture, piece)
        # The rule: as many slices as the last picture had, and the last of them ended. (A first fragment is longer
        # than the others by the start code and the head that FFmpeg puts back.)
        if len(piece) < self._longest_fragment and 0 < self._num_slices == picture.num_slices:
            picture.whole_after = picture.whole_after or picture.num_pieces
            if self.ends_early:
                completed = [*completed, self._unit(picture)]
                picture.let_go = True
        return completed

    def _add(self, picture: _Picture, piece: bytes) -> None:
        picture.pieces.append(piece)
        picture.num_pieces += 1
        picture.num_bytes += len(piece)
        if picture.num_bytes > _MAX_BYTES or len(picture.pieces) > _MAX_PIECES:
            picture.pieces.clear()
            picture.num_bytes = 0
            self._truncated = True
        if not piece.startswith(START_CODE):
            if len(piece) > self._longest_fragment:
                self._longest_fragment = len(piece)
            return
        position = 0
        while position >= 0:
            self._note_head(picture, piece[position + 4 : position + 12])
            position = piece.find(START_CODE, position + 4)

    def _begins_picture(self, piece: bytes) -> bool:
        """Tell the first slice of a picture or field, which a camera may give the time of the one before.

        Its address is 0: the first bit of `first_mb_in_slice`, and `first_slice_segment_in_pic_flag`.
        """
        if not piece.startswith(START_CODE) or len(piece) < 7:
            return False
        if self._is_hevc:
            return piece[4] >> 1 & 0x3F < 32 and piece[6] >= 0x80
        return piece[4] & 0x1F in (1, 5) and piece[5] >= 0x80

    def _note_head(self, picture: _Picture, head: bytes) -> None:
        """Count slices, and recognise where a decoder may begin (H.264 table 7-1, H.265 table 7-1)."""
        if not head:
            return
        if self._is_hevc:
            kind = head[0] >> 1 & 0x3F
            picture.num_slices += kind < 32
            picture.keyframe |= 16 <= kind <= 21
        else:
            kind = head[0] & 0x1F
            picture.num_slices += kind in (1, 5)
            picture.keyframe |= kind == 5
            if kind == 6 and len(head) > 3 and head[1] == 6:  # a recovery point: cameras that refresh piece by piece
                picture.keyframe = True
                picture.recovers_in = _exp_golomb(head[3:])

    def _learn(self, picture: _Picture) -> None:
        """Compare the rule with the truth, now that the next picture has begun."""
        if picture.num_slices != self._num_slices:
            self._num_slices = picture.num_slices
            self._num_right = 0
        elif picture.whole_after == picture.num_pieces:
            self._num_right += 1
        elif picture.whole_after is not None:
            self._num_right = 0

    def _note_mistake(self, picture: _Picture) -> None:
        """More came of a picture that was let go: what was decoded lacks its end."""
        picture.let_go = False
        self._truncated = True
        self._num_right = 0
        self._num_mistakes += 1

    def _unit(self, picture: _Picture) -> AccessUnit:
        """Take what was joined out of the picture."""
        data = b"".join(picture.pieces)
        picture.pieces.clear()
        # After a loss a key frame is whole if its parameter sets came; any other picture may refer to what is missing.
        is_whole = not picture.follows_loss or (picture.keyframe and self._begins_with_parameter_set(data))
        is_corrupt = self._truncated or not is_whole
        unit = AccessUnit(data, picture.pts, picture.keyframe, picture.sender_at, is_corrupt, picture.recovers_in)
        self._truncated = False
        return unit

    def _begins_with_parameter_set(self, data: bytes) -> bool:
        head = data[4:5]
        if not head:
            return False
        return head[0] >> 1 & 0x3F in (32, 33) if self._is_hevc else head[0] & 0x1F == 7


def _is_filler(piece: bytes) -> bool:
    """Tell whether a fragment says the same byte all over, so that an equal one beside it is no repetition."""
    return not piece.startswith(START_CODE) and piece.count(piece[-1:]) > len(piece) - 8


def _exp_golomb(data: bytes) -> int:
    """Read ue(v) (H.264, 9.1), here of the number of frames after which a picture is whole: 16 bits at most."""
    bits = int.from_bytes(data[:5].ljust(5, b"\0"), "big")
    num_zeros = min(16, 40 - bits.bit_length())
    return max(0, (bits >> (39 - 2 * num_zeros)) - 1)
