"""Model files: what is written can be read, and what is wrong is said."""

from __future__ import annotations

import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
import torchvision  # noqa: F401  its operators
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models import artifact
from streamd.models.spec import KeypointRule, MaskRule, ModelSpec
from streamd.models.yolox import yolox_nano
from tests.conftest import ROOT

SIZE = (64, 96)
DETECT = ModelSpec(name="small", task="detect", labels=("a", "b", "c"), input_size=SIZE, colour="bgr")
SEGMENT = msgspec.structs.replace(DETECT, task="segment", masks=MaskRule())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.pt"
    artifact.export(yolox_nano(3, input_size=SIZE), DETECT, path)
    return path


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "two_stages.pt"
    torch.manual_seed(0)
    artifact.export(TwoStages(), TWO_STAGES, path)
    return path


class Fixed(nn.Module):
    """Return the tensors of `make`, whatever the images show."""

    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.make = make

    def forward(self, images: Tensor) -> object:
        return self.make(images)


def boxes_and_scores(images: Tensor, num_labels: int = 3) -> dict[str, Tensor]:
    pooled = images.mean(dim=(2, 3))  # [B, 3]
    return {
        "boxes": pooled[:, None, [0, 1, 2, 0]].expand(-1, 5, 4),
        "scores": pooled[:, None, :1].sigmoid().expand(-1, 5, num_labels),
    }


def test_an_exported_model_says_what_it_is_and_computes_what_the_network_does(tmp_path: Path) -> None:
    network = yolox_nano(3, input_size=SIZE).eval()
    artifact.export(network, DETECT, tmp_path / "made" / "model.pt")
    module, spec = artifact.load(tmp_path / "made" / "model.pt")
    assert spec == DETECT == artifact.read_spec(tmp_path / "made" / "model.pt")
    images = torch.rand(5, 3, *SIZE) * 255
    with torch.inference_mode():
        expected, loaded, optimised = network(images), module(images), artifact.optimize(module)(images)
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-4, atol=5e-4)
        torch.testing.assert_close(optimised[name], tensor, rtol=1e-4, atol=5e-4)


def test_a_model_with_masks_is_exported_and_loaded(tmp_path: Path) -> None:
    artifact.export(yolox_nano(3, num_prototypes=8, input_size=SIZE), SEGMENT, tmp_path / "model.pt")
    module, spec = artifact.load(tmp_path / "model.pt")
    output = module(torch.rand(4, 3, *SIZE))
    assert spec.masks == MaskRule()
    assert list(output["prototypes"].shape) == [4, 8, 16, 24]
    assert list(output["coefficients"].shape) == [4, output["boxes"].shape[1], 8]


