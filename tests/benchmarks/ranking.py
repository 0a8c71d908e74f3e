"""How fast class names are ranked beside open-flamingo 2.0.1: `python -m tests.benchmarks.ranking`.

    pip install --no-deps open-flamingo==2.0.1 einops einops-exts

Both rank the same names for the same images with the same weights, and must give the same log-likelihoods.
open-flamingo is called as its evaluation does it for ImageNet: the media are cached, the prompts are read
once, and each token of each name is one more forward. It computes log-softmax for the tokens of a name alone
here, where its evaluation repeats it for the whole prompt. Backbones: nano, or with `--language` a folder
with a LLaMA-style model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from flamingo_ft.adapters import save_adapter, set_trainable
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import TrainableSection
from flamingo_ft.convert import export_open_flamingo
from flamingo_ft.data.sample import CHUNK
from flamingo_ft.inference.predictor import Predictor
from flamingo_ft.inference.prompts import Prompt
from flamingo_ft.model import build_flamingo
from flamingo_ft.model.added_tokens import grow_vocabulary
from flamingo_ft.model.language_model_inputs import get_cache
from tests.regimes import shake

IMAGES = Path(__file__).parents[2] / "recipes" / "quickstart" / "images"
EVERY = 2  # cross-attention before every second layer
ANIMALS = 0x1F400  # the first of Unicode's pictures of animals, which the names are taken from
TOLERANCE = 1e-3  # nats; sums of float32 logits over a name


def class_names(count: int) -> list[str]:
    """Return the names of pictures in Unicode: "rat", "water buffalo", "hatching chick", ..."""
    return [unicodedata.name(chr(ANIMALS + number)).lower() for number in range(count)]


def make_prompts(count: int) -> list[Prompt]:
    """Return prompts with one image each, in the form in which open-flamingo asks for ImageNet's classes."""
    blocks = [{"type": "image"}, {"type": "text", "text": "Output:"}]
    images = sorted(IMAGES.glob("*.png"))[:count]
    return [Prompt([{"role": CHUNK, "content": blocks}], [str(path)]) for path in images]


def make_predictor(language: str, folder: Path, batch_size: int) -> Predictor:
    """Return a predictor with a random bridge, whose weights are in ``folder / "checkpoint.pt"`` too."""
    torch.manual_seed(0)
    vision, lm = load_vision("nano"), load_language(language, dtype=torch.float32)
    model, processor = build_flamingo(vision, lm, cross_attn_every_n_layers=EVERY)
    set_trainable(model, TrainableSection())
    shake(model, 0.1)
    save_adapter(model, processor, folder / "adapter")
    export_open_flamingo(folder / "adapter", folder / "checkpoint.pt")
    return Predictor(model.eval(), processor, batch_size=batch_size)


def make_peer(language: str, checkpoint: Path, predictor: Predictor) -> nn.Module:
    """Return open-flamingo's model with the predictor's weights."""
    from open_flamingo.src.flamingo import Flamingo
    from open_flamingo.src.utils import extend_instance

    from tests.golden.record_open_flamingo import peer_mixin

    vision, lm = load_vision("nano"), load_language(language, dtype=torch.float32).model
    vision.visual.output_tokens = vision.visual.final_ln_after_pool = True
    grow_vocabulary(lm, len(predictor.processor.tokenizer))
    extend_instance(lm, peer_mixin(lm))
    lm.set_decoder_layers_attr_name("model.layers")
    config, clip = predictor.model.config, SimpleNamespace(visual=vision.visual)
    tokens = config.eoc_token_id, config.media_token_id
    model = Flamingo(clip, lm, *tokens, vision.width, cross_attn_every_n_layers=EVERY)
    keys = model.load_state_dict(torch.load(checkpoint, weights_only=True), strict=False)
    assert not keys.unexpected_keys, keys.unexpected_keys
    return model.eval()


def ours(predictor: Predictor, prompts: Sequence[Prompt], names: Sequence[str]) -> Tensor:
    """Return log-likelihoods (prompts, names) by the predictor, without the end of the answer."""
    return predictor.rank(prompts, names, with_end=False)


@torch.inference_mode()
def theirs(model: nn.Module, predictor: Predictor, prompts: Sequence[Prompt], names: Sequence[str]) -> Tensor:
    """Return the same by open-flamingo. The predictor encodes prompts and images, in batches of its size."""
    size, scores = predictor.batch_size, []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        ids = torch.tensor(predictor.encode(batch))
        pixels = predictor.media.pixels_of(batch)["pixel_values"][:, :, None]
        model.cache_media(input_ids=ids, vision_x=pixels)
        scores.append(_peer_batch(model, predictor, ids, names))
        model.uncache_media()
    return torch.cat(scores)


def _peer_batch(model: nn.Module, predictor: Predictor, ids: Tensor, names: Sequence[str]) -> Tensor:
    """Return the scores of one batch, whose media are cached."""

    def forward(tokens: Tensor, cache: object) -> tuple[Tensor, object]:
        output = model(None, tokens, clear_conditioned_layers=False, past_key_values=cache, use_cache=True)
        return output.logits, get_cache(output)

    before, cache = forward(ids, None)
    scores = []
    for name in names:
        tokens = predictor.processor.tokenizer(name, add_special_tokens=False)["input_ids"]
        logits = [before[:, -1:]]
        for token in tokens:
            logits.append(forward(torch.full((len(ids), 1), token), cache)[0])
        cache.crop(-len(tokens))  # it grows in place, unlike the tuples of open-flamingo's time
        log_probabilities = torch.cat(logits[:-1], 1).log_softmax(-1)
        scores.append(log_probabilities[:, range(len(tokens)), tokens].sum(-1))
    return torch.stack(scores, 1)


def seconds(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return how long ``run`` takes, and what it returns."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--language", default="nano", metavar="FOLDER")
    parser.add_argument("--names", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    names, prompts = class_names(arguments.names), make_prompts(arguments.prompts)
    with tempfile.TemporaryDirectory() as folder:
        predictor = make_predictor(arguments.language, Path(folder), arguments.batch_size)
        peer = make_peer(arguments.language, Path(folder) / "checkpoint.pt", predictor)
    ours(predictor, prompts, names[:2]), theirs(peer, predictor, prompts, names[:2])  # warm up
    times: list[tuple[float, float]] = []
    for _ in range(arguments.repeats):
        own, scores = seconds(lambda: ours(predictor, prompts, names))
        other, expected = seconds(lambda: theirs(peer, predictor, prompts, names))
        torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)
        assert torch.equal(scores.argsort(-1), expected.argsort(-1)), "the rankings differ"
        times.append((own, other))
    own, other = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{len(names)} names, {len(prompts)} images in batches of {arguments.batch_size}")
    print(f"open-flamingo 2.0.1{other:8.2f} s")
    print(f"Predictor.rank     {own:8.2f} s, {other / own:.1f} times as fast")


if __name__ == "__main__":
    main()
