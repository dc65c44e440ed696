"""Tiny models and data that all tests share. Nothing is fetched: the models are built here from configs."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRAFTKIT_CACHE"] = tempfile.mkdtemp(prefix="graftkit-cache-")
os.environ["GRAFTKIT_CACHE_GB"] = "0"  # no activations in files: no test finds those of another
os.environ["GRAFTKIT_FORECAST"] = "0"  # which takes longer than a tiny run; tests of it turn it on
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

SHARED = Path(os.environ.get("GRAFTKIT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FRUIT = ("apple", "pear", "plum", "cherry", "grape")
TOOL = ("hammer", "saw", "drill", "wrench", "file")
ANIMAL = ("cat", "dog", "cow", "hen", "pig")
FILLER = ("the", "a", "my", "is", "was", "very", "old", "new", "here", "there", "and", "of")
KINDS = {"fruit": FRUIT, "tool": TOOL, "animal": ANIMAL}
WORDS = (*FRUIT, *TOOL, *ANIMAL, *FILLER)


def make_rows(count: int, seed: int = 0, kinds: tuple[str, ...] = ("fruit", "tool")) -> list[dict[str, str]]:
    """Rows whose label is the kind of the one word in the text that is not filler."""
    import random

    draw = random.Random(seed)
    rows = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        words = draw.choices(FILLER, k=draw.randint(2, 9))
        words.insert(draw.randrange(len(words) + 1), draw.choice(KINDS[kind]))
        rows.append({"text": " ".join(words), "label": kind})
    return rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _tokenizer(folder: Path, special: tuple[str, ...]):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate((*special, *WORDS))}
    unknown = special[-1] if "[UNK]" not in special else "[UNK]"
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    if "[CLS]" in special:
        pieces = {**vocabulary, **{f"##{letter}": len(vocabulary) + i for i, letter in enumerate("abcdes")}}
        tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def make_bert(folder: Path, blocks: int = 3) -> Path:
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, BertTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = _tokenizer(folder, special)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    size = tokenizer.get_vocab_size()
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=blocks, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config)
    with torch.no_grad():  # far enough from zero that words can be told apart at once
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        model.embeddings.word_embeddings.weight.mul_(4)
    model.save_pretrained(folder)
    return folder


def pytest_collectstart(collector) -> None:
    """Collect no garbage while modules are imported, which make millions of objects that stay."""
    gc.disable()


def pytest_collection_finish(session) -> None:
    """Collect garbage less often, and not among what the imports made: an eighth of the suite's time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where models of the tests compute: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("--device")
    os.environ["GRAFTKIT_TEST_DEVICE"] = chosen
    if chosen == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # runs too, whatever the machine has
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for CUDA must not forbid to fork
    # Only a loss of power shows what was not synced; tests of that (`killing.moments`) replace it themselves.
    os.fsync = os.fstat  # type: ignore[assignment]
    _build_each_parser_once()


def _build_each_parser_once() -> None:
    """Typer builds the parser anew for every command: a tenth of a tiny run. It depends on nothing but the epilogs."""
    import typer.main

    plain, built = typer.main.get_command, {}

    def get_command(app):
        key = (id(app), *(command.epilog for command in app.registered_commands))
        if key not in built:
            built[key] = plain(app)
        return built[key]

    typer.main.get_command = get_command


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none; the device is chosen by --device cuda. Of tests marked
    `sampled`, all cases but the first are slow, or with `sampled(12)` all but the first of each twelfth."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for sampled in cases.values():
        for number, item in enumerate(sampled):
            marker = item.get_closest_marker("sampled")
            assert marker is not None
            if number % -(-len(sampled) // (marker.args[0] if marker.args else 1)):
                item.add_marker(pytest.mark.slow)
    from peft_versions import difference

    for item in items:
        if what := difference(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=what))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if config.getoption("--device") != "cuda" or not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs CUDA and --device cuda"))


