"""An adapter or a merged model to the Hub."""

from .push import files_to_push, push

__all__ = ["push", "files_to_push"]
