"""One graft of several: `graftkit merge` and `graftkit.merge`."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import zoo
from shaken import ALL_KINDS, shaken
from side_by_side import several
from transformers import BertModel

from graftkit import UserError, load, merge, using
from graftkit.cli import main as cli
from graftkit.files import read_json

pytestmark = pytest.mark.sampled

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.2}
SIZES = (
    "lora(rank=2)",
    "lora(rank=3, alpha=5, sites='blocks[0]')",
    "lora(rank=2, use_rslora=True, rank_pattern={'q': 4})",
)


def saved(model, folder, texts=SIZES, names=tuple(WEIGHTS), **about):
    """Grafts side by side, disabled, and the folders they were saved in."""
    grafts = several(model, texts, names)
    return [graft.save(folder / graft.name, **about) for graft in grafts]


def refused(*args, **more) -> str:
    with pytest.raises(UserError) as caught:
        merge(*args, **more)
    return str(caught.value)


@ALL_KINDS
def test_cat_is_the_weighted_sum(kind, tmp_path):
    model = tiny.bare(kind)
    folders = saved(model, tmp_path, (*SIZES[:2], "pissa(rank=2)"))
    with using(model, WEIGHTS):
        wanted = tiny.outputs(model)
    folder = merge(folders, tmp_path / "out", weights=list(WEIGHTS.values()))
    graft = load(tiny.bare(kind), folder)
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5
    described = read_json(folder / "graft.json")
    assert described["merged"] == {
        "grafts": [str(f) for f in folders], "weights": list(WEIGHTS.values()), "how": "cat",
    }  # fmt: skip
    assert described["trained_parameters"] == sum(p.numel() for p in graft.parameters.values())
    whole = merge(folders, tmp_path / "svd", weights=list(WEIGHTS.values()), how="svd", rank=tiny.INNER)
    assert tiny.relative(tiny.outputs(load(tiny.bare(kind), whole).model), wanted) < 1e-5


def test_svd_is_the_nearest_of_its_rank(tmp_path):
    model = tiny.bare("bert")
    folders = saved(model, tmp_path)
    cat, low = (load(tiny.bare("bert"), merge(folders, tmp_path / how, how=how)) for how in ("cat", "svd"))
    for name, parameter in low.parameters.items():
        if name.endswith(".A"):
            site = name.removesuffix(".lora_default.A")
            deltas = []
            for graft in (cat, low):
                update = graft.model.get_submodule(f"{site}.lora_default")
                deltas.append(update.delta(update.of(graft.model.get_submodule(site))))
            values = torch.linalg.svdvals(deltas[0])
            rank = len(parameter)
            assert rank == 4  # the largest of the grafts
            torch.testing.assert_close(torch.linalg.matrix_norm(deltas[0] - deltas[1]), values[rank:].norm())


def test_weights_are_equal_unless_given(tmp_path):
    model = tiny.bare("bert")
    folders = saved(model, tmp_path)
    with using(model, dict.fromkeys(WEIGHTS, 1 / 3)):
        wanted = tiny.outputs(model)
    graft = load(tiny.bare("bert"), merge(folders, tmp_path / "out"))
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5


def test_biases_beside_b(tmp_path):
    model = tiny.bare("bert")
    texts = (
        "lora(rank=2, lora_bias=True)",
        "lora(rank=2, alpha=3)",
        "lora(rank=2, lora_bias=True, sites='q')",
    )
    folders = saved(model, tmp_path, texts)
    with using(model, WEIGHTS):
        wanted = tiny.outputs(model)
    graft = load(tiny.bare("bert"), merge(folders, tmp_path / "out", weights=list(WEIGHTS.values())))
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "transformer"])
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_weights_that_stand_in(name, how, tmp_path):
    found = zoo.BY_NAME[name]
    selection = "experts" if name == "mixtral" else "re:.*self_attn.*"
    model = found.fresh()
    folders = saved(
        model, tmp_path, tuple(f"lora(rank={r}, sites={selection!r})" for r in (2, 3)), ("a", "b")
    )
    with using(model, {"a": 0.5, "b": 2.0}):
        wanted = zoo.outputs(model, found.batch())
    more = {"rank": 5} if how == "svd" else {}
    graft = load(found.fresh(), merge(folders, tmp_path / "out", weights=[0.5, 2.0], how=how, **more))
    assert tiny.relative(zoo.outputs(graft.model, found.batch()), wanted) < 1e-5


@pytest.mark.parametrize("how", ["ties", "dare", "dare-ties", "magnitude", "ties-svd", "dare_linear_svd"])
def test_every_way_gives_a_graft_that_loads(how, tmp_path):
    folders = saved(tiny.bare("bert"), tmp_path, ("lora(rank=2)", "lora(rank=2, alpha=3)"), ("a", "b"))
    made = [
        merge(folders, tmp_path / f"out{i}", how=how, density=0.5, seed=seed)
        for i, seed in enumerate((1, 1, 2))
    ]
    outputs = [tiny.outputs(load(tiny.bare("bert"), folder).model) for folder in made]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2]) == ("dare" not in how)
    assert ("seed" in read_json(made[0] / "graft.json")["merged"]) == ("dare" in how)


@pytest.mark.slow
def test_dare_keeps_the_mean(tmp_path):
    folders = saved(tiny.bare("bert"), tmp_path, ("lora(rank=2)", "lora(rank=2, alpha=3)"), ("a", "b"))
    plain = load(tiny.bare("bert"), merge(folders, tmp_path / "plain", how="linear")).parameters
    draws = []
    for seed in range(30):
        folder = merge(folders, tmp_path / "draw", how="dare", density=0.5, seed=seed, overwrite=True)
        draws.append(
            torch.cat([p.flatten() for p in load(tiny.bare("bert"), folder).parameters.values()]).detach()
        )
    wanted = torch.cat([p.flatten() for p in plain.values()]).detach()
    spread = torch.stack(draws).std(0).norm() / len(draws) ** 0.5
    assert (torch.stack(draws).mean(0) - wanted).norm() < 1.5 * spread


# ---- heads


@pytest.mark.parametrize("head", ["head(classes=3)", "head(classes=4)", "head(classes=4, pooling='mean')"])
@pytest.mark.slow
def test_heads_for_the_same_classes_are_averaged(head, tmp_path):
    own = "pooling" not in head
    make = tiny.with_head if own else tiny.bare
    model = make("bert")
    texts = (f"lora(rank=2) + {head}", f"lora(rank=3) + {head}")
    folders = saved(model, tmp_path, texts, ("a", "b"), labels=["x", "y", "z", "w"])
    folder = merge(folders, tmp_path / "out", weights=[3, 1])
    graft = load(make("bert"), folder)
    heads = [load(make("bert"), f).model for f in folders]
    name = "classifier" if own else "head_default.output"
    merged, first, second = (m.get_submodule(name).weight for m in (graft.model, *heads))
    torch.testing.assert_close(merged, 0.75 * first + 0.25 * second)
    assert read_json(folder / "graft.json")["labels"] == ["x", "y", "z", "w"]
    kept = load(make("bert"), merge(folders, tmp_path / "first", weights=[3, 1], heads="first"))
    assert torch.equal(kept.model.get_submodule(name).weight, first)
    bare = load(make("bert"), merge(folders, tmp_path / "none", weights=[3, 1], heads="none"))
    assert str(bare.method).startswith("lora(") and "head" not in str(bare.method)
    if not own:
        with pytest.raises(UserError, match="add up to 0"):
            merge(folders, tmp_path / "zero", weights=[1, -1])


@pytest.mark.slow
def test_heads_that_differ_are_refused(tmp_path):
    model = tiny.bare("bert")
    texts = (
        "lora(rank=2) + head(classes=3)", "lora(rank=2) + head(classes=4)",
        "lora(rank=2) + head(classes=3, pooling='mean')", "lora(rank=2)",
    )  # fmt: skip
    a, b, c, plain = saved(model, tmp_path, texts, ("a", "b", "c", "d"))
    for pair in ([a, b], [a, c]):
        assert "--heads first" in refused(pair, tmp_path / "out", overwrite=True)
        merge(pair, tmp_path / "out", heads="first", overwrite=True)
    d, e = (
        several(tiny.bare("bert"), ("lora(rank=2) + head(classes=2)",), ("x",))[0].save(
            tmp_path / name, labels=labels
        )
        for name, labels in (("d2", ["no", "yes"]), ("e2", ["cat", "dog"]))
    )
    assert "different classes" in refused([d, e], tmp_path / "other")
    assert "heads is 'all'" in refused([a, plain], tmp_path / "out", heads="all")
    one = load(tiny.bare("bert"), merge([plain, a], tmp_path / "one", weights=[1, 0.5]))
    with torch.no_grad():
        wanted = load(tiny.bare("bert"), a).model.head_default.output.weight
    assert torch.equal(one.model.head_default.output.weight, wanted)


# ---- refusals


@pytest.mark.slow
def test_what_cannot_be_merged(tmp_path):
    model = tiny.bare("bert")
    texts = ("lora(rank=2)", "lora(rank=3)", "dora(rank=2)", "ia3()", "lora(rank=2) + adapter(bottleneck=2)",
             "lora(rank=2, bias='all')")  # fmt: skip
    a, b, dora, ia3, both, biased = saved(model, tmp_path, texts, tuple("abcdef"))
    out = tmp_path / "out"
    assert "at least two grafts" in refused([a], out)
    assert "3 weights for 2 grafts" in refused([a, b], out, weights=[1, 2, 3])
    assert "finite number" in refused([a, b], out, weights=[1, float("nan")])
    assert "does not exist" in refused([a, tmp_path / "nowhere"], out)
    for other, name in ((dora, "dora()"), (ia3, "ia3()"), (both, "adapter()")):
        message = refused([a, other], out)
        assert name in message and str(other) in message and "graftkit.using" in message
    assert "biases of the backbone" in refused([a, biased], out)
    for how in ("linear", "ties"):
        message = refused([a, b], out, how=how, density=None if how == "linear" else 0.5)
        assert "2, 3" in message and "cat" in message and "svd" in message
    assert "Did you mean 'linear'?" in refused([a, b], out, how="linaer")
    assert "density is None" in refused([a, b], out, how="ties")
    assert "density is 1.5" in refused([a, b], out, how="dare", density=1.5)
    assert "leave it out" in refused([a, b], out, how="cat", density=0.5)
    assert "only with svd" in refused([a, b], out, how="cat", rank=4)
    assert "at least 1" in refused([a, b], out, how="svd", rank=0)
    assert "sign is" in refused([a, b], out, sign="both")
    assert "another backbone" in refused([a, saved(tiny.bare("gpt2"), tmp_path / "gpt2", texts[:1])[0]], out)
    config = tiny.config("bert")
    config.intermediate_size = 32
    wide = saved(BertModel(config), tmp_path / "wide", texts[:1])[0]
    for folder in (a, wide):
        (folder / "graft.json").unlink()
    assert "different shapes" in refused([a, wide], out)
    assert not out.exists()


def test_nothing_is_lost_by_overwriting(tmp_path):
    a, b = saved(tiny.bare("bert"), tmp_path, ("lora(rank=2)", "lora(rank=3) + head(classes=2)"), ("a", "b"))
    before = {path: path.read_bytes() for path in a.iterdir()}
    out = tmp_path / "out"
    assert "one of the grafts" in refused([a, b], a, overwrite=True)
    assert {path: path.read_bytes() for path in a.iterdir()} == before
    merge([a, b], out)
    assert "--overwrite" in refused([a, b], out)
    merge([a, b], out, heads="none", overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
    ]
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused([a, b], tmp_path / "file", overwrite=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("task: classify")
    assert "files that do not belong to a graft (recipe.yaml)" in refused(
        [a, b], tmp_path / "run", overwrite=True
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_values_that_are_not_finite(tmp_path):
    model = tiny.bare("bert")
    graft = shaken(model, "lora(rank=2)", name="a")
    good = graft.save(tmp_path / "good")
    with torch.no_grad():
        next(iter(graft.parameters.values())).fill_(float("inf"))
    bad = graft.save(tmp_path / "bad")
    assert "contains infinite values" in refused([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the command


def test_the_command(tmp_path, capsys):
    model = tiny.bare("bert")
    folders = saved(model, tmp_path, SIZES[:2], ("a", "b"))
    (tmp_path / "run").mkdir()
    folders[0].rename(tmp_path / "run" / "graft")
    arguments = ["merge", str(tmp_path / "run"), str(folders[1]), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--weights", "-0.5,2", "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"graft": str(tmp_path / "out")}
    with using(model, {"a": -0.5, "b": 2.0}):
        wanted = tiny.outputs(model)
    assert tiny.relative(tiny.outputs(load(tiny.bare("bert"), tmp_path / "out").model), wanted) < 1e-5
    for more, message in (
        ([], "--overwrite"),
        (["--weights", "a,b"], "0.7,0.3"),
        (["--weights", "1"], "1 weights for 2 grafts"),
        (["--how", "ties", "--overwrite"], "density"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, *more])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
