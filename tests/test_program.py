"""A hostile artifact runs nothing but arithmetic: what its program may call is looked over before torch sees it."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.messages import RawOutput
from streamd.models import artifact, program
from streamd.models.spec import ModelSpec
from streamd.models.weights import read_checkpoint
from tests.hostile import CallsSystem, rewritten, with_code

SPEC = ModelSpec(name="tiny", task="detect", labels=("a",), input_size=(16, 16), colour="rgb")
RETURN = '  return {"boxes": _2'


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        boxes = self.layers(images).mean((2, 3))[:, None]
        return {"boxes": boxes, "scores": boxes[..., :1].sigmoid()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.pt"
    artifact.export(Tiny(), SPEC, path)
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Name a file that only harm would make."""
    return tmp_path / "marker"


def load_by_torch_alone(path: Path) -> None:
    """Do what the daemon would do if nothing was looked over."""
    with artifact._torch_jit():
        module = torch.jit.load(str(path))
    with contextlib.suppress(RuntimeError):
        module(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("images: Tensor)", 'images: Tensor, y: Tensor=torch.from_file("MARKER", True, 16))'),
        ("images: Tensor)", 'images: Tensor, y: Tensor=ops . aten . from_file("MARKER", True, 16))'),
        (RETURN, RETURN + ' + torch.sum(torch.from_file("MARKER", True, 16))'),
        (RETURN, "  f = torch.from_file\n  " + RETURN + ' + torch.sum(f("MARKER", True, 16))'),
        (RETURN, '  torch.save((images,), "MARKER")\n' + "  " + RETURN),
    ],
    ids=["default argument", "spaces", "in forward", "by another name", "save"],
)
def test_a_program_that_would_write_a_file_is_refused_before_anything_runs(
    tiny: Path, tmp_path: Path, marker: Path, old: str, new: str
) -> None:
    hostile = with_code(tiny, tmp_path / "hostile.pt", old, new.replace("MARKER", str(marker)))
    with pytest.raises(ModelError, match=r"hostile\.pt: refused: its program names .*(from_file|save|ops)"):
        artifact.load(hostile)
    with pytest.raises(ModelError, match="refused: its program names"):
        artifact.read_state(hostile)
    assert not marker.exists()
    load_by_torch_alone(hostile)
    assert marker.exists(), "the program does harm where nothing stops it, so this test can fail"


def test_a_state_that_runs_while_torch_loads_it_is_refused(tmp_path: Path, marker: Path) -> None:
    class Stateful(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"boxes": images, "scores": images}

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return self.name, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.name, self.training = state
            torch.save((1,), self.name)

    hostile = tmp_path / "hostile.pt"
    with artifact._torch_jit():
        torch.jit.save(torch.jit.script(Stateful(str(marker))), hostile)
    with pytest.raises(ModelError, match="refused: its program names save"):
        artifact._load_module(hostile, "cpu")
    assert not marker.exists()
    load_by_torch_alone(hostile)
    assert marker.exists()


@pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_call_the_system_is_refused(
    tiny: Path, tmp_path: Path, marker: Path, entry: str, protocol: int
) -> None:
    payload = pickle.dumps(CallsSystem(f"touch {marker}"), protocol)
    hostile = rewritten(
        tiny, tmp_path / "hostile.pt", lambda name, content: payload if name.endswith(f"/{entry}") else content
    )
    with pytest.raises(ModelError, match=rf"hostile\.pt: refused: its {entry} (names|uses)"):
        artifact.load(hostile)
    with pytest.raises(ModelError, match=r"hostile\.pt: cannot be read as a checkpoint"):
        read_checkpoint(hostile)
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()


def test_a_checkpoint_that_would_call_the_system_is_refused(tmp_path: Path, marker: Path) -> None:
    for protocol, is_zip in ((2, True), (2, False), (4, False)):
        content = {"model": {"w": torch.zeros(2)}, "x": CallsSystem(f"touch {marker}")}
        torch.save(content, tmp_path / "c.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(ModelError, match=r"c\.pth: cannot be read as a checkpoint"):
            read_checkpoint(tmp_path / "c.pth")
    assert not marker.exists()


@pytest.mark.parametrize(
    "code",
    [
        "torch.from_file('x')",
        "x = torch\ny = x.save",
        "x = ops\nx.quantized.linear",
        "ops.quantized.linear(x)",
        "ops.prim.PythonOp(x)",
        "ops\n  .image.read_file",
        "__torch__.torch.classes.c10d.TCPStore()",
        "x = __torch__.torch\nx.classes.rnn.f()",
        "__torch__ . torch.classes.f()",
        'getattr(torch, "from" "_file")("x")',
        'getattr(torch, "from\\x5ffile")("x")',
        'getattr(torch, "from_file")("x")',
        "getattr(torch,\n  'from_file')",
        'getattr(getattr(torch, "autograd"), "save")',
        "torch.empty([2])",
        "x.set_(y)",
        "x.resize_(9)",
        "torch._unsafe_index(x, i)",
        "torch.sparse_coo_tensor(i, v)",
        'print("forged log line")',
        "# torch.save in a comment, since a comment to one parser may be code to another",
    ],
)
def test_words_that_reach_beyond_arithmetic_are_refused_wherever_they_stand(code: str) -> None:
    with pytest.raises(ModelError, match=r"m\.pt: refused: its program names"):
        program.check(code, Path("m.pt"))


@pytest.mark.parametrize(
    "code",
    [
        'x = getattr(getattr(self.layers, "0"), "1").weight',
        "x = __torch__.torch.nn.modules.sparse.___torch_mangle_3.Embedding",
        "ops.prim.NumToTensor(x)\nops.streamd.nms(b, s)\nops.torchvision.roi_align(x)",
        "x = torch.add_(y, z)\n_0 = torch.slice(self.saved.loader, 0)",
    ],
)
def test_what_networks_say_is_let_through(code: str) -> None:
    program.check(code, Path("m.pt"))


def test_every_operator_that_is_allowed_exists_and_none_takes_a_file_or_a_pointer() -> None:
    schemas: dict[str, list[str]] = {}
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space in ("aten", "prim", "streamd", "torchvision"):
            schemas.setdefault(name, []).append(str(schema))
    unknown = {name for name in program.ALLOWED if not {name, f"{name}_"} & set(schemas)}
    assert unknown <= {"nms", "pool_levels", "deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"}
    for text in (text for name in program.ALLOWED for text in schemas.get(name, [])):
        for word in ("filename", "Storage", "Stream", "Future", "ptr", "__torch__"):
            assert word not in text, text


def test_a_network_of_a_refused_operator_is_not_exported(tmp_path: Path) -> None:
    class Empties(Tiny):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {name: value + torch.empty(1) * 0 for name, value in super().forward(images).items()}

    with pytest.raises(ModelError, match="refused: its program names empty"):
        artifact.export(Empties(), SPEC, tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


def test_a_sound_artifact_still_loads(tiny: Path) -> None:
    module, spec = artifact.load(tiny)
    assert isinstance(artifact.forward(module, spec, torch.zeros(2, 3, 16, 16), torch.zeros(2, 2)), RawOutput)
