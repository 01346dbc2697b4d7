"""The policy: a DeepSeek-V2/V3 decoder over packed tokens (arXiv:2405.04434, 2412.19437).

In: `tokens (T,)` of S sequences concatenated without padding and `cu_seqlens (S + 1,)`. Out: hidden states after the
final norm, (T, D), and the experts that every token used. Logits are `policy.lm_head(hidden)`, asked for in chunks by
the loss, so that (T, V) never exists. Module and parameter names are those of transformers' DeepseekV3ForCausalLM.

Departs from the papers: no multi-token prediction head, no auxiliary balance loss (RL does not use them).

    cu = torch.tensor([0, 3, 5], dtype=torch.int32)             # sequences [5, 6, 7] and [8, 2]
    out = policy(torch.tensor([5, 6, 7, 8, 2]), cu, 3)
    logits = policy.lm_head(out.hidden)                         # (5, V); row 2 predicts what follows [5, 6, 7]
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rl.policy.attention import PackedLayout
from rl.policy.config import PolicyConfig
from rl.policy.mla import MLA
from rl.policy.moe import MLP, Experts, MoE, Router
from rl.policy.norm import RMSNorm
from rl.policy.rope import RotaryEmbedding, RotaryTables


class PolicyOutput(NamedTuple):
    """hidden: (T, D) after the final norm. routes: (T, Lm, K) int64, the experts used; None without MoE layers."""

    hidden: torch.Tensor
    routes: torch.Tensor | None


class DecoderLayer(nn.Module):
    def __init__(self, config: PolicyConfig, index: int) -> None:
        super().__init__()
        self.self_attn = MLA(config)
        self.mlp = MoE(config) if config.is_moe_layer(index) else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        tables: RotaryTables,
        layout: PackedLayout,
        routes: torch.Tensor | None = None,
        latents: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: (T, D), routes: (T, K) or None -> (T, D), experts used (T, K) or None for a dense layer."""
        x = x + self.self_attn(self.input_layernorm(x), tables, layout, latents)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            update, experts = self.mlp(normed, routes)
            return x + update, experts
        return x + self.mlp(normed), None


class Decoder(nn.Module):
    """Everything but the output head; the `model.` prefix of the checkpoint."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        # A given weight skips nn.Embedding's own draw, which on the meta device loads torch's compiler (3 s).
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Policy(nn.Module):
    """`gradient_checkpointing = True` recomputes each layer in the backward pass instead of keeping its activations.
    `generation_config`: the checkpoint's file of that name, kept to be saved again; None for a new policy."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.generation_config: dict[str, Any] | None = None

    def forward(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        *,
        routes: torch.Tensor | None = None,
        latents: list[torch.Tensor] | None = None,
    ) -> PolicyOutput:
        """tokens: (T,) integers; cu_seqlens: (S + 1,) int32, from 0 to T, on the device of the tokens; max_seqlen: at
        least the longest sequence. Positions restart at 0 in each sequence.

        routes: (T, Lm, K) integers: use these experts (their weights come from the live router). latents: a list to
        which each layer appends its cache rows (T, C + R), normalised latent | rotated key (prefill; not with
        checkpointing).
        """
        self._check_routes(tokens, routes)
        layout = PackedLayout.of(cu_seqlens, num_tokens=tokens.shape[0], max_seqlen=max_seqlen)
        tables = self.rotary.tables(layout.positions)
        x = self.model.embed_tokens(tokens)
        used: list[torch.Tensor] = []
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and latents is None
        for layer in self.model.layers:
            replayed = None
            if routes is not None and isinstance(layer.mlp, MoE):
                replayed = routes[:, len(used)]
            if recompute:
                x, experts = checkpoint(layer, x, tables, layout, replayed, use_reentrant=False)
            else:
                x, experts = layer(x, tables, layout, replayed, latents)
            if experts is not None:
                used.append(experts)
        return PolicyOutput(self.model.norm(x), torch.stack(used, dim=1) if used else None)

    def _check_routes(self, tokens: torch.Tensor, routes: torch.Tensor | None) -> None:
        if routes is None:
            return
        expected = (tokens.shape[0], len(self.config.moe_layers), self.config.num_experts_per_tok)
        if tuple(routes.shape) != expected:
            raise ValueError(f"routes have shape {tuple(routes.shape)}; allowed: (T, MoE layers, K) = {expected}")


def full_dim(parameter: nn.Parameter) -> int:
    """Dimensions of the whole parameter: one that ZeRO-3 has split already is flat and keeps its shape beside."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def moe_leaf_classes(policy: nn.Module) -> list[type[nn.Module]]:
    """Classes to set as ZeRO-3 leaf modules: every class with a router and fused experts inside, found by structure (a
    child that holds a 3-D parameter), so that blocks of other architectures are found too."""
    found: list[type[nn.Module]] = []
    for module in policy.modules():
        children = (child for child in module.children() if not isinstance(child, nn.Conv1d))  # 3-D too, and no expert
        fused = any(full_dim(p) == 3 for child in children for p in child.parameters(recurse=False))
        if fused and type(module) not in found:
            found.append(type(module))
    return found


def empty_policy(config: PolicyConfig, *, dtype: torch.dtype, device: torch.device | str) -> Policy:
    """A policy whose memory is allocated on `device` and not filled: no time or memory goes to throw-away numbers."""
    with torch.device("meta"):
        policy = Policy(config)
    policy = policy.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:  # leaving the meta device made two parameters of one
        policy.lm_head.weight = policy.model.embed_tokens.weight
    return policy


def init_policy(
    config: PolicyConfig, *, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Policy:
    """A policy with random weights: normal(0, initializer_range), norms 1, selection bias 0.

    Each parameter's numbers depend on (seed, its name, the kind of device) alone, drawn in fp32 and rounded to `dtype`;
    torch's global generator is neither read nor moved. The memory needed is that of the policy itself.
    """
    policy = empty_policy(config, dtype=dtype, device=device)
    generator = torch.Generator(device=device)
    for name, parameter in policy.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device)
        parameter.data.copy_(drawn.normal_(0.0, config.initializer_range, generator=generator))
    for module in policy.modules():
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias.zero_()
    return policy


__all__ = ["Decoder", "DecoderLayer", "Experts", "Policy", "PolicyOutput", "init_policy", "moe_leaf_classes"]
