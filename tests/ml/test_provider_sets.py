"""Provider sets beside a job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from workers.ml.apothecary import shipped
from workers.ml.errors import IntegrityError, MissingInput
from workers.ml.evals.sets import group_of
from workers.ml.provider_sets import ROLES, read_sets, without_questions_of
from workers.ml.types import ChatRow, Message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped.SETS_FOLDER, tmp_path / "sets"))


def test_the_bundled_sets_are_complete_and_strange_to_each_other() -> None:
    sets = read_sets(shipped.SETS_FOLDER)
    assert set(sets) == set(ROLES)
    assert len({row.group for row in sets["harm_confirmation"]}) == 160


def test_a_missing_set_is_named(folder: Path) -> None:
    (folder / "retention.jsonl").unlink()
    with pytest.raises(MissingInput, match="retention"):
        read_sets(folder)


def test_an_empty_set_is_not_a_set(folder: Path) -> None:
    (folder / "refusals.jsonl").write_bytes(b"\n\n")
    with pytest.raises(MissingInput, match="empty"):
        read_sets(folder)


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"id": "x"}', b'{"id": "x", "messages": []}', b"\xff"])
def test_a_line_that_is_no_row_is_named_by_set_and_number(folder: Path, line: bytes) -> None:
    (folder / "harmful.jsonl").write_bytes(line)
    with pytest.raises(IntegrityError, match="Line 1 of the data set 'harmful'"):
        read_sets(folder)


def test_a_gate_prompt_that_recovery_has_seen_is_refused(folder: Path) -> None:
    stolen = json.loads((folder / "harm_confirmation.jsonl").read_text().splitlines()[0])
    with (folder / "refusals.jsonl").open("a") as stream:
        stream.write(json.dumps({**stolen, "group": "another"}) + "\n")
    with pytest.raises(IntegrityError, match="share a prompt or a group"):
        read_sets(folder)


def test_a_group_of_the_gate_that_recovery_has_seen_in_other_words_is_refused(folder: Path) -> None:
    known = json.loads((folder / "harm_confirmation.jsonl").read_text().splitlines()[0])
    words = [{"role": "user", "content": "quite another question"}]
    with (folder / "harmful.jsonl").open("a") as stream:
        stream.write(json.dumps({**known, "messages": words}) + "\n")
    with pytest.raises(IntegrityError, match="harmful"):
        read_sets(folder)


def test_one_prompt_in_two_groups_of_the_gate_is_refused(folder: Path) -> None:
    known = json.loads((folder / "harm_confirmation.jsonl").read_text().splitlines()[0])
    spaced = [{**turn, "content": "  " + turn["content"].replace(" ", "  ")} for turn in known["messages"]]
    with (folder / "harm_confirmation.jsonl").open("a") as stream:
        stream.write(json.dumps({**known, "id": "again", "group": "another", "messages": spaced}) + "\n")
    with pytest.raises(IntegrityError, match="a prompt counts once"):
        read_sets(folder)


def test_a_gate_prompt_with_other_spaces_is_still_the_prompt_that_recovery_has_seen(folder: Path) -> None:
    stolen = json.loads((folder / "harm_confirmation.jsonl").read_text().splitlines()[0])
    spaced = [{**turn, "content": turn["content"] + " "} for turn in stolen["messages"]]
    with (folder / "refusals.jsonl").open("a") as stream:
        stream.write(json.dumps({**stolen, "group": "another", "messages": spaced}) + "\n")
    with pytest.raises(IntegrityError, match="share a prompt or a group"):
        read_sets(folder)


def test_what_a_customer_asks_is_measured_on_nobody() -> None:
    sets = read_sets(shipped.SETS_FOLDER)
    harmful, harmless = sets["harm_confirmation"][0], sets["harmless_selection"][0]
    turns = (Message("system", "be kind"), harmful.messages[-1], Message("assistant", "never"))
    rows = [ChatRow((*turns, harmless.messages[-1], Message("assistant", "yes")))]
    left, lost = without_questions_of(sets, rows)
    assert group_of(harmful) not in {group_of(row) for row in left["harm_confirmation"]}
    assert group_of(harmless) not in {group_of(row) for row in left["harmless_selection"]}
    assert lost["harm_confirmation"] == sum(group_of(row) == group_of(harmful) for row in sets["harm_confirmation"])
    assert lost["harm_selection"] == 0
    assert left["refusals"] == sets["refusals"]
