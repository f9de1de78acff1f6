"""The multi-token-prediction (MTP) draft layers of Step-3.5/3.7, as vLLM runs them.

Draft layer k (0-based) predicts the token k + 2 places ahead: at position p it takes the residual stream of the layer
before it at p (the text model's last layer *before* its final norm for k = 0) and the embedding of token p + 1 + k:

    x      = eh_proj(concat(enorm(embed(token[p + 1 + k])), hnorm(h[k - 1][p])))
    h[k]   = decoder_layer(x)                      a dense layer with sliding attention and its own head count
    logits = output(norm(h[k]))                    its own norm and its own output matrix, not the model's

transformers' own MTP model is not used here: it shares the text model's output matrix and hands normalized hidden states
on, which is another function than the one that the published weights were trained for and that vLLM computes.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer, Step3p7RMSNorm, Step3p7RotaryEmbedding


def draft_config(config: Step3p7TextConfig) -> Step3p7TextConfig:
    """The text configuration seen by the draft layers: their own layer types, sliding head counts, no experts."""
    layers = config.num_nextn_predict_layers
    draft = copy.deepcopy(config)
    draft.num_hidden_layers = layers
    draft.layer_types = list(config.mtp_layer_types)
    draft.mlp_layer_types = list(config.mtp_mlp_layer_types)
    draft.swiglu_limits = draft.swiglu_limits_shared = None
    draft.per_layer_config = {
        index: {"num_attention_heads": config.num_sliding_attention_heads}
        for index, kind in enumerate(draft.layer_types) if kind == "sliding_attention"
    }
    return draft


class DraftLayer(nn.Module):
    """One MTP layer; `forward` returns its residual stream, `logits` what it predicts from it."""

    def __init__(self, config: Step3p7TextConfig, index: int):
        super().__init__()
        self.enorm = Step3p7RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = Step3p7RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Step3p7DecoderLayer(config, index)
        self.norm = Step3p7RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, embeddings, hidden, attention_mask, position_embeddings):
        joined = self.eh_proj(torch.cat([self.enorm(embeddings), self.hnorm(hidden)], dim=-1))
        return self.block(joined, attention_mask=attention_mask, position_embeddings=position_embeddings)

    def logits(self, hidden):
        """hidden [batch, tokens, hidden_size] -> logits [batch, tokens, vocabulary]."""
        return self.output(self.norm(hidden))


class Drafts(nn.Module):
    """All MTP layers of one model, run with the true tokens as their inputs (teacher forcing)."""

    def __init__(self, config: Step3p7TextConfig):
        super().__init__()
        self.config = draft_config(config)
        self.config._attn_implementation = config._attn_implementation or "sdpa"
        self.layers = nn.ModuleList(DraftLayer(self.config, k) for k in range(self.config.num_hidden_layers))
        self.rotary = Step3p7RotaryEmbedding(self.config)

    def forward(self, embeddings: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
        """embeddings and hidden [batch, tokens, hidden_size] (input embeddings; residual stream before the final norm)
        -> for each draft layer k the logits [batch, tokens - 1 - k, vocabulary]: entry p predicts token p + 2 + k."""
        result = []
        for k, layer in enumerate(self.layers):
            length = embeddings.shape[1] - 1 - k
            hidden = hidden[:, :length]
            shifted = embeddings[:, 1 + k:]
            positions = torch.arange(length, device=hidden.device).unsqueeze(0)
            kind = self.config.layer_types[k]
            mask = create_sliding_window_causal_mask(
                config=self.config, inputs_embeds=shifted, attention_mask=None, past_key_values=None,
                position_ids=positions)
            hidden = layer(shifted, hidden, mask, self.rotary(shifted, positions, kind))
            result.append(layer.logits(hidden))
        return result


def checkpoint_names(config: Step3p7TextConfig) -> dict[str, str]:
    """Parameter name in `Drafts` -> tensor name in the checkpoint (without any `language_model.` prefix)."""
    names = {}
    with torch.device("meta"):
        parameters = [name for name, _ in Drafts(config).named_parameters()]
    for name in parameters:
        _, index, rest = name.split(".", 2)
        rest = rest.removeprefix("block.")
        if rest.startswith(("norm.", "output.")):
            rest = f"transformer.shared_head.{rest}"
        names[name] = f"model.layers.{config.num_hidden_layers + int(index)}.{rest}"
    return names
