"""A file is replaced in one step, or stays what it was."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from streamd.replacing import replacing


def test_the_new_file_is_private_until_it_takes_the_place(tmp_path: Path) -> None:
    path = tmp_path / "made" / "model.pt"
    with replacing(path) as new:
        new.write_text("new")
        assert not path.exists()
        assert stat.S_IMODE(new.stat().st_mode) == 0o600
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path, 0o600) as new:
        new.write_text("half")
        raise RuntimeError("no")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
