"""Everything a run needs before its first gradient: loaded, checked, encoded, resolved.

Knows: how `job.json` and the files beside it become a base model, rows as tokens and settings without "auto";
that rows over the context limit are all named at once and none is cut.
Refuses to know: training, recovery and the gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from workers.ml.chat import EncodedRow, encode_prompt, encode_row
from workers.ml.checkpoints import LoadedBase, load_base
from workers.ml.customer_rows import CustomerRows, sort_rows
from workers.ml.data import read_rows
from workers.ml.digests import digest_folder
from workers.ml.errors import BaseModelChanged, IntegrityError, InvalidRow, InvalidSetting, MissingInput, RowTooLong
from workers.ml.evals.judges.specs import JUDGES
from workers.ml.evals.loader import load_judge
from workers.ml.jobspec import BaseChoice, JobSpec, RecoveryPlan, TuningRequest
from workers.ml.provider_sets import APART, read_sets, without_questions_of
from workers.ml.recovery.specs import method_name
from workers.ml.settings import TuningSettings
from workers.ml.tuning.hyperparameters import BaseDefaults, RequestedHyperparameters, Resolution, resolve_auto
from workers.ml.types import ChatRow, Judge, Progress, PromptRow

NAMED_LINES = 20  # lines listed in an error; the count is always given
ENCODE_TICK = 500


@dataclass(frozen=True)
class Prepared:
    """`train` and `validation` are `rows.train` and `rows.validation` as tokens."""

    spec: JobSpec
    settings: TuningSettings
    reasons: Mapping[str, str]
    base: LoadedBase
    judge: Judge
    rows: CustomerRows
    train: list[EncodedRow]
    validation: list[EncodedRow]
    sets: Mapping[str, list[PromptRow]]
    task_answer_tokens: int


def prepare(folder: Path, progress: Progress) -> Prepared:
    """Reads the run's folder. User errors name the file, the line and what was expected."""
    spec = JobSpec.model_validate_json((folder / "job.json").read_bytes())
    _check_pretrained(spec.base, spec.recovery)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(spec.base.path, expected_digest=spec.base.digest, device=device)
    judge = load_judge(spec.judge.name)
    validation_file = folder / "input" / "validation.jsonl"
    rows = sort_rows(
        read_rows(folder / "input" / "train.jsonl"),
        read_rows(validation_file) if validation_file.is_file() else None,
        judge if JUDGES[spec.judge.name].reads_content else None,
        gate_rows=spec.limits.min_task_rows,
    )
    sets, also_sent = without_questions_of(read_sets(folder / "sets"), [*rows.train, *rows.validation])
    rows.counts["measured_prompts_also_sent"] = sum(also_sent.values())
    progress.event("Customer rows sorted by use.", **rows.counts)
    limit = _context_limit(spec.tuning, base)
    _refuse_unreadable(base.tokenizer, sets, limit, spec.max_answer_tokens)
    train = _encode(base.tokenizer, rows.train, limit, "training_file", progress)
    from_validation = "validation_file" if validation_file.is_file() else "training_file"
    validation = _encode(base.tokenizer, rows.validation, limit, from_validation, progress)
    resolution = _resolve(spec.tuning, train, limit)
    return Prepared(
        spec=spec,
        settings=resolution.settings,
        reasons=resolution.reasons,
        base=base,
        judge=judge,
        rows=rows,
        train=train,
        validation=validation,
        sets=sets,
        task_answer_tokens=_task_answer_tokens(base.tokenizer, rows, spec.max_task_answer_tokens),
    )


