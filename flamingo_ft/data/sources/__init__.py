"""Where samples come from: files, folders and the Hub, row by row."""

from .source import Source, open_source

__all__ = ["Source", "open_source"]
