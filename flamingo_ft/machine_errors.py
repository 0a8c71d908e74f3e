"""Errors of the machine: memory that runs out, a device that fails, a disk that takes no more.

Damaged files and unsuitable models raise almost any exception, RuntimeError above all, and so does a machine in trouble.
Whoever catches the former asks here first, so that no full GPU is reported as a damaged file.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from safetensors import SafetensorError

DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
PROCESS_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}  # nothing is wrong with the file

# How torch, cuBLAS and bitsandbytes report an allocation that failed, where they have no exception type for it.
_ALLOCATION = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
_REQUESTED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
_DEVICE = re.compile(
    r"\b(CUDA|CUBLAS|CUDNN|NCCL|HIP|XPU|MPS)\b.*\b(error|failure|failed|status)|no kernel image",
    re.IGNORECASE,
)
# torch.save has no exception type for a full disk either; safetensors quotes the operating system. torch's reader raises
# from the same source file (inline_container.cc) for damaged checkpoints, so that name alone says nothing.
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|file write failed|inline_container\.cc.*unexpected pos")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def out_of_memory(error: BaseException) -> str | None:
    """Which memory is full, and how much was requested; None for any other error."""
    text = str(error)
    full = isinstance(error, MemoryError) or _is_torch_error(error, "OutOfMemoryError")
    if not full and not any(part in text for part in _ALLOCATION):
        return None
    size = _REQUESTED.search(text)
    on_gpu = _is_torch_error(error, "OutOfMemoryError") or "CUDA" in text or "CUBLAS" in text
    return f"{'GPU' if on_gpu else 'host'} memory is full" + (
        f" (tried to allocate {size[1]} more)" if size else ""
    )


def is_device_failure(error: BaseException) -> bool:
    """Whether a GPU, its driver or the communication between processes failed."""
    if _is_torch_error(error, "AcceleratorError", "DistError"):
        return True
    return isinstance(error, RuntimeError) and bool(_DEVICE.search(str(error)))


def disk_failure(error: BaseException) -> str | None:
    """What a disk that takes no more reported, with the file where it is known; None for any other error."""
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error)
    if isinstance(error, SafetensorError) and _is_disk_errno(text):
        return text
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(text):
        return text.splitlines()[0]
    return None


def is_machine_error(error: BaseException) -> bool:
    """Whether the machine, or what this process may do on it, is to blame."""
    if isinstance(error, OSError) and error.errno in PROCESS_ERRNOS:
        return True
    return bool(out_of_memory(error) or is_device_failure(error) or disk_failure(error))


def reraise_machine_error(error: BaseException) -> None:
    """Raise the machine's error that ``error`` is, or was caused by; return where there is none."""
    for one in _chain(error):
        if is_machine_error(one):
            raise one


def _is_torch_error(error: BaseException, *names: str) -> bool:
    """Whether the exception type, or one that it inherits from, is torch's and has one of these names.

    By name, because importing torch takes seconds, and a command's refusals come without it.
    """
    return any(one.__name__ in names and one.__module__.startswith("torch") for one in type(error).__mro__)


def _is_disk_errno(text: str) -> bool:
    number = _OS_ERROR.search(text)
    return int(number[1]) in DISK_ERRNOS if number else "No space left on device" in text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
