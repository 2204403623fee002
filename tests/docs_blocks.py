"""The fenced code blocks of Markdown pages, as the tests of the documentation take them."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)(?P<rest>.*)$")
_TITLE = re.compile(r'title="([^"]+)"')
_NOT_RUN = re.compile(r"^\s*<!-- not run: (.+) -->$")


class Block(NamedTuple):
    """One fenced block; `line` is that of its opening fence, `not_run` the stated reason why no test runs it."""

    line: int
    language: str
    title: str | None
    text: str
    not_run: str | None


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order.

    Raises:
        ValueError: a block that is not closed.
    """
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").split("\n")
    number, said = 0, ""
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            said = lines[number] if lines[number].strip() else said
            number += 1
            continue
        closing = f"{fence['indent']}```"
        end = next((n for n in range(number + 1, len(lines)) if lines[n].rstrip() == closing), None)
        if end is None:
            raise ValueError(f"{page}:{number + 1}: the code block is not closed")
        marker, title = _NOT_RUN.match(said), _TITLE.search(fence["rest"])
        text = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
        blocks.append(Block(number + 1, fence["language"], title and title[1], text, marker and marker[1]))
        number, said = end + 1, ""
    return blocks


def shell_commands(block: Block) -> list[list[str]]:
    """The commands of a shell block as words; comments are dropped and continued lines joined."""
    lines = block.text.replace("\\\n", " ").split("\n")
    return [words for line in lines if (words := shlex.split(line, comments=True))]
