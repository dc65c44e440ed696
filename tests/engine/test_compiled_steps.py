"""train.compile where compiling would never end: packed rows, and blocks that compile something new in each step."""

from __future__ import annotations

import torch
from tiny import batch, causal

from graftkit.backbone import Backbone
from graftkit.backbone.packed import Parts, packed
from graftkit.engine.regions import SLOW_STEPS, Regions
from graftkit.grafts.attach import attach


def regions_of(wanted: str) -> tuple[Regions, list[str]]:
    graft = attach(Backbone(causal("llama")), "lora(rank=2)").requires_grad_()
    said: list[str] = []
    regions = Regions(graft, 0, torch.device("cpu"), "fp32", wanted, said.append, backend="eager")
    return regions, said


def test_blocks_of_packed_rows_stay_eager():
    """The sizes of the parts are numbers in Python, so each batch would be a graph of its own."""
    regions, said = regions_of("blocks")
    model = regions.graft.model
    regions.after_step(1.0, 1, 100)
    assert all("forward" in vars(block) for block in regions.blocks)
    with packed(Parts([[3, 4]] * 4)):
        model(**batch(length=7)).logits.sum().backward()
    regions.after_step(1.0, 1, 100)
    assert (
        regions.decided and not regions.on and not any("forward" in vars(block) for block in regions.blocks)
    )
    assert said == ["note: the blocks are not compiled, as the parts of packed rows differ in each batch"]


def test_steps_that_take_much_longer_end_it():
    regions, said = regions_of("blocks")
    regions.times = [1.0] * 6
    regions._place()
    regions._turn_on()
    for _ in range(SLOW_STEPS - 1):
        regions.after_step(10.0, 1, 100)
    regions.after_step(1.0, 1, 100)  # one that is not begins the count anew
    for _ in range(SLOW_STEPS - 1):
        regions.after_step(10.0, 1, 100)
    assert regions.on and not said
    regions.after_step(10.0, 1, 100)
    assert not regions.on and not any(region.on for region in regions.regions)
    assert not regions.state["on"] and "not compiled any more" in said[0]
