# %% [markdown]
# # Documents: tiles and boxes
#
# No GPU, no downloads. Measured on 2 CPU cores: 3.3 CPU minutes, 1.7 GiB. Colab: not tried.

# %% [markdown]
# A tower sees an image at its own small size: 224 pixels for most, 32 for the one here. Small text is lost. Two tools
# for documents, charts and small things:
#
# - **Tiles**: an image that is larger than the tower's input is divided into tiles, each of which the tower sees at full
#   resolution, beside one view of the whole.
# - **Boxes**: the model answers with the place of a thing, and can be asked about a place.

# %%
# %matplotlib inline
from IPython.display import display

from flamingo_ft import Predictor, load_recipe, train
from flamingo_ft.cli.metrics_table import evaluation_tables
from flamingo_ft.data import read_samples
from flamingo_ft.notebook import start_notebook, write_box_data, write_recipe
from flamingo_ft.report import answer_grid, loss_curve, sample_grid

RUNS = start_notebook("documents")  # on Colab a folder on your Google Drive, elsewhere runs/documents

# %% [markdown]
# ## Pages
#
# Two printed numbers on a page of 128 x 64 pixels, and a tower that takes 32 x 32: in one view, a digit is 8 pixels wide.
# The recipe `pages` shows the page in eight tiles (`data.tiles: {max: 8}`), and the text attends to the tokens of all of
# them (`model.perceiver: null`).

# %% tags=["figure"]
recipe = load_recipe(write_recipe(RUNS / "pages.yaml", "pages", {"eval.metrics": ["accuracy"]}))
sample_grid(read_samples(recipe.data.train[0]), rows=1)

# %%
metrics = train(recipe, resume=True)
display(*evaluation_tables(metrics["eval"]))

# %% tags=["figure"]
loss_curve(recipe.train.output_dir)

# %% tags=["figure"]
answer_grid(recipe.train.output_dir, rows=2)

# %% [markdown]
# The attention of each word of an answer: on the left of each panel the view of the whole page, on the right its tiles,
# put together.

# %% tags=["figure"]
predictor = Predictor.from_pretrained(recipe.train.output_dir)
page = read_samples(recipe.data.eval[0])[0]
look = predictor.look(page.images[0], "Read line one.")
print(look.answer)
look.figure()

# %% [markdown]
# Trained whole, the recipe reads 99 % of lines of four digits exactly, and without tiles (`{"data.tiles": None}`) 0.5 %.
# For a large tower, `max: 6` is a good start; `flamingo-ft check` prints how many views your images have, and
# `flamingo-ft plan` the memory for the most.

# %% [markdown]
# ## Boxes
#
# A row may have a column `boxes`, in pixels of the image; each `<box>` in its texts stands for one of them, in order. The
# model reads and writes them as plain text, `[x1, y1, x2, y2]` from 0 to 1000, without new tokens.

# %% tags=["figure"]
TRAIN = write_box_data(RUNS / "boxes_train", 600, seed=0)
EVAL = write_box_data(RUNS / "boxes_eval", 60, seed=1)
# !head -n 2 {TRAIN}
sample_grid(read_samples(TRAIN), rows=1, columns=5)

# %% [markdown]
# LoRA on the language model lets it learn to write boxes. They take some tokens, so `eval.max_new_tokens` is raised.
# Answers are scored by their intersection over union (IoU) with the right boxes, and by the share of at least 0.5.

# %%
changes = {
    "data": {"train": [{"path": TRAIN}], "eval": [{"path": EVAL}]},
    "lora.language": {"r": 16},
    "train.max_steps": 150,
    "train.batch_size": 8,
    "train.learning_rate": 4.0e-3,
    "eval.max_new_tokens": 32,
    "eval.metrics": ["iou", "iou_50"],
}
boxes = load_recipe(write_recipe(RUNS / "boxes.yaml", "pages", changes))
metrics = train(boxes, resume=True)
display(*evaluation_tables(metrics["eval"]))

# %% tags=["figure"]
answer_grid(boxes.train.output_dir, rows=2)

# %% [markdown]
# `boxes_in` gives the boxes of an answer in pixels of your image (none if the answer has none, as after a few steps), and
# `box_text` writes one for a question.

# %%
predictor = Predictor.from_pretrained(boxes.train.output_dir, max_new_tokens=32)
image = read_samples(EVAL)[0].images[0]
answer = predictor(image, "Where is the digit?")
print(answer, predictor.boxes_in(answer, image))
print(f"What is at {predictor.box_text((12, 24, 60, 72), image)}?")

# %% [markdown]
# ## What next
#
# - **Your documents**: `flamingo-ft recipes new mine.yaml --data FILE`, then `data.tiles={max: 6}`; `eval.metrics: [anls]`
#   scores answers about documents as DocVQA does.
# - **More on detail**: tile tags, pixel shuffle, larger inputs ([guide](../recipes/GUIDE.md#detail-in-images)). **More on
#   boxes**: several images, relative units, crops ([guide](../recipes/GUIDE.md#boxes)).
