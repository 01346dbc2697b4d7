"""Rule-based rewards for reinforcement learning: text in, `Score` out. Imports neither torch nor `rl`."""

from rewards.base import Score

__all__ = ["Score"]
