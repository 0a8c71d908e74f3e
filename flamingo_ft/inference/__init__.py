"""Asking a model: `Predictor` in Python, and an OpenAI-compatible server in `server`."""
