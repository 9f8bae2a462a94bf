"""The Omni policy on Megatron-Core: one model that trains and generates.

`backend` and `devices` (process groups; CUDA or not), `architecture`, `shape`, `build`, `model`, `layer`, `mixture` and
`routes` (the policy), `towers` and `tower_attention` (encoders), `groups` and `micro_batches` (packing), `attention`,
`flash` and `kernels/` (the maths), `logprobs`, `generate` with `lanes`, `cache`, `decode`, `sampling` and `kept`,
`weights` with `slots` and `safetensors_folder` (Hugging Face folders), `lora`, `fusions` (what is installed).
"""

import warnings

# Megatron-Core warns at every import of what it lacks (Apex, Transformer Engine); the doctor says it once, better.
warnings.filterwarnings("ignore", module=r"megatron\.core")
