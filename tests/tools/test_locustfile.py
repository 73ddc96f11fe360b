"""The Locust file is an example that nothing else runs: it must compile, and call what the API has."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from coupon_svc.http.openapi import openapi_document
from coupon_svc.http.routes import OPERATIONS, PUBLIC_PATHS

FILE = Path(__file__).parents[2] / "examples" / "locustfile.py"


def constants() -> dict[str, Any]:
    tree = ast.parse(FILE.read_text(), FILE.name)
    compile(tree, FILE.name, "exec")
    return {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id in ("PATHS", "EXPECTED")
    }


def test_its_paths_are_those_of_the_operations_they_are_named_after() -> None:
    document = openapi_document(OPERATIONS, PUBLIC_PATHS)
    paths = {
        operation["operationId"]: path
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if "operationId" in operation
    }
    told = constants()["PATHS"]
    assert told == {name: paths.get(name) for name in told}


def test_the_refusals_it_expects_are_outcomes_of_what_it_calls() -> None:
    told = constants()
    possible = {
        outcome.value for operation in OPERATIONS if operation.name in told["PATHS"] for outcome in operation.outcomes
    }
    assert told["EXPECTED"] <= possible
