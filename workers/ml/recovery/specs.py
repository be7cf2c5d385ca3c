"""The registry of recovery methods: one frozen class per method, with its knobs, needs, paper and dial.

Knows: what may be asked of a method and what it must be given. No tensor library, so that a gateway can validate a
policy and draw a form.
Refuses to know: the mathematics (`methods/`), and which method suits a job (`search.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

Need = Literal["harmful", "refusals", "retention", "task", "aligned"]


class MethodSpec(BaseModel):
    """What every method has in common. `strength` is the dial; 0 leaves every byte of the adapter as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    implementation: ClassVar[str]  # "<module in methods>:<function>"
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str]
    grid: ClassVar[tuple[float, ...]]  # the dial's default search grid, ascending
    control: ClassVar[bool] = False  # a baseline that shows what the method's idea adds; `auto` may skip it
    gentleness: ClassVar[int]  # `auto` tries lower numbers first

    strength: float = Field(1.0, ge=0, description="the dial; 0 is the identity")
    dial: tuple[float, ...] = Field((), max_length=32, description="strengths to search; empty: the method's own grid")
    seed: int = Field(0, ge=0, le=2**31 - 1)

    @field_validator("dial")
    @classmethod
    def _ascending(cls, dial: tuple[float, ...]) -> tuple[float, ...]:
        top = _maximum(cls)
        if any(not 0 < strength <= top for strength in dial) or list(dial) != sorted(set(dial)):
            raise ValueError(f"dial must hold distinct ascending strengths above 0 and at most {top:g}")
        return dial

    @property
    def strengths(self) -> tuple[float, ...]:
        return self.dial or self.grid

    def required_inputs(self) -> frozenset[str]:
        """The data sets and models this spec cannot run without, as its knobs stand."""
        return self.needs


def _maximum(cls: type[MethodSpec]) -> float:
    limits = [bound.le for bound in cls.model_fields["strength"].metadata if hasattr(bound, "le")]
    return float(limits[0]) if limits else float("inf")


class ScaleDownSpec(MethodSpec):
    """Shrinks the whole adapter: delta' = (1 - strength) * delta. The honest null of every method."""

    method: Literal["scale-down"] = "scale-down"
    implementation: ClassVar[str] = "scale_down:prepare"
    paper: ClassVar[str] = "weight interpolation with the aligned model, arXiv 2412.19512"
    grid: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 0.9)
    gentleness: ClassVar[int] = 10

    strength: float = Field(0.5, ge=0, le=1, description="share of the update taken away")


class AntidoteSpec(MethodSpec):
    """Zeroes the LoRA weights that harmful data excites most (Wanda scores on harmful prompts and answers)."""

    method: Literal["antidote"] = "antidote"
    implementation: ClassVar[str] = "antidote:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})
    paper: ClassVar[str] = "Antidote, ICML 2025, arXiv 2408.09600"
    grid: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.3)
    gentleness: ClassVar[int] = 20

    strength: float = Field(0.1, ge=0, le=1, description="mask ratio (the paper's alpha)")
    norm: Literal["rms", "mean"] = Field("rms", description="activation norm: as the code (rms) or the paper (mean)")
    granularity: Literal["row", "tensor", "global"] = Field("tensor", description="where the top-k is taken")
    compat: bool = Field(False, description="count n - int(n * (1 - alpha)), as the paper's code does")
    tokens: Literal["all", "answer"] = Field("all", description="which tokens' activations are counted")
    exclude_task_ratio: float = Field(0.0, ge=0, lt=1, description="never prune the top share of the task's scores")
    max_rows: int = Field(1000, ge=1, le=100_000, description="harmful pairs used")

    def required_inputs(self) -> frozenset[str]:
        return self.needs | ({"task"} if self.exclude_task_ratio > 0 else set())


class PanaceaSpec(MethodSpec):
    """One normalised gradient-ascent step on harmful answers, on the re-gauged factors, after any training."""

    method: Literal["panacea"] = "panacea"
    implementation: ClassVar[str] = "panacea:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})
    paper: ClassVar[str] = "Panacea, NeurIPS 2025, arXiv 2501.18100 (post-hoc form)"
    grid: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.35, 0.5, 1.0)
    gentleness: ClassVar[int] = 30

    strength: float = Field(1.0, ge=0, le=4, description="multiple of the perturbation of norm rho")
    rho: float = Field(0.15, gt=0, le=1000, description="norm of the perturbation at strength 1")
    rho_unit: Literal["relative", "absolute"] = Field(
        "relative", description="relative: share of the re-gauged factors' norm; absolute: the paper's unit"
    )
    regauge: bool = Field(True, description="balance A and B first, so that the result does not depend on their split")
    max_rows: int = Field(1000, ge=1, le=100_000, description="harmful pairs used")


