"""Files that operating systems, file managers and editors leave in folders and archives, and nobody means as data."""

from __future__ import annotations

FOLDERS = frozenset(
    {
        "__macosx",
        ".appledouble",
        ".documentrevisions-v100",
        ".fseventsd",
        ".spotlight-v100",
        ".temporaryitems",
        ".trashes",
        "$recycle.bin",
        "system volume information",
        "@eadir",  # Synology: thumbnails, which are real images
        "#recycle",
        "@recycle",
        ".ipynb_checkpoints",
        "lost+found",
    }
)
FILES = frozenset(
    {
        ".ds_store",
        ".localized",
        "icon\r",
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        ".directory",
        "pax_global_header",
    }
)
APPLE_DOUBLE = "._"  # macOS: the resource fork of the file of that name, with the same extension
PAX_FOLDER = "paxheaders"  # extended headers, as tar programs that do not know them unpack them


def is_leftover(path: str) -> bool:
    """Whether a path, relative to its folder or archive and with forward slashes, names such a file."""
    *folders, name = path.lower().split("/")
    if name in FILES or name.startswith(APPLE_DOUBLE):
        return True
    return any(folder in FOLDERS or folder.partition(".")[0] == PAX_FOLDER for folder in folders)
