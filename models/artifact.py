"""Write and read model files: a TorchScript module with its `ModelSpec` inside, as one `.pt`.

torch.jit is deprecated and its loader is not thread-safe, so every call of it sits here, under one lock:
another format is a change of this file. Nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models import BUILDERS
from streamd.models.spec import ModelSpec

FORMAT = 1  # of what `export` writes; counted up when artifacts made before must be made again
SPEC_FILE = "streamd.json"
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
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
    except OSError as err:
        raise ModelError(f"{path}: cannot write the model: {err}") from err
    try:
        _compare(network, temporary, spec, path)
        temporary.chmod(0o644)  # a temporary file is private, a model is not
        os.replace(temporary, path)
    except OSError as err:
        raise ModelError(f"{path}: cannot write the model: {err}") from err
    finally:
        temporary.unlink(missing_ok=True)


def read_spec(path: Path) -> ModelSpec:
    """Read what a model file says of itself, without loading its weights."""
    content = _read_spec_file(path)
    try:
        spec = msgspec.json.decode(content, type=ModelSpec)
    except msgspec.MsgspecError as err:
        raise ModelError(
            f"{path}: its {SPEC_FILE} is not understood ({err}); it may come from another version of streamd. "
            "Export the model again with this one"
        ) from err
    _check_spec(spec, path)
    return spec


def load(
    path: Path, device: torch.device | str = "cpu", *, optimized: bool = False
) -> tuple[torch.jit.ScriptModule, ModelSpec]:
    """Load a model onto `device` and check one forward pass against its spec; any thread may call.

    `optimized` gives what `optimize` makes of it, and the pass is then the first of its warm-up. Raises ModelError if
    the file is missing, damaged or foreign, or does not do what its spec says.
    """
    spec = read_spec(path)
    try:
        images = torch.zeros(1, 3, *spec.input_size, device=device)
    except (RuntimeError, AssertionError) as err:  # a torch that was built without CUDA asserts
        raise ModelError(f"{path}: cannot be loaded onto the device {device}: {_last_line(err)}") from err
    module = _load_module(path, device)
    if optimized:
        module = optimize(module)
    try:
        with torch.inference_mode():
            output = module(images)
    except RuntimeError as err:
        raise ModelError(
            f"{path}: forward failed on images of shape {list(images.shape)}, the input_size of its {SPEC_FILE}: "
            f"{_last_line(err)}. Export the model again"
        ) from err
    check_output(output, spec, num_images=1, path=path)
    return module, spec


def optimize(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Return the fastest form of a loaded module for inference on the device where it is.

    Its weights are in channels_last memory, those of `module` too, which stays usable. Images may be in either: three
    channels are quickly turned, and planes are quicker to write.
    """
    with _torch_jit():
        frozen: torch.jit.ScriptModule = torch.jit.freeze(module.eval().to(memory_format=torch.channels_last))
    return frozen


def check_output(output: object, spec: ModelSpec, num_images: int, path: Path) -> None:
    """Raise ModelError unless the output of `forward` has the names and shapes that `spec` promises."""
    names = ["boxes", "scores"] + (["prototypes", "coefficients"] if spec.masks else [])
    if not isinstance(output, dict) or not all(isinstance(output.get(name), Tensor) for name in names):
        got = sorted(map(str, output)) if isinstance(output, dict) else type(output).__name__
        raise ModelError(f"{path}: forward must return a dict of tensors with the keys {names}, got {got}")
    shapes: dict[str, list[int]] = {name: list(output[name].shape) for name in names}
    num_candidates = shapes["boxes"][1] if len(shapes["boxes"]) == 3 else -1
    expected = {
        "boxes": [num_images, num_candidates, 4],
        "scores": [num_images, num_candidates, len(spec.labels)],
    }
    if spec.masks:
        num_prototypes = shapes["coefficients"][-1] if shapes["coefficients"] else -1
        expected["coefficients"] = [num_images, num_candidates, num_prototypes]
        expected["prototypes"] = [num_images, num_prototypes, *shapes["prototypes"][-2:]]
    wrong = [f"{name} is {shapes[name]}" for name in names if shapes[name] != expected[name]]
    if wrong:
        want = "boxes [B,K,4], scores [B,K,labels]"
        if spec.masks:
            want += ", prototypes [B,P,h,w], coefficients [B,K,P]"
        raise ModelError(
            f"{path}: forward gives wrong shapes for {num_images} image(s) and {len(spec.labels)} labels: "
            f"{'; '.join(wrong)}; want {want}"
        )


