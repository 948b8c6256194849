"""YAML becomes plain values whose lines are known, and a hostile file costs neither time nor memory."""

from __future__ import annotations

import time
from typing import Any

import pytest

from streamd.errors import ConfigError
from streamd.yaml_tree import Place, YamlTree


class Complaints(list[tuple[Place, str]]):
    def __call__(self, place: Place, sentence: str) -> None:
        self.append((place, sentence))


def read(text: str) -> dict[str, Any]:
    """Read YAML that gives no cause for complaint."""
    complaints = Complaints()
    tree = YamlTree(text, complaints)
    assert complaints == []
    return tree.root


def complaints_about(text: str) -> Complaints:
    complaints = Complaints()
    YamlTree(text, complaints)
    return complaints


def test_values_are_typed_as_yaml_says_and_keys_stay_as_written() -> None:
    tree = read("1: 1\nno: yes\n2026-01-31: 1.5\n~: ~\n'': 'x'\nlist: [a, {b: c}]\n")
    assert tree == {"1": 1, "no": True, "2026-01-31": 1.5, "~": None, "": "x", "list": ["a", {"b": "c"}]}


def test_the_line_of_a_value_is_that_of_its_key() -> None:
    tree = YamlTree("a:\n  b:\n    - 1\n    - c: 2\n", Complaints())
    places: list[Place] = [("a",), ("a", "b"), ("a", "b", 0), ("a", "b", 1), ("a", "b", 1, "c")]
    assert [tree.line_of(place) for place in places] == [1, 2, 3, 4, 4]
    assert tree.line_of(("a", "b", "missing", "deeper")) == 2
    assert tree.line_of(("nowhere",)) == 1


def test_aliases_stand_for_what_their_anchors_name() -> None:
    assert read("a: &x {b: 1}\nc: *x\nd: [*x]\n") == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}]}


def test_own_keys_win_over_merged_ones_and_earlier_merges_over_later_ones() -> None:
    tree = read(
        "base: &base {fps: 5, loop: true}\n"
        "other: &other {fps: 9, pace: fast}\n"
        "one: {<<: *base, fps: 1}\n"
        "two: {fps: 1, <<: *base}\n"
        "both: {<<: [*base, *other]}\n"
    )
    assert tree["one"] == tree["two"] == {"fps": 1, "loop": True}
    assert tree["both"] == {"fps": 5, "loop": True, "pace": "fast"}


def test_a_merged_map_may_merge_another() -> None:
    tree = read("a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, z: 3}\n")
    assert tree["c"] == {"x": 1, "y": 2, "z": 3}


def test_a_merged_value_has_the_line_where_it_is_written() -> None:
    tree = YamlTree("a: &a\n  x: 1\nb:\n  <<: *a\n  y: 2\n", Complaints())
    assert (tree.line_of(("b", "x")), tree.line_of(("b", "y"))) == (2, 5)


@pytest.mark.parametrize("merged", ["5", "[1]", "null", "[[{a: 1}]]"])
def test_merging_what_is_no_map_is_a_problem(merged: str) -> None:
    assert complaints_about(f"a:\n  <<: {merged}\n")[0][0] == ("a", "<<")


def test_a_quoted_merge_key_is_a_plain_key() -> None:
    assert read("a: {'<<': 1}\n") == {"a": {"<<": 1}}


def test_each_repeated_key_is_a_problem_at_its_own_line() -> None:
    complaints = Complaints()
    tree = YamlTree("a: 1\nb: {c: 1, c: 2}\na: 3\n", complaints)
    assert [place for place, _ in complaints] == [("b", "c"), ("a",)]
    assert tree.line_of(("a",)) == 3
    assert tree.root == {"a": 1, "b": {"c": 1}}


@pytest.mark.parametrize("text", ["? [a, b]\n: c\n", "a: {{ template }}\n", "? {a: b}\n: c\n"])
def test_a_key_that_is_no_word_is_a_problem(text: str) -> None:
    assert "is no key (line 1)" in complaints_about(text)[0][1]


@pytest.mark.parametrize(
    "value",
    [
        "2026-13-45",
        "2026-01-31 10:00:00 +99:99",
        "0x_",
        "!!int abc",
        "!!int ''",
        "!!float abc",
        "!!bool abc",
        "!!timestamp abc",
        "!!binary ä",
        "!!python/object:os.system x",
        "!unknown x",
        "=",
        "9" * 5000,
        "0x" + "f" * 5000,
        r'"\ud800"',
    ],
)
def test_a_value_that_cannot_be_read_is_a_problem_at_its_place(value: str) -> None:
    complaints = complaints_about(f"a: 1\nb: [2, {value}]\n")
    assert [place for place, _ in complaints] == [("b", 1)]
    assert "cannot be read" in complaints[0][1]


@pytest.mark.parametrize("text", [r'"\ud800": 1', r'a: {"\udfff": 1}'])
def test_a_key_that_cannot_be_printed_is_a_problem(text: str) -> None:
    assert len(complaints_about(text)) == 1


@pytest.mark.parametrize("text", ["", "# nothing\n", "5\n", "- a\n", "---\n...\n", "text\n"])
def test_a_document_that_is_no_map_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected the keys models: and streams:, got (nothing|no map)"):
        YamlTree(text, Complaints())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c\n", r"line 1, column 5: mapping values are not allowed here"),
        ("a: [1\n", r"line 2"),
        ("a:\n\tb: 1\n", r"line 2, column 1: found character '\\t'"),
        ("a: *nothing\n", r"line 1, column 4: found undefined alias"),
        ("a: 1\n---\nb: 2\n", r"line 2.*another document"),
        ("a: \0\n", r"not allowed"),
    ],
)
def test_what_is_not_yaml_is_an_error_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"not valid YAML: .*{message}"):
        YamlTree(text, Complaints())


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]\n", "an anchor contain itself"),
        ("a: &a [*a, *a]\n", "an anchor contain itself"),
        ("a: &a {b: *a}\n", "an anchor contain itself"),
        ("a: &a {<<: *a}\n", "an anchor contain itself"),
        ("a: &a {<<: [*a, *a]}\n", "an anchor contain itself"),
        ("a: " + "[" * 1200, "nested too deeply"),
        ("a: " + "[" * 30 + "]" * 30, "nested too deeply"),
        ("a: " + "{b: " * 1200, "nested too deeply"),
        (LAUGHS, "more than 100000 values"),
    ],
)
def test_a_file_that_would_never_end_is_refused_at_once(text: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        YamlTree(text, Complaints())
    assert time.monotonic() - started < 30