@pytest.fixture(scope="session")
def device():
    """Where the tests compute, a `torch.device`."""
    from device import DEVICE

    return DEVICE


@pytest.fixture(scope="session", autouse=True)
def one_thread(device):
    import torch

    torch.set_num_threads(1)
    if (
        device.type == "cpu"
    ):  # `torch.manual_seed` keeps each seed for the others, with a trace of the whole stack
        for other in (torch.cuda, torch.xpu, torch.mtia):
            other.manual_seed_all = lambda seed: None


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A BERT model folder: 3 blocks, width 32, at most 64 tokens, WordPiece tokenizer."""
    return make_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def short_bert(tmp_path_factory) -> Path:
    """The same with two blocks, for runs that would show nothing more with three: each block is a fifth of a run's time."""
    return make_bert(tmp_path_factory.mktemp("models") / "short-bert", blocks=2)


def make_sentence_bert(folder: Path, blocks: int = 3) -> Path:
    make_bert(folder, blocks)
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 32,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="session")
def tiny_sentence_bert(tmp_path_factory) -> Path:
    """The same with a sentence-transformers configuration that says mean pooling."""
    return make_sentence_bert(tmp_path_factory.mktemp("models") / "tiny-sentence-bert")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> Path:
    """A GPT-2 model folder: 3 blocks, width 32, a word tokenizer without a padding token."""
    import torch
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    tokenizer = _tokenizer(folder, ("<|endoftext|>",))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_embd=32, n_layer=3, n_head=4, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        model.wte.weight.mul_(4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory) -> Path:
    """train.csv (96 rows, fruit or tool), eval.csv (40 rows), pairs.csv (64 rows: same kind or not)."""
    folder = tmp_path_factory.mktemp("rows")
    write_csv(folder / "train.csv", make_rows(96, 1))
    write_csv(folder / "eval.csv", make_rows(40, 2))
    pairs = zip(make_rows(64, 3), make_rows(64, 4)[1:] + make_rows(1, 5))
    write_csv(
        folder / "pairs.csv",
        [
            {"text": a["text"], "text_pair": b["text"], "label": "yes" if i % 3 else "no"}
            for i, (a, b) in enumerate(pairs)
        ],
    )
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared real data; tests that need it are skipped where it is missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no shared data under {SHARED}; set GRAFTKIT_SHARED")
    return SHARED / "data"


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs `graftkit ...` in this process, from an empty folder: `command("tune", ...)` gives status, out, err."""
    from graftkit.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> SimpleNamespace:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return SimpleNamespace(status=stop.value.code, out=captured.out, err=captured.err)

    return run


def in_process(
    *words: object, script: str = "from graftkit.cli.main import main; main()", **more
) -> subprocess.CompletedProcess:
    """`graftkit ...` as a real process; `script` may patch something first."""
    given = {"capture_output": True, "text": True, "timeout": 120, **more}
    return subprocess.run([sys.executable, "-c", script, *map(str, words)], **given)


@pytest.fixture
def ready(tiny_bert, rows_folder, device):
    """`ready(method, train={...})`: a prepared run, its training rows, and a loop over them without a cache."""
    from graftkit.engine.forward import Forward
    from graftkit.engine.loop import Loop
    from graftkit.recipe import schema as recipes
    from graftkit.runs.prepare import prepare, prepare_rows

    def make(method: str, model=None, task: str = "classify", rows=None, **train) -> SimpleNamespace:
        values = {
            "model": str(model or tiny_bert), "method": method, "task": task,
            "data": {"train": str(rows_folder / "train.csv"), "eval": None},
            "train": {"precision": "fp32", "batch_size": 16, "steps": 6, **train},
        }  # fmt: skip
        recipe = recipes.make(values)
        prepared = prepare(recipe, prepare_rows(recipe, rows))
        dataset = prepared.rows.task.dataset(prepared.rows.train, prepared.backbone, prepared.max_length)
        assert prepared.device.type == device.type
        forward = Forward(prepared.graft, prepared.device, prepared.precision)
        loop = Loop(prepared.graft, dataset, forward, prepared.phases, prepared.learn, prepared.settings)
        return SimpleNamespace(
            prepared=prepared, graft=prepared.graft, dataset=dataset, loop=loop, forward=forward
        )

    return make


FAST = ("train.precision=fp32", "train.batch_size=16", "train.lr=0.01")


def tune_words(
    model: Path, rows: Path, out: Path, *more: str, method: str = "lora(rank=4) + head()"
) -> list[str]:
    """The words of a `graftkit tune` of a tiny model that takes about a second."""
    return [
        "tune", "--model", str(model), "--task", "classify", "--train", str(rows / "train.csv"),
        "--eval", str(rows / "eval.csv"), "--method", method, "--out", str(out), *FAST, *more,
    ]  # fmt: skip


def graft_tensors(run: Path) -> dict:
    """All tensors of a run's graft, by file and name."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted((run / "graft").glob("*.safetensors")):
        found |= {f"{path.name}:{name}": tensor for name, tensor in load_file(path).items()}
    assert found
    return found


