"""What a run will cost, before it costs it.

`outline` (hours, disk and host memory in a hundredth of a second, without torch), `work` and `batches` (a step's tokens
and micro-batches), `memory` on `meta` (a rank's step without numbers), `seconds`, `calibrate` (this machine's speeds),
`dynamics` and `prospects` (what a stage will do with its prompts), and `plan`, which puts them together for a dry run.
"""
