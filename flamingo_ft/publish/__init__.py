"""An adapter or a merged model to the Hub."""

from .push import push, with_card

__all__ = ["push", "with_card"]
