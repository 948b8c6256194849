"""Each stream gets a decoder that works here, and its status says which and why."""

from __future__ import annotations

import pytest

from streamd.decode import choose_decoder
from streamd.decode.choose import Wanted
from streamd.decode.software import SoftwareDecoder
from streamd.errors import ConfigError


@pytest.mark.parametrize("wanted", ["auto", "software"])
def test_the_choice_names_the_decoder_and_the_reason(wanted: Wanted) -> None:
    choice = choose_decoder(wanted)
    assert choice.make is SoftwareDecoder
    assert str(choice) == f"software: {choice.reason}" and choice.reason


@pytest.mark.parametrize("wanted", ["dali", "nvdec"])
def test_a_decoder_that_cannot_work_here_is_an_error_that_says_what_to_use(wanted: Wanted) -> None:
    with pytest.raises(ConfigError, match=f"decoder '{wanted}' needs a GPU.*use auto or software"):
        choose_decoder(wanted)