class TwoStages(nn.Module):
    """A network with all that an artifact may have: sizes, pairs, features, and methods that pool from them."""

    anchors: Tensor

    def __init__(self, num_points: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=8, padding=1)
        self.mask = nn.Conv2d(6, 3, 1)
        self.point = nn.Conv2d(6, num_points, 1)
        self.register_buffer("anchors", torch.tensor([[0.0, 0, 20, 20], [30, 5, 80, 60], [31, 5, 80, 60]]))

    def forward(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        feature = self.stem(images)
        limit = sizes.flip(1).repeat(1, 2)[:, None]
        boxes = self.anchors.minimum(limit)
        scores = (
            feature.flatten(1).float().mean(1, keepdim=True).sigmoid() * torch.arange(1, 4, device=images.device) / 4
        )
        labels = torch.arange(3, device=images.device).expand(images.shape[0], 3)
        keep, _ = torch.ops.streamd.nms(boxes, scores, torch.zeros_like(labels), 0.5, -torch.inf, 3)
        taken = keep.clamp(min=0)
        return {
            "boxes": boxes.gather(1, taken[..., None].expand(-1, -1, 4)),
            "scores": scores.gather(1, taken).where(keep >= 0, -torch.inf),
            "labels": labels.gather(1, taken),
            "features.0": feature,
        }

    def masks(self, features: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        probabilities = self.mask(self._pool(features, boxes)).sigmoid()
        chosen = labels.flatten()[:, None, None, None].expand(-1, -1, 4, 4)
        return probabilities.gather(1, chosen)[:, 0].unflatten(0, (-1, boxes.shape[1]))

    def keypoints(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        return self.point(self._pool(features, boxes)).unflatten(0, (-1, boxes.shape[1]))

    def _pool(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        index = torch.arange(boxes.shape[0], device=boxes.device)[:, None, None].expand(-1, boxes.shape[1], 1)
        rois = torch.cat((index.type_as(boxes), boxes), dim=-1).flatten(0, 1)
        return torch.ops.torchvision.roi_align(features[0], rois.type_as(features[0]), 1 / 8, 4, 4, 0, True)


TWO_STAGES = msgspec.structs.replace(
    DETECT, task="keypoints", sized=True, masks=MaskRule(kind="box"), keypoints=KeypointRule(names=("nose", "tail"))
)


@pytest.mark.parametrize("num_images", [1, 2, 5])
@pytest.mark.parametrize("how", ["optimized", "frozen"])
def test_the_methods_of_a_model_are_exported_and_stay_when_it_is_optimised(
    two_stages: Path, tmp_path: Path, how: str, num_images: int
) -> None:
    torch.manual_seed(0)
    network = TwoStages().eval()
    frozen = tmp_path / "frozen.pt" if how == "frozen" else None
    if frozen:
        artifact.write_frozen(two_stages, torch.float32, frozen)
    module, spec = artifact.load(two_stages, optimized=True, frozen=frozen)
    assert spec.methods == ("masks", "keypoints")
    images, sizes = torch.rand(num_images, 3, *SIZE), torch.tensor([[64.0, 50.0]]).expand(num_images, 2)
    boxes = torch.rand(num_images, 4, 4).cumsum(-1) * 20
    labels = torch.randint(3, (num_images, 4))
    with torch.inference_mode():
        expected = network(images, sizes)
        raw = artifact.forward(module, spec, images, sizes)
        features = list(raw.features)
        torch.testing.assert_close((raw.boxes, raw.scores), (expected["boxes"], expected["scores"]))
        torch.testing.assert_close(raw.labels, expected["labels"])
        torch.testing.assert_close(module.masks(features, boxes, labels), network.masks(features, boxes, labels))
        torch.testing.assert_close(module.keypoints(features, boxes), network.keypoints(features, boxes))
    assert raw.boxes[..., 2].max() == 50, "boxes are clipped to the picture inside its padding"


def test_a_model_runs_in_half_precision_with_its_coordinates_in_float32(two_stages: Path) -> None:
    module, spec = artifact.load(two_stages, dtype=torch.float16)
    raw = artifact.forward(module, spec, torch.rand(2, 3, *SIZE).half(), torch.tensor([[64.0, 96.0]] * 2))
    assert raw.features[0].dtype == torch.float16 and raw.boxes.dtype == torch.float32


def test_no_device_is_written_into_a_model(two_stages: Path) -> None:
    with zipfile.ZipFile(two_stages) as archive:
        code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".py"))
    assert "torch.arange(" in code
    assert "torch.device(" not in code


def test_a_network_whose_tensors_would_stay_on_the_cpu_is_not_exported(tmp_path: Path) -> None:
    class Anchors(nn.Module):
        def forward(self) -> Tensor:
            return torch.arange(5, device="cpu")

    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchors = Anchors()

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            output = boxes_and_scores(images)
            return output | {"boxes": output["boxes"] + self.anchors()[:, None]}

    with pytest.raises(ModelError, match=r"anchors makes tensors of nothing but numbers.*buffers"):
        artifact.export(Grid(), DETECT, tmp_path / "model.pt")


def test_a_model_that_calls_torchvision_loads_where_nobody_imported_that(two_stages: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from streamd.models import artifact;"
        f"artifact.load(Path({str(two_stages)!r})); print('torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False", "the package takes seconds to import, its operators do not"


@pytest.mark.parametrize(
    ("missing", "message"),
    [("keypoints", "has no method keypoints"), ("masks", "has no method masks")],
)
def test_a_network_without_a_method_that_its_spec_promises_is_not_exported(
    tmp_path: Path, missing: str, message: str
) -> None:
    network = TwoStages()
    setattr(network, missing, None)
    with pytest.raises(ModelError, match=message):
        artifact.export(network, TWO_STAGES, tmp_path / "model.pt")


def test_a_network_whose_method_does_not_fit_its_spec_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"method keypoints gives \[2, 5, 7, 4, 4\].*want \[2,5,2,S,S\]"):
        artifact.export(TwoStages(num_points=7), TWO_STAGES, tmp_path / "model.pt")


def test_exporting_leaves_the_network_as_it_was_and_no_file_beside_the_model(tmp_path: Path) -> None:
    network = yolox_nano(3, input_size=SIZE).train()
    artifact.export(network, DETECT, tmp_path / "model.pt")
    assert network.training
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_models_can_be_loaded_by_several_threads_at_once(model: Path) -> None:
    specs: list[ModelSpec] = []
    threads = [threading.Thread(target=lambda: specs.append(artifact.load(model)[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert specs == [DETECT] * 4


def test_a_network_that_depends_on_the_batch_size_is_not_exported(tmp_path: Path) -> None:
    def tied_to_batch(images: Tensor) -> dict[str, Tensor]:
        output = boxes_and_scores(images)
        return output | {"boxes": output["boxes"].reshape(int(images.shape[0]), 5, 4)}

    with (
        pytest.warns(Warning, match="Python integer"),
        pytest.raises(ModelError, match=r"not written.*fails with 1.*batch size"),
    ):
        artifact.export(Fixed(tied_to_batch), DETECT, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_a_trace_cannot_follow_is_not_exported(tmp_path: Path) -> None:
    def scaled_by_batch(images: Tensor) -> dict[str, Tensor]:
        output = boxes_and_scores(images)
        return output | {"scores": output["scores"] * int(images.shape[0])}

    with pytest.warns(Warning, match="Python integer"), pytest.raises(ModelError, match=r"not written.*scores differs"):
        artifact.export(Fixed(scaled_by_batch), DETECT, tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (lambda x: x, DETECT, r"dict of tensors with the keys \['boxes', 'scores'\], got Tensor"),
        (lambda x: {"boxes": boxes_and_scores(x)["boxes"]}, DETECT, r"got \['boxes'\]"),
        (boxes_and_scores, SEGMENT, r"keys \['boxes', 'scores', 'coefficients', 'prototypes'\]"),
        (lambda x: boxes_and_scores(x, 2), DETECT, r"3 labels: scores is \[2, 5, 2\]"),
        (lambda x: boxes_and_scores(x) | {"boxes": x}, DETECT, r"boxes is \[2, 3, 64, 96\]"),
        (lambda x: boxes_and_scores(x) | {"boxes": boxes_and_scores(x)["boxes"][:1]}, DETECT, r"boxes is \[1, 5, 4\]"),
        (
            lambda x: boxes_and_scores(x) | {"prototypes": x, "coefficients": boxes_and_scores(x)["boxes"]},
            SEGMENT,
            r"prototypes is \[2, 3, 64, 96\]",
        ),
        (
            lambda x: boxes_and_scores(x) | {"prototypes": x, "coefficients": x.mean()},
            SEGMENT,
            r"coefficients is \[\]",
        ),
    ],
)
def test_a_network_whose_output_does_not_fit_its_spec_is_not_exported(
    tmp_path: Path, make: Callable[[Tensor], object], spec: ModelSpec, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        artifact.export(Fixed(make), spec, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_does_not_accept_the_input_size_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not accept images of shape \[2, 3, 64, 96\]"):
        artifact.export(yolox_nano(3, input_size=(64, 64)), DETECT, tmp_path / "model.pt")


def test_a_place_where_nothing_can_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ModelError, match="cannot write the model"):
        artifact.export(yolox_nano(3, input_size=SIZE), DETECT, tmp_path / "file" / "model.pt")


def rewrite(model: Path, target: Path, edit: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy an artifact entry by entry through `edit`, which drops an entry by returning None."""
    with zipfile.ZipFile(model) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = edit(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def with_spec(model: Path, target: Path, spec: bytes) -> Path:
    return rewrite(model, target, lambda name, content: spec if name.endswith(artifact.SPEC_FILE) else content)


def test_a_missing_file_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such file; make one with: streamd export"):
        artifact.load(tmp_path / "model.pt")


def test_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a directory"):
        artifact.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"streams: {}\n", "not a model file"),
        (b"\x80\x02}q\x00.", r"this is a checkpoint; make an artifact with: streamd export .* --weights .*model\.pt"),
        (b"PK\x03\x04 and no more", "truncated"),
    ],
)
def test_a_foreign_file_is_an_error_that_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        artifact.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_model_is_an_error(model: Path, tmp_path: Path, share: float) -> None:
    content = model.read_bytes()
    path = tmp_path / "model.pt"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match="truncated"):
        artifact.load(path)


def test_a_model_with_damaged_code_is_an_error(model: Path, tmp_path: Path) -> None:
    path = rewrite(model, tmp_path / "model.pt", lambda name, content: b"?" if name.endswith(".py") else content)
    assert artifact.read_spec(path) == DETECT
    with pytest.raises(ModelError, match=r"cannot be loaded.*damaged"):
        artifact.load(path)


def test_a_model_without_its_weights_is_an_error(model: Path, tmp_path: Path) -> None:
    path = rewrite(model, tmp_path / "model.pt", lambda name, content: None if "/data/" in name else content)
    with pytest.raises(ModelError, match=r"cannot be loaded.*damaged"):
        artifact.load(path)


def test_a_checkpoint_is_an_error_that_names_the_command_for_it(tmp_path: Path) -> None:
    path = tmp_path / "yolox_nano.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(ModelError, match=r"this is a checkpoint.*streamd export yolox_nano --weights .*\.pth -o model"):
        artifact.load(path)


def test_the_command_for_a_checkpoint_names_the_network_that_its_file_is_named_after(tmp_path: Path) -> None:
    path = tmp_path / "yolox_s.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(ModelError, match=r"streamd export yolox_s --weights .*yolox_s\.pth"):
        artifact.read_spec(path)


def test_a_zip_archive_or_torchscript_without_a_spec_is_an_error(model: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    foreign = rewrite(model, tmp_path / "foreign.pt", lambda name, content: None if "/extra/" in name else content)
    for path in (tmp_path / "archive.pt", foreign):
        with pytest.raises(ModelError, match=r"holds no streamd\.json"):
            artifact.load(path)


def edited(**fields: object) -> bytes:
    return msgspec.json.encode(msgspec.to_builtins(DETECT) | fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (b"{", "not understood"),
        (b"\xff\xfe", "not understood"),
        (b"[]", "not understood"),
        (edited(colours="bgr"), "not understood.*colours"),
        (edited(task="count"), "not understood.*count"),
        (edited(schema=2), "schema is 2"),
        (edited(labels=[]), "labels is empty"),
        (edited(input_size=[0, 64]), r"input_size is \[0, 64\]"),
        (edited(std=[1.0, 0.0, 1.0]), "std holds a 0"),
        (edited(task="segment"), "'segment' without a rule for masks"),
    ],
)
def test_a_wrong_spec_is_an_error(model: Path, tmp_path: Path, spec: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        artifact.read_spec(with_spec(model, tmp_path / "model.pt", spec))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (edited(labels=["a", "b"]), r"2 labels: scores is \[1, 126, 3\]"),
        (edited(input_size=[32, 32]), r"the model failed on images of shape \[1, 3, 32, 32\]"),
        (edited(task="segment", masks={}), r"got \['boxes', 'scores'\]"),
    ],
)
def test_a_model_that_does_not_do_what_its_spec_says_is_an_error(
    model: Path, tmp_path: Path, spec: bytes, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        artifact.load(with_spec(model, tmp_path / "model.pt", spec))


def test_a_device_that_is_not_there_is_an_error(model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ModelError, match="cannot be loaded onto the device cuda"):
        artifact.load(model, "cuda")


def test_a_cast_in_a_network_does_not_bind_what_it_was_made_of(tmp_path: Path) -> None:
    class Casting(nn.Module):
        """Use a feature in float32 first, and then as it is."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, stride=8), nn.Conv2d(4, 1, 1)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            feature = self.first(images)
            mean = feature.float().mean((1, 2, 3))
            again = self.second(feature).float().mean((1, 2, 3))
            return {"boxes": mean[:, None, None].expand(-1, 5, 4), "scores": again[:, None, None].expand(-1, 5, 3)}

    artifact.export(Casting(), DETECT, tmp_path / "model.pt")
    module, spec = artifact.load(tmp_path / "model.pt", dtype=torch.float16)
    raw = artifact.forward(module, spec, torch.rand(2, 3, *SIZE).half(), torch.empty(0))
    assert raw.boxes.dtype == raw.scores.dtype == torch.float32
