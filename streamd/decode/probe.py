"""Ask a machine what it can decode on a GPU; nothing here needs a GPU, a driver or DALI to be there."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib.util import find_spec

_CODECS = {"h264": 4, "hevc": 8, "vp9": 10, "av1": 11}  # cudaVideoCodec of NVIDIA's cuviddec.h
_YUV420 = 1  # cudaVideoChromaFormat


@dataclass(frozen=True, slots=True)
class Nvdec:
    """What the decoders of a GPU can do."""

    codecs: frozenset[str] = frozenset()  # of 8-bit 4:2:0 video
    num_engines: int = 0
    missing: str = ""  # what is not there, where it cannot be asked
    advice: str = ""


class _DecodeCaps(ctypes.Structure):
    """CUVIDDECODECAPS of NVIDIA's cuviddec.h, 88 bytes."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("num_engines", ctypes.c_ubyte),
        ("rest", ctypes.c_ubyte * 62),
    )


def probe_nvdec(index: int = 0) -> Nvdec:
    """Ask NVIDIA's driver what the GPU of this index decodes."""
    try:
        cuda, cuvid = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvcuvid.so.1")
    except OSError as err:
        library = str(err).split(":")[0]
        advice = "it comes with NVIDIA's driver; in a container set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        return Nvdec(missing=f"no {library}", advice=advice)
    context, device = ctypes.c_void_p(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index):
        return Nvdec(missing="the driver finds no GPU", advice="see the row NVIDIA GPU")
    if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) or cuda.cuCtxPushCurrent_v2(context):
        return Nvdec(missing="the GPU gives no context", advice="is its memory full, or is it in exclusive mode?")
    try:
        caps = {name: _decode_caps(cuvid, codec) for name, codec in _CODECS.items()}
    finally:
        cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        cuda.cuDevicePrimaryCtxRelease_v2(device)
    codecs = frozenset(name for name, found in caps.items() if found.supported)
    return Nvdec(codecs, max(found.num_engines for found in caps.values()))


def _decode_caps(cuvid: ctypes.CDLL, codec: int) -> _DecodeCaps:
    """Ask the driver what it decodes of 8-bit 4:2:0 video; a codec that it does not know is not supported."""
    caps = _DecodeCaps(codec=codec, chroma=_YUV420)
    return caps if cuvid.cuvidGetDecoderCaps(ctypes.byref(caps)) == 0 else _DecodeCaps()


def has_dali() -> bool:
    """Tell whether DALI is installed, without importing it, which takes half a second."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package that it shares with CUDA's
        return False
