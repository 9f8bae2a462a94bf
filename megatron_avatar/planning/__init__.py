"""What a run will cost, before it costs it.

`work` (tokens and micro-batches of a step), `memory`, `seconds`, `calibrate` (this machine's speeds), `meta` (a policy
without weights), and `plan`, which puts them together for a dry run.
"""
