"""The documents say what is so: links lead somewhere, commands are taken, code is Python, tables are current."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from baton.cli import cli
from tests.markdown import LINK, blocks, prose, shell_lines

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
TREE_LINE = re.compile(r"^[├└]── (\S+)|^(\w+)/ ")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)} links to {target}"


def test_the_index_has_every_page() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    pages = {str(page.relative_to(ROOT / "docs")) for page in DOCS} - {"index.md"}
    assert pages <= linked, f"add to docs/index.md: {pages - linked}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_shell_blocks_are_shell(page: Path) -> None:
    for block in blocks(page, "sh", "bash"):
        subprocess.run(["bash", "-n", "-c", block], check=True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_baton_commands_are_taken(page: Path) -> None:
    """The command line parses them, with their options and values; they are not carried out."""
    for line in shell_lines(page):
        words = shlex.split(line)
        if words[0] == "baton":
            parse(words[1:])


def parse(words: list[str]) -> None:
    with click.Context(cli, **cli.context_settings) as context:  # with its own names for --help, which click keeps
        command = cli.get_command(context, words[0])
        assert command is not None, f"no command baton {words[0]}"
        command.make_context(words[0], words[1:], parent=context).close()


def test_parse_refuses_what_is_not_there() -> None:
    """The check above can fail."""
    with pytest.raises(click.UsageError):
        parse(["serve", "--no-such-option"])
    with pytest.raises(AssertionError):
        parse(["dance"])


@pytest.mark.parametrize("command", ["serve", "worker", "gateway", "pull", "bench"])
def test_every_command_has_help(command: str) -> None:
    done = CliRunner().invoke(cli, [command, "--help"])
    assert done.exit_code == 0, done.output


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for line in shell_lines(page):
            words = [word for word in shlex.split(line) if "=" not in word]
            if words and words[0] == "make":
                assert set(words[1:]) <= targets, f"{name(page)}: {line}"


def test_the_file_tree_of_the_readme_is_the_file_tree() -> None:
    tree = next(block for block in blocks(ROOT / "README.md", "") if block.startswith("src/baton/"))
    inside, top = set(), set()
    for line in tree.splitlines()[1:]:
        found = TREE_LINE.match(line)
        assert found, line
        (inside if found[1] else top).add((found[1] or found[2]).rstrip("/"))
    rooms = {path.parent.name for path in (ROOT / "src/baton").glob("*/__init__.py")}
    assert inside == rooms | {"cli.py"}
    assert all((ROOT / folder).is_dir() for folder in top)


def test_the_configuration_page_is_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "configuration.py", "--check"], check=False)
    assert done.returncode == 0, "run: make docs"


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
