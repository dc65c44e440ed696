"""What this machine does in a second, for the operations of a step: measured when a shape is first met, and kept in a file.

A product is measured with the shapes of the step, up to half a power of two; element-wise work by its operator, in bytes per
second, at a few sizes. Each takes milliseconds, and a plan measures for at most `PATIENCE` seconds: what is left then is
taken from the nearest shape that is known. The file is `rates.json` in the cache folder, by processor, threads and version
of torch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graftkit.engine.machine import cpu_name, hardware, synchronize
from graftkit.files import special, write_json
from graftkit.plan.operations import ATTENTION, CONVOLUTION, ELEMENTWISE, PRODUCTS, VIEW, Operation, held
from graftkit.recipe.environment import cache_folder

FILE = "rates.json"
PATIENCE = 3.0  # seconds of measuring for one plan
MOST = 4000  # entries of one machine
LARGEST = 3e9  # operations of a product that is measured; longer ones with fewer rows
SMALLEST = 1 << 10  # elements, below which a call is all that counts
REPEATS = 5


class Rates:
    """The measured rates of a device. `found`: seconds of a FLOP or byte by key; `call`: seconds that the host takes for a call."""

    def __init__(
        self, device: torch.device, found: dict[str, float] | None = None, patience: float = PATIENCE
    ) -> None:
        self.device, self.patience = device, patience
        self.machine = machine_of(device)
        self.found = self._read() if found is None else found
        self.changed = False

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device, as on a CPU they are one."""
        return self.device.type == "cpu"

    def seconds(self, operation: Operation) -> float:
        """Return the seconds of one call, without what the host takes for it."""
        if operation.kind == VIEW:
            return 0.0
        if operation.kind == ELEMENTWISE:
            return operation.bytes * self._of(
                self._elementwise_key(operation), lambda: _byte_seconds(operation, self.device)
            )
        if not operation.flops:
            return 0.0
        return operation.flops * self._of(_key(operation), lambda: _flop_seconds(operation, self.device))

    @property
    def call(self) -> float:
        """Seconds that the host takes for one operation of a step, Python and autograd included."""
        return self._of("call", lambda: _call_seconds(self.device), always=True)

    def _elementwise_key(self, operation: Operation) -> str:
        name = operation.name if operation.name in PROBES else COMMON
        half = operation.dtype in (torch.bfloat16, torch.float16)
        return f"{name} {'half' if half else 'full'} {_size(operation.shape[0])}"

    def _of(self, key: str, measure: Callable[[], float], always: bool = False) -> float:
        if key in self.found:
            return self.found[key]
        if self.patience <= 0 and not always:
            return self._nearest(key)
        begun = time.perf_counter()
        try:
            value = measure()
        except Exception:  # an operator that differs between versions, or does not fit
            value = self._nearest(key)
        self.patience -= time.perf_counter() - begun
        if len(self.found) < MOST:
            self.found[key] = value
            self.changed = True
        return value

    def _nearest(self, key: str) -> float:
        """Return the rate of the most similar key."""
        name, _, numbers = key.rpartition(" ")
        wanted = [math.log2(max(1, int(n))) for n in numbers.split("x") if n.isdigit()]
        best, least = 0.0, math.inf
        for other, value in self.found.items():
            same, _, theirs = other.rpartition(" ")
            if same != name or theirs.count("x") != numbers.count("x"):
                continue
            at = [math.log2(max(1, int(n))) for n in theirs.split("x")]
            distance = sum((a - b) ** 2 for a, b in zip(wanted, at))
            if distance < least:
                best, least = value, distance
        if best:
            return best
        kind = key.split(" ")[0]
        return {PRODUCTS: 5e-11, CONVOLUTION: 1e-10, ATTENTION: 1e-10}.get(kind, 2e-10)

    def save(self) -> None:
        """Write what was measured; without a cache folder, the next plan measures again."""
        if not self.changed:
            return
        with suppress(Exception):
            path = cache_folder() / FILE
            known = _all()
            known[self.machine] = {
                **known.get(self.machine, {}),
                **{k: float(f"{v:.4g}") for k, v in self.found.items()},
            }
            write_json(path, known)
            self.changed = False

    def _read(self) -> dict[str, float]:
        own = _all().get(self.machine, {})
        return (
            {k: float(v) for k, v in own.items() if isinstance(v, int | float) and 0 < v < 1}
            if isinstance(own, dict)
            else {}
        )


