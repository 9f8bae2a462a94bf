"""Replay: the buffer decides what is kept and drawn, the store moves it to disk and back."""
