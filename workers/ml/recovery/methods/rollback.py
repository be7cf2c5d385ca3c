"""Rollback: puts the weights back that keep the model from looking at harmful prompts as the aligned model did.

Paper: LLMAlignment, IEEE S&P 2025, arXiv 2504.09757. d_h is the mean hidden state, after the first
E = floor(depth_ratio * layers) layers and at the last token of the prompt, of harmful prompts in the aligned model; d_b
the same of task prompts in the raw fine-tune. A step sums over batches the gradient of -cos(mean state of the batch,
d_h) with respect to the dense weights. Candidates are the weights that a descent would move towards their aligned
value; the k = ceil(restore_ratio * adapted weights) with the largest gradient take that value. With `protect_task`, the
gradient of -cos(mean state of task prompts, d_b) then gives back the top `give_back_ratio` of those just restored that
a descent would move away from it, and the next step starts from a gradient of zero; without, gradients sum over steps.

The base is frozen, so the aligned value of an entry is a zero in delta = s * B @ A, and a restored model is the raw
one plus a sparse patch of -delta. `strength` is the share of the steps taken, rounded up: masks are nested, and one
run serves the whole dial. Form `patch` is exact; form `adapter` refits delta * (1 - mask) to the job's rank, which
loses a good part of a sparse change: `pruning_kept` says how much of it is left.

The paper's code restores strictly above the k-th gradient, one weight fewer (`compat`); warms up for five steps, asks
a task metric whether to protect the task at all, and picks the last step within 5 % of the task score. Here that choice
is the knob's and the search's.
What it does not do: use an answer, harmful or not; restore anything above layer E; look beyond the last token of a
prompt, so that an answer may begin as the aligned model's and go on as nobody's; or know harmless prompts that are no
task of the customer: d_h is where it sends those that look alike. It is heavy: one dense fp32 gradient of every adapted
layer below E in memory, and a forward and a backward of all prompts in every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from workers.ml.candidate import SparsePatch
from workers.ml.chat import EncodedRow
from workers.ml.errors import NumericError
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.entries import masked_path, weight_change
from workers.ml.recovery.hidden_states import PromptView, cosine, encode_prompts
from workers.ml.recovery.restoring import pull_home, steepest
from workers.ml.recovery.specs import RollbackSpec
from workers.ml.tuned_model import TunedModel, aligned
from workers.ml.tuning.lora_vector import LoraPair, LoraVector
from workers.ml.types import Progress

Batches = list[list[EncodedRow]]
Places = dict[str, Tensor]  # flat places in each module's weight


def prepare(tuned: TunedModel, spec: RollbackSpec, inputs: RecoveryInputs, progress: Progress) -> StrengthPath:
    """All steps once; each point of the dial is what the first of them restored."""
    inputs.require(spec)
    run = _Run(tuned, spec, inputs, progress)
    facts, record = run.restore(), run.record

    def taken(strength: float) -> int:
        return min(math.ceil(strength * spec.steps - 1e-9), len(record.steps))

    path = masked_path(
        tuned.vector, spec.form, lambda strength: record.masks(taken(strength)), facts=facts, progress=progress
    )
    return replace(path, facts_at=lambda strength: {"steps_taken": taken(strength), **path.facts_at(strength)})


@dataclass(frozen=True)
class _Record:
    """Which entries of the weight change each step put back for good, as flat places in each module's weight."""

    vector: LoraVector
    raw: Tensor
    pairs: Sequence[LoraPair]  # those within reach
    steps: list[Places] = field(default_factory=list)

    def delta(self, pair: LoraPair) -> Tensor:
        """(d_out, d_in): the raw adapter's change of one module."""
        return weight_change(self.vector.split(self.raw), pair)

    def restored(self, name: str, count: int) -> Tensor:
        """What the first `count` steps restored, ascending; nothing in a module out of reach."""
        places = [step[name] for step in self.steps[:count] if name in step]
        return torch.cat(places).sort().values if places else self.raw.new_empty(0, dtype=torch.int64)

    def drift(self, pair: LoraPair) -> Tensor:
        """(d_out, d_in): what is left of the change after all steps so far."""
        delta = self.delta(pair)
        delta.view(-1)[self.restored(pair.module_name, len(self.steps))] = 0.0
        return delta

    def masks(self, count: int) -> Iterator[tuple[str, Tensor]]:
        """(d_out, d_in) of every adapted module, True where the first `count` steps restored."""
        for pair in self.vector.pairs():
            mask = torch.zeros_like(self.delta(pair), dtype=torch.bool)
            mask.view(-1)[self.restored(pair.module_name, count)] = True
            yield pair.module_name, mask

    def patches(self) -> dict[str, SparsePatch]:
        """All steps so far, as the model computes them."""
        patches = {}
        for pair in self.pairs:
            places, delta = self.restored(pair.module_name, len(self.steps)), self.delta(pair)
            rows, columns = places // delta.shape[1], places % delta.shape[1]
            values = -delta.view(-1)[places]
            patches[pair.module_name] = SparsePatch(rows, columns, values, (delta.shape[0], delta.shape[1]))
        return {name: patch for name, patch in patches.items() if len(patch.values)}


