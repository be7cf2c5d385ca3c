"""The registry of recovery methods: one frozen class per method, with its knobs, needs, paper and dial.

Knows: what may be asked of a method and what it must be given. No tensor library, so that a gateway can validate a
policy and draw a form.
Refuses to know: the mathematics (`methods/`), and which method suits a job (`search.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

# "aligned" is the base with the adapter off; "pretrained" its weights before alignment.
Need = Literal["harmful", "refusals", "retention", "task", "aligned", "pretrained"]
Granularity = Literal["row", "tensor", "global"]
Output = Literal["adapter", "larger-adapter", "sparse-patch"]
Family = Literal["surgery", "perturbation", "closed-form", "patch", "composition", "control"]
Spare = Literal["task", "retention"]

ADAPTER_FORM: Any = Field(
    "adapter", description="adapter: refitted to the job's rank, what is lost is reported; patch: exact and sparse"
)
MAX_ROWS: Any = Field(1000, ge=1, le=100_000, description="rows of each data set used")
LABELS: Any = Field(
    "given", description="shuffled: harmful answers of other prompts, the control that shows what the labels add"
)


class Spec(BaseModel):
    """What methods after training and methods of training have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    implementation: ClassVar[str]  # "<module in methods>:<function>"
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str]

    def required_inputs(self) -> frozenset[str]:
        """The data sets and models this spec cannot run without, as its knobs stand."""
        return self.needs


class MethodSpec(Spec):
    """What every method has in common. `strength` is the dial; 0 leaves every byte of the adapter as it is."""

    grid: ClassVar[tuple[float, ...]]  # the dial's default search grid, ascending
    family: ClassVar[Family]
    gentleness: ClassVar[int]  # `auto` tries lower numbers first
    # Whether harm was seen to fall, and never to rise again, along the whole dial: only such a dial is bisected.
    monotone: ClassVar[bool] = False
    research: ClassVar[bool] = False  # implemented for comparison; the default menu leaves it out

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

    @property
    def regauges(self) -> bool:
        """Whether a candidate's factors are another split of its update than the job's: then only updates compare."""
        return False

    @property
    def output(self) -> Output:
        """What a candidate of this spec is. Only adapters can be released."""
        return "adapter"


def _maximum(cls: type[MethodSpec]) -> float:
    limits = [bound.le for bound in cls.model_fields["strength"].metadata if hasattr(bound, "le")]
    return float(limits[0]) if limits else float("inf")


class ScaleDownSpec(MethodSpec):
    """Shrinks the whole adapter: delta' = (1 - strength) * delta. The honest null of every method."""

    method: Literal["scale-down"] = "scale-down"
    implementation: ClassVar[str] = "scale_down:prepare"
    paper: ClassVar[str] = "weight interpolation with the aligned model, arXiv 2412.19512"
    grid: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 0.9)
    family: ClassVar[Family] = "surgery"
    gentleness: ClassVar[int] = 10

    strength: float = Field(0.5, ge=0, le=1, description="share of the update taken away")


class AntidoteRankSpec(MethodSpec):
    """Drops whole rank components of the update: those that harmful answers rely on most, and spared rows least."""

    method: Literal["antidote-rank"] = "antidote-rank"
    implementation: ClassVar[str] = "antidote_rank:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})
    paper: ClassVar[str] = "Antidote's score (arXiv 2408.09600) on singular components; this project's form"
    grid: ClassVar[tuple[float, ...]] = (0.01, 0.02, 0.05, 0.1, 0.2)
    family: ClassVar[Family] = "surgery"
    gentleness: ClassVar[int] = 15

    strength: float = Field(0.05, ge=0, le=1, description="share of the rank components dropped")
    score: Literal["activation", "gradient"] = Field(
        "gradient",
        description="gradient: by how much dropping the component alone raises the loss of harmful answers, to first "
        "order; activation: Antidote's own, singular value times what harmful rows put through it",
    )
    granularity: Literal["tensor", "global"] = Field("global", description="within each module, or over all of them")
    spare: tuple[Spare, ...] = Field((), description="rows whose own score of a component counts against dropping it")
    spare_weight: float = Field(1.0, ge=0, le=100, description="how much that counts")
    max_rows: int = MAX_ROWS

    def required_inputs(self) -> frozenset[str]:
        return self.needs | set(self.spare)

    @property
    def regauges(self) -> bool:
        return True


