"""An adapter or a merged model to the Hub."""

from .files import with_card
from .push import push

__all__ = ["push", "with_card"]
