"""Import peft without bitsandbytes, which one of its helpers that nothing here uses would import.

bitsandbytes in turn imports torch's compiler: together a sixth of the time of `import flamingo_ft.adapters`.
peft's layers for quantized matrices import it themselves.
"""

from __future__ import annotations

import sys


def import_peft() -> None:
    """Import peft, unless it or bitsandbytes is imported already."""
    if "peft" in sys.modules or "bitsandbytes" in sys.modules:
        return
    sys.modules["bitsandbytes"] = None  # pyrefly: ignore[unsupported-operation]
    try:
        from peft.import_utils import is_bnb_available
    finally:
        del sys.modules["bitsandbytes"]
    is_bnb_available.cache_clear()


import_peft()
