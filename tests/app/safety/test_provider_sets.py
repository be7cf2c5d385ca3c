"""Provider sets: checked before they are kept, versioned, pinned by digest, never quoted."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.database import read_session, unit_of_work
from app.errors import Conflict, InvalidRequest, NotFound, Unavailable
from app.safety import provider_sets, repository
from app.safety.provider_sets import NewSet, StoredSet
from app.safety.schemas import SetRole
from app.storage import Storage
from tests.app.safety.sets import import_rows, jsonl, row, rows

HARMFUL, CONFIRMATION = SetRole.HARMFUL, SetRole.HARM_CONFIRMATION


def test_a_new_file_is_a_new_version_and_the_same_bytes_are_the_same(
    engine: Engine, storage: Storage, tmp_path: Path
) -> None:
    imported = [import_rows(engine, storage, tmp_path, HARMFUL, rows(HARMFUL, count)) for count in (1, 2, 1)]
    assert [(one.version, one.rows) for one in imported] == [(1, 1), (2, 2), (1, 1)]
    other = import_rows(engine, storage, tmp_path, HARMFUL, rows(HARMFUL, 2), name="other")
    assert (other.version, other.sha256) == (1, imported[1].sha256)
    with read_session(engine) as session:
        assert provider_sets.find_set(session, "mine", HARMFUL).version == 2
        assert provider_sets.find_set(session, "mine", HARMFUL, 1).id == imported[0].id
        for missing in (("mine", HARMFUL, 3), ("mine", CONFIRMATION, None), ("nobody", HARMFUL, None)):
            with pytest.raises(NotFound):
                provider_sets.find_set(session, *missing)


def test_a_set_is_described_by_counts(engine: Engine, storage: Storage, tmp_path: Path) -> None:
    grouped = [
        row(CONFIRMATION, number, group=f"Pair {number // 2}", category=("odd", "even")[number == 0])
        for number in range(5)
    ]
    imported = import_rows(engine, storage, tmp_path, CONFIRMATION, grouped)
    assert (imported.rows, imported.groups, imported.categories) == (5, 3, {"even": 1, "odd": 4})
    assert imported.imported_by == "olga"
    plain = import_rows(engine, storage, tmp_path, HARMFUL, rows(HARMFUL))
    assert (plain.groups, plain.categories) == (0, {})


def test_what_is_no_set_is_refused_and_nothing_of_it_kept(engine: Engine, storage: Storage, tmp_path: Path) -> None:
    bad = [row(HARMFUL, 0), row(HARMFUL, 1, answer=None)]
    with pytest.raises(InvalidRequest, match=r"Line 2 .* 'answer' is missing") as refused:
        import_rows(engine, storage, tmp_path, HARMFUL, bad)
    assert (refused.value.code, refused.value.param) == ("invalid_provider_set", "file")
    twice = [row(CONFIRMATION, 0), {**row(CONFIRMATION, 0), "id": "again"}]
    with pytest.raises(InvalidRequest, match="'again' and 'harm_confirmation-0'") as refused:
        import_rows(engine, storage, tmp_path, CONFIRMATION, twice)
    assert refused.value.code == "provider_set_repeats"
    with pytest.raises(InvalidRequest, match="name"):
        import_rows(engine, storage, tmp_path, HARMFUL, rows(HARMFUL), name="a@1")
    assert list(storage.list("provider/")) == []
    with read_session(engine) as session:
        assert session.scalars(repository.all_sets()).all() == []


def test_other_bytes_than_were_imported_are_never_handed_out(engine: Engine, storage: Storage, tmp_path: Path) -> None:
    imported = import_rows(engine, storage, tmp_path, HARMFUL, rows(HARMFUL))
    provider_sets.fetch(storage, imported, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == jsonl(rows(HARMFUL))
    storage.put_bytes(imported.storage_key, b"{}\n")
    with pytest.raises(Unavailable, match="altered"):
        provider_sets.fetch(storage, imported, tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


def test_two_imports_at_the_same_moment_are_two_versions_or_one_refusal(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unit_of_work(engine) as session:
        provider_sets.register_set(session, "mine", StoredSet(HARMFUL, "a" * 64, 1, "one"))
    monkeypatch.setattr(repository, "last_set_version", lambda *_: 0)  # what was read before the other committed
    with pytest.raises(Conflict, match="same moment"), unit_of_work(engine) as session:
        provider_sets.register_set(session, "mine", StoredSet(HARMFUL, "b" * 64, 1, "two"))


def test_a_set_of_an_older_version_is_counted_when_it_is_met_again(
    engine: Engine, storage: Storage, tmp_path: Path
) -> None:
    imported = import_rows(engine, storage, tmp_path, HARMFUL, [row(HARMFUL, 0, category="odd")])
    with unit_of_work(engine) as session:
        old = provider_sets.get_set(session, imported.id)
        old.groups, old.categories = None, None
    again = import_rows(engine, storage, tmp_path, HARMFUL, [row(HARMFUL, 0, category="odd")])
    assert (again.id, again.groups, again.categories) == (imported.id, 0, {"odd": 1})


def test_pages_follow_each_other(engine: Engine, storage: Storage, tmp_path: Path) -> None:
    for count in (1, 2, 3):
        import_rows(engine, storage, tmp_path, HARMFUL, rows(HARMFUL, count))
    import_rows(engine, storage, tmp_path, CONFIRMATION, rows(CONFIRMATION))
    with read_session(engine) as session:
        first = provider_sets.list_page(session, role=HARMFUL, after=None, limit=2)
        rest = provider_sets.list_page(session, role=HARMFUL, after=first.data[-1].id, limit=2)
        with pytest.raises(InvalidRequest):
            provider_sets.list_page(session, role=None, after="pset_x", limit=2)
    assert [one.version for one in (*first.data, *rest.data)] == [3, 2, 1]
    assert (first.has_more, rest.has_more) == (True, False)


def test_a_bundled_set_has_no_author() -> None:
    assert NewSet("apothecary", HARMFUL).imported_by is None
