"""Recognize errors of the machine: full memory, a failing device, a full disk.

Damaged files and unsuitable models raise almost any exception, mostly RuntimeError, and so does a machine in
trouble. Code that catches the former checks here first, so that a full GPU is not reported as a damaged file.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from safetensors import SafetensorError

DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# Limits or permissions of this process; the file itself is fine.
PROCESS_ERRNOS = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}

# How torch, cuBLAS and bitsandbytes report a failed allocation where they have no exception type for it.
_ALLOCATION = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
_REQUESTED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
_DEVICE = re.compile(
    r"\b(CUDA|CUBLAS|CUDNN|NCCL|HIP|XPU|MPS)\b.*\b(error|failure|failed|status)|no kernel image",
    re.IGNORECASE,
)
# torch.save has no exception type for a full disk; safetensors quotes the operating system. torch's reader of
# damaged checkpoints raises from the same source file, inline_container.cc, so its name alone proves nothing.
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|file write failed|inline_container\.cc.*unexpected pos")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def out_of_memory(error: BaseException) -> str | None:
    """Return which memory is full and how much was requested; None for any other error."""
    text = str(error)
    is_memory_error = isinstance(error, MemoryError) or _is_torch_error(error, "OutOfMemoryError")
    if not is_memory_error and not any(part in text for part in _ALLOCATION):
        return None
    is_on_gpu = _is_torch_error(error, "OutOfMemoryError") or "CUDA" in text or "CUBLAS" in text
    size = _REQUESTED.search(text)
    requested = f" (tried to allocate {size[1]} more)" if size else ""
    return f"{'GPU' if is_on_gpu else 'host'} memory is full{requested}"


def is_device_failure(error: BaseException) -> bool:
    """Whether a GPU, its driver or the communication between processes failed."""
    if _is_torch_error(error, "AcceleratorError", "DistError"):
        return True
    return isinstance(error, RuntimeError) and bool(_DEVICE.search(str(error)))


def disk_failure(error: BaseException) -> str | None:
    """Return what a full or failing disk reported, with the file if it is known; None for any other error."""
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error)
    if isinstance(error, SafetensorError) and _is_disk_errno(text):
        return text
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(text):
        return text.splitlines()[0]
    return None


def is_machine_error(error: BaseException) -> bool:
    """Whether the error comes from the machine, or from limits and permissions of this process."""
    if isinstance(error, OSError) and error.errno in PROCESS_ERRNOS:
        return True
    return bool(out_of_memory(error) or is_device_failure(error) or disk_failure(error))


def reraise_machine_error(error: BaseException) -> None:
    """Raise the error of the machine that ``error`` is or was caused by, if there is one."""
    for cause in _causes(error):
        if is_machine_error(cause):
            raise cause


def _is_torch_error(error: BaseException, *names: str) -> bool:
    """Whether the exception is an instance of a class of torch with one of these names.

    Compared by name, because importing torch takes seconds and most errors are reported without it.
    """
    return any(base.__name__ in names and base.__module__.startswith("torch") for base in type(error).__mro__)


def _is_disk_errno(text: str) -> bool:
    number = _OS_ERROR.search(text)
    return int(number[1]) in DISK_ERRNOS if number else "No space left on device" in text


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
