"""Estimates for other machines, against published figures."""

from __future__ import annotations

import json

import pytest

from graftkit.cli.main import main
from graftkit.errors import UserError
from graftkit.plan.training import count_of, estimate, training_flops


def test_a_known_estimate():
    """72.7 B parameters, 7 T tokens in rows of 32,768: 3 T (2.6e6 s + 2 P) = 4.84e24; 29.9 days of 6,000 A100 at their peak."""
    found = estimate("qwen2-72b", tokens="7T", gpus=6000, on="a100", mfu=1.0)
    assert found["flops"] == pytest.approx(4.84e24, rel=5e-3)  # which rounds 4 L d to 2.6e6
    assert found["days"] == pytest.approx(29.9, rel=5e-3)
    assert estimate("qwen2-72b", tokens="7T", gpus=6000, on="a100", mfu=0.4)["days"] == pytest.approx(
        74.9, abs=0.2
    )


def test_gpt3():
    """Brown et al. 2020, table D.1: 3.14e23 FLOPs for 300 B tokens, without those of attention."""
    assert training_flops(174.6e9, 96, 12288, 0, 300e9) == pytest.approx(3.14e23, rel=2e-3)
    attention = estimate("gpt3-175b", tokens="300B", on="v100")["flops"] - 3.14e23
    assert 0.02 < attention / 3.14e23 < 0.04  # 2 L d s of P / 2


def test_llama_65b():
    """Touvron et al. 2023: 380 tokens per second and A100, 2,048 of them, 1.4 T tokens: about 21 days, 1,022,362 GPU hours."""
    peak = estimate("llama-65b", tokens="1.4T", on="a100", gpus=2048, mfu=1.0)
    share = 380 / peak["tokens_per_second_per_gpu"]
    found = estimate("llama-65b", tokens="1.4T", on="a100", gpus=2048, mfu=share)
    assert 0.4 < share < 0.6
    assert found["days"] == pytest.approx(21, abs=0.3)
    assert found["gpu_hours"] == pytest.approx(1_022_362, rel=0.01)


def test_llama_7b():
    """The same paper, table 15: 82,432 A100 hours for 1 T tokens, at a share that 65B has too."""
    peak = estimate("llama-7b", tokens="1T", on="a100", mfu=1.0)["gpu_hours"]
    assert 0.4 < peak / 82_432 < 0.6


@pytest.mark.parametrize(
    ("text", "number"), [("7T", 7e12), ("1.4e12", 1.4e12), ("300 b", None), ("300b", 3e11), ("1,000", 1e3)]
)
def test_numbers_of_tokens(text, number):
    if number is None:
        with pytest.raises(UserError, match="not a number such as"):
            count_of(text, "--tokens")
    else:
        assert count_of(text, "--tokens") == number


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"geometry": "qwen2-72"}, "Did you mean 'qwen2-72b'"),
        ({"on": "a1000"}, "Did you mean 'a100'"),
        ({"tokens": "many"}, "not a number such as 300B"),
        ({"tokens": "0"}, "not a number such as 300B"),
        ({"gpus": 0}, "--gpus 0"),
        ({"mfu": 0.0}, "--mfu 0.0"),
        ({"mfu": 40.0}, "0.4 is usual"),
        ({"length": -1}, "--length -1"),
    ],
)
def test_wrong_values(options, said):
    with pytest.raises(UserError, match=said):
        estimate(**{"geometry": "llama-7b", "tokens": "1T", "on": "a100"} | options)


def test_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--geometry", "qwen2-72b", "--tokens", "7T", "--gpus", "6000", "--on", "a100", "--mfu", "0.4", "--json"])  # fmt: skip
    assert not stopped.value.code
    assert json.loads(capsys.readouterr().out)["days"] == pytest.approx(74.9, rel=5e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--geometry", "llama-7b", "--on", "a100"], "needs --tokens"),
        (["--geometry", "llama-7b", "--tokens", "1T"], "needs --on"),
        (["--tokens", "1T"], "goes with --geometry"),
        (["--geometry", "llama-7b", "--tokens", "1T", "--on", "a100", "--model", "x"], "takes no recipe"),
    ],
)
def test_incomplete_commands(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *given])
    assert stopped.value.code == 1
    assert said in " ".join(capsys.readouterr().err.split())
