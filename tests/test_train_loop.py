"""Tests of streamd/train/loop.py: a run goes on as if it had not been stopped, and does not depend on how it is cut."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from streamd.errors import ConfigError, DataError
from streamd.infer import Model
from streamd.models import artifact
from streamd.models.weights import yolox_spec
from streamd.models.yolox import yolox_nano
from streamd.train import recipe as recipes
from streamd.train.loop import train
from tests.coco_folder import LABELS, write_coco

ROOT = Path(__file__).parents[1]
RECIPE = """
name: shapes
model: {{{model}}}
data:
  train: {{path: data/instances.json}}
  val: {{path: data/instances.json}}
  workers: 0
augment: {{hue: 0.0, saturation: 0.0, value: 0.0}}
optimizer: {{lr: 0.02, warmup_epochs: 0.5}}
epochs: 3
batch_size: 4
evaluate_every: 3
seed: 7
"""

FROM_NOTHING = "start: yolox_nano, weights: none, input_size: [64, 96]"
SEGMENTER = f"{FROM_NOTHING}, prototypes: 4"

MakeRecipe = Callable[..., Path]


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    """Write the data and a recipe; what is given goes into its `model:`."""

    def make(model: str = FROM_NOTHING, num_pictures: int = 16) -> Path:
        write_coco(tmp_path / "data", num_pictures)
        path = tmp_path / "shapes.yaml"
        path.write_text(RECIPE.format(model=model))
        return path

    return make


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export an untrained network, whose norms a recipe can freeze."""
    torch.manual_seed(0)
    network = yolox_nano(num_classes=len(LABELS), num_prototypes=4, input_size=(64, 96)).eval()
    path = tmp_path_factory.mktemp("models") / "segmenter.pt"
    artifact.export(network, yolox_spec("yolox_nano", network, LABELS), path)
    return path


def run(recipe: Path, out: Path, *overrides: str, resume: bool = False, publish: str | None = None) -> str:
    """Train in this process and return what was shown."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    assert train(recipes.load(recipe, overrides), out, console, resume=resume, publish=publish) == 0
    return text.getvalue()


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(out: Path, part: str = "network") -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(out / "last.ckpt", weights_only=True)[part]
    return state


def assert_same(first: Path, second: Path) -> None:
    for part in ("network", "average"):
        expected, got = weights(first, part), weights(second, part)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, msg=f"{part} {name}")
    assert losses(first) == losses(second)


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "streamd", "train", str(recipe), "--out", str(out), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def wait_for_steps(out: Path, num_steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "last.ckpt").exists() and len(losses(out)) >= num_steps:
            return
        time.sleep(0.01)
    pytest.fail(f"no {num_steps} steps: {process.communicate(timeout=5)}")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Let torch add in one order, here and in other processes."""
    torch.set_num_threads(1)


