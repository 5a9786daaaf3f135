"""What stands in a Markdown page: code blocks by language, links, shell commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def shell_lines(page: Path) -> list[str]:
    """Commands of a page's shell blocks; continued lines joined, comments cut."""
    text = "\n".join(blocks(page, "sh", "bash")).replace("\\\n", " ")
    words = (shlex.split(line, comments=True) for line in text.splitlines())
    return [shlex.join(line) for line in words if line]
