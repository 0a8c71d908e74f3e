"""Otter's config.json for a Flamingo, with the tower as transformers' CLIP."""

from __future__ import annotations

from typing import Any

from flamingo_ft.errors import UserError
from flamingo_ft.formats.key_names import ANSWER_TOKEN
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

TOKEN_WIDTH = 1024  # of the tower's tokens; hard-coded in Otter

# The language models that Otter's code can load, with its names of the classes.
LANGUAGE_MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mpt": "MPTForCausalLM",
    "mosaic_gpt": "MosaicGPT",
}
_VIT_KEYS = {"layers", "width", "patch_size", "image_size", "head_width", "mlp_ratio"}


def otter_config(model: FlamingoForConditionalGeneration, source: object) -> dict[str, Any]:
    """Return Otter's config.json. Raises UserError, naming ``source``, for a tower that is not a CLIP ViT."""
    config = model.config
    text_config: Any = config.text_config
    vision_config: Any = config.vision_config
    embeddings: Any = model.get_input_embeddings()
    text = text_config.to_dict() | {"vocab_size": len(embeddings.weight)}
    lm_class = LANGUAGE_MODEL_CLASSES.get(text["model_type"]) or type(model.lang_encoder).__name__
    text["architectures"] = [lm_class]
    text["_name_or_path"] = ((config.backbones or {}).get("language") or {}).get("name") or ""
    content = {
        "model_type": "otter",
        "architectures": ["OtterForConditionalGeneration"],
        "cross_attn_every_n_layers": config.cross_attn_every_n_layers,
        "use_media_placement_augmentation": False,
        "only_attend_previous": True,
        "text_config": text,
        "vision_config": _clip_config(vision_config, source),
    }
    frames = (config.perceiver or {}).get("max_num_frames")
    return content | ({"max_num_frames": frames} if frames else {})


def _clip_config(tower: dict[str, Any], source: object) -> dict[str, Any]:
    """Return a CLIPVisionConfig's content for an OpenCLIP tower."""
    vision = tower["vision_cfg"]
    others = sorted(
        key for key, value in vision.items() if key not in _VIT_KEYS and value not in (None, False)
    )
    if others or not isinstance(vision.get("layers"), int):
        raise UserError(
            f"{source}: Otter needs a plain CLIP ViT, got a tower with {others or vision['layers']}; "
            "it cannot be converted"
        )
    width, ratio = vision["width"], vision.get("mlp_ratio", 4.0)
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": int(width * ratio),
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": width // vision.get("head_width", 64),
        "image_size": tower.get("image_size") or vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 16),
        "hidden_act": "quick_gelu" if tower.get("quick_gelu") else "gelu",
        "projection_dim": tower["embed_dim"],
        "layer_norm_eps": 1e-5,
    }


def otter_notes(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor) -> list[str]:
    """Return the reasons why Otter's own code cannot load the folder as it is."""
    text_config: Any = model.config.text_config
    kind, notes = text_config.model_type, []
    if kind not in LANGUAGE_MODEL_CLASSES:
        supported = ", ".join(LANGUAGE_MODEL_CLASSES)
        notes.append(f"Otter's own code loads only {supported} language models, not {kind}")
    if model.config.vision_width != TOKEN_WIDTH:
        notes.append(
            f"Otter's own code supports only towers of width {TOKEN_WIDTH}, not {model.config.vision_width}"
        )
    if ANSWER_TOKEN not in processor.tokenizer.get_vocab():
        notes.append(
            f"its tokenizer has no {ANSWER_TOKEN}, which Otter adds: use the tokenizer in the folder"
        )
    return notes
