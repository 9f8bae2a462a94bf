"""The algorithm as pure functions on plain tensors and numpy; knows neither Megatron nor files of a run."""
