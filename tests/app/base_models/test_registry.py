"""What may become a base model: every reason to refuse a folder, and that a name means one digest for ever."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.base_models import hub
from app.base_models import service as base_models
from app.base_models.folder import describe_folder, describe_pretrained
from app.base_models.service import Registration
from app.database import read_session, unit_of_work
from app.errors import Conflict, InvalidRequest, Unavailable
from app.safety.library import BUNDLED_ASSETS
from app.tables.base_models import BaseModelRef


def safetensors(**shapes: list[int]) -> bytes:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name.replace("__", ".")] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(offset)


WEIGHTS = safetensors(
    model__layers__0__self_attn__q_proj__weight=[8, 8],
    model__layers__0__mlp__odd_proj__weight=[8, 8],
    model__layers__0__norm__weight=[8],
    lm_head__weight=[8, 8],
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The least that is acceptable."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048}))
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "model.safetensors").write_bytes(WEIGHTS)
    return path


def test_an_acceptable_folder_is_described(folder: Path) -> None:
    described = describe_folder(folder)
    assert described.context_limit == 2048
    assert described.modules == {"q_proj", "odd_proj"}
    assert set(described.digest.files) == {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_every_reason_to_refuse_a_folder(folder: Path, tmp_path: Path) -> None:
    evil = pickle.dumps({"weights": [1, 2]})

    def with_file(name: str, content: bytes) -> Any:
        return lambda path: (path / name).write_bytes(content)

    def with_config(name: str, **changes: Any) -> Any:
        return lambda path: edit(path / name, **changes)

    cases: list[tuple[str, Any]] = [
        ("pytorch_model.bin", with_file("pytorch_model.bin", evil)),
        ("model.pt", with_file("model.pt", evil)),
        ("weights.pth", with_file("weights.pth", evil)),
        ("data.pkl", with_file("data.pkl", evil)),
        ("modeling_evil.py", with_file("modeling_evil.py", b"import os")),
        ("library.so", with_file("library.so", b"\x7fELF")),
        ("not a safetensors file", with_file("model.safetensors", evil)),
        ("not a safetensors file", with_file("model.safetensors", b"")),
        ("not a safetensors file", with_file("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}")),
        ("cut off", with_file("model.safetensors", WEIGHTS[:-4])),
        ("cut off", with_file("model.safetensors", WEIGHTS + b"more")),
        ("auto_map", with_config("config.json", auto_map={"AutoModel": "evil.Model"})),
        (
            "auto_map",
            with_config("tokenizer.json".replace("tokenizer", "config"), text_config={"auto_map": {"a": "b"}}),
        ),
        ("auto_map", with_file("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["x", null]}}')),
        ("trust_remote_code", with_config("config.json", trust_remote_code=True)),
        ("kernel", with_config("config.json", _attn_implementation="someone/kernel")),
        ("not valid JSON", with_file("config.json", b"{")),
        ("no config.json", lambda path: (path / "config.json").unlink()),
        ("no .safetensors", lambda path: (path / "model.safetensors").unlink()),
        ("no tokenizer", lambda path: (path / "tokenizer.json").unlink()),
        ("no chat template", lambda path: (path / "chat_template.jinja").unlink()),
        ("max_position_embeddings", with_config("config.json", max_position_embeddings=None)),
    ]
    for number, (reason, spoil) in enumerate(cases):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(folder, copy)
        spoil(copy)
        with pytest.raises(InvalidRequest) as refused:
            describe_folder(copy)
        assert reason in refused.value.message, (number, refused.value.message)
        assert refused.value.param == "path"


def test_nothing_in_a_refused_folder_is_ever_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return (canary.write_text, ("ran",))

    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InvalidRequest):
        describe_folder(folder)
    assert not canary.exists()


def test_a_name_means_one_digest_for_ever(engine: Engine, folder: Path, tmp_path: Path) -> None:
    with unit_of_work(engine) as session:
        first = base_models.register(session, describe_folder(folder), Registration("tiny", learning_rate=1e-3))
        assert (first.context_limit, first.learning_rate, first.target_modules) == (2048, 1e-3, ["q_proj"])
        assert first.files["config.json"]["bytes"] == (folder / "config.json").stat().st_size
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    with unit_of_work(engine) as session:
        again = base_models.register(session, describe_folder(moved), Registration("tiny"))
        assert (again.id, again.path) == (first.id, str(moved))
    edit(folder / "config.json", hidden_size=9)
    with pytest.raises(Conflict, match="other bytes"), unit_of_work(engine) as session:
        base_models.register(session, describe_folder(folder), Registration("tiny"))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"name": "ft:evil"}, "name"),
        ({"name": "../up"}, "name"),
        ({"name": ""}, "name"),
        ({"context_limit": 4096}, "context_limit"),
        ({"context_limit": 2}, "context_limit"),
        ({"target_modules": ["nothing"]}, "target_modules"),
    ],
)
def test_a_registration_is_checked(engine: Engine, folder: Path, changes: dict[str, Any], param: str) -> None:
    described = describe_folder(folder)
    with pytest.raises(InvalidRequest) as refused, unit_of_work(engine) as session:
        base_models.register(session, described, Registration(**{"name": "tiny", **changes}))
    assert refused.value.param == param


def test_a_retired_base_takes_no_new_jobs_and_can_come_back(engine: Engine, folder: Path) -> None:
    described = describe_folder(folder)
    with unit_of_work(engine) as session:
        base_models.register(session, described, Registration("tiny"))
        base_models.retire(session, "tiny")
    with read_session(engine) as session:
        assert base_models.list_active(session) == []
        with pytest.raises(InvalidRequest):
            base_models.find(session, "tiny")
    with unit_of_work(engine) as session:
        base_models.register(session, described, Registration("tiny"))
    with read_session(engine) as session:
        assert base_models.find(session, "tiny").name == "tiny"


def test_the_bundled_base_is_registered_and_its_bytes_are_checked(engine: Engine, tmp_path: Path) -> None:
    base = base_models.register_bundled(engine)
    assert base.context_limit >= 2048
    assert base.pretrained_path == str(BUNDLED_ASSETS / "pretrained")
    assert base_models.register_bundled(engine).id == base.id
    assets = tmp_path / "assets"
    shutil.copytree(BUNDLED_ASSETS, assets)
    for changed in ("model/generation_config.json", "pretrained/config.json"):
        kept = (assets / changed).read_text()
        edit(assets / changed, max_length=7)
        with pytest.raises(Unavailable, match="altered"):
            base_models.register_bundled(engine, assets=assets)
        (assets / changed).write_text(kept)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """Weights of the same shapes and other numbers, without a tokenizer."""
    path = tmp_path / "before"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"\x01")
    return path


def registered(engine: Engine, folder: Path, pretrained: Path | None) -> BaseModelRef:
    described = describe_pretrained(pretrained) if pretrained else None
    with unit_of_work(engine) as session:
        return base_models.register(session, describe_folder(folder), Registration("tiny", pretrained=described))


def test_weights_before_alignment_may_come_later_and_move_but_not_change(
    engine: Engine, folder: Path, pretrained: Path, tmp_path: Path
) -> None:
    assert registered(engine, folder, None).pretrained_path is None
    added = registered(engine, folder, pretrained)
    assert added.pretrained_path == str(pretrained)
    assert added.pretrained_digest == describe_pretrained(pretrained).digest.digest
    assert set(added.pretrained_files or {}) == {"config.json", "model.safetensors"}
    moved = Path(shutil.copytree(pretrained, tmp_path / "moved"))
    assert registered(engine, folder, moved).pretrained_path == str(moved)
    assert registered(engine, folder, None).pretrained_path == str(moved)
    (moved / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"\x02")
    with pytest.raises(Conflict, match="other weights before alignment") as refused:
        registered(engine, folder, moved)
    assert refused.value.param == "pretrained"


def test_weights_before_alignment_that_do_not_fit_the_base_are_refused(
    engine: Engine, folder: Path, pretrained: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="no folder") as missing:
        describe_pretrained(tmp_path / "nowhere")
    assert missing.value.param == "pretrained"
    cases = [
        ("base model's own", WEIGHTS),
        ("is missing before alignment", safetensors(model__layers__0__mlp__odd_proj__weight=[8, 8])),
        (r"\[8, 8\] in the base model and \[4, 8\]", safetensors(model__layers__0__self_attn__q_proj__weight=[4, 8])),
        ("not a safetensors file", b"no"),
    ]
    for reason, content in cases:
        (pretrained / "model.safetensors").write_bytes(content)
        with pytest.raises(InvalidRequest, match=reason) as refused:
            registered(engine, folder, pretrained)
        assert refused.value.param == "pretrained"
    with read_session(engine) as session:
        assert base_models.list_active(session) == []


def test_a_hub_model_is_fetched_at_a_named_revision(tmp_path: Path, folder: Path) -> None:
    asked = []

    def fetcher(hub_id: str, revision: str, target: Path) -> str:
        asked.append((hub_id, revision))
        shutil.copytree(folder, target, dirs_exist_ok=True)
        return "c0ffee"

    path, exact = hub.fetch("owner/name", "main", tmp_path / "models", fetcher)
    assert (asked, exact) == ([("owner/name", "main")], "c0ffee")
    assert path.is_relative_to(tmp_path / "models")
    assert describe_folder(path).modules
    for bad in ("owner", "../etc", "owner/name/more", "https://hub/owner/name"):
        with pytest.raises(InvalidRequest):
            hub.fetch(bad, "main", tmp_path, fetcher)
    with pytest.raises(InvalidRequest, match="revision"):
        hub.fetch("owner/name", "", tmp_path, fetcher)
