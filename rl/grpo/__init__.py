"""The mathematics of GRPO as pure tensor functions: rewards to advantages, hidden states to logprobs, logprobs to a
loss.

Torch only. No configuration object, no rank, no accumulation: every quantity that spans micro-batches or ranks is
returned as a SUM, and the caller divides once by `loss.loss_divisor`.
"""
