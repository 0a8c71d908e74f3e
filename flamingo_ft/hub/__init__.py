"""The Hugging Face Hub: names, fetching, pushing, and what goes wrong there in words."""

from .fetch import fetch_model, pinned
from .missing import existing
from .names import HubName, hub_name

__all__ = ["HubName", "existing", "fetch_model", "hub_name", "pinned"]
