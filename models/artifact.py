"""Write and read model files: a TorchScript module with its `ModelSpec` inside, as one `.pt`.

torch.jit is deprecated and its loader is not thread-safe, so every call of it sits here, under one lock:
another format is a change of this file. Nothing is ever unpickled, and what a program may call is looked over before
torch sees it (archive.py, program.py).
"""

from __future__ import annotations

import copy
import importlib.util
import io
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

import streamd.gpu.ops  # noqa: F401  registers the operators that some models call
from streamd.errors import ModelError
from streamd.messages import RawOutput
from streamd.models import BUILDERS, archive, program, trial
from streamd.models.contract import describe_wrong_spec, pack
from streamd.models.spec import ModelSpec
from streamd.models.tracing import FreshCasts, follow_device
from streamd.replacing import replacing

FORMAT = 2  # of what `export` writes; counted up when artifacts made before must be made again
SPEC_FILE = "streamd.json"
_METHODS = ("masks", "keypoints", "densepose")  # beside `forward`; a model has those that its spec says
TOLERANCE = 5e-4  # between a network and its artifact; float32 rounding alone gives up to 4.3e-4

_LOCK = threading.Lock()


@contextmanager
def _torch_jit() -> Iterator[None]:
    """Hold the one lock of torch.jit, and keep its deprecation to this file."""
    with _LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.")
        yield


def export(network: nn.Module, spec: ModelSpec, path: Path) -> None:
    """Trace `network` and write it to `path` in one step; nothing is written if the artifact would differ from it.

    Raises ModelError if the outputs do not fit `spec`, or do not equal the network's at another batch size.
    """
    _check_spec(spec, path)
    network = copy.deepcopy(network).cpu().eval()
    content = _trace(network, spec, path)
    try:
        with replacing(path) as new:
            new.write_bytes(content)
            _compare(network, new, spec, path)
    except OSError as err:
        raise ModelError(f"{path}: cannot write the model: {err}") from err


def read_spec(path: Path) -> ModelSpec:
    """Read what a model file says of itself, without loading its weights."""
    content = _read_spec_file(path)
    try:
        spec = msgspec.json.decode(content, type=ModelSpec)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise ModelError(
            f"{path}: its {SPEC_FILE} is not understood ({err}); it may come from another version of streamd. "
            "Export the model again with this one"
        ) from err
    _check_spec(spec, path)
    return spec


def load(
    path: Path,
    device: torch.device | str = "cpu",
    *,
    optimized: bool = False,
    dtype: torch.dtype = torch.float32,
    frozen: Path | None = None,
) -> tuple[torch.jit.ScriptModule, ModelSpec]:
    """Load a model onto `device` and check one forward pass against its spec; any thread may call.

    Its weights become `dtype`, and its images must be. `optimized` gives what `optimize` makes of it, and the pass is
    then the first of its warm-up. `frozen` is what `write_frozen` has made of it, for the CPU and this dtype, and which
    nobody else can have written. Raises ModelError if the file is missing, damaged or foreign, or does not do what its
    spec says.
    """
    spec = read_spec(path)
    try:
        inputs = trial.Inputs.blank(spec, device, dtype)
    except (RuntimeError, AssertionError) as err:  # a torch that was built without CUDA asserts
        raise ModelError(f"{path}: cannot be loaded onto the device {device}: {last_line(err)}") from err
    module = _load_module(path, device, frozen)
    if frozen is None:
        module = module.to(dtype)
        if optimized:
            module = optimize(module)
    try:
        with torch.inference_mode():
            trial.run(module, inputs, spec, path)
    except RuntimeError as err:
        raise ModelError(
            f"{path}: the model failed on images of shape {list(inputs.images.shape)}, the input_size of its "
            f"{SPEC_FILE}: {last_line(err)}. Export the model again"
        ) from err
    return module, spec


def write_frozen(path: Path, dtype: torch.dtype, to: Path) -> None:
    """Load an optimized model onto the CPU, and write it down for `load`'s `frozen`. Raises ModelError."""
    module, _ = load(path, optimized=True, dtype=dtype)
    with _torch_jit():
        torch.jit.save(module, str(to))


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a model file's parameters and buffers, by the names that its network has. Raises ModelError."""
    read_spec(path)
    return dict(_load_module(path, "cpu").state_dict())


def forward(module: torch.jit.ScriptModule, spec: ModelSpec, images: Tensor, sizes: Tensor) -> RawOutput:
    """Run a loaded model on `images` [B,3,H,W].

    `sizes` [B,2] float32: height and width of each picture inside its padding; read by sized models alone.
    """
    return pack(module(images, sizes) if spec.sized else module(images))


