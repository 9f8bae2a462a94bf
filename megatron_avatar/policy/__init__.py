"""The Omni policy on Megatron-Core: backend, model, attention, weights, log-probabilities and generation."""
