"""Which version of a model a file is, and what is said of one that is damaged, foreign or another than was meant."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from streamd.cli import exit_code_of
from streamd.config import Config, ModelConfig
from streamd.daemon import Daemon
from streamd.errors import ModelError
from streamd.model_file import ModelFile, is_replaced
from streamd.models import artifact
from streamd.models.weights import cache_directory
from tests.clips import write_clip
from tests.two_films import STREAMS, TwoFilms
from tests.versions import Squares, write_version


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("models") / "good.pt", "a" * 64)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip_a_weight(path: Path) -> None:
    """Change one byte of the network's own numbers, which lie uncompressed in the file."""
    content = bytearray(path.read_bytes())
    weights = content.find(torch.tensor([0.9, 0.1]).numpy().tobytes())
    assert weights > 0
    content[weights] ^= 0xFF
    path.write_bytes(content)


def forget_a_label(path: Path) -> None:
    """Write a network of two classes whose description knows three."""
    spec = msgspec.structs.replace(artifact.read_spec(path), labels=("person", "dog", "cat"))
    module, _ = artifact.load(path)
    torch.jit.save(module, str(path), _extra_files={artifact.SPEC_FILE: msgspec.json.encode(spec)})


def be_a_checkpoint(path: Path) -> None:
    torch.save(Squares().state_dict(), path)


def be_a_picture(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))


def be_torchscript_of_somebody_else(path: Path) -> None:
    module, _ = artifact.load(path)
    torch.jit.save(module, str(path))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "truncated|damaged|cannot read"),
    "a bit flipped": (flip_a_weight, "the file is damaged: the checksum of .* is wrong"),
    "wrong class count": (forget_a_label, r"wrong shapes for 1 image\(s\) and 3 labels"),
    "a checkpoint": (be_a_checkpoint, "this is a checkpoint; make an artifact with"),
    "no model": (be_a_picture, "not a model file"),
    "foreign TorchScript": (be_torchscript_of_somebody_else, "was not exported by streamd"),
    "empty": (lambda path: os.truncate(path, 0), "the file is empty"),
    "gone": (Path.unlink, "no such file"),
    "wrong hash": (lambda path: None, "its sha256 is [0-9a-f]{64}, and the configuration wants dddddddd"),
}


@pytest.fixture(params=WRONG)
def wrong(request: pytest.FixtureRequest, good: Path, tmp_path: Path) -> tuple[Path, dict[str, Any], str]:
    """Give a file, the keys of its model, and what must be said of it."""
    path = tmp_path / "wrong.pt"
    shutil.copy(good, path)
    spoil, complaint = WRONG[request.param]
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated
        spoil(path)
    return path, {"sha256": "d" * 64} if request.param == "wrong hash" else {}, complaint


def test_a_daemon_that_starts_with_a_wrong_file_says_so_once_and_exits_with_78(
    wrong: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    path, keys, complaint = wrong
    config = Config.model_validate(
        {
            "models": {"m": {"path": str(path), **keys}},
            "streams": {"gate": {"url": str(tmp_path / "none.mp4")}},
            "publish": {"zeromq": None},
            "metrics": {"listen": None},
        }
    )
    daemon = Daemon(config)
    too_late = threading.Timer(30, daemon.stop, ("it should not have started",))
    too_late.start()
    with pytest.raises(ModelError, match=complaint) as refused:
        daemon.run()
    too_late.cancel()
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert exit_code_of(refused.value) == 78


@pytest.fixture(scope="module")
def running(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoFilms]:
    clip = write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 60)
    site = TwoFilms(good, clip, for_ever=True)
    site.pipeline.start()
    yield site
    site.stop()
    assert site.crashes == []
    for name in STREAMS:
        seqs = [result.frame.seq for result in site.results[name]]
        assert seqs == sorted({*seqs}), "each frame once, in order"


def test_a_running_daemon_keeps_its_model_and_publishes_what_is_wrong_with_the_new_file(
    wrong: tuple[Path, dict[str, Any], str], running: TwoFilms
) -> None:
    path, keys, complaint = wrong
    before = running.pipeline.lanes
    running.statuses.clear()
    with pytest.raises(ModelError, match=complaint) as refused:
        running.swap(path, **keys)
    assert running.pipeline.lanes == before
    told = [status for status in running.statuses if str(refused.value) in status.reason]
    assert [status.stream for status in told] == [*STREAMS]


def test_a_pinned_file_is_loaded(good: Path) -> None:
    file = ModelFile(ModelConfig(path=str(good), sha256=sha256_of(good)))
    assert file.load("cpu", "auto").spec.name == "good"


def test_a_file_is_another_when_its_name_was_given_away_or_it_was_written_anew(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    config = ModelConfig(path=str(path))
    shutil.copy(good, path)
    file = ModelFile(config)
    assert not is_replaced(file, config) and file.is_same_as(ModelFile(config))
    write_version(path, "b" * 64)
    assert is_replaced(file, config)
    assert file.load("cpu", "auto").spec.weights_sha256 == "a" * 64, "it is held open"
    path.unlink()
    assert not is_replaced(file, config), "a file that is gone is no new version"
    assert file.load("cpu", "auto").path == path


def test_a_file_that_was_overwritten_in_place_cannot_be_gone_back_to(good: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "m.pt", write_version(tmp_path / "other.pt", "b" * 64)
    shutil.copy(good, path)
    file = ModelFile(ModelConfig(path=str(path)))
    path.write_bytes(other.read_bytes())
    with pytest.raises(ModelError, match="was overwritten since it was opened"):
        file.load("cpu", "auto")


def test_a_name_means_another_file_when_training_publishes_one(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    monkeypatch.setenv("STREAMD_MODELS", str(published))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache_directory().mkdir(parents=True)
    shutil.copy(good, cache_directory() / "people.pt")
    config = ModelConfig(path="people")
    file = ModelFile(config)
    assert file.path == cache_directory() / "people.pt"
    shutil.copy(good, published / "people.pt")
    assert is_replaced(file, config)


def test_no_descriptor_is_left_behind(good: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        ModelFile(ModelConfig(path=str(good)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_model_beside_others_is_frozen_by_another_process(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        raise AssertionError("it is frozen here, and every stream stands still")

    monkeypatch.setattr(artifact, "optimize", refuse)
    file = ModelFile(ModelConfig.model_validate({"path": str(good)}))
    good_spec = artifact.read_spec(good)
    assert file.load("cpu", "auto", beside=True).spec == good_spec
    with pytest.raises(AssertionError, match="stands still"):
        file.load("cpu", "auto")