def _trace(network: nn.Module, spec: ModelSpec, path: Path) -> bytes:
    # Two images: some operators treat a batch of one differently, and a trace would keep that.
    images = _example_images(spec, 2)
    with torch.no_grad():
        try:
            check_output(network(images), spec, num_images=2, path=path)
        except RuntimeError as err:
            raise ModelError(
                f"{path}: the network does not accept images of shape {list(images.shape)}: {_last_line(err)}"
            ) from err
        with _torch_jit():
            # strict=False allows the dict of outputs; _compare does what check_trace would do, at other batch sizes.
            module = torch.jit.trace(network, images, strict=False, check_trace=False)
            buffer = io.BytesIO()
            torch.jit.save(module, buffer, _extra_files={SPEC_FILE: msgspec.json.encode(spec)})
    return buffer.getvalue()


def _compare(network: nn.Module, written: Path, spec: ModelSpec, path: Path) -> None:
    module = _load_module(written, "cpu")
    for num_images in (1, 3):
        images = _example_images(spec, num_images)
        with torch.inference_mode():
            expected = network(images)
            try:
                output = module(images)
            except RuntimeError as err:
                raise ModelError(
                    f"{path}: not written: traced with 2 images, the network fails with {num_images} "
                    f"({_last_line(err)}); its forward must not depend on the batch size"
                ) from err
        check_output(output, spec, num_images, path)
        for name, tensor in expected.items():
            if not torch.allclose(output[name], tensor, rtol=1e-4, atol=TOLERANCE):
                difference = (output[name] - tensor).abs().max().item()
                raise ModelError(
                    f"{path}: not written: with {num_images} image(s) the artifact's {name} differs from the "
                    f"network's by {difference:.2g} (at most {TOLERANCE:.0e}); its forward must not depend on the "
                    "values or the number of the images, and its weights must be finite"
                )


def _example_images(spec: ModelSpec, num_images: int) -> Tensor:
    """Make noise that is normalised as `spec` says: [B,3,H,W], the same at each call."""
    pixels = torch.rand(num_images, 3, *spec.input_size, generator=torch.Generator().manual_seed(0)) * 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return (pixels - mean) / std


def _load_module(path: Path, device: torch.device | str) -> torch.jit.ScriptModule:
    try:
        with _torch_jit():
            module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)
    except (RuntimeError, ValueError, OSError) as err:
        raise ModelError(
            f"{path}: the model cannot be loaded: {_last_line(err)}. "
            "The file is probably damaged: copy it or export it again"
        ) from err
    module.eval()
    return module


def _read_spec_file(path: Path) -> bytes:
    if path.is_dir():
        raise ModelError(f"{path} is a directory; give the path of a model file (.pt) or a model's name")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in names:
                if name.endswith(f"/extra/{SPEC_FILE}"):
                    return archive.read(name)
    except FileNotFoundError as err:
        raise ModelError(f"{path}: no such file; make one with: {export_command()}") from err
    except zipfile.BadZipFile as err:
        raise ModelError(f"{path}: {_describe_foreign(path)}") from err
    except (OSError, RuntimeError, NotImplementedError) as err:
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
    wrong = None
    if spec.schema != 1:
        wrong = f"schema is {spec.schema}, this streamd reads 1"
    elif not spec.labels:
        wrong = "labels is empty"
    elif min(spec.input_size) < 1:
        wrong = f"input_size is {list(spec.input_size)}, both must be positive"
    elif 0.0 in spec.std:
        wrong = "std holds a 0, which would be divided by"
    elif (spec.task == "segment") != (spec.masks is not None):
        wrong = f"task is {spec.task!r} {'without' if spec.masks is None else 'with'} a mask rule"
    if wrong:
        raise ModelError(f"{path}: its {SPEC_FILE} is wrong: {wrong}. Export the model again")


def _last_line(err: Exception) -> str:
    """Shorten an error of torch, which carries a stack of C++ or TorchScript frames, to what it says."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("RuntimeError:", "Error:"))]
    return (said or lines or [type(err).__name__])[0].removeprefix("RuntimeError: ")
