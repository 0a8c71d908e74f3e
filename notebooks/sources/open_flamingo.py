# %% [markdown]
# # OpenFlamingo on your own images
#
# One GPU of 16 GB, such as a free T4. Planned peak below 7 GiB; minutes and memory not measured yet. Colab: not tried.

# %% [markdown]
# OpenFlamingo-4B ([arXiv:2308.01390](https://arxiv.org/abs/2308.01390)) has seen millions of images with their texts. Here
# it learns to answer questions about *your* images with QLoRA: all of its weights are frozen in 4 bits (nf4), and small
# LoRA matrices are trained on the language model and on the bridge. The result is an adapter of
# 31 million weights, about 120 MB.
#
# The recipe, the data and the adapter are on your Google Drive, so that a disconnect costs at most 50 steps: run all
# cells again, and training resumes.

# %%
# %matplotlib inline
import gc

import torch

from flamingo_ft import Predictor, load_recipe, train
from flamingo_ft.data import read_samples
from flamingo_ft.data.sample import display_text
from flamingo_ft.notebook import start_notebook, write_example_data, write_recipe
from flamingo_ft.report import answer_grid, loss_curve, sample_grid
from flamingo_ft.training.build import build_model

RUNS = start_notebook("open_flamingo")  # on Colab a folder on your Google Drive, elsewhere runs/open_flamingo

# %% [markdown]
# ## Your data
#
# Two common forms. A **folder of images and a table** with the columns image, question and answer, and **LLaVA's**
# dialogues in JSON. The example below has drawings of emoji, 200 rows in each form; put your own folder in its place.

# %%
DATA = write_example_data(RUNS / "data")
IMAGES = DATA / "images"
# !head -n 4 {DATA}/questions.csv
# !head -n 15 {DATA}/dialogues.json

# %% [markdown]
# ## The recipe
#
# The packaged recipe `open_flamingo_4b`, with these changes: your data, LoRA in place of full training of the bridge,
# and what a T4 needs (it computes in float16, so trained weights are kept in float32).

# %%
file = write_recipe(
    RUNS / "mine.yaml",
    "open_flamingo_4b",
    {
        "data": {
            "train": [
                {"path": DATA / "questions.csv", "image_root": IMAGES},
                {"path": DATA / "dialogues.json", "image_root": IMAGES},
            ],
            "eval_fraction": 0.1,
        },
        "model.bridge_quantization": "nf4",
        "trainable": {"perceiver": False, "cross_attention": False, "new_tokens": False, "dtype": "fp32"},
        "lora": {"language": {"r": 16}, "cross_attention": {"r": 16}, "perceiver": {"r": 16}},
        "train.optimizer": "adamw",
        "train.optimizer_in_backward": False,
        "train.batch_size": 4,
        "train.gradient_accumulation_steps": 2,
        "train.max_steps": 100,
        "train.warmup_steps": 10,
        "train.save_steps": 50,
        "eval.max_samples": 40,
    },
)
recipe = load_recipe(file)

# %% tags=["figure"]
samples = read_samples(recipe.data.train[0])
sample_grid(samples, rows=1, columns=6)

# %% [markdown]
# ## Check and plan
#
# `check` reads every row and image without loading a model, and names those that cannot be used. `plan` computes the
# peak memory by a dry run of one training step, without downloading weights.

# %%
# !flamingo-ft check {file} --out {RUNS}/check

# %%
# !flamingo-ft plan {file}

# %% [markdown]
# ## Ask before training

# %%
questions = [(sample.images[0], "What is this?") for sample in samples[:4]]
before = Predictor(*build_model(recipe)).batch(questions, max_new_tokens=16)
print(before)
gc.collect()
torch.cuda.empty_cache()

# %% [markdown]
# ## Train
#
# The same as `flamingo-ft train {file} --resume`. The table at the end has the scores on held-out images before and
# after training, and with another image: a model that reads its images scores lower there.

# %%
metrics = train(recipe, resume=True)
print(metrics["eval"]["verdict"])

# %% tags=["figure"]
loss_curve(recipe.train.output_dir)

# %% tags=["figure"]
answer_grid(recipe.train.output_dir, rows=2)

# %% [markdown]
# ## Ask after training

# %%
predictor = Predictor.from_pretrained(recipe.train.output_dir)
after = predictor.batch(questions, max_new_tokens=16)
for sample, old, new in zip(samples, before, after, strict=False):
    print(f"right: {display_text(sample.messages[-1])!r}  before: {old!r}  after: {new!r}")

# %% [markdown]
# ## Look
#
# Where each token of an answer attends to in the image, as a mean over the layers:

# %% tags=["figure"]
predictor.look(*questions[0], max_new_tokens=6).figure()

# %% [markdown]
# ## What next
#
# - **On a page**: `!flamingo-ft demo {recipe.train.output_dir} --share` shows images, streamed answers and where they
#   look (`%pip install gradio` first).
# - **Scores, merging, the Hub**: [evaluate_and_share.ipynb](evaluate_and_share.ipynb).
# - **The instruction-tuned model**: `model.init_from` and `model.language.name` as in the
#   [guide](../recipes/GUIDE.md#the-released-openflamingo-models). A bridge that is trained in full needs a GPU with bf16:
#   the packaged recipe without the changes above.
