"""Weights from the trainer to the server: `buckets` (wire format), `distributed` (transport), `verify` (checksums)."""
