# %% [markdown]
# # Evaluate, merge and share
#
# No GPU, no downloads. Measured on 2 CPU cores: 2.8 CPU minutes, 1.9 GiB. Colab: not tried.

# %% [markdown]
# A trained adapter raises three questions. How good is it, and is that owed to the images? Does it stay as good when it
# is merged into one model? And how does someone else load it? Put the folder of your own run in place of the one that
# is trained here.

# %%
# %matplotlib inline
import json

from transformers import pipeline

import flamingo_ft
from flamingo_ft import load_recipe, train
from flamingo_ft.data import read_samples
from flamingo_ft.data.sample import display_text
from flamingo_ft.notebook import start_notebook, write_recipe
from flamingo_ft.report import answer_grid, loss_curve

RUNS = start_notebook(
    "evaluate_and_share"
)  # on Colab a folder on your Google Drive, elsewhere runs/evaluate_and_share

# %% [markdown]
# ## An adapter
#
# The bridge and LoRA, on backbones in 4 bits (nf4).

# %% tags=["figure"]
recipe = load_recipe(write_recipe(RUNS / "bridge_lora.yaml", "bridge_lora", {"eval.max_samples": 400}))
metrics = train(recipe, resume=True)
RUN = recipe.train.output_dir
loss_curve(RUN)

# %% [markdown]
# ## Evaluate
#
# `eval` asks the held-out questions again; `--data FILE` asks those of another file, in any format that training reads.
#
# - `--controls` also asks with another image (that of another sample) and with a gray image. A score that stays the same
#   was not read from the images.
# - `--compare base` asks the model without its adapter the same questions, `--compare none` the model with unquantized
#   backbones. Differences are paired by question, with 95 % bootstrap intervals.
# - `--out` writes every answer to a page, wrong ones first.

# %%
# !flamingo-ft eval {RUN} --controls --compare base --compare none --out {RUNS}/scores

# %% tags=["figure"]
answer_grid(RUNS / "scores", rows=2)

# %% [markdown]
# ## A standard task
#
# `flamingo-ft eval RUN vqav2 --data FOLDER` evaluates on a published set from its own files: COCO, Flickr30k, VQAv2,
# OK-VQA, TextVQA, VizWiz, GQA, POPE, ScienceQA, Hateful Memes, ImageNet, MME. The task `classification` has the same
# machinery for images and labels of your own: every label is ranked by its likelihood. Two files are enough.

# %%
TASK = RUNS / "digits"
TASK.mkdir(exist_ok=True)
digits = [sample for sample in read_samples(recipe.data.eval[0]) if sample.task == "which_digit"]
rows = [
    json.dumps({"image": str(sample.images[0]), "label": display_text(sample.messages[-1])})
    for sample in digits
]
(TASK / "train.jsonl").write_text("\n".join(rows[:20]))  # demonstrations, for --shots
(TASK / "val.jsonl").write_text("\n".join(rows[20:50]))
print("\n".join(rows[:3]))

# %%
# !flamingo-ft eval {RUN} classification --data {TASK} --form chat

# %% [markdown]
# ## Merge
#
# `merge` writes one model without adapter. Every tensor is verified against W + scale x BA, and loss and accuracy are
# compared with the adapter's: a model that is worse by more than a margin is refused.

# %%
MERGED = RUNS / "merged"
# !test -d {MERGED} || flamingo-ft merge {RUN} {MERGED}

# %% [markdown]
# ## Push to the Hub
#
# Name a repository and run the cell. The adapter is pushed with a model card (scores, recipe, licence, how to load it),
# and its base, a few small files, to a repository beside it. No local path and none of your images is pushed. `merged=True`
# pushes the whole model instead.

# %%
HUB = ""  # such as "your-name/reads-digits"
if HUB:
    from huggingface_hub import login

    login()
    print(flamingo_ft.push(RUN, HUB, private=True, license="apache-2.0", log=print).url)

# %% [markdown]
# ## Load it anywhere
#
# One function loads an adapter, a merged model, or a repository on the Hub (`flamingo_ft.load("your-name/reads-digits")`).

# %%
image, question = digits[0].images[0], "Which digit is this?"
for place in (RUN, MERGED):
    print(place.name, flamingo_ft.load(place)(image, question))

# %% [markdown]
# After `import flamingo_ft`, transformers' own classes know the model too, and `flamingo-ft serve` is a server with
# OpenAI's interface. `flamingo-ft merge --with-code` writes a model that loads without this package.

# %%
turn = {
    "role": "user",
    "content": [{"type": "image", "path": str(image)}, {"type": "text", "text": question}],
}
ask = pipeline("image-text-to-text", model=str(MERGED))
ask(text=[turn], max_new_tokens=8, return_full_text=False)[0]["generated_text"]
