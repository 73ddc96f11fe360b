"""The protocol as a model, walked through exhaustively: `python -m tests.model`. What it covers: docs/model.md."""
