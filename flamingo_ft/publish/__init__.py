"""Prepare an adapter or a merged model for the Hub and push it."""

from .push import files_to_push, push

__all__ = ["files_to_push", "push"]
