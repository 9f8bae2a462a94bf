"""Turn a dataset into a manifest: rows to samples, media measured and stored by content, everything streamed."""
