"""A chat in a terminal: what each line does, and the commands that begin with a slash."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flamingo_ft import atomic
from flamingo_ft.data.media import open_image
from flamingo_ft.data.sample import display_text
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import plural

from .conversation import Conversation


class Chat:
    """Turns lines into answers. `respond` yields text to print as it comes, with its line breaks."""

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.waiting: list[str] = []  # images for the next question
        self.ended = False
        # Name -> function, arguments, and what it does.
        self._commands: dict[str, tuple[Callable[[list[str]], Iterator[str]], str, str]] = {
            "/image": (self._image, "FILE ...", "add images to the next question"),
            "/undo": (self._undo, "", "remove the last question and its answer"),
            "/reset": (self._reset, "", "begin anew"),
            "/history": (self._history, "", "print the dialogue"),
            "/save": (self._save, "FILE", "write the dialogue as a row to train on (JSONL)"),
            "/help": (self._help, "", "print these commands"),
            "/exit": (self._exit, "", "leave; Ctrl-D does too"),
        }

    def respond(self, line: str) -> Iterator[str]:
        """Yield what to print for a line: an answer piece by piece, or what a command did.

        Raises UserError for a wrong command, an image that cannot be read, and a dialogue that is too long;
        the chat goes on as it was before the line.
        """
        words = line.split(maxsplit=1)
        if not words:
            return
        if not words[0].startswith("/"):
            yield from self._ask(line.strip())
            return
        if words[0] not in self._commands:
            raise UserError(f"{words[0]}: no such command; use one of {', '.join(self._commands)}")
        run, *_ = self._commands[words[0]]
        yield from run(_arguments(words))

    def _ask(self, text: str) -> Iterator[str]:
        turns = self.conversation.turns
        try:
            yield from self.conversation.stream(text, self.waiting)
        finally:
            if self.conversation.turns > turns:  # else they wait for the next attempt
                self.waiting = []
        yield "\n"

    def _image(self, files: list[str]) -> Iterator[str]:
        if not files:
            raise UserError("/image: got no file; name one or more, with quotes around names with spaces")
        paths = [os.path.expanduser(file) for file in files]
        for path in paths:
            open_image(path, "/image")
        self.waiting = [*self.waiting, *paths]
        yield f"{plural(len(self.waiting), 'image')} for the next question\n"

    def _undo(self, _: list[str]) -> Iterator[str]:
        if not self.conversation.undo():
            raise UserError("/undo: there is no question yet; ask one")
        yield f"{plural(self.conversation.turns, 'question')} left\n"

    def _reset(self, _: list[str]) -> Iterator[str]:
        self.conversation.reset()
        self.waiting = []
        yield "a new dialogue\n"

    def _history(self, _: list[str]) -> Iterator[str]:
        for message in self.conversation.messages:
            yield f"{message['role']}: {display_text(message)}\n"

    def _save(self, files: list[str]) -> Iterator[str]:
        if len(files) != 1:
            raise UserError(f"/save: got {plural(len(files), 'file name')}; give one")
        if not self.conversation.turns:
            raise UserError("/save: there is no question yet; ask one")
        file = Path(os.path.expanduser(files[0]))
        row = self.conversation.row()
        row["images"] = [str(Path(image).absolute()) for image in row["images"]]
        try:
            atomic.write_text(file, json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"/save: {file}: cannot be written ({error.strerror})") from None
        yield f"saved in {file}\n"

    def _help(self, _: list[str]) -> Iterator[str]:
        usages = {f"{name} {files}": text for name, (_run, files, text) in self._commands.items()}
        width = max(map(len, usages))
        for usage, text in usages.items():
            yield f"{usage:{width}}  {text}\n"

    def _exit(self, _: list[str]) -> Iterator[str]:
        self.ended = True
        yield from ()


def _arguments(words: list[str]) -> list[str]:
    """Return a command's arguments, split as a shell does."""
    try:
        return shlex.split(words[1]) if len(words) > 1 else []
    except ValueError as error:
        raise UserError(f"{words[0]}: {error}; close the quotes") from None


def prompt_of(chat: Chat) -> str:
    """Return what stands before the line that the user types."""
    return f"[{plural(len(chat.waiting), 'image')}] > " if chat.waiting else "> "


def run(
    chat: Chat, read: Callable[[str], str], write: Callable[[str], Any], warn: Callable[[str], Any]
) -> None:
    """Read lines and write what they lead to until the user leaves.

    read: returns the next line, given what stands before it; raises EOFError at the end. write: prints text
    as it is. warn: prints a line about an error. Ctrl-C ends an answer; where a line is typed, it ends the
    chat.
    """
    while not chat.ended:
        try:
            line = read(prompt_of(chat))
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        try:
            for piece in chat.respond(line):
                write(piece)
        except KeyboardInterrupt:
            write("\n")
        except UserError as error:
            warn(str(error))
