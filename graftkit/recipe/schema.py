"""The recipe: a complete description of a run, validated before anything is loaded. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from graftkit.errors import UserError, listing, shown
from graftkit.recipe import catalogue, expressions, selection, sums
from graftkit.recipe.problems import message
from graftkit.recipe.sections import MOST, DataRecipe, Section, TrainRecipe, one_call
from graftkit.recipe.values import DEPTH, place, read, seconds

IN_MEMORY = "(in memory)"
NEW = "(new)"  # the model of a recipe that names a size instead


class Recipe(Section):
    """A complete description of a run."""

    model: str = Field(description="a folder in transformers format, a hub id, or package.module:function")
    weights: str | None = Field(
        default=None, description="a safetensors file for the module that package.module:function returns"
    )
    size: str | None = Field(
        default=None,
        description="instead of a model: a new one of this size, such as mini or bert-small, initialized at random",
    )
    tokenizer: str | None = Field(
        default=None,
        description="of a new model: a folder that holds one; null: a new one, trained on the training texts",
    )
    vocabulary: int | None = Field(
        default=None, ge=16, le=MOST, description="tokens of a new tokenizer; null: what suits the size"
    )
    budget: str | None = Field(
        default=None,
        description="pre-training: how long it may take, such as '20 min'; chooses size, batch and steps",
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        default=None, description="store the frozen linear layers in 4 or 8 bits; requires bitsandbytes"
    )
    task: str = Field(
        default="classify", description="the task, for example classify(class_weights='balanced')"
    )
    method: str | None = Field(
        default=None, description="the method, for example lora(rank=8) + head(); null: the task's default"
    )
    data: DataRecipe
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="random seed of initial values, held-out rows, row order and dropout",
    )
    out: str | None = Field(default=None, description="the run folder; null: a new one under runs/")

    @field_validator("method")
    @classmethod
    def _method(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        stored = bool(info.context)  # the recipe of an existing run stays readable
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
        return one_call(value, "task")

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: str | None) -> str | None:
        if value is not None:
            seconds(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _new(cls, values: Any) -> Any:
        if (
            isinstance(values, dict)
            and not values.get("model")
            and (values.get("size") or values.get("budget"))
        ):
            return {**values, "model": NEW}
        return values

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        for key in ("early_stopping", "best"):
            if getattr(self.train, key) and self.data.eval is None:
                raise UserError(f"train.{key} needs rows to evaluate on: set data.eval to a file or a share.")
        if self.data.rows is not None and self.data.per_class is not None:
            raise UserError(
                "data.rows and data.per_class both draw the training rows; leave one of them out."
            )
        if self.train.schedule == "wsd" and self.train.warmup + self.train.decay > 1:
            raise UserError(
                f"train.warmup={self.train.warmup} and train.decay={self.train.decay} are more than the whole run; lower one."
            )
        if self.train.weight_type == "bf16" and self.train.precision in ("fp32", "fp16", "fp8"):
            raise UserError(
                f"train.weight_type=bf16 computes in bf16 too: leave train.precision={self.train.precision} out, or "
                "train.weight_type."
            )
        if self.train.precision == "fp16" and self.train.step_in_backward:
            raise UserError(
                "train.precision=fp16 needs all gradients of a step to find an overflow, but train.step_in_backward frees each "
                "at once; leave out one of the two."
            )
        self._fit_batches()
        self._fit_start()
        self._fit_updates()
        self._fit_method()
        return self

    def _fit_batches(self) -> None:
        """Refuse two sizes of a batch."""
        if self.train.batch_tokens is None:
            return
        if "batch_size" in self.train.model_fields_set:
            raise UserError(
                "train.batch_tokens and train.batch_size both say how large a batch is; leave out one of the two."
            )
        if self.budget is not None:
            raise UserError("budget chooses train.batch_size; leave train.batch_tokens out.")

    def _fit_updates(self) -> None:
        """Refuse what steps of single parameters cannot do."""
        apart = {
            "train.step_in_backward": self.train.step_in_backward,
            "train.weight_type=bf16": self.train.weight_type == "bf16",
        }
        key = next((key for key, asked in apart.items() if asked), None)
        optimizers = catalogue.entries("optimizer")
        name = expressions.parse_one(self.train.optimizer, "optimizer").name
        if key is not None and not optimizers[name].constants.get("steps_in_backward"):
            able = [entry for entry in optimizers if optimizers[entry].constants.get("steps_in_backward")]
            raise UserError(
                f"{key}: {name}() needs more than the gradient of one parameter for its step; choose "
                f"{listing([f'{entry}()' for entry in able], 12)}, or leave {key} out."
            )
        if not (self.train.step_in_backward and self.train.accumulate > 1):
            return
        if not optimizers[name].constants.get("accumulates_in_backward"):
            able = [
                entry for entry in optimizers if optimizers[entry].constants.get("accumulates_in_backward")
            ]
            raise UserError(
                f"train.step_in_backward frees each gradient at once, and {name}() needs all of it for its step, so "
                f"train.accumulate={self.train.accumulate} has nothing to add to: use a larger train.batch_size, "
                f"{listing([f'{entry}()' for entry in able])}, or leave train.step_in_backward out."
            )

    def _fit_start(self) -> None:
        """Check what concerns new models and pre-training."""
        task = expressions.parse(self.task, "task")[0].name
        constants = catalogue.entries("task")[task].constants
        if self.model != NEW:
            for key in ("size", "tokenizer", "vocabulary"):
                if getattr(self, key) is not None:
                    raise UserError(
                        f"{key} is for a new model, but model {shown(self.model)} is named too, which brings its own; leave "
                        "out one of the two."
                    )
        elif self.tokenizer is not None and self.vocabulary is not None:
            raise UserError(
                "vocabulary is for a new tokenizer, but tokenizer names one; leave out one of the two."
            )
        for key, value in (("budget", self.budget), ("data.probe", self.data.probe)):
            if value is not None and not constants.get("makes_model", False):
                raise UserError(f"{key} is for pre-training, but the task is {task}(); leave it out.")

    def _fit_method(self) -> None:
        """Complete the method from the task: fill in its default, and add a head unless the model brings one."""
        task = expressions.parse(self.task, "task")[0].name
        constants = catalogue.entries("task")[task].constants
        if not constants.get("trains", True):
            if self.method is not None:
                raise UserError(
                    f"{task}() uses the model unchanged and trains nothing; leave the method out."
                )
            return
        self.method = self.method or constants["method"]
        methods = catalogue.entries("method")
        calls = expressions.parse(self.method, "method")
        own = [call.name for call in calls if methods[call.name].constants.get("gives_outputs")]
        if not constants.get("head", True):
            if own:
                raise UserError(
                    f"{task}() uses the head that the model brings; leave {own[0]}() out of the method."
                )
        elif not own:
            head = next(name for name, entry in methods.items() if entry.constants.get("gives_outputs"))
            self.method = f"{self.method} + {head}()"

    def dump(self) -> str:
        """Return the recipe as YAML that describes the same run when it is read again."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def make(values: Mapping[str, Any], origin: str = "the recipe", *, stored: bool = False) -> Recipe:
    """Make a recipe from nested values. Raises `UserError` for the first mistake, with its key.

    `stored`: the values come from an existing run, possibly from before an option was renamed.
    """
    _check_values(values, origin, ())
    try:
        return Recipe.model_validate(dict(values), context={"stored": True} if stored else None)
    except ValidationError as error:
        raise UserError(message(error, origin, keys())) from None


