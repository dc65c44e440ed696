"""The sections of a recipe: where the rows come from, and how the parameters are trained. No torch here."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from graftkit.recipe import expressions

DEFAULT_OPTIMIZER = "adamw()"
MOST = 10**9  # of any count


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )


class DataRecipe(Section):
    """Where the rows come from and how to read them."""

    train: str = Field(description="training rows: a CSV, TSV, JSON lines, Parquet or Arrow file")
    eval: str | float | None = Field(
        default=0.1,
        description="a file, or the fraction of the training rows to hold out; null: no evaluation",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**32,
        description="random seed of the held-out rows alone; null: that of the run",
    )
    rows: int | None = Field(
        default=None, ge=1, le=MOST, description="train on this many of the rows, drawn at random; null: all"
    )
    per_class: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="train on this many rows of each class, drawn at random; null: all",
    )
    test: str | None = Field(default=None, description="a file of test rows, evaluated once after training")
    probe: str | None = Field(
        default=None,
        description="pre-training: labelled rows, up to 500 of which are classified from frozen features at each evaluation",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="the column that holds each input: {text: ..., text_pair: ..., label: ...}",
    )
    encoding: str = Field(default="utf-8", description="encoding of text files, for example gb18030")
    skip_bad: bool = Field(default=False, description="skip bad rows and count them instead of stopping")
    max_length: int | None = Field(
        default=None, ge=2, le=MOST, description="maximum number of tokens per row; null: the model's limit"
    )

    @field_validator("eval")
    @classmethod
    def _share(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, float | int) and not 0 < value < 1:
            raise ValueError("must be a file, a share between 0 and 1, or null")
        return value


class TrainRecipe(Section):
    """How the trained parameters are optimized."""

    epochs: float = Field(default=5, gt=0, le=10**6, description="passes over the training rows")
    steps: int | None = Field(default=None, ge=1, le=MOST, description="optimizer steps; replaces epochs")
    batch_size: int = Field(default=32, ge=1, le=MOST, description="rows in one forward pass")
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="tokens in one forward pass, padding included, instead of batch_size: as many rows of like length as fit",
    )
    accumulate: int = Field(default=1, ge=1, le=MOST, description="forward passes before one optimizer step")
    optimizer: str = Field(
        default=DEFAULT_OPTIMIZER, description="the optimizer, for example galore(rank=128)"
    )
    step_in_backward: bool = Field(
        default=False,
        description="take the step of each parameter within the backward pass and free its gradient at once",
    )
    lr: float | Literal["find"] | None = Field(
        default=None,
        description="learning rate of each method that does not set its own; find: from a range test before the first step; "
        "null: the methods' defaults",
    )
    lr_scale: float = Field(
        default=1.0,
        gt=0,
        description="factor on all learning rates, whether they are set or a method's default",
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="weight decay of trained matrices; norms and biases are not decayed"
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="fraction of the steps over which the learning rate warms up"
    )
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        default="linear",
        description="how the learning rate decays after the warm-up; wsd: it is constant until train.decay",
    )
    decay: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="wsd: fraction of the steps, at the end, over which the learning rate decays",
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average of the trained weights, such as 0.999, which is then "
        "evaluated and saved; null: none",
    )
    clip: float = Field(default=1.0, ge=0, description="maximum gradient norm; 0: no clipping")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="probability mass of each target that is spread over all classes"
    )
    evaluate_every: int | str = Field(
        default="epoch", description="steps between evaluations, or 'epoch', '2 epochs' and so on, or 'end'"
    )
    start: str | None = Field(
        default=None,
        alias="from",
        description="a run, or the folder of a graft, to initialize the new graft from; null: a fresh initialization",
    )
    best: str | None = Field(
        default=None,
        description="the evaluation metric that selects the best weights, such as macro_f1 or loss; null: the task's first",
    )
    early_stopping: int | None = Field(
        default=None, ge=1, le=MOST, description="stop after this many evaluations without improvement"
    )
    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="steps between checkpoints; null: every two minutes and at each evaluation",
    )
    trackers: list[str] = Field(
        default_factory=list,
        description="experiment trackers to log every line of metrics.jsonl to, such as [tensorboard] or [wandb]",
    )
    cache: Literal["auto", "memory", "disk", "none"] = Field(
        default="auto",
        description="where outputs of frozen layers are kept: in memory, and if that is worthwhile in files for later runs "
        "(auto), in memory alone, in files alone, or nowhere",
    )
    checkpointing: Literal["auto", "none", "blocks", "selective", "offload"] = Field(
        default="auto",
        description="activations that are computed again in the backward pass, to save memory: 'blocks', all of the trained "
        "blocks; 'selective', all but products and attention; 'offload', all, and what is kept lies in host memory instead of the GPU's; 'auto', blocks once memory has run out",
    )
    weight_type: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="number type of the backbone's trained weights; bf16: matrices only, rounded stochastically",
    )
    compile: Literal["auto", "none", "blocks"] = Field(
        default="auto",
        description="compile the trained blocks with torch.compile; auto: in long runs, if it is measured to pay",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        default="auto",
        description="number type of the matrix products; fp16: with a scaled loss, for GPUs without bf16; fp8: of frozen weights, "
        "on NVIDIA Hopper and later",
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the rows of a batch where tokens replace them: both in one recipe are refused."""
        return {k: v for k, v in handler(self).items() if k != "batch_size" or self.batch_tokens is None}

    @field_validator("lr")
    @classmethod
    def _rate(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, int | float) and value <= 0:
            raise ValueError("must be greater than 0, or 'find'")
        return value

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer(cls, value: Any) -> Any:
        return one_call(value, "optimizer")

    @field_validator("evaluate_every")
    @classmethod
    def _interval(cls, value: int | str) -> int | str:
        words = isinstance(value, str) and (
            value in ("epoch", "end") or re.fullmatch(r"[1-9]\d{0,8} epochs?", value)
        )
        if not words and (isinstance(value, str) or not 1 <= value <= MOST):
            raise ValueError(
                f"must be from 1 to {MOST:,}, or 'epoch', a number of epochs such as '2 epochs', or 'end'"
            )
        return value


def number_of(lr: float | str | None) -> float | None:
    """Return train.lr if it is a number."""
    return None if isinstance(lr, str) else lr


def one_call(value: Any, family: str) -> Any:
    """Check the one call of a key and return it as text; YAML may hold a mapping instead, `{tag: {scheme: bio}}`."""
    if isinstance(value, dict) and len(value) == 1:
        (name, options), *_ = value.items()
        value = str(expressions.Call(str(name).replace("-", "_"), options or {}))
    if not isinstance(value, str):
        return value
    value = re.sub(r"^[a-z]+(-[a-z]+)+", lambda name: name[0].replace("-", "_"), value.strip())
    expressions.parse_one(value, family)
    return value
