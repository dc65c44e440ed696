"""Log-probabilities of targets under softmax(hidden @ weight.T + bias) without ever holding all logits.

The logits l (n, vocabulary) are computed in pieces of some rows and some columns. The softmax over the pieces of a row is
accumulated as in online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; FlashAttention,
Dao et al. 2022), and with it sum_v p_v weight_v, which is what the gradient with respect to `hidden` needs:

    d log p_t / d hidden = weight_t - sum_v p_v weight_v

So that gradient is complete when the forward pass is, for any weights of the rows in the loss, and the logits are computed
once. If `weight` is trained, its gradient needs the p_v of all rows: they are computed from logits that were kept, if all of
them are small, or else from logits that are computed again, piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LABEL, BEST, MEAN = range(3)  # columns of the scores


@dataclass(frozen=True)
class Form:
    """What a model makes of its output layer's logits: cap * tanh(scale * logits / cap), or scale * logits without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits.float() / self.cap)

    def slope(self, formed: Tensor) -> Tensor | float:
        """Return the derivative where the result is `formed`."""
        return self.scale if self.cap is None else self.scale * (1 - (formed / self.cap) ** 2)


@dataclass(frozen=True)
class Sizes:
    """`logits`: how many are computed at a time; `rows`: of so many rows at most; `kept`: bytes of logits that may be kept
    for the gradient of the weight."""

    logits: int
    rows: int
    kept: int

    @staticmethod
    def on(device: torch.device) -> Sizes:
        """Return sizes for a device. On a CPU a piece of fp32 fits into the second-level cache."""
        if device.type != "cuda":
            return Sizes(1 << 19, 512, 1 << 26)
        memory = torch.cuda.get_device_properties(device).total_memory
        return Sizes(memory // 512, 1 << 15, memory // 64)  # as fp32, at most 1 / 128 of the memory

    def pieces(self, rows: int, columns: int) -> Iterator[tuple[slice, list[slice]]]:
        """Yield slices of rows, each with the slices of its columns."""
        height = min(rows, self.rows)
        width = max(1, min(columns, self.logits // max(1, height)))
        for top in range(0, rows, max(1, height)):
            yield (
                slice(top, min(rows, top + height)),
                [slice(left, min(columns, left + width)) for left in range(0, columns, width)],
            )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    form: Form | None = None,
    mean: bool = False,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return scores in fp32, (n, 2) or, with `mean`, (n, 3): the log-probability of each target, that of the most likely
    token, and the mean over the vocabulary. The loss of a row is -scores[:, LABEL], or with label smoothing s
    -(1 - s) scores[:, LABEL] - s scores[:, MEAN]; a row is predicted correctly if its first score equals its second.

    hidden (n, width), weight (vocabulary, width), targets (n,), bias (vocabulary,). Scores of negative targets, such as
    -100, are 0 and have no gradient. Gradients reach hidden, weight and bias, from the first and the last column. Products
    are computed in the type of autocast, or else of `hidden`; sums in fp32. `form` with a cap excludes `mean`.
    """
    if form is not None and form.cap is not None and mean:
        raise ValueError("the mean of capped logits has no gradient here")
    kind = hidden.device.type
    half = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if half else hidden.dtype
    tracked = torch.is_grad_enabled()
    setting = _Setting(
        form or Form(), mean, sizes or Sizes.on(hidden.device), dtype,
        tracked and hidden.requires_grad,
        tracked and (weight.requires_grad or (bias is not None and bias.requires_grad)),
    )  # fmt: skip
    with torch.autocast(kind, enabled=False):
        found: Tensor = _Scores.apply(hidden, weight, bias, targets, setting)
    return found


@dataclass(frozen=True)
class _Setting:
    form: Form
    mean: bool
    sizes: Sizes
    dtype: torch.dtype
    pulls: bool  # hidden has a gradient
    trains: bool  # weight or bias has one

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a piece of the logits, before the form."""
        if bias is None:
            return hidden @ weight.T
        return torch.addmm(bias.to(self.dtype), hidden, weight.T)


class _Scores(torch.autograd.Function):
    # The context comes first and there is no `setup_context`, which torch would look for in a slow way at each call.

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, given: _Setting
    ) -> Tensor:  # type: ignore[override]
        rows, columns = len(hidden), len(weight)
        cast = hidden.to(given.dtype)
        scores = torch.empty(rows, 3 if given.mean else 2, dtype=torch.float32, device=hidden.device)
        normal = torch.empty(rows, device=hidden.device)  # log of the sum of exp of the logits
        pull = hidden.new_empty(hidden.shape, dtype=torch.float32) if given.pulls else None
        size = rows * columns * given.dtype.itemsize
        kept: list[Tensor] | None = [] if given.trains and size <= given.sizes.kept else None
        for part, across in given.sizes.pieces(rows, columns):
            _score_rows(given, cast[part], weight, bias, targets[part], across,
                        scores[part], normal[part], None if pull is None else pull[part], kept)  # fmt: skip
        centre = weight.float().mean(0) if given.mean and pull is not None else None
        ctx.given, ctx.kept, ctx.type = given, kept, hidden.dtype
        ctx.save_for_backward(
            cast if given.trains else None,
            weight,
            bias,
            targets,
            normal,
            pull,
            centre,
            scores[:, LABEL] + normal,
        )
        return scores.mul_((targets >= 0)[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        given: _Setting = ctx.given
        cast, weight, bias, targets, normal, pull, centre, label = ctx.saved_tensors
        gradient = gradient.masked_fill((targets < 0)[:, None], 0.0)
        on_label = gradient[:, LABEL, None]
        on_mean = gradient[:, MEAN, None] if given.mean else torch.zeros_like(on_label)
        of_hidden = of_weight = of_bias = None
        if pull is not None:
            own = weight[targets.clamp(0)].float() * given.form.slope(label[:, None])
            of_hidden = on_label * (own - pull)
            if centre is not None:
                of_hidden += on_mean * (given.form.scale * centre - pull)
            of_hidden = of_hidden.to(ctx.type)
        if given.trains:
            of_weight, of_bias = _of_weight(
                given, cast, weight, bias, targets, normal, on_label, on_mean, ctx.kept
            )
            ctx.kept = None
        return of_hidden, of_weight, of_bias if bias is not None else None, None, None


def _score_rows(
    given: _Setting, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, across: list[slice],
    scores: Tensor, normal: Tensor, pull: Tensor | None, kept: list[Tensor] | None,
) -> None:  # fmt: skip
    """Fill in scores (rows, 2 or 3), normal (rows,) and pull (rows, width) of some rows from all columns of their logits."""
    most = torch.full_like(normal, -torch.inf)
    label, total, sums = torch.zeros_like(normal), torch.zeros_like(normal), torch.zeros_like(normal)
    if pull is not None:
        pull.zero_()
    for part in across:
        some = weight[part].to(given.dtype)
        raw = given.logits(hidden, some, None if bias is None else bias[part])
        if kept is not None:
            kept.append(raw)
        logits = given.form(raw)
        now = torch.maximum(most, logits.amax(-1).float())
        at, inside = _within(targets, part)
        label = torch.where(inside, logits.gather(-1, at)[:, 0].float(), label)
        if given.mean:
            sums += logits.sum(-1, dtype=torch.float32)
        slope = None if given.form.cap is None else given.form.slope(logits)
        p = torch.sub(logits, now[:, None]).exp_()  # in fp32, as `now` is
        shrink = (most - now).exp_()
        total = total * shrink + p.sum(-1)
        if pull is not None:
            if slope is not None:
                p *= slope
            pull.mul_(shrink[:, None]).add_(p.to(given.dtype) @ some)
        most = now
    normal.copy_(most + total.log())
    scores[:, LABEL], scores[:, BEST] = label - normal, most - normal
    if given.mean:
        scores[:, MEAN] = sums / len(weight) - normal
    if pull is not None:
        pull.mul_((1 if given.form.cap is not None else given.form.scale) / total[:, None])


def _of_weight(
    given: _Setting, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, normal: Tensor,
    on_label: Tensor, on_mean: Tensor, kept: list[Tensor] | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of weight and bias, for those of the scores of labels and means, (n, 1) each."""
    of_weight = torch.zeros_like(weight)
    of_bias = None if bias is None else torch.zeros_like(bias)
    number = 0
    for rows, across in given.sizes.pieces(len(hidden), len(weight)):
        for part in across:
            if kept is None:
                bias_part = None if bias is None else bias[part]
                raw = given.logits(hidden[rows], weight[part].to(given.dtype), bias_part)
            else:
                raw = kept[number]
            number += 1
            logits = given.form(raw)
            at, inside = _within(targets[rows], part)
            p = torch.sub(logits, normal[rows, None]).exp_()
            p *= -(on_label[rows] + on_mean[rows])
            p.scatter_add_(1, at, torch.where(inside[:, None], on_label[rows], 0.0))
            if given.mean:
                p += on_mean[rows] / len(weight)
            p *= given.form.slope(logits)
            of_weight[part] += p.to(given.dtype).T @ hidden[rows]
            if of_bias is not None:
                of_bias[part] += p.sum(0)
    return of_weight, of_bias


def _within(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return the columns (n, 1) of targets in a piece, 0 for those outside, and which are inside (n,)."""
    inside = (targets >= part.start) & (targets < part.stop)
    return torch.where(inside, targets - part.start, 0)[:, None], inside
