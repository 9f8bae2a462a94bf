"""The Omni policy on Megatron-Core: backend, model, attention, weights, log-probabilities and generation."""

import warnings

# Megatron-Core warns at every import of what it lacks (Apex, Transformer Engine); the doctor says it once, better.
warnings.filterwarnings("ignore", module=r"megatron\.core")
