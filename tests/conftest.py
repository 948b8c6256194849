"""What several tests share: cameras, a Redis, and the folder of design material."""

from __future__ import annotations

import faulthandler
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from streamd.models import artifact
from streamd.models.spec import ModelSpec
from streamd.models.weights import export_checkpoint
from streamd.models.yolox import yolox_nano
from tests.cuda_on_cpu import emulated_cuda
from tests.redis_server import RedisServer, running_redis
from tests.rtsp import RtspServer, encode_clip, is_h264, missing_for_rtsp

ROOT = Path(__file__).parents[1]

StartRtsp = Callable[..., RtspServer]
_ENDS_WITHIN_S = 300.0


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Fail with the stacks of all threads where one that a test left keeps the process from ending."""
    faulthandler.dump_traceback_later(_ENDS_WITHIN_S, exit=True, file=2)


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """Put the log back as it was: commands set its level, and have it written to a stderr that ends with the test."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder of videos, data and reference outputs that lies beside a checkout, or skip."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared is missing: it lies beside the checkout of those who design streamd")
    return folder


@pytest.fixture(scope="session")
def demo_clip() -> Path:
    """Give the clip that the project ships: H.264, 768x576, 10 frames/s, 250 frames, a key frame every 20."""
    return ROOT / "configs" / "media" / "pedestrians.mp4"


@pytest.fixture(scope="session")
def h264_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Encode a clip of another codec to H.264, once a session; an H.264 clip is given back as it is."""
    cache = tmp_path_factory.mktemp("h264")

    def convert(clip: Path) -> Path:
        encoded = cache / f"{clip.stem}.mp4"
        if is_h264(clip):
            return clip
        return encoded if encoded.exists() else encode_clip(clip, encoded, fps=25, seconds=8)

    return convert


@pytest.fixture
def rtsp_server(h264_of: Callable[[Path], Path]) -> Iterator[StartRtsp]:
    """Start RTSP servers, which end with the test: `rtsp_server({"gate": clip}, user="u", password="p")`."""
    if missing := missing_for_rtsp():
        pytest.skip(missing)
    with ExitStack() as stack:

        def start(clips: Mapping[str, Path], **options: Any) -> RtspServer:
            mounts = {name: h264_of(clip) for name, clip in clips.items()}
            return stack.enter_context(RtspServer(mounts, **options))

        yield start


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """Run an empty Redis for the length of one test."""
    yield from running_redis()


@pytest.fixture(scope="session")
def nano_artifact(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the reference YOLOX-nano once a session."""
    out = tmp_path_factory.mktemp("models") / "yolox_nano.pt"
    export_checkpoint("yolox_nano", shared / "parity/yolox_nano/yolox_nano.pth", out)
    return out


@pytest.fixture(scope="session")
def untrained_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a small network that has learned nothing: fast, and there wherever the tests run."""
    out = tmp_path_factory.mktemp("models") / "untrained.pt"
    spec = ModelSpec(name="untrained", task="detect", labels=("a", "b", "c"), input_size=(64, 96), colour="bgr")
    artifact.export(yolox_nano(3, input_size=spec.input_size), spec, out)
    return out


@pytest.fixture(scope="session")
def emulator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder that keeps the libraries of the emulated kernels for the session."""
    return tmp_path_factory.mktemp("cuda_on_cpu")


@pytest.fixture(scope="module")
def cuda_on_cpu(emulator_folder: Path) -> Iterator[None]:
    """Let the launchers in streamd.gpu take CPU tensors: their kernels run emulated until the module's tests end."""
    with emulated_cuda(emulator_folder):
        yield


@pytest.fixture(scope="module", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, emulator_folder: Path) -> Iterator[torch.device]:
    """Give the device for a kernel's tensors: the CPU, where the kernel runs emulated, and the GPU if there is one."""
    if request.param == "emulated":
        with emulated_cuda(emulator_folder):
            yield torch.device("cpu")
    elif torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
    else:
        pytest.skip("torch sees no GPU")
