"""Which files a command line means."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamd.files import Unique, as_name, expand


def test_a_folder_stands_for_the_pictures_and_videos_in_it(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.mp4", "notes.txt", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.png").touch()
    assert expand([tmp_path]) == ([tmp_path / "a.mp4", tmp_path / "b.JPG"], [])


def test_a_file_that_is_named_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "IMG_0001").touch()
    assert expand([tmp_path / "IMG_0001"])[0] == [tmp_path / "IMG_0001"]


def test_what_is_missing_or_empty_is_said_with_its_path(tmp_path: Path) -> None:
    paths, refused = expand([tmp_path / "none.jpg", tmp_path])
    assert not paths
    assert refused[0] == f"{tmp_path}/none.jpg: there is no such file; check the path"
    assert refused[1].startswith(f"{tmp_path}: holds no picture or video")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("bus.jpg", "bus.jpg"),
        ("Büro 1.mp4", "B_ro_1.mp4"),
        (".hidden", "hidden"),
        ("日本", "file"),
        ("a" * 99, "a" * 48),
    ],
)
def test_a_file_name_becomes_one_that_a_stream_may_have(text: str, name: str) -> None:
    assert as_name(text) == name


def test_no_name_is_given_twice() -> None:
    names = Unique()
    given = [
        names.name("bus", ".jpg"),
        names.name("bus", ".png"),
        names.name("BUS", ".jpg"),
        names.name("bus-2", ".jpg"),
    ]
    assert given == ["bus.jpg", "bus.png", "BUS-2.jpg", "bus-2-2.jpg"]
