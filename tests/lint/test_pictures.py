"""Mermaid itself understands the pictures in the documents, and they show what there is."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import mermaidx
import pytest
import quickjs

from coupon_svc.domain.codes import CodeStatus

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


class Picture(NamedTuple):
    name: str
    text: str


def pictures_of(path: Path) -> list[Picture]:
    blocks = re.findall(r"```mermaid\n(.*?)```", path.read_text(), re.DOTALL)
    return [Picture(f"{path.name}-{number}", block) for number, block in enumerate(blocks, 1)]


PICTURES = [picture for path in sorted(DOCS.rglob("*.md")) for picture in pictures_of(path)]


@pytest.fixture(scope="module")
def parse() -> Callable[[str], str]:
    """Mermaid's own parser in an interpreter of JavaScript: what it says of a text, `parsed` or its error."""
    scripts = importlib.resources.files("mermaidx") / "assets"
    javascript = quickjs.Context()
    javascript.set_max_stack_size(4 << 20)
    for hook in ("log", "measureText", "measureTextFull", "measureGlyphs", "measureForeignObject"):
        javascript.add_callable(f"__{hook}_raw", lambda *_: None)  # the shim of a browser wants them; a parser does not
    for script in ("dom_shim.js", "mermaid.js"):
        javascript.eval((scripts / script).read_text())

    def parse(text: str) -> str:
        javascript.set("text", text)
        javascript.eval("said = ''; mermaid.parse(text).then(() => { said = 'parsed' }, e => { said = String(e) })")
        while javascript.execute_pending_job():
            pass
        return str(javascript.eval("said"))

    return parse


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_mermaid_understands_every_picture(picture: Picture, parse: Callable[[str], str]) -> None:
    assert parse(picture.text) == "parsed"


def test_mermaid_refuses_what_is_no_picture(parse: Callable[[str], str]) -> None:
    assert parse("flowchart LR; A--B-->>> C[").startswith("Error: Parse error")


@pytest.mark.chaos  # seconds of a core for each
@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_mermaid_draws_every_picture(picture: Picture) -> None:
    assert mermaidx.render(picture.text).svg().startswith("<svg")


def test_the_tables_drawn_are_the_tables_described() -> None:
    drawn = set()
    for picture in pictures_of(DOCS / "database.md"):
        relations = re.sub(r"\{\n.*?\n    \}", "", picture.text, flags=re.DOTALL)
        drawn |= set(re.findall(r"^    (\w+)(?:$| [|}]| \n)", relations, re.MULTILINE))
        drawn |= set(re.findall(r"[|{] (\w+) :", relations))
    described = (DOCS / "database.md").read_text().partition("### Who may call")[2]
    assert drawn == set(re.findall(r"\*\*`(\w+)`\*\*", described))


def test_the_states_drawn_of_a_code_are_its_states() -> None:
    (picture,) = pictures_of(DOCS / "api.md")
    assert set(re.findall(r"\b(\w+)(?= -->|:)", picture.text)) == set(get_args(CodeStatus))
