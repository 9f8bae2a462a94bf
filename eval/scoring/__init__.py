"""What an answer is worth.

`parsers` and `metrics` (by name in the benchmarks' YAML), `open_answers`, `ask` (a language model reads or judges),
`predictions` (lines of a file), `stats`, `cells` and `summary` (intervals, breakdowns).
"""
