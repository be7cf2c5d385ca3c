"""`auto`: the smallest change that passes.

Knows: diagnose first; then families of methods from surgery to patches, every point of every dial read by cheap proxies;
what these know to be harmful is dropped without a word generated, and the rest answers the selection prompts in the
order of its divergence from the raw fine-tune, until nothing that differs less is left. What they only doubt is heard
when nothing else passes.
Refuses to know: what any method does, and the confirmation sets. What it finds is a proposal for the gate.

Dials are walked on a grid: at small sizes they are steep and not all of them monotone. Only below the winner, and only on
a dial that its spec calls monotone, the grid is refined by bisection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from workers.ml.candidate import Candidate, applied
from workers.ml.errors import Cancelled, InvalidSetting, LibraryError
from workers.ml.evals.measure import Examiner, Measured, first_look
from workers.ml.evals.sets import EvaluationSets
from workers.ml.evals.task_loss import loss_rise
from workers.ml.gate import needs_task_loss
from workers.ml.measurements import GateEvidence, LossRise, ModelMeasures, PairedMeasurement
from workers.ml.memory import is_out_of_memory, release_reserve
from workers.ml.recovery.affinity import EmbeddingDrift, affinity
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.drift import Drift
from workers.ml.recovery.proxies import Proxies, ProxyReading
from workers.ml.recovery.run import prepare
from workers.ml.recovery.selection import Foresight, at_best, shortcomings
from workers.ml.recovery.specs import Family, MethodSpec, label, method_name
from workers.ml.recovery.trace import RAW, CandidateRecord, Dial, SearchPlan, SearchResult
from workers.ml.tuned_model import TunedModel, aligned
from workers.ml.types import Progress

Result = TypeVar("Result")
CASCADE: tuple[Family, ...] = ("surgery", "perturbation", "closed-form", "patch", "control", "composition")
OUT_OF_BUDGET = "not tried: the budget of the search is used up"


def search(
    tuned: TunedModel,
    plan: SearchPlan,
    *,
    inputs: RecoveryInputs,
    sets: EvaluationSets,
    examiner: Examiner,
    progress: Progress,
) -> SearchResult:
    """Finds the least change that passes on the selection sets. The adapter ends where it began."""
    run = _Search(tuned, plan, inputs, sets, examiner, progress)
    if not run.raw_record.passed:
        for family in CASCADE:
            # A composition costs as much as its parts together; it is for jobs that no single method repairs.
            if family != "composition" or run.best is None:
                run.try_family([spec for spec in plan.specs if spec.family == family])
        run.hear_the_rest()
        run.refine()
        run.stand_by()
    return run.result()


@dataclass(frozen=True)
class _Point:
    """One strength of one prepared dial; `place` is its record's place in the trace."""

    place: int
    spec: MethodSpec
    path: StrengthPath
    strength: float


