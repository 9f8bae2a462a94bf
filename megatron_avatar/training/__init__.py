"""How a step trains: the order in which the rooms below are called (docs/architecture.md walks through it).

`loop` (stages, steps, what goes on from a checkpoint), `rollout` and `balance` (prompts and groups of each rank),
`scoring` (rewards beside the GPU's work), `learner` (groups to a gradient) with `guard` (the error between generation
and training), `optim` (main weights of the whole run, moments and schedule of a stage), `sft` (traces as groups of
one), `evaluate` (answers, for `eval/` too), `stage_data` (which samples, how long), `metrics` and `telemetry` (what is
logged), `provenance` (what made a number), `replay_step` (one logged step again).
"""
