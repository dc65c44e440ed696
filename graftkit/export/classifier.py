"""The classifier in this folder with plain transformers: python classifier.py "a text" ..."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer


class Classifier:
    def __init__(self, folder=Path(__file__).parent, device="cpu"):
        folder = Path(folder)
        self.about = json.loads((folder / "head.json").read_text(encoding="utf-8"))
        self.device = torch.device(device)
        self.head = {
            name: tensor.to(self.device) for name, tensor in load_file(folder / "head.safetensors").items()
        }
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        stacked = self.about["pooling"] == "stacked"  # on the logits of the model's own head
        kind = AutoModelForSequenceClassification if stacked else AutoModel
        self.model = kind.from_pretrained(folder).to(self.device).eval()

    def features(self, states, mask):
        """(rows, length, width) -> (rows, width)"""
        pooling, rows = self.about["pooling"], torch.arange(len(states), device=states.device)
        if pooling == "stacked":
            return states
        if pooling == "cls":
            return states[rows, mask.argmax(dim=1)]
        if pooling == "last":
            return states[rows, (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=1)]
        weights = mask.to(states.dtype)
        if pooling == "attention":
            scores = (states @ self.head["query.weight"].T).squeeze(-1)
            weights = scores.masked_fill(mask == 0, torch.finfo(states.dtype).min).softmax(dim=1)
        return (states * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True)

    @torch.no_grad()
    def logits(self, texts, pairs=None):
        """One row of logits for each text, in the order of the labels."""
        results = []
        for i, text in enumerate(texts):
            given = (text,) if pairs is None else (text, pairs[i])
            batch = self.tokenizer(
                *given, truncation=True, max_length=self.about["max_length"], return_tensors="pt"
            )
            batch = batch.to(self.device)
            if hasattr(self.model, "_shift_right"):  # an encoder with a decoder reads the text in both
                ids, start = batch["input_ids"], getattr(self.model.config, "decoder_start_token_id", None)
                first = torch.full_like(
                    ids[:, :1], self.model.config.pad_token_id if start is None else start
                )
                batch["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
            x = self.features(self.model(**batch)[0].float(), batch["attention_mask"])
            if self.about["hidden"]:
                x = torch.nn.functional.gelu(x @ self.head["hidden.weight"].T + self.head["hidden.bias"])
            results.append((x @ self.head["output.weight"].T + self.head["output.bias"])[0])
        return torch.stack(results)

    def __call__(self, texts, pairs=None):
        """The answer to each text: a label, a list of labels, or a number."""
        logits, about = self.logits(texts, pairs), self.about
        kind, labels = about.get("kind", "single"), about["labels"]
        if kind == "regression":
            return (logits[:, 0].double() * about["scale"] + about["center"]).tolist()
        if kind == "multi":
            return [[labels[i] for i in torch.where(row > about["threshold"])[0]] for row in logits.sigmoid()]
        if kind == "ordinal":
            return [labels[i] for i in (logits.sigmoid().cumprod(dim=1) > 0.5).sum(dim=1)]
        return [labels[i] for i in logits.argmax(dim=1)]


if __name__ == "__main__":
    classifier, texts, pairs = Classifier(), sys.argv[1:], None
    if classifier.about["pairs"]:
        if len(texts) % 2:
            sys.exit("the texts are read in pairs, so give two, or four, ...")
        texts, pairs = texts[::2], texts[1::2]
    for i, answer in enumerate(classifier(texts, pairs)):
        answer = (
            "; ".join(answer)
            if isinstance(answer, list)
            else f"{answer:g}"
            if isinstance(answer, float)
            else answer
        )
        print(answer, texts[i], *([pairs[i]] if pairs else []), sep="\t")
