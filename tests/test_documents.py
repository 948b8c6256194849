"""What the documents name is there: pages and headings that are linked, files, modules, commands and their options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from streamd import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = "tests|streamd|docs|configs|models|gpu|benchmarks|systemd"
FILE = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]+\.(?:py|md|yaml|json|sh|pt|png|jpg|cu))\b")
MODULE = re.compile(r"python3? -m ((?:tests|benchmarks|streamd)(?:\.\w+)*)")
COMMAND = re.compile(r"(?:^ *(?:\$ )?(?:\w+=\S+ )*|`)streamd ([a-z][^`\n#]*)", re.MULTILINE)  # a line, or between `...`
PROGRAM: Any = typer.main.get_command(cli.app)

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def anchors(page: Path) -> set[str]:
    """Give the names by which a page's headings are linked, made as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def options(words: list[str]) -> set[str]:
    """Give the options of the command that these words begin with; an unknown command is an error."""
    command = PROGRAM
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"streamd {words[0]}"
        command, words = command.commands[words[0]], words[1:]
        if not words or not words[0].isalnum():  # `streamd keys` alone, as a name of the whole
            break
    return {"--help", *(option for parameter in command.params for option in parameter.opts)}


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(page.read_text())
    }
    assert [page.name for page in PAGES if page.parent.name == "docs" and page not in linked] == []


@each_page
def test_every_file_and_module_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    for named in FILE.findall(text):
        assert (ROOT / named).exists(), named
    for module in MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@each_page
def test_every_command_that_is_named_has_the_options_that_stand_behind_it(page: Path) -> None:
    prose = "is|has|does|runs|makes|reads|publishes|gives|cannot"
    for line in COMMAND.findall(page.read_text()):
        if re.match(rf"(?:{prose})\b", line):  # the project's name at the beginning of a line of prose
            continue
        words = [word.split("|")[0] for word in line.split()]
        known = options([words[0].strip(",;:."), *words[1:]])
        for option in re.findall(r"(?<!\S)\[?(-{1,2}[a-z][a-z-]*)", line):
            assert option in known, line
