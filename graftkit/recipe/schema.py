"""The whole description of a run, validated before anything is loaded. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from graftkit.errors import UserError, listing, nearest
from graftkit.recipe import catalogue, expressions, selection, sums

IN_MEMORY = "(in memory)"
DEFAULT_OPTIMIZER = "adamw()"


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )


class DataRecipe(Section):
    """Where the rows are and how they are read."""

    train: str = Field(description="training rows: a CSV, TSV, JSON lines, Parquet or Arrow file")
    eval: str | float | None = Field(
        default=0.1, description="a file, or the share of the training rows to hold out; null for none"
    )
    test: str | None = Field(default=None, description="a file that is only looked at when training is over")
    columns: dict[str, str] = Field(
        default_factory=dict, description="which column is what: {text: ..., text_pair: ..., label: ...}"
    )
    encoding: str = Field(default="utf-8", description="encoding of text files, for example gb18030")
    skip_bad: bool = Field(
        default=False, description="leave bad rows out and count them, instead of stopping"
    )
    max_length: int | None = Field(
        default=None, ge=2, description="tokens of a row at most; null: what the model takes"
    )

    @field_validator("eval")
    @classmethod
    def _share(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, float | int) and not 0 < value < 1:
            raise ValueError("must be a file, a share between 0 and 1, or null")
        return value


class TrainRecipe(Section):
    """How the trained parameters are optimized."""

    epochs: float = Field(default=5, gt=0, description="passes over the training rows")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; replaces epochs")
    batch_size: int = Field(default=32, ge=1, description="rows in one forward pass")
    accumulate: int = Field(default=1, ge=1, description="forward passes before one optimizer step")
    optimizer: str = Field(
        default=DEFAULT_OPTIMIZER, description="what takes the steps, for example galore(rank=128)"
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        description="learning rate of every method that does not name its own; null: their defaults",
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="decay of trained matrices; norms and biases are not decayed"
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the learning rate falls after the warm-up"
    )
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 for no clipping")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of a row's target spread over all classes"
    )
    evaluate_every: int | str = Field(
        default="epoch", description="steps between evaluations, or 'epoch', '2 epochs' and so on, or 'end'"
    )
    start: str | None = Field(
        default=None,
        alias="from",
        description="a run, or the folder of a graft, whose values the new graft begins with; null: new ones",
    )
    best: str | None = Field(
        default=None,
        description="the figure of the evaluation by which weights are kept, such as macro_f1 or loss; null: the task's "
        "first",
    )
    early_stopping: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations without a better one"
    )
    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between checkpoints; null: every two minutes and at each evaluation",
    )
    trackers: list[str] = Field(
        default_factory=list,
        description="experiment trackers that are given every line of metrics.jsonl, such as [tensorboard] or [wandb]",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="type of the matrix products"
    )

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer(cls, value: Any) -> Any:
        return _one_call(value, "optimizer")

    @field_validator("evaluate_every")
    @classmethod
    def _interval(cls, value: int | str) -> int | str:
        words = isinstance(value, str) and (
            value in ("epoch", "end") or re.fullmatch(r"[1-9]\d* epochs?", value)
        )
        if not words and (isinstance(value, str) or value < 1):
            raise ValueError(
                "must be at least 1, or 'epoch', a number of epochs such as '2 epochs', or 'end'"
            )
        return value


def _one_call(value: Any, family: str) -> Any:
    """The one call of a key, checked, as text; in YAML it may be a mapping, `{tag: {scheme: bio}}`."""
    if isinstance(value, dict) and len(value) == 1:
        (name, options), *_ = value.items()
        value = str(expressions.Call(str(name).replace("-", "_"), options or {}))
    if not isinstance(value, str):
        return value
    value = re.sub(r"^[a-z]+(-[a-z]+)+", lambda name: name[0].replace("-", "_"), value.strip())
    expressions.parse_one(value, family)
    return value


class Recipe(Section):
    """What a run is."""

    model: str = Field(description="a folder in transformers format, a hub id, or package.module:function")
    weights: str | None = Field(
        default=None, description="a safetensors file for the module that package.module:function makes"
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        default=None, description="hold the frozen maps in 4 or 8 bits; needs bitsandbytes"
    )
    task: str = Field(
        default="classify", description="what is learned, for example classify(class_weights='balanced')"
    )
    method: str | None = Field(
        default=None, description="how, for example lora(rank=8) + head(); null: what suits the task"
    )
    data: DataRecipe
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of initial values, held-out rows, order of rows and dropout"
    )
    out: str | None = Field(default=None, description="the run folder; null: a new one under runs/")

    @field_validator("method")
    @classmethod
    def _method(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        stored = bool(info.context)  # what a run was trained with stays readable
        value = expressions.renewed(value, "method") if stored else value
        calls = expressions.parse(value, "method")
        for call in calls:
            if "sites" in call.arguments:
                selection.parse(call.arguments["sites"])
        if not stored:
            sums.check(calls)
        return value

    @field_validator("task", mode="before")
    @classmethod
    def _task(cls, value: Any) -> Any:
        return _one_call(value, "task")

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        for key in ("early_stopping", "best"):
            if getattr(self.train, key) and self.data.eval is None:
                raise UserError(f"train.{key} needs rows to evaluate on: set data.eval to a file or a share.")
        self._fit_method()
        return self

    def _fit_method(self) -> None:
        """Give the method what the task says: its default, and a head unless the model brings it."""
        task = expressions.parse(self.task, "task")[0].name
        constants = catalogue.entries("task")[task].constants
        if not constants.get("trains", True):
            if self.method is not None:
                raise UserError(f"{task}() asks the model as it is and trains nothing; leave the method out.")
            return
        self.method = self.method or constants["method"]
        methods = catalogue.entries("method")
        heads = [name for name, entry in methods.items() if entry.constants.get("gives_outputs")]
        own = [call.name for call in expressions.parse(self.method, "method") if call.name in heads]
        if not constants.get("head", True):
            if own:
                raise UserError(
                    f"{task}() uses the head that the model brings; leave {own[0]}() out of the method."
                )
        elif not own:
            self.method = f"{self.method} + {heads[0]}()"

    def dump(self) -> str:
        """The recipe as YAML; read again it describes the same run."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def make(values: Mapping[str, Any], origin: str = "the recipe", *, stored: bool = False) -> Recipe:
    """A recipe from nested values. Raises `UserError` for the first thing that is wrong, named with its key.

    `stored`: a run was started with it, maybe when options had other names.
    """
    try:
        return Recipe.model_validate(dict(values), context={"stored": True} if stored else None)
    except ValidationError as error:
        raise UserError(_message(error, origin)) from None


