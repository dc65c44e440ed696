"""Recipes: what is read, what is put over it, what is refused and with which words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graftkit.errors import UserError
from graftkit.recipe import schema as recipes
from graftkit.recipe.values import override

MINIMAL = {"model": "m", "data": {"train": "train.csv"}}


def message(values: dict) -> str:
    with pytest.raises(UserError) as caught:
        recipes.make(values)
    return str(caught.value)


def test_defaults_and_dump_read_back(tmp_path):
    made = recipes.make(MINIMAL)
    assert made.task == "classify" and made.data.eval == 0.1 and made.train.precision == "auto"
    (tmp_path / "r.yaml").write_text(made.dump(), encoding="utf-8")
    assert recipes.make(recipes.read(tmp_path / "r.yaml")) == made


def test_a_head_is_added_where_the_method_names_none():
    assert recipes.make({**MINIMAL, "method": "lora(rank=2)"}).method == "lora(rank=2) + head()"
    assert recipes.make({**MINIMAL, "method": "head() + lora()"}).method == "head() + lora()"


def test_settings_are_put_over_a_recipe_and_the_recipe_is_not_changed():
    values = {**MINIMAL, "train": {"epochs": 2, "lr": 1.0}}
    over = override(values, ["train.lr=1e-3", "train.steps=7", "data.columns={text: q, label: y}", "seed=3"])
    made = recipes.make(over)
    assert (made.train.lr, made.train.steps, made.train.epochs, made.seed) == (0.001, 7, 2.0, 3)
    assert made.data.columns == {"text": "q", "label": "y"}
    assert values["train"] == {"epochs": 2, "lr": 1.0} and values["data"] == {"train": "train.csv"}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", "1.0e-3"])
def test_every_way_of_writing_a_learning_rate(text, tmp_path):
    (tmp_path / "r.yaml").write_text(f"model: m\ndata: {{train: t.csv}}\ntrain:\n  lr: {text}\n")
    assert recipes.make(recipes.read(tmp_path / "r.yaml")).train.lr == 0.001


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"modle": "x"}, ["'modle'", "Did you mean 'model'?"]),
        ({"train": {"epoch": 3}}, ["'train.epoch'", "Did you mean 'train.epochs'?"]),
        ({"epochs": 3}, ["'epochs'", "Did you mean 'train.epochs'?"]),
        ({"train": {"lr": -1.0}}, ["train.lr", "-1.0", "greater than 0"]),
        ({"train": {"lr": "fast"}}, ["train.lr", "'fast'", "number"]),
        ({"train": {"batch_size": 0}}, ["train.batch_size", "0", "greater than or equal to 1"]),
        ({"train": {"batch_size": 1.5}}, ["train.batch_size", "1.5", "integer"]),
        ({"train": {"epochs": True}}, ["train.epochs", "True", "number"]),
        ({"train": {"schedule": "cosin"}}, ["train.schedule", "'linear', 'cosine', 'constant' or 'wsd'", "'cosine'?"]),
        ({"train": {"precision": "fp61"}}, ["train.precision", "'bf16'"]),
        ({"train": {"evaluate_every": "never"}}, ["train.evaluate_every", "'never'", "epoch"]),
        ({"train": {"evaluate_every": 0}}, ["train.evaluate_every", "from 1 to"]),
        ({"train": {"evaluate_every": "0 epochs"}}, ["train.evaluate_every", "2 epochs"]),
        ({"train": {"label_smoothing": 1.0}}, ["train.label_smoothing", "less than 1"]),
        ({"data": {"train": "t.csv", "eval": 1.5}}, ["data.eval", "1.5", "between 0 and 1"]),
        ({"data": {"train": "t.csv", "skip_bad": "yes please"}}, ["data.skip_bad", "boolean"]),
        ({"data": {"eval": 0.1}}, ["'data.train' is missing"]),
        ({"model": 3}, ["model", "3", "string"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 2**32}, ["seed", "less than"]),
        ({"train": {"epochs": float("inf")}}, ["train.epochs is inf", "finite"]),
        ({"train": {"lr": float("inf")}}, ["train.lr is inf", "finite"]),
        ({"train": {"weight_decay": float("inf")}}, ["train.weight_decay is inf", "finite"]),
        ({"data": "train.csv"}, ["data is 'train.csv'", "must be a section with keys", "train"]),
        ({"train": 3}, ["train", "3"]),
        ({"method": "lorra()"}, ["no method 'lorra'", "Did you mean 'lora'?"]),
        ({"method": "lora(rnk=2)"}, ["no option 'rnk'", "Did you mean 'rank'?"]),
        ({"method": "lora(rank=0)"}, ["rank is 0", "at least 1"]),
        ({"method": "lora(lr=-1)"}, ["lr is -1", "above 0"]),
        ({"method": "lora(rank='8')"}, ["rank is '8'", "must be int"]),
        ({"method": "lora(rank=8"}, ["cannot be read", "lora(rank=8) + head()"]),
        ({"method": "lora() - head()"}, ["only be joined by '+'"]),
        ({"method": "head(pooling='men')"}, ["pooling is 'men'", "Did you mean 'mean'?"]),
        ({"method": "unfreeze('blocks[x]')"}, ["blocks[x]", "blocks[-2:]"]),
        ({"method": "full() + unfreeze()"}, ["full()", "unfreeze()", "leave one of them out"]),
        ({"method": "lora() + layerwise_lr()"}, ["layerwise_lr()", "unfreeze"]),
        ({"method": "lora() + freeze()"}, ["freeze()", "frozen anyway"]),
        ({"task": "clasify"}, ["no task 'clasify'", "Did you mean 'classify'?"]),
        ({"task": "classify() + classify()"}, ["one task"]),
        ({"data": {"train": "t.csv", "eval": None}, "train": {"early_stopping": 2}}, ["early_stopping", "data.eval"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_is_right(change, told):
    said = message({**MINIMAL, **change})
    assert all(part in said for part in told), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("settings", "told"),
    [(["lr"], "key=value"), (["=3"], "key=value"), (["model.x=3"], "'model' is not a section")],
)
def test_settings_that_are_none(settings, told):
    with pytest.raises(UserError, match=told):
        override(MINIMAL, settings)


def test_recipe_files_that_are_none(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: [unclosed")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "latin.yaml").write_bytes("model: caf\xe9".encode("latin-1"))
    for name, told in [
        ("recipes.yaml", "Did you mean 'recipe.yaml'?"),
        ("recipe.yaml", "not valid YAML"),
        ("list.yaml", "keys and values"),
        ("latin.yaml", "not valid YAML"),
        (".", "is a folder"),
    ]:
        with pytest.raises(UserError) as caught:
            recipes.read(tmp_path / name)
        assert told in str(caught.value)


def test_yaml_cannot_make_objects(tmp_path):
    (tmp_path / "r.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match="not valid YAML"):
        recipes.read(tmp_path / "r.yaml")


def test_recipes_and_help_need_no_torch():
    code = (
        "import sys; from graftkit.recipe import schema as recipe; recipe.make({'model': 'm', 'data': {'train': 't'}}); recipe.schema();"
        "import graftkit.cli.main; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def accepted(schema: dict, value, root: dict) -> bool:
    """Just enough of JSON Schema to check recipes."""
    if "$ref" in schema:
        return accepted(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], value, root)
    if "anyOf" in schema:
        return any(accepted(option, value, root) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = {
        "object": dict, "string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None),
    }.get(schema.get("type", ""))  # fmt: skip
    if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
        if (low is not None and value < low) or (above is not None and value <= above):
            return False
        if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
            return False
    if schema.get("type") == "object":
        properties = schema.get("properties", {})
        if any(name not in value for name in schema.get("required", [])):
            return False
        more = schema.get("additionalProperties", True)
        for name, inner in value.items():
            rule = properties.get(name, more)
            if rule is False or (isinstance(rule, dict) and not accepted(rule, inner, root)):
                return False
    return True


def test_the_schema_accepts_what_make_accepts_and_refuses_what_it_refuses(finished):
    schema = recipes.schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert "lora(" in schema["properties"]["method"]["description"]
    saved = recipes.read(finished / "recipe.yaml")
    recipes.make(saved)
    values = [
        (saved, True),
        (MINIMAL, True),
        ({**MINIMAL, "modle": "x"}, False),
        ({**MINIMAL, "train": {"batch_size": 0}}, False),
        ({**MINIMAL, "train": {"lr": "fast"}}, False),
        ({**MINIMAL, "train": {"schedule": "cosin"}}, False),
        ({"model": "m"}, False),
    ]
    for value, right in values:
        assert accepted(schema, value, schema) is right, value
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)
    for value, right in values:
        assert jsonschema.Draft202012Validator(schema).is_valid(value) is right


def test_the_recipe_of_an_old_run_is_read():
    """Under names that options had, and with sums that are refused today; a new one is not."""
    for method, now in (
        ("lora(b_rate=4.0) + head()", "lora(loraplus_lr_ratio=4.0) + head()"),
        ("full() + lora() + head()",) * 2,
    ):
        with pytest.raises(UserError):
            recipes.make({**MINIMAL, "method": method})
        assert recipes.make({**MINIMAL, "method": method}, stored=True).method == now