def machine_of(device: torch.device) -> str:
    """Return what rates and times depend on: the processor or GPU, the threads, and the version of torch."""
    name = hardware(device) if device.type == "cuda" else cpu_name()
    return f"{name} threads={torch.get_num_threads()} torch={torch.__version__}"


def _all() -> dict[str, Any]:
    path = cache_folder() / FILE
    try:
        known = {} if special(path) else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _half(number: int) -> int:
    """Return the nearest of 1, 2, 3, 4, 6, 8, 12, 16 ...: half powers of two, about."""
    if number < 2:
        return max(1, number)
    power = 1 << (number.bit_length() - 1)
    return min((power, power * 3 // 2, power * 2), key=lambda one: abs(math.log(one / number)))


def _size(number: int) -> int:
    """Return the nearest power of 8 from 1,024 on."""
    return 1 << (3 * round(math.log2(max(SMALLEST, number)) / 3) + 1)


def _key(operation: Operation) -> str:
    kind = operation.kind
    backward = "backward" if "backward" in operation.name else "forward"
    dtype = str(operation.dtype).removeprefix("torch.")
    return f"{kind} {dtype} {backward} {'x'.join(str(_half(n)) for n in operation.shape)}"


def _flop_seconds(operation: Operation, device: torch.device) -> float:
    """Measure a product, convolution or attention of about these shapes."""
    dtype = operation.dtype
    if operation.kind == ATTENTION:
        return _attention_seconds(operation, device)
    batch, rows, columns, inner = (_half(n) for n in operation.shape)
    while 2.0 * batch * rows * columns * inner > LARGEST and max(rows, batch) > 64:
        rows, batch = (rows // 2, batch) if rows >= batch else (rows, batch // 2)
    while 2.0 * batch * rows * columns * inner > 4 * LARGEST:
        columns, inner = (columns // 2, inner) if columns > inner else (columns, inner // 2)
    left = torch.randn(batch, rows, inner, device=device).to(dtype)
    right = torch.randn(batch, columns, inner, device=device).to(dtype).transpose(1, 2)
    if batch == 1:
        one, other = left[0], right[0]
        seconds = _best(lambda: one @ other, device)
    else:
        seconds = _best(lambda: left @ right, device)
    slower = CONVOLVED if operation.kind == CONVOLUTION else 1.0
    return slower * seconds / (2.0 * batch * rows * columns * inner)


CONVOLVED = 1.5  # times the time of the product that a convolution is


def _attention_seconds(operation: Operation, device: torch.device) -> float:
    heads, length, keys, width = (_half(n) for n in operation.shape)
    heads = max(1, min(heads, int(LARGEST // (4.0 * length * keys * width)) or 1))
    query = torch.randn(1, heads, length, width, device=device).to(operation.dtype).requires_grad_()
    key, value = (
        torch.randn(1, heads, keys, width, device=device).to(operation.dtype).requires_grad_()
        for _ in range(2)
    )
    forward = _best(lambda: F.scaled_dot_product_attention(query, key, value), device)
    one = 2.0 * heads * length * keys * width
    if "backward" not in operation.name:
        return forward / (2 * one)
    out = F.scaled_dot_product_attention(query, key, value)
    gradient = torch.randn_like(out)
    seconds = _best(
        lambda: torch.autograd.grad(out, (query, key, value), gradient, retain_graph=True), device
    )
    return seconds / (5 * one)


def _best(work: Callable[[], Any], device: torch.device, one_thread: bool = False) -> float:
    """Return the seconds of the best of a few calls; fewer of those that take long."""
    alone = device.type == "cpu" and (one_thread or torch.get_num_threads() == 1)
    clock = time.thread_time if alone else time.perf_counter  # what other processes take does not count
    best, total = math.inf, 0.0
    for number in range(1 + REPEATS):
        synchronize(device)
        start = clock()
        work()
        synchronize(device)
        spent = clock() - start
        total += spent
        best = min(best, spent) if number else best
        if number and total > 0.05:
            break
    return best


COMMON = "add"  # which other element-wise operators are taken for
aten: Any = torch.ops.aten


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, 256)


def _norm_backward(x: Tensor) -> Any:
    rows, weight = _rows(x), torch.ones(256, dtype=x.dtype, device=x.device)
    mean = torch.zeros(len(rows), 1, device=x.device)
    return lambda: aten.native_layer_norm_backward(
        rows, rows, [256], mean, mean + 1, weight, weight, [True, True, True]
    )


# each makes, from x (n,), a call and the bytes that it reads and writes by those of x
PROBES: dict[str, Callable[[Tensor], tuple[Callable[[], Any], float]]] = {
    "add": lambda x: (lambda: x + x, 2.0),
    "mul": lambda x: (lambda: x * x, 2.0),
    "mul_": lambda x: (lambda: x.mul_(1.0), 2.0),
    "sum": lambda x: (lambda: _rows(x).sum(0), 1.0),
    "clone": lambda x: (lambda: x.view(8, -1, 16).transpose(0, 1).contiguous(), 2.0),
    "_to_copy": lambda x: (lambda: x.to(torch.float32 if x.dtype != torch.float32 else torch.bfloat16), 3.0 if x.dtype != torch.float32 else 1.5),
    "gelu": lambda x: (lambda: F.gelu(x), 2.0),
    "gelu_backward": lambda x: (lambda: aten.gelu_backward(x, x), 3.0),
    "silu": lambda x: (lambda: F.silu(x), 2.0),
    "tanh": lambda x: (lambda: x.tanh(), 2.0),
    "native_layer_norm": lambda x: (lambda: F.layer_norm(_rows(x), (256,)), 2.0),
    "native_layer_norm_backward": lambda x: (_norm_backward(x), 3.0),
    "_softmax": lambda x: (lambda: _rows(x).softmax(-1), 2.0),
    "_softmax_backward_data": lambda x: (lambda: aten._softmax_backward_data(_rows(x), _rows(x), -1, x.dtype), 3.0),
    "embedding": lambda x: (_embedding(x), 2.0),
    "graftkit::keep": lambda x: (_drawing(x), 3.0 / x.element_size()),
}  # fmt: skip


def _embedding(x: Tensor) -> Callable[[], Any]:
    rows = _rows(x)
    index = torch.randint(0, len(rows), (len(rows),), device=x.device)
    return lambda: rows[index]


def _drawing(x: Tensor) -> Callable[[], Any]:
    from graftkit.engine.dropout import Source

    source = Source(0)
    return lambda: source.factors(x.shape, 0.1, x.dtype)


def _byte_seconds(operation: Operation, device: torch.device) -> float:
    """Measure an element-wise operator at about this size; return the seconds of a byte."""
    half = operation.dtype in (torch.bfloat16, torch.float16)
    x = torch.randn(min(_size(operation.shape[0]), 1 << 23), device=device).to(
        operation.dtype if half else torch.float32
    )
    work, times = PROBES[operation.name if operation.name in PROBES else COMMON](x)
    with torch.no_grad():
        return _best(work, device) / (times * held(x))


MODEL = 2.5  # times as much Python for an operation as a sequence of layers has in a model of transformers, as measured


def _call_seconds(device: torch.device) -> float:
    """Measure the seconds of the host for one operation: a step of small layers, by the operations that it dispatches."""
    from graftkit.plan.counting import Counting

    layers = [m for _ in range(12) for m in (torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU())]
    model = torch.nn.Sequential(*layers).to(device)
    x = torch.randn(2, 8, device=device)

    def step() -> None:
        (model(x) * 2).sum().backward()
        model.zero_grad()

    with Counting() as counting:
        step()
    calls = sum(counting.operations.values())
    return MODEL * _best(step, device, one_thread=True) / calls