def read(path: Path) -> dict[str, Any]:
    """The values in a recipe file. Raises `UserError` where there is none or it is not YAML."""
    if path.is_dir():
        hint = " To go on with a run, use --resume." if (path / "recipe.yaml").is_file() else ""
        raise UserError(f"recipe {str(path)!r} is a folder; name a YAML file.{hint}")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"recipe {str(path)!r} does not exist.{nearest(path.name, siblings)}")
    if path.suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet", ".arrow", ".conll"):
        raise UserError(f"{str(path)!r} holds rows and is no recipe; write --train {path}.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"recipe {str(path)!r} cannot be read: {error.strerror}.") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {str(path)!r} must hold keys and values, such as `model: ...`.")
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everyone who writes a learning rate expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def override(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`key=value` settings put over nested values; keys are dotted, values are YAML."""
    result = dict(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{setting!r} is not a setting; write key=value, for example train.epochs=3.")
        try:
            value = yaml.load(text, Loader=_Loader) if text else None
        except yaml.YAMLError:
            value = text
        place(result, key.strip(), value)
    return result


def place(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key in nested values, in copies of the inner dictionaries."""
    *outer, last = dotted.split(".")
    inside = values
    for i, part in enumerate(outer):
        held = inside.get(part)
        if held is not None and not isinstance(held, dict):
            raise UserError(f"setting {dotted!r}: {'.'.join(outer[: i + 1])!r} is not a section.")
        inside[part] = dict(held or {})
        inside = inside[part]
    inside[last] = value


def gather(
    recipe: Any, given: Mapping[str, Any], named: Mapping[str, Any], settings: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of a recipe that was handed over in Python, with others put over it, and the tables in memory.

    `recipe`: a `Recipe`, nested values, a YAML file or None. `given`: train, eval and test, where None (for eval: ...)
    leaves the recipe's. `named`: other keys, where they are not None. `settings`: dotted keys.
    """
    if isinstance(recipe, Recipe):
        values: dict[str, Any] = recipe.model_dump()
    elif isinstance(recipe, str | Path):
        values = read(Path(recipe))
    else:
        values = dict(recipe or {})
    tables: dict[str, Any] = {}
    for name, source in given.items():
        if source is (... if name == "eval" else None):
            continue
        if source is not None and not isinstance(source, str | Path | int | float):
            tables[name] = source
            source = IN_MEMORY
        place(values, f"data.{name}", str(source) if isinstance(source, Path) else source)
    for key, value in named.items():
        if value is not None:  # a task may be a mapping, as in YAML
            place(values, key, value if isinstance(value, dict) else str(value))
    for key, value in (settings or {}).items():
        place(values, key, value)
    return values, tables


def keys() -> dict[str, str]:
    """Every key of a recipe, dotted, with its description."""
    found = {}
    for name, field in Recipe.model_fields.items():
        sections: dict[str, type[BaseModel]] = {"data": DataRecipe, "train": TrainRecipe}
        section = sections.get(name)
        if section is None:
            found[name] = field.description or ""
        else:
            found |= {
                f"{name}.{inner.alias or key}": inner.description or ""
                for key, inner in section.model_fields.items()
            }
    return found


def _message(error: ValidationError, origin: str) -> str:
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = [str(part) for part in first["loc"] if str(part) not in ("str", "float", "int", "bool")]
    path = [part for part in path if not part.startswith(("literal[", "function-"))]
    key = ".".join(path)
    known = keys()
    if first["type"] == "extra_forbidden":
        inner = [k for k in known if k.rpartition(".")[2] == path[-1]]
        suggestion = (
            f" Did you mean {inner[0]!r}?" if inner else nearest(key, known) or nearest(path[-1], known)
        )
        return f"{origin}: unknown key {key!r} (keys: {listing(known, 30)}).{suggestion}"
    if first["type"] == "missing":
        key = "data.train" if key == "data" else key  # the one thing in this section that has no default
        return f"{origin}: {key!r} is missing: {known.get(key, '') or 'it is needed'}."
    given = first.get("input")
    if first["type"] == "model_type":
        inner = [name.rpartition(".")[2] for name in known if name.startswith(f"{key}.")]
        return f"{origin}: {key} is {given!r}, but must be a section with keys ({listing(inner, 4)})."
    text = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    text = text[0].lower() + text[1:]
    options = [p for p in problems if ".".join(map(str, p["loc"])).startswith(key)]
    if len(options) > 1:
        text = " or ".join(
            dict.fromkeys(
                p["msg"].replace("Input should be", "").removeprefix("Value error, ").strip() for p in options
            )
        )
        text = f"must be {text.removeprefix('must be ')}"
    suggestion = ""
    if first["type"] == "literal_error" and isinstance(given, str):
        suggestion = nearest(
            given, str(first["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        )
    return f"{origin}: {key} is {given!r}, but {text}.{suggestion}"


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors; methods, tasks and optimizers are listed in the descriptions."""
    result = Recipe.model_json_schema()
    result["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for family in catalogue.FAMILIES.values():
        lines = []
        for entry in catalogue.entries(family.name).values():
            options = ", ".join(f"{o.name}={o.default!r}" for o in entry.options.values())
            lines.append(f"{entry.name}({options}): {entry.summary}")
        section, _, key = family.key.rpartition(".")
        node = result["$defs"][f"{section.capitalize()}Recipe"] if section else result
        field = node["properties"][key]
        field["description"] = ".\n".join([field.get("description", ""), "\n".join(lines)])
    return result
