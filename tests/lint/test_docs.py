"""The documents name only what exists, and leave out nothing of what callers and operators meet."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest

from coupon_svc.domain.outcomes import Outcome
from coupon_svc.domain.shards import shard_tag
from coupon_svc.http.operations import Operation
from coupon_svc.http.problems import problem_body
from coupon_svc.http.routes import OPERATIONS
from coupon_svc.redis.keys import POSITIONS_CHANNEL, ShardKeys
from tests.chaos.suite import FAULTS
from tools.picture import draw
from tools.readme import PICTURE, README, figures, read_measured, with_figures

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("[A-Z]*.md")), *PAGES]
PSEUDOCODE = (DOCS / "pseudocode.md").read_text()
GLOSSARY = DOCS / "glossary.md"
DECISIONS = sorted((DOCS / "adr").glob("0*.md"))
LUA = [*sorted((ROOT / "lua").glob("*.lua")), *sorted((ROOT / "lua" / "operations").glob("*.lua"))]
SQL = "\n".join(path.read_text() for path in sorted((ROOT / "sql").glob("*.sql")))

_PATH = re.compile(r"\.?[\w-]+(/[\w.-]+)*(\.(py|lua|sql|md|toml|yaml|txt)|/)|Dockerfile|Makefile|LICENSE")
_ROWS = {  # what a section of docs/api.md says by naming a row of its table of outcomes
    "body": {"body_too_large", "unsupported_media_type", "malformed_json", "invalid_request"},
    "idempotency": {"invalid_idempotency_key", "idempotency_key_reused", "idempotency_in_progress"},
}


def anchors(path: Path) -> set[str]:
    """The fragments that a document's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def relative_links(path: Path) -> list[tuple[str, Path, str]]:
    """Each link of a document to a file of the repository: as it is written, the file, the fragment."""
    links = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"[a-z]+:", link):
            target, _, fragment = link.partition("#")
            links.append((link, (path.parent / target).resolve() if target else path, fragment))
    return links


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for link, file, fragment in relative_links(path):
        assert file.exists(), link
        assert not fragment or fragment in anchors(file), link


def test_every_page_is_reached_from_the_readme() -> None:
    found = {ROOT / "README.md"}
    unread = list(found)
    while unread:
        for _, file, _ in relative_links(unread.pop()):
            if file in DOCUMENTS and file not in found:
                found.add(file)
                unread.append(file)
    assert [path.name for path in DOCUMENTS if path not in found] == []


@pytest.mark.parametrize("path", [path for path in PAGES if path != GLOSSARY], ids=lambda path: path.name)
def test_every_page_links_the_glossary(path: Path) -> None:
    assert GLOSSARY in [file for _, file, _ in relative_links(path)]


def test_every_term_of_the_glossary_is_used_on_another_page() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS if path != GLOSSARY).lower()
    terms = re.findall(r"^\| \*\*([^*]+)\*\* \|", GLOSSARY.read_text(), re.MULTILINE)
    assert len(terms) > 40
    assert [term for term in terms if not re.search(rf"\b{re.escape(term.lower())}", text)] == []


def test_the_glossary_is_in_order_and_explains_what_it_refers_to() -> None:
    explained = set()
    for table in GLOSSARY.read_text().split("\n## ")[1:]:
        terms = re.findall(r"^\| \*\*([^*]+)\*\* \|", table, re.MULTILINE)
        assert terms == sorted(terms, key=str.lower)
        explained |= {term.lower() for term in terms}
    referred = set(re.findall(r"(?<!\*)\*([^*\n|]+)\*(?!\*)", GLOSSARY.read_text().partition("\n## ")[2]))
    forms = {"entries": "entry", "lent": "lend", "recoveries": "recovery", "recovered": "recovery", "settled": "settle"}
    assert {forms.get(word, word) for word in map(str.lower, referred)} <= explained | {
        f"{term}s" for term in explained
    }