class AntidoteSpec(MethodSpec):
    """Zeroes the LoRA weights that harmful data excites most (Wanda scores on harmful prompts and answers)."""

    method: Literal["antidote"] = "antidote"
    implementation: ClassVar[str] = "antidote:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})
    paper: ClassVar[str] = "Antidote, ICML 2025, arXiv 2408.09600"
    grid: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.3)
    family: ClassVar[Family] = "surgery"
    gentleness: ClassVar[int] = 20

    strength: float = Field(0.1, ge=0, le=1, description="mask ratio (the paper's alpha)")
    norm: Literal["rms", "mean"] = Field("rms", description="activation norm: as the code (rms) or the paper (mean)")
    granularity: Granularity = Field("tensor", description="where the top-k is taken")
    compat: bool = Field(False, description="count n - int(n * (1 - alpha)), as the paper's code does")
    tokens: Literal["all", "answer"] = Field("all", description="which tokens' activations are counted")
    spare: tuple[Spare, ...] = Field((), description="rows whose own top weights are never pruned (set difference)")
    spare_ratio: float = Field(0.1, gt=0, lt=1, description="the share of weights spared for each of them")
    labels: Literal["given", "shuffled"] = LABELS
    max_rows: int = MAX_ROWS

    def required_inputs(self) -> frozenset[str]:
        return self.needs | set(self.spare)


class AntidoteDeltaSpec(MethodSpec):
    """Zeroes entries of the weight change itself, scored on what harmful data puts through them."""

    method: Literal["antidote-delta"] = "antidote-delta"
    implementation: ClassVar[str] = "antidote_delta:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})
    paper: ClassVar[str] = "Antidote as its paper describes it, on the update: arXiv 2408.09600"
    grid: ClassVar[tuple[float, ...]] = (0.01, 0.02, 0.05, 0.1, 0.2)
    family: ClassVar[Family] = "surgery"
    gentleness: ClassVar[int] = 25

    strength: float = Field(0.05, ge=0, le=1, description="mask ratio (the paper's alpha)")
    form: Literal["adapter", "patch"] = ADAPTER_FORM
    norm: Literal["rms", "mean"] = Field("rms", description="activation norm: as the code (rms) or the paper (mean)")
    granularity: Granularity = Field("tensor", description="where the top-k is taken")
    compat: bool = Field(False, description="count n - int(n * (1 - alpha)), as the paper's code does")
    tokens: Literal["all", "answer"] = Field("all", description="which tokens' activations are counted")
    spare: tuple[Spare, ...] = Field((), description="rows whose own top entries are never pruned (set difference)")
    spare_ratio: float = Field(0.1, gt=0, lt=1, description="the share of entries spared for each of them")
    max_rows: int = MAX_ROWS

    @property
    def output(self) -> Output:
        return "sparse-patch" if self.form == "patch" else "adapter"

    def required_inputs(self) -> frozenset[str]:
        return self.needs | set(self.spare)

    @property
    def regauges(self) -> bool:
        return True


