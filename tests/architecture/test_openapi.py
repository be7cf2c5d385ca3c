"""The committed schema is what the code serves, and every route in it can be read by a customer."""

import json
from pathlib import Path

from scripts import openapi

ROOT = Path(__file__).resolve().parents[2]


def test_the_snapshot_is_what_the_code_serves() -> None:
    assert openapi.SNAPSHOT.read_text() == openapi.render(), "read the diff of `make openapi` before committing it"


def test_every_route_says_what_it_does() -> None:
    schema = json.loads(openapi.render())
    silent = [
        f"{verb.upper()} {path}"
        for path, verbs in schema["paths"].items()
        for verb, operation in verbs.items()
        if not operation.get("description")
    ]
    assert schema["paths"]
    assert silent == []


def test_the_schema_is_the_same_from_run_to_run() -> None:
    assert openapi.render() == openapi.render()
