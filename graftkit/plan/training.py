"""What training a model of a published geometry takes on other machines: FLOPs, days, and the bytes of its states. No torch here.

FLOPs of T tokens in rows of s: 3 T (2 P + 4 L d s), for P parameters and L blocks of width d. A forward pass multiplies and adds
with each parameter once for each token, and the attention of a token over s others takes 4 d s in each block (2 d s for the
scores, 2 d s for the values; causal models are counted like the others, as is usual); a backward pass takes twice that. Kaplan et
al. 2020 (section 2.1); Narayanan et al. 2021 (appendix) counts the same, with the output layer apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from graftkit.errors import UserError, listing, nearest

STATES = 16  # bytes of each parameter: bf16 weights and gradients, fp32 weights and both moments of Adam (Rajbhandari et al. 2020)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
FORMULA = "3 T (2 P + 4 L d s)"


@dataclass(frozen=True)
class Published:
    """A geometry from a paper or model card. `length`: the rows of its pre-training, in tokens."""

    parameters: float
    layers: int
    width: int
    length: int


@dataclass(frozen=True)
class Device:
    """Rates of a data sheet, without sparsity. `flops`: of dense bf16 products (fp16 on V100 and T4) in a second."""

    flops: float
    memory_bytes: float
    bytes_per_second: float


GEOMETRIES = {
    "bert-base": Published(110e6, 12, 768, 512),
    "bert-large": Published(340e6, 24, 1024, 512),
    "glm-10b": Published(10e9, 48, 4096, 512),
    "glm-130b": Published(130e9, 70, 12288, 2048),
    "gpt2": Published(124e6, 12, 768, 1024),
    "gpt2-xl": Published(1.558e9, 48, 1600, 1024),
    "gpt3-175b": Published(174.6e9, 96, 12288, 2048),
    "llama-7b": Published(6.74e9, 32, 4096, 2048),
    "llama-13b": Published(13.02e9, 40, 5120, 2048),
    "llama-33b": Published(32.53e9, 60, 6656, 2048),
    "llama-65b": Published(65.29e9, 80, 8192, 2048),
    "llama2-7b": Published(6.74e9, 32, 4096, 4096),
    "llama2-70b": Published(68.98e9, 80, 8192, 4096),
    "llama3-8b": Published(8.03e9, 32, 4096, 8192),
    "llama3-70b": Published(70.55e9, 80, 8192, 8192),
    "llama3-405b": Published(405.9e9, 126, 16384, 8192),
    "mistral-7b": Published(7.24e9, 32, 4096, 8192),
    "qwen2-0.5b": Published(0.494e9, 24, 896, 32768),
    "qwen2-1.5b": Published(1.544e9, 28, 1536, 32768),
    "qwen2-7b": Published(7.616e9, 28, 3584, 32768),
    "qwen2-72b": Published(72.71e9, 80, 8192, 32768),
}
DEVICES = {
    "t4": Device(65e12, 16e9, 320e9),
    "v100": Device(125e12, 32e9, 900e9),
    "a10": Device(125e12, 24e9, 600e9),
    "l4": Device(121e12, 24e9, 300e9),
    "l40s": Device(362e12, 48e9, 864e9),
    "rtx3090": Device(71e12, 24e9, 936e9),
    "rtx4090": Device(165e12, 24e9, 1008e9),
    "a100": Device(312e12, 80e9, 2039e9),
    "h100": Device(989e12, 80e9, 3350e9),
    "h200": Device(989e12, 141e9, 4800e9),
    "b200": Device(2250e12, 192e9, 8000e9),
    "mi300x": Device(1307e12, 192e9, 5300e9),
}


def device_of(name: str) -> Device:
    """Return the rates of a device by its name. Raises `UserError` for an unknown one, with those that are known."""
    found: Device = _named(name, DEVICES, "device")
    return found


def training_flops(parameters: float, layers: int, width: int, length: int, tokens: float) -> float:
    """Return the floating-point operations of training on `tokens` tokens in rows of `length` (formula above)."""
    return 3 * tokens * (2 * parameters + 4 * layers * width * length)


def count_of(text: str, what: str) -> float:
    """Read a number such as 7T, 300B or 1.4e12. Raises `UserError` for anything else, and for less than 1."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kmbt]?)", text.strip().replace(",", "").lower())
    number = float(match[1]) * UNITS[match[2]] if match else 0.0
    if not 1 <= number <= 1e21:
        raise UserError(f"{what} {text!r} is not a number such as 300B, 7T or 1.4e12, from 1 to 1e21.")
    return number