class PanaceaSpec(MethodSpec):
    """Normalised gradient ascent on harmful answers, on the re-gauged factors, after any training."""

    method: Literal["panacea"] = "panacea"
    implementation: ClassVar[str] = "panacea:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})
    paper: ClassVar[str] = "Panacea, NeurIPS 2025, arXiv 2501.18100 (post-hoc form)"
    grid: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.35, 0.5, 1.0)
    family: ClassVar[Family] = "perturbation"
    gentleness: ClassVar[int] = 30

    strength: float = Field(1.0, ge=0, le=4, description="multiple of the perturbation of norm rho")
    rho: float = Field(0.15, gt=0, le=1000, description="norm of the perturbation at strength 1")
    rho_unit: Literal["relative", "absolute"] = Field(
        "relative", description="relative: share of the re-gauged factors' norm; absolute: the paper's unit"
    )
    regauge: bool = Field(True, description="balance A and B first, so that the result does not depend on their split")
    steps: int = Field(1, ge=1, le=100, description="steps of size rho / steps, each with a gradient of its own")
    refusal_weight: float = Field(
        0.0, ge=0, le=100, description="kappa: also descend the loss of a refusal to the same prompts (contrastive)"
    )
    orthogonal_to: tuple[Spare, ...] = Field(
        (), description="rows whose loss the step leaves alone to first order (their gradients are projected out)"
    )
    orthogonal_gradients: int = Field(8, ge=1, le=256, description="gradients, of a part of the rows each, for each")
    labels: Literal["given", "shuffled"] = LABELS
    max_rows: int = MAX_ROWS

    def required_inputs(self) -> frozenset[str]:
        return self.needs | set(self.orthogonal_to) | ({"refusals"} if self.refusal_weight > 0 else set())

    @property
    def regauges(self) -> bool:
        return self.regauge


class PanaceaBlockSpec(MethodSpec):
    """The ascent step taken in weight space and appended as a low-rank block; the job's own factors stay as they are."""

    method: Literal["panacea-block"] = "panacea-block"
    implementation: ClassVar[str] = "panacea_block:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})
    paper: ClassVar[str] = "Panacea (arXiv 2501.18100) in weight space; this project's form"
    grid: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.35, 0.5, 1.0)
    family: ClassVar[Family] = "perturbation"
    gentleness: ClassVar[int] = 32
    research: ClassVar[bool] = True

    strength: float = Field(1.0, ge=0, le=4, description="multiple of the perturbation of norm rho")
    rho: float = Field(0.1, gt=0, le=1000, description="norm of the perturbation at strength 1, in weight space")
    rho_unit: Literal["relative", "absolute"] = Field(
        "relative", description="relative: share of the norm of the update; absolute: the norm itself"
    )
    rank: int = Field(4, ge=1, le=256, description="rank of the block: the leading singular directions of the gradient")
    refusal_weight: float = Field(
        0.0, ge=0, le=100, description="kappa: also descend the loss of a refusal to the same prompts (contrastive)"
    )
    dense_bytes: int = Field(
        2**20,
        ge=0,
        le=2**34,
        description="a module whose gradient takes at most this much is summed exactly, a larger one is sketched",
    )
    labels: Literal["given", "shuffled"] = LABELS
    max_rows: int = MAX_ROWS

    @property
    def output(self) -> Output:
        return "larger-adapter"

    def required_inputs(self) -> frozenset[str]:
        return self.needs | ({"refusals"} if self.refusal_weight > 0 else set())


class CsuLoraSpec(MethodSpec):
    """Keeps what of the update lies in the directions of alignment, and dampens the rest. Needs no data."""

    method: Literal["csulora"] = "csulora"
    implementation: ClassVar[str] = "csulora:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"aligned", "pretrained"})
    paper: ClassVar[str] = "CSULoRA, arXiv 2605.30640"
    grid: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 4.0)
    family: ClassVar[Family] = "closed-form"
    gentleness: ClassVar[int] = 50

    strength: float = Field(1.0, ge=0, le=1000, description="multiple of the damping; 1 as published")
    energy: float = Field(0.95, gt=0, le=1, description="share of the alignment's energy its directions must hold")
    outside_weight: float = Field(0.05, ge=0, le=1, description="weight of all energy in the reference energy")

    @property
    def regauges(self) -> bool:
        return True


