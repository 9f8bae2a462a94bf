"""From manifest lines and media files to prompts."""
