"""A recipe on other machines: its counted operations over the rates of data sheets, divided among devices."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from graftkit.plan.forecast import Forecast, Passes
from graftkit.plan.operations import ELEMENTWISE, VIEW, Operation
from graftkit.plan.training import Device, device_of

STREAMED = 0.8  # of the bandwidth of a data sheet that element-wise kernels reach
CALL = 8e-6  # seconds of the host for an operation, of a current processor
SINGLE = 0.125  # of the rate of bf16 products, in fp32


@dataclass(frozen=True)
class Machine:
    """`devices` of one kind. `mfu`: the share of the published rate that products reach. A `Clock`."""

    name: str
    devices: int = 1
    mfu: float = 0.4

    call = CALL
    waits = False

    @property
    def device(self) -> Device:
        return device_of(self.name)

    def seconds(self, operation: Operation) -> float:
        """Return the seconds of a call: of its arithmetic or of its bytes, whichever takes longer."""
        if operation.kind == VIEW:
            return 0.0
        moved = operation.bytes / (STREAMED * self.device.bytes_per_second)
        if operation.kind == ELEMENTWISE:
            return moved
        rate = self.device.flops * self.mfu * (SINGLE if operation.dtype == torch.float32 else 1.0)
        return max(moved, operation.flops / rate)


def shared(passes: Passes, machine: Machine, fixed: bool) -> Passes:
    """Return the passes of one of several devices, which take the batches in turn. `fixed`: the recipe names the steps."""
    per_epoch = math.ceil(passes.per_epoch / machine.devices)
    epochs = passes.steps / max(1, passes.per_epoch)
    return dataclasses.replace(
        passes, per_epoch=per_epoch, steps=passes.steps if fixed else math.ceil(epochs * per_epoch),
        evaluation_batches=passes.evaluation_batches / machine.devices, fill_batches=passes.fill_batches / machine.devices,
    )  # fmt: skip


def fitted(found: Forecast, machine: Machine) -> Forecast:
    """Return the forecast with a note on whether it fits each device, and if not, how many share its weights and states.

    Shards as in ZeRO stage 3 (Rajbhandari et al. 2020): weights, gradients and states are divided, activations are not.
    """
    memory, room = found.memory, machine.device.memory_bytes
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    rest = memory["peak"] - states
    each = memory["peak"]
    if memory["peak"] <= room:
        said = f"fits one {machine.name}"
    elif rest >= room:
        said = f"does not fit a {machine.name} however many share it: the activations of a batch alone take {rest / 1e9:,.1f} GB; lower train.batch_size, or use train.checkpointing=blocks"
    else:
        least = math.ceil(states / (room - rest))
        each = int(rest + states / max(machine.devices, 1))
        said = f"does not fit one {machine.name}; divided among devices it takes {least} of them, {each / 1e9:,.1f} GB on each of {machine.devices}"
    note = f"{machine.devices} x {machine.name}, by the rates of its data sheet and {machine.mfu:.0%} of its products; communication is not counted. It {said}"
    memory = {**memory, "each": int(each), "room": int(room)}
    return dataclasses.replace(
        found, memory=memory, note=note if found.note is None else f"{note}. {found.note}"
    )
