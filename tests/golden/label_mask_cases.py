"""Texts whose label masks are recorded, and a tokenizer that any environment can rebuild.

Its tokens are words, spaces, punctuation marks and special tokens.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOC, MEDIA = "<|endofchunk|>", "<image>"
CAPTIONS = ["a cat on a mat", "two dogs", "A photo of a small house by the sea ."]
# One list per document; None is an image.
DOCUMENTS = [
    [None, "a cat sits .", None, "it sleeps now ."],
    ["before any image .", None, "two dogs run", None, "and a cat", None, "the end"],
    [None, None, "both are cats"],
    ["only here at the end", None, "a mat", None],
]
WORDS = sorted(
    {word for text in [*CAPTIONS, *(p for d in DOCUMENTS for p in d if p)] for word in text.split()}
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer with the tokens that OpenFlamingo adds."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", " ", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": [EOC, MEDIA]})
    fast.add_special_tokens({"pad_token": "<PAD>"})
    return fast
