"""Each connection gets a decoder that works here, and its status says which and why."""

from __future__ import annotations

import ctypes
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
import torch

from streamd.decode import Decoders, Wish
from streamd.decode.choose import Name, Site, Wanted, decide, examine
from streamd.decode.dali import DaliDecoder
from streamd.decode.nvdec import NvdecDecoder
from streamd.decode.software import SoftwareDecoder
from streamd.errors import ConfigError
from tests.clips import write_clip
from tests.decoding import assert_same, feed, in_software, packets_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H100 = Site(nvdec=frozenset({"h264", "hevc", "vp9"}), dali=frozenset({"h264", "hevc", "vp9", "mjpeg"}), missing="")
NO_DALI = Site(nvdec=frozenset({"h264", "hevc"}), missing="")
NO_NVDEC = Site(dali=frozenset({"mjpeg"}), missing="NVDEC: no libnvcuvid.so.1")
FILE, SLOW = Wish(is_file=True), Wish(max_latency_s=2.0)


@pytest.mark.parametrize(
    ("wish", "codec", "site", "name", "reason"),
    [
        (Wish(), "h264", Site(), "software", "no GPU"),
        (FILE, "mjpeg", Site(), "software", "no GPU"),
        (Wish("software"), "h264", H100, "software", "asked for"),
        (Wish(), "h264", H100, "nvdec", "a camera whose latency leaves no time for whole GOPs"),
        (Wish(), "mjpeg", H100, "dali", "MJPEG, batched with that of other streams"),
        (FILE, "hevc", H100, "dali", "a file, which can be decoded in whole GOPs"),
        (SLOW, "h264", H100, "dali", "a latency of 2 s leaves time for whole GOPs"),
        (Wish(keyframes_only=True), "h264", H100, "dali", "key frames only"),
        (FILE, "msmpeg4", H100, "software", "the GPU does not decode msmpeg4"),
        (FILE, "h264", NO_DALI, "nvdec", "DALI is not installed"),
        (Wish(), "mjpeg", NO_DALI, "software", "the GPU does not decode mjpeg"),
        (Wish(), "h264", NO_NVDEC, "software", "NVDEC: no libnvcuvid.so.1"),
        (Wish(), "mjpeg", NO_NVDEC, "dali", "MJPEG, batched with that of other streams"),
        (Wish("nvdec", is_file=True), "h264", H100, "nvdec", "asked for"),
        (Wish("nvdec"), "mjpeg", H100, "software", "NVDEC does not decode mjpeg"),
        (Wish("dali"), "h264", H100, "dali", "asked for"),
        (Wish("dali"), "msmpeg4", H100, "software", "DALI does not decode msmpeg4"),
    ],
)
def test_the_choice_follows_machine_codec_and_latency(
    wish: Wish, codec: str, site: Site, name: Name, reason: str
) -> None:
    assert decide(wish, codec, site) == (name, reason)


@pytest.mark.parametrize(
    ("wanted", "site", "message"),
    [
        ("nvdec", Site(), "decoder 'nvdec' cannot work on cpu: no GPU; use auto"),
        ("dali", Site(), "decoder 'dali' cannot work on cpu: no GPU; use auto"),
        ("dali", NO_DALI, "'dali' cannot work on cpu: nvidia-dali-cuda130 is not installed; use auto"),
        ("nvdec", NO_NVDEC, "'nvdec' cannot work on cpu: NVDEC: no libnvcuvid.so.1; use auto"),
    ],
)
def test_a_decoder_that_cannot_work_here_is_an_error_that_says_what_to_use(
    wanted: Wanted, site: Site, message: str
) -> None:
    with closing(Decoders(CPU, site)) as decoders, pytest.raises(ConfigError, match=message):
        decoders.check(wanted)


def test_a_decoder_that_works_here_is_no_error() -> None:
    with closing(Decoders(CPU, H100)) as decoders:
        for wanted in get_args(Wanted):
            decoders.check(wanted)
    with closing(Decoders(CPU)) as decoders:
        decoders.check("auto")
        decoders.check("software")


@pytest.mark.parametrize(
    ("wish", "kind"), [(Wish("software"), SoftwareDecoder), (Wish("nvdec"), NvdecDecoder), (FILE, DaliDecoder)]
)
def test_the_chosen_decoder_is_made_and_says_why(tmp_path: Path, wish: Wish, kind: type) -> None:
    with (
        packets_of(write_clip(tmp_path / "clip.mp4", 4)) as (source, _),
        closing(Decoders(GPU, H100)) as decoders,
    ):
        choice = decoders.choose(wish, source.video.codec_context.name)
        decoder = choice.make("gate", source.video, 0)
        assert isinstance(decoder, kind)
        if kind is not NvdecDecoder or torch.cuda.is_available():  # else it is in software by now
            assert decoder.description == str(choice) == f"{choice.name}: {choice.reason}"
        decoder.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("site", [H100, NO_DALI], ids=["dali", "nvdec"])
def test_where_dali_and_nvdec_fail_no_frame_is_lost(tmp_path: Path, site: Site) -> None:
    """The site promises a GPU, and there is none."""
    clip = write_clip(tmp_path / "clip.mp4", 80, gop=8)
    with packets_of(clip) as (source, packets), closing(Decoders(GPU, site)) as decoders:
        decoder = decoders.choose(FILE, "h264").make("gate", source.video, 0)
        frames = feed(decoder, packets)
        assert decoder.description.startswith("software: NVDEC cannot be opened: ")
        decoder.close()
    assert_same(frames, in_software(clip))


def test_numbers_go_on_after_a_reconnect(tmp_path: Path) -> None:
    with packets_of(write_clip(tmp_path / "clip.mp4", 3)) as (source, packets), closing(Decoders(CPU)) as decoders:
        decoder = decoders.choose(Wish(), "h264").make("gate", source.video, 40)
        assert [frame.seq for frame in feed(decoder, packets)] == [40, 41, 42]


def test_a_cpu_decodes_nothing_by_itself() -> None:
    assert examine(CPU) == Site()


def test_a_machine_without_a_driver_is_examined_without_an_error() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        found = examine(GPU)
        assert found.nvdec == frozenset() and found.missing == "NVDEC: no libcuda.so.1"
    else:
        pytest.skip("this machine has NVIDIA's driver")


@pytest.mark.gpu
def test_a_gpu_decodes_h264_with_nvdec() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    found = examine(GPU)
    assert {"h264", "hevc"} <= found.nvdec and found.missing == ""