class _Run:
    """The steps themselves, on a model that computes as restored so far."""

    def __init__(self, tuned: TunedModel, spec: RollbackSpec, inputs: RecoveryInputs, progress: Progress) -> None:
        self.tuned, self.spec, self.progress = tuned, spec, progress
        self.view = view = PromptView(tuned, spec.depth_ratio)
        self.record = _Record(tuned.vector, tuned.vector.get(), view.pairs)
        self.harmful = self._batches([row.messages for row in inputs.harmful])
        self.task = self._batches([row.prompt for row in inputs.task]) if spec.protect_task else []
        self.names = [pair.module_name for pair in view.pairs]
        self.pair_of = {pair.module_name: pair for pair in view.pairs}
        self.limit = math.ceil(spec.restore_ratio * adapted_weights(tuned.vector))
        self.ticks, self.all_ticks = 0, (len(self.harmful) + len(self.task)) * (1 + spec.steps) + len(self.harmful)

    def restore(self) -> dict[str, Any]:
        """Fills the record; returns the facts of the run."""
        if not any(bool(self.record.delta(pair).any()) for pair in self.view.pairs):
            raise NumericError("The adapter changes nothing in the layers looked at: there is no weight to restore.")
        with aligned(self.tuned):
            towards = self._mean(self.harmful)
        task_view = self._mean(self.task) if self.task else None
        gradients = {
            pair.module_name: torch.zeros_like(self.record.delta(pair), dtype=torch.float32) for pair in self.view.pairs
        }
        steps = []
        for _ in range(self.spec.steps):
            facts = self._step(gradients, towards, task_view)
            if not facts["restored"]:
                break  # the next step would see the same model and find as little
            steps.append(facts)
        if not steps:
            raise NumericError("The gradient is zero or sends no weight home: there is no weight to restore.")
        return {
            "layers": self.view.layers,
            "depth": self.view.depth,
            "harmful_prompts": sum(map(len, self.harmful)),
            "task_prompts": sum(map(len, self.task)),
            "adapted_weights": adapted_weights(self.tuned.vector),
            "restored_in_a_step": self.limit,
            "harmful_cosine_after": self._looks_like(towards),
            "steps": steps,
        }

    def _step(self, gradients: dict[str, Tensor], towards: Tensor, task_view: Tensor | None) -> dict[str, Any]:
        """Restores once, and gives back once where the task is protected. Cosines are those before each of the two."""
        facts: dict[str, Any] = {"harmful_cosine": self._slope(gradients, self.harmful, towards, part="restore")}

        def homeward(name: str) -> Tensor:
            return pull_home(self.record.drift(self.pair_of[name]), gradients[name])

        restored = steepest(self.names, homeward, self.limit, strict=self.spec.compat)
        facts["restored"] = _total(restored)
        if not facts["restored"]:
            return facts
        self.record.steps.append(restored)
        if task_view is not None:
            _clear(gradients)
            facts["task_cosine"] = self._slope(gradients, self.task, task_view, part="protect")
            back = self._given_back(restored, gradients)
            facts["given_back"] = _total(back)
            self.record.steps[-1] = {name: _without(places, back[name]) for name, places in restored.items()}
            _clear(gradients)
        return facts

    def _given_back(self, restored: Places, gradients: dict[str, Tensor]) -> Places:
        """The part of the just restored places that the task wants back the most; `gradients` are those of the task."""

        def wanted(name: str) -> Tensor:
            # Seen from the fine-tune, a restored weight has drifted by -delta.
            away = -self.record.delta(self.pair_of[name]).view(-1)[restored[name]]
            return pull_home(away, gradients[name].view(-1)[restored[name]])

        candidates = sum(int(wanted(name).count_nonzero()) for name in self.names)
        count = math.ceil(self.spec.give_back_ratio * candidates)
        chosen = steepest(self.names, wanted, count, strict=self.spec.compat)
        return {name: restored[name][places] for name, places in chosen.items()}

    def _slope(self, gradients: dict[str, Tensor], batches: Batches, direction: Tensor, *, part: str) -> float:
        """Adds every batch's gradient; returns the mean of their cosines."""
        cosines = []
        with self.tuned.side.swapped(self.record.patches()):
            for batch in batches:
                cosines.append(self.view.add_gradient(batch, direction, gradients))
                self._tick(part, cosine=cosines[-1])
        return sum(cosines) / len(cosines)

    def _looks_like(self, direction: Tensor) -> float:
        """The mean cosine of the harmful batches after all steps."""
        cosines = []
        with self.tuned.side.swapped(self.record.patches()):
            for batch in self.harmful:
                cosines.append(cosine(self.view.mean_state(batch), direction))
                self._tick("view")
        return sum(cosines) / len(cosines)

    def _mean(self, batches: Batches) -> Tensor:
        """Mean state over all prompts."""
        total = torch.zeros((), dtype=torch.float64, device=self.tuned.vector.device)
        for batch in batches:
            total = total + len(batch) * self.view.mean_state(batch).double()
            self._tick("view")
        return (total / sum(map(len, batches))).float()

    def _batches(self, prompts: Sequence[Any]) -> Batches:
        rows, size = encode_prompts(self.tuned, prompts[: self.spec.max_rows]), self.spec.batch_rows
        return [rows[begin : begin + size] for begin in range(0, len(rows), size)]

    def _tick(self, part: str, **values: float) -> None:
        self.ticks += 1
        self.progress.step(self.ticks, self.all_ticks, part=part, **values)


def adapted_weights(vector: LoraVector) -> int:
    """Entries of all adapted weight matrices, at any depth."""
    shapes = dict(zip(vector.names, vector.shapes, strict=True))
    return sum(shapes[pair.b_name][0] * shapes[pair.a_name][1] for pair in vector.pairs())


def _total(places: Places) -> int:
    return sum(map(len, places.values()))


def _clear(gradients: dict[str, Tensor]) -> None:
    for gradient in gradients.values():
        gradient.zero_()


def _without(places: Tensor, others: Tensor) -> Tensor:
    return places[~torch.isin(places, others)]
