"""Checkpoints are read without being trusted; weights are found, fetched and exported."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from streamd.errors import ModelError
from streamd.models import BUILDERS, artifact, coco, weights
from streamd.models.spec import MaskRule
from streamd.models.yolox import yolox_nano

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity" / "yolox_nano"
CONTENT = os.urandom(1 << 20)

needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="needs ../shared/parity/yolox_nano")


class Release(http.server.BaseHTTPRequestHandler):
    """A server of releases, where one path is good and each other one fails in its own way."""

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path == "/cut" else CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Release) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Look for models in no directory but an empty cache."""
    monkeypatch.delenv("STREAMD_MODELS", raising=False)
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def release_at(monkeypatch: pytest.MonkeyPatch, url: str, content: bytes = CONTENT) -> None:
    release = weights.Release(url, hashlib.sha256(content).hexdigest(), 25.8)
    monkeypatch.setitem(weights.RELEASES, "yolox_nano", release)


def small_state(num_classes: int = 2, num_prototypes: int = 0) -> dict[str, Tensor]:
    return yolox_nano(num_classes, num_prototypes).state_dict()


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("key", ["model", "ema", "state_dict", None])
def test_a_state_dict_is_read_from_each_known_layout(tmp_path: Path, key: str | None) -> None:
    state = {"a.weight": torch.arange(3.0)}
    path = save(tmp_path / "w.pth", {key: state, "epoch": 3, "optimizer": {"state": {}}} if key else state)
    assert weights.read_checkpoint(path)["a.weight"].tolist() == [0, 1, 2]


def test_a_checkpoint_with_a_numpy_number_beside_the_weights_is_read(tmp_path: Path) -> None:
    best = {"best_ap": np.float64(0.25), "curr_ap": np.float32(0.2), "start_epoch": np.int64(3)}
    path = save(tmp_path / "w.pth", {"model": {"a": torch.zeros(1)}} | best)
    assert list(weights.read_checkpoint(path)) == ["a"]


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", {"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}})
    assert weights.read_checkpoint(path)["a"].item() == 1


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    for path in (tmp_path / "zip.pth", tmp_path / "pickle.pth"):
        if path.stem == "zip":
            torch.save({"model": Hostile(tmp_path / "harm")}, path)
        else:
            path.write_bytes(pickle.dumps({"model": Hostile(tmp_path / "harm")}))
        with pytest.raises(ModelError, match=r"\.pth: cannot be read as a checkpoint"):
            weights.read_checkpoint(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04", b"\x80\x02", b"\x80\x05K\x01.", os.urandom(4096)])
def test_a_foreign_checkpoint_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.pth: (cannot be read as a (checkpoint|zip archive)|holds no state)"):
        weights.read_checkpoint(path)


def test_a_truncated_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", {"model": {"a": torch.zeros(10_000)}})
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ModelError, match=r"w\.pth: cannot be read as a zip archive: it is truncated"):
        weights.read_checkpoint(path)


@pytest.mark.parametrize("content", [{"model": {}}, {"model": {"a": 1}}, {"epoch": 3}, torch.zeros(2), [1], {}])
def test_a_file_without_a_state_dict_is_one_clear_error(tmp_path: Path, content: object) -> None:
    with pytest.raises(ModelError, match="holds no state dict"):
        weights.read_checkpoint(save(tmp_path / "w.pth", content))


def test_a_missing_checkpoint_or_a_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        weights.read_checkpoint(tmp_path / "w.pth")
    with pytest.raises(ModelError, match="is a directory"):
        weights.read_checkpoint(tmp_path)


def test_parameters_that_do_not_fit_are_all_counted_and_none_is_loaded() -> None:
    network = yolox_nano(2)
    before = network.state_dict()["head.cls_preds.1.bias"].clone()
    state = {key: tensor + 1 for key, tensor in small_state(3).items() if "lateral_conv0" not in key}
    with pytest.raises(ModelError) as caught:
        weights.load_weights(network, state | {"extra.weight": torch.zeros(1)})
    message = str(caught.value)
    assert "6 missing (backbone.lateral_conv0.bn.bias, " in message and "backbone.lateral_conv0.conv.weight" in message
    assert "1 unknown (extra.weight)" in message
    assert "head.cls_preds.0.weight is [3, 64, 1, 1] instead of [2, 64, 1, 1], " in message
    assert torch.equal(network.state_dict()["head.cls_preds.1.bias"], before)


def test_only_the_named_prefixes_may_be_missing() -> None:
    network = yolox_nano(2, num_prototypes=4)
    with pytest.raises(ModelError, match=r"missing \(masks\."):
        weights.load_weights(network, small_state())
    weights.load_weights(network, small_state(), allow_missing_prefixes=("masks.",))


def test_models_are_looked_for_in_the_named_directories_then_in_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("STREAMD_MODELS", f"{first}:{second}")
    for directory in (cache, second, first):
        directory.mkdir(parents=True)
        (directory / "mine.pth").touch()
        assert weights.find("mine", download=False) == directory / "mine.pth"
    (first / "mine.pt").touch()
    assert weights.find("mine") == first / "mine.pt"