def equal_bits(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


@pytest.fixture
def few_compared(monkeypatch) -> None:
    """Exports are compared with their runs on 8 rows instead of 64, which take most of an export's time."""
    from graftkit.export import base
    from graftkit.runs import export

    for module in (base, export):
        monkeypatch.setattr(module, "ROWS", 8)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_bert, rows_folder) -> Path:
    """A finished run: LoRA and the own head of the tiny BERT."""
    import graftkit

    out = tmp_path_factory.mktemp("runs") / "finished"
    graftkit.tune(
        model=str(tiny_bert), task="classify", train=rows_folder / "train.csv", eval=rows_folder / "eval.csv",
        method="lora(rank=4) + head()", out=out,
        settings={"train.precision": "fp32", "train.batch_size": 16, "train.lr": 0.01, "train.epochs": 10.0},
    )  # fmt: skip
    return out


def forked(*works, meanwhile=None) -> SimpleNamespace | list[SimpleNamespace]:
    """Calls each of `works` in a child process that is a copy of this one, which saves the seconds that imports take;
    several at the same time. For each: its exit status (negative: the signal that killed it) and what it printed.
    `meanwhile` is called with the number of the first process while it runs.
    """
    children = [_fork(work) for work in works]
    if meanwhile is not None:
        meanwhile(children[0][0])
    ended = [
        SimpleNamespace(status=_status(pid), out=_text(out), err=_text(err)) for pid, out, err in children
    ]
    return ended if len(ended) > 1 else ended[0]


def without_graftkit(script: Path | str, *words: object) -> str:
    """What a script (a file or its text) prints in a process that cannot import graftkit."""

    def work() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("graftkit", "peft")]:
            del sys.modules[name]
        sys.modules["graftkit"] = None
        sys.argv = [str(script), *map(str, words)]
        text = script.read_text(encoding="utf-8") if isinstance(script, Path) else script
        exec(compile(text, "script", "exec"), {"__name__": "__main__", "__file__": str(script)})

    done = forked(work)
    assert done.status == 0, done.err
    return done.out


def _fork(work) -> tuple:
    """The number of a child process that calls `work`, and the files that get what it prints."""
    outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid, *outputs
    status = 1
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in the copy
        for number, output in zip((1, 2), outputs):
            os.dup2(output.fileno(), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # the child may have limited the size of its files
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _text(output) -> str:
    with output:
        output.seek(0)
        return output.read()


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Folders of red, green and blue images."""
    from image_models import fill

    folder = tmp_path_factory.mktemp("colours")
    fill(folder / "train", 8)
    fill(folder / "eval", 4, seed=100)
    return folder


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory) -> Path:
    from image_models import vit

    return vit(tmp_path_factory.mktemp("models") / "tiny-vit")
