"""Ants and bees: a new head on the mean features of a frozen SqueezeNet, beside a plain PyTorch loop.

The loop is that of PyTorch's transfer-learning tutorial for a fixed feature extractor (a `DataLoader` that decodes each image
anew, zero_grad, forward, backward, step), with the same head, dropout, batch, epochs, optimizer and schedule as GraftKit. Both
resize the shorter side to 256 and crop the middle: the network's images are of 227 pixels. There is no augmentation on either
side, and the 153 images of `val` are looked at once, after training. torchvision is not needed: Pillow resizes as it does.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT

from compared.measures import peak_memory

DATA = ROOT.parent / "shared" / "data" / "ants_bees"
WEIGHTS = ROOT.parent / "shared" / "models" / "squeezenet1_0.safetensors"
RESIZE, CROP, MEAN = 256, 227, (104.0, 117.0, 123.0)  # blue, green, red
BATCH, EPOCHS, LR, DROPOUT, FEATURES = 32, 25, 2e-3, 0.5, 512
QUICK_IMAGES, QUICK_EPOCHS = 6, 2


def graftkit_side(seed: int, quick: bool) -> dict:
    sys.path.append(str(ROOT))  # where `examples` is
    import graftkit
    from graftkit.runs.predict import evaluate  # noqa: F401  (imports are not part of the time on either side)

    with tempfile.TemporaryDirectory() as folder:
        data = few(Path(folder, "data")) if quick else DATA
        start = time.perf_counter()
        run = graftkit.tune(
            model="examples.squeezenet:squeezenet", weights=WEIGHTS, train=str(data / "train"), out=f"{folder}/run",
            task=f"image_classify(resize={RESIZE}, crop={CROP}, channels='BGR', scale=1, mean={[int(m) for m in MEAN]})",
            method=f"head(pooling='mean', dropout={DROPOUT}, lr={LR})", settings={
                "train.epochs": QUICK_EPOCHS if quick else EPOCHS, "train.batch_size": BATCH, "train.warmup": 0.0,
                "data.eval": None, "seed": seed, "train.weight_decay": 0.0,
            },
        )  # fmt: skip
        seconds, memory = time.perf_counter() - start, peak_memory()
        return {"seconds": seconds, "accuracy": run.evaluate(str(data / "val"))["accuracy"], "memory": memory}


def loop_side(seed: int, quick: bool, workers: int = 0) -> dict:
    import torch
    from safetensors.torch import load_file
    from torch import nn
    from torch.utils.data import DataLoader

    sys.path.append(str(ROOT))
    from examples.squeezenet import squeezenet

    with tempfile.TemporaryDirectory() as folder:
        data = few(Path(folder, "data")) if quick else DATA
        epochs = QUICK_EPOCHS if quick else EPOCHS
        start = time.perf_counter()
        torch.manual_seed(seed)
        body = squeezenet()
        body.load_state_dict(load_file(WEIGHTS))
        body.requires_grad_(False)
        pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(DROPOUT), nn.Linear(FEATURES, 2)
        )
        body.classifier = pooled
        loader = DataLoader(Images(data / "train"), BATCH, shuffle=True, num_workers=workers)
        optimizer = torch.optim.AdamW(pooled.parameters(), lr=LR, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * len(loader))
        criterion = nn.CrossEntropyLoss()
        body.train()
        for _ in range(epochs):
            for inputs, labels in loader:
                optimizer.zero_grad()
                criterion(body(inputs), labels).backward()
                optimizer.step()
                schedule.step()
        seconds, memory = time.perf_counter() - start, peak_memory()
        body.eval()
        with torch.no_grad():
            pairs = [(body(x).argmax(-1), y) for x, y in DataLoader(Images(data / "val"), BATCH)]
        correct = sum(int((answer == label).sum()) for answer, label in pairs)
        return {
            "seconds": seconds, "accuracy": correct / sum(len(label) for _, label in pairs), "memory": memory,
        }  # fmt: skip


class Images:
    """Pairs of pixels (3, 227, 227) and label, decoded when they are asked for."""

    def __init__(self, folder: Path) -> None:
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.files = [
            (path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        import numpy as np
        import torch
        from PIL import Image

        path, label = self.files[index]
        image = Image.open(path).convert("RGB")
        scale = RESIZE / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
        )
        left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
        pixels = np.asarray(image.crop((left, top, left + CROP, top + CROP)), dtype=np.float32)
        pixels = pixels[:, :, ::-1] - np.asarray(MEAN, dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), label


def few(folder: Path) -> Path:
    """Copy a few of the images."""
    for part in ("train", "val"):
        for place in sorted((DATA / part).iterdir()):
            (folder / part / place.name).mkdir(parents=True)
            for path in random.Random(0).sample(sorted(place.iterdir()), QUICK_IMAGES):
                shutil.copy(path, folder / part / place.name)
    return folder