class AnchoredPatchSpec(MethodSpec):
    """A short training on refusals, held in place by two frozen teachers: the raw fine-tune and the aligned base."""

    method: Literal["anchored-patch"] = "anchored-patch"
    implementation: ClassVar[str] = "anchored_patch:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"refusals", "retention", "task", "aligned"})
    paper: ClassVar[str] = "this project (docs/benchmarks.md)"
    grid: ClassVar[tuple[float, ...]] = (0.3, 0.5, 0.7, 0.85, 1.0)
    gentleness: ClassVar[int] = 40

    strength: float = Field(1.0, ge=0, le=1, description="interpolation raw + strength * (patch - raw)")
    steps: int = Field(40, ge=1, le=10_000)
    learning_rate: float = Field(1e-3, gt=0, le=1)
    anchor_weight: float = Field(3.0, ge=0, le=1000, description="lambda, shared equally by the two teachers")
    shrink: float = Field(0.0, ge=0, lt=1, description="training starts with the update scaled by 1 - shrink")
    refusal_rows: int = Field(20, ge=1, le=1000, description="rows of refusals in a step")
    task_rows: int = Field(10, ge=1, le=1000, description="task rows in a step")
    retention_rows: int = Field(10, ge=1, le=1000, description="retention rows in a step")
    teacher_cache_bytes: int = Field(
        2**30,
        ge=0,
        le=2**34,
        description="memory for teachers' probabilities; rows beyond it are computed at every use",
    )


class NoiseSpec(MethodSpec):
    """Gaussian noise on the factors: the control of every gradient method."""

    method: Literal["noise"] = "noise"
    implementation: ClassVar[str] = "noise:prepare"
    paper: ClassVar[str] = "random perturbation baseline of arXiv 2501.18100"
    grid: ClassVar[tuple[float, ...]] = (0.5, 1.0, 2.0, 4.0)
    control: ClassVar[bool] = True
    gentleness: ClassVar[int] = 90

    strength: float = Field(1.0, ge=0, le=100)
    size: float = Field(0.15, gt=0, le=1000, description="standard deviation, or the norm at strength 1")
    size_unit: Literal["relative_norm", "norm", "std"] = Field(
        "relative_norm", description="relative_norm matches panacea's relative rho on factors of the same norm"
    )
    regauge: bool = Field(True, description="balance A and B first, as panacea does")


class RandomMaskSpec(MethodSpec):
    """Zeroes as many weights as antidote would, at random: the control of every pruning method."""

    method: Literal["random-mask"] = "random-mask"
    implementation: ClassVar[str] = "random_mask:prepare"
    paper: ClassVar[str] = "random pruning baseline of arXiv 2408.09600, at equal count"
    grid: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.3)
    control: ClassVar[bool] = True
    gentleness: ClassVar[int] = 91

    strength: float = Field(0.1, ge=0, le=1, description="mask ratio")
    granularity: Literal["row", "tensor", "global"] = Field("tensor", description="where the count is taken")
    compat: bool = Field(False, description="count n - int(n * (1 - alpha)), as the paper's code does")


RecoverySpec = Annotated[
    AntidoteSpec | PanaceaSpec | AnchoredPatchSpec | ScaleDownSpec | NoiseSpec | RandomMaskSpec,
    Field(discriminator="method"),
]

SPECS: tuple[type[MethodSpec], ...] = tuple(
    sorted(
        (AntidoteSpec, PanaceaSpec, AnchoredPatchSpec, ScaleDownSpec, NoiseSpec, RandomMaskSpec),
        key=lambda spec: spec.gentleness,
    )
)

_ADAPTER: TypeAdapter[RecoverySpec] = TypeAdapter(RecoverySpec)


def parse_spec(value: object) -> RecoverySpec:
    """A spec from its JSON form; raises pydantic's ValidationError."""
    return _ADAPTER.validate_python(value)


def method_name(spec: type[MethodSpec]) -> str:
    """The wire name of a spec class."""
    return str(spec.model_fields["method"].default)


def changed_knobs(spec: MethodSpec) -> dict[str, Any]:
    """The knobs that differ from the method's defaults; two specs of one method differ in these."""
    plain = type(spec).model_validate({}).model_dump(mode="json")
    knobs = spec.model_dump(mode="json")
    return {name: value for name, value in knobs.items() if name not in ("strength", "dial") and plain[name] != value}


# Where tuning broke more than refusals, holding on to the raw fine-tune holds on to the damage: the patch then starts
# from a quarter of the update, and the raw teacher brings back the task: with twice the steps and task rows, because
# fewer lost the task on the bundled base (docs/LOG.md has the ablations).
FIRM_PATCH = AnchoredPatchSpec(strength=1.0, shrink=0.75, steps=80, task_rows=20, dial=(0.85, 1.0))


def default_specs(*, controls: bool = False) -> tuple[MethodSpec, ...]:
    """What `auto` tries, gentlest first: every method at its defaults, then the patch with a firmer hand.

    A second spec of one method is tried only where the first did not pass.
    """
    methods = tuple(spec.model_validate({}) for spec in SPECS if not spec.control)
    return (*methods, FIRM_PATCH, *(spec.model_validate({}) for spec in SPECS if controls and spec.control))
