"""Inputs that once broke something, by target; what each did stands beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_OBJECT = b'{"label":"a","label_id":0,"score":0.5,"box":[0,0,2,2]}'
_MASK = b'{"label":"a","label_id":0,"score":0.5,"box":[0,0,2,2],"mask":'


def _message(objects: bytes, more: bytes = b"") -> bytes:
    return (
        b'{"schema":1,"stream":"a","seq":0,"epoch":0,"pts":0.0,"captured_at":"2026-01-31T10:00:00.000000Z",'
        b'"clock":"arrival","width":4,"height":3,"model":{"name":"m","sha256":""},"objects":[' + objects + b"],"
        b'"ms":{"decode":0,"wait":0,"infer":0,"post":0,"total":0},"dropped":0' + more + b"}"
    )


def _coco(annotation: bytes, file_name: bytes = b"a.png") -> bytes:
    return (
        b'{"images":[{"id":1,"file_name":"'
        + file_name
        + b'","width":4,"height":3}],"categories":[{"id":1,"name":"a"}],'
        b'"annotations":[{"id":1,"image_id":1,"category_id":1,' + annotation + b"}]}"
    )


FOUND: Mapping[str, Sequence[bytes]] = {
    "coco_json": [
        b'{"\x80":[]}',  # UnicodeDecodeError
        b'{"images":' + b"9" * 5000 + b"}",  # ValueError: more digits than Python turns into a number
        _coco(b'"bbox":[0.5,0,' + b"9" * 400 + b",2]"),  # OverflowError: beyond float
        # ValueError: a sum of more digits than Python writes
        _coco(b'"score":NaN,"segmentation":{"size":[3,4],"counts":[%b,%b]}' % (b"9" * 4300, b"9" * 4300)),
        _coco(b'"bbox":[0,0,2,2]', file_name=b"a" * 300),  # OSError: a name too long for a file
    ],
    "panoptic_json": [b'{"images":[],"annotations":[],"categories":[],"\x80":[]}'],  # UnicodeDecodeError
    "yolo_yaml": [b"names: [a]\ntrain: " + b"a" * 300],  # OSError: a name too long for a file
    "detectron2_yaml": [
        b"_BASE_: ~nobody-of-that-name/a.yaml",  # RuntimeError of pathlib
        b'_BASE_: "a\\0b"',  # ValueError of pathlib
        b"MODEL: {ROI_HEADS: {SCORE_THRESH_TEST: %b}}" % (b"9" * 399),  # OverflowError
    ],
    "zoo_pickle": [
        b"\x80\x05\x96\0\0\0\0\x04\0\0\0.",  # made room for 17 GB
        b"\x80\x02Nr\xff\xff\xff\x0f.",  # made room for 268 million numbered values
        b"\x80\x02})" + b"q\0h\0\x86" * 40 + b"Ns.",  # hashed a key of 2 ** 40 parts
    ],
    "wire": [
        _message(_OBJECT.replace(b"[0,0,2,2]", b"[0,0,1e39,2]")),  # ValueError of supervision: infinite in float32
        _message(_OBJECT.replace(b":0,", b":18446744073709551615,")),  # OverflowError of numpy
        _message(_MASK + b'{"size":[-3,-4],"counts":"<"}}'),  # ValueError of numpy: a shape below 0
        _message(_MASK + b'{"size":[40000,25000],"counts":"PPklln0"}}'),  # made room for a billion pixels
        _message(_MASK + b'{"size":[3,4],"counts":"ooooooooooooooooooo1"}}'),  # OverflowError of numpy
        _message(b"", b',"more":' + b"[" * 5000),  # RecursionError
        _message(b"").replace(b"2026-01-31T", b"x"),  # ValueError of datetime
    ],
    "checkpoint": [
        b"PK\6\7" + bytes(12) + b"\2\0\0\0" + b"PK\5\6" + bytes(18),  # BadZipFile of is_zipfile: on two disks
    ],
    "artifact": [
        # UnicodeDecodeError of zipfile: a name that says it is UTF-8, and is not
        b"PK\1\2\24\0\24\0\0\10" + bytes(18) + b"\1\0" + bytes(16) + b"\xcb"
        b"PK\5\6\0\0\0\0\1\0\1\0\x2f\0\0\0\0\0\0\0\0\0",
    ],
    "redis": [
        b"\xff*1\r\n%1\r\n*1\r\n:1\r\n:1\r\n",  # TypeError: a map whose key is a list
        b"\xff*1\r\n*2\r\n:1\r\n:1\r\n",  # TypeError: numbers where entries should be
    ],
    "rtsp_sdp": [
        b"v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\na=control:v\r\n",  # no codec
    ],
}
