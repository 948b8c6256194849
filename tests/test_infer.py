"""A model runs as its network does, says what is wrong with it, and is run as the configuration and the clock say."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from streamd.errors import ConfigError, ModelError
from streamd.infer import Model, Plan, Wish, choose_plan
from streamd.messages import RawOutput
from streamd.models import artifact
from streamd.models.spec import MaskRule, ModelSpec
from tests.fakes import in_threads

SIZE = (16, 24)
DETECT = ModelSpec(name="tiny", task="detect", labels=("a", "b"), input_size=SIZE, colour="rgb")
SEGMENT = ModelSpec(name="tiny", task="segment", labels=("a", "b"), input_size=SIZE, colour="rgb", masks=MaskRule())


class Tiny(nn.Module):
    """A network of a few weights that keeps the contract: a candidate at each of [4, 6] cells."""

    def __init__(self, *, with_masks: bool = False, with_extra: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.SiLU())
        self.head = nn.Conv2d(8, 4 + 2 + 3, 1)
        self.with_masks = with_masks
        self.with_extra = with_extra

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images / 255)
        cells = self.head(features).flatten(2).transpose(1, 2)
        output = {"boxes": cells[..., :4], "scores": cells[..., 4:6].sigmoid()}
        if self.with_masks:
            output |= {"prototypes": features[:, :3], "coefficients": cells[..., 6:]}
        if self.with_extra:
            output |= {"embeddings": cells}
        return output


class RefusesLargeBatches(Tiny):
    """Works at the sizes that the exporter tries, and fails from eight images on."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        output = super().forward(images)
        limit = torch.zeros(7)
        index = torch.arange(images.shape[0])
        return output | {"scores": output["scores"] + limit[index].view(-1, 1, 1)}


def batch_of(num_images: int) -> tuple[Tensor, Tensor]:
    images = torch.rand(num_images, 3, *SIZE, generator=torch.Generator().manual_seed(num_images)) * 255
    return images, torch.tensor([SIZE] * num_images, dtype=torch.float32)


@pytest.fixture(scope="module")
def network() -> Tiny:
    torch.manual_seed(0)
    return Tiny(with_masks=True).eval()


@pytest.fixture(scope="module")
def model(network: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("models") / "tiny.pt"
    artifact.export(network, SEGMENT, path)
    return Model(path, "cpu")


@pytest.mark.parametrize("num_images", [1, 2, 5, 16])
def test_a_model_computes_what_its_network_does(model: Model, network: Tiny, num_images: int) -> None:
    images, sizes = batch_of(num_images)
    with torch.inference_mode():
        expected = network(images)
    output = model.run(images, sizes)
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(output, name), tensor, rtol=1e-4, atol=1e-4)


def test_workers_may_run_one_model_at_once(model: Model, network: Tiny) -> None:
    def work() -> None:
        for size in (1, 3, 7):
            with torch.inference_mode():
                expected = network(batch_of(size)[0])["scores"]
            torch.testing.assert_close(model.run(*batch_of(size)).scores, expected, rtol=1e-4, atol=1e-4)

    in_threads([work] * 4)


def test_a_model_without_masks_has_none(tmp_path: Path) -> None:
    artifact.export(Tiny(), DETECT, tmp_path / "m.pt")
    output = Model(tmp_path / "m.pt", "cpu").run(*batch_of(2))
    assert output.boxes.shape == (2, 24, 4) and output.prototypes is None and output.coefficients is None


def test_an_output_that_the_daemon_does_not_know_is_left_aside(tmp_path: Path) -> None:
    artifact.export(Tiny(with_extra=True), DETECT, tmp_path / "m.pt")
    model = Model(tmp_path / "m.pt", "cpu")
    assert model.run(*batch_of(2)).scores.shape == (2, 24, 2)
    assert model.images_per_s(1, 1, 1) > 0


def test_a_forward_that_fails_is_a_model_error_with_the_shape(tmp_path: Path) -> None:
    artifact.export(RefusesLargeBatches(), DETECT, tmp_path / "m.pt")
    model = Model(tmp_path / "m.pt", "cpu")
    model.run(*batch_of(7))
    with pytest.raises(ModelError, match=r"m\.pt: forward failed on images of shape \[8, 3, 16, 24\]"):
        model.run(*batch_of(8))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_forward_that_fails_while_it_is_measured_is_the_same_error(tmp_path: Path, workers: int) -> None:
    artifact.export(RefusesLargeBatches(), DETECT, tmp_path / "m.pt")
    model = Model(tmp_path / "m.pt", "cpu")
    with pytest.raises(ModelError, match="forward failed"):
        model.images_per_s(workers, 1, 8)


def test_a_bug_while_a_model_is_measured_comes_out_and_hangs_nothing(model: Model) -> None:
    class Broken(Model):
        def __init__(self) -> None:
            self.device, self.dtype, self.spec = model.device, model.dtype, model.spec

        def run(self, images: Tensor, sizes: Tensor) -> RawOutput:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Broken().images_per_s(2, 1, 1)