def estimate(
    geometry: str, *, tokens: str, on: str, gpus: int = 1, mfu: float = 0.4, length: int | None = None
) -> dict[str, Any]:
    """Return FLOPs, days and bytes of pre-training a published geometry.

    `tokens`: such as `7T`. `on`: a device of the table. `mfu`: the share of its bf16 products that training reaches (0.3 to
    0.5 is usual on a cluster). `length`: tokens in a row; None: those of the publication. Raises `UserError` for an unknown
    name and for numbers out of range.
    """
    shape, device = _named(geometry, GEOMETRIES, "geometry"), device_of(on)
    number = count_of(tokens, "--tokens")
    refuse_share(gpus, mfu)
    length = shape.length if length is None else length
    if not 1 <= length <= 10**8:
        raise UserError(f"--length {length} is not from 1 to 100,000,000 tokens.")
    flops = training_flops(shape.parameters, shape.layers, shape.width, length, number)
    seconds = flops / (gpus * device.flops * mfu)
    return {
        "geometry": geometry, "parameters": int(shape.parameters), "layers": shape.layers, "width": shape.width,
        "tokens": number, "length": length, "formula": FORMULA, "flops": flops, "device": on, "gpus": gpus, "mfu": mfu,
        "device_flops": device.flops, "seconds": seconds, "days": seconds / 86_400, "gpu_hours": gpus * seconds / 3600,
        "tokens_per_second_per_gpu": number / seconds / gpus, "states_bytes": int(STATES * shape.parameters),
        "least_gpus": -int(-STATES * shape.parameters // device.memory_bytes),
    }  # fmt: skip


def refuse_share(gpus: int, mfu: float) -> None:
    """Raise `UserError` for a number of devices, or a share of their rate, that cannot be."""
    if not 1 <= gpus <= 10**7:
        raise UserError(f"--gpus {gpus} is not from 1 to 10,000,000.")
    if not 0 < mfu <= 1:
        raise UserError(
            f"--mfu {mfu} is not a share above 0 and up to 1 of the device's bf16 products; 0.4 is usual."
        )


def _named(name: str, known: dict[str, Any], what: str) -> Any:
    if name.lower() not in known:
        raise UserError(f"{what} {name!r} is unknown (known: {listing(known, 30)}).{nearest(name, known)}")
    return known[name.lower()]


def lines(found: dict[str, Any]) -> list[str]:
    """Return an estimate as lines for a terminal."""
    return [
        f"{found['geometry']}: {found['parameters'] / 1e9:,.4g} B parameters, {found['layers']} blocks of width {found['width']:,}; "
        f"{found['tokens']:,.4g} tokens in rows of {found['length']:,}",
        f"{found['flops']:.4g} FLOPs = {found['formula']}",
        f"{found['days']:,.1f} days on {found['gpus']:,} x {found['device']} at {found['mfu']:.0%} of {found['device_flops'] / 1e12:,.0f} TFLOP/s "
        f"each ({found['gpu_hours']:,.0f} GPU hours, {found['tokens_per_second_per_gpu']:,.0f} tokens per second and GPU)",
        f"weights, gradients and Adam's states: {found['states_bytes'] / 1e9:,.1f} GB ({STATES} bytes per parameter), which fill the memory "
        f"of {found['least_gpus']:,}; activations come on top",
    ]
