"""The Hugging Face Hub: names, downloads, uploads, and errors that say what to do."""

from .fetch import fetch_model, pinned_name
from .names import HubName, existing_path, hub_name

__all__ = ["HubName", "existing_path", "fetch_model", "hub_name", "pinned_name"]
