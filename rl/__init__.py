"""Aha: GRPO reinforcement learning for reasoning with MLA/MoE policies."""

__version__ = "0.1.0"
