"""Generation with media: the language model's own ``generate``, each image encoded and projected once."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import TextStreamer

from flamingo_ft.model.language_model_inputs import CACHE_ARGUMENTS, get_cache, name_cache

from .tiny import MEDIA, ids, images, tiny_flamingo, tiny_language_model
from .tiny_language_models import make_tiny

PROMPTS = ids("aIbIc", "zzIdz")
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture
def model():
    return tiny_flamingo()


def by_hand(model, tokens, pixels, steps, pick):
    """Greedy or sampled generation with whole forwards and no cache."""
    for _ in range(steps):
        with torch.no_grad():
            scores = model(tokens, pixels).logits[:, -1]
        scores[:, MEDIA] = -torch.inf
        tokens = torch.cat([tokens, pick(scores)[:, None]], dim=1)
    return tokens


def test_greedy_with_cache_equals_whole_forwards(model):
    pixels = images(2, 2)
    tokens = ids("aIbIc", "dIeIf")
    expected = by_hand(model, tokens, pixels, 8, lambda s: s.argmax(-1))
    actual = model.generate(tokens, pixel_values=pixels, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(actual, expected)


def test_a_left_padded_batch_generates_what_each_prompt_does_alone(model):
    pixels = images(2, 2)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = model.generate(PROMPTS, pixel_values=pixels, attention_mask=MASK, **options)
    first = model.generate(PROMPTS[:1], pixel_values=pixels[:1], **options)
    second = model.generate(PROMPTS[1:, 2:], pixel_values=pixels[1:, :1], **options)
    assert torch.equal(batch[0], first[0])
    assert torch.equal(batch[1, 2:], second[0])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 4}])
def test_beams_with_and_without_cache_agree(model, options):
    options |= {"max_new_tokens": 6, "do_sample": False, "attention_mask": MASK, "pixel_values": images(2, 2)}
    cached = model.generate(PROMPTS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(PROMPTS, use_cache=False, **options))


def test_beam_scores_are_those_of_whole_forwards(model):
    pixels = images(2, 2)
    tokens = ids("aIbIc", "dIeIf")
    out = model.generate(
        tokens,
        pixel_values=pixels,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=5,
        length_penalty=0.0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = model(out.sequences, pixels.repeat_interleave(3, 0)).logits[:, 4:-1].detach()
    chosen = scores.log_softmax(-1).gather(-1, out.sequences[:, 5:, None])[..., 0].sum(-1)
    torch.testing.assert_close(chosen, out.sequences_scores, rtol=1e-4, atol=1e-4)


def test_sampled_sequences_follow_their_own_sample(model):
    pixels = images(2, 2)
    tokens = ids("aIbIc", "dIeIf")
    torch.manual_seed(3)
    actual = model.generate(
        tokens,
        pixel_values=pixels,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=5,
        eos_token_id=None,
    )
    torch.manual_seed(3)
    rows, repeated = tokens.repeat_interleave(3, 0), pixels.repeat_interleave(3, 0)
    expected = model.generate(
        rows, pixel_values=repeated, do_sample=True, max_new_tokens=5, eos_token_id=None
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("assistant", ["language model", "prompt lookup"])
def test_assisted_decoding_equals_greedy_decoding(model, assistant):
    pixels, tokens = images(1, 2), ids("aIbIcabca")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pixel_values": pixels}
    if assistant == "language model":
        torch.manual_seed(1)
        assisted = model.generate(tokens, assistant_model=tiny_language_model(2), **options)
    else:
        assisted = model.generate(tokens, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(assisted, model.generate(tokens, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_a_static_cache_gives_the_same_tokens(model, options):
    pixels, tokens = images(2, 2), torch.cat([ids("aIbIcab"), ids("bIaIacb")])
    options |= {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pixel_values": pixels}
    static = model.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(tokens, **options))


def test_a_streamer_receives_the_new_tokens(model):
    received = []

    class Streamer(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            received.append(value)

        def end(self):
            received.append(None)

    out = model.generate(
        ids("aIb"), pixel_values=images(1, 1), streamer=Streamer(), max_new_tokens=4, eos_token_id=None
    )
    assert received[-1] is None
    assert torch.equal(torch.cat([value.flatten() for value in received[:-1]]), out[0])


@pytest.mark.parametrize("mode", ["immediate", "all_preceding"])
def test_chunked_forwards_equal_one(mode):
    model = tiny_flamingo(media_visibility=mode)
    tokens, pixels = ids("aIbcIdIe", "IzIyxwvI"), images(2, 3)
    whole = model(tokens, pixels, use_cache=True).logits
    for images_of_chunk in (
        lambda start, chunk: pixels,
        lambda start, chunk: _mentioned(pixels, tokens, start, chunk),
    ):
        cache, parts = None, []
        for start, chunk in zip(range(0, 8, 3), tokens.split(3, dim=1), strict=True):
            out = model(chunk, images_of_chunk(start, chunk), cache=cache, use_cache=True)
            cache = get_cache(out)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def _mentioned(pixels, tokens, start, chunk):
    """The images that each row of a chunk mentions, moved to the front."""
    seen = (tokens[:, :start] == MEDIA).sum(1).tolist()
    rows = torch.stack([row.roll(-before, dims=0) for row, before in zip(pixels, seen, strict=True)])
    most = int((chunk == MEDIA).sum(1).max())
    return rows[:, :most] if most else None


def test_images_that_may_belong_to_the_whole_text_or_to_the_new_tokens_are_refused(model):
    pixels = images(2, 2)
    cache = get_cache(model(ids("ab", "Ia"), pixels[:, :1], use_cache=True))
    with pytest.raises(ValueError, match="cannot tell"):
        model(ids("II", "bc"), pixels, cache=cache)


def test_prefill_in_chunks_generates_the_same(model):
    tokens, pixels = ids("aIbcIdef"), images(1, 2)
    options = {"pixel_values": pixels, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(tokens, prefill_chunk_size=3, **options), model.generate(tokens, **options)
    )


@pytest.mark.parametrize("pixels_of", ["all turns", "the new turn"])
def test_a_dialogue_continues_from_its_cache(model, pixels_of):
    pixels = images(1, 2)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    first = model.generate(ids("aIb"), pixel_values=pixels[:, :1], return_dict_in_generate=True, **options)
    second = torch.cat([first.sequences, ids("cId")], dim=1)
    new = pixels if pixels_of == "all turns" else pixels[:, 1:]
    actual = model.generate(second, pixel_values=new, cache=get_cache(first), **options)
    assert torch.equal(actual, model.generate(second, pixel_values=pixels, **options))


def test_a_turn_without_images_sees_the_cached_ones(model):
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    first = model.generate(ids("aIb"), pixel_values=images(1, 1), return_dict_in_generate=True, **options)
    second = torch.cat([first.sequences, ids("cd")], dim=1)
    actual = model.generate(second, cache=get_cache(first), **options)
    assert torch.equal(actual, model.generate(second, pixel_values=images(1, 1), **options))


def test_copies_of_a_cached_prompt_score_continuations(model):
    pixels, prompt = images(1, 2), ids("aIbIc")
    cache = get_cache(model(prompt, pixels, use_cache=True))
    for continuation in (ids("de"), ids("xyz")):
        whole = model(torch.cat([prompt, continuation], 1), pixels).logits[:, prompt.shape[1] :]
        scored = model(continuation, cache=copy.deepcopy(cache), use_cache=True).logits
        torch.testing.assert_close(scored, whole, rtol=1e-5, atol=1e-5)


def test_a_cropped_cache_drops_the_images_of_the_removed_tokens(model):
    pixels = images(1, 2)
    cache = get_cache(model(ids("aIbIc"), pixels, use_cache=True))
    cache.crop(-2)
    actual = model(ids("xy"), cache=cache, use_cache=True).logits
    torch.testing.assert_close(actual, model(ids("aIbxy"), pixels).logits[:, 3:], rtol=1e-5, atol=1e-5)


def test_cached_media_equal_passed_media_until_uncached(model):
    pixels, tokens = images(2, 2), ids("aIbIc", "IIdef")
    expected = model(tokens, pixels).logits
    model.cache_media(tokens, pixels)
    assert torch.equal(model(tokens).logits, expected)
    model.uncache_media()
    with pytest.raises(ValueError, match="row 0 has 2 <image> tokens but 0 images"):
        model(tokens)


def test_each_image_is_encoded_once_and_projected_once_per_layer(model):
    calls = {"tower": 0, "to_kv": 0}

    def count(name, amount):
        calls[name] += amount

    model.vision_encoder.conv1.register_forward_hook(lambda m, args, out: count("tower", len(out)))
    blocks = [block for block in model.gated_cross_attn_layers if block is not None]
    for block in blocks:
        block.attn.to_kv.register_forward_hook(lambda m, args, out: count("to_kv", 1))
    model.generate(PROMPTS, pixel_values=images(2, 2), attention_mask=MASK, num_beams=3, max_new_tokens=5)
    assert calls == {"tower": 3, "to_kv": len(blocks)}


def test_nothing_stays_open_after_an_error(model):
    plain = model.lang_encoder(ids("abc")).logits

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.lang_encoder.model.layers[-1].register_forward_hook(fail)
    for run in (model, model.generate):
        with pytest.raises(RuntimeError, match="out of memory"):
            run(input_ids=ids("aIb"), pixel_values=images(1, 1))
    hook.remove()
    assert not model.conditioning.is_open
    assert torch.equal(model.lang_encoder(ids("abc")).logits, plain)


def test_an_image_token_is_never_generated(model):
    with torch.no_grad():
        model.token_rows.output.weight[0] = 100.0 * model.token_rows.output.weight[0].sign()
    out = model.generate(
        ids("aIb"), pixel_values=images(1, 1), max_new_tokens=20, do_sample=True, eos_token_id=None
    )
    assert (out[:, 3:] != MEDIA).all()


def test_threads_do_not_see_each_others_images(model):
    prompts = [(ids("aIb"), images(1, 1, seed=seed)) for seed in range(4)]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}

    def run(prompt):
        return model.generate(prompt[0], pixel_values=prompt[1], **options)

    expected = [run(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(run, prompts), expected))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "xlstm", "jamba", "gpt2", "gemma3_text"])
def test_token_by_token_forwards_equal_one_whatever_the_cache(family):
    model = tiny_flamingo(lm=make_tiny(family))
    tokens, pixels, cache = ids("aIbIc"), images(1, 2), None
    with torch.no_grad():
        whole, parts = model(tokens, pixels, use_cache=False).logits, []
        for token in tokens.split(1, dim=1):
            new = pixels[:, len([p for p in parts if p[0] == MEDIA]) :][:, :1] if token == MEDIA else None
            out = model(token, new, use_cache=True, cache=cache)
            cache = get_cache(out)
            parts.append((int(token), out.logits))
    torch.testing.assert_close(torch.cat([logits for _, logits in parts], 1), whole, rtol=1e-4, atol=1e-4)


def test_a_cache_from_tuple_outputs_or_the_backbone_keeps_its_images(model):
    pixels, prompt, rest = images(1, 1), ids("aIb"), ids("cd")
    expected = model(torch.cat([prompt, rest], 1), pixels).logits[:, 3:]
    from_tuple = model(prompt, pixels, use_cache=True, return_dict=False)[1]
    from_backbone = get_cache(model.backbone(prompt, pixels, use_cache=True))
    for cache in (from_tuple, from_backbone):
        torch.testing.assert_close(model(rest, cache=cache).logits, expected, rtol=1e-5, atol=1e-5)


def test_past_key_values_is_accepted_as_the_cache_with_a_warning(model):
    pixels, prompt, rest = images(1, 1), ids("aIb"), ids("cd")
    expected = model(torch.cat([prompt, rest], 1), pixels).logits[:, 3:]
    cache = get_cache(model(prompt, pixels, use_cache=True))
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        actual = model(rest, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
@pytest.mark.parametrize("passed_as", CACHE_ARGUMENTS)
def test_a_language_model_gets_its_cache_under_its_own_name(name, passed_as):
    namespace = {}
    exec(f"def forward(input_ids, {name}=None, use_cache=None): ...", namespace)
    lm = SimpleNamespace(forward=namespace["forward"])
    assert name_cache(lm, {passed_as: "the cache", "use_cache": True}) == {
        name: "the cache",
        "use_cache": True,
    }
    assert name_cache(lm, {"use_cache": True}) == {"use_cache": True}


def test_new_markers_without_new_images_are_refused(model):
    cache = get_cache(model(ids("aIb"), images(1, 1), use_cache=True))
    with pytest.raises(ValueError, match="row 0 has 2 <image> tokens but 1 image"):
        model(ids("Ic"), cache=cache)
    model.cache_media(ids("aIb"), images(1, 1))
    with pytest.raises(ValueError, match="row 0 has 2 <image> tokens but 1 image"):
        model(ids("IbI"))


def test_a_prompt_without_input_ids_is_refused(model):
    with pytest.raises(ValueError, match="got no input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2)


def test_several_sequences_of_a_sample_continue_with_the_new_images_alone(model):
    pixels = images(2, 2)
    options = {"max_new_tokens": 3, "do_sample": True, "eos_token_id": None, "num_return_sequences": 2}
    first = model.generate(
        ids("aIb", "cId"), pixel_values=pixels[:, :1], return_dict_in_generate=True, **options
    )
    second = torch.cat([first.sequences, ids("eIf").expand(4, -1)], dim=1)
    repeated = pixels.repeat_interleave(2, 0)
    actual = model(
        second[:, get_cache(first).get_seq_length() :],
        repeated[:, 1:],
        cache=copy.deepcopy(get_cache(first)),
    ).logits
    whole = model(second, repeated).logits[:, -actual.shape[1] :]
    torch.testing.assert_close(actual, whole, rtol=1e-4, atol=1e-4)


def test_the_users_suppress_tokens_still_apply(model):
    options = {"pixel_values": images(1, 1), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    free = model.generate(ids("aIb"), **options)[0, 3:]
    held = model.generate(ids("aIb"), suppress_tokens=[int(free[0])], **options)[0, 3:]
    assert int(free[0]) not in held.tolist()


def test_a_flamingo_can_assist(model):
    assistant = tiny_flamingo(seed=4, lm=tiny_language_model(2))
    options = {"pixel_values": images(1, 2), "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assisted = model.generate(ids("aIbIc"), assistant_model=assistant, **options)
    assert torch.equal(assisted, model.generate(ids("aIbIc"), **options))
    assert not assistant.conditioning.is_open


def test_cached_projections_are_not_used_when_gradients_are_needed(model):
    text = ids("aIb")
    model.cache_media(text, images(1, 1))
    with torch.no_grad():
        model(text)
    to_kv = model.gated_cross_attn_layers[0].attn.to_kv.weight.requires_grad_(True)
    model(text, labels=text).loss.backward()
    assert to_kv.grad.abs().max() > 0


@pytest.mark.slow
def test_compiled_forwards_equal_eager_ones(model):
    compiled = torch.compile(model, backend="eager")
    for text, count in (("aIb", 1), ("abcd", 0), ("IIa", 2)):
        pixels = images(1, count) if count else None
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids(text), pixels).logits, model(ids(text), pixels).logits)


def test_tokens_processed_by_the_language_model_alone_keep_the_cached_images(model):
    prompt, between, rest = ids("aIb"), ids("xy"), ids("cd")
    cache = get_cache(model(prompt, images(1, 1), use_cache=True))
    model.lang_encoder(between, cache=cache)
    with torch.no_grad():
        seen, unseen = (model(rest, cache=copy.deepcopy(c)).logits for c in (cache, _without_images(cache)))
    assert not torch.allclose(seen, unseen)


def _without_images(cache):
    cache = copy.deepcopy(cache)
    cache.flamingo_past = None
    return cache


def test_a_mixture_of_experts_generates_after_a_trainer_enabled_its_balancing_loss():
    """Trainers set ``output_router_logits`` in the configuration and leave it there."""
    model = tiny_flamingo(lm=make_tiny("mixtral", vocab_size=60))
    options = {"pixel_values": images(2, 2), "attention_mask": MASK, "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(PROMPTS, **options)
    model.lang_encoder.config.output_router_logits = True
    assert torch.equal(model.generate(PROMPTS, **options), expected)
