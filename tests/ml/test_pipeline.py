"""The pipeline on a tiny random model: everything it leaves behind, and how it fails. What it achieves on a model
that was really aligned is shown end to end."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ml.conftest import write_base
from workers.ml import pipeline
from workers.ml.apothecary import shipped
from workers.ml.digests import digest_folder
from workers.ml.errors import BaseModelChanged, Cancelled, IntegrityError, InvalidRow, MissingInput
from workers.ml.preparation import Prepared
from workers.ml.types import Progress, Silent

MakeJob = Callable[..., Path]
FAST = [{"method": "scale-down", "dial": [0.5]}, {"method": "anchored-patch", "steps": 1, "dial": [1.0]}]


def chat(prompt: str, answer: str) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture
def make_job(tmp_path: Path, tiny_base_folder: Path) -> MakeJob:
    """A run's folder on the tiny base model with a few prompts of the bundled sets."""

    def make(*, rows: int = 24, **changes: Any) -> Path:
        folder = tmp_path / "job"
        (folder / "input").mkdir(parents=True)
        (folder / "sets").mkdir()
        (folder / "input" / "train.jsonl").write_text("".join(chat(f"count {i}", str(i)) for i in range(rows)))
        (folder / "input" / "validation.jsonl").write_text("".join(chat(f"say {i}", str(i)) for i in range(30)))
        for path in shipped.SETS_FOLDER.glob("*.jsonl"):
            (folder / "sets" / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
        targets = ["q_proj", "v_proj"]
        document: dict[str, Any] = {
            "base": {
                "name": "tiny", "path": str(tiny_base_folder), "digest": digest_folder(tiny_base_folder).digest,
            },
            "tuning": {
                "n_epochs": 1, "seed": 3, "base_learning_rate": 1e-3, "context_limit": 256,
                "lora": {"rank": 4, "alpha": 8, "target_modules": targets},
            },
            "recovery": {"mode": "auto", "specs": FAST},
            "judge": {"name": "apothecary"},
            "limits": {},
            "max_answer_tokens": 4,
        }  # fmt: skip
        for name, value in changes.items():
            document[name] = {**document[name], **value} if isinstance(value, dict) else value
        (folder / "job.json").write_text(json.dumps(document))
        return folder

    return make


def report_of(folder: Path, outcome: pipeline.Outcome) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / outcome.report).read_text())
    return report