def test_decisions_are_numbered_listed_and_say_what_they_cost() -> None:
    assert [path.name[:4] for path in DECISIONS] == [f"{number:04}" for number in range(1, len(DECISIONS) + 1)]
    listed = [file for _, file, _ in relative_links(DOCS / "adr" / "README.md") if file in DECISIONS]
    assert listed == DECISIONS
    for path in DECISIONS[1:]:  # the first is one table of decisions
        headings = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
        assert headings == ["Decision", "Why", "Alternatives", "Price"], path.name


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_readme_has_the_figures_that_were_measured_last() -> None:
    text = README.read_text()
    assert with_figures(text, read_measured()) == text, "`python -m tools.readme` writes them"
    assert figures(read_measured()) in text, "there is no place for them"


def test_the_picture_of_the_readme_is_what_its_command_draws() -> None:
    assert PICTURE.read_text() == draw(), "`python -m tools.readme` draws it"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_picture_is_there(path: Path) -> None:
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", path.read_text()):
        assert (path.parent / picture).stat().st_size < 200_000, picture


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_named_exists(path: Path) -> None:
    for name in re.findall(r"`([^`\n]+)`", path.read_text()):
        if re.fullmatch(r"test_\w+\.py", name):  # a test may be named alone
            assert any((ROOT / "tests").rglob(name)), name
        elif _PATH.fullmatch(name) and not name.startswith(".data/"):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_fault_named_is_injected(path: Path) -> None:
    assert set(re.findall(r"`(?:test_chaos\.py)?\[([a-z_]+)\]`", path.read_text())) <= set(FAULTS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_module_to_be_run_has_the_options_told(path: Path) -> None:
    for module, options in re.findall(r"(?:`|^    )python -m ([\w.]+)((?: --\w+)*)", path.read_text(), re.MULTILINE):
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        if spec.submodule_search_locations is not None:  # a package: its __main__ is what is run
            spec = importlib.util.find_spec(f"{module}.__main__")
            assert spec is not None, module
        assert spec.origin is not None, module
        file = Path(spec.origin).with_name("__main__.py") if spec.submodule_search_locations else Path(spec.origin)
        assert [option for option in options.split() if f'"{option}"' not in file.read_text()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_function_said_to_be_in_a_file_is_there(path: Path) -> None:
    for name, file in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", path.read_text()):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (name, file)


def sections() -> dict[str, str]:
    """The text of docs/api.md below each heading `METHOD /path`."""
    parts = re.split(r"^#{2,3} (.+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    return {
        heading: text
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
        if re.match(r"(GET|POST|PATCH) /", heading)
    }


def test_every_endpoint_is_described_and_no_other() -> None:
    described, there = set(sections()), {f"{operation.method} {operation.path}" for operation in OPERATIONS}
    assert there - described == set(), "docs/api.md lacks these sections: `### METHOD /path`"
    assert described - there == set(), "docs/api.md describes these, which do not exist"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_an_endpoint_is_described_with_its_scopes_statuses_and_outcomes(operation: Operation) -> None:
    text = sections().get(f"{operation.method} {operation.path}", "")
    assert text, "docs/api.md has no section of it"
    _, errors, rest = text.partition("Errors: ")
    assert errors, "say what it is refused with"
    told = set(re.findall(r"`(\w+)`", rest))
    for row, outcomes in _ROWS.items():
        if re.search(rf"(^|, ){row},", rest):
            told |= outcomes
    assert {outcome.value for outcome in operation.outcomes} <= told
    assert all(f"`{scope}`" in text for scope in operation.scopes)
    assert all(str(status) in text or status == 200 for status in operation.answers)


def test_the_pseudocode_of_an_operation_begins_with_its_scope() -> None:
    written = dict(
        re.findall(r"^    (\w+)\(request: [^\n]*\):\n +authenticate\(request, ([\w:]+)\)", PSEUDOCODE, re.MULTILINE)
    )
    decides = {operation.name for operation in OPERATIONS if operation.method == "POST"} - {"preview_pattern"}
    lacking = (decides | {"list_coupons"}) - written.keys()
    assert lacking == set(), (
        "docs/pseudocode.md lacks `name(request: …):`, which begins with `authenticate(request, SCOPE)`"
    )
    for operation in OPERATIONS:
        assert written.get(operation.name, operation.scopes[0]) in operation.scopes, operation.name


def test_every_outcome_stands_in_the_table() -> None:
    table = (DOCS / "api.md").read_text().partition("## Outcomes")[2].partition("\n## ")[0]
    assert [outcome for outcome in Outcome if f"`{outcome.value}`" not in table] == []


def test_the_refusal_shown_is_one_that_is_answered() -> None:
    shown = re.search(r"```json\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)
    assert shown
    body = json.loads(shown[1])
    outcome, request_id = Outcome(body["code"]), body["request_id"]
    assert body == problem_body(outcome, request_id, limit=body["limit"], held=body["held"])


def test_every_key_is_described() -> None:
    text = (DOCS / "redis.md").read_text()
    keys = ShardKeys(0, 16, tag="<tag>")
    patterns = [keys.meta, keys.events]
    for name, method in inspect.getmembers(ShardKeys, inspect.isfunction):
        if not name.startswith("_"):
            parameters = list(inspect.signature(method).parameters)[1:]
            patterns.append(method(keys, *(f"<{parameter}>" for parameter in parameters)))
    assert [pattern for pattern in patterns if f"| `{pattern}` |" not in text] == []
    assert f"`{POSITIONS_CHANNEL}`" in text


def test_the_tags_told_are_the_tags() -> None:
    assert " ".join(shard_tag(shard, 16) for shard in range(16)) in (DOCS / "redis.md").read_text()


def test_every_script_that_writes_is_named_beside_the_keys() -> None:
    text = (DOCS / "redis.md").read_text()
    reads = re.compile(r"flags=no-writes|^Class: read$", re.MULTILINE)
    writing = [path for path in LUA if not reads.search(path.read_text())]
    assert writing
    assert [path.name for path in writing if f"`{path.relative_to(ROOT)}`" not in text] == []


def test_every_script_is_named_in_some_document() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    assert [path.name for path in LUA if f"{path.relative_to(ROOT)}`" not in text] == []


def test_the_words_that_stand_for_no_epoch_are_described() -> None:
    written = set()
    for path in (ROOT / "lua").glob("*.lua"):
        written |= set(re.findall(r'"epoch", "([a-z]+)"', path.read_text()))
    written -= {"generation", "recovery"}  # fields that are read beside it
    assert written == {"doubt", "recovering"}
    text = (DOCS / "redis.md").read_text()
    assert [word for word in written if f"`{word}`" not in text] == []


def test_every_column_is_described() -> None:
    """By its name, below the name of its table."""
    text = (DOCS / "database.md").read_text().partition("## Tables")[2].partition("\n## ")[0]
    parts = re.split(r"\*\*`(\w+)`\*\*", text)
    told = dict(zip(parts[1::2], parts[2::2], strict=True))
    missing = []
    statements = re.sub(r"--[^\n]*", "", SQL)
    dropped = {
        f"{table}.{column}"
        for table, body in re.findall(r"ALTER TABLE (\w+)(.*?);", statements, re.DOTALL)
        for column in re.findall(r"DROP COLUMN (\w+)", body)
    }
    for kind in (r"CREATE TABLE (\w+) \((.*?)\n\)(?: [^;]*)?;", r"ALTER TABLE (\w+)(.*?);"):
        for table, body in re.findall(kind, statements, re.DOTALL):
            column = r"ADD COLUMN (\w+)" if kind.startswith("ALTER") else r"^    ([a-z]\w*) "
            columns = re.findall(column, body, re.MULTILINE)
            assert columns or "DROP CONSTRAINT" in body or "RENAME TO" in body or " SET " in body, table
            missing += [f"{table}.{column}" for column in columns if f"`{column}`" not in told[table]]
    assert sorted(set(missing) - dropped) == []


def test_every_table_and_constraint_is_described() -> None:
    text = (DOCS / "database.md").read_text()
    tables = [*re.findall(r"^CREATE TABLE (\w+)", SQL, re.MULTILINE), "schema_migrations"]
    assert [table for table in tables if f"**`{table}`**" not in text] == []
    rules = re.findall(r"(?<!DROP )CONSTRAINT (\w+)", SQL)
    assert [rule for rule in rules if f"`{rule}`" not in text] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_targets_of_make_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make ([a-z]+)`|^    make ([a-z]+) ", path.read_text(), re.MULTILINE):
        assert set(target) - {""} <= targets
