"""GLM: one stack of blocks that reads a text with blanks in both directions and writes what is missing from left to right.

Du et al. 2022, "GLM: General Language Model Pretraining with Autoregressive Blank Infilling". The GLM models of today's
transformers are causal decoders; this is the model of the paper, in the sizes of small BERTs. Importing this file
registers it with transformers' auto classes under the model type `graftkit_glm`.

An input is part A, the text with one mask in place of each blank, then part B, the blanks. Each token has two positions:
its place in part A (a token of part B: the place of its mask), and its number within its blank, 0 in part A. Attention
is full over part A and causal over part B, so part A never sees part B.

Shapes: B rows, L tokens, D width, H heads, K keys, which are the L tokens after those of a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class GraftKitGlmConfig(PreTrainedConfig):
    """Geometry of a GLM.

    `max_position_embeddings`: places in part A; a blank may be as long. `block_positions`: whether tokens have the second
    position, the one within their blank. Without it the places of part B go on where those of part A end, as in a
    decoder, so that nothing but their order tells which blank is which (the ablation of the paper's section 3.3).
    """

    model_type = "graftkit_glm"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 1024,
        max_position_embeddings: int = 512,
        block_positions: bool = True,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not divisible by num_attention_heads {num_attention_heads}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.block_positions = block_positions
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})


class BeforeSum(nn.Linear):
    """A linear layer whose output is added to the states; its first weights are smaller."""


class GraftKitGlmAttention(nn.Module):
    is_causal = False  # the mask says all

    def __init__(self, config: GraftKitGlmConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = BeforeSum(width, width)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """hidden_states (B, L, D); attention_mask (B, 1, L, K), True to attend."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            layer(hidden_states).view(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H, L, D / H)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, sdpa_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        states, _ = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, is_causal=False
        )
        return self.o_proj(states.reshape(*hidden_states.shape[:-1], -1))


class GraftKitGlmMLP(nn.Module):
    def __init__(self, config: GraftKitGlmConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = BeforeSum(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(hidden_states)))


class GraftKitGlmBlock(GradientCheckpointingLayer):
    """Norms stand before the attention and the feed-forward layers, as in the authors' code."""

    def __init__(self, config: GraftKitGlmConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GraftKitGlmAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GraftKitGlmMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        states = self.attention(self.input_layernorm(hidden_states), attention_mask, cache)
        hidden_states = hidden_states + self.dropout(states)
        states = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.dropout(states)


class GraftKitGlmPreTrainedModel(PreTrainedModel):
    config_class = GraftKitGlmConfig
    base_model_prefix = "glm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GraftKitGlmBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    pools = "mean"  # no token stands for the whole text

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; those of layers before a residual sum divided by sqrt(2 * layers), as in the authors' code."""
        std = self.config.initializer_range
        if isinstance(module, BeforeSum):
            std /= (2 * self.config.num_hidden_layers) ** 0.5
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            bias = getattr(module, "bias", None)
            if bias is not None:
                init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class GraftKitGlmModel(GraftKitGlmPreTrainedModel):
    """GLM without its output layer. Without `block_position_ids`, the whole input is part A: a bidirectional encoder."""

    def __init__(self, config: GraftKitGlmConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.block_positions:
            # a blank of n tokens has the numbers 1 to n + 1, as its start is one of its inputs
            self.block_position_embeddings = nn.Embedding(
                config.max_position_embeddings + 2, config.hidden_size
            )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(GraftKitGlmBlock(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        block_position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple:
        """input_ids (B, L); attention_mask (B, K), 0 for padding; position_ids (B, L): places in part A, by default 0, 1,
        ...; block_position_ids (B, L): 0 in part A, 1, 2, ... in each blank of part B. If these are fewer than the input
        tokens, as when a method puts trained tokens in front, the first tokens are of part A."""
        states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length = states.shape[1]
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=states.device)[None]
        if block_position_ids is not None:
            block_position_ids = nn.functional.pad(
                block_position_ids, (length - block_position_ids.shape[1], 0)
            )
        states = states + self.position_embeddings(position_ids)
        if self.config.block_positions:
            numbers = torch.zeros_like(position_ids) if block_position_ids is None else block_position_ids
            states = states + self.block_position_embeddings(numbers)
        states = self.dropout(states)
        mask = attention_of(attention_mask, block_position_ids, length, seen)
        for layer in self.layers:
            states = layer(states, mask, past_key_values)
        output = BaseModelOutput(last_hidden_state=self.final_layernorm(states))
        return output if return_dict is not False else output.to_tuple()


def attention_of(
    attention_mask: Tensor | None, block_position_ids: Tensor | None, length: int, seen: int
) -> Tensor | None:
    """Return which of the K keys each of the L tokens attends to, (B, 1, L, K), or None for all of them.

    A token sees all of part A, and of part B what stands before it and itself; so part A sees itself alone. `seen`: tokens
    of a cache, which all later tokens see.
    """
    mask = None
    if block_position_ids is not None:
        order = torch.ones(length, length, dtype=torch.bool, device=block_position_ids.device).tril()
        mask = (block_position_ids == 0)[:, None, None, :] | order
        mask = nn.functional.pad(mask, (seen, 0), value=True)
    if attention_mask is not None:
        real = attention_mask[:, None, None, :].bool()
        mask = real.expand(-1, 1, length, -1) if mask is None else mask & real
    return mask


class GraftKitGlmForMaskedLM(GraftKitGlmPreTrainedModel):
    """GLM with its output layer, which is tied to the embeddings. The logits at a token of part B predict the next one."""

    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}  # noqa: RUF012
    fills_blanks = True  # it writes blanks behind the text, not in their place

    def __init__(self, config: GraftKitGlmConfig) -> None:
        super().__init__(config)
        self.glm = GraftKitGlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        block_position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """As `GraftKitGlmModel.forward`; labels (B, L): the token that each position predicts, not shifted, -100 for none;
        logits_to_keep: how many of the last positions, or which ones, have logits; 0 for all."""
        output = self.glm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            block_position_ids=block_position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels[:, kept].flatten())
        found = MaskedLMOutput(loss=loss, logits=logits)
        return found if return_dict is not False else found.to_tuple()


AutoConfig.register(GraftKitGlmConfig.model_type, GraftKitGlmConfig, exist_ok=True)
AutoModel.register(GraftKitGlmConfig, GraftKitGlmModel, exist_ok=True)
AutoModelForMaskedLM.register(GraftKitGlmConfig, GraftKitGlmForMaskedLM, exist_ok=True)
