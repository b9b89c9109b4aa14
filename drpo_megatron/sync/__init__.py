"""Weights from the trainer to the servers: `push` (a whole sync), one transport a file, `verify` (checksums)."""
