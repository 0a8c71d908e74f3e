"""Exporting an imported checkpoint gives back its bytes, and importing it gives the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flamingo_ft.adapters import (
    init_bridge,
    load_adapter,
    load_trained,
    save_adapter,
    set_trainable,
    write_composition,
)
from flamingo_ft.adapters.files import read_tensors
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import TrainableSection
from flamingo_ft.convert import Backbones, export_open_flamingo, export_otter, import_checkpoint
from flamingo_ft.errors import UserError
from flamingo_ft.formats.stored_files import read_checkpoint_files
from flamingo_ft.model import (
    Flamingo,
    FlamingoForConditionalGeneration,
    FlamingoProcessor,
    build_flamingo,
    load_open_flamingo,
)
from tests.golden import cases
from tests.golden.recorded import TOLERANCE, Golden
from tests.golden.tiny_flamingo import untrained_flamingo
from tests.golden.tiny_models import tiny_language_model

from . import foreign
from .backbones import FAMILIES, words

EVERY = 2
HEADS = {"heads": 8, "dim_head": 64, "ff_mult": 4}  # of every foreign bridge
SIZES = {"num_latents": 64, "depth": 6, **HEADS}
SOME = [
    pytest.param(family, marks=() if family in ("llama", "mpt") else pytest.mark.slow) for family in FAMILIES
]


@torch.no_grad()
def logits(model: FlamingoForConditionalGeneration | Flamingo, family: str) -> Tensor:
    batch = cases.interleaved(family)
    if isinstance(model, Flamingo):
        return model(batch.vision_x, batch.input_ids, batch.attention_mask).logits
    return model(input_ids=batch.input_ids, pixel_values=batch.vision_x).logits


def assert_contains(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected.keys() <= actual.keys(), sorted(expected.keys() - actual.keys())
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_open_flamingo_checkpoint_becomes_an_adapter_with_its_logits_and_back(family, backbones, tmp_path):
    source = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo(family))
    conversion = import_checkpoint(source, tmp_path / "adapter", backbones[family])
    assert (conversion.source, conversion.result) == ("OpenFlamingo v2 checkpoint", "adapter")
    model, _ = load_adapter(tmp_path / "adapter")
    assert Golden(family, EVERY).distance("logits", logits(model, family)) < TOLERANCE
    export_open_flamingo(tmp_path / "adapter", tmp_path / "back.pt")
    assert_contains(read_checkpoint_files(tmp_path / "back.pt").tensors, foreign.open_flamingo(family))


@pytest.mark.parametrize("family", SOME)
def test_version_1_attends_to_the_following_image_and_is_exported_under_both_names(
    family, backbones, tmp_path
):
    source = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo_1(family))
    assert (
        import_checkpoint(source, tmp_path / "adapter", backbones[family]).source
        == "OpenFlamingo v1 checkpoint"
    )
    model, _ = load_adapter(tmp_path / "adapter")
    reference = untrained_flamingo(family, EVERY, media_visibility="following")
    load_open_flamingo(reference, foreign.open_flamingo(family))
    expected = logits(reference, family)
    assert torch.allclose(logits(model, family), expected, atol=1e-5 * float(expected.abs().max()))
    assert (
        export_open_flamingo(tmp_path / "adapter", tmp_path / "back.pt").result
        == "OpenFlamingo v1 checkpoint"
    )
    assert_contains(read_checkpoint_files(tmp_path / "back.pt").tensors, foreign.open_flamingo_1(family))


@pytest.mark.parametrize("family", SOME)
def test_otters_trained_weights_survive_an_adapter_with_its_own_token(family, backbones, tmp_path):
    source = foreign.save(tmp_path / "final_weights.pt", foreign.otter_trained(family))
    assert import_checkpoint(source, tmp_path / "adapter", backbones[family]).source == "Otter checkpoint"
    _, processor = load_adapter(tmp_path / "adapter")
    assert processor.tokenizer.convert_tokens_to_ids("<answer>") == foreign.ANSWER
    export_otter(tmp_path / "adapter", tmp_path / "otter")
    assert_contains(read_checkpoint_files(tmp_path / "otter").tensors, foreign.otter_trained(family))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("family", SOME)
def test_a_whole_otter_becomes_a_whole_model_and_back(family, dtype, backbones, tmp_path):
    tensors = foreign.in_dtype(foreign.otter_whole, dtype)(family)
    conversion = import_checkpoint(
        foreign.save_otter(tmp_path / "otter", tensors), tmp_path / "model", backbones[family]
    )
    assert (conversion.source, conversion.result) == ("Otter checkpoint", "model")
    export_otter(tmp_path / "model", tmp_path / "back")
    back = read_checkpoint_files(tmp_path / "back")
    assert_contains(back.tensors, tensors)
    assert back.config["vision_config"]["hidden_size"] == 32
    again = import_checkpoint(tmp_path / "back", tmp_path / "again", backbones[family])
    assert again.result == "model"
    models = (load_trained(tmp_path / name)[0] for name in ("model", "again"))
    assert torch.equal(*(logits(model, family) for model in models))


@pytest.mark.parametrize(
    "adapter", ["default.", pytest.param("", marks=pytest.mark.slow)], ids=["PEFT since 0.3", "PEFT before"]
)
@pytest.mark.parametrize("family", SOME)
def test_multimodal_gpts_lora_is_kept_unchanged_on_its_base_checkpoint(family, adapter, backbones, tmp_path):
    base_checkpoint = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo_1(family))
    tensors = foreign.multimodal_gpt(family, adapter)
    source = foreign.save_multimodal_gpt(tmp_path / "mmgpt.pt", tensors, alpha=3)
    conversion = import_checkpoint(source, tmp_path / "adapter", backbones[family], start=base_checkpoint)
    assert conversion.source == "Multimodal-GPT checkpoint (inside model_state_dict) (module. prefix)"
    own = read_tensors(tmp_path / "adapter")
    assert sorted(t.numpy().tobytes() for t in own.values()) == sorted(
        t.numpy().tobytes() for t in tensors.values()
    )
    model, _ = load_adapter(tmp_path / "adapter")
    expected = logits(folded(family, tensors, alpha=3), family)
    assert torch.allclose(logits(model, family), expected, atol=1e-5 * float(expected.abs().max()))


def folded(family: str, tensors: dict[str, Tensor], alpha: int) -> Flamingo:
    """The model with the LoRA weights folded in: W + alpha / r B A, written out."""
    model = untrained_flamingo(family, EVERY, media_visibility="following")
    load_open_flamingo(model, foreign.open_flamingo(family))
    layers, parameters = foreign.LAYERS[family], dict(model.named_parameters())
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        bare = name.replace("base_model.model.", "").split(".lora_A.")[0]
        k, _, rest = bare.removeprefix(f"{layers}.").partition(".")
        own = rest.removeprefix("gated_cross_attn_layer.")
        target = (
            f"{layers}.{k}.{rest.removeprefix('decoder_layer.')}"
            if own == rest
            else f"gated_cross_attn_layers.{k}.{own}"
        )
        parameters[f"{target}.weight"].data += alpha / foreign.RANK * b @ a
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_bridge_keeps_its_dtype(dtype, backbones, tmp_path):
    tensors = foreign.in_dtype(foreign.open_flamingo, dtype)("mpt")
    bridge = {n: t for n, t in tensors.items() if "wte" not in n and "lm_head" not in n}
    import_checkpoint(
        foreign.save(tmp_path / "checkpoint.pt", bridge), tmp_path / "adapter", backbones["mpt"]
    )
    export_open_flamingo(tmp_path / "adapter", tmp_path / "back.pt")
    assert_contains(read_checkpoint_files(tmp_path / "back.pt").tensors, bridge)


@pytest.mark.parametrize("family", ["mpt"])
def test_an_otter_with_lora_becomes_a_whole_model_with_lora_folded_in(family, backbones, tmp_path):
    whole = foreign.otter_whole(family)
    lora = {name: t for name, t in foreign.multimodal_gpt(family).items() if "decoder_layer" in name}
    wrapped = {
        name.replace("lang_encoder.", "lang_encoder.base_model.model."): t for name, t in whole.items()
    } | lora
    folder = foreign.save_otter(tmp_path / "otter", wrapped, lora_config={"r": foreign.RANK, "lora_alpha": 4})
    import_checkpoint(folder, tmp_path / "model", backbones[family])
    export_otter(tmp_path / "model", tmp_path / "back")
    back = read_checkpoint_files(tmp_path / "back").tensors
    for name, tensor in whole.items():
        bare = name.replace("lang_encoder.", "lang_encoder.base_model.model.").removesuffix(".weight")
        a, b = (lora.get(f"{bare}.lora_{which}.default.weight") for which in "AB")
        expected = tensor if a is None else tensor + 4 / foreign.RANK * b @ a
        assert torch.allclose(back[name], expected, atol=1e-6), name


@pytest.mark.parametrize(
    "kind", ["OpenFlamingo v2", "OpenFlamingo v1", "a repository's folder", "an Otter's folder"]
)
def test_an_adapter_that_starts_from_a_checkpoint_loads_with_it(kind, backbones, tmp_path):
    visibility = "following" if kind == "OpenFlamingo v1" else "immediate"
    make = foreign.open_flamingo_1 if kind == "OpenFlamingo v1" else foreign.open_flamingo
    start = foreign.save(tmp_path / "checkpoint.pt", make("mpt"))
    if kind == "a repository's folder":
        start = tmp_path
    if kind == "an Otter's folder":
        import_checkpoint(start, tmp_path / "adapter", backbones["mpt"])
        export_otter(tmp_path / "adapter", tmp_path / "otter")
        start = tmp_path / "otter"
    vision, language = load_vision(backbones["mpt"].vision), load_language(backbones["mpt"].language)
    model, processor = build_flamingo(
        vision, language, cross_attn_every_n_layers=EVERY, media_visibility=visibility
    )
    init_bridge(model, start)
    reference = untrained_flamingo("mpt", EVERY, media_visibility=visibility)
    load_open_flamingo(reference, foreign.open_flamingo("mpt"))
    expected = logits(reference, "mpt")
    assert torch.allclose(logits(model.eval(), "mpt"), expected, atol=1e-5 * float(expected.abs().max()))
    set_trainable(model, TrainableSection(perceiver=False, cross_attention=False))
    save_adapter(model, processor, tmp_path / "trained")
    loaded, _ = load_adapter(tmp_path / "trained")
    assert torch.equal(logits(loaded, "mpt"), logits(model, "mpt"))
    write_composition(tmp_path / "trained", tmp_path / "base")
    based, _ = load_adapter(tmp_path / "trained", start=tmp_path / "base" / "bridge.safetensors")
    assert torch.equal(logits(based, "mpt"), logits(model, "mpt"))


def test_training_from_a_checkpoint_whose_weights_would_be_lost_is_refused(backbones, tmp_path):
    folder = foreign.save_otter(tmp_path / "otter", foreign.otter_whole("mpt"))
    import_checkpoint(folder, tmp_path / "model", backbones["mpt"])
    vision, language = load_vision(backbones["mpt"].vision), load_language(backbones["mpt"].language)
    model, _ = build_flamingo(
        vision,
        language,
        cross_attn_every_n_layers=EVERY,
        extra_tokens=("<answer>",),
        perceiver=SIZES,
        cross_attention=HEADS,
    )
    with pytest.raises(UserError, match="has backbones of its own, which would be lost"):
        init_bridge(model, tmp_path / "model")
    init_bridge(model, folder)
    save_adapter(
        model, FlamingoProcessor.for_backbones(vision.preprocess, language.tokenizer), tmp_path / "trained"
    )
    with pytest.raises(UserError, match="backbones of its own, which a composition cannot name"):
        write_composition(tmp_path / "trained", tmp_path / "base")
    lora = foreign.save_multimodal_gpt(tmp_path / "mmgpt.pt", foreign.multimodal_gpt("mpt"))
    with pytest.raises(UserError, match="has LoRA.*flamingo-ft convert"):
        load_open_flamingo(model, lora)


def test_padding_rows_of_the_vocabulary_are_cut_for_open_flamingo_and_kept_for_otter(backbones, tmp_path):
    padded = tiny_language_model("mpt")
    padded.resize_token_embeddings(140)
    padded.save_pretrained(tmp_path / "padded")
    words().save_pretrained(tmp_path / "padded")
    known = Backbones(str(tmp_path / "padded"), backbones["mpt"].vision)
    import_checkpoint(
        foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo("mpt")), tmp_path / "adapter", known
    )
    export_otter(tmp_path / "adapter", tmp_path / "otter")
    export_open_flamingo(tmp_path / "adapter", tmp_path / "back.pt")
    otter, back = read_checkpoint_files(tmp_path / "otter"), read_checkpoint_files(tmp_path / "back.pt")
    embedding = "lang_encoder.transformer.wte.weight"
    assert len(otter.tensors[embedding]) == otter.config["text_config"]["vocab_size"] == 140
    assert torch.equal(back.tensors[embedding], foreign.open_flamingo("mpt")[embedding])


def test_otters_own_token_is_left_out_if_the_vocabulary_has_no_row_for_it(backbones, tmp_path):
    tensors = {name: t[: foreign.ANSWER] if t.shape[:1] == (foreign.OTTERS,) else t for name, t in
               foreign.otter_trained("llama").items()}  # fmt: skip
    conversion = import_checkpoint(
        foreign.save(tmp_path / "final_weights.pt", tensors), tmp_path / "adapter", backbones["llama"]
    )
    assert any("<answer> is left out" in line for line in conversion.lines)
    assert "<answer>" not in load_adapter(tmp_path / "adapter")[1].tokenizer.get_vocab()


def gpt_neox_with_a_head(language: str) -> dict[str, Tensor]:
    """Return a checkpoint with an output head as transformers 4 and the released OpenFlamingo-4B name it.

    Only its rows of the new tokens, the last two, are not the language model's.
    """
    tensors = foreign.open_flamingo("gpt_neox")
    rows = tensors["lang_encoder.gpt_neox.embed_in.weight"]
    known = load_language(language).model.get_output_embeddings().weight[: len(rows) - 2]
    return tensors | {"lang_encoder.embed_out.weight": torch.cat([known, torch.randn(2, rows.shape[1])])}


def test_the_head_of_gpt_neox_is_read_and_written_under_its_earlier_name(backbones, tmp_path):
    known, head = backbones["gpt_neox"], "lang_encoder.embed_out.weight"
    tensors = gpt_neox_with_a_head(known.language)
    torch.save(tensors, tmp_path / "checkpoint.pt")
    import_checkpoint(tmp_path / "checkpoint.pt", tmp_path / "adapter", known)
    export_open_flamingo(tmp_path / "adapter", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back[head].equal(tensors[head]) and back["lang_encoder.lm_head.weight"].equal(tensors[head])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_new_tokens_do_not_depend_on_the_language_models_dtype(dtype, backbones, tmp_path):
    """Their hash identifies the bridge wherever it is loaded: in training, and later to merge or push it."""
    known = backbones["gpt_neox"]
    tensors = gpt_neox_with_a_head(known.language)
    vision, language = load_vision(known.vision), load_language(known.language, dtype=dtype)
    model, _ = build_flamingo(vision, language, cross_attn_every_n_layers=EVERY)
    load_open_flamingo(model, tensors)
    rows, ids = model.token_rows, list(model.token_rows.token_ids)
    assert rows.input.weight.equal(tensors["lang_encoder.gpt_neox.embed_in.weight"][ids])
    assert rows.output.weight.equal(tensors["lang_encoder.embed_out.weight"][ids])


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_an_adapter_from_a_checkpoint_loads_onto_its_base_in_another_dtype(family, backbones, tmp_path):
    """A run on a GPU is in bfloat16, a merge in the stored dtype. These checkpoints lack the output head."""
    known = backbones[family]
    start = foreign.save(tmp_path / "checkpoint.pt", foreign.open_flamingo(family))
    vision = load_vision(known.vision)
    language = load_language(known.language, dtype=torch.bfloat16)
    model, processor = build_flamingo(vision, language, cross_attn_every_n_layers=EVERY)
    init_bridge(model, start)
    set_trainable(model, TrainableSection(new_tokens=False))
    save_adapter(model, processor, tmp_path / "trained")
    write_composition(tmp_path / "trained", tmp_path / "base")
    for place in (start, tmp_path / "base" / "bridge.safetensors"):
        loaded, _ = load_adapter(tmp_path / "trained", start=place)
        assert loaded.lang_encoder.dtype == torch.float32
