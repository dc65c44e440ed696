"""`graftkit.attach` inside other people's training loops."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from graftkit import attach, load

pytestmark = pytest.mark.slow

CASES = [
    ("bert", False, "lora(rank=4) + head(classes=2, pooling='mean')"),
    ("bert", True, "lora(rank=4) + head(classes=2)"),
    ("llama", False, "prefix(tokens=4) + head(classes=2)"),
    ("gpt2", True, "adapter(bottleneck=4) + head(classes=2)"),
]
EACH_CASE = pytest.mark.parametrize("kind,headed,text", CASES)


class Rows(Dataset):
    """Rows whose label is whether the number of the first and last word is large."""

    def __init__(self, count: int = 32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, tiny.VOCABULARY, (count, 6), generator=generator)
        self.ids[:, 0] = self.ids[:, -1]  # where an encoder looks, and where a decoder does
        self.labels = (self.ids[:, -1] > tiny.VOCABULARY // 2).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        mask = torch.ones_like(self.ids[row])
        return {"input_ids": self.ids[row], "attention_mask": mask, "labels": self.labels[row]}


def model_of(kind: str, headed: bool) -> nn.Module:
    return tiny.with_head(kind) if headed else tiny.bare(kind)


def everything(rows: Rows) -> dict[str, Tensor]:
    return {"input_ids": rows.ids, "attention_mask": torch.ones_like(rows.ids), "labels": rows.labels}


def loss_of(model: nn.Module, rows: Rows) -> float:
    model.eval()
    with torch.no_grad():
        return float(model(**everything(rows)).loss)


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
        lr_scheduler_type="constant", max_grad_norm=0.0,
        label_names=["labels"],  # or Trainer drops the column where the model's own forward has no labels
        **changes,
    )  # fmt: skip


@EACH_CASE
def test_trainer_learns(kind, headed, text, tmp_path):
    rows = Rows()
    torch.manual_seed(0)
    graft = attach(model_of(kind, headed), text)
    before = tiny.snapshot(graft.model)
    start = loss_of(graft.model, rows)
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 8, "learning_rate": 1e-2}
    trainer = Trainer(graft.model, arguments(tmp_path / "out", **settings), train_dataset=rows)
    trainer.train()
    assert loss_of(graft.model, rows) < 0.8 * start
    after = tiny.snapshot(graft.model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(graft.labels)
    wanted = trainer.predict(rows).predictions
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    graft.save(tmp_path / "graft")
    again = load(model_of(kind, headed), tmp_path / "graft")
    with torch.no_grad():
        got = again.model.eval()(**everything(rows)).logits
    torch.testing.assert_close(got, torch.from_numpy(wanted))


@EACH_CASE
def test_a_plain_loop_learns(kind, headed, text):
    rows = Rows()
    torch.manual_seed(0)
    graft = attach(model_of(kind, headed), text)
    before = tiny.snapshot(graft.model)
    start = loss_of(graft.model, rows)
    optimizer = torch.optim.AdamW(graft.param_groups(lr=1e-2))
    graft.model.train()
    for _ in range(30):
        graft.model(**everything(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(graft.model, rows) < 0.8 * start
    after = tiny.snapshot(graft.model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(graft.labels)


@EACH_CASE
def test_accumulation_in_trainer_gives_the_whole_batch(kind, headed, text, tmp_path):
    """One step of plain SGD on 8 rows: at once, and as four times two."""
    rows = Rows(8)
    after = []
    for size, times in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        graft = attach(model_of(kind, headed), text.replace("classes=2", "classes=2, dropout=0.0"))
        for module in graft.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 1}
        trainer = Trainer(
            graft.model, arguments(tmp_path, optim="sgd", learning_rate=0.1, **settings), train_dataset=rows
        )
        trainer.train()
        after.append({name: p.detach().clone() for name, p in graft.parameters.items()})
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-4, atol=1e-6)
