"""From manifest lines and media files to prompts.

`manifest` (lines, checked), `decode` with `container`, `packets`, `dali`, `picture`, `sound` and `whole` (media to
arrays; what is damaged is named), `features` (as the encoders take them), `plan` and `expand` (a
medium's size, its tokens and positions), `prompt` (all of that put together), and
`loader` (prompts ahead of time in processes that can be killed; the order of samples). docs/data.md has the rules.
"""