class SafeLoraSpec(MethodSpec):
    """Projects the factor B of the modules whose update is least like alignment. Needs no data."""

    method: Literal["safelora"] = "safelora"
    implementation: ClassVar[str] = "safelora:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"aligned", "pretrained"})
    paper: ClassVar[str] = "SafeLoRA, NeurIPS 2024, arXiv 2405.16833"
    grid: ClassVar[tuple[float, ...]] = (0.1, 0.25, 0.5, 0.75, 1.0)
    family: ClassVar[Family] = "closed-form"
    gentleness: ClassVar[int] = 52

    strength: float = Field(0.5, ge=0, le=1, description="share of the layers projected, least similar first")
    threshold: float | None = Field(
        None, ge=-1, le=1, description="project only modules with a cosine of at most this (published: 0.5)"
    )
    projector: Literal["published", "exact"] = Field(
        "published",
        description="published: V V^T / ||V||, which may also amplify; exact: the orthogonal projector on V's columns, "
        "which changes nothing where V has full rank",
    )


class RestaSpec(MethodSpec):
    """Adds the difference between the aligned model and a copy of it that was trained on harmful answers."""

    method: Literal["resta"] = "resta"
    implementation: ClassVar[str] = "resta:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful", "aligned"})
    paper: ClassVar[str] = "RESTA, ACL 2024, arXiv 2402.11746"
    grid: ClassVar[tuple[float, ...]] = (0.1, 0.25, 0.5, 1.0)
    family: ClassVar[Family] = "closed-form"
    gentleness: ClassVar[int] = 54
    research: ClassVar[bool] = True

    strength: float = Field(0.5, ge=0, le=4, description="multiple of the safety vector (b)")
    drop_ratio: float = Field(
        0.0, ge=0, lt=1, description="DARE: share of the update's entries (in its factor B) dropped, the rest rescaled"
    )
    steps: int = Field(50, ge=1, le=10_000, description="training steps of the unaligned copy")
    learning_rate: float = Field(1e-3, gt=0, le=1)
    rank: int = Field(8, ge=1, le=256, description="rank of the unaligned copy; the job's own where that is smaller")
    batch_rows: int = Field(10, ge=1, le=1000)
    max_rows: int = Field(100, ge=1, le=100_000, description="harmful pairs used")

    @property
    def output(self) -> Output:
        return "larger-adapter"


class SafeDeltaSpec(MethodSpec):
    """Keeps the columns of the update that cost the aligned model's refusals least, and compensates with the rest."""

    method: Literal["safe-delta"] = "safe-delta"
    implementation: ClassVar[str] = "safe_delta:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"refusals", "aligned"})
    paper: ClassVar[str] = "Safe Delta, ICML 2025, arXiv 2505.12038"
    grid: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1, 0.3, 0.6)
    family: ClassVar[Family] = "closed-form"
    gentleness: ClassVar[int] = 56
    research: ClassVar[bool] = True

    strength: float = Field(
        0.05, ge=0, le=1, description="how much of the update's cost is not paid; 1: the aligned model"
    )
    budget: Literal["share", "published"] = Field(
        "share",
        description="what each layer may cost. share: 1 - strength of the whole update's cost; published: the paper's "
        "s = 1 / strength - 1 (0.1, a strength of 0.91), in units of squared weights",
    )
    compensate: bool = Field(True, description="second-order compensation on the columns that are not kept (OBS)")
    damping: float = Field(0.01, gt=0, le=1, description="share of the mean diagonal added to the Hessian")
    max_rows: int = Field(512, ge=1, le=100_000, description="refusals used")

    @property
    def regauges(self) -> bool:
        return True


