"""The part of lmms-eval that the plug-in uses, as lmms-eval 0.7.3 has it, for tests without the package.

`test_lmms` compares it with the package where that is installed.
"""

from __future__ import annotations

import abc
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel

VERSION = "0.7.3"


class lmms(abc.ABC):  # noqa: N801
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size

    def clean(self):
        self.accelerator.free_memory()


@dataclass
class GenerationResult:
    text: str
    token_counts: Any = None


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class ChatTextContent(BaseModel):
    type: Literal["text"] = "text"
    text: str


class ChatImageContent(BaseModel):
    type: Literal["image"] = "image"
    url: Any


class ChatVideoContent(BaseModel):
    type: Literal["video"] = "video"
    url: Any
    start_time: float | None = None
    end_time: float | None = None


class ChatAudioContent(BaseModel):
    type: Literal["audio"] = "audio"
    url: Any


class ChatMessage(BaseModel):
    role: Literal["user", "system", "assistant"]
    content: list[ChatTextContent | ChatImageContent | ChatVideoContent | ChatAudioContent]


class ChatMessages(BaseModel):
    messages: list[ChatMessage]


MODULES = {
    "lmms_eval.api.instance": (GenerationResult,),
    "lmms_eval.api.model": (lmms,),
    "lmms_eval.protocol": (ChatMessages, ChatMessage, ChatVideoContent),
    "lmms_eval.models.registry_v2": (ModelManifest,),
}


def install(monkeypatch) -> None:
    """Let imports from lmms-eval find these classes instead of the package."""
    for path, members in MODULES.items():
        module = ModuleType(path)
        vars(module).update({member.__name__: member for member in members})
        monkeypatch.setitem(sys.modules, path, module)
