"""The task of sounds, from folders to answers: runs, resume, export, predict, and bad recordings."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audio_models import MAKERS, RATE, Bands, ast, tone, wav2vec2, write_tones
from conftest import equal_bits, graft_tensors

import graftkit
from graftkit.errors import Interrupted, UserError
from graftkit.recipe import schema as recipes
from graftkit.runs.prepare import prepare_rows
from graftkit.tasks.audio_classify.task import AudioClassify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_compared")]

FAST = {"train.precision": "fp32", "train.batch_size": 8, "train.lr": 0.01}


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """train: 12 recordings of a high and 12 of a low tone, test: 6 of either, in folders."""
    folder = tmp_path_factory.mktemp("tones")
    write_tones(folder / "train", 12, 1)
    write_tones(folder / "test", 6, 2)
    return folder


@pytest.fixture(scope="session")
def tiny_ast(tmp_path_factory) -> Path:
    return ast(tmp_path_factory.mktemp("models") / "ast")


def tune(
    model: Path,
    tones: Path,
    out: Path,
    method: str = "lora(rank=4) + head()",
    task: str = "audio_classify",
    **settings,
):
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return graftkit.tune(
        model=model, task=task, train=str(tones / "train"), eval=None, test=str(tones / "test"), method=method, out=out,
        settings={**FAST, **named},
    )  # fmt: skip


@pytest.fixture(scope="session")
def heard(tiny_ast, tones, tmp_path_factory) -> graftkit.Run:
    """A finished run with the model's own head."""
    return tune(tiny_ast, tones, tmp_path_factory.mktemp("runs") / "heard", train__steps=25)


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def test_a_run_learns_and_tells_what_there_is(heard):
    assert heard.metrics["accuracy"] > 0.9
    statistics = json.loads((heard.path / "plan.json").read_text())["statistics"]["train"]
    assert statistics["labels"] == {"high": 12, "low": 12} and statistics["lengths"]["unit"] == "samples"
    assert (
        statistics["rates"] == {"8000 Hz": 24}
        and statistics["channels"] == {"mono": 24}
        and statistics["clipped"] == 0
    )
    assert (
        0.2
        <= statistics["seconds"]["shortest"]
        < statistics["seconds"]["mean"]
        < statistics["seconds"]["longest"]
        <= 0.5
    )
    assert statistics["seconds"]["sum"] * RATE == pytest.approx(statistics["lengths"]["sum"], abs=5)


def test_predict_names_the_files(heard, tones, command):
    files = [tones / "test/high/00.wav", tones / "test/low/03.wav"]
    done = command("predict", heard.path, *files, "--json")
    rows = json.loads(done.out)["predictions"]
    assert [row["audio"] for row in rows] == list(map(str, files))
    assert [row["label"] for row in rows] == ["high", "low"] and all(
        0.5 < row["probability"] <= 1 for row in rows
    )
    assert all(set(row) == {"audio", "label", "probability"} for row in rows)
    text = command("predict", heard.path, files[0]).out
    assert text.startswith("high\t") and text.rstrip().endswith(str(files[0]))
    held = [(tone(0.3, 1500), RATE), (tone(0.3, 200), RATE)]
    assert [row["label"] for row in heard.predict(held)] == ["high", "low"]
    dicts = [{"array": wave, "sampling_rate": rate} for wave, rate in held]
    assert heard.predict(dicts) == heard.predict(held)
    folder = heard.predict(str(tones / "test"))
    assert len(folder) == 12 and folder[0]["audio"] == str(tones / "test/high/00.wav")