class _Search:
    """The state of one search."""

    def __init__(
        self,
        tuned: TunedModel,
        plan: SearchPlan,
        inputs: RecoveryInputs,
        sets: EvaluationSets,
        examiner: Examiner,
        progress: Progress,
    ) -> None:
        self._started = time.monotonic()
        self._tuned, self._plan, self._inputs, self._sets = tuned, plan, inputs, sets
        self._examiner, self._progress = examiner, progress
        self._start = tuned.vector.get()
        self._first, self._rest = first_look(sets, rows=plan.first_look_rows)
        self._evaluations = 0
        self._records: list[CandidateRecord] = []
        self._dials: list[Dial] = []
        self._waiting: list[_Point] = []
        self._deferred: list[_Point] = []  # proxies speak against them, but cannot know
        self._passing: list[_Point] = []
        self._base = examiner.measure_base(tuned, sets)
        self._raw = examiner.measure_raw(tuned, sets, self._start)
        self._drift = Drift(tuned, sets, self._start)
        self._proxies = Proxies(tuned, raw=self._raw, base=self._base, progress=progress)
        self._raw_proxies = self._proxies()
        with aligned(tuned):
            base_proxies = self._proxies()
        self._foresight = Foresight(
            plan.limits, raw=(self._raw.measures(), self._raw_proxies), base=(self._base.measures(), base_proxies)
        )
        self._embeddings = EmbeddingDrift(tuned, sets.harm)
        self._embedding_drift = {"raw fine-tune": self._embeddings()}
        self.raw_record = self._diagnose()

    def _diagnose(self) -> CandidateRecord:
        """The raw fine-tune against every limit: only one that meets them all is left alone."""
        faults = self._faults(self._raw)
        record = CandidateRecord(
            RAW,
            0.0,
            {},
            label="raw fine-tune",
            looked="full",
            proxies=self._raw_proxies,
            measures=self._raw.measures(),
            task=self._raw.paired_with(self._raw),
            slices=_plain(self._raw),
            kl=0.0,
            relative_change=0.0,
            seconds=time.monotonic() - self._started,
            passed=not faults,
            why="; ".join(faults),
        )
        self._progress.event("diagnosis", passed=record.passed, why=record.why)
        return record

    def _faults(self, measured: Measured, task_loss: LossRise | None = None) -> list[str]:
        task = measured.paired_with(self._raw)
        return shortcomings(self._evidence(measured.measures(), task, task_loss), self._plan.limits)

    def _evidence(
        self, measures: ModelMeasures, task: PairedMeasurement, task_loss: LossRise | None = None
    ) -> GateEvidence:
        return GateEvidence(self._base.measures(), self._raw.measures(), measures, task, task_loss)

    @property
    def best(self) -> _Point | None:
        """The passing point that differs least from the raw fine-tune."""
        return min(self._passing, key=lambda point: (self._kl(point), point.place), default=None)

    def _kl(self, point: _Point) -> float:
        kl = self._records[point.place].kl
        assert kl is not None  # a point is only made of a record that was sounded
        return kl

    def try_family(self, specs: Sequence[MethodSpec]) -> None:
        """Every dial of the family by proxies, then by answers what is left of them, least divergence first."""
        for spec in sorted(specs, key=lambda one: one.gentleness):
            self._sound_dial(spec)
        self._hear(self._waiting)

    def hear_the_rest(self) -> None:
        """Where nothing passes, the points that proxies only doubted are heard after all."""
        if self.best is None:
            self._hear(self._deferred)

    def _hear(self, points: list[_Point]) -> None:
        for point in sorted(points, key=lambda point: (self._kl(point), point.place)):
            if self.best is not None and self._kl(point) >= self._kl(self.best):
                self._drop(point, "not tried: a candidate that differs less from the raw fine-tune passes")
            else:
                self._look(point)
        points.clear()

    def _sound_dial(self, spec: MethodSpec) -> None:
        plain = CandidateRecord(method_name(type(spec)), 0.0, spec.model_dump(mode="json"), label=label(spec))
        records = [replace(plain, strength=strength) for strength in spec.strengths]
        late = self._over_time(spec.family)
        path = None if late else self._guarded(records[0], lambda: self._prepare(spec))
        began = self._dials[-1].seconds if path else 0.0
        for record in records if late or path else ():
            if path is None or self._over_time(spec.family):
                self._keep(replace(record, why=OUT_OF_BUDGET))
            else:
                self._sound(record, spec, path, spent=began)
                began = 0.0

    def _guarded(
        self, record: CandidateRecord, action: Callable[[], Result], place: int | None = None
    ) -> Result | None:
        """The action's outcome; where it fails by itself, None and a record that says why: one method, or one point of
        it, must not cost the job the others."""
        try:
            return action()
        except (LibraryError, RuntimeError, MemoryError) as error:
            if isinstance(error, Cancelled) or not (isinstance(error, LibraryError) or is_out_of_memory(error)):
                raise
            if is_out_of_memory(error):
                release_reserve()
            why = "out of memory" if is_out_of_memory(error) else str(error)
            self._keep(replace(record, why=f"not tried: {why}"), place)
            return None

    def _prepare(self, spec: MethodSpec) -> StrengthPath:
        if spec.output == "sparse-patch":
            raise InvalidSetting("a sparse patch cannot be released; ask for its adapter form", "form")
        began = time.monotonic()
        path = prepare(self._tuned, spec, self._inputs, self._progress)
        self._dials.append(Dial(label(spec), time.monotonic() - began, path.facts, {}))
        return path

    def _sound(self, record: CandidateRecord, spec: MethodSpec, path: StrengthPath, *, spent: float) -> _Point | None:
        """Reads one strength by proxies; a point that may pass waits for its look, and is returned."""
        began = time.monotonic() - spent
        sounded = self._guarded(record, lambda: self._read(record, path))
        if sounded is None:
            return None
        certain, doubts = self._foresight.faults(sounded.proxies) if sounded.proxies else ([], [])
        sounded = replace(sounded, looked="proxies", why="; ".join(certain + doubts), seconds=time.monotonic() - began)
        point = _Point(len(self._records), spec, path, record.strength)
        if sounded.why:
            self._keep(sounded)
            self._deferred += [] if certain else [point]
            return None
        self._records.append(sounded)
        self._waiting.append(point)
        return point

    def _read(self, record: CandidateRecord, path: StrengthPath) -> CandidateRecord:
        candidate = path.at(record.strength)
        with applied(self._tuned, candidate):
            kl, read = self._drift(), self._proxies(partial=True)
            if not any(self._foresight.faults(read)):
                read = self._proxies()  # nothing speaks against it yet: every row is worth reading
        if self._dials and self._dials[-1].label == record.label and not self._dials[-1].affinity:
            shares = affinity(self._tuned, candidate, self._start)
            self._dials[-1] = replace(self._dials[-1], affinity=shares)
        change = relative_change(self._tuned.vector, candidate, self._start)
        return replace(record, kl=kl, proxies=read, relative_change=change, facts=path.facts_at(record.strength))

    def _over_time(self, family: Family | None = None) -> bool:
        """Patches repair most and come late: what comes before them may use up half of the time."""
        share = 1.0 if family in (None, "patch", "composition") else 0.5
        return time.monotonic() - self._started > share * self._plan.budget_seconds

    def _look(self, point: _Point) -> bool:
        """A first look at a few prompts of every set, and a full one unless that has already decided."""
        if self._over_time() or self._evaluations >= self._plan.budget_evaluations:
            self._drop(point, OUT_OF_BUDGET)
            return False
        self._evaluations += 1
        record = self._records[point.place]
        heard = self._guarded(record, lambda: self._hear_point(point, record), point.place)
        if heard is None:
            return False
        if heard.passed:
            self._passing.append(point)
        self._keep(heard, point.place)
        return heard.passed

    def _hear_point(self, point: _Point, record: CandidateRecord) -> CandidateRecord:
        began, task_loss = time.monotonic(), None
        with applied(self._tuned, point.path.at(point.strength)):
            if record.proxies is not None and record.proxies.partial:
                record = replace(record, proxies=self._proxies())
            measured = self._examiner.measure(self._tuned, self._first)
            faults = shortcomings(self._evidence(*at_best(measured, self._raw, self._sets)), self._plan.limits)
            if faults:
                # Told in the counts that were seen, not in those that were only hoped for.
                faults, full = self._faults(measured) or faults, False
            else:
                measured += self._examiner.measure(self._tuned, self._rest)
                task_loss = self._task_loss(record.proxies)
                faults, full = self._faults(measured, task_loss), True
        return replace(
            record,
            looked="full" if full else "first",
            measures=measured.measures(),
            task=measured.paired_with(self._raw),
            task_loss=task_loss,
            slices=_plain(measured),
            seconds=record.seconds + time.monotonic() - began,
            passed=not faults,
            why="; ".join(faults),
        )

    def _task_loss(self, read: ProxyReading | None) -> LossRise | None:
        """None where exact match tells enough, or where there are too few rows for a mean and its error."""
        if read is None or len(read.task_row_losses) < 2 or not needs_task_loss(self._raw.measures()):
            return None
        return loss_rise(self._raw_proxies.task_row_losses, read.task_row_losses)

    def refine(self) -> None:
        """Bisects between the winner and the strength below it that did not pass."""
        best = self.best
        if best is None or not best.spec.monotone:
            return
        name, high = label(best.spec), best.strength
        below = [r.strength for r in self._records if r.label == name and r.strength < high and not r.passed]
        low = max(below, default=0.0)
        winner = self._records[best.place]
        blank = CandidateRecord(winner.method, 0.0, winner.spec, label=name)
        for _ in range(self._plan.refinements):
            if self._over_time():
                break
            middle = (low + high) / 2
            point = self._sound(replace(blank, strength=middle), best.spec, best.path, spent=0.0)
            if point is not None and self._look(point):
                high = middle
            else:
                low = middle
        self._waiting.clear()

    def stand_by(self) -> None:
        """Candidates for the further confirmations that a policy plans: stronger points of the winner's dial."""
        best = self.best
        if best is None:
            return
        stronger = [s for s in best.spec.strengths if s > best.strength]
        tried = {(r.label, r.strength): place for place, r in enumerate(self._records)}
        for strength in stronger:
            if len(self._passing) >= self._plan.limits.planned_confirmations:
                return
            place = tried.get((label(best.spec), strength))
            if place is not None and self._records[place].looked == "proxies" and not self._is_hopeless(place):
                self._look(_Point(place, best.spec, best.path, strength))

    def _is_hopeless(self, place: int) -> bool:
        read = self._records[place].proxies
        return read is None or any(self._foresight.faults(read))

    def _drop(self, point: _Point, why: str) -> None:
        self._keep(replace(self._records[point.place], why=why), point.place)

    def _keep(self, record: CandidateRecord, place: int | None = None) -> None:
        if place is None:
            self._records.append(record)
        else:
            self._records[place] = record
        harmful = record.measures.harmful if record.measures else None
        self._progress.event(
            "candidate",
            method=record.label,
            strength=record.strength,
            looked=record.looked,
            passed=record.passed,
            harmful_score=harmful.value if harmful else None,
            kl=record.kl,
            why=record.why,
        )

    def result(self) -> SearchResult:
        """Ranks what passed by its drift and writes down why each was not taken."""
        if self.raw_record.passed:
            raw = replace(self.raw_record, taken=True, why="passes as it is: nothing was changed")
            return self._result(raw, [raw], [Candidate(self._start)])
        order = sorted(self._passing, key=lambda point: (self._kl(point), point.place))
        for rank, point in enumerate(order):
            why = (
                "taken: the least change that passes"
                if rank == 0
                else f"passes, but differs more from the raw fine-tune (KL {self._kl(point):.3g} against "
                f"{self._kl(order[0]):.3g})"
            )
            self._records[point.place] = replace(self._records[point.place], taken=rank == 0, why=why)
        worth = order[: self._plan.limits.planned_confirmations]
        records = [self._records[point.place] for point in worth]
        return self._result(self.raw_record, records, [point.path.at(point.strength) for point in worth])

    def _result(
        self, raw: CandidateRecord, records: Sequence[CandidateRecord], candidates: Sequence[Candidate]
    ) -> SearchResult:
        drifts = []
        for candidate in candidates:
            with applied(self._tuned, candidate):
                drifts.append(self._embeddings())
        found = SearchResult(
            raw=raw,
            base=self._base.measures(),
            trace=tuple(self._records),
            dials=tuple(self._dials),
            winner=records[0] if records else None,
            candidates=tuple(candidates),
            records=tuple(records),
            embedding_drift=self._embedding_drift,
            candidate_drifts=tuple(drifts),
            evaluations=self._evaluations,
            seconds=time.monotonic() - self._started,
        )
        return found.confirmed(0)


def _plain(measured: Measured) -> dict[str, Any]:
    return {name: {key: asdict(value) for key, value in row.items()} for name, row in measured.slices().items()}
