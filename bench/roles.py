"""Roles of the parts of every class of transformers, to see what a change to graftkit/backbone/parts.py does to all of them.

    python bench/roles.py before.json                   # before the change, two to three minutes
    python bench/roles.py after.json --beside before.json

The models are built on the `meta` device with the sizes of their configs' defaults and at most two layers, without
weights. Classes whose defaults do not build are counted and left out.
"""

from __future__ import annotations

import argparse
import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import logging

from graftkit.backbone.parts import find_sites

FAMILIES = (
    "MODEL", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION", "MODEL_FOR_QUESTION_ANSWERING",
    "MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_AUDIO_CLASSIFICATION", "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
)  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def small(kind: str) -> Any:
    """The default config of a type of model, with two layers where it says how many there are."""
    config = getattr(transformers, CONFIG_MAPPING_NAMES[kind])()
    for name in LAYERS:
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > 2:
            with suppress(AttributeError, NotImplementedError):  # some compute it from other settings
                setattr(config, name, 2)
    return config


def roles() -> dict[str, list[str] | None]:
    """`name role` of each site, by class; None where a class does not build from its defaults."""
    found: dict[str, list[str] | None] = {}
    for family in FAMILIES:
        for kind, names in getattr(modeling_auto, f"{family}_MAPPING_NAMES").items():
            for name in (names,) if isinstance(names, str) else names:
                if name in found:
                    continue
                try:
                    with torch.device("meta"):
                        model = getattr(transformers, name)(small(kind))
                    found[name] = [f"{site.name} {site.role}" for site in find_sites(model)[0]]
                except Exception:
                    found[name] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--beside", type=Path, help="what an earlier run wrote")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    found = roles()
    given.file.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
    left_out = sum(value is None for value in found.values())
    print(f"{len(found) - left_out} classes; {left_out} do not build from their defaults")
    if given.beside is None:
        return
    before = json.loads(given.beside.read_text(encoding="utf-8"))
    for name, parts in found.items():
        old, new = set(before.get(name) or ()), set(parts or ())
        if old != new:
            print(f"{name}\n  - {sorted(old - new)[:6]}\n  + {sorted(new - old)[:6]}")


if __name__ == "__main__":
    main()
