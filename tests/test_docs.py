"""The documentation is true: its Python runs, its commands exist, its tables and messages are those of the code."""

from __future__ import annotations

import ast
import html.parser
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
import yaml
from docs_blocks import PAGES, ROOT, Block, blocks_of, shell_commands
from typer.testing import CliRunner

from gpo_fast import cli
from gpo_fast.config import GPOConfig, RunSpec

LANGUAGES = {"python", "bash", "yaml", "json", "text", "diff"}
RUN = {"version", "critical", "eval", "report", "train"}  # commands that are cheap on a tiny model
SHORT = ["--max_steps", "1", "--use_cpu", "true"]  # what the tests add to `gpo-fast train`


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_of(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in ("python", "bash", "yaml")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take for granted: a model in `my-model` and prompts in `problems.jsonl`."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    tiny.model(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(4)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{**row, "completion": "first a sum\nthen a line\nthen the answer\n2"} for row in rows[:2]]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return tmp_path


def run_python(page: Path, block: Block, names: dict[str, Any]) -> None:
    exec(compile("\n" * block.line + block.text, str(page), "exec"), names)


def assumed_names() -> dict[str, Any]:
    """What the quickstart's first Python block defines; every page may use it."""
    page = ROOT / "docs" / "quickstart.md"
    names: dict[str, Any] = {"__name__": "docs"}
    run_python(page, next(block for block in blocks_of(page) if block.language == "python"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: language {block.language!r}"
        if block.language == "python":
            compile(block.text, f"{page}:{block.line}", "exec")
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "json":
            json.loads(block.text)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=ids)
def test_the_blocks_of_a_page_run_in_order(page: Path, workplace: Path) -> None:
    if "from trl" in page.read_text() or "integrations.trl" in page.read_text():
        pytest.importorskip("trl")
    names = assumed_names()
    for block in code_of(page):
        if block.language == "yaml" and block.title is not None:
            Path(block.title).write_text(block.text)
        elif block.language == "python" and block.not_run is None:
            run_python(page, block, names)
        elif block.language == "bash":
            run_shell(page, block)


def run_shell(page: Path, block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in shell_commands(block):
        where = f"{page}:{block.line}: {' '.join(words)}"
        check_command(words, where)
        if words[0] == "gpo-fast" and words[1] in RUN and block.not_run is None:
            run_command(words[1:], where)


def check_command(words: list[str], where: str) -> None:
    if words[0] == "gpo-fast" and words[1] != "--help":
        check_options_of_gpo_fast(words[1:], where)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or "=" in word for word in words[1:]), where
    if words[0].endswith("python") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), where


def check_options_of_gpo_fast(words: list[str], where: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    command = group.commands.get(words[0])
    assert command is not None, f"{where}: no such command"
    context = command.make_context(words[0], words[1:])  # raises for an option that does not exist
    if words[0] == "train":
        known = {*RunSpec.__dataclass_fields__, *GPOConfig.__dataclass_fields__}
        assert set(cli.parse_overrides(context.args)) <= known, where


def run_command(words: list[str], where: str) -> None:
    result = CliRunner().invoke(cli.app, [*words, *SHORT] if words[0] == "train" else words)
    assert result.exit_code == 0, f"{where}: {result.output}\n{result.exception!r}"


# -- tables and messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_computed_tables_are_those_of_their_scripts(script: Path) -> None:
    """A page holds each table between a begin and an end comment that name the script and the table."""
    tables = runpy.run_path(str(script))["tables"]()
    marked = re.compile(rf"<!-- {script.stem}\.py: (\w+) -->\n(.*?)\n<!-- end -->", re.DOTALL)
    shown = {name: text for page in PAGES for name, text in marked.findall(page.read_text(encoding="utf-8"))}
    assert shown == tables


def templates_of(source: Path) -> list[str]:
    """The texts of a module's string literals, with … for what is filled in; joined ones as one."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else "…"
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) for value in node.values)
        return "…"

    tree = ast.parse(source.read_text(encoding="utf-8"))
    return [text(node) for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)]


def test_quoted_messages_are_those_of_the_code() -> None:
    """The first column of troubleshooting's tables quotes messages; what is filled in is written as …"""
    sources = [*(ROOT / "gpo_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    texts = [re.sub(r"%(\.\d)?[a-z]", "…", text) for source in sources for text in templates_of(source)]
    native = re.sub(r'"\s*"|" \+|\+ "', "", " ".join(p.read_text() for p in (ROOT / "csrc").rglob("*.cpp")))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert quoted
    unknown = [
        message
        for message in quoted
        if not any(message in text for text in texts) and not all(p.strip() in native for p in message.split("…"))
    ]
    assert not unknown


# -- the site -----------------------------------------------------------------------------------------------


class _Fetched(html.parser.HTMLParser):
    """Addresses that a browser fetches when it opens a page: everything but links to click."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and values.get("rel") in ("canonical", "prev", "next"):
            return
        names = {"a": (), "link": ("href",)}.get(tag, ("src", "srcset", "data"))
        self.addresses += [values[name] for name in names if name in values]


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = _Fetched()
        fetched.feed(page.read_text(encoding="utf-8"))
        outside = [address for address in fetched.addresses if re.match(r"(https?:)?//", address)]
        assert not outside, f"{page.name} fetches {outside}"
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\(['\"]?(https?:)?//", styles)