def test_the_cache_follows_systemd_then_xdg_then_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/streamd:/var/cache/other")
    assert weights.cache_directory() == Path("/var/cache/streamd/models")
    monkeypatch.delenv("CACHE_DIRECTORY")
    assert weights.cache_directory() == Path("/xdg/streamd/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.cache_directory() == Path.home() / ".cache/streamd/models"


def test_an_unknown_name_is_an_error_that_says_where_was_looked(cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        weights.resolve("yolo_nano")
    assert str(cache) in str(caught.value)
    assert "yolox_nano, yolox_tiny" in str(caught.value)


def test_a_release_is_fetched_once_with_progress(server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release_at(monkeypatch, f"{server}/good")
    seen: list[tuple[int, int | None]] = []
    path = weights.find("yolox_nano", progress=lambda done, total: seen.append((done, total)))
    assert path == cache / "yolox_nano.pth"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    release_at(monkeypatch, f"{server}/missing")
    assert weights.find("yolox_nano") == path


def test_a_progress_bar_is_drawn_on_stderr(
    server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release_at(monkeypatch, f"{server}/good")
    weights.find("yolox_nano")
    drawn = capsys.readouterr()
    assert drawn.out == ""
    assert "yolox_nano.pth" in drawn.err


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/missing", "the server answers 404"), ("/cut", "cut off after 1000 of 1048576 bytes|IncompleteRead")],
)
def test_a_failed_download_says_why_and_leaves_no_file(
    server: str, cache: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    release_at(monkeypatch, server + path)
    with pytest.raises(ModelError, match=reason):
        weights.find("yolox_nano", progress=lambda done, total: None)
    assert list(cache.iterdir()) == []


def test_a_download_with_another_sha256_is_not_kept(server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release_at(monkeypatch, f"{server}/good", content=b"what was published")
    with pytest.raises(ModelError, match=r"its sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}; the file was not kept"):
        weights.find("yolox_nano", progress=lambda done, total: None)
    assert list(cache.iterdir()) == []


def test_without_a_network_the_error_says_which_file_to_put_where(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:9/yolox_nano.pth"  # the discard port: refused
    release_at(monkeypatch, url)
    for download in (True, False):
        with pytest.raises(ModelError) as caught:
            weights.resolve("yolox_nano", download=download, progress=lambda done, total: None)
        message = str(caught.value)
        assert ("Connection refused" in message) == download
        assert f"Fetch {url} on a machine with a network, put it at {cache / 'yolox_nano.pth'}" in message
        assert "$STREAMD_MODELS" in message
        assert message.endswith("run the same command again")


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot write"):
        weights.find("yolox_nano", progress=lambda done, total: None)


def test_every_network_has_a_release_with_its_own_sha256() -> None:
    assert list(weights.RELEASES) == list(BUILDERS)
    assert len({release.sha256 for release in weights.RELEASES.values()}) == len(weights.RELEASES)
    assert all(len(bytes.fromhex(release.sha256)) == 32 for release in weights.RELEASES.values())


@needs_parity
def test_a_name_becomes_an_artifact_that_is_made_only_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMD_MODELS", str(PARITY))
    path = weights.resolve("yolox_nano")
    made_at = path.stat().st_mtime_ns
    assert path.parent == cache
    assert weights.resolve("yolox_nano") == weights.resolve(PARITY / "yolox_nano.pth") == weights.resolve(path) == path
    assert path.stat().st_mtime_ns == made_at
    path.write_bytes(path.read_bytes()[:1000])
    assert artifact.read_spec(weights.resolve("yolox_nano")).labels == coco.LABELS


def test_an_export_of_custom_classes_and_masks_says_what_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", {"model": small_state(2)})
    spec = weights.export_checkpoint("yolox_nano", path, tmp_path / "m.pt", labels=["cat", "dog"], num_prototypes=4)
    assert spec == artifact.read_spec(tmp_path / "m.pt")
    assert (spec.task, spec.labels, spec.masks) == ("segment", ("cat", "dog"), MaskRule())
    assert spec.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (spec.licence, spec.metrics) == ("", {})  # nobody knows them of a file that was not published


def test_a_mask_branch_in_the_checkpoint_is_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", {"model": small_state(2, num_prototypes=4)})
    spec = weights.export_checkpoint("yolox_nano", path, tmp_path / "m.pt", labels=["cat", "dog"])
    assert spec.masks == MaskRule()


def test_an_official_release_carries_its_licence_and_published_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "w.pth", {"model": small_state(80)})
    release_at(monkeypatch, "http://127.0.0.1:9/", path.read_bytes())
    spec = weights.export_checkpoint("yolox_nano", path, tmp_path / "m.pt")
    assert spec.licence == "Apache-2.0 (YOLOX, Megvii Inc.)"
    assert spec.metrics == {"coco_ap_published": 25.8}
    assert (spec.colour, spec.input_size, spec.labels) == ("bgr", (416, 416), coco.LABELS)


@pytest.mark.parametrize("labels", [None, ["cat"]])
def test_labels_that_do_not_match_the_classes_are_an_error(tmp_path: Path, labels: list[str] | None) -> None:
    path = save(tmp_path / "w.pth", {"model": small_state(2)})
    with pytest.raises(ModelError, match="has 2 classes, so it needs 2 label names"):
        weights.export_checkpoint("yolox_nano", path, tmp_path / "m.pt", labels=labels)


def test_a_checkpoint_of_another_network_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", {"model": small_state(80)})
    with pytest.raises(ModelError, match=r"w\.pth: not a checkpoint of yolox_tiny: .*of another shape"):
        weights.export_checkpoint("yolox_tiny", path, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"yolov9: no such network; the networks are yolox_nano"):
        weights.export_checkpoint("yolov9", path, tmp_path / "m.pt")
    with pytest.raises(ModelError, match="not a checkpoint of a network that streamd knows"):
        weights.resolve(save(tmp_path / "foreign.pth", {"model": {"fc.weight": torch.zeros(1)}}))


def test_a_path_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path, message in (
        (tmp_path / "notes.txt", "not a model file"),
        (tmp_path / "gone.pt", "no such file"),
        (tmp_path / "gone.pth", "no such file"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(ModelError, match=message):
            weights.resolve(path)
