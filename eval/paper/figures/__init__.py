"""Figures: style (the one visual style), series (curves out of metrics.jsonl), training (a run), paper (the paper's),
side_by_side (pictures, sound and completions), build (all of a reproduction's folder)."""
