"""Tiny tokenizers of the kinds that released language models have, with their published special tokens.

The vocabulary is trained on a few lines, so it is tiny; normalizer, pre-tokenizer, decoder, post-processor,
special tokens and the options in tokenizer_config.json are those of the kind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.data.llama_tokenizer import SPACE, llama_tokenizer

# Line breaks and spaces in runs make merges across them, as large vocabularies have.
TEXT = (
    "Which shade is this? Dark. Light. Seven. Yes. Fine. Sure? So? Be brief.\n\n"
    "system\n\nuser\n\nassistant\n\nmodel\n\nYou are a helpful assistant.\n"
    "<think>\n\n</think>\n\nr1\n</think>\n\n  twice  as  wide\n\n\n"
)
# Letters, up to three digits, punctuation with the line breaks after it, and runs of white space.
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SIZE = 420  # 256 bytes and the merges


@dataclass(frozen=True)
class PublishedTokenizer:
    """The kind of a released model's tokenizer, and its special tokens.

    kind: a function of this file. tokenizer_class: as in its tokenizer_config.json. added: all added tokens
    that its chat template writes, in the order of their ids. not_special: those among them that are not
    special, so that decoding shows them. adds_bos: whether its post-processor puts the BOS token first.
    """

    kind: str
    tokenizer_class: str
    eos: str
    added: tuple[str, ...]
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    not_special: tuple[str, ...] = ()
    adds_bos: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def byte_level(published: PublishedTokenizer) -> Tokenizer:
    """Return byte-level BPE as in Llama 3, Qwen, Phi-4 and GPT-4: words by a pattern, then bytes."""
    tokenizer = Tokenizer(models.BPE())
    if published.tokenizer_class == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(WORDS, "isolated"), pieces])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, initial_alphabet=alphabet)
    return tokenizer


def sentencepiece(published: PublishedTokenizer) -> Tokenizer:
    """Return BPE with byte fallback and a space before the text, as in Llama 2 and Mistral 7B."""
    return llama_tokenizer(legacy=False).backend_tokenizer


def gemma(published: PublishedTokenizer) -> Tokenizer:
    """Return BPE with byte fallback and no space before the text, as in Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _train(tokenizer, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", *BYTES])
    return tokenizer


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "gemma": gemma}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _train(tokenizer: Tokenizer, **options: Any) -> None:
    trainer = trainers.BpeTrainer(vocab_size=SIZE, show_progress=False, **options)
    tokenizer.train_from_iterator([TEXT] * 20, trainer)


def write_tokenizer(folder: Path, published: PublishedTokenizer, chat_template: str) -> Tokenizer:
    """Write tokenizer.json, tokenizer_config.json and the chat template. Return the tokenizer."""
    tokenizer = KINDS[published.kind](published)
    special = [token for token in published.added if token not in published.not_special]
    # One by one, since ids follow the order of the calls.
    for token in published.added:
        (tokenizer.add_special_tokens if token in special else tokenizer.add_tokens)([_added(token, special)])
    if published.adds_bos:
        bos = str(published.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(published), ensure_ascii=False))
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return tokenizer


def _added(token: str, special: Sequence[str]) -> AddedToken:
    return AddedToken(token, special=token in special, normalized=False)


def _config(published: PublishedTokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": published.tokenizer_class,
        "bos_token": published.bos,
        "eos_token": published.eos,
        "pad_token": published.pad,
        "unk_token": published.unk,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        **published.options,
    }