def for_pretraining(values: Mapping[str, Any], origin: str = "the recipe") -> Recipe:
    """Make a recipe of an objective from nested values; without a model or a size, the model is a new one.

    Raises `UserError` as `make` does, and for a task that is no objective.
    """
    known = catalogue.entries("task")
    objectives = [name for name, entry in known.items() if entry.constants.get("makes_model", False)]
    if values.get("task") is None:
        raise UserError(
            f"{origin}: the objective is missing; name one with --objective ({listing(objectives)})."
        )
    new = not any(values.get(key) for key in ("model", "size", "budget"))
    recipe = make({**values, "model": NEW} if new else values, origin)
    task = expressions.parse(recipe.task, "task")[0].name
    if task not in objectives:
        raise UserError(
            f"{task}() is no objective but a task with labels; use `graftkit tune` for it, or choose one of "
            f"{listing(objectives)}."
        )
    return recipe


def _check_values(value: Any, origin: str, keys: tuple[Any, ...]) -> None:
    """Raise `UserError` for a text with a NUL character, which no path, name or expression may have, and for values
    nested too deeply to show."""
    if len(keys) > DEPTH:
        raise UserError(f"{origin}: {keys[0]} holds values that are nested more than {DEPTH} deep.")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_values(inner, origin, (*keys, key))
    elif isinstance(value, str) and "\0" in value:
        key = ".".join(map(str, keys))
        raise UserError(f"{origin}: {key} is {shown(value)}, which holds a NUL character; remove it.")


def gather(
    recipe: Any, given: Mapping[str, Any], named: Mapping[str, Any], settings: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of a recipe passed in Python, with overrides applied, and the tables in memory.

    `recipe`: a `Recipe`, nested values, a YAML file or None. `given`: train, eval and test; None (for eval: ...) keeps
    the recipe's value. `named`: other keys; None is ignored. `settings`: dotted keys.
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
    """Return every recipe key, dotted, with its description."""
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


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors; descriptions list the methods, tasks and optimizers."""
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
