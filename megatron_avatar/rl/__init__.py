"""The algorithm as pure functions on plain tensors and numpy; knows neither Megatron nor files of a run.

`step` (prompts chosen, advantages given, rewards fed back), `advantages`, `shaping` (TAS), `objective` (the loss),
`tracker` (R-bar, tiers), `hints`, `rewards/` (by problem type, agreement, judge, and their sum), `replay/` (the buffer
and its shards). Paper equations stand in the docstrings.
"""
