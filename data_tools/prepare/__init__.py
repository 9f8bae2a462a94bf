"""Turn a dataset into a manifest: rows to samples, media measured and stored by content, everything streamed.

`settings` (typed, and the claim on a folder), `rows` with `sources` and `mapping` (row -> draft), `store` with
`measure` and `convert` (a medium in a worker that can be killed), `judge_row` (draft and media -> sample), `shard` (the
journal that continues), `merge` (journals -> manifest), `report`.
"""
