"""The plain vision transformer against the arithmetic written out: attention pair by pair, windows one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from streamd.models.vit import (
    Attention,
    Block,
    Grid,
    Vit,
    VitConfig,
    distances,
    join_windows,
    split_windows,
    stretch_positions,
    stretch_table,
)

SMALL = VitConfig(
    input_size=(80, 112),
    trained_size=96,
    pretrained_size=64,
    width=24,
    depth=4,
    num_heads=3,
    window_size=3,
    window_blocks=frozenset((0, 2)),
    residual_blocks=frozenset((1,)),
)


def random_weights(module: torch.nn.Module) -> None:
    """Give every parameter a value, those too that begin as zeros."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def attend_by_pairs(attention: Attention, x: Tensor) -> Tensor:
    """Compute the attention of one picture [rows, columns, width], one pair of tokens after the other."""
    rows, columns, width = x.shape
    query, key, value = attention.qkv(x).reshape(rows, columns, 3, attention.num_heads, -1).unbind(2)
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    heads = []
    for head in range(attention.num_heads):
        q, k, v = query[:, :, head], key[:, :, head], value[:, :, head]
        logits = torch.zeros(len(cells), len(cells))
        for a, (i, j) in enumerate(cells):
            for b, (m, n) in enumerate(cells):
                bias = attention.rel_pos_h[i - m + rows - 1] + attention.rel_pos_w[j - n + columns - 1]
                logits[a, b] = q[i, j] @ k[m, n] / q.shape[-1] ** 0.5 + q[i, j] @ bias
        heads.append(logits.softmax(-1) @ v.reshape(len(cells), -1))
    y: Tensor = attention.proj(torch.cat(heads, dim=-1).reshape(rows, columns, width))
    return y


@torch.inference_mode()
def test_attention_equals_a_sum_over_pairs_with_the_bias_of_their_distance() -> None:
    attention = Attention(12, 3, grid=(3, 4), trained_grid=(3, 4), qkv_bias=True)
    random_weights(attention)
    x = torch.randn(2, 3, 4, 12)
    expected = torch.stack([attend_by_pairs(attention, picture) for picture in x])
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_channels_that_cannot_be_split_over_the_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="10 channels cannot be split over 3 heads"):
        Attention(10, 3, grid=(2, 2), trained_grid=None, qkv_bias=True)


@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (2, 9)])
def test_windows_hold_the_tokens_in_place_zeros_where_none_are_and_join_to_what_was_split(grid: Grid) -> None:
    rows, columns = grid
    x = torch.randn(2, rows, columns, 4)
    windows = split_windows(x, grid, 3)
    num_across, num_down = -(-columns // 3), -(-rows // 3)
    assert windows.shape == (2 * num_down * num_across, 3, 3, 4)
    padded = torch.zeros(2, 3 * num_down, 3 * num_across, 4)
    padded[:, :rows, :columns] = x
    for index in range(num_down * num_across):
        top, left = 3 * (index // num_across), 3 * (index % num_across)
        second_picture = windows[num_down * num_across + index]
        assert torch.equal(second_picture, padded[1, top : top + 3, left : left + 3])
    assert torch.equal(join_windows(windows, grid, 3), x)


@torch.inference_mode()
def test_a_window_block_lets_no_token_see_another_window() -> None:
    block = Block(SMALL, 0).eval()
    random_weights(block)
    x = torch.randn(1, 5, 7, 24)
    changed = x.clone()
    changed[0, 4, 6] += 1.0  # of the window in the corner: rows 3 to 4, column 6
    differs = (block(x) != block(changed)).any(-1)[0]
    assert differs[3:, 6:].all()
    assert differs.sum() == 2


def test_a_table_of_another_size_is_stretched_linearly_over_the_distances() -> None:
    table = torch.arange(5.0)[:, None]  # distances -2 to 2 of a grid of 3
    pairs = stretch_table(table, 3, 5)[distances(5)][..., 0]  # nine distances, -4 to 4
    samples = (torch.arange(9) + 0.5) * 5 / 9 - 0.5
    for query in range(5):
        for key in range(5):
            assert pairs[query, key] == pytest.approx(samples[query - key + 4].clamp(0, 4).item(), abs=1e-5)
    assert stretch_table(table, 3, 3)[distances(3)][..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]


def test_positions_of_another_grid_are_stretched_bicubically() -> None:
    table = torch.randn(1, 16, 6)
    square = table[0].T.reshape(1, 6, 4, 4)
    expected = F.interpolate(square, (5, 7), mode="bicubic", align_corners=False)
    torch.testing.assert_close(stretch_positions(table, 4, (5, 7)), expected.permute(0, 2, 3, 1))
    assert torch.equal(stretch_positions(table, 4, (4, 4)), square.permute(0, 2, 3, 1))


@torch.inference_mode()
def test_the_position_of_the_class_token_takes_no_part() -> None:
    network = Vit(SMALL).eval()
    random_weights(network)
    images = torch.randn(1, 3, 80, 112)
    before = network(images)
    network.pos_embed[:, 0] += 1.0
    assert torch.equal(network(images), before)
    network.pos_embed[:, 1] += 1.0
    assert not torch.equal(network(images), before)


@torch.inference_mode()
def test_a_batch_equals_its_pictures_one_by_one_on_a_grid_that_windows_do_not_fill() -> None:
    network = Vit(SMALL).eval()
    random_weights(network)
    images = torch.randn(3, 3, 80, 112)
    features = network(images)
    assert features.shape == (3, 24, 5, 7)
    torch.testing.assert_close(features, torch.cat([network(image[None]) for image in images]), rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient() -> None:
    network = Vit(SMALL)
    random_weights(network)
    network(torch.randn(2, 3, 80, 112)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_a_base_vit_has_the_published_number_of_parameters() -> None:
    # torchvision has 86,567,656 in vit_b_16, with classifier, last normalisation and class token; 12 blocks.
    plain = 86_567_656 - 769_000 - 2 * 768 - 768
    relative = 64 * 2 * (8 * 27 + 4 * 127)
    with torch.device("meta"):
        network = Vit(VitConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == plain + relative


def test_an_input_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(100, 96\).*multiples of the patch, 16"):
        Vit(VitConfig(input_size=(100, 96)))
