"""Provider sets beside a job, and what no two of them may share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from workers.ml.apothecary import shipped
from workers.ml.errors import IntegrityError, MissingInput
from workers.ml.prompts import group_of
from workers.ml.provider_sets import ROLES, overlaps_of, read_sets, without_questions_of
from workers.ml.types import ChatRow, Message, PromptRow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped.SETS_FOLDER, tmp_path / "sets"))


def test_the_bundled_sets_are_complete_and_strange_to_each_other() -> None:
    sets = read_sets(shipped.SETS_FOLDER)
    assert set(sets) == set(ROLES)
    assert list(overlaps_of(sets)) == []
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
        stream.write(json.dumps({**stolen, "group": "another", "answer": "no"}) + "\n")
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
    with pytest.raises(IntegrityError, match="A prompt counts once"):
        read_sets(folder)


def test_a_gate_prompt_with_other_spaces_is_still_the_prompt_that_recovery_has_seen(folder: Path) -> None:
    stolen = json.loads((folder / "harm_confirmation.jsonl").read_text().splitlines()[0])
    spaced = [{**turn, "content": turn["content"] + " "} for turn in stolen["messages"]]
    with (folder / "refusals.jsonl").open("a") as stream:
        stream.write(json.dumps({**stolen, "group": "another", "messages": spaced, "answer": "no"}) + "\n")
    with pytest.raises(IntegrityError, match="share a prompt or a group"):
        read_sets(folder)


def test_a_refusal_names_the_rows_and_quotes_none(folder: Path) -> None:
    stolen = [json.loads(line) for line in (folder / "harm_confirmation.jsonl").read_text().splitlines()[:24:2]]
    with (folder / "refusals.jsonl").open("a") as stream:
        for place, row in enumerate(stolen):
            changed = {**row, "id": f"copy-{place}", "group": f"another {place}", "answer": "no"}
            stream.write(json.dumps(changed) + "\n")
    with pytest.raises(IntegrityError) as refused:
        read_sets(folder)
    message = str(refused.value)
    assert refused.value.param == "harm_confirmation"
    assert message.startswith("12 rows of 'harm_confirmation' share a prompt or a group with 'refusals': ")
    assert f"{stolen[0]['id']!r} and 'copy-0' (equal prompt)" in message
    assert "'copy-9'" in message and "'copy-10'" not in message and "and 2 more" in message
    assert not any(row["messages"][-1]["content"] in message for row in stolen)


def test_without_groups_a_near_copy_of_a_recovery_prompt_is_found() -> None:
    words = [f"word{number}" for number in range(30)]
    prompts = {role: f"{role} asks something of its own" for role in ROLES}
    prompts |= {"retention": " ".join(words), "harmless_selection": " ".join(["Please", *words])}
    sets = {role: [PromptRow(f"{role}-1", (Message("user", text),))] for role, text in prompts.items()}
    [found] = overlaps_of(sets)
    assert (found.role, found.other, found.overlaps[0].reason) == ("harmless_selection", "retention", "similar prompt")


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
