# %% [markdown]
# # A frozen language model learns to see
#
# No GPU, no downloads. Measured on 2 CPU cores: 3.3 CPU minutes, 2.0 GiB. Colab: not tried.

# %% [markdown]
# Flamingo ([arXiv:2204.14198](https://arxiv.org/abs/2204.14198)) joins a vision tower and a language model, each trained
# alone, by a small bridge that learns:
#
# ```
# image ──> vision tower ──> perceiver resampler ──┐  a few latents per image
#           frozen           trains                │
#                                                  ▼
# text ───> language model, a gated cross-attention block before each of its layers ───> answer
#           frozen          trains
# ```
#
# - The **perceiver resampler** turns any number of visual tokens into a few latents.
# - The **gated cross-attention** blocks let the language model attend to them. Their gates start at zero, so at first
#   the model is exactly the language model that it was, and blind.
# - The **new tokens**, such as `<image>`, are the only words whose embeddings train. All other weights stay as they are.
#
# Here a small language model that has never seen an image learns to read handwritten digits (real scans).

# %%
# %matplotlib inline
from IPython.display import display

from flamingo_ft import Predictor, load_recipe, train
from flamingo_ft.cli.metrics_table import evaluation_tables, training_line
from flamingo_ft.config.library import recipe_text
from flamingo_ft.data import read_samples
from flamingo_ft.inference.conversation import Conversation
from flamingo_ft.notebook import start_notebook, write_recipe
from flamingo_ft.report import answer_grid, loss_curve, sample_grid

RUNS = start_notebook("quickstart")  # on Colab a folder on your Google Drive, elsewhere runs/quickstart

# %% [markdown]
# ## The recipe
#
# One file describes the job: the backbones, the bridge, the data, the training and the evaluation.

# %%
print(recipe_text("quickstart"))

# %% [markdown]
# Any of its values can be changed, such as `{"train.max_steps": 100}`.

# %%
recipe = load_recipe(write_recipe(RUNS / "quickstart.yaml", "quickstart", {}))

# %% [markdown]
# ## The data
#
# Dialogues about one or two scans: which digit is it, is it even or odd, larger than five, name both in order, are they
# the same. A number such as [1] marks where in the text an image is. The model learns to say what is blue. The held-out
# samples are about scans that no training sample shows.

# %% tags=["figure"]
samples = read_samples(recipe.data.train[0].path)
held_out = read_samples(recipe.data.eval[0].path)
print(f"{len(samples):,} training samples, {len(held_out):,} held-out samples")
sample_grid(samples)

# %% [markdown]
# ## Training
#
# The same as `flamingo-ft train quickstart --resume` on the command line: ask the held-out questions, train the bridge,
# save it, and ask again. After a disconnect, run all cells again: the run resumes from its last checkpoint, one of
# which is saved every 50 steps, and a finished run is not repeated. To train with other values, name another recipe file.

# %%
metrics = train(recipe, resume=True)
print(training_line(metrics["train"]))
display(*evaluation_tables(metrics["eval"]))

# %% [markdown]
# - **before**: the bridge is there, but its gates are closed. The language model knows what kind of answer each question
#   needs and guesses.
# - **after**: the same questions, with the trained bridge.
# - **with another image**: the trained model again, but every question comes with the images of *another* sample. If
#   the score falls back to guessing, the model reads its answers from the images.
#
# The loss, how surprised the model is by each token of the right answers, falls as the gates open:

# %% tags=["figure"]
loss_curve(recipe.train.output_dir)

# %% [markdown]
# Held-out questions of every task, with the answers before and after training:

# %% tags=["figure"]
answer_grid(recipe.train.output_dir)

# %% [markdown]
# ## Asking
#
# The folder of the run is the adapter: the bridge, and a record of the two backbones that it belongs to.

# %%
predictor = Predictor.from_pretrained(recipe.train.output_dir)
total, bridge = predictor.model.num_parameters(), metrics["train"]["trainable_parameters"]
print(f"{total:,} parameters, {bridge:,} of them in the bridge")

# %% tags=["figure"]
pair = next(sample for sample in held_out if sample.task == "name_both")
sample_grid([pair])

# %% [markdown]
# One image, then both, then both in the other order. `<image>` marks where each image is in the text; without marks the
# images come first.

# %%
first, second = pair.images
both = "First image: <image> Second image: <image> Which digits do you see, in order?"
predictor.batch([(first, "Which digit is this?"), ([first, second], both), ([second, first], both)])

# %% [markdown]
# A dialogue, whose later questions are about the image of the first one. In a terminal, `flamingo-ft chat RUN` does the
# same, and `flamingo-ft demo RUN` is a page with images and answers.

# %%
chat = Conversation(predictor)
for question, image in [("Is it more than five?", first), ("Is it even or odd?", None)]:
    print(f"{question} {chat.ask(question, image)}")

# %% [markdown]
# ## What a run leaves
#
# | file | what it holds |
# |---|---|
# | `adapter_model.safetensors`, `adapter_config.json` | the bridge, in PEFT's format |
# | `config.json` | the model's shape, and the names and content hashes of its backbones |
# | `tokenizer.json`, `processor_config.json`, ... | how text and images become tensors |
# | `metrics.json`, `predictions.jsonl` | the scores, and every held-out question with its answers |
# | `log.jsonl`, `tensorboard/` | loss, throughput, memory and gates over training |
# | `report.html`, `figures/` | the run on one page |
# | `resolved_recipe.yaml` | the recipe with every value, enough to run it again |

# %%
# !ls {recipe.train.output_dir}

# %% [markdown]
# ## What next
#
# - **Your own images, with a model that knows the world**: [open_flamingo.ipynb](open_flamingo.ipynb).
# - **A new model from a tower and a language model of today**: [new_model.ipynb](new_model.ipynb).
# - **What happens inside**: [inside.ipynb](inside.ipynb). **Scores, merging, sharing**:
#   [evaluate_and_share.ipynb](evaluate_and_share.ipynb).
