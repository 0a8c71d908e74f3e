# %% [markdown]
# # Inside Flamingo
#
# No GPU, no downloads. Measured on 2 CPU cores: 1.8 CPU minutes, 1.7 GiB. Colab: not tried.

# %% [markdown]
# How does a frozen language model come to see? Three views into the bridge of the quickstart's model: the gates as they
# open, what the latents of the perceiver hold of an image, and where in the images each token of an answer attends to.

# %%
# %matplotlib inline
from flamingo_ft import Predictor, load_recipe, train
from flamingo_ft.data import read_samples
from flamingo_ft.notebook import start_notebook, write_recipe
from flamingo_ft.report.curves import image_loss_gap_figure, loss_figure
from flamingo_ft.report.gates import gate_figure, layer_figure
from flamingo_ft.report.run_folder import read_log

RUNS = start_notebook("inside")  # on Colab a folder on your Google Drive, elsewhere runs/inside

# %% [markdown]
# ## A model to look into
#
# The quickstart with two changes. A token may attend to all images before it, not to the last one only, and each image
# gets a learned embedding of its position: so the model can tell the first image from the second. The log has an entry
# for every second step, and the held-out loss for every 40th.

# %%
file = write_recipe(
    RUNS / "model.yaml",
    "quickstart",
    {
        "model.media_visibility": "all_preceding",
        "model.perceiver.max_num_media": 2,
        "train.max_steps": 240,
        "train.logging_steps": 2,
        "eval.steps": 40,
        "eval.answers": False,
        "eval.max_samples": 240,
    },
)
recipe = load_recipe(file)
metrics = train(recipe, resume=True)
log = read_log(recipe.train.output_dir)
print(metrics["eval"]["verdict"])

# %% [markdown]
# ## Gates over training
#
# The output of each cross-attention block enters the language model times tanh(gate), and that of its feed-forward
# layer times another. All gates start at zero: at step 0 the model is the language model alone. Over the 240 steps, the
# loss falls as they open.

# %% tags=["figure"]
gate_figure(log)

# %% tags=["figure"]
layer_figure(log)

# %% tags=["figure"]
loss_figure(log)

# %% [markdown]
# Is it the images that the loss falls by? The gap between the held-out loss with another image and with the right one
# is the part that the images explain. At zero, the model answers without looking.

# %% tags=["figure"]
image_loss_gap_figure(log)

# %% [markdown]
# ## What the perceiver keeps
#
# The tower gives 64 visual tokens per image, one per patch. The perceiver resamples them into 8 latents. Red marks the
# patches of which a latent holds more than an even share, through both layers of the perceiver. Latents that are hardly
# trained hold nearly the same of every patch, and have hardly any colour.

# %% tags=["figure"]
predictor = Predictor.from_pretrained(recipe.train.output_dir)
held_out = read_samples(recipe.data.eval[0])
digit = next(sample.images[0] for sample in held_out if sample.task == "which_digit")
look = predictor.look(digit, "Which digit is this?")
look.latent_figure()

# %% [markdown]
# ## Where tokens look
#
# For each token of the answer: its attention over the latents, passed on to the patches that they hold; first as a mean
# over the layers, then for one layer. Again only patches with more than an even share have colour.

# %% tags=["figure"]
print(look.answer)
look.figure()

# %% tags=["figure"]
look.figure(layer=look.layers[-1])

# %% [markdown]
# Two images. Below each panel is the share of the token's attention that each image gets. A model that has learned to
# name both attends more to the first image for the first digit, and more to the second for the other one; one that has
# not, such as after the few steps of `SMOKE=1`, to both about equally.

# %% tags=["figure"]
pair = next(sample for sample in held_out if sample.task == "name_both").images
both = predictor.look(pair, "First image: <image> Second image: <image> Which digits do you see, in order?")
print(both.answer)
both.figure()

# %% [markdown]
# The same as numbers, a row per token:

# %%
for token, shares in zip(both.tokens, both.media_weights, strict=True):
    print(f"{token:>8}", *(f"{share:6.1%}" for share in shares))

# %% [markdown]
# ## How to read it
#
# - Attention is what is *read*, not what decides the answer. To see what decides, change the image and ask again:
#   `flamingo-ft eval RUN --controls` does so for all held-out questions.
# - The tower mixes patches with each other, so a patch of the background may be read for what it holds of the rest.
# - `flamingo-ft demo RUN` shows the same maps on a page, for images of your own.
