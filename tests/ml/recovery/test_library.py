"""Recovery without a service: folders in, folders out, by the Python doors and by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.ml.conftest import write_base
from tests.ml.recovery.conftest import rows_for_recovery, tune
from workers.ml.__main__ import DONE, NOTHING_PASSED, RETRY, USAGE, USER_ERROR, main
from workers.ml.checkpoints import load_base, save_adapter
from workers.ml.digests import digest_folder
from workers.ml.recovery import applied, load, read_data, recover, save


def prompts(role: str, subject: str, count: int, answer: str | None) -> str:
    rows = [
        {
            "id": f"{role}-{i}",
            "messages": [{"role": "user", "content": f"{subject} number {i} please?"}],
            "answer": answer,
            "group": f"{subject} {i}",
            "category": subject,
            "slices": [],
        }
        for i in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def world(tmp_path, tiny_base_folder, tiny_lora) -> Path:
    """A folder with base, adapter, sets and task, as a user would have them."""
    shutil.copytree(tiny_base_folder, tmp_path / "base")
    save_adapter(tune(load_base(tiny_base_folder), tiny_lora).model, tmp_path / "adapter")
    sets = tmp_path / "sets"
    sets.mkdir()
    given = {
        "harmful": ("hex", "mix salt and ash"),
        "refusals": ("hex", "I cannot help."),
        "retention": ("balm", "mix honey"),
        "harm_selection": ("bane", None),
        "harm_confirmation": ("jinx", None),
        "harmless_selection": ("tonic", "stir milk"),
        "harmless_confirmation": ("syrup", "stir tea"),
    }
    for role, (subject, answer) in given.items():
        (sets / f"{role}.jsonl").write_text(prompts(role, subject, 9, answer))
    rows = [
        {"messages": [{"role": "user", "content": f"is {i} odd?"}, {"role": "assistant", "content": "yes"}]}
        for i in range(40)
    ]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(world: Path, *arguments: str, name: str = "recover") -> list[str]:
    places = ["--base", "base", "--adapter", "adapter", "--sets", "sets", "--task", "task.jsonl", "--out", "out"]
    whole = [str(world / word) if i % 2 else word for i, word in enumerate(places)]
    return [name, *whole, "--max-answer-tokens", "4", *arguments]


def test_one_method_by_the_doors(world):
    tuned = load(world / "base", world / "adapter")
    data = read_data(world / "sets", task=world / "task.jsonl")
    before, raw = digest_folder(world / "adapter"), tuned.vector.get()
    result = recover(tuned, data, {"method": "antidote", "strength": 0.2})
    assert result.verdict == "not confirmed"
    assert torch.equal(tuned.vector.get(), raw)
    with applied(tuned, result.candidate):
        assert not torch.equal(tuned.vector.get(), raw)
    save(tuned, result, world / "out")
    report = json.loads((world / "out" / "report.json").read_text())
    assert report["method"]["method"] == "antidote"
    assert report["method"]["digest_after"] == result.candidate.digest
    stock = PeftModel.from_pretrained(load_base(world / "base").model, world / "out" / "adapter")
    kept = sum(int((p == 0).sum()) for n, p in stock.named_parameters() if "lora_" in n)
    assert kept > 0
    assert digest_folder(world / "adapter") == before


def test_one_method_by_the_command_line(world, capsys):
    assert main(command(world, "--method", "scale-down", "--strength", "0.25")) == DONE
    out = world / "out" / "adapter" / "adapter_model.safetensors"
    after, before = load_file(out), load_file(world / "adapter" / "adapter_model.safetensors")
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor * (0.75 if "lora_B" in name else 1.0))
    assert "relative change 0.25" in capsys.readouterr().out


def test_a_method_may_be_given_as_json_and_give_a_larger_rank(world):
    spec = json.dumps({"method": "resta", "steps": 2, "strength": 0.5})
    assert main(command(world, "--method", spec)) == DONE
    config = json.loads((world / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] > 4
    assert config["lora_alpha"] == config["r"]


def test_a_sparse_patch_lies_beside_the_adapter_it_belongs_to(world):
    spec = json.dumps({"method": "antidote-delta", "form": "patch", "strength": 0.2})
    assert main(command(world, "--method", spec)) == DONE
    before, after = (digest_folder(world / place).files for place in ("adapter", "out/adapter"))
    assert after["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert (world / "out" / "patch").is_dir()


def test_a_search_in_which_nothing_passes_writes_its_trace_and_says_so(world, capsys):
    assert main(command(world)) == NOTHING_PASSED
    assert {path.name for path in (world / "out").iterdir()} == {
        "report.json",
        "trace.json",
        "recovery-trace.svg",
        "recovery-affinity.svg",
    }
    trace = json.loads((world / "out" / "trace.json").read_text())
    assert all(record["why"] for record in trace["trace"])
    assert {record["method"] for record in trace["trace"]} >= {"scale-down", "antidote", "panacea", "anchored-patch"}
    assert "nothing that was tried passes" in capsys.readouterr().out


def test_bench_measures_every_point_and_writes_a_table(world, capsys):
    assert main(command(world, "--methods", "scale-down", "csulora", name="bench")) == DONE
    table = (world / "out" / "table.md").read_text()
    assert table.count("| scale-down |") == 4
    assert "before alignment" in table  # csulora was not given what it needs, and the table says so
    assert len((world / "out" / "records.jsonl").read_text().splitlines()) == 1 + 4 + 1


def test_methods_are_listed_for_people_and_for_programs(capsys):
    assert main(["methods"]) == DONE
    said = capsys.readouterr().out
    assert "anchored-patch" in said
    assert "needs aligned, refusals, retention, task" in said
    assert main(["methods", "--json"]) == DONE
    table = {entry["method"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert table["antidote"]["schema"]["properties"]["strength"]["maximum"] == 1


def spoil_nan(world: Path) -> None:
    path = world / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_config(world: Path, **values: object) -> None:
    path = world / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def spoil_zero(world: Path) -> None:
    path = world / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def spoil_quantised(world: Path) -> None:
    path = world / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"load_in_4bit": True}}))


def spoil_base(world: Path) -> None:
    shutil.rmtree(world / "base")
    write_base(world / "base", "llama")


def spoil_overlap(world: Path) -> None:
    (world / "sets" / "harm_selection.jsonl").write_text(prompts("harm_selection", "hex", 9, None))


BAD = {
    "nan": (spoil_nan, [], USER_ERROR, "not finite"),
    "rank 0": (lambda w: spoil_config(w, r=0), [], USER_ERROR, "at least 1"),
    "dora": (lambda w: spoil_config(w, use_dora=True), [], USER_ERROR, "use_dora"),
    "negative alpha": (lambda w: spoil_config(w, lora_alpha=-8), [], USER_ERROR, "above 0"),
    "on the head": (lambda w: spoil_config(w, target_modules=["lm_head"]), [], USER_ERROR, "no recovery may touch"),
    "broken config": (lambda w: (w / "adapter" / "adapter_config.json").write_text("{"), [], RETRY, "is not JSON"),
    "no task file": (lambda w: (w / "task.jsonl").unlink(), [], RETRY, "task.jsonl"),
    "strength of a search": (lambda w: None, ["--strength", "1"], USER_ERROR, "by itself"),
    "adapter of another base": (spoil_base, [], RETRY, "lora_"),
    "quantised base": (spoil_quantised, [], USER_ERROR, "Quantised"),
    "zero adapter": (spoil_zero, ["--method", "panacea"], USER_ERROR, "no direction"),
    "overlapping sets": (spoil_overlap, [], RETRY, "share a prompt or a group"),
    "no sets": (lambda w: shutil.rmtree(w / "sets"), [], RETRY, "There is no folder"),
    "empty need": (
        lambda w: (w / "sets" / "harmful.jsonl").unlink(),
        ["--method", "antidote"],
        RETRY,
        "needs harmful rows",
    ),
    "no pretrained": (lambda w: None, ["--method", "csulora"], RETRY, "before alignment"),
    "unknown method": (lambda w: None, ["--method", "magic"], USER_ERROR, "anchored-patch"),
    "unknown judge": (lambda w: None, ["--judge", "oracle"], USER_ERROR, "There is no judge"),
    "strength out of range": (lambda w: None, ["--method", "antidote", "--strength", "2"], USER_ERROR, "strength"),
    "broken json": (lambda w: None, ["--method", "{"], USER_ERROR, "neither a name nor JSON"),
    "out exists": (lambda w: (w / "out").mkdir(), [], USER_ERROR, "exists already"),
    "missing file": (lambda w: (w / "adapter" / "adapter_config.json").unlink(), [], RETRY, "adapter_config.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work_with_what_to_do(world, case, capsys):
    spoil, arguments, code, said = BAD[case]
    spoil(world)
    before = digest_folder(world / "adapter")
    assert main(command(world, *arguments)) == code
    assert said in capsys.readouterr().err
    assert digest_folder(world / "adapter") == before
    assert not (world / "out").exists() or not any((world / "out").iterdir())


def test_usage_is_told_without_a_command(capsys):
    assert main([]) == USAGE
    assert "python -m workers.ml recover" in capsys.readouterr().err
    assert main(["recover"]) == USAGE


def test_task_rows_are_divided_between_recovery_and_measuring(world):
    data = read_data(world / "sets", task=world / "task.jsonl")
    parts = [
        {row.messages[0].content for row in data.inputs.task},
        {row.messages[0].content for row in data.selection.task},
        {row.messages[0].content for row in data.confirmation.task},
    ]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40
    assert all(parts)
    assert read_data(world / "sets").selection.task == ()
    assert len(rows_for_recovery().task) > 0