def _check_pretrained(base: BaseChoice, plan: RecoveryPlan) -> None:
    """The weights before alignment are those registered; a plan that cannot do without them is not trained for.

    In auto a method that lacks them is passed over, as long as another one is left to try.
    """
    if base.pretrained is not None:
        if base.pretrained_digest not in (None, digest_folder(base.pretrained).digest):
            raise BaseModelChanged(
                "The files of the base model before its alignment are not those that were registered.", "pretrained"
            )
        return
    needing = [spec for spec in plan.specs if "pretrained" in spec.required_inputs()]
    if plan.mode != "none" and needing and (plan.mode == "fixed" or len(needing) == len(plan.specs)):
        names = ", ".join(dict.fromkeys(method_name(type(spec)) for spec in needing))
        raise MissingInput(
            f"Recovery by {names} compares the base model {base.name!r} with its weights before alignment, and none are "
            "registered. Add them (theriac base-models add NAME --path FOLDER --pretrained FOLDER), or ask for another "
            "method.",
            "pretrained",
        )


def _resolve(request: TuningRequest, train: Sequence[EncodedRow], limit: int) -> Resolution:
    """The request's "auto" values, settled by what is really trained on."""
    return resolve_auto(
        RequestedHyperparameters(
            n_epochs=request.n_epochs,
            batch_size=request.batch_size,
            learning_rate_multiplier=request.learning_rate_multiplier,
            seed=request.seed,
        ),
        rows=len(train),
        trained_tokens=sum(row.trained_tokens for row in train),
        base_defaults=BaseDefaults(request.base_learning_rate, limit, request.lora, request.micro_batch_tokens),
    )


def _context_limit(request: TuningRequest, base: LoadedBase) -> int:
    """The registered limit, which may be below the model's own and never above it."""
    own = getattr(base.config, "max_position_embeddings", None)
    if own is not None and request.context_limit > own:
        raise InvalidSetting(
            f"The base model reads {own} tokens; it was registered with {request.context_limit}.", "context_limit"
        )
    return request.context_limit


def _refuse_unreadable(
    tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Sequence[PromptRow]], limit: int, answer_tokens: int
) -> None:
    """The provider's rows must fit this base model; found here, no training is lost and no customer is blamed."""
    for role, rows in sets.items():
        for row in rows:
            try:
                tokens = len(encode_prompt(tokenizer, row.messages))
            except InvalidRow as error:
                raise IntegrityError(f"Row {row.id!r} of the data set {role!r}: {error}", role) from error
            answer = len(tokenizer.encode(row.answer, add_special_tokens=False)) if row.answer else 0
            if tokens + max(answer + 1, answer_tokens if role in APART else 0) > limit:
                raise IntegrityError(
                    f"Row {row.id!r} of the data set {role!r} has {tokens} tokens, which leaves too little of the "
                    f"base model's {limit} for an answer.",
                    role,
                )


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChatRow], limit: int, param: str, progress: Progress
) -> list[EncodedRow]:
    encoded: list[EncodedRow] = []
    too_long: list[RowTooLong] = []
    for count, row in enumerate(rows, start=1):
        try:
            encoded.append(encode_row(tokenizer, row, max_tokens=limit))
        except RowTooLong as error:
            too_long.append(error)
        except InvalidRow as error:
            raise InvalidRow(f"Line {row.line} of the {param}: {error}", row.line, param) from error
        if count % ENCODE_TICK == 0:
            progress.step(count, len(rows), part="encoding")
    if too_long:
        named = " ".join(str(error) for error in too_long[:NAMED_LINES])
        more = f" And {len(too_long) - NAMED_LINES} more." if len(too_long) > NAMED_LINES else ""
        raise InvalidRow(
            f"{len(too_long)} rows of the {param} are longer than the base model's context of {limit} tokens; shorten "
            f"or remove them. {named}{more}",
            too_long[0].line,
            param,
        )
    return encoded


def _task_answer_tokens(tokenizer: PreTrainedTokenizerBase, rows: CustomerRows, most: int) -> int:
    """As long as the longest answer that has to be matched, and its end; never longer than the policy allows."""
    answers = [row.answer for row in (*rows.selection, *rows.gate)]
    longest = max((len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers), default=0)
    return min(most, longest + 2)
