"""Classification of sounds: one answer of several for a recording."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.data.columns import Column
from graftkit.data.folders import given_files, locate_files, read_files, stream_files
from graftkit.data.previews import excerpt, spectrogram, spectrogram_of
from graftkit.data.read import Table
from graftkit.data.sounds import SUFFIXES, BadSound, Sound, look
from graftkit.errors import UserError, listing
from graftkit.libraries import method_of
from graftkit.recipe.catalogue import option
from graftkit.tasks.audio_classify.inputs import (
    Extractor,
    Front,
    LogMel,
    Waveform,
    extractor_beside,
    extracts_sound,
    masks_itself,
)
from graftkit.tasks.audio_classify.rows import Augmentation, SoundDataset
from graftkit.tasks.base import Dataset, Examples, Reading, check_rows
from graftkit.tasks.explained import Cut, slices
from graftkit.tasks.shared.labels import (
    LABEL,
    LabelIndex,
    LabelTask,
    is_missing,
    label_problem,
    label_text,
)
from graftkit.tasks.shared.weights import check_class_weights, class_weights

AUDIO = ("file", "path", "sound", "wav", "file_name", "filename", "recording", "clip", "speech")
CHANNELS = {1: "mono", 2: "stereo"}
SECONDS = 30.0  # of a sound at most, where neither the recipe nor the model says


@dataclass(frozen=True)
class AudioClassify(LabelTask):
    """One of several labels for a sound: WAV, FLAC, OGG or MP3 files, in one folder per class or listed in a table."""

    aliases: ClassVar[tuple[str, ...]] = ("audio_classification",)
    columns: ClassVar[tuple[Column, ...]] = (Column("audio", AUDIO, "text"), Column("label", LABEL, "label"))
    modality: ClassVar[str] = "audio"
    one_answer: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("AUDIO_CLASSIFICATION",)
    calibrates: ClassVar[str | None] = "label"

    seconds: float | None = option(
        None, "longer sounds are cut to this length; null: the model's limit, at most 30", above=0
    )
    cut: str = option("start", "which part of a longer sound is used", choices=("start", "middle"))
    silence: bool = option(False, "accept silent sounds, for example if silence is a class")
    class_weights: str | dict | None = option(
        None, "'balanced' weights rows inversely to the frequency of their class; or a weight per class, {label: weight}",
        choices=("balanced",),
    )  # fmt: skip
    spec_augment: bool = option(
        False,
        "mask bands of time and frequency in training; wav2vec2 and similar models mask as their config sets",
    )
    masks: int = option(
        2, "number of time and of frequency masks of spec_augment on spectrograms", at_least=1
    )
    time_mask: float = option(
        0.15, "maximum width of a time mask, as a share of the frames", at_least=0, at_most=1
    )
    frequency_mask: float = option(
        0.15, "maximum width of a frequency mask, as a share of the bands", at_least=0, at_most=1
    )
    gain: float = option(
        0.0, "maximum random gain in training, in decibels up or down", at_least=0, at_most=60
    )
    shift: float = option(0.0, "maximum random shift in training, in seconds earlier or later", at_least=0)
    rate: int | None = option(None, "sampling rate of your own module, in Hz", at_least=1000, at_most=768000)
    features: str | None = option(
        None, "input of your own module; null: the waveform", choices=("waveform", "log_mel")
    )
    n_mels: int = option(64, "number of mel bands of features='log_mel'", at_least=1)
    window: float = option(
        0.025, "window length of features='log_mel' in seconds; also the shortest sound accepted", above=0
    )
    hop: float = option(0.01, "hop length of features='log_mel' in seconds", above=0)
    mean: float = option(0.0, "subtracted from the input of your own module")
    deviation: float = option(1.0, "the input of your own module is divided by it, after the mean", above=0)

    def read(self, source: Any, reading: Reading, name: str) -> Table:
        return read_files(
            source, suffixes=SUFFIXES, column="audio", noun="sound", name=name, encoding=reading.encoding,
            skip_bad=reading.skip_bad,
        )  # fmt: skip

    def pieces(self, source: Any, reading: Reading, name: str, rows: int) -> Iterator[Table]:
        return stream_files(
            source, suffixes=SUFFIXES, column="audio", noun="sound", name=name, encoding=reading.encoding,
            skip_bad=reading.skip_bad, rows=rows,
        )  # fmt: skip

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        index = LabelIndex(labels)
        files, missing = locate_files(table, columns["audio"], noun="sound", skip_bad=skip_bad)
        sounds: list[Sound] = []

        def problem(row: int) -> str | None:
            if row in missing:
                return missing[row]
            if targets:
                value = table.columns[columns["label"]][row]
                if is_missing(value):
                    return f"{table.where(row)}: column {columns['label']!r} is empty."
                found = label_problem(value, index)
                if found is not None:
                    return f"{table.where(row)}: {found}"
            try:
                sounds.append(look(files[row], shortest=self.window, silence=self.silence))
            except BadSound as error:
                path = files[row] if isinstance(files[row], str) else ""
                named = "" if path in ("", table.where(row)) else f": {path}"
                return (
                    f"{table.where(row)}{named} {error}."
                    if named
                    else f"{table.where(row)}: the sound {error}."
                )
            return None

        kept, skipped = check_rows(table, problem, skip_bad)
        numbers = None
        if targets:
            found = [index.find(label_text(value)) for value in kept.columns[columns["label"]]]
            numbers = np.array(found, dtype=np.int64)
        names = [_name(value, kept.where(row)) for row, value in enumerate(kept.columns[columns["audio"]])]
        return Examples(kept, {"audio": sounds, "name": names}, numbers, skipped)

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        """Rows of a list of paths, or of arrays with their sampling rate in pairs; None for a table already."""
        if not items:
            raise UserError("there is no sound to answer; give one or more files, or --data.")
        if all(isinstance(item, dict) and set(item) & {"array", "bytes"} for item in items):
            return [{columns["audio"]: item} for item in items]
        return given_files(items, columns["audio"], "sound")

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        return "sound.wav"

    def asked(self, examples: Examples, row: int) -> dict[str, Any]:
        return {"audio": examples.values["name"][row]}

    def divide(self, dataset: Dataset, row: int, backbone: Backbone, inputs: dict[str, Tensor]) -> Cut:
        assert isinstance(dataset, SoundDataset)
        front, values = dataset.front, inputs[dataset.front.name]
        share = dataset.lengths[row] / dataset.longest if dataset.uniform else 1.0
        frames = max(1, round(share * values.shape[1 + front.axis]))
        return slices(values, front.axis, frames, dataset.lengths[row] / front.rate, front.name)

    def pictured(self, dataset: Dataset, row: int, inputs: dict[str, Tensor]) -> np.ndarray:
        assert isinstance(dataset, SoundDataset)
        rate = dataset.front.rate
        return spectrogram_of(dataset.sounds[row].piece(rate, dataset.longest, dataset.cut), rate)

    def preview(self, examples: Examples, row: int) -> dict[str, str]:
        sound: Sound = examples.values["audio"][row]
        return {"sound": excerpt(sound, self.cut), "spectrogram": spectrogram(sound, self.cut)}

    def settle(self, backbone: Backbone) -> None:
        config: Any = getattr(backbone.model, "config", None)
        if hasattr(
            backbone.processor, "pad_token_id"
        ):  # folders of models that write text have a tokenizer too
            backbone.processor = extractor_beside(backbone) or backbone.processor
        if masks_itself(backbone.model):
            config.apply_spec_augment = self.spec_augment
        if getattr(
            config, "layerdrop", 0
        ):  # a block that is left out has no gradient, which the audit takes for a fault
            config.layerdrop = 0.0

    def front(self, backbone: Backbone) -> Front:
        """What turns waveforms into the model's input. Raises `UserError` where nothing says how."""
        if extracts_sound(backbone.processor):
            rate = int(backbone.processor.sampling_rate)
            if self.features is not None or self.rate not in (None, rate):
                given = "features" if self.features is not None else f"rate={self.rate}"
                raise UserError(
                    f"{self.name}({given}) is for modules of your own, but {backbone.source} brings a feature extractor, "
                    f"for {rate} Hz; leave it out."
                )
            return Extractor(backbone)
        if hasattr(backbone.model, "config") or backbone.processor is not None:
            raise UserError(
                f"{backbone.source} has no feature extractor of sounds (preprocessor_config.json), which {self.name}() "
                "needs; save the one that the model was trained with there."
            )
        if self.rate is None:
            raise UserError(
                f"nothing says which sampling rate {backbone.source} takes; name it: {self.name}(rate=16000)."
            )
        values = backbone.model, self.rate, self.mean, self.deviation
        front = (
            LogMel(*values, self.n_mels, self.window, self.hop)
            if self.features == "log_mel"
            else Waveform(*values)
        )
        if not front.mask and self.seconds is None:
            raise UserError(
                f"forward of {backbone.source} takes no attention_mask, so all sounds have to be padded to one length; "
                f"name it: {self.name}(seconds=...)."
            )
        return front

    def max_length(self, wanted: int | None, backbone: Backbone) -> int:
        """Samples of a row at most, at the model's sampling rate."""
        front = self.front(backbone)
        most = front.longest or round(SECONDS * front.rate)
        if self.seconds is not None:
            most = round(self.seconds * front.rate)
        for given, name in ((wanted, "data.max_length"), (most, f"{self.name}(seconds={self.seconds})")):
            if given is not None and front.longest is not None and given > front.longest:
                raise UserError(
                    f"{name} is {given:,} samples, but {backbone.source} takes {front.longest:,} at most "
                    f"({front.longest / front.rate:.4g} s)."
                )
        return most if wanted is None else min(wanted, most)

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> Dataset:
        front = self.front(backbone)
        augmentation = self._augmentation(front, backbone) if training else Augmentation()
        padded = self.seconds is not None and not front.fixed and not front.mask
        made = SoundDataset(examples, front, max_length, self.cut, padded, augmentation)
        made.refuse_misfits(backbone)
        if training and self.spec_augment and masks_itself(backbone.model):
            self._refuse_short(made, backbone)
        return made

    def _augmentation(self, front: Front, backbone: Backbone) -> Augmentation:
        inside = masks_itself(backbone.model)
        if self.spec_augment and front.time is None and not inside:
            raise UserError(
                f"{self.name}(spec_augment=True) masks spectrograms, but {backbone.source} takes waveforms and masks "
                "nothing itself; use gain or shift."
            )
        masks = self.masks if self.spec_augment and not inside else 0
        shift = round(self.shift * front.rate)
        return Augmentation(self.gain, shift, masks, self.time_mask if masks else 0.0,
                            self.frequency_mask if masks else 0.0)  # fmt: skip

    def _refuse_short(self, dataset: SoundDataset, backbone: Backbone) -> None:
        """Raise `UserError` where the model's own masks are longer than a sound."""
        config: Any = backbone.model.config
        frames = method_of(backbone.model, "_get_feat_extract_output_lengths")
        row = int(dataset.lengths.argmin())
        if frames is None or config.mask_time_prob <= 0:
            return
        shortest = int(frames(dataset.longest if dataset.padded else int(dataset.lengths[row])))
        if shortest < config.mask_time_length:
            raise UserError(
                f"{self.name}(spec_augment=True): {dataset.where(row)} gives {shortest} frames, fewer than the "
                f"{config.mask_time_length} that {backbone.source} masks at once (mask_time_length in its config). Lower "
                "that, or leave spec_augment out."
            )

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        names = super().label_names(table, columns, skip_bad)
        check_class_weights(self.class_weights, names, self.name)
        return names

    def class_weight(self, counts: np.ndarray, labels: Sequence[str]) -> Tensor | None:
        return class_weights(self.class_weights, counts, labels)

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        """With seconds, sampling rates and channels as they were handed over, and how many sounds are clipped."""
        sounds: list[Sound] = dataset.examples.values["audio"]
        seconds = np.array([sound.seconds for sound in sounds])
        rates, channels = (
            Counter(values) for values in zip(*((sound.rate, sound.channels) for sound in sounds))
        )
        clipped = [row for row, sound in enumerate(sounds) if sound.clipped]
        found = {
            **super().statistics(dataset, labels),
            "seconds": {"sum": round(float(seconds.sum()), 3), "mean": round(float(seconds.mean()), 3),
                        "shortest": round(float(seconds.min()), 3), "longest": round(float(seconds.max()), 3)},
            "rates": {f"{rate} Hz": count for rate, count in sorted(rates.items())},
            "channels": {CHANNELS.get(number, str(number)): count for number, count in sorted(channels.items())},
            "clipped": len(clipped),
        }  # fmt: skip
        if clipped:
            found["notes"] = [f"clipped: {listing(map(dataset.where, clipped), 3)}"]
        return found


def _name(value: Any, where: str) -> str:
    """What a sound is called in answers: its path as handed over, or its place."""
    if isinstance(value, dict):
        value = value.get("path") or where
    return os.fspath(value) if isinstance(value, str | os.PathLike) else where
