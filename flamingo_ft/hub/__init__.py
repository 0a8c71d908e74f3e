"""The Hugging Face Hub: names, fetching, pushing, and what goes wrong there in words."""

from .fetch import fetch_model, pinned_name
from .names import HubName, existing_path, hub_name

__all__ = ["HubName", "existing_path", "fetch_model", "hub_name", "pinned_name"]