def test_measuring_leaves_no_thread_behind_and_the_caller_s_threads_as_they_were(model: Model) -> None:
    before, num_threads = threading.active_count(), torch.get_num_threads()
    assert model.images_per_s(2, 1, 2) > 0
    assert (threading.active_count(), torch.get_num_threads()) == (before, num_threads)


def test_a_missing_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        Model(tmp_path / "nothing.pt", "cpu")


def test_a_gpu_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=f"device '{device}': torch sees no GPU here"):
            Model(tmp_path / "nothing.pt", device)


class FakeModel:
    """A model on an eight-core machine whose speed is a formula, and which remembers what was measured."""

    def __init__(self, fixed_ms: float, image_ms: float, thread_gain: float = 0.7) -> None:
        self.device = torch.device("cpu")
        self.spec = DETECT
        self.measured: list[tuple[int, int, int]] = []
        self._fixed_ms, self._image_ms, self._thread_gain = fixed_ms, image_ms, thread_gain

    def images_per_s(self, workers: int, threads: int, batch: int) -> float:
        self.measured.append((workers, threads, batch))
        speed = 1 + (threads - 1) * self._thread_gain
        return workers * batch / (self._fixed_ms + self._image_ms * batch / speed) * 1e3


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))


def plan_of(fake: FakeModel, wish: Wish) -> Plan:
    return choose_plan(cast(Model, fake), wish)


def test_what_the_configuration_says_is_not_measured_but_done() -> None:
    fake = FakeModel(1, 10)
    plan = plan_of(fake, Wish(max_batch=5, workers=3, threads=2))
    assert (plan.workers, plan.threads, plan.max_batch) == (3, 2, 5)
    assert fake.measured == [(3, 2, 5)]


@pytest.mark.parametrize(
    ("wish", "workers", "threads"),
    [
        (Wish(workers=2), 2, 4),
        (Wish(workers=16), 16, 1),
        (Wish(threads=4), 2, 4),
        (Wish(threads=3), 2, 3),
        (Wish(threads=32), 1, 32),
    ],
)
def test_the_half_that_is_not_said_fills_the_cores(wish: Wish, workers: int, threads: int) -> None:
    plan = plan_of(FakeModel(1, 10), wish)
    assert (plan.workers, plan.threads) == (workers, threads)


def test_the_fewest_threads_that_keep_the_budget_are_taken_and_no_more_are_measured() -> None:
    fake = FakeModel(0, 150, thread_gain=0.7)  # by threads a worker: 150 ms, 48 ms, 25 ms an image
    assert plan_of(fake, Wish(budget_ms=1000)).threads == 1
    assert {threads for _, threads, _ in fake.measured} == {1}
    assert plan_of(fake, Wish(budget_ms=100)).threads == 4
    assert plan_of(fake, Wish(budget_ms=60)).threads == 8


def test_where_nothing_fits_the_budget_the_shortest_batch_is_taken() -> None:
    plan = plan_of(FakeModel(0, 1000), Wish(budget_ms=10))
    assert (plan.workers, plan.threads, plan.max_batch) == (1, 8, 1)


@pytest.mark.parametrize("budget_ms", [20, 50, 100, 200, 500, 2000])
@pytest.mark.parametrize("fixed_ms", [0, 5, 20])
def test_the_chosen_batch_takes_at_most_half_of_the_budget(budget_ms: float, fixed_ms: float) -> None:
    plan = plan_of(FakeModel(fixed_ms, 3), Wish(budget_ms=budget_ms, num_streams=300))
    alone_ms = fixed_ms + 3 / (1 + 7 * 0.7)
    assert 2 * plan.batch_ms <= budget_ms or (plan.max_batch == 1 and 2 * alone_ms > budget_ms)


def test_larger_batches_are_taken_as_long_as_they_are_worth_their_latency() -> None:
    wish = Wish(workers=1, threads=1, budget_ms=10_000, num_streams=64)
    assert plan_of(FakeModel(10, 1), wish).max_batch == 32
    assert plan_of(FakeModel(0, 1), wish).max_batch == 1, "a batch is no faster than its images one by one"


@pytest.mark.parametrize(("num_streams", "max_batch"), [(1, 2), (4, 4), (5, 4), (9, 8), (1000, 32)])
def test_a_batch_is_not_larger_than_the_number_of_streams(num_streams: int, max_batch: int) -> None:
    wish = Wish(workers=1, threads=1, budget_ms=10_000, num_streams=num_streams)
    assert plan_of(FakeModel(100, 1), wish).max_batch == max_batch


def test_the_plan_says_in_one_line_what_was_chosen() -> None:
    plan = Plan(workers=2, threads=1, max_batch=4, images_per_s=80.0)
    assert str(plan) == "2 worker(s) of 1 thread(s), batches of up to 4, measured 80.0 images/s, 100 ms a batch"
