"""An archive that asks for more memory than it holds is refused before torch reads it."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models import archive, artifact
from streamd.models.spec import ModelSpec
from streamd.models.weights import read_checkpoint
from tests.hostile import rewritten

SPEC = ModelSpec(name="tiny", task="detect", labels=("a",), input_size=(16, 16), colour="rgb")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        boxes = (images.mean((1, 2, 3))[:, None] + self.weight)[:, None]
        return {"boxes": boxes, "scores": boxes[..., :1].sigmoid()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.pt"
    artifact.export(Tiny(), SPEC, path)
    return path


def with_entry(model: Path, target: Path, entry: str, old: bytes, new: bytes) -> Path:
    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith(f"/{entry}"):
            return content
        assert content.count(old) == 1, content
        return content.replace(old, new)

    return rewritten(model, target, edit)


NUMEL = b"K\x04tQ"  # 4, the end of the tuple, and its persistent id


@pytest.mark.parametrize("claimed", [5, 100_000_000, -1])
def test_a_tensor_that_says_it_has_more_bytes_than_its_entry_is_refused(
    tiny: Path, tmp_path: Path, claimed: int
) -> None:
    """torch.jit.load believes it: the model would then read, and publish, what else is in memory, or crash."""
    new = b"J" + struct.pack("<i", claimed) + b"tQ"
    hostile = with_entry(tiny, tmp_path / "m.pt", "data.pkl", NUMEL, new)
    with pytest.raises(ModelError, match=rf"m\.pt: refused: a tensor says that it has {claimed} Float in data/0 of 16"):
        artifact.load(hostile)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"torch FloatStorage"[6:] + b"\n", b"QInt8Storage\n", "names 'torch QInt8Storage'"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", "names 'torch._utils"),
        (NUMEL, b"K\x02K\x02\x86tQ", "refers to a tensor's bytes in a way"),
        (NUMEL, b"0K\x04\x85Q", "uses POP"),
        (NUMEL, b"K\x04tB\x04\0\0\0", "uses BINBYTES"),
    ],
)
def test_a_description_that_torch_would_not_write_is_refused(
    tiny: Path, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    hostile = with_entry(tiny, tmp_path / "m.pt", "data.pkl", old, new)
    with pytest.raises(ModelError, match=rf"m\.pt: refused: its data\.pkl {message}"):
        artifact.load(hostile)


def test_a_class_of_c_plus_plus_is_refused(tiny: Path, tmp_path: Path) -> None:
    def edit(name: str, content: bytes) -> bytes:
        class_name = b"c__torch__.torch.classes.c10d\nTCPStore\n"
        return b"\x80\x02" + class_name + b")\x81." if name.endswith("/data.pkl") else content

    with pytest.raises(ModelError, match=r"refused: its data\.pkl names '__torch__\.torch\.classes\.c10d TCPStore'"):
        artifact.load(rewritten(tiny, tmp_path / "m.pt", edit))


def test_an_archive_whose_entries_multiply_is_refused(tiny: Path, tmp_path: Path) -> None:
    grown = tmp_path / "m.pt"
    with zipfile.ZipFile(tiny) as old, zipfile.ZipFile(grown, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("m/data/9", bytes(archive.MAX_COMPRESSED_BYTES))
    assert grown.stat().st_size < 1 << 20
    with pytest.raises(ModelError, match=r"m\.pt: refused: compressed entries would grow to \d+ bytes; 64 MiB may be"):
        artifact.load(grown)
    with pytest.raises(ModelError, match=r"m\.pt: refused: compressed entries would grow"):
        read_checkpoint(grown)


def test_an_entry_that_says_it_is_larger_than_the_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    grown = tmp_path / "m.pt"
    with zipfile.ZipFile(grown, "w") as file:
        file.writestr("m/data/9", b"1234")
    content = grown.read_bytes()
    at = content.index(b"PK\x01\x02") + 20  # of the sizes in the directory
    grown.write_bytes(content[:at] + struct.pack("<II", 1 << 31, 1 << 31) + content[at + 8 :])
    with pytest.raises(ModelError, match=r"m\.pt: refused: its entries say that they have 2147483648 bytes"):
        read_checkpoint(grown)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.json", "an archive of before 2019|archive of before"),
        ("code/" + "x" * 300 + ".py", "305|308 characters"),
    ],
)
def test_names_that_would_lead_torchs_reader_astray_are_refused(
    tiny: Path, tmp_path: Path, name: str, message: str
) -> None:
    hostile = rewritten(tiny, tmp_path / "m.pt", lambda _, content: content)
    with zipfile.ZipFile(hostile) as file:
        folder = file.namelist()[0].partition("/")[0]
    with zipfile.ZipFile(hostile, "a") as file:
        file.writestr(f"{folder}/{name}", b"{}")
    with pytest.raises(ModelError, match=rf"m\.pt: refused: .*({message})"):
        artifact.load(hostile)


def test_a_description_larger_than_any_model_needs_is_refused(tiny: Path, tmp_path: Path) -> None:
    def spec(name: str, content: bytes) -> bytes:
        return content + b" " * archive.MAX_SPEC_BYTES if name.endswith("streamd.json") else content

    with pytest.raises(ModelError, match=r"m\.pt: its streamd\.json is larger than 1 MiB"):
        artifact.read_spec(rewritten(tiny, tmp_path / "m.pt", spec))

    def tensors(name: str, content: bytes) -> bytes:
        return content + bytes(archive.MAX_PICKLE_BYTES) if name.endswith("/data.pkl") else content

    with pytest.raises(ModelError, match=r"m\.pt: refused: its data\.pkl has \d+ bytes, and 16 MiB may be"):
        artifact.load(rewritten(tiny, tmp_path / "m.pt", tensors))
