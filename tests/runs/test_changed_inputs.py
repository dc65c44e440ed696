"""A run is resumed with what it began with: anything else is refused, or accepted with --force and reported."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import tune_words
from killing import killed
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped(tiny_bert, rows_folder, tmp_path_factory) -> Path:
    """A folder with a model, rows and a run of them that was killed after its second checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(tiny_bert, folder / "model")
    shutil.copytree(rows_folder, folder / "rows")
    killed("after-rename", 2, tune_words(
        folder / "model", folder / "rows", folder / "run", "train.steps=5", "train.checkpoint_every=1",
        method="lora(rank=4, alpha=8) + head()",
    ))  # fmt: skip
    return folder


@pytest.fixture
def place(stopped, tmp_path) -> Path:
    """A copy of it, with the recipe's paths changed accordingly: places may change."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(stopped), str(tmp_path)))
    return tmp_path


def change_recipe(place: Path, key: str, value: object) -> None:
    path = place / "run" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    *folders, name = key.split(".")
    inner = recipe
    for folder in folders:
        inner = inner[folder]
    inner[name] = value
    path.write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train.batch_size", 8, "train.batch_size was 16 and is 8"),
        ("train.lr", 0.02, r"train.lr was 0.01 and is 0.02"),
        ("train.schedule", "constant", "train.schedule was .* and is constant"),
        ("train.steps", 9, "train.steps was 5 and is 9"),
        (
            "method",
            "lora(rank=4, alpha=16) + head()",
            r"method was lora\(.*alpha=8.* and is lora\(.*alpha=16",
        ),
        ("seed", 7, "seed was 0 and is 7"),
    ],
)
def test_a_recipe_that_was_edited_is_refused(command, place, key, value, says):
    change_recipe(place, key, value)
    done = command("tune", "--resume", "run")
    assert done.status == 1 and re.search(rf"recipe\.yaml: {says}", done.err), done.err
    assert "--force" in done.err and not (place / "run" / "result.json").exists()


def test_a_key_that_the_run_did_not_know_yet_has_its_default(command, place):
    plan = place / "run" / "plan.json"
    values = json.loads(plan.read_text())
    assert values["recipe"].pop("train.step_in_backward") is False
    plan.write_text(json.dumps(values))
    assert command("tune", "--resume", "run").status == 0


def test_what_was_accepted_is_reported(command, place):
    change_recipe(place, "train.lr", 0.02)
    done = command("tune", "--resume", "run", "--force")
    assert done.status == 0 and "warning: resumed with other inputs" in done.out
    result = json.loads((place / "run" / "result.json").read_text())
    assert (
        len(result["changed_when_resumed"]) == 1 and "train.lr was 0.01" in result["changed_when_resumed"][0]
    )
    assert "resumed with other inputs than it began with" in (place / "run" / "README.md").read_text()
    (place / "run" / "result.json").unlink()  # what was accepted once need not be again, and stays reported
    assert command("tune", "--resume", "run").status == 0
    again = json.loads((place / "run" / "result.json").read_text())
    assert again["changed_when_resumed"] == result["changed_when_resumed"]


def test_a_model_whose_configuration_has_changed_is_refused(command, place):
    path = place / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"hidden_dropout_prob": 0.3}))
    done = command("tune", "--resume", "run")
    assert done.status == 1 and "configuration has changed (hidden_dropout_prob)" in done.err
    path.write_text(json.dumps(config, indent=7))
    assert command("tune", "--resume", "run").status == 0


def test_several_changes_are_reported_at_once(command, place):
    weights = {name: tensor + 1 for name, tensor in load_file(place / "model" / "model.safetensors").items()}
    save_file(weights, place / "model" / "model.safetensors", metadata={"format": "pt"})
    change_recipe(place, "train.weight_decay", 0.5)
    rows = (place / "rows" / "eval.csv").read_text()
    (place / "rows" / "eval.csv").write_text(rows.replace("apple", "pear"))
    done = command("tune", "--resume", "run")
    assert done.status == 1
    for part in ("the eval rows are not those", "train.weight_decay was", "has other weights"):
        assert part in done.err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.checkpoint_every", 3),
        ("method", "lora( rank = 4,alpha=8 )+head( pooling='own' )"),
        ("out", "elsewhere"),
    ],
)
def test_what_changes_no_result_may_change(command, place, key, value):
    change_recipe(place, key, value)
    done = command("tune", "--resume", "run")
    assert done.status == 0 and "other inputs" not in done.out, done.err


def test_a_run_of_an_older_version_is_resumed_with_a_note(command, place):
    path = place / "run" / "plan.json"
    plan = json.loads(path.read_text())
    del plan["recipe"], plan["config_sha256"]
    path.write_text(json.dumps(plan))
    change_recipe(place, "train.lr", 0.02)
    done = command("tune", "--resume", "run")
    assert done.status == 0 and "started by an older version" in done.out


def test_force_is_for_resuming_alone(command, tiny_bert, rows_folder, tmp_path):
    done = command(*tune_words(tiny_bert, rows_folder, tmp_path / "run"), "--force")
    assert done.status == 1 and "--force is for --resume" in done.err


def test_the_graft_to_begin_with(command, tiny_bert, rows_folder, finished, tmp_path):
    """Another place of it is accepted, and other values are not."""
    start = shutil.copytree(finished / "graft", tmp_path / "start")
    more = ("train.steps=4", "train.checkpoint_every=1", f"train.from={start}")
    killed("after-rename", 1, tune_words(tiny_bert, rows_folder, tmp_path / "run", *more))
    weights = start / "adapter_model.safetensors"
    plain = load_file(weights)
    save_file({name: tensor * 2 for name, tensor in plain.items()}, weights)
    done = command("tune", "--resume", "run")
    assert done.status == 1 and "the graft of train.from has other values" in done.err, done.err
    save_file(plain, weights)
    start.rename(tmp_path / "elsewhere")
    change_recipe(tmp_path, "train.from", str(tmp_path / "elsewhere"))
    assert command("tune", "--resume", "run").status == 0
