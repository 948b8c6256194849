"""The networks against the official checkpoint layout and reference outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from streamd.models import BUILDERS, artifact
from streamd.models.weights import export_checkpoint, load_weights, read_checkpoint
from streamd.models.yolox import YOLOX, yolox_nano

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity" / "yolox_nano"

needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="needs ../shared/parity/yolox_nano")


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    return read_checkpoint(PARITY / "yolox_nano.pth")


@pytest.fixture(scope="module")
def nano(checkpoint: dict[str, Tensor]) -> YOLOX:
    network = yolox_nano().eval()
    load_weights(network, checkpoint)
    return network


@pytest.fixture(scope="module")
def reference() -> Iterator[np.lib.npyio.NpzFile]:
    with np.load(PARITY / "io.npz") as arrays:
        yield arrays


def assert_same_detections(output: dict[str, Tensor], reference: np.lib.npyio.NpzFile, i: int) -> None:
    """Suppress as the reference did (score 0.3, IoU 0.45, the best class of each cell) and compare in order."""
    scores, labels = output["scores"][0].max(dim=1)
    kept = (scores >= 0.3).nonzero()[:, 0]
    kept = kept[batched_nms(output["boxes"][0, kept], scores[kept], labels[kept], 0.45)]
    assert labels[kept].tolist() == reference[f"out{i}_classes"].tolist()
    np.testing.assert_allclose(scores[kept].numpy(), reference[f"out{i}_scores"], atol=1e-3)
    boxes = output["boxes"][0, kept].numpy() / reference[f"ratio{i}"]
    np.testing.assert_allclose(boxes, reference[f"out{i}_boxes"], atol=0.05)


@needs_parity
def test_keys_order_and_shapes_equal_the_official_checkpoint(checkpoint: dict[str, Tensor]) -> None:
    ours = [(key, value.shape) for key, value in yolox_nano().state_dict().items()]
    assert ours == [(key, value.shape) for key, value in checkpoint.items()]


@needs_parity
@pytest.mark.parametrize("i", range(3))
@torch.inference_mode()
def test_raw_head_and_detections_equal_the_reference(nano: YOLOX, reference: np.lib.npyio.NpzFile, i: int) -> None:
    images = torch.from_numpy(reference[f"input{i}"])
    np.testing.assert_allclose(nano.raw(images).numpy(), reference[f"raw{i}"], rtol=0, atol=5e-4)
    assert_same_detections(nano(images), reference, i)


@needs_parity
@torch.inference_mode()
def test_the_exported_and_optimised_artifact_gives_the_reference_detections(
    reference: np.lib.npyio.NpzFile, tmp_path: Path
) -> None:
    export_checkpoint("yolox_nano", PARITY / "yolox_nano.pth", tmp_path / "model.pt")
    module = artifact.optimize(artifact.load(tmp_path / "model.pt")[0])
    for i in range(3):
        images = torch.from_numpy(reference[f"input{i}"]).contiguous(memory_format=torch.channels_last)
        assert_same_detections(module(images), reference, i)


@needs_parity
@torch.inference_mode()
def test_a_batch_of_eight_equals_eight_batches_of_one(nano: YOLOX, reference: np.lib.npyio.NpzFile) -> None:
    inputs = [torch.from_numpy(reference[f"input{i}"]) for i in range(3)]
    images = torch.cat([*inputs, *(x.flip(3) for x in inputs), *(x.flip(2) for x in inputs[:2])])
    single = torch.cat([nano.raw(image[None]) for image in images])
    torch.testing.assert_close(nano.raw(images), single, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("name", "millions", "input_size"),
    [
        ("yolox_nano", 0.91, (416, 416)),
        ("yolox_tiny", 5.06, (416, 416)),
        ("yolox_s", 8.97, (640, 640)),
        ("yolox_m", 25.33, (640, 640)),
        ("yolox_l", 54.21, (640, 640)),
        ("yolox_x", 99.07, (640, 640)),
    ],
)
def test_each_variant_has_the_published_number_of_parameters(
    name: str, millions: float, input_size: tuple[int, int]
) -> None:
    with torch.device("meta"):
        network = BUILDERS[name]()
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert network.input_size == input_size


@torch.inference_mode()
def test_boxes_are_decoded_from_the_raw_head_by_cell_and_stride() -> None:
    network = yolox_nano(num_classes=3, input_size=(64, 96)).eval()
    images = torch.rand(2, 3, 64, 96) * 255
    raw, output = network.raw(images), network(images)
    index = 8 * 12 + 1 * 6 + 4  # after the 8x12 cells of stride 8: row 1, column 4 of stride 16
    x, y, w, h = raw[0, index, :4]
    centre_x, centre_y, half_w, half_h = (x + 4) * 16, (y + 1) * 16, w.exp() * 8, h.exp() * 8
    expected = torch.stack((centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h))
    torch.testing.assert_close(output["boxes"][0, index], expected)
    torch.testing.assert_close(output["scores"], raw[..., 4:5] * raw[..., 5:])


@torch.inference_mode()
def test_the_mask_branch_adds_prototypes_at_stride_four_and_a_coefficient_per_prototype_and_cell() -> None:
    output = yolox_nano(num_classes=3, num_prototypes=8, input_size=(64, 96)).eval()(torch.rand(2, 3, 64, 96))
    num_cells = 8 * 12 + 4 * 6 + 2 * 3
    assert {name: list(tensor.shape) for name, tensor in output.items()} == {
        "boxes": [2, num_cells, 4],
        "scores": [2, num_cells, 3],
        "prototypes": [2, 8, 16, 24],
        "coefficients": [2, num_cells, 8],
    }
    assert output["prototypes"].min() >= 0
    assert output["coefficients"].abs().max() <= 1


@torch.inference_mode()
def test_half_precision_weights_still_give_boxes_in_single_precision() -> None:
    network = yolox_nano(num_classes=2, input_size=(64, 64)).eval()
    images = torch.rand(1, 3, 64, 64) * 255
    boxes = network.half()(images.half())["boxes"]
    assert boxes.dtype == torch.float32


def test_every_parameter_gets_a_gradient() -> None:
    network = yolox_nano(num_classes=2, num_prototypes=4, input_size=(64, 64)).train()
    sum(tensor.sum() for tensor in network(torch.rand(2, 3, 64, 64)).values()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_an_input_size_that_the_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(416, 410\).*multiples of 32"):
        yolox_nano(input_size=(416, 410))
