"""Sampling groups of completions from the policy that is being trained: the engine protocol is
`rl.types.RolloutEngine`."""
