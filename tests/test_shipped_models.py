"""The models that the project ships load, are small, and say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamd.models import artifact, rebuild, weights
from tests.conftest import ROOT

SHIPPED = sorted((ROOT / "configs/models").glob("*.pt"))
MAX_BYTES = 8_000_000


def test_the_demos_model_is_shipped() -> None:
    assert "streamd-person" in [path.stem for path in SHIPPED]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_model_is_small_and_says_what_it_is(path: Path) -> None:
    assert path.stat().st_size <= MAX_BYTES
    spec = artifact.read_spec(path)
    assert spec.name == path.stem and spec.licence and spec.metrics and spec.weights_sha256
    artifact.load(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_model_has_a_card_with_the_accuracy_that_it_carries(path: Path) -> None:
    card = (ROOT / "docs" / f"{path.stem}.md").read_text()
    for name in ("boxes_ap50", "masks_ap50"):
        assert f"{100 * artifact.read_spec(path).metrics[name]:.1f}" in card, name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_model_can_be_trained_further(path: Path) -> None:
    blueprint = artifact.read_spec(path).blueprint
    assert blueprint is not None
    network, _ = rebuild.build(blueprint)
    state = artifact.read_state(path)
    network.load_state_dict({name: state[name] for name in network.state_dict()})


def test_shipped_model_is_found_by_its_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STREAMD_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    assert weights.resolve("streamd-person", download=False).samefile(ROOT / "configs/models/streamd-person.pt")
