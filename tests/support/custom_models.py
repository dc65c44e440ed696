"""Small modules of every kind of map, after those of PEFT's own tests, and the comparison of a method with PEFT's on them.

    compare("Conv2d", peft.LoraConfig(target_modules=["conv2d"]), tmp_path)

makes the model twice with the same random values, has PEFT wrap and write the one with random values in all that it
trains, loads that adapter on the other, and holds outputs and gradients against each other; then the other way round.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftkit import attach, load
from graftkit.grafts.folder import read
from graftkit.grafts.graft import Graft
from graftkit.grafts.load import tensors_for


class MLP(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.drop(torch.tanh(self.lin0(x)))).log_softmax(-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(10, 14), nn.LayerNorm(14), nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


class DeepMLP(nn.Module):
    """Blocks, so that ranks and rates differ by depth."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)


class EmbConv1D(nn.Module):
    """An embedding, and GPT-2's map with its transposed weight."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 5, padding_idx=padding)
        self.conv1d = Conv1D(7, 5)
        self.lin0 = nn.Linear(7, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin0(torch.tanh(self.conv1d(self.emb(ids))))


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies what it finds, as Gemma's."""

    def __init__(self, count: int, width: int, scale: float) -> None:
        super().__init__(count, width)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = ScaledEmbedding(50, 6, 2.5)
        self.lin0 = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin0(torch.tanh(self.emb(ids)))


class Conv(nn.Module):
    """One convolution (1, 2 or 3 dimensions) and a linear map."""

    def __init__(self, dimensions: int, inputs: int = 6, **changes: Any) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.name = f"conv{dimensions}d"
        self.add_module(self.name, kind(inputs, 8, **({"kernel_size": 3} | changes)))
        self.lin0 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(torch.tanh(self.get_submodule(self.name)(x)).flatten(2).mean(-1))


class MHA(nn.Module):
    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 2, batch_first=batch_first)
        self.lin0 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


def mixture() -> nn.Module:
    """A language model whose experts are one parameter (experts, out, in) each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=tiny.WIDTH, intermediate_size=tiny.INNER, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    tiny.randomize(model, 3)
    return model.eval()


def transposed_mixture() -> nn.Module:
    """One whose experts are stored (experts, in, out)."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=tiny.WIDTH, intermediate_size=tiny.INNER, num_hidden_layers=2, num_attention_heads=4, head_dim=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    tiny.randomize(model, 3)
    return model.eval()


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(3))


def ids(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(3))


# name -> a factory of the model and one of an input
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP": (MLP, numbers(9, 10)),
    "MLP without bias": (lambda: MLP(bias=False), numbers(9, 10)),
    "DeepMLP": (DeepMLP, numbers(9, 10)),
    "EmbConv1D": (EmbConv1D, ids(4, 6)),
    "EmbConv1D with padding": (lambda: EmbConv1D(padding=7), lambda: torch.tensor([[7, 1, 7], [2, 2, 9]])),
    "ScaledEmbedding": (Scaled, ids(4, 6)),
    "Conv1d": (lambda: Conv(1), numbers(4, 6, 9)),
    "Conv1d strided": (lambda: Conv(1, stride=2, padding=2), numbers(4, 6, 9)),
    "Conv1dKernel1": (lambda: Conv(1, kernel_size=1), numbers(4, 6, 9)),
    "Conv1dGroups": (lambda: Conv(1, groups=2), numbers(4, 6, 9)),
    "Conv2d": (lambda: Conv(2), numbers(4, 6, 5, 5)),
    "Conv2d without bias": (lambda: Conv(2, bias=False), numbers(4, 6, 5, 5)),
    "Conv2d strided": (lambda: Conv(2, kernel_size=(3, 2), stride=(2, 1), padding=1), numbers(4, 6, 5, 5)),
    "Conv2d dilated": (lambda: Conv(2, dilation=2, padding="same"), numbers(4, 6, 7, 7)),
    "Conv2d circular": (lambda: Conv(2, padding=1, padding_mode="circular"), numbers(4, 6, 5, 5)),
    "Conv2d1x1": (lambda: Conv(2, kernel_size=1), numbers(4, 6, 3, 3)),
    "Conv2dGroups": (lambda: Conv(2, groups=2), numbers(4, 6, 5, 5)),
    "Conv2dDepthwise": (lambda: Conv(2, inputs=8, groups=8, padding=1), numbers(4, 8, 5, 5)),
    "Conv3d": (lambda: Conv(3), numbers(4, 6, 3, 4, 5)),
    "MHA": (MHA, numbers(5, 3, 12)),
    "MHA, batch first": (lambda: MHA(batch_first=True), numbers(5, 3, 12)),
}  # fmt: skip


def make(name: str) -> nn.Module:
    """A model of `MODELS` with distinct random values; the same ones each time."""
    model = MODELS[name][0]()
    tiny.randomize(model, seed=11, std=0.4)
    return model.eval()


def given(name: str) -> Tensor:
    """An input of that model; the same each time."""
    return MODELS[name][1]()


def shake(model: nn.Module, seed: int = 5) -> None:
    """Add distinct random values to all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_peft(name: str, config: Any) -> nn.Module:
    """The model with an adapter of PEFT on it, random values in all that it trains."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(make(name), config).eval()
    shake(wrapped)
    return wrapped


def gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Fill in the gradients of a sum over the outputs; the outputs."""
    outputs = model(x)
    (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum().backward()
    return outputs.detach()


def compare(
    name: str, config: Any, folder: Path, tolerance: float = 1e-5, back: bool = True, grads: bool = True
) -> Graft:
    """Outputs, gradients and folders of an adapter of PEFT and of what is loaded from it; the graft.

    `back`: also what PEFT loads of ours. `grads`: gradients, for methods that keep PEFT's tensors as they are.
    """
    import peft

    x = given(name)
    wrapped = with_peft(name, config)
    wrapped.save_pretrained(str(folder / "theirs"))
    graft = load(make(name), folder / "theirs")
    wanted = gradients(wrapped, x)
    got = gradients(graft.model.eval(), x)
    close(got, wanted, tolerance, "outputs")
    assert tiny.relative(make(name)(x), wanted) > 1e-3, "the adapter does nothing"
    if grads:
        with torch.no_grad():  # their gradients under our names: an adapter whose values they are
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        wrapped.save_pretrained(str(folder / "gradients"))
        theirs = tensors_for(read(folder / "gradients"), graft)
        assert set(theirs) >= set(graft.parameters)
        scale = max(float(theirs[key].abs().max()) for key in graft.parameters)
        for key, parameter in graft.parameters.items():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert float((own - theirs[key]).abs().max()) <= 10 * tolerance * scale, f"gradient of {key}"
    if back:
        graft.save(folder / "ours")
        again = peft.PeftModel.from_pretrained(make(name), str(folder / "ours")).eval()
        close(again(x).detach(), wanted, tolerance, "outputs of what PEFT reads")
    return graft


def close(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    difference = tiny.relative(got, wanted)
    assert difference < tolerance, f"{what} differ by {difference:.2g}"


def same_as_base(name: str, graft: Graft) -> bool:
    """Whether the outputs are those of the model alone: bit for bit, but for attention, where torch has two ways."""
    x = given(name)
    with torch.no_grad():
        got, wanted = graft.model.eval()(x), make(name)(x)
    return torch.equal(got, wanted) if "MHA" not in name else tiny.relative(got, wanted) < 1e-6


def grafted(name: str, text: str) -> Graft:
    """A graft on the model, random values in all that it trains."""
    graft = attach(make(name), text)
    shake(graft.model)
    return graft