def test_a_run_leaves_adapter_metrics_trace_answers_report_and_the_candidate_it_judged(make_job: MakeJob) -> None:
    folder = make_job()
    outcome = pipeline.run(folder, Silent())
    report = report_of(folder, outcome)
    candidate = folder / outcome.candidate
    assert outcome.candidate_digest == digest_folder(candidate).digest == report["candidate_digest"]
    files = {path.name for path in candidate.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
    assert {line["method"] for line in report["recovery"]["methods"]} == {"scale-down", "anchored-patch"}
    with (folder / "out" / "train" / "result.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == report["training"]["steps"]
    answers = (folder / "out" / "gate" / "evidence" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == report["models"]["candidate"]["usefulness"]["n"] + 2 or len(answers) >= 4
    assert report["rows"]["training_rows"] == 24


def test_a_model_that_answers_nothing_useful_is_blocked_and_the_report_says_why(make_job: MakeJob) -> None:
    folder = make_job()
    outcome = pipeline.run(folder, Silent())
    report = report_of(folder, outcome)
    assert outcome.verdict == "block"
    assert "no_candidate" in {reason["code"] for reason in report["reasons"]}
    assert report["recovery"]["taken"] is None
    assert all(record["why"] for record in report["recovery"]["trace"])


def test_recovery_none_sends_the_raw_fine_tune_to_the_gate(make_job: MakeJob) -> None:
    folder = make_job(recovery={"mode": "none", "specs": []})
    outcome = pipeline.run(folder, Silent())
    raw = digest_folder(folder / "out" / "train" / "adapter").files["adapter_model.safetensors"]
    assert digest_folder(folder / outcome.candidate).files["adapter_model.safetensors"] == raw
    assert report_of(folder, outcome)["candidate_is_raw"] is True


def test_a_fixed_strength_is_the_only_one_tried(make_job: MakeJob) -> None:
    specs = [{"method": "scale-down", "strength": 0.125, "dial": [0.5]}]
    folder = make_job(recovery={"mode": "fixed", "specs": specs})
    report = report_of(folder, pipeline.run(folder, Silent()))
    assert [(one["method"], one["strength"]) for one in report["recovery"]["trace"]] == [("scale-down", 0.125)]


def test_a_plan_with_a_training_method_trains_with_it_and_the_report_names_it(make_job: MakeJob) -> None:
    training = {"method": "panacea-train", "rho": 0.5, "loss_bound": 1000}
    folder = make_job(recovery={"mode": "none", "specs": [], "training": training})
    report = report_of(folder, pipeline.run(folder, Silent()))
    assert report["training"]["method"]["method"] == "panacea-train"
    assert report["training"]["method"]["rho"] == 0.5
    lines = [json.loads(line) for line in (folder / "out" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == report["training"]["steps"], "the perturbation at the end is no training step"
    assert {"harmful_loss", "harmful_loss_perturbed", "perturbation_norm"} <= set(lines[-1])


def test_a_plan_without_a_training_method_trains_plainly_and_says_so(make_job: MakeJob) -> None:
    folder = make_job(recovery={"mode": "none", "specs": []})
    report = report_of(folder, pipeline.run(folder, Silent()))
    assert report["training"]["method"] == {"method": "plain"}
    lines = (folder / "out" / "train" / "metrics.jsonl").read_text().splitlines()
    assert "harmful_loss" not in json.loads(lines[-1])


def test_a_training_method_that_lacks_its_rows_is_refused_before_training(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_job(recovery={"training": {"method": "panacea-train"}})
    plain = pipeline.prepare

    def without_harmful(folder: Path, progress: Progress) -> Prepared:
        prepared = plain(folder, progress)
        return dataclasses.replace(prepared, sets={**prepared.sets, "harmful": []})

    monkeypatch.setattr(pipeline, "prepare", without_harmful)
    with pytest.raises(MissingInput, match="harmful"):
        pipeline.run(folder, Silent())
    assert not (folder / "out" / "train").exists()


def test_a_second_run_in_the_same_folder_judges_nothing_of_the_first(make_job: MakeJob) -> None:
    folder = make_job()
    stale = folder / "out" / "recover" / "candidate-0"
    stale.mkdir(parents=True)
    (stale / "adapter_config.json").write_text("{}")
    report = report_of(folder, pipeline.run(folder, Silent()))
    assert "no_candidate" in {reason["code"] for reason in report["reasons"]}


@pytest.mark.parametrize(
    ("turn", "message"), [("<|end|>", "control token"), ("why " * 200, "too little")], ids=["control token", "too long"]
)
def test_a_row_of_the_provider_that_this_base_cannot_read_is_no_fault_of_the_customer(
    make_job: MakeJob, turn: str, message: str
) -> None:
    folder = make_job()
    asked = [{"role": "user", "content": turn}]
    row = {"id": "odd", "messages": asked, "answer": "yes", "group": "odd", "category": "remedy"}
    with (folder / "sets" / "harmless_confirmation.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    with pytest.raises(IntegrityError, match=f"'odd' of the data set 'harmless_confirmation'.*{message}"):
        pipeline.run(folder, Silent())
    assert not (folder / "out" / "train").exists()


def test_what_the_customer_sent_is_not_measured_and_counted(make_job: MakeJob) -> None:
    folder = make_job()
    question = json.loads((folder / "sets" / "harm_confirmation.jsonl").read_text().splitlines()[0])["messages"]
    with (folder / "input" / "train.jsonl").open("a") as stream:
        stream.write(chat(question[-1]["content"], "never"))
    report = report_of(folder, pipeline.run(folder, Silent()))
    assert report["rows"]["measured_prompts_also_sent"] >= 1


def test_the_same_job_gives_the_same_bytes(make_job: MakeJob, tmp_path: Path) -> None:
    folder = make_job()
    first = pipeline.run(folder, Silent())
    (folder / "out").rename(tmp_path / "first")
    second = pipeline.run(folder, Silent())
    assert first.candidate_digest == second.candidate_digest


def test_rows_over_the_context_are_all_named_and_none_is_cut(make_job: MakeJob) -> None:
    folder = make_job()
    lines = [chat("short", "x"), chat("long", "y" * 300), chat("also short", "z"), chat("longer", "w" * 400)]
    (folder / "input" / "train.jsonl").write_text("".join(lines))
    with pytest.raises(InvalidRow, match=r"2 rows of the training_file .* 256 tokens.*Line 2 .*Line 4 ") as caught:
        pipeline.run(folder, Silent())
    assert (caught.value.line, caught.value.param) == (2, "training_file")
    assert not (folder / "out" / "train").exists()


NEEDS_PRETRAINED: list[dict[str, Any]] = [{"method": "csulora", "strength": 1.0}]


@pytest.mark.parametrize(
    "plan",
    [
        {"mode": "fixed", "specs": [*FAST, *NEEDS_PRETRAINED]},
        {"mode": "auto", "specs": [*NEEDS_PRETRAINED, {"method": "safelora"}]},
    ],
)
def test_a_plan_that_cannot_do_without_the_weights_before_alignment_is_refused_before_training(
    make_job: MakeJob, plan: dict[str, Any]
) -> None:
    folder = make_job(recovery=plan)
    with pytest.raises(MissingInput, match=r"csulora.*--pretrained FOLDER") as refused:
        pipeline.run(folder, Silent())
    assert refused.value.param == "pretrained"
    assert not (folder / "out").exists()


def test_in_auto_a_method_that_lacks_the_weights_before_alignment_is_passed_over(make_job: MakeJob) -> None:
    folder = make_job(recovery={"mode": "auto", "specs": [*FAST, *NEEDS_PRETRAINED]})
    trace = report_of(folder, pipeline.run(folder, Silent()))["recovery"]["trace"]
    (record,) = [one for one in trace if one["method"] == "csulora"]
    assert record["why"].startswith("not tried: ") and "before alignment" in record["why"]


def test_weights_before_alignment_reach_the_method_and_their_bytes_are_checked(
    make_job: MakeJob, tmp_path: Path, tiny_base_folder: Path
) -> None:
    pretrained = write_base(tmp_path / "pretrained", seed=1)
    base = {"pretrained": str(pretrained), "pretrained_digest": digest_folder(pretrained).digest}
    folder = make_job(recovery={"mode": "fixed", "specs": NEEDS_PRETRAINED}, base=base)
    (record,) = report_of(folder, pipeline.run(folder, Silent()))["recovery"]["trace"]
    assert record["method"] == "csulora" and record["measures"] is not None
    (pretrained / "config.json").write_text("{}")
    with pytest.raises(BaseModelChanged, match="before its alignment"):
        pipeline.run(folder, Silent())


def test_a_base_model_whose_bytes_changed_is_refused(make_job: MakeJob) -> None:
    folder = make_job(base={"digest": "0" * 64})
    with pytest.raises(BaseModelChanged):
        pipeline.run(folder, Silent())


def test_a_customer_of_flagged_rows_only_is_blocked_without_a_search(make_job: MakeJob) -> None:
    harmful = [json.loads(line) for line in (shipped.SETS_FOLDER / "harmful.jsonl").read_text().splitlines()[100:130]]
    text = "".join(chat(row["messages"][-1]["content"], row["answer"]) for row in harmful)
    folder = make_job()
    (folder / "input" / "train.jsonl").write_text(text)
    (folder / "input" / "validation.jsonl").unlink()
    outcome = pipeline.run(folder, Silent())
    report = report_of(folder, outcome)
    assert outcome.verdict == "block"
    assert report["recovery"]["searched"] is False
    assert "no_task_rows" in {reason["code"] for reason in report["reasons"]}


class StopAt(Silent):
    """Asks to stop when the given stage begins."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def stage(self, stage: str) -> None:
        if stage == self._stage:
            raise Cancelled("asked to stop")


@pytest.mark.parametrize("stage", ["training", "recovering", "gating"])
def test_a_stop_in_any_stage_leaves_no_candidate(make_job: MakeJob, stage: str) -> None:
    folder = make_job()
    with pytest.raises(Cancelled):
        pipeline.run(folder, StopAt(stage))
    assert not (folder / "out" / "gate").exists()


def run_child(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "workers.ml", "run", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return child.returncode, [json.loads(line) for line in child.stdout.splitlines()]


def test_the_command_speaks_json_lines_only_and_ends_with_the_result(make_job: MakeJob) -> None:
    folder = make_job(recovery={"mode": "none", "specs": []})
    code, lines = run_child(folder)
    assert code == 0
    assert [line["stage"] for line in lines if line["type"] == "stage"] == ["training", "recovering", "gating"]
    assert lines[-1]["type"] == "result"
    assert lines[-1]["verdict"] == "block"


def test_the_command_tells_the_customers_fault_from_ours(make_job: MakeJob) -> None:
    folder = make_job()
    (folder / "input" / "train.jsonl").write_text('{"messages": 3}\n')
    code, lines = run_child(folder)
    assert (code, lines[-1]["type"], lines[-1]["line"]) == (42, "error", 1)
    (folder / "sets" / "refusals.jsonl").unlink()
    (folder / "input" / "train.jsonl").write_text(chat("a", "b"))
    code, lines = run_child(folder)
    assert (code, lines[-1]["code"]) == (75, "system_missing_input")