def test_tables_of_paths_bytes_and_arrays_give_what_the_folders_give(heard, tones, tmp_path):
    paths = sorted((tones / "test").rglob("*.wav"))
    expected = heard.evaluate(str(tones / "test"))
    table = tmp_path / "sounds.jsonl"
    shutil.copytree(tones / "test", tmp_path / "clips")
    rows = [{"file": f"clips/{path.parent.name}/{path.name}", "label": path.parent.name} for path in paths]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert heard.evaluate(str(table)) == expected
    data = [
        {"audio": {"bytes": path.read_bytes(), "path": None}, "label": path.parent.name} for path in paths
    ]
    assert heard.evaluate(data) == expected
    read = [soundfile.read(path) for path in paths]
    data = [
        {"audio": {"array": wave, "sampling_rate": rate}, "label": row["label"]}
        for (wave, rate), row in zip(read, rows)
    ]
    assert heard.evaluate(data)["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    import datasets

    written = datasets.Dataset.from_list([{"audio": str(path), "label": path.parent.name} for path in paths])
    assert heard.evaluate(written.cast_column("audio", datasets.Audio())) == expected
    (tmp_path / "bytes.parquet").unlink(missing_ok=True)
    datasets.Dataset.from_list(
        [{"audio": path.read_bytes(), "label": path.parent.name} for path in paths]
    ).to_parquet(tmp_path / "bytes.parquet")
    assert heard.evaluate(str(tmp_path / "bytes.parquet")) == expected


def test_other_rates_channels_and_formats_give_the_same_answers(heard, tones, tmp_path):
    paths = sorted((tones / "test").rglob("*.wav"))
    for path in paths:
        wave, _ = soundfile.read(path)
        from scipy.signal import resample

        target = tmp_path / "again" / path.parent.name / f"{path.stem}.flac"
        target.parent.mkdir(parents=True, exist_ok=True)
        both = np.stack([resample(wave, 2 * len(wave))] * 2, axis=1)
        soundfile.write(target, both, 2 * RATE)
    labels = [row["label"] for row in heard.predict([str(path) for path in paths])]
    again = [row["label"] for row in heard.predict(str(tmp_path / "again"))]
    assert again == labels


def test_the_worst_are_named_by_their_files(tiny_ast, tones, tmp_path):
    """Two recordings lie in the wrong folder."""
    folder = shutil.copytree(tones, tmp_path / "tones")
    for number in range(2):
        (folder / f"test/high/0{number}.wav").rename(folder / f"test/low/wrong{number}.wav")
    run = tune(tiny_ast, folder, tmp_path / "run", train__steps=25)
    worst = [json.loads(line) for line in (run.path / "worst.jsonl").read_text().splitlines()]
    assert {row["audio"] for row in worst[:2]} == {
        str(folder / f"test/low/wrong{number}.wav") for number in range(2)
    }
    assert (
        worst[0]["where"] == worst[0]["audio"]
        and worst[0]["expected"] == "low"
        and worst[0]["answer"] == "high"
    )
    shown = json.loads((run.path / "previews.json").read_text())
    assert len(shown) == len(worst) and all(set(row) == {"sound", "spectrogram"} for row in shown)
    page = (run.path / "report.html").read_text()
    assert page.count("<audio controls") == len(worst) and shown[0]["sound"] in page


def test_plan(command, tiny_ast, tones):
    done = command("plan", "--model", tiny_ast, "--task", "audio_classify", "--train", tones / "train",
                   "--method", "head()", "train.epochs=2", "--json")  # fmt: skip
    assert done.status == 0 and json.loads(done.out)["trained_parameters"] == 32 * 2 + 2 + 2 * 32


@pytest.mark.parametrize("name", MAKERS)
def test_exports_are_models_of_transformers_with_the_same_logits(name, tones, tmp_path):
    import transformers

    model = MAKERS[name](tmp_path / "model")
    task = "audio_classify(seconds=0.5)" if name == "wav2vec2-group" else "audio_classify"
    run = tune(
        model, tones, tmp_path / "run", "lora(rank=2, sites='attention') + head()", task, train__steps=3
    )
    done = run.export(tmp_path / "plain")
    assert done["native"] and done["same_answers"] and "audio-classification" in done["load_with"]
    plain = transformers.AutoModelForAudioClassification.from_pretrained(tmp_path / "plain").eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "plain")
    assert plain.config.id2label == {0: "high", 1: "low"}
    path = tones / "test/high/02.wav"
    wave = soundfile.read(path, dtype="float32")[0]
    if extractor.sampling_rate != RATE:
        from graftkit.data.sounds import resample

        wave = resample(wave, RATE, extractor.sampling_rate)
    given = extractor(wave, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    if name == "wav2vec2-group":
        given["input_values"] = torch.nn.functional.pad(given["input_values"], (0, 4000 - len(wave)))
    with torch.no_grad():
        chance = float(plain(**given).logits.softmax(-1).max())
    assert run.predict([str(path)])[0]["probability"] == pytest.approx(chance, abs=2e-4)


def test_a_finished_run_is_adapted_further_with_its_trained_head(heard, tones, tmp_path):
    """What it exports is a backbone: before any step it answers as the run did."""
    heard.export(tmp_path / "plain")
    run = tune(tmp_path / "plain", tones, tmp_path / "run", "norms(lr=1e-9) + head(pooling='own', lr=1e-9)", train__steps=1,
               train__lr=None)  # fmt: skip
    assert run.metrics["accuracy"] == heard.metrics["accuracy"]
    assert run.metrics["loss"] == pytest.approx(heard.metrics["loss"], abs=1e-4)


RESUMED = {
    "ast": ("lora(rank=4, dropout=0.1) + head()", "audio_classify(spec_augment=True, gain=3.0, shift=0.02)"),
    "wav2vec2": ("full(lr=0.001) + head()", "audio_classify(spec_augment=True, seconds=0.4, cut='middle')"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_it_ends_bit_for_bit_the_same(name, tones, tmp_path, monkeypatch):
    """Stripes, gain, shift and wav2vec2's own masks are drawn from generators that each step seeds."""
    import graftkit.runs.monitor

    model = (
        ast(tmp_path / "model")
        if name == "ast"
        else wav2vec2(tmp_path / "model", mask_time_prob=0.5, mask_time_length=4, layerdrop=0.3)
    )
    method, task = RESUMED[name]
    whole = tune(model, tones, tmp_path / "whole", method, task, train__steps=7)
    plain = graftkit.runs.monitor.Watch.log

    def log(self, step):
        plain(self, step)
        if step.number == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(graftkit.runs.monitor.Watch, "log", log)
        with pytest.raises(Interrupted):
            tune(model, tones, tmp_path / "run", method, task, train__steps=7)
    graftkit.resume(tmp_path / "run")
    assert equal_bits(graft_tensors(tmp_path / "run"), graft_tensors(whole.path))
    assert lines(tmp_path / "run") == lines(whole.path)


def test_changed_recordings_are_not_resumed_with(tiny_ast, tones, tmp_path, monkeypatch):
    import graftkit.runs.monitor

    folder = shutil.copytree(tones, tmp_path / "tones")
    plain = graftkit.runs.monitor.Watch.log

    def log(self, step):
        plain(self, step)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(graftkit.runs.monitor.Watch, "log", log)
        with pytest.raises(Interrupted):
            tune(tiny_ast, folder, tmp_path / "run", train__steps=3)
    path = folder / "train/low/00.wav"
    wave, _ = soundfile.read(path)
    soundfile.write(path, wave * 0.5, RATE)
    with pytest.raises(UserError, match="the train rows are not those"):
        graftkit.resume(tmp_path / "run")


def test_kept_outputs_of_frozen_blocks_change_nothing(tiny_ast, tones, tmp_path, monkeypatch):
    import graftkit.engine.cached as forward

    kept = []
    plain = forward.CachedForward.__init__
    monkeypatch.setattr(
        forward.CachedForward,
        "__init__",
        lambda self, *given: (kept.append(given[4].depth), plain(self, *given))[1],
    )
    one = tune(
        tiny_ast, tones, tmp_path / "kept", "unfreeze('blocks[-1:]', lr=0.001) + head()", train__epochs=3.0
    )
    assert kept == [1]
    monkeypatch.setattr(forward, "MEMORY_SHARE", 0)
    two = tune(
        tiny_ast, tones, tmp_path / "plain", "unfreeze('blocks[-1:]', lr=0.001) + head()", train__epochs=3.0
    )
    assert one.metrics["loss"] == pytest.approx(two.metrics["loss"], abs=1e-4)


def own() -> torch.nn.Module:
    torch.manual_seed(0)
    return Bands()


def test_a_module_of_ones_own(tones, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    task = "audio_classify(rate=8000, features='log_mel', n_mels=16, seconds=0.5, mean=-6.0, deviation=4.0)"
    run = tune(
        "test_audio_classify:own", tones, tmp_path / "run", "full(lr=0.01) + head()", task, train__steps=40
    )
    assert run.metrics["accuracy"] > 0.9
    assert run.predict([str(tones / "test/low/00.wav")])[0]["label"] == "low"


def test_wav2vec2_with_masks_off_is_trained_as_a_whole(tones, tmp_path):
    """What stands for masked frames has no part then, and blocks that are left out at random would have no gradient."""
    model = wav2vec2(tmp_path / "model", layerdrop=0.9)
    run = tune(model, tones, tmp_path / "run", "full(lr=0.001) + head()", train__steps=3)
    assert not [name for name in graft_tensors(run.path) if name.endswith("masked_spec_embed")]


# bad recordings

BAD = {
    "empty": (lambda path: path.write_bytes(b""), r"the sound is empty \(0 bytes\)"),
    "header": (lambda path: soundfile.write(path, np.zeros(0), RATE), "has a header but no samples"),
    "silent": (lambda path: soundfile.write(path, np.zeros(2000), RATE), "is silent"),
    "text": (lambda path: path.write_text("no sound"), r"it contains text \('no sound'\)"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-700]), "is cut short"),
    "short": (lambda path: soundfile.write(path, tone(0.01, 200), RATE), "is 10 ms long"),
    "nan": (lambda path: soundfile.write(path, np.full(900, np.nan), RATE, subtype="FLOAT"), "900 samples that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_recordings_are_told_before_training_or_left_out(case, tiny_ast, tones, tmp_path):
    folder = shutil.copytree(tones, tmp_path / "tones")
    spoil, message = BAD[case]
    path = folder / "train/low/03.wav"
    spoil(path)
    with pytest.raises(UserError, match=rf"{path}: .*{message}.*data\.skip_bad=true"):
        tune(tiny_ast, folder, tmp_path / "run", train__steps=1)
    assert not (tmp_path / "run").exists(), "nothing was written"
    values = {
        "model": str(tiny_ast),
        "task": "audio_classify",
        "data": {"train": str(folder / "train"), "eval": None},
    }
    rows = prepare_rows(recipes.make({**values, "data": {**values["data"], "skip_bad": True}}))
    assert len(rows.train) == 23 and len(rows.skipped) == 1 and str(path) in rows.skipped[0]


def test_a_bad_file_is_named_in_predict_and_in_tables(heard, tones, tmp_path, command):
    bad = tmp_path / "bad.wav"
    bad.write_text("nothing to hear")
    done = command("predict", heard.path, tones / "test/low/00.wav", bad)
    assert done.status == 1 and f"{bad}: the sound cannot be decoded: it contains text" in done.err
    done = command("predict", heard.path, tmp_path / "none.wav")
    assert done.status == 1 and "none.wav does not exist" in done.err
    (tmp_path / "table.csv").write_text(f"audio,label\n{tones}/test/low/00.wav,low\nbad.wav,low\n")
    done = command("evaluate", heard.path, "--data", tmp_path / "table.csv")
    assert done.status == 1 and f"table.csv, line 3: {tmp_path}/bad.wav cannot be decoded" in done.err
    (tmp_path / "table.csv").write_text("audio,label\n" + "".join(f"gone{i}.wav,low\n" for i in range(12)))
    done = command("evaluate", heard.path, "--data", tmp_path / "table.csv")
    assert done.status == 1 and "12 of 12 rows point to no file" in done.err and "and 2 more" in done.err


def test_eight_bits_two_channels_and_another_name_are_good(tones, tmp_path):
    folder = shutil.copytree(tones / "train", tmp_path / "train")
    soundfile.write(folder / "low/u8.wav", tone(0.3, 200), RATE, subtype="PCM_U8")
    soundfile.write(folder / "low/stereo.wav", np.stack([tone(0.3, 200)] * 2, axis=1), 44100)
    soundfile.write(folder / "low/flac.flac", np.clip(20 * tone(0.3, 200), -1, 1), RATE)
    (folder / "low/flac.flac").rename(folder / "low/flac.wav")
    values = {"model": "m", "task": "audio_classify", "data": {"train": str(folder), "eval": None}}
    task, rows = AudioClassify(), prepare_rows(recipes.make(values))
    assert len(rows.train) == 27 and not rows.skipped
    from graftkit.tasks.audio_classify.inputs import Waveform
    from graftkit.tasks.audio_classify.rows import Augmentation, SoundDataset

    data = SoundDataset(rows.train, Waveform(Bands(), 8000, 0.0, 1.0), 8000, "start", False, Augmentation())
    found = task.statistics(data, rows.labels)
    assert (
        found["rates"] == {"8000 Hz": 26, "44100 Hz": 1}
        and found["channels"] == {"mono": 26, "stereo": 1}
        and found["clipped"] == 1
    )


def test_weights_by_the_rarity_of_a_class(tiny_ast, tones, tmp_path):
    folder = shutil.copytree(tones, tmp_path / "tones")
    for number in range(9):
        (folder / f"train/low/{number:02}.wav").unlink()
    run = tune(
        tiny_ast, folder, tmp_path / "run", task="audio_classify(class_weights='balanced')", train__steps=20
    )
    assert run.metrics["macro_f1"] > 0.8


def test_the_name_may_be_written_with_a_hyphen():
    values = {"model": "m", "task": "audio-classify(cut=middle)", "data": {"train": "x"}}
    assert recipes.make(values).task == "audio_classify(cut=middle)"


def test_data_check_tells_of_all_bad_recordings_at_once(tones, tmp_path, command):
    folder = shutil.copytree(tones / "train", tmp_path / "train")
    for place, case in enumerate(BAD):
        BAD[case][0](folder / f"low/{place:02}.wav")
    (folder / "low/notes.txt").write_text("about the recordings")
    done = command(
        "data", "check", "--model", "m", "--task", "audio_classify", "--train", folder, "--eval", "null"
    )
    assert done.status == 1
    told = done.out + done.err
    for place in range(len(BAD)):
        assert f"low/{place:02}.wav" in told
    assert "notes.txt has the ending '.txt', which no sound has" in told
