"""An example of each form of each method."""

from __future__ import annotations

from graftkit.methods.base import read

# At least one example of each method; those that only change other methods stand beside one. The first is the one
# of the matrix in docs/methods.md, which runs it on every model of tests/support/zoo.py; the others run on three of them.
EXPRESSIONS = {
    "adalora": ["adalora(rank=4, target_rank=2)"],
    "adapter": [
        "adapter(bottleneck=5)",
        "adapter(bottleneck=3, norms=False, sites='blocks[-1:]', nonlinearity='tanh', dropout=0.5)",
        "adapter(bottleneck=3, placement='pfeiffer')",
        "adapter(bottleneck=3, placement='parallel', norms=True)",
    ],
    "adapter_fusion": [
        """adapter_fusion(adapters=["adapter(bottleneck=3, placement='pfeiffer')", "adapter(2, 'pfeiffer')"])""",
        """adapter_fusion(adapters=["adapter(3, 'houlsby')", "adapter(2, 'houlsby')"]) + head(classes=2)""",
        """adapter_fusion(adapters=["adapter(3, 'parallel')", "adapter(2, 'parallel')"], regularization=0)""",
    ],
    "bitfit": ["bitfit()", "bitfit(sites='q,up')"],
    "dora": [
        "dora(rank=3)",
        "dora(rank=2, sites='attention', dropout=0.5, use_rslora=True) + head(classes=2)",
    ],
    "freeze": ["full() + freeze('blocks[0]')", "full() + freeze('embeddings')"],
    "full": ["full()"],
    "gradual_unfreeze": ["gradual_unfreeze()", "gradual_unfreeze(unit='steps', decay=0.5) + head(classes=3)"],
    "head": [
        "head(classes=5)",
        "head(classes=3, pooling='mean', hidden=6)",
        "head(classes=2, pooling='attention')",
        "head(classes=3, pooling='tokens', hidden=4)",
    ],
    "ia3": ["ia3()", "ia3(sites='all-linear') + head(classes=2)"],
    "layerwise_lr": ["unfreeze('blocks') + layerwise_lr(decay=0.5)"],
    "loha": ["loha(rank=3)", "loha(rank=2, use_effective_conv2d=True, alpha=3)"],
    "lokr": ["lokr(rank=2)", "lokr(rank=2, decompose_both=True, factor=4, use_effective_conv2d=True)"],
    "lora": [
        "lora(rank=3)",
        "lora(rank=2, sites='q,v', dropout=0.5, alpha=3) + head(classes=2)",
        "lora(rank=2, sites='embeddings, ffn', rank_pattern={'blocks[-1:]': 4}, loraplus_lr_ratio=4.0, use_rslora=True)",
        "lora(rank=3, bias='all', init='gaussian') + head(classes=2)",
    ],
    "new_tokens": [
        "new_tokens(tokens=['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'], first_id=12)",
        "new_tokens(tokens=['a', 'b', 'c', 'd', 'e', 'f'], first_id=34) + head(classes=2)",
    ],
    "norms": ["norms()", "norms(sites='blocks[0].norms')"],
    "peft": [
        "peft(options={'r': 3})",
        "peft('hra', {'r': 4})",
        "peft('oft', {'oft_block_size': 4})",
        "peft('fourierft', {'n_frequency': 20, 'scaling': 3}, sites='attention')",
    ],
    "pissa": ["pissa(rank=3)", "pissa(rank=2, iterations=0, dropout=0.5) + head(classes=2)"],
    "prefix": ["prefix(tokens=3)", "prefix(tokens=2, hidden=5)", "prefix(tokens=2, shift=True)"],
    "prompt": ["prompt(tokens=3)", "prompt(tokens=2, init='vocabulary') + head(classes=2)"],
    "ptuning": ["ptuning(tokens=3, hidden=5)", "ptuning(tokens=2, encoder='lstm', hidden=4, layers=1)"],
    "unfreeze": ["unfreeze('blocks[-1:]')"],
    "vera": ["vera(rank=5)", "vera(rank=3, save_projection=False, seed=3, dropout=0.5)"],
}


# Methods that say they start as the base model, exactly
IDENTITIES = {
    "lora",
    "dora",
    "pissa",
    "adalora",
    "loha",
    "lokr",
    "vera",
    "adapter",
    "bitfit",
    "full",
    "ia3",
    "norms",
    "unfreeze",
    "freeze",
    "gradual_unfreeze",
    "layerwise_lr",
}


def starts_as_base(text: str) -> bool:
    return {method.name for method in read(text).methods} <= IDENTITIES