class RollbackSpec(MethodSpec):
    """Puts single weights back to their aligned value, guided by how the aligned model looks at harmful prompts."""

    method: Literal["rollback"] = "rollback"
    implementation: ClassVar[str] = "rollback:prepare"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful", "task", "aligned"})
    paper: ClassVar[str] = "LLMAlignment, IEEE S&P 2025, arXiv 2504.09757"
    # Of 20 steps the first few decide: harmful answers, and then good ones, were seen to break within five.
    grid: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.4, 1.0)
    family: ClassVar[Family] = "surgery"
    gentleness: ClassVar[int] = 28
    research: ClassVar[bool] = True  # a gradient of all adapted weights for every step

    strength: float = Field(1.0, ge=0, le=1, description="share of the steps taken")
    form: Literal["adapter", "patch"] = ADAPTER_FORM
    steps: int = Field(20, ge=1, le=1000)
    restore_ratio: float = Field(0.002, gt=0, le=1, description="share of all adapted weights restored in a step")
    depth_ratio: float = Field(2 / 3, gt=0, le=1, description="share of the layers looked at and restored")
    protect_task: bool = Field(True, description="give part of each step back where the task's view suffers")
    give_back_ratio: float = Field(
        0.2, ge=0, le=1, description="share given back of those restored in a step that the task's view wants back"
    )
    compat: bool = Field(False, description="strictly above the k-th gradient, as the paper's code: one weight fewer")
    batch_rows: int = Field(8, ge=1, le=1000)
    max_rows: int = Field(256, ge=1, le=100_000, description="harmful prompts, and task prompts, used")

    @property
    def output(self) -> Output:
        return "sparse-patch" if self.form == "patch" else "adapter"

    def required_inputs(self) -> frozenset[str]:
        return self.needs if self.protect_task else self.needs - {"task"}

    @property
    def regauges(self) -> bool:
        return True


class PatchSpec(MethodSpec):
    """What the two patches share: a short training, whose dial interpolates from the raw fine-tune to its end."""

    grid: ClassVar[tuple[float, ...]] = (0.3, 0.5, 0.7, 0.85, 1.0)
    needs: ClassVar[frozenset[str]] = frozenset({"refusals", "retention", "task", "aligned"})
    family: ClassVar[Family] = "patch"

    strength: float = Field(1.0, ge=0, le=1, description="interpolation raw + strength * (patch - raw)")
    steps: int = Field(40, ge=1, le=10_000)
    learning_rate: float = Field(1e-3, gt=0, le=1)
    refusal_rows: int = Field(20, ge=1, le=1000, description="rows of refusals in a step")
    task_rows: int = Field(10, ge=0, le=1000, description="task rows in a step; 0: none")
    retention_rows: int = Field(10, ge=0, le=1000, description="retention rows in a step; 0: none")

    def required_inputs(self) -> frozenset[str]:
        unused = {role for role, rows in (("task", self.task_rows), ("retention", self.retention_rows)) if not rows}
        return self.needs - unused


class SafetyPatchSpec(PatchSpec):
    """A short training on refusals with the task's and the provider's harmless rows replayed as they are given."""

    method: Literal["safety-patch"] = "safety-patch"
    implementation: ClassVar[str] = "safety_patch:prepare"
    paper: ClassVar[str] = "safety-patch LoRA with task and retention replay (after SLDR, 2026)"
    gentleness: ClassVar[int] = 60

    replay_weight: float = Field(1.0, ge=0, le=1000, description="weight of the replayed rows' loss")


class AnchoredPatchSpec(PatchSpec):
    """A short training on refusals, held in place by two frozen teachers: the raw fine-tune and the aligned base."""

    method: Literal["anchored-patch"] = "anchored-patch"
    implementation: ClassVar[str] = "anchored_patch:prepare"
    paper: ClassVar[str] = "this project (docs/methods/anchored-patch.md)"
    gentleness: ClassVar[int] = 62

    anchor_weight: float = Field(3.0, ge=0, le=1000, description="lambda, shared equally by the two teachers")
    task_teacher: Literal["raw", "base", "rows"] = Field(
        "raw", description="whom to follow on task rows; rows: no teacher, the rows' own answers"
    )
    retention_teacher: Literal["raw", "base", "rows"] = Field("base", description="whom to follow on retention rows")
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
    family: ClassVar[Family] = "control"
    gentleness: ClassVar[int] = 90

    strength: float = Field(1.0, ge=0, le=100)
    size: float = Field(0.15, gt=0, le=1000, description="standard deviation, or the norm at strength 1")
    size_unit: Literal["relative_norm", "norm", "std"] = Field(
        "relative_norm", description="relative_norm matches panacea's relative rho on factors of the same norm"
    )
    regauge: bool = Field(True, description="balance A and B first, as panacea does")

    @property
    def regauges(self) -> bool:
        return self.regauge


