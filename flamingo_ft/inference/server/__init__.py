"""An OpenAI-compatible HTTP API around one model: chat completions, completions and responses."""
