"""What dense detectors share."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamd.models.dense import LevelNorm, Subnet, best_pairs, list_cells, predictor, take


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 60), st.integers(0, 1000))
def test_the_best_pairs_are_those_of_a_full_sort(b: int, n: int, c: int, k: int, seed: int) -> None:
    ranks = torch.randperm(b * n * c, generator=torch.Generator().manual_seed(seed))
    scores = ranks.float().reshape(b, n, c)  # no two are equal
    best, index, labels = best_pairs(scores, k)
    expected, order = scores.flatten(1).sort(dim=1, descending=True)
    assert best.tolist() == expected[:, :k].tolist()
    assert (index * c + labels).tolist() == order[:, :k].tolist()


def test_cells_are_listed_row_by_row_and_their_anchors_in_the_order_of_the_channels() -> None:
    num_anchors, num_values = 2, 3
    row, column = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    channels = [row * 1000 + column * 100 + anchor * 10 + value for anchor in range(2) for value in range(3)]
    listed = list_cells(torch.stack(channels)[None].expand(2, -1, -1, -1), num_values)
    assert listed.shape == (2, 4 * 5 * num_anchors, num_values)
    assert listed[1, (2 * 5 + 3) * num_anchors + 1].tolist() == [2310, 2311, 2312]


def test_rows_are_taken_from_boxes_of_one_image_or_of_all() -> None:
    boxes = torch.arange(24.0).reshape(2, 3, 4)
    index = torch.tensor([[2, 0], [1, 1]])
    assert take(boxes, index).tolist() == [boxes[0, [2, 0]].tolist(), boxes[1, [1, 1]].tolist()]
    assert take(boxes[0], index).tolist() == [boxes[0, [2, 0]].tolist(), boxes[0, [1, 1]].tolist()]


def test_each_level_has_its_own_statistics_and_all_share_scale_and_shift() -> None:
    norm = LevelNorm(2, 4).eval()
    norm.get_buffer("1.running_mean").fill_(3)
    nn.init.constant_(norm.weight, 2)
    nn.init.constant_(norm.bias, 5)
    x = torch.full((1, 4, 2, 2), 4.0)
    torch.testing.assert_close(norm(x, 0), torch.full_like(x, 13.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm(x, 1), torch.full_like(x, 7.0), rtol=1e-4, atol=0)


def test_subnets_name_their_layers_as_detectron2_does() -> None:
    plain = ["0.bias", "0.weight", "2.bias", "2.weight"]
    shared = ["0.bias", "0.weight", "1.bias", "1.weight", "3.bias", "3.weight", "4.bias", "4.weight"]
    assert sorted(Subnet(32, 2, "", 3).state_dict()) == plain
    assert sorted(Subnet(32, 2, "GN", 3).state_dict()) == shared
    of_levels = set(Subnet(32, 2, "SyncBN", 3).state_dict()) - set(shared)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert of_levels == {f"{layer}.{level}.{name}" for layer in (1, 4) for level in range(3) for name in statistics}


def test_a_predictor_begins_at_its_prior() -> None:
    conv = predictor(4, 2, prior=0.01)
    assert conv.bias is not None
    torch.testing.assert_close(conv.bias.sigmoid(), torch.full((2,), 0.01))