def test_run_leaves_everything_that_is_needed_to_repeat_and_to_judge_it(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMD_MODELS", str(tmp_path / "models"))
    out = tmp_path / "run"
    shown = run(make_recipe(SEGMENTER), out, publish="shapes-live")
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "last.ckpt", "best.ckpt", "shapes.pt", "scores.json"):
        assert (out / name).stat().st_size > 0, name
    for name in ("curves.png", "precision_recall.png", "confusion.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG", name
    assert any((out / "tensorboard").iterdir())
    described = json.loads((out / "run.json").read_text())
    assert described["labels"] == list(LABELS) and described["seed"] == 7
    assert described["data"]["train"]["pictures"] == 16 and described["data"]["train"]["fingerprint"]
    assert torch.__version__.startswith(described["starts"][0]["versions"]["torch"])
    assert recipes.load(out / "recipe.yaml").epochs == 3
    spec = artifact.read_spec(out / "shapes.pt")
    assert (spec.name, spec.task, spec.labels) == ("shapes", "segment", LABELS)
    assert set(spec.metrics) >= {"boxes_ap50", "masks_ap50"}
    assert (tmp_path / "models" / "shapes-live.pt").read_bytes() == (out / "shapes.pt").read_bytes()
    assert "epoch 3: boxes_ap" in shown and "published as shapes-live" in shown
    assert Model(out / "shapes.pt", "cpu").spec == spec


def test_same_seed_gives_the_same_run_and_another_gives_another(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    run(recipe, tmp_path / "a", "epochs=1")
    run(recipe, tmp_path / "b", "epochs=1")
    run(recipe, tmp_path / "c", "epochs=1", "seed=8")
    assert_same(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_comes_to_the_same_result(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, out = make_recipe(SEGMENTER), tmp_path / "killed"
    run(recipe, tmp_path / "whole", "keep_every_s=0.0001")
    for num_steps in (2, 5, 9):
        process = subprocess.Popen(
            command(recipe, out, "keep_every_s=0.0001", "--resume"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for_steps(out, num_steps, process)
        process.kill()
        process.communicate()
    shown = run(recipe, out, "keep_every_s=0.0001", resume=True)
    assert "going on at epoch" in shown
    assert_same(tmp_path / "whole", out)
    assert len(json.loads((out / "run.json").read_text())["starts"]) == 4


@pytest.mark.slow
def test_signal_stops_a_run_after_its_step_and_says_how_it_goes_on(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, out = make_recipe(), tmp_path / "stopped"
    run(recipe, tmp_path / "whole")
    process = subprocess.Popen(
        command(recipe, out, "keep_every_s=0.0001"), env=environment(), stdout=subprocess.PIPE, text=True
    )
    wait_for_steps(out, 3, process)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in shown
    run(recipe, out, "keep_every_s=0.0001", resume=True)
    assert_same(tmp_path / "whole", out)


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(make_recipe: MakeRecipe, segmenter: Path, tmp_path: Path) -> None:
    recipe = make_recipe(f"start: {segmenter}, norms: freeze")
    run(recipe, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(recipe, tmp_path / "two")[1:]
    subprocess.run([*torchrun, *arguments], env=environment(), check=True, capture_output=True, timeout=300)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    expected, got = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_processes_start_again_and_go_on_when_one_of_them_is_killed(
    make_recipe: MakeRecipe, segmenter: Path, tmp_path: Path
) -> None:
    recipe, out = make_recipe(f"start: {segmenter}, norms: freeze"), tmp_path / "two"
    run(recipe, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "1", "--monitor-interval", "0.2"]
    process = subprocess.Popen(
        [*torchrun, *command(recipe, out, "keep_every_s=0.0001")[1:]],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_steps(out, 3, process)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    assert "going on at epoch" in shown
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_batch_in_two_parts_gives_what_the_whole_gives(
    make_recipe: MakeRecipe, segmenter: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(f"start: {segmenter}, norms: freeze")
    run(recipe, tmp_path / "whole", "batch_size=8", "epochs=2", "evaluate_every=2")
    run(recipe, tmp_path / "parts", "batch_size=8", "epochs=2", "evaluate_every=2", "accumulate=2")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_half_precision_falls_like_full_precision(make_recipe: MakeRecipe, segmenter: Path, tmp_path: Path) -> None:
    recipe = make_recipe(f"start: {segmenter}, norms: freeze")
    run(recipe, tmp_path / "fp32", "epochs=2", "evaluate_every=2")
    run(recipe, tmp_path / "bf16", "epochs=2", "evaluate_every=2", "precision=bf16")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.05)


def test_folder_of_another_run_is_not_written_over(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, out = make_recipe(), tmp_path / "run"
    run(recipe, out, "epochs=1")
    with pytest.raises(ConfigError, match="holds a run already; go on with it by --resume"):
        run(recipe, out, "epochs=1")
    with pytest.raises(ConfigError, match="another recipe"):
        run(recipe, out, "epochs=2", resume=True)


def test_damaged_state_is_refused_and_kept(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, out = make_recipe(), tmp_path / "run"
    run(recipe, out, "epochs=1")
    state = (out / "last.ckpt").read_bytes()
    (out / "last.ckpt").write_bytes(state[: len(state) // 2])
    with pytest.raises(DataError, match="cannot be read as the state of a run"):
        run(recipe, out, "epochs=1", resume=True)


def test_loss_that_is_no_number_stops_the_run_and_says_what_to_try(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no finite number.*lower optimizer\.lr"):
        run(make_recipe(), tmp_path / "run", "optimizer.lr=1e30", "optimizer.clip_norm=null")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [("batch_size=32", "not one step"), ("accumulate=3", "cannot share evenly"), ("sync_batch_norm=true", "GPUs")],
)
def test_numbers_that_do_not_fit_each_other_are_refused(
    make_recipe: MakeRecipe, tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(make_recipe(), tmp_path / "run", override)
