"""What is asked.

`benchmark` (a YAML, typed and checked), `items` (owners' records as questions), `clips` (a part of a film), `prompts`
(an item as the engine's sample).
"""
