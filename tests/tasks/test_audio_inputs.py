"""From waveforms to what models take: extractors, masks, spectrograms, augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from audio_models import MAKERS, RATE, Bands, Masked, tone, wav2vec2
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from graftkit.backbone import Backbone
from graftkit.backbone.load import load_backbone
from graftkit.backbone.source import find_source
from graftkit.data.read import read_table
from graftkit.data.source import Pass
from graftkit.errors import UserError
from graftkit.tasks.audio_classify.inputs import log_mel
from graftkit.tasks.audio_classify.rows import Augmentation
from graftkit.tasks.audio_classify.task import AudioClassify

COLUMNS = {"audio": "audio"}
WAVES = [tone(seconds, 300, seed=number) for number, seconds in enumerate((0.31, 0.5, 0.24, 1.4))]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    made: dict[str, Backbone] = {}

    def of(name: str) -> Backbone:
        if name not in made:
            folder = MAKERS[name](tmp_path_factory.mktemp("sound") / name)
            made[name] = load_backbone(
                find_source(str(folder)), "AutoModelForAudioClassification", labels="ab"
            )
            made[name].model.requires_grad_(False)
        return made[name]

    return of


def examples(task: AudioClassify, waves=WAVES, rate: int = RATE):
    table = read_table({"audio": [{"array": wave, "sampling_rate": rate} for wave in waves]})
    return task.examples(table, COLUMNS, (), False, targets=False)


def dataset(
    backbone: Backbone, task: AudioClassify | None = None, waves=WAVES, training: bool = False, rate=RATE
):
    task = task or AudioClassify()
    return task.dataset(examples(task, waves, rate), backbone, task.max_length(None, backbone), training)


def test_wav2vec2_gets_what_its_extractor_gives_with_a_mask(backbone):
    data = dataset(backbone("wav2vec2"))
    rows = np.array([0, 2, 1])
    found = data.batch(rows).inputs
    expected = backbone("wav2vec2").processor(
        [WAVES[row].astype(np.float32) for row in rows], sampling_rate=RATE, padding=True, return_tensors="pt"
    )
    assert set(found) == {"input_values", "attention_mask"}
    assert torch.allclose(found["input_values"], expected["input_values"], atol=1e-5)
    assert torch.equal(found["attention_mask"], expected["attention_mask"].long())
    assert (
        data.lengths.tolist() == [len(wave) for wave in WAVES] and data.unit == "samples" and not data.uniform
    )


def test_with_its_mask_an_answer_does_not_depend_on_the_batch(backbone):
    data, model = dataset(backbone("wav2vec2")), backbone("wav2vec2").model
    together = data.call(model, data.batch(np.arange(4)))
    for row in range(4):
        alone = data.call(model, data.batch(np.array([row])))
        assert torch.allclose(alone[0], together[row], atol=1e-5)


def test_a_model_with_group_norm_gets_no_mask_and_each_row_is_normed_alone(backbone):
    """As its authors trained it (see Wav2Vec2FeatureExtractor); in a batch transformers would norm over the padding."""
    data = dataset(backbone("wav2vec2-group"))
    found = data.batch(np.array([0, 1])).inputs
    assert set(found) == {"input_values"}
    alone = backbone("wav2vec2-group").processor(
        WAVES[0].astype(np.float32), sampling_rate=RATE, return_tensors="pt"
    )
    assert torch.allclose(found["input_values"][0, : len(WAVES[0])], alone["input_values"][0], atol=1e-5)
    assert not found["input_values"][0, len(WAVES[0]) :].any()


def test_without_a_mask_seconds_pads_all_rows_to_one_length(backbone):
    data, model = (
        dataset(backbone("wav2vec2-group"), AudioClassify(seconds=0.6)),
        backbone("wav2vec2-group").model,
    )
    assert data.uniform and data.batch(np.array([0])).inputs["input_values"].shape == (1, 4800)
    assert data.lengths.tolist() == [2480, 4000, 1920, 4800] and data.truncated == 1
    together = data.call(model, data.batch(np.arange(4)))
    alone = data.call(model, data.batch(np.array([2])))
    assert torch.allclose(alone[0], together[2], atol=1e-5)


@pytest.mark.parametrize(("name", "shape", "rate"), [("ast", (64, 16), 8000), ("whisper", (8, 100), 16000)])
def test_spectrograms_of_one_size_are_the_extractors_own(backbone, name, shape, rate):
    waves = [tone(len(wave) / RATE, 300, rate, seed=number) for number, wave in enumerate(WAVES[:3])]
    data = dataset(backbone(name), waves=waves, rate=rate)
    processor = backbone(name).processor
    [(key, found)] = data.batch(np.arange(3)).inputs.items()
    expected = processor(
        [wave.astype(np.float32) for wave in waves], sampling_rate=rate, return_tensors="pt"
    )[key]
    assert data.uniform and data.keeps and found.shape == (3, *shape) and found.dtype == torch.float32
    assert torch.allclose(found, expected.float(), atol=1e-4)
    assert data.call(backbone(name).model, data.batch(np.arange(3))).shape == (3, 2)


def test_what_is_longer_than_the_model_takes_is_cut_and_counted(backbone):
    """AST: 64 frames of 400 samples, one each 160 samples."""
    data = dataset(backbone("ast"))
    assert data.longest == 400 + 63 * 160 == 10480 and data.truncated == 1
    assert data.lengths[3] == 10480
    with pytest.raises(
        UserError, match=r"seconds=2.0.* is 16,000 samples, but .* takes 10,480 at most \(1.31 s\)"
    ):
        AudioClassify(seconds=2.0).max_length(None, backbone("ast"))
    with pytest.raises(UserError, match=r"data\.max_length is 16,000 samples"):
        AudioClassify().max_length(16000, backbone("ast"))
    assert AudioClassify(seconds=0.5).max_length(None, backbone("ast")) == 4000
    assert AudioClassify().max_length(None, backbone("wav2vec2")) == 30 * RATE
    middle = dataset(backbone("wav2vec2"), AudioClassify(seconds=0.5, cut="middle"))
    wave = WAVES[3][3600:7600].astype(np.float32)
    found = middle.batch(np.array([3])).inputs["input_values"][0].numpy()
    assert np.allclose(found, (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7), atol=1e-4)


def test_sounds_are_resampled_to_the_models_rate(backbone):
    data = dataset(backbone("ast"), waves=[tone(0.5, 300, 16000)], rate=16000)
    assert data.lengths.tolist() == [4000]
    assert AudioClassify().statistics(data, ())["rates"] == {"16000 Hz": 1}


@pytest.mark.parametrize(("window", "hop", "size"), [(200, 80, 256), (401, 160, 512), (256, 256, 256)])
def test_log_mel_equals_that_of_transformers(window, hop, size):
    wave = WAVES[0].astype(np.float32)
    filters = mel_filter_bank(size // 2 + 1, 20, 0.0, 4000.0, 8000, norm="slaney", mel_scale="slaney")
    expected = spectrogram(
        wave, window_function(window, "hann"), window, hop, size, power=2.0, center=True, pad_mode="constant",
        mel_filters=filters, log_mel="log",
    )  # fmt: skip
    found = log_mel(wave, filters, window, hop, size)
    assert found.shape == (len(wave) // hop + 1, 20)
    assert np.allclose(found, expected.T, atol=1e-4)


def test_a_module_of_ones_own_takes_a_spectrogram_as_the_recipe_says():
    task = AudioClassify(rate=8000, features="log_mel", n_mels=16, seconds=0.5, mean=-4.0, deviation=2.0)
    data = dataset(Backbone(Bands()), task)
    [(name, found)] = data.batch(np.arange(4)).inputs.items()
    assert name == "spectrogram" and found.shape == (4, 16, 51) and data.uniform
    filters = mel_filter_bank(129, 16, 0.0, 4000.0, 8000, norm="slaney", mel_scale="slaney")
    wave = np.pad(WAVES[0], (0, 4000 - len(WAVES[0]))).astype(np.float32)
    expected = (log_mel(wave, filters, 200, 80, 256) + 4) / 2
    assert np.allclose(found[0].numpy(), expected.T, atol=1e-5)


def test_a_module_that_takes_a_mask_gets_rows_of_their_own_length():
    data = dataset(Backbone(Masked()), AudioClassify(rate=8000))
    found = data.batch(np.array([0, 1])).inputs
    assert list(found) == ["samples", "attention_mask"] and found["samples"].shape == (2, 4000)
    assert found["attention_mask"].sum(1).tolist() == [2480, 4000]
    assert np.allclose(found["samples"][0, :2480], WAVES[0], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Bands, {}, r"nothing says which sampling rate .* audio_classify\(rate=16000\)"),
        (Bands, {"rate": 8000, "features": "log_mel"}, r"takes no attention_mask.* audio_classify\(seconds=\.\.\.\)"),
        (Bands, {"rate": 8000, "seconds": 1.0}, "cannot take spectrogram of shape 8000"),
        (Bands, {"rate": 8000, "seconds": 1.0, "features": "log_mel"}, "cannot take spectrogram of shape 101x64"),
        (Bands, {"rate": 8000, "seconds": 1.0, "features": "log_mel", "hop": 1e-5}, "are 200 and 0 samples"),
        (Bands, {"rate": 8000, "seconds": 1.0, "features": "log_mel", "n_mels": 200}, "lower n_mels, or raise window"),
        (Masked, {"rate": 8000, "spec_augment": True}, "masks nothing itself; use gain or shift"),
    ],
)  # fmt: skip
def test_transforms_that_do_not_fit(make, options, message):
    with pytest.raises(UserError, match=message):
        dataset(Backbone(make()), AudioClassify(**options), training=True)


def test_options_of_own_modules_are_refused_beside_an_extractor(backbone):
    for options, message in (({"rate": 16000}, "rate=16000"), ({"features": "log_mel"}, "features")):
        with pytest.raises(UserError, match=rf"audio_classify\({message}\) is for modules of your own"):
            AudioClassify(**options).front(backbone("ast"))
    assert AudioClassify(rate=8000).front(backbone("ast")).rate == 8000
    with pytest.raises(UserError, match="has no feature extractor of sounds"):
        AudioClassify().front(Backbone(backbone("ast").model))


def test_an_extractor_in_a_processor_beside_a_tokenizer_is_found(tmp_path):
    """As transformers 5 writes models that were trained to write text."""
    folder = wav2vec2(tmp_path / "model")
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "<unk>": 1, "|": 2, "<s>": 3, "</s>": 4, "a": 5}')
    extractor = hf.AutoFeatureExtractor.from_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    tokenizer = hf.Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
    hf.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    loaded = load_backbone(find_source(str(folder)), "AutoModelForAudioClassification", labels="ab")
    AudioClassify().settle(loaded)
    assert AudioClassify().front(loaded).rate == RATE


def test_an_extractor_that_is_not_the_models(backbone):
    wrong = hf.ASTFeatureExtractor(sampling_rate=8000, num_mel_bins=16, max_length=96)
    with pytest.raises(
        UserError, match=r"cannot take input_values of shape 96x16: .*Use a feature extractor"
    ):
        dataset(Backbone(backbone("ast").model, wrong))


def test_sounds_too_short_for_the_model_are_all_named(backbone):
    short = [tone(0.04, 300), tone(0.5, 300), tone(0.03, 300), tone(0.051, 300)]
    with pytest.raises(
        UserError, match=r"2 of 4 sounds are too short .*, 0.04 s or less: .*row 3, .*row 1\. Remove"
    ):
        dataset(backbone("ast"), waves=short)
    assert len(dataset(backbone("wav2vec2"), waves=short)) == 4
    task = AudioClassify(window=0.001)
    with pytest.raises(UserError, match="1 of 2 sounds are too short"):
        dataset(backbone("wav2vec2"), task, waves=[tone(0.005, 300), tone(0.5, 300)])


def drawn(data, seed: int, rows=(0, 1)) -> torch.Tensor:
    return next(iter(data.inputs(np.array(rows), Pass(seed)).values()))


def test_augmentation_is_a_function_of_seed_epoch_and_row_and_only_in_training(backbone):
    task = AudioClassify(spec_augment=True, gain=6.0, shift=0.05)
    data = dataset(backbone("ast"), task, training=True)
    assert torch.equal(drawn(data, 1), drawn(data, 1)) and not torch.equal(drawn(data, 1), drawn(data, 2))
    assert not data.keeps, "a row is another one in each epoch"
    together = data.inputs(np.array([2, 0, 1]), Pass(1, 3))["input_values"]
    for place, row in enumerate((2, 0, 1)):
        alone = data.inputs(np.array([row]), Pass(1, 3))["input_values"][0]
        assert torch.equal(together[place], alone), "whatever stands beside it"
        assert not torch.equal(alone, data.inputs(np.array([row]), Pass(1, 4))["input_values"][0])
    plain = dataset(backbone("ast"), task)
    assert plain.keeps and torch.equal(drawn(plain, 1), drawn(plain, 2))
    assert torch.equal(drawn(plain, 1), drawn(dataset(backbone("ast")), 1))


def test_stripes_are_the_mean_and_within_their_shares_and_the_real_frames():
    random = np.random.default_rng(1)
    features = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    features[15:] = 9.0  # padding
    before = features.copy()
    augmentation = Augmentation(masks=1, time=0.4, frequency=0.25)
    widths = []
    for _ in range(200):
        found = augmentation.features(features, 0, 15, random)
        assert (features == before).all() and (found[15:] == 9.0).all()
        changed = found[:15] != before[:15]
        assert np.allclose(found[:15][changed], before[:15].mean())
        frames, bands = changed.all(axis=1).sum(), changed.all(axis=0).sum()
        assert changed.sum() == frames * 8 + bands * 15 - frames * bands
        widths.append((frames, bands))
    assert {frames for frames, _ in widths} == set(range(7)) and {bands for _, bands in widths} == {0, 1, 2}
    turned = augmentation.features(features.T.copy(), 1, 15, random)
    assert turned.shape == (8, 20) and (turned[:, 15:] == 9.0).all()


def test_gain_and_shift():
    random = np.random.default_rng(0)
    wave = WAVES[0].astype(np.float32)
    gains = [np.abs(Augmentation(gain=6.0).wave(wave, random)).max() / np.abs(wave).max() for _ in range(300)]
    assert 0.5 < min(gains) < 0.52 and 1.9 < max(gains) < 2.0  # 6 dB are a factor of 1.995
    for _ in range(50):
        moved = Augmentation(shift=100).wave(wave, random)
        assert len(moved) == len(wave)
        by = int(np.argmax(signal_of(moved, wave))) - (len(wave) - 1)
        assert abs(by) <= 100
        kept = slice(max(by, 0), len(wave) + min(by, 0))
        assert np.array_equal(moved[kept], wave[max(-by, 0) : len(wave) - max(by, 0)])
        assert not np.delete(moved, np.r_[kept]).any()


def signal_of(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.correlate(left, right, mode="full")


def test_wav2vec2_masks_its_own_frames_only_where_the_task_says(tmp_path):
    folder = wav2vec2(tmp_path / "model", mask_time_prob=0.5, mask_time_length=4, hidden_dropout=0.0,
                      activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.5)  # fmt: skip
    results = {}
    for spec_augment in (False, True):
        task = AudioClassify(spec_augment=spec_augment)
        loaded = load_backbone(find_source(str(folder)), "AutoModelForAudioClassification", labels="ab")
        task.settle(loaded)
        assert loaded.idle == (set() if spec_augment else {"wav2vec2.masked_spec_embed"})
        data = dataset(loaded, task, training=True)
        assert data.keeps, "the frozen prefix masks nothing"
        loaded.model.train()
        batch = data.batch(np.arange(3))
        np.random.seed(0)
        first, second = (data.call(loaded.model, batch) for _ in range(2))
        np.random.seed(0)
        results[spec_augment] = (
            torch.equal(first, second),
            torch.equal(first, data.call(loaded.model, batch)),
        )
    assert results == {False: (True, True), True: (False, True)}
    with pytest.raises(UserError, match=r"row 1 gives 2 frames, fewer than the 4 that .* masks at once"):
        dataset(loaded, AudioClassify(spec_augment=True), waves=[tone(0.03, 300)], training=True)
