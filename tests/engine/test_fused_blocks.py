"""Blocks of BERT's kind as one operation, beside the modules that they stand in for."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from shaken import shaken
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from graftkit.engine.dropout import fast_dropout
from graftkit.engine.fused_blocks import FusedBlock, fuse, reads_first
from graftkit.engine.precision import autocast, cast
from graftkit.engine.recompute import Recompute
from graftkit.engine.regions import Regions
from graftkit.methods.shared.joined import Joining

CPU = torch.device("cpu")


class Fusing:
    """The fused blocks of a model in a `with` block, as a run makes them."""

    def __init__(self, model: nn.Module, blocks, precision: str = "fp32") -> None:
        self.model, self.blocks, self.precision = model, list(blocks), precision

    def __enter__(self) -> list[FusedBlock]:
        def call() -> Tensor:
            training = self.model.training
            self.model.eval()
            with autocast(CPU, self.precision):
                outputs = self.model(**tiny.batch(rows=1))[0]
            self.model.train(training)
            return outputs

        self.joining = Joining(self.model)
        self.joining.enter(torch.no_grad()(call))
        self.fused = fuse(self.blocks, self.joining.sites, call, lambda: autocast(CPU, self.precision))
        return self.fused

    def __exit__(self, *_: object) -> None:
        for fused in self.fused:
            del fused.block.forward
        self.joining.leave()


def grafted(method: str, precision: str = "fp32", **changes):
    torch.manual_seed(0)  # A of LoRA is random
    model = tiny.with_head("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, **changes)
    graft = shaken(model, method)
    graft.requires_grad_()
    cast(model, graft.labels, precision)
    return model.train()


def passed(model: nn.Module, precision: str = "fp32", seed: int = 3) -> dict[str, Tensor]:
    """The outputs and all gradients of a step with dropout, that of the embeddings too."""
    model.zero_grad()
    embeddings: list[Tensor] = []
    base = model.base_model.embeddings
    handle = base.register_forward_hook(
        lambda m, a, o: embeddings.append(o.detach().requires_grad_()) or embeddings[0]
    )
    with fast_dropout(CPU, seed):
        with autocast(CPU, precision):
            out = model(**tiny.batch())[0]
        (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    handle.remove()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "embeddings": embeddings[0].grad, **found}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys() and len(got) > 6
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert tiny.relative(got[name], tensor) < tolerance, name


@pytest.mark.parametrize("method", ["lora(rank=2, sites='q,v')", "lora(rank=2, rank_pattern={'up': 3})"])
def test_outputs_and_gradients_are_those_of_the_modules(method):
    model = grafted(method)
    wanted = passed(model)
    with Fusing(model, model.bert.encoder.layer) as blocks:
        assert [fused.first for fused in blocks] == [
            False,
            False,
            True,
        ]  # BERT's pooler reads one token
        assert_same(passed(model), wanted, 1e-5)
        other = passed(model, seed=4)
    assert not any("forward" in vars(module) for module in model.modules())
    assert tiny.relative(other["out"], wanted["out"]) > 1e-2  # other masks


def test_in_bf16_it_is_as_exact_as_the_modules():
    model = grafted("lora(rank=2)", "bf16")
    exact = passed(copy.deepcopy(model).float())
    modules = passed(model, "bf16")
    with Fusing(model, model.bert.encoder.layer, "bf16") as blocks:
        assert len(blocks) == 3
        fused = passed(model, "bf16")

    def error(got: dict[str, Tensor]) -> float:
        assert got.keys() == exact.keys()
        return sum(float((got[n].float() - exact[n]).norm() / exact[n].norm()) for n in exact) / len(exact)

    assert 0 < error(fused) < 1.2 * error(modules) < 0.1
    assert all(fused[name].dtype == tensor.dtype for name, tensor in modules.items())


def test_without_dropout_and_where_other_tokens_are_read():
    model = grafted("lora(rank=2)").eval()
    wanted = passed(model)
    with Fusing(model, model.bert.encoder.layer) as blocks:
        assert len(blocks) == 3
        assert_same(passed(model), wanted, 1e-5)
    bare = tiny.bare("bert")
    shaken(bare, "lora(rank=2)").requires_grad_()
    with Fusing(bare, bare.encoder.layer) as blocks:  # its outputs are the states of all tokens
        assert [fused.first for fused in blocks] == [False, False, False]


def test_evaluation_and_other_calls_are_left_to_the_modules():
    model = grafted("lora(rank=2)")
    with Fusing(model, model.bert.encoder.layer) as blocks:
        called: list[FusedBlock] = []
        for fused in blocks:
            plain = fused.plain
            fused.plain = lambda *a, plain=plain, fused=fused, **k: called.append(fused) or plain(*a, **k)
        passed(model)
        assert not called
        with fast_dropout(CPU, 0), torch.no_grad():
            model(**tiny.batch())
        assert len(called) == 3
        model(**tiny.batch())  # torch's own dropout
        assert len(called) == 6


def test_blocks_with_anything_else_inside_stay_as_they_are():
    for method in (
        "lora(rank=2) + norms()",
        "dora(rank=2)",
        "lora(rank=2) + ia3()",
        "lora(rank=2) + prefix(tokens=2)",
        "lora(rank=2) + adapter()",
        "full()",
        "lora(rank=2, dropout=0.5)",
    ):
        model = grafted(method)
        with Fusing(model, model.bert.encoder.layer) as blocks:
            assert not blocks, method
    model = grafted("lora(rank=2)", hidden_act="gelu_new")
    with Fusing(model, model.bert.encoder.layer) as blocks:
        assert not blocks
    model = grafted("lora(rank=2)")
    causal = model.bert.encoder.layer[0].attention.self
    plain = causal.forward
    causal.forward = lambda x, *a, **k: plain(x.flip(1), *a, **k)  # of another architecture
    with Fusing(model, model.bert.encoder.layer) as blocks:
        assert [fused.block for fused in blocks] == list(model.bert.encoder.layer[1:])
    del causal.forward


def test_recomputed_blocks_have_the_same_gradients():
    model = grafted("lora(rank=2)")
    with Fusing(model, model.bert.encoder.layer):
        wanted = passed(model)
        recompute = Recompute(list(model.bert.encoder.layer), "blocks")
        recompute.enter(0)
        assert_same(passed(model), wanted, 1e-6)
        recompute.leave()
        assert all(isinstance(vars(block)["forward"], FusedBlock) for block in model.bert.encoder.layer)


def test_a_model_of_the_same_blocks_is_known_without_its_name():
    config = RobertaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=20, num_labels=3, hidden_dropout_prob=0.3, pad_token_id=0,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config)
    tiny.randomize(model, 0)
    shaken(model, "lora(rank=2)").requires_grad_()
    model.train()
    wanted = passed(model)
    with Fusing(model, model.roberta.encoder.layer) as blocks:
        assert len(blocks) == 2
        assert_same(passed(model), wanted, 1e-5)


@pytest.mark.parametrize(("read", "alone"), [
    (lambda x: x[:, 0], True), (lambda x: torch.tanh(x[:, 0]) + x[:, 0], True), (lambda x: x[:, 1], False),
    (lambda x: x[0], False), (lambda x: x.mean(1), False), (lambda x: x[:, 0] + x.mean(1), False),
])  # fmt: skip
def test_which_tokens_are_read_is_seen_in_the_graph(read, alone):
    x = torch.randn(2, 3, 4, requires_grad=True)
    states = x * 2
    assert reads_first(read(states).sum(-1), states) == alone


def test_a_compiler_gets_the_modules_and_gives_the_block_back():
    model = grafted("lora(rank=2)")
    with Fusing(model, model.bert.encoder.layer) as blocks:
        wanted, given = passed(model), []
        regions = Regions(
            SimpleNamespace(backbone=SimpleNamespace(blocks=())), 0, CPU, "fp32", "blocks", print
        )  # type: ignore[arg-type]
        regions._compile = lambda function: given.append(function) or function  # type: ignore[method-assign]
        regions.blocks = list(model.bert.encoder.layer)
        regions._place()
        assert given == [fused.plain for fused in blocks]
        assert_same(passed(model), wanted, 1e-6)
        regions._turn_on()
        assert_same(passed(model), wanted, 1e-5)
        regions.leave()
        assert [vars(block)["forward"] for block in model.bert.encoder.layer] == blocks
