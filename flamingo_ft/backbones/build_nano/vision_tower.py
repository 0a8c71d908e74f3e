"""The nano vision tower: an OpenCLIP ViT of 4 layers, trained with captions on the training scans only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from flamingo_ft.backbones.build_nano.digit_questions import DIGIT_WORDS
from flamingo_ft.backbones.build_nano.quickstart_data import SIDE, Scan
from flamingo_ft.hub.weight_files import OPEN_CLIP_CONFIG_FILE, OPEN_CLIP_WEIGHTS

CONTEXT_LENGTH = 12
EMBED_DIM = 64
MEAN, STD = 0.25, 0.35
LEARNING_RATE = 2e-3
CAPTIONS = (
    "a {word}",
    "the digit {word}",
    "a handwritten {word}",
    "the number {numeral}",
    "a picture of a {word}",
)

VISION_CFG = {
    "image_size": SIDE,
    "patch_size": 4,
    "layers": 4,
    "width": 64,
    "head_width": 16,
    "mlp_ratio": 4.0,
    # Captions are compared with the mean of the spatial tokens before ln_post: a Flamingo reads those.
    "pool_type": "avg",
    "final_ln_after_pool": True,
}


def tower_config(tokenizer: PreTrainedTokenizerFast) -> dict:
    """Return the content of open_clip_config.json."""
    text_cfg = {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": len(tokenizer),
        "hf_tokenizer_name": "nano",
        "width": 64,
        "heads": 4,
        "layers": 1,
        "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id,
    }
    preprocess_cfg = {
        "size": SIDE,
        "mode": "RGB",
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "interpolation": "bicubic",
    }
    model_cfg = {"embed_dim": EMBED_DIM, "vision_cfg": VISION_CFG, "text_cfg": text_cfg}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def build_tower(tokenizer: PreTrainedTokenizerFast) -> open_clip.CLIP:
    """Build the CLIP model with random weights."""
    config = tower_config(tokenizer)["model_cfg"]
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def to_pixels(scans: list[Scan]) -> Tensor:
    """Return images (N, 3, 32, 32) from 0 to 1, as an image loader makes them from the picture files."""
    rows = [torch.tensor(list(scan.picture().tobytes()), dtype=torch.float32) for scan in scans]
    return (torch.stack(rows) / 255).view(-1, 1, SIDE, SIDE).expand(-1, 3, -1, -1)


def normalize(images: Tensor) -> Tensor:
    """Subtract the mean and divide by the standard deviation of the preprocessing."""
    return (images - MEAN) / STD


def augment(images: Tensor) -> Tensor:
    """Rotate, shear, resize, shift, brighten and add noise to images (N, 3, H, W), each at random."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * math.radians(20)
    zoom = 0.9 + 0.2 * torch.rand(count, 2)
    shear = (torch.rand(count) - 0.5) * 0.3
    shift = (torch.rand(count, 2) - 0.5) * 0.2
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = angle.cos() * zoom[:, 0]
    theta[:, 0, 1] = -angle.sin() + shear
    theta[:, 1, 0] = angle.sin()
    theta[:, 1, 1] = angle.cos() * zoom[:, 1]
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    gain = 0.7 + 0.5 * torch.rand(count, 1, 1, 1)
    noise = 0.05 * torch.randn(count, 1, *images.shape[2:])
    return (moved * gain + noise).clamp(0, 1)


def caption_ids(rng: Random, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return token ids (10, context length) of one caption for each digit, all in the same words."""
    caption = rng.choice(CAPTIONS)
    texts = [caption.format(word=word, numeral=numeral) for numeral, word in enumerate(DIGIT_WORDS)]
    return tokenizer(texts, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt").input_ids


def add_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make the tokenizer end every text with its end token, whose features the text tower reads."""
    end, end_id = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, end_id)]
    )


def train_tower(
    scans: list[Scan], tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int, batch_size: int = 128
) -> open_clip.CLIP:
    """Train a CLIP model to choose, for each image, the caption of its digit among all ten."""
    torch.manual_seed(seed)
    rng = Random(seed)
    model = build_tower(tokenizer).train()
    images, labels = to_pixels(scans), torch.tensor([scan.digit for scan in scans])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = torch.randint(len(scans), (batch_size,))
        image_features = model.encode_image(normalize(augment(images[batch])), normalize=True)
        text_features = model.encode_text(caption_ids(rng, tokenizer), normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
    return model.eval()


def mean_spatial_tokens(model: open_clip.CLIP, scans: list[Scan]) -> Tensor:
    """Return the mean (N, D) of each scan's spatial tokens before ln_post."""
    with torch.no_grad():
        outputs = model.visual.forward_intermediates(
            normalize(to_pixels(scans)), indices=1, intermediates_only=True, output_fmt="NLC"
        )
    return outputs["image_intermediates"][0].mean(dim=1)


def save_tower(model: open_clip.CLIP, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder that open_clip loads as `local-dir:FOLDER`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(tower_config(tokenizer), indent=2) + "\n"
    (folder / OPEN_CLIP_CONFIG_FILE).write_text(config, encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / OPEN_CLIP_WEIGHTS)
    tokenizer.save_pretrained(folder)
