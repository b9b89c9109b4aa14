"""What a configuration needs, before a GPU is booked: memory a rank, seconds a step, and which layouts do better.

Arithmetic on `config.json` and the settings: no torch, no weights, no GPU. docs/scaling.md says what it predicts.
"""
