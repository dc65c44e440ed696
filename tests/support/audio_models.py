"""Tiny sound models with their feature extractors, and recordings to train them on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers as hf

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
RATE = 8000


def save(model: torch.nn.Module, extractor, folder: Path) -> Path:
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def wav2vec2(folder: Path, norm: str = "layer", **settings) -> Path:
    """Frames of 10 ms. `norm` 'layer': it wants a mask; 'group': it has none."""
    torch.manual_seed(0)
    config = hf.Wav2Vec2Config(
        **SIZES, conv_dim=[16, 16, 16], conv_stride=[5, 4, 4], conv_kernel=[10, 8, 4], num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer",
        conv_bias=norm == "layer", classifier_proj_size=24, **settings,
    )  # fmt: skip
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=norm == "layer")
    return save(hf.Wav2Vec2Model(config), extractor, folder)


def ast(folder: Path) -> Path:
    """64 frames of 20 ms, 16 mel bands, far enough from zero that sounds can be told apart at once."""
    torch.manual_seed(0)
    config = hf.ASTConfig(
        **SIZES, patch_size=8, max_length=64, num_mel_bins=16, frequency_stride=8, time_stride=8
    )
    model = hf.ASTModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        torch.nn.init.normal_(model.embeddings.cls_token)
        torch.nn.init.normal_(model.embeddings.distillation_token)
    extractor = hf.ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=16, max_length=64)
    return save(model, extractor, folder)


def whisper(folder: Path) -> Path:
    """100 frames in one second: the encoder's 50 positions behind a stride of 2."""
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, decoder_layers=1,
        decoder_attention_heads=4, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=50, vocab_size=60,
        classifier_proj_size=24, pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2,
    )  # fmt: skip
    extractor = hf.WhisperFeatureExtractor(feature_size=8, sampling_rate=16000, chunk_length=1)
    return save(hf.WhisperForAudioClassification(config), extractor, folder)


MAKERS = {
    "wav2vec2": wav2vec2,
    "wav2vec2-group": lambda folder: wav2vec2(folder, "group"),
    "ast": ast,
    "whisper": whisper,
}


def tone(seconds: float, hertz: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """A sine with some noise, between -0.4 and 0.4."""
    draw = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * hertz * times + draw.uniform(0, 6)) + 0.02 * draw.standard_normal(
        len(times)
    )


def write_tones(folder: Path, count: int, seed: int) -> Path:
    """Folders `high` and `low` of `count` recordings each, 0.2 to 0.5 seconds long."""
    import soundfile

    draw = np.random.default_rng(seed)
    for label, hertz in (("high", 1500), ("low", 200)):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            wave = tone(draw.uniform(0.2, 0.5), hertz * draw.uniform(0.8, 1.2), seed=seed * 1000 + number)
            soundfile.write(folder / label / f"{number:02}.wav", wave, RATE)
    return folder


class Bands(torch.nn.Module):
    """A user's own network on log-mel spectrograms (rows, bands, frames)."""

    def __init__(self, bands: int = 16) -> None:
        super().__init__()
        self.first = torch.nn.Conv1d(bands, 24, 5, padding=2)
        self.norm = torch.nn.BatchNorm1d(24)
        self.second = torch.nn.Conv1d(24, 24, 5, padding=2)
        self.classifier = torch.nn.Linear(24, 5)

    def forward(self, spectrogram: torch.Tensor) -> torch.Tensor:
        states = torch.relu(self.norm(self.first(spectrogram)))
        return self.classifier(torch.relu(self.second(states)).mean(dim=-1))


class Masked(torch.nn.Module):
    """A user's own network on samples, told of padding: the mean of frames of 80 samples that are real."""

    hidden_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.frames = torch.nn.Conv1d(1, 16, 80, stride=80)
        self.output = torch.nn.Linear(16, 16)

    def forward(self, samples: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = torch.relu(self.frames(samples[:, None])).mT
        real = attention_mask[:, 79::80][:, : states.shape[1]].unsqueeze(-1).to(states.dtype)
        return self.output((states * real).sum(1) / real.sum(1).clamp(min=1))