class RandomMaskSpec(MethodSpec):
    """Zeroes as much as a pruning method would, at random: the control of every pruning method."""

    method: Literal["random-mask"] = "random-mask"
    implementation: ClassVar[str] = "random_mask:prepare"
    paper: ClassVar[str] = "random pruning baseline of arXiv 2408.09600, at equal count"
    grid: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.3)
    family: ClassVar[Family] = "control"
    gentleness: ClassVar[int] = 91

    strength: float = Field(0.1, ge=0, le=1, description="mask ratio")
    of: Literal["factors", "delta", "rank"] = Field(
        "factors", description="what is masked: as antidote, antidote-delta or antidote-rank"
    )
    form: Literal["adapter", "patch"] = ADAPTER_FORM
    granularity: Granularity = Field("tensor", description="where the count is taken (rank: tensor or global)")
    compat: bool = Field(False, description="count n - int(n * (1 - alpha)), as the paper's code does")

    @model_validator(mode="after")
    def _as_the_method_it_controls(self) -> RandomMaskSpec:
        if self.of == "rank" and (self.granularity == "row" or self.compat):
            raise ValueError("rank components are counted within a tensor or over all of them, and never as compat")
        if self.of != "delta" and self.form == "patch":
            raise ValueError("form 'patch' belongs to entries of the update (of 'delta')")
        return self

    @property
    def output(self) -> Output:
        return "sparse-patch" if self.form == "patch" else "adapter"

    @property
    def regauges(self) -> bool:
        return self.of != "factors"


SingleSpec = Annotated[
    ScaleDownSpec
    | AntidoteRankSpec
    | AntidoteSpec
    | AntidoteDeltaSpec
    | RollbackSpec
    | PanaceaSpec
    | PanaceaBlockSpec
    | CsuLoraSpec
    | SafeLoraSpec
    | RestaSpec
    | SafeDeltaSpec
    | SafetyPatchSpec
    | AnchoredPatchSpec
    | NoiseSpec
    | RandomMaskSpec,
    Field(discriminator="method"),
]


class ComposeSpec(MethodSpec):
    """Several methods, each at its own strength and starting where the one before it stopped.

    The default is for jobs whose tuning broke more than refusals: holding on to the raw fine-tune would hold on to the
    damage, so the patch starts from a quarter of the update and its raw teacher brings the task back (docs/LOG.md).
    """

    method: Literal["compose"] = "compose"
    implementation: ClassVar[str] = "compose:prepare"
    paper: ClassVar[str] = "the composition of its parts' papers"
    grid: ClassVar[tuple[float, ...]] = (0.85, 1.0)
    family: ClassVar[Family] = "composition"
    gentleness: ClassVar[int] = 70

    strength: float = Field(1.0, ge=0, le=1, description="interpolation between the raw fine-tune and the last part")
    parts: tuple[SingleSpec, ...] = Field(
        (ScaleDownSpec(strength=0.75), AnchoredPatchSpec(steps=80, task_rows=20)), min_length=2, max_length=4
    )

    @field_validator("parts")
    @classmethod
    def _adapters(cls, parts: tuple[MethodSpec, ...]) -> tuple[MethodSpec, ...]:
        for part in parts:
            if part.output != "adapter":
                raise ValueError(f"{method_name(type(part))!r} gives no adapter of the job's rank to go on from")
        return parts

    def required_inputs(self) -> frozenset[str]:
        return frozenset().union(*(part.required_inputs() for part in self.parts))


RecoverySpec = Annotated[SingleSpec | ComposeSpec, Field(discriminator="method")]