def optimize(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Return the fastest form of a loaded module for inference on the device where it is.

    Its weights are in channels_last memory, those of `module` too, which stays usable. Images may be in either: three
    channels are quickly turned, and planes are quicker to write.
    """
    methods = [name for name in _METHODS if hasattr(module, name)]
    with _torch_jit():
        frozen: torch.jit.ScriptModule = torch.jit.freeze(
            module.eval().to(memory_format=torch.channels_last), preserved_attrs=methods
        )
    return frozen


def _trace(network: nn.Module, spec: ModelSpec, path: Path) -> bytes:
    # Two images: some operators treat a batch of one differently, and a trace would keep that.
    inputs = trial.Inputs.noise(spec, num_images=2, num_boxes=5)
    with torch.no_grad():
        try:
            output = trial.run(network, inputs, spec, path)
        except RuntimeError as err:
            raise ModelError(
                f"{path}: the network does not accept images of shape {list(inputs.images.shape)}: {last_line(err)}"
            ) from err
        arguments = {"forward": inputs.forward, **inputs.of_methods(spec, output)}
        with _torch_jit(), FreshCasts():
            # strict=False allows the dict of outputs; _compare does what check_trace would do, at other batch sizes.
            module = torch.jit.trace_module(network, arguments, strict=False, check_trace=False)
            follow_device(module, path)
            buffer = io.BytesIO()
            torch.jit.save(module, buffer, _extra_files={SPEC_FILE: msgspec.json.encode(spec)})
    return buffer.getvalue()


def _compare(network: nn.Module, written: Path, spec: ModelSpec, path: Path) -> None:
    module = _load_module(written, "cpu")
    for num_images, num_boxes in ((1, 3), (3, 8)):
        inputs = trial.Inputs.noise(spec, num_images, num_boxes)
        with torch.inference_mode():
            expected = trial.run(network, inputs, spec, path)
            try:
                output = trial.run(module, inputs, spec, path)
            except RuntimeError as err:
                raise ModelError(
                    f"{path}: not written: traced with 2 images, the network fails with {num_images} "
                    f"({last_line(err)}); its forward must not depend on the batch size"
                ) from err
        for name, tensor in expected.items():
            _check_equal(name, output[name], tensor, f"{path}: not written: with {num_images} image(s)")


def _check_equal(name: str, got: Tensor, expected: Tensor, where: str) -> None:
    """Raise ModelError unless an output of the artifact is the network's."""
    if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=TOLERANCE):
        return
    difference = (got - expected).abs().max().item() if got.shape == expected.shape else float("inf")
    raise ModelError(
        f"{where} the artifact's {name} differs from the network's by {difference:.2g} (at most {TOLERANCE:.0e}); "
        "its forward must not depend on the values or the number of the images, and its weights must be finite"
    )


def _load_module(path: Path, device: torch.device | str, frozen: Path | None = None) -> torch.jit.ScriptModule:
    try:
        code = archive.read_code(path)
        _load_operators(code)
        if frozen is None:  # else who froze it has looked
            program.check(code, path)
        with _torch_jit():
            module: torch.jit.ScriptModule = torch.jit.load(str(frozen or path), map_location=device)
    except (RuntimeError, ValueError, OSError) as err:
        raise ModelError(
            f"{path}: the model cannot be loaded: {last_line(err)}. "
            "The file is probably damaged: copy it or export it again"
        ) from err
    module.eval()
    return module


def _load_operators(code: str) -> None:
    """Load torchvision's operators if the model calls any.

    Its library alone: the whole package takes about two seconds to import.
    """
    if not any(name in code for name in ("ops.torchvision.", "ops.streamd.pool_levels")):
        return
    found = importlib.util.find_spec("torchvision")
    libraries = sorted(Path(found.origin).parent.glob("_C*.so")) if found and found.origin else []
    for library in libraries:
        torch.ops.load_library(str(library))
    if not libraries:
        importlib.import_module("torchvision")


def _read_spec_file(path: Path) -> bytes:
    if path.is_dir():
        raise ModelError(f"{path} is a directory; give the path of a model file (.pt) or a model's name")
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            for name in names:
                if name.endswith(f"/extra/{SPEC_FILE}"):
                    if file.getinfo(name).file_size > archive.MAX_SPEC_BYTES:
                        raise ModelError(f"{path}: its {SPEC_FILE} is larger than {archive.MAX_SPEC_BYTES >> 20} MiB")
                    return file.read(name)
    except FileNotFoundError as err:
        raise ModelError(f"{path}: no such file; make one with: {export_command()}") from err
    except zipfile.BadZipFile as err:
        raise ModelError(f"{path}: {_describe_foreign(path)}") from err
    except (OSError, *archive.DAMAGE) as err:
        raise ModelError(f"{path}: cannot read the model: {err}") from err
    if any(name.endswith("/data.pkl") for name in names) and not any("/code/" in name for name in names):
        raise ModelError(f"{path}: this is a checkpoint; make an artifact with: {export_command(path)}")
    raise ModelError(
        f"{path}: holds no {SPEC_FILE}, so it was not exported by streamd; make a model with: {export_command()}"
    )


def _describe_foreign(path: Path) -> str:
    """Say what a file that is no zip archive may be, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return "the file is empty; copy it or export it again"
    if start == b"PK":
        return "the file is truncated; copy it or export it again"
    if start[:1] == b"\x80":  # a pickle, protocol 2 or later: the form of checkpoints before torch 1.6
        return f"this is a checkpoint; make an artifact with: {export_command(path)}"
    return f"not a model file; make one with: {export_command()}"


def export_command(checkpoint: Path | None = None) -> str:
    """Say the command that makes an artifact, for error messages."""
    network = checkpoint.stem if checkpoint and checkpoint.stem in BUILDERS else "yolox_nano"
    return f"streamd export {network} --weights {checkpoint or 'FILE'} -o model.pt"


def _check_spec(spec: ModelSpec, path: Path) -> None:
    if wrong := describe_wrong_spec(spec):
        raise ModelError(f"{path}: its {SPEC_FILE} is wrong: {wrong}. Export the model again")


def last_line(err: Exception) -> str:
    """Shorten an error of torch, which carries a stack of C++ or TorchScript frames, to what it says."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("RuntimeError:", "Error:"))]
    return (said or lines or [type(err).__name__])[0].removeprefix("RuntimeError: ")
