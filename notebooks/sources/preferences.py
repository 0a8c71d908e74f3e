# %% [markdown]
# # Preferences: DPO on your own pairs
#
# No GPU, no downloads. Measured on 2 CPU cores: 2.4 CPU minutes, 2.1 GiB. Colab: not tried.

# %% [markdown]
# Supervised training shows a model good answers. Direct preference optimization
# ([DPO](https://arxiv.org/abs/2305.18290)) shows it two answers to a question, one better: it raises the probability of
# the better one, measured against the model that training starts from (the reference). It needs a model that answers
# already, so this notebook trains one first; put your own run in its place.

# %%
# %matplotlib inline
import json

from flamingo_ft import Predictor, load_recipe, train
from flamingo_ft.data import read_samples
from flamingo_ft.data.sample import display_text
from flamingo_ft.inference.prompts import make_prompt
from flamingo_ft.notebook import start_notebook, write_recipe
from flamingo_ft.report import answer_grid, sample_grid
from flamingo_ft.report.curves import loss_figure, reward_accuracy_figure, reward_margin_figure
from flamingo_ft.report.run_folder import read_log

RUNS = start_notebook("preferences")  # on Colab a folder on your Google Drive, elsewhere runs/preferences

# %% [markdown]
# ## A model that answers
#
# The recipe `bridge`, shortened so that the model still makes mistakes.

# %%
bridge = load_recipe(
    write_recipe(RUNS / "bridge.yaml", "bridge", {"train.max_steps": 40, "eval.max_samples": 200})
)
train(bridge, resume=True)
START = bridge.train.output_dir

# %% [markdown]
# ## Your pairs
#
# A row has a prompt, the chosen and the rejected answer, and its images; a prompt may also be a list of messages. Where do
# pairs come from? Sample answers from the model and let people choose, or take the model's mistakes beside the right
# answers. The second is done here: the model answers questions, and each wrong answer becomes the rejected one.

# %%
DIGITS = bridge.data.train[0].path.parent  # the folder of the packaged data and its images
asked = [sample for sample in read_samples(bridge.data.train[0]) if len(sample.messages) == 2][:600]
predictor = Predictor.from_pretrained(START, max_new_tokens=8, batch_size=64)
prompts = [make_prompt(list(sample.images), display_text(sample.messages[0])) for sample in asked]
answers = predictor.answer(prompts)

# %%
rows = [
    {
        "prompt": display_text(sample.messages[0]),
        "chosen": display_text(sample.messages[1]),
        "rejected": answer,
        "images": [str(image) for image in sample.images],
    }
    for sample, answer in zip(asked, answers, strict=True)
    if answer != display_text(sample.messages[1])
]
PAIRS = RUNS / "pairs.jsonl"
PAIRS.write_text("\n".join(map(json.dumps, rows)))
print(f"{len(rows)} wrong answers to {len(asked)} questions, such as", *rows[:2], sep="\n")

# %% [markdown]
# The packaged data has pairs of the same form, here with the chosen answer in green and the rejected one in red. Training
# uses both; your own are drawn twice as often per row.

# %% tags=["figure"]
packaged = read_samples(DIGITS / "preferences.jsonl")
sample_grid(packaged, rows=1)

# %% [markdown]
# ## Train
#
# The recipe `dpo` starts from the bridge and adds LoRA to the language model. `beta` limits how far the model moves from
# the reference: a smaller value lets it move further.

# %%
recipe = load_recipe(
    write_recipe(
        RUNS / "dpo.yaml",
        "dpo",
        {
            "model.init_from": START,
            "data.train": [
                {"path": PAIRS, "image_root": DIGITS, "weight": 2},
                {"path": DIGITS / "preferences.jsonl"},
            ],
            "train.dpo.beta": 0.5,
            "train.logging_steps": 2,
            "eval.steps": 20,
            "eval.answers": False,
        },
    )
)
metrics = train(recipe, resume=True)
log = read_log(recipe.train.output_dir)

# %% [markdown]
# ## Reward margins
#
# The reward of an answer is beta times the log of how much more probable it has become than it is for the reference.
# The margin, chosen minus rejected, starts at zero. Over the 60 steps of the recipe it should rise, on held-out pairs too,
# and the chosen answer should have the larger reward in more and more of them.

# %% tags=["figure"]
reward_margin_figure(log)

# %% tags=["figure"]
reward_accuracy_figure(log)

# %%
pairs = metrics["eval"]["pairs"]
print(
    f"the chosen answer has the larger reward in {pairs['ranked_correctly']:.1%} of {pairs['samples']} held-out pairs"
)

# %% [markdown]
# The loss begins at ln 2 = 0.69, where both answers of a pair have the same reward:

# %% tags=["figure"]
loss_figure(log)

# %% [markdown]
# ## Answers
#
# Preference training changes which answers the model gives, and can spoil others, so compare on questions that are not
# pairs too: held-out answers before and after, and a paired comparison of both models.

# %% tags=["figure"]
answer_grid(recipe.train.output_dir, rows=2)

# %%
# !flamingo-ft eval {recipe.train.output_dir} --data {bridge.data.eval[0].path} --compare {START} eval.max_samples=100

# %% [markdown]
# ## What next
#
# - **Single ratings**, a thumb up or down: `train.method: kto`. **Answers that can be checked**: `grpo`, which samples
#   answers and scores them. **Long answers**: MPO, several losses at once. All are explained in the
#   [guide](../recipes/GUIDE.md#training-methods).
# - **The next stage**: DPO can be the last stage of one run, after the bridge and LoRA
#   ([stages](../recipes/GUIDE.md#stages)).
