"""The threat model names tests that exist."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

NAMED = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text())


def test_every_rule_of_the_threat_model_names_a_test() -> None:
    section = (ROOT / "docs" / "security.md").read_text().partition("## The rules")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    assert [row for row in rows if "::test_" not in row] == []


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_each_test_that_the_threat_model_names_exists(file: str, name: str) -> None:
    assert re.search(rf"^ *def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
