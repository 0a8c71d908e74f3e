"""Where models run unless told otherwise."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The GPU where there is one: of several processes, each has its own as the current one."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
