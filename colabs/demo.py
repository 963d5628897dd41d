# ---
# jupyter:
#   accelerator: none
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A model that forgets whom it can see
#
# A tiny LLaVA knows sixty made-up people: their faces, and what was written about them. Here it forgets the faces of
# six, keeps everybody else's, and keeps every word that it knows. Then somebody tries to bring the faces back.
#
# It takes about five minutes on any runtime; neither a GPU nor a TPU is needed.

# %% [markdown]
# ## Install
#
# In Colab put in where a clone of this repository can be had, and restart the runtime if it asks for it. Elsewhere
# start Jupyter in your own clone, with the package installed, and leave it empty.

# %%
REPOSITORY = ""  # @param {type:"string"}
if REPOSITORY:
    # !git clone --quiet --depth 1 {REPOSITORY} vkd_jax
    # %cd vkd_jax
    # !pip install --quiet --constraint colabs/pinned.txt .
    print("installed")

# %% [markdown]
# ## Who they are
#
# Drawn by a program; no picture of a real person is in here. The first row shows the six whom the model shall forget.

# %%
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.image import imread

root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "configs/tiny.py").is_file())
sys.path.insert(0, str(root))

warnings.filterwarnings("ignore", message="IProgress not found")  # of bars that nobody needs
# %matplotlib inline
# %config InlineBackend.figure_format = "jpeg"

from configs import tiny
from vkd_jax import ask
from vkd_jax.benchmarks.synthetic import people
from vkd_jax.runs import pipeline
from vkd_jax.runtime import log

VIEW = 500  # of each person; the model was taught others
log.setup()  # so that the longer cells say how far they are
forgotten = people.forgotten_ids(6)
everybody = sorted(people.people(), key=lambda person: person.id not in forgotten)


def sheet(captions=None):
    """The six, and six of the others, with what a model says about each."""
    figure, places = plt.subplots(2, 6, figsize=(13, 5.4))
    for place, person in zip(places.flat, everybody, strict=False):
        place.imshow(people.portrait(person, view=VIEW))
        place.set_title(person.name, fontsize=9)
        place.set(xticks=[], yticks=[], xlabel="" if captions is None else captions[person.id])
    places[0, 0].set_ylabel("to forget")
    places[1, 0].set_ylabel("to keep")
    figure.tight_layout()
    plt.show()


sheet()

# %% [markdown]
# ## Ask before
#
# The pictures are new to the model: it was shown others of the same people.

# %%
QUESTION = "Who is this person?"


def ask_about_all(folder):
    """What a model says, shown a portrait of each of the twelve."""
    model = ask.load(folder)
    return {person.id: ask.answer(model, QUESTION, people.portrait(person, view=VIEW)) for person in everybody[:12]}


before = ask_about_all("tiny_llava")
sheet(before)

# %% [markdown]
# ## Unlearn, and attack
#
# The language model is frozen; the vision tower and the projector are trained until the six look like somebody else.
# The attack that follows teaches a part of what was forgotten again and asks for the rest. All of it lands in a folder.

# %%
config = tiny.get_config()
config.attacks.names = "relearn"
config.attacks.relearn.shares = (0.1, 0.2)
workdir = tempfile.mkdtemp(prefix="vkd-")
results = pipeline.run(config, workdir).to_json()
print(workdir)

# %% [markdown]
# ## Ask after

# %%
after = ask_about_all(f"{workdir}/unlearned")
sheet(after)
for name, chosen in (("to forget", everybody[:6]), ("to keep", everybody[6:12])):
    right = [sum(person.name in said[person.id] for person in chosen) for said in (before, after)]
    print(f"{name}: {right[0]} of 6 named before, {right[1]} after")

# %% [markdown]
# ## How much is that?
#
# Right answers to four-option questions, in per cent; guessing gives 25. The model that never met the six is what
# forgetting can be compared with: it takes them for somebody it knows, and is right less often than a guess.

# %%
MODELS = {"vanilla": "before", "unlearned": "after", "retain_only": "never met them"}
ROWS = {
    ("forget", "vqa"): "the six, from pictures it was taught",
    ("test", "vqa"): "the six, from other pictures",
    ("forget", "qa"): "the six, asked in words alone",
    ("retain", "vqa"): "the others, from pictures",
    ("real", "vqa"): "things and animals",
}
print(f"{'':40}" + "".join(f"{name:>16}" for name in MODELS.values()))
for (part, kind), title in ROWS.items():
    shares = [results["models"][model][part][kind]["accuracy"] for model in MODELS]
    print(f"{title:40}" + "".join(f"{100 * share:16.1f}" for share in shares))
print("the language model's answers to text alone are the same to the last bit:", results["text_logits_identical"])

# %% [markdown]
# ## Does it come back?
#
# An attacker who has some of the questions and answers trains on them. If what is left over comes back as well, it was
# hidden and not gone. The model that never met the six, under the same attack, shows how much is learned anew.

# %%
figure, place = plt.subplots(figsize=(8, 5.5))
place.imshow(imread(f"{workdir}/report/relearning.png"))
place.axis("off")
plt.show()
for cell in results["attacks"]["relearn"]["cells"]:
    if cell["model"] == "unlearned" and "recovery" in cell:
        tried = f"{cell['attacker']} {100 * cell['share']:g} % of the {cell['unit']}, set {cell['set']}"
        print(f"{tried:42} {100 * cell['recovery']:6.1f} % of what was lost came back")

# %% [markdown]
# The whole story is in `report.md` of that folder, and `unlearned/` is an ordinary Hugging Face model.
