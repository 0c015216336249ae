"""Files: written whole or not at all, recognised by digests, and JSON whose errors are one line."""
