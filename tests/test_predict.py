"""Every frame of every file gets its message, and a bad file is said and passed by."""

from __future__ import annotations

import io
import json
import logging
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from PIL import Image
from rich.console import Console

from streamd.draw import VideoWriter
from streamd.errors import ModelError, OutputError
from streamd.predict import predict


def make_picture(path: Path, shade: int = 90) -> Path:
    Image.fromarray(np.full((48, 64, 3), shade, np.uint8)).save(path)
    return path


def make_video(path: Path, num_frames: int = 12) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (num_frames, 48, 64, 3), np.uint8)
    with VideoWriter(path) as writer:
        for index, picture in enumerate(noise):
            writer.write(picture, index / 10)
    return path


def messages_of(model: Path, *files: Path, expect: int = 0, **options: Any) -> list[dict[str, Any]]:
    """Run `predict --json` and return its lines."""
    console = Console(file=io.StringIO(), width=20)  # no line may be wrapped
    assert predict(str(model), files, json_lines=True, console=console, **options) == expect
    return [json.loads(line) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_every_frame_of_a_video_gets_a_message_in_order(untrained_artifact: Path, tmp_path: Path) -> None:
    messages = messages_of(untrained_artifact, make_video(tmp_path / "street.mp4", 40))
    assert [message["seq"] for message in messages] == list(range(40))
    assert [message["pts"] for message in messages] == pytest.approx([index / 10 for index in range(40)], abs=1e-3)
    assert {(message["stream"], message["width"], message["height"]) for message in messages} == {
        ("street.mp4", 64, 48)
    }
    assert messages[0]["model"]["name"] == "untrained"


def test_a_bare_h264_stream_has_no_times_and_still_loses_no_frame(
    untrained_artifact: Path, demo_clip: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.h264"
    with av.open(demo_clip) as source, bare.open("wb") as file:
        to_bytes = BitStreamFilterContext("h264_mp4toannexb", source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            for converted in to_bytes.filter(packet):
                file.write(bytes(converted))
    times_s = [message["pts"] for message in messages_of(untrained_artifact, bare)]
    assert len(times_s) == 250 and times_s == sorted(set(times_s))


def test_lines_come_in_the_order_of_the_files_though_a_video_takes_longest(
    untrained_artifact: Path, tmp_path: Path
) -> None:
    files = [make_video(tmp_path / "a.mp4", 60), *(make_picture(tmp_path / f"{index}.png") for index in range(20))]
    streams = [message["stream"] for message in messages_of(untrained_artifact, *files)]
    assert streams == ["a.mp4"] * 60 + [f"{index}.png" for index in range(20)]


def test_files_of_one_name_keep_apart(untrained_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files = [make_picture(tmp_path / "a.png"), make_picture(tmp_path / "other" / "a.png")]
    out = tmp_path / "out"
    streams = [message["stream"] for message in messages_of(untrained_artifact, *files, out=out)]
    assert streams == ["a.png", "a.png-2"]
    assert sorted(path.name for path in out.iterdir()) == ["a-2.png", "a.png"]


def test_a_bad_file_is_one_line_on_stderr_and_the_others_are_processed(
    untrained_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, empty, whole = tmp_path / "text.mp4", tmp_path / "empty.mp4", make_picture(tmp_path / "whole.jpg")
    text.write_text("this is not a video\n" * 100)
    empty.touch()
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear reader,\n" * 100)
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        voice = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(voice.encode(silence))
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:200])
    files = [text, tmp_path / "missing.jpg", empty, letter, sound, cut, whole]

    messages = messages_of(untrained_artifact, *files, expect=1)

    assert [message["stream"] for message in messages] == ["whole.jpg"]
    lines = capfd.readouterr().err.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == sorted(str(path) for path in files if path != whole)
    said = {line.split(":")[0]: line.split(": ", 1)[1] for line in lines}
    assert "there is no such file" in said[str(tmp_path / "missing.jpg")]
    assert "a text file" in said[str(letter)]
    assert "no video stream" in said[str(sound)]
    assert all(";" in sentence for sentence in said.values()), "each says what to do"


def test_only_bad_files_load_no_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert predict("no such model", [tmp_path / "missing.jpg"], console=Console(file=io.StringIO())) == 1
    assert "missing.jpg: there is no such file" in capfd.readouterr().err


def test_many_pictures_start_few_threads_and_load_the_model_once(
    untrained_artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(120):
        make_picture(tmp_path / f"{index:03}.png", index)
    counts: list[int] = []
    start = threading.Thread.start

    def counted_start(thread: threading.Thread) -> None:
        start(thread)
        counts.append(sum(other.name.startswith("stream") for other in threading.enumerate()))

    monkeypatch.setattr(threading.Thread, "start", counted_start)
    with caplog.at_level(logging.INFO, logger="streamd"):
        messages = messages_of(untrained_artifact, tmp_path)
    assert len(messages) == 120
    assert max(counts) <= 16, "eight, and those that are just ending"
    assert sum(record.message.startswith("model ") for record in caplog.records) == 1


def test_pictures_and_videos_are_drawn_under_their_own_names(untrained_artifact: Path, tmp_path: Path) -> None:
    files = [make_picture(tmp_path / "a.jpg"), make_picture(tmp_path / "b.bmp"), make_video(tmp_path / "c.mp4")]
    out = tmp_path / "new" / "out"
    predict(str(untrained_artifact), files, out=out, score_threshold=0, console=Console(file=io.StringIO()))
    assert sorted(path.name for path in out.iterdir()) == ["a.jpg", "b.png", "c.mp4"]
    assert (np.asarray(Image.open(out / "b.png")) != np.asarray(Image.open(tmp_path / "b.bmp"))).any()
    with av.open(str(out / "c.mp4")) as container:
        times_s = [frame.time for frame in container.decode(video=0)]
    assert times_s == pytest.approx([index / 10 for index in range(12)], abs=1e-3)


def test_a_drawn_picture_never_overwrites_its_own_file(
    untrained_artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = make_picture(tmp_path / "a.png")
    before = picture.read_bytes()
    assert predict(str(untrained_artifact), [picture], out=tmp_path, console=Console(file=io.StringIO())) == 2
    assert picture.read_bytes() == before
    assert "choose another --out" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_is_said(untrained_artifact: Path, tmp_path: Path) -> None:
    picture = make_picture(tmp_path / "a.png")
    with pytest.raises(OutputError, match=r"a\.png: cannot make the folder"):
        predict(str(untrained_artifact), [picture], out=picture, console=Console(file=io.StringIO()))


def test_a_wrong_model_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("no model")
    with pytest.raises(ModelError):
        predict(str(tmp_path / "model.pt"), [make_picture(tmp_path / "a.png")], console=Console(file=io.StringIO()))


def test_a_reader_that_goes_away_leaves_no_thread_behind(untrained_artifact: Path, tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    video = make_video(tmp_path / "a.mp4", 60)
    with pytest.raises(BrokenPipeError):
        predict(str(untrained_artifact), [video], json_lines=True, console=Console(file=Closed()))
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("stream", "infer"))]


def test_the_score_threshold_decides_what_is_seen(untrained_artifact: Path, tmp_path: Path) -> None:
    picture = make_picture(tmp_path / "a.png")
    (everything,) = messages_of(untrained_artifact, picture, score_threshold=0)
    (nothing,) = messages_of(untrained_artifact, picture, score_threshold=1)
    assert len(everything["objects"]) == 100 and nothing["objects"] == []


def test_the_summary_counts_what_was_seen(nano_artifact: Path, demo_clip: Path, shared: Path) -> None:
    pictures = sorted((shared / "data/persons/images").glob("*.jpg"))[:3]
    console = Console(file=io.StringIO(), width=100)
    assert predict(str(nano_artifact), pictures, console=console) == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 files" in shown and shown.count("person") == 4, "one line for each, and the sum"
