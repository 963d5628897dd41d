# ---
# jupyter:
#   accelerator: none
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A model that forgets faces
#
# A tiny LLaVA knows 60 synthetic people: their faces and facts about them. This notebook makes it forget the faces of
# six of them. It retains the faces of all others and all facts in text. Then an attack tries to restore the forgotten
# faces.
#
# The notebook takes about five minutes on any runtime, without a GPU or TPU.

# %% [markdown]
# ## Install
#
# In Colab, set `REPOSITORY` to the URL of a clone of this repository, and restart the runtime if Colab asks for it.
# Elsewhere, leave it empty and install the package.

# %%
REPOSITORY = ""  # @param {type:"string"}
if REPOSITORY:
    # !git clone --quiet --depth 1 {REPOSITORY} vkd_jax
    # %cd vkd_jax
    # !pip install --quiet --constraint colabs/pinned.txt .
    print("installed")

# %% [markdown]
# ## The people
#
# All portraits are drawn by a program; there are no images of real people. The first row shows the six people to
# forget, the second row six of the people to retain.

# %%
import tempfile
import warnings

import matplotlib.pyplot as plt
from matplotlib.image import imread

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars are not shown
# %matplotlib inline
# %config InlineBackend.figure_format = "jpeg"

import vkd_jax
from vkd_jax.benchmarks.synthetic import people
from vkd_jax.runtime import log

VIEW = 500  # the portrait of each person that is shown here; the model was trained on others
log.setup()  # shows the progress of the longer cells
forgotten = people.SIXTY.forgotten(10)
everybody = sorted(people.SIXTY.people(), key=lambda person: person.id not in forgotten)


def show_portraits(answers=None):
    """Shows the six people to forget and six people to retain, with the answer of a model below each."""
    figure, axes = plt.subplots(2, 6, figsize=(13, 5.4))
    for axis, person in zip(axes.flat, everybody, strict=False):
        axis.imshow(people.portrait(person, view=VIEW))
        axis.set_title(person.name, fontsize=9)
        axis.set(xticks=[], yticks=[], xlabel="" if answers is None else answers[person.id])
    axes[0, 0].set_ylabel("to forget")
    axes[1, 0].set_ylabel("to retain")
    figure.tight_layout()
    plt.show()


show_portraits()

# %% [markdown]
# ## Before unlearning
#
# The model was trained on other portraits of the same people. It names all twelve.

# %%
QUESTION = "Who is this person?"


def name_people(folder):
    """Returns the answer of a model about a portrait of each of the twelve people."""
    model = vkd_jax.load(folder)
    return {person.id: vkd_jax.answer(model, QUESTION, people.portrait(person, view=VIEW)) for person in everybody[:12]}


before = name_people("tiny_llava")
show_portraits(before)

# %% [markdown]
# ## Unlearning and the attack
#
# The language model is frozen. Unlearning trains the vision tower and the projector until the six people look like
# somebody else. The attack then fine-tunes the unlearned model on some of the forgotten questions and answers, and
# evaluates it on the others. All outputs are written to one folder.

# %%
workdir = tempfile.mkdtemp(prefix="vkd-")
results = vkd_jax.unlearn(
    "tiny_llava",
    retain_only="tiny_retain_only",
    workdir=workdir,
    settings={
        "method.augment_retain": 2,
        "attacks.names": "relearn",
        "attacks.relearn.shares": (0.1, 0.2),
    },
)
print(workdir)

# %% [markdown]
# ## After unlearning

# %%
after = name_people(f"{workdir}/unlearned")
show_portraits(after)
for name, group in (("to forget", everybody[:6]), ("to retain", everybody[6:12])):
    correct = [sum(person.name in answers[person.id] for person in group) for answers in (before, after)]
    print(f"{name}: {correct[0]} of 6 named before, {correct[1]} after")

# %% [markdown]
# ## Accuracy
#
# The table shows the accuracy (%) on questions with four options, where chance is 25 %. The retain-only model was
# trained without the six people and is the reference for forgetting: it confuses them with look-alikes, so it scores
# below chance.

# %%
MODELS = {"vanilla": "vanilla", "unlearned": "unlearned", "retain_only": "retain-only"}
ROWS = {
    ("forget", "vqa"): "to forget, images of the training data",
    ("test", "vqa"): "to forget, other images",
    ("forget", "qa"): "to forget, text only",
    ("retain", "vqa"): "to retain, images",
    ("real", "vqa"): "general ability, images",
}
print(f"{'':40}" + "".join(f"{name:>16}" for name in MODELS.values()))
for (name, kind), title in ROWS.items():
    accuracies = [results.summary(model, name, kind).accuracy for model in MODELS]
    print(f"{title:40}" + "".join(f"{100 * accuracy:16.1f}" for accuracy in accuracies))
print("logits of text-only questions are bit-identical:", results.text_logits_identical)

# %% [markdown]
# ## Relearning
#
# The attacker fine-tunes the unlearned model on some of the forgotten questions and answers. If the accuracy on the
# remaining questions recovers as well, the knowledge was hidden and not removed. The retain-only model under the same
# attack shows how much of it is newly learned.

# %%
figure, axis = plt.subplots(figsize=(8, 5.5))
axis.imshow(imread(f"{workdir}/report/relearning.png"))
axis.axis("off")
plt.show()
for cell in results.attacks["relearn"].cells:
    if cell.model == "unlearned" and cell.recovery is not None:
        attack = f"{cell.attacker} {100 * cell.share:g} % of the {cell.unit}, set {cell.set}"
        print(f"{attack:42} {100 * cell.recovery:6.1f} % of the lost accuracy recovered")

# %% [markdown]
# The folder also has the full report, `report.md`, and the unlearned model, `unlearned/`, in Hugging Face format.
