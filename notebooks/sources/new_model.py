# %% [markdown]
# # A new vision-language model
#
# One GPU of 16 GB, such as a free T4. Planned peak 5.5 GiB; minutes and memory not measured yet. Colab: not tried.

# %% [markdown]
# Any OpenCLIP or timm tower and any causal language model of transformers can be joined. Neither is changed: only the
# bridge between them learns. First a small pair that trains without a GPU, then SigLIP 2 and Qwen3.

# %%
# %matplotlib inline
from IPython.display import display

from flamingo_ft import Predictor, load_recipe, train
from flamingo_ft.cli.metrics_table import evaluation_tables
from flamingo_ft.data import read_samples
from flamingo_ft.notebook import start_notebook, write_recipe
from flamingo_ft.report import answer_grid, loss_curve, sample_grid
from flamingo_ft.report.curves import image_loss_gap_figure
from flamingo_ft.report.gates import gate_figure
from flamingo_ft.report.run_folder import read_log

RUNS = start_notebook("new_model")  # on Colab a folder on your Google Drive, elsewhere runs/new_model

# %% [markdown]
# ## A small pair
#
# The recipe `emoji` joins an ImageNet EfficientNet and SmolLM2-135M, which has never seen an image. It learns to name and
# to sort emoji by two drawing styles, and is asked about a third. On a CPU this takes most of an hour.

# %% tags=["figure"]
small = load_recipe(write_recipe(RUNS / "emoji.yaml", "emoji", {"eval.steps": 100, "train.save_steps": 100}))
sample_grid(read_samples(small.data.train[0]), rows=1)

# %% [markdown]
# Can the frozen tower tell the answers apart at all? `!flamingo-ft check {RUNS}/emoji.yaml --probe` measures it with simple
# classifiers on its tokens, before training. If they fail, choose another tower; if they succeed and the trained model
# fails, the bridge is the limit.

# %%
metrics = train(small, resume=True)
display(*evaluation_tables(metrics["eval"]))

# %% [markdown]
# A new bridge starts with closed gates: for a while the loss falls only because the model learns which answers are
# common. Watch the gates and the part of the loss that the images explain; both should rise.

# %% tags=["figure"]
log = read_log(small.train.output_dir)
image_loss_gap_figure(log)

# %% tags=["figure"]
gate_figure(log)

# %% tags=["figure"]
answer_grid(small.train.output_dir, rows=2)

# %% [markdown]
# ## A pair of today
#
# SigLIP 2 (576 tokens per image, 384 pixels) and Qwen3-1.7B, both frozen in 4 bits. The recipe `siglip2_qwen3` has the
# 4 B model; another language model is one line, and
# `!flamingo-ft plan {RUNS}/siglip2_qwen3.yaml` prints what it needs. Answers are trained without
# thinking. Put your own data in place of the
# emoji: a new bridge wants thousands of rows, and learns faster from short answers about one thing each.

# %%
changes = {
    "model.language.name": "Qwen/Qwen3-1.7B",
    "data": {"train": [{"path": small.data.train[0].path}], "eval": [{"path": small.data.eval[0].path}]},
    "train.max_steps": 600,
    "train.save_steps": 100,
    "eval.steps": 100,
    "eval.answers": False,
    "eval.max_new_tokens": 16,
    "eval.max_samples": 100,
}
large = load_recipe(write_recipe(RUNS / "siglip2_qwen3.yaml", "siglip2_qwen3", changes))

# %%
metrics = train(large, resume=True)
display(*evaluation_tables(metrics["eval"]))

# %% tags=["figure"]
loss_curve(large.train.output_dir)

# %% tags=["figure"]
answer_grid(large.train.output_dir, rows=2)

# %%
predictor = Predictor.from_pretrained(large.train.output_dir, max_new_tokens=16)
image = read_samples(large.data.eval[0])[0].images[0]
print(predictor(image, "What is this?"))

# %% [markdown]
# ## What next
#
# - **LoRA on the language model**, in the same run (`{"lora.language": {"r": 16}}`) or as a second stage
#   ([stages](../recipes/GUIDE.md#stages)), with text-only rows so that it keeps what it knows.
# - **Other models**: [docs/models.md](../docs/models.md) lists what was tested of today's language models and towers.
# - **More detail**: tiles and larger inputs ([documents.ipynb](documents.ipynb)). **Scores and sharing**:
#   [evaluate_and_share.ipynb](evaluate_and_share.ipynb).
