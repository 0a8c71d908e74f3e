"""A chat in the terminal: lines are questions or commands, and a mistake ends nothing."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flamingo_ft.data import read_samples
from flamingo_ft.inference.chat import Chat, run
from flamingo_ft.inference.conversation import Conversation
from flamingo_ft.inference.predictor import Predictor

from .conftest import PROMPT


@pytest.fixture(scope="module")
def predictor(folders):
    return Predictor.from_pretrained(folders[0] / "adapter", max_new_tokens=6)


def talk(chat, *lines):
    """Return what a chat prints for some lines, and its errors."""
    screen, errors, waiting = [], [], list(lines)

    def read(prompt):
        screen.append(prompt)
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    run(chat, read, screen.append, errors.append)
    return "".join(screen), errors


def test_images_belong_to_the_next_question_and_answers_to_the_dialogue(predictor, folders):
    _, images = folders
    chat = Chat(Conversation(predictor))
    screen, errors = talk(chat, f"/image '{images[0]}' {images[1]}", "Name both.", "Again?", "")
    first, second = predictor(images, "Name both."), chat.conversation.messages[-1]["content"][0]["text"]
    assert screen == f"> 2 images for the next question\n[2 images] > {first}\n> {second}\n> > \n"
    assert errors == [] and chat.conversation.images == [str(image) for image in images]


def test_a_mistake_is_one_line_and_the_chat_goes_on(predictor, folders, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    chat = Chat(Conversation(predictor))
    _, errors = talk(
        chat,
        "/imgae a.png",
        "/image",
        f"/image {broken}",
        "/image 'a",
        "/undo",
        "/save",
        f"/save {tmp_path / 'chat.jsonl'}",
        PROMPT,
    )
    assert errors == [
        "/imgae: no such command; use one of /image, /undo, /reset, /history, /save, /help, /exit",
        "/image: got no file; name one or more, with quotes around names with spaces",
        f"/image: {broken}: not a readable image (of no known image format); replace it",
        "/image: No closing quotation; close the quotes",
        "/undo: there is no question yet; ask one",
        "/save: got 0 file names; give one",
        "/save: there is no question yet; ask one",
    ]
    assert chat.conversation.turns == 1


def test_a_saved_dialogue_is_a_row_to_train_on(predictor, folders, tmp_path):
    chat, file = Chat(Conversation(predictor, "Answer briefly.")), tmp_path / "my chat.jsonl"
    talk(chat, f"/image {folders[1][0]}", PROMPT, "And now?", f"/save '{file}'", "/exit", "never read")
    (sample,) = read_samples(file, image_root=Path("/"))
    assert sample.images == [str(folders[1][0])]
    assert sample.messages == chat.conversation.messages and chat.conversation.turns == 2


def test_commands_change_the_dialogue(predictor, folders):
    chat = Chat(Conversation(predictor))
    screen, _ = talk(chat, PROMPT, "Again?", "/history", "/undo", "/reset", "/help")
    assert f"user: {PROMPT}\n" in screen and "1 question left\n" in screen and "a new dialogue\n" in screen
    assert "/save FILE" in screen and chat.conversation.turns == 0


def test_the_texts_of_the_help_are_below_each_other(predictor):
    lines = "".join(Chat(Conversation(predictor)).respond("/help")).splitlines()
    expected = {"/image FILE ...": "add images", "/undo": "remove", "/exit": "leave"}
    columns = {
        line.index(text) for usage, text in expected.items() for line in lines if line.startswith(usage)
    }
    assert len(lines) == 7 and columns == {len("/image FILE ...") + 2}


def test_ctrl_c_ends_an_answer_and_where_a_line_is_typed_the_chat():
    def interrupted(text, images):
        yield "Sev"
        raise KeyboardInterrupt

    chat = Chat(SimpleNamespace(turns=0, stream=interrupted))
    assert talk(chat, "Which?") == ("> Sev\n> \n", [])

    def pressed(prompt):
        raise KeyboardInterrupt

    screen = []
    run(chat, pressed, screen.append, screen.append)
    assert screen == ["\n"]


@pytest.mark.slow
def test_a_chat_over_a_pseudo_terminal(folders, predictor):
    """As a user types it: the prompt, the echoed line, the answer, and Ctrl-D."""
    folder, images = folders
    command = [sys.executable, "-m", "flamingo_ft", "chat", str(folder / "adapter"), "--max-new-tokens", "6"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    unread = ""

    def read_until(text):
        nonlocal unread
        while text not in unread:
            unread += os.read(ours, 4096).decode()
        unread = unread.partition(text)[2]

    read_until("> ")
    os.write(ours, f"/image {images[0]}\n".encode())
    read_until("[1 image] > ")
    os.write(ours, f"{PROMPT}\n".encode())
    read_until(predictor(images[0], PROMPT))
    read_until("> ")
    os.write(ours, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(ours)


@pytest.mark.slow
def test_a_chat_reads_lines_from_a_pipe_and_echoes_them(folders, predictor):
    command = [sys.executable, "-m", "flamingo_ft", "chat", str(folders[0] / "adapter")]
    done = subprocess.run(
        [*command, "--max-new-tokens", "6"], input=f"{PROMPT}\n", capture_output=True, text=True, check=True
    )
    assert done.stdout == f"> {PROMPT}\n{predictor([], PROMPT)}\n\n" and json.dumps(done.stderr)
