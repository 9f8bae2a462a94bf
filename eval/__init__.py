"""Evaluation and the report: what a user runs after training."""
