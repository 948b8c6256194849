"""What does not fit a network is listed, each name or each module, and nothing is left out of the counts."""

from __future__ import annotations

import torch

from streamd.models.misfits import MAX_NAMES, describe_misfits, list_names


def parameters(*names: str, size: int = 1) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(size) for name in names}


def test_all_that_fits_is_not_mentioned() -> None:
    assert describe_misfits(parameters("a.weight"), parameters("a.weight")) == ""


def test_every_name_of_a_few_is_listed_in_order() -> None:
    own, state = parameters("b.weight", "a.bias", "c", "d"), parameters("z", "y", "c") | parameters("d", size=2)
    assert describe_misfits(own, state) == (
        "2 missing (a.bias, b.weight); 2 unknown (y, z); 1 of another shape (d is [2] instead of [1])"
    )


def test_what_may_be_missing_is_not_listed() -> None:
    assert describe_misfits(parameters("masks.a", "b"), {}, ("masks.",)) == "1 missing (b)"


def test_exactly_as_many_as_are_listed_are_listed_by_name() -> None:
    names = [f"layer.{index:02}.weight" for index in range(MAX_NAMES)]
    assert list_names(names) == names


def test_many_are_counted_by_the_smallest_modules_that_are_few_enough() -> None:
    blocks = [f"backbone.res{stage}.{block}.{what}" for stage in (2, 3) for block in range(30) for what in "wb"]
    assert list_names([*blocks, "head.bias"]) == ["backbone.res2.* (60)", "backbone.res3.* (60)", "head.bias"]


def test_modules_that_are_too_many_at_every_depth_are_all_listed() -> None:
    names = [f"layer{index}.weight" for index in range(MAX_NAMES + 1)]
    assert list_names(names) == sorted(names)


def test_a_module_may_have_a_parameter_of_its_own_beside_its_parts() -> None:
    names = ["head", *(f"head.{index}.weight" for index in range(30))]
    assert list_names(names) == ["head.* (31)"]
