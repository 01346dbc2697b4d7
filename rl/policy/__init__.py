"""The policy model, in torch only: configuration, RoPE, latent attention, experts, weights. It knows nothing of RL."""