SPECS: tuple[type[MethodSpec], ...] = tuple(
    sorted((*get_args(get_args(SingleSpec)[0]), ComposeSpec), key=lambda spec: spec.gentleness)
)

_ADAPTER: TypeAdapter[RecoverySpec] = TypeAdapter(RecoverySpec)


def parse_spec(value: object) -> RecoverySpec:
    """A spec from its JSON form; raises pydantic's ValidationError."""
    return _ADAPTER.validate_python(value)


def method_name(spec: type[Spec]) -> str:
    """The wire name of a spec class."""
    return str(spec.model_fields["method"].default)


def changed_knobs(spec: MethodSpec) -> dict[str, Any]:
    """The knobs that differ from the method's defaults; two specs of one method differ in these."""
    plain = type(spec).model_validate({}).model_dump(mode="json")
    knobs = spec.model_dump(mode="json")
    return {name: value for name, value in knobs.items() if name not in ("strength", "dial") and plain[name] != value}


def label(spec: MethodSpec) -> str:
    """The method with the knobs that differ from its defaults, for people."""
    if isinstance(spec, ComposeSpec):
        return " + ".join(f"{label(part)} at {part.strength:g}" for part in spec.parts)
    return " ".join([method_name(type(spec)), *(f"{name} {_shown(v)}" for name, v in changed_knobs(spec).items())])


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def default_specs(*, controls: bool = False, research: bool = False) -> tuple[MethodSpec, ...]:
    """What `auto` tries: every method at its defaults, gentlest first; compositions only where nothing else passes."""
    wanted = [spec for spec in SPECS if (controls or spec.family != "control") and (research or not spec.research)]
    return tuple(spec.model_validate({}) for spec in wanted)


class PanaceaTrainSpec(Spec):
    """Panacea as published, inside the training loop: each step also asks what a perturbation of norm rho would undo.

    `rho` counts in the factors as they are stored, since an optimizer's state cannot follow a change of their split.
    The paper's absolute 1.0 is 3 % of the norm of its new factors (rank 32, three modules in each of 32 layers); on a
    smaller adapter, or with a larger lora_alpha, the same number ruins the model. Hence a share by default.
    """

    method: Literal["panacea-train"] = "panacea-train"
    implementation: ClassVar[str] = "panacea_train:step_method"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})
    paper: ClassVar[str] = "Panacea, NeurIPS 2025, arXiv 2501.18100 (Algorithm 1)"

    rho: float = Field(0.03, ge=0, le=1000, description="norm of the perturbation; 0: training as without the method")
    rho_unit: Literal["relative", "absolute"] = Field(
        "relative", description="relative: share of the factors' norm at that step; absolute: the paper's unit"
    )
    weight: float = Field(0.001, ge=0, le=100, description="lambda: weight of h(w + eps) - h(w) against the rows' loss")
    batch_rows: int = Field(10, ge=1, le=1000, description="harmful rows in a step")
    recompute_at_end: bool = Field(
        True, description="add a perturbation of the final weights and all harmful rows; published: the last step's"
    )
    loss_bound: float = Field(
        5.0, gt=0, le=1000, description="nats per token of h(w + eps) above which a step leaves the lambda term out"
    )
    labels: Literal["given", "shuffled"] = LABELS
    max_rows: int = MAX_ROWS
    seed: int = Field(0, ge=0, le=2**31 - 1, description="order of the harmful rows")


# Methods that change the training itself. With a second one this becomes a union with a discriminator, as above.
TrainingSpec = PanaceaTrainSpec

TRAINING_SPECS: tuple[type[TrainingSpec], ...] = (PanaceaTrainSpec,)

_TRAINING_ADAPTER: TypeAdapter[TrainingSpec] = TypeAdapter(TrainingSpec)


def parse_training_spec(value: object) -> TrainingSpec:
    """A training method's spec from its JSON form; raises pydantic's ValidationError."""
    return _TRAINING_ADAPTER.validate_python(value)
