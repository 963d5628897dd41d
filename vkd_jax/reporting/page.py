"""The words of report.md: functions from results.json to Markdown, each one section.

Written for somebody who was never told about unlearning: what was measured, on how many, by which protocol, from
which commit, stands on the page itself.
"""

import json
from collections.abc import Iterable, Mapping

from vkd_jax.reporting.plots import ATTACKERS

SETS = {
    "forget": "people to forget",
    "test": "people to forget, other pictures or wordings",
    "retain": "people to keep",
    "retain_test": "people to keep, other pictures or wordings",
    "real": "general ability, nothing about these people",
    "real_faces": "other people, known from elsewhere",
    "real_world": "the world at large, nothing about people",
}
KINDS = {
    "vqa": "Choosing an answer, shown a picture",
    "qa": "Choosing an answer, in text alone",
    "vqa_letter": "Choosing an answer by its letter, shown a picture",
    "qa_letter": "Choosing an answer by its letter, in text alone",
    "vqa_options": "Choosing an answer by its probability, shown a picture",
    "qa_options": "Choosing an answer by its probability, in text alone",
    "cloze_vqa": "Filling in a blank, shown a picture",
    "cloze_qa": "Filling in a blank, in text alone",
    "generation_vqa": "Answering freely, shown a picture",
    "generation_qa": "Answering freely, in text alone",
}
MODELS = {"vanilla": "before", "unlearned": "after", "retain_only": "never knew them"}
PROTOCOLS = {
    "options": "the option text to which the model gives the highest probability is its answer; it is not shown them",
    "letter": "the model is shown the options and writes; the first letter that it writes is its answer",
}
JUDGED = {
    "cloze": "right if the missing words occur in the answer",
    "generation": "right if the true answer occurs in what is written; how close the words come has tables of its own",
}
WORDS = {
    "rouge_l": "ROUGE-L, F",
    "rouge_l_recall": "ROUGE-L, recall",
    "bleu": "BLEU",
    "probability": "probability of the answer, a token",
}
ASSUMPTIONS = (
    'VKD here is a *reconstruction*: only the abstract of "Robust MLLM Unlearning via Visual Knowledge '
    'Distillation" (arXiv 2512.11325) and summaries of it were at hand, not its equations, weights or code. '
    "Assumed, and switchable in the config: the distance between features (A1), how the output is made to "
    "forget (A2), what the features of a forgotten picture should become (A3), the teacher of what is kept "
    "(A4), which features are compared (A5), what the saliency mask covers (A6), which visual weights "
    "train (A7), and whether changed copies of the pictures are trained on (A8)."
)

UNMEASURED = {  # why an attack may have nothing to show
    "membership": "Not measured: there are no people here whom no model ever met to compare with. Name a folder of "
    "pictures of some, with the same questions, as `--config.attacks.membership.held_out=DIR`.",
    "leak": "Not measured: no question of text alone was asked about the people to forget.",
    "probe": "Not measured: there are no other pictures of the people to forget.",
}
FOLDED = 8  # a table of an attack with more rows than this is folded


def opening(results: Mapping) -> str:
    """What happened, in a few sentences."""
    before, after = (results["models"][name] for name in ("vanilla", "unlearned"))
    asked, people = _main(before["forget"], "vqa"), results["meta"]["benchmark"]["people"]["forget"]
    whom, one = (f"{people} of them", f"one of the {people}") if people else ("some of it", "what to forget")
    chance = results["chance"].get("forget", {}).get(asked)
    verdict = _verdict(after["forget"][asked], results["models"].get("retain_only", {}).get("forget", {}).get(asked))
    if chance:
        verdict = f" Guessing gives {_percent(chance)}." + (
            verdict or _verdict(after["forget"][asked], {"low": chance, "high": chance}, "guessing")
        )
        if before["forget"][asked]["low"] <= chance:
            verdict += " **It had hardly learned them before**, so that there was little to forget."
    lines = [
        "# What this model was made to forget",
        "",
        "A model that answers questions about pictures had learned some people: how they look, and facts "
        f"about them. **It was asked to forget {whom}**, as someone has the right to ask, and to "
        "stay what it was for everything else. Training it again without them would do that, and costs as "
        "much as training it the first time; *unlearning* changes the trained model instead. This page "
        "shows the model before and after.",
        "",
        f"- **Forgotten.** Shown a picture of {one}, it answered {_change(before, after, 'forget', asked)}.{verdict}",
    ]
    told = (
        ("test", "vqa", "**On other pictures** of the same people, it answered"),
        ("retain", "vqa", "**Kept.** Shown a picture of anybody else, it answered"),
        ("retain_test", "vqa", "**Kept on other pictures** of anybody else: it answered"),
        (
            "real",
            "vqa",
            "**General ability.** On pictures and questions that are not about who somebody is, it answered",
        ),
        ("real_faces", "vqa", "**Other people**, known from elsewhere: it answered"),
        ("real_world", "vqa", "**The world at large**: it answered"),
        ("forget", "qa", "**Asked by name**, without any picture, about the people to forget, it answered"),
        ("retain", "qa", "**Asked by name** about the others, it answered"),
    )
    for part, modality, text in told:
        kind = _main(before.get(part, {}), modality)
        if kind and kind in after.get(part, {}):
            lines.append(f"- {text} {_change(before, after, part, kind)}.")
    if again := _relearned(results):
        lines.append(f"- {again}")
    if results["manifest"]["language_model_changed"] == 0:
        lines += [
            "",
            "What was erased is visual: who is in a picture. What the model can say of somebody whose "
            "*name* it is told lives in its language model, which was left alone on purpose.",
        ]
    return "\n".join(lines) + "\n"


def measured(results: Mapping) -> str:
    """What was asked: the benchmark, its sets, how many people and questions, by which protocol."""
    meta = results["meta"]
    benchmark, first = meta["benchmark"], meta["protocols"][0]
    kinds = _kinds(results)
    tasks = list(dict.fromkeys(kind.rpartition("_")[0] for kind in kinds if kind.rpartition("_")[0] in JUDGED))
    lines = [
        "## What was measured",
        "",
        f"Benchmark: {benchmark['title']}; data: {benchmark['source']}. Numbers of people and of questions asked:",
        "",
        row(["questions about", "people", *(KINDS.get(kind, kind).lower() for kind in kinds)]),
        row(["---", *["---:"] * (len(kinds) + 1)]),
    ]
    for part in _parts(results):
        summaries = results["models"]["vanilla"][part]
        counts = [str(summaries[kind]["n"]) if kind in summaries else "–" for kind in kinds]
        lines.append(row([SETS.get(part, part), str(benchmark["people"].get(part) or "–"), *counts]))
    lines.append("")
    if any(kind.startswith(("vqa", "qa")) for kind in kinds):
        lines += [f"- Choosing, protocol `{name}`: {PROTOCOLS[name]}." for name in meta["protocols"]]
        if len(meta["protocols"]) > 1:
            lines.append(f"- Where no protocol is named, it is `{first}`; protocols are never mixed.")
    names = {"cloze": "Filling in a blank", "generation": "Answering freely"}
    lines += [f"- {names[task]}: the model writes; {JUDGED[task]}." for task in tasks]
    shots = "one worked example, of the people to keep, before" if meta["shots"] else "no worked example before"
    limit = meta["config"]["eval"]["max_new_tokens"]
    lines.append(
        f"- With {shots} each question. The model always writes its most probable next token, {limit} at most."
    )
    return "\n".join(lines) + "\n"


def accuracy(results: Mapping) -> str:
    """A table for each kind of question, and the picture of forgetting against keeping."""
    models = [name for name in MODELS if name in results["models"]]
    lines = [
        "## Before and after, in numbers",
        "",
        "Each cell: right answers in per cent, (right / asked), and the 95 % interval of the percentage.",
    ]
    for kind in _kinds(results):
        lines += ["", f"### {KINDS.get(kind, kind)}", ""]
        lines += [row(["questions about", *(MODELS[name] for name in models), "change (points)"])]
        lines += [row(["---", *["---:"] * (len(models) + 1)])]
        for part in _parts(results, kind):
            cells = [results["models"][name].get(part, {}).get(kind) for name in models]
            change = 100 * (results["models"]["unlearned"][part][kind]["accuracy"] - cells[0]["accuracy"])
            lines.append(row([SETS.get(part, part), *(_cell(c) if c else "–" for c in cells), f"{change:+.1f}"]))
    lines += [
        "",
        "![Right answers about the people to forget against those about the people to keep](report/forget_retain.png)",
        "",
        "The aim is to move left, to the line of guessing, without sinking.",
    ]
    if "retain_only" in results["models"]:
        lines += [
            "",
            '"Never knew them" is the same model trained without the people to forget: what complete '
            "forgetting looks like, in pictures and in text.",
        ]
    return "\n".join(lines) + "\n"


def words(results: Mapping) -> str:
    """How close what was written comes to the true answer; "" where nothing was written."""
    models = [name for name in MODELS if name in results["models"]]
    tables = []
    for kind in _kinds(results):
        for measure, title in WORDS.items():
            parts = [p for p in _parts(results, kind) if measure in results["models"]["vanilla"][p][kind]]
            if not parts or not kind.startswith("generation"):
                continue
            tables += ["", f"### {title}: {KINDS.get(kind, kind).lower()}", ""]
            tables += [row(["questions about", "questions", *(MODELS[name] for name in models)])]
            tables += [row(["---", *["---:"] * (len(models) + 1)])]
            for part in parts:
                cells = [results["models"][name].get(part, {}).get(kind, {}).get(measure) for name in models]
                count = results["models"]["vanilla"][part][kind]["n"]
                tables.append(
                    row([SETS.get(part, part), str(count), *(_mean(cell) if cell else "–" for cell in cells)])
                )
    if not tables:
        return ""
    head = [
        "<details><summary><b>How close the words come</b>: ROUGE-L, BLEU, probability of the answer</summary>",
        "",
        "Means over the questions, with 95 % bootstrap intervals. ROUGE-L is the longest common subsequence of words, "
        "stemmed (F, and recall of the true answer); BLEU compares up to four words in a row, smoothed; the "
        "probability is that of the true answer, the geometric mean over its tokens.",
    ]
    return "\n".join([*head, *tables, "", "</details>"]) + "\n"


def quality(results: Mapping) -> str:
    """Forget quality and model utility; "" where neither could be computed."""
    lines = []
    models = [name for name in MODELS if name in results["models"]]
    if any(results.get("forget_quality", {}).values()):
        lines += [
            "",
            "**Forget quality**: is the model, asked about the people to forget, as one that never knew them? For each "
            "question the *truth ratio* is how much likelier the right answer is than wrong ones, a token. Its "
            "distribution is compared with that of the model that never knew them: by the Kolmogorov-Smirnov test (a "
            "small p says that they differ) and by the Jensen-Shannon divergence (0 when equal, 1 at most).",
            "",
            row(["model", "questions", "n", "KS statistic", "p", "JS divergence"]),
            row(["---", "---", *["---:"] * 4]),
        ]
        for name in models:
            for kind, found in results["forget_quality"].get(name, {}).items():
                figures = [str(found["n"]), f"{found['ks']:.3f}", f"{found['p']:.2g}", f"{found['js']:.3f}"]
                lines.append(row([MODELS[name], KINDS.get(kind, kind).lower(), *figures]))
    if any(results.get("utility", {}).values()):
        lines += [
            "",
            "**Model utility**: the harmonic mean of what is kept, over the sets that are not about the people to "
            "forget (each component, with its number of questions, stands in `results.json`).",
            "",
            row(["model", "utility", "components"]),
            row(["---", "---:", "---:"]),
        ]
        for name in models:
            found = results["utility"].get(name)
            if found:
                cell = f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
                lines.append(row([MODELS[name], cell, str(len(found["components"]))]))
    return "\n".join(["## Forget quality and model utility", *lines]) + "\n" if lines else ""


def attacks(results: Mapping, curves: bool) -> str:
    """What somebody gets back who tries; "" where nobody did.

    Args:
        results: of the run.
        curves: whether the picture of relearning was drawn.
    """
    found = results.get("attacks") or {}
    if not found:
        return ""
    never = "retain_only" in results["models"]
    lines = [
        "## Attacks: does it come back?",
        "",
        "A model may keep what it no longer says. Here somebody tries to get at it: by training the model a little "
        "more, with other words or changed pictures, with weights rounded off, or by looking at its numbers instead of "
        "its words. Each attack is made alike on the model before and on the model after"
        + (
            ', and on one that never knew the people to forget: they are forgotten where "after" looks like '
            '"never knew them", and not like "before".'
            if never
            else "; how it fares on one that never knew the people to forget was not measured here."
        ),
        "",
        "Each cell: right answers in per cent, (right / asked), and the 95 % interval of the percentage; or an AUC and "
        "its 95 % interval, over people.",
    ]
    for name, attack in found.items():
        lines += ["", f"### {attack['title']}", "", attack["about"], ""]
        if name == "relearn" and curves:
            lines += ["![Right answers by the share that was taught again](report/relearning.png)", ""]
        lines += _attack_table(attack, [model for model in MODELS if model in results["models"]]) or [
            UNMEASURED.get(name, "Not measured: there was nothing to ask.")
        ]
    return "\n".join(lines) + "\n"


def _attack_table(attack: Mapping, models: Iterable[str]) -> list[str]:
    """A row a variant, a column a model; [] without any."""
    summary, models = attack["summary"], list(models)
    rows = [
        row([variant, *(_attack_cell(cells[model], attack["unit"]) if model in cells else "–" for model in models)])
        for variant, cells in summary.items()
    ]
    if not rows:
        return []
    head = [row(["what was tried", *(MODELS[name] for name in models)]), row(["---", *["---:"] * len(models)])]
    if len(rows) <= FOLDED:
        return head + rows
    return [f"<details><summary>All {len(rows)} figures</summary>", "", *head, *rows, "", "</details>"]


def _attack_cell(cell: Mapping, unit: str) -> str:
    if unit == "AUC":
        return f"{_decimals(cell['mean'])} ({_decimals(cell['low'])} to {_decimals(cell['high'])})"
    count = f" ({cell['correct']}/{cell['n']})" if "correct" in cell else ""
    recovery = "" if cell.get("recovery") is None else f"; recovery {_decimals(cell['recovery'])}"
    return f"{_percent(cell['mean'])}{count}, {_interval(cell)}{recovery}"


def _decimals(value: float) -> str:
    """.53, 1.00, -.20"""
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.2f}"


def _relearned(results: Mapping) -> str:
    """What a fifth of the questions brings back, or the share next to it, to the attacker who gets most; "" without."""
    summary = results.get("attacks", {}).get("relearn", {}).get("summary", {})
    tried = [cells for cells in summary.values() if cells.get("unlearned", {}).get("set") == "forget"]
    tried = [cells for cells in tried if "share" in cells["unlearned"]]
    if not tried:
        return ""
    cells = min(tried, key=lambda cells: (abs(cells["unlearned"]["share"] - 0.2), -cells["unlearned"]["mean"]))
    after, never = cells["unlearned"], cells.get("retain_only")
    trained = ATTACKERS.get(after["attacker"], after["attacker"])
    return (
        f"**Relearning.** After fine-tuning {trained} on {100 * after['share']:g} % of the forgotten questions it "
        f"answered **{_percent(after['mean'])}** of the other ones right ({_interval(after)})"
        + (f"; a model that never knew them {_percent(never['mean'])} ({_interval(never)})." if never else ".")
    )


def _verdict(after: Mapping, other: Mapping | None, name: str = "") -> str:
    """How the share of right answers compares with another one, or with guessing; "" without one."""
    if other is None:
        return ""
    never = f"one that never knew them ({_percent(other['accuracy'])})" if "accuracy" in other else name
    if after["low"] <= other["high"] and other["low"] <= after["high"]:
        return f" That cannot be told apart from {never}."
    if after["high"] < other["low"]:
        return f" That is below {never}: the model avoids the right answer, which may itself give it away."
    return f" That is above {never}: something is still known."


def _main(summaries: Mapping, modality: str) -> str | None:
    """The kind of question that tells most: choosing an answer, or else what there is."""
    kinds = (modality, f"generation_{modality}", f"cloze_{modality}")
    return next((kind for kind in kinds if kind in summaries), None)


def _kinds(results: Mapping) -> list[str]:
    """The kinds of question that were asked, in order."""
    there = {kind for part in results["models"]["vanilla"].values() for kind in part}
    return [*(kind for kind in KINDS if kind in there), *sorted(there - KINDS.keys())]


def _parts(results: Mapping, kind: str | None = None) -> list[str]:
    """The sets, or those with questions of a kind, in order."""
    parts = results["models"]["vanilla"]
    ordered = [*(part for part in SETS if part in parts), *sorted(parts.keys() - SETS.keys())]
    return [part for part in ordered if kind is None or kind in parts[part]]


def _mean(found: Mapping) -> str:
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def portraits() -> str:
    """The sheet of portraits."""
    return (
        "## See for yourself\n\n![Portraits with what the model says before and "
        "after](report/portraits.png)\n\nNobody chose these by their answers: they are the first people of "
        "each set in the order of their numbers, and the question moves on by one from person to person. "
        "For a forgotten person a wrong answer (✗) is the aim, and some guesses are right by luck. Every "
        "answer to every question stands in `answers/`.\n"
    )


def evidence(results: Mapping) -> str:
    """How we know: protocol, what changed, command, commit, versions."""
    meta, manifest = results["meta"], results["manifest"]
    changed = manifest["language_model_changed"]
    lines = [
        "## How we know",
        "",
        f"- **Protocol** `{meta['protocol']}`, as told above. Intervals of percentages are Wilson's, 95 %.",
        *_trained(results),
        f"- **Tensors changed on disk:** {manifest['changed']} of {manifest['tensors']}, by the SHA-256 of "
        "each before and after, in `manifest.json`.",
        f"- **Language model:** {f'**{changed} tensors differ**' if changed else 'not one tensor differs'}.",
    ]
    if "text_logits_identical" in results:
        same = "bit for bit the same" if results["text_logits_identical"] else "**not the same**"
        lines.append(f"- **Text-only output** (logits) before and after: {same}.")
    lines += [
        f"- **Made by** `{meta['command']}`, commit `{meta['commit']}`, seed {meta['seed']}"
        + (f", {meta['date']}" if "date" in meta else "")
        + (f", on {meta['devices']}" if "devices" in meta else "")
        + ".",
        f"- **Versions:** {', '.join(f'{name} {version}' for name, version in meta['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def _trained(results: Mapping) -> list[str]:
    """How many weights trained; nothing of a model that was made elsewhere."""
    if "trainable" not in results:
        return []
    count, all_of_them = (results["trainable"][key] for key in ("parameters", "of"))
    return [f"- **Weights trained:** {count:,} of {all_of_them:,} ({_percent(count / all_of_them)})."]


def training(results: Mapping, curves: bool) -> str:
    """Losses and time."""
    lines = ["## Training and time", ""]
    if curves:
        lines += [
            "![Losses by step](report/losses.png)",
            "",
            "The forget stream sees the people to forget, the retain stream those to keep; bold is what is minimised.",
            "",
        ]
    lines += [row(["stage", "seconds"]), row(["---", "---:"])]
    lines += [row([stage, f"{seconds:.1f}"]) for stage, seconds in results["timing"].items()]
    lines += [row(["**all**", f"**{sum(results['timing'].values()):.1f}**"])]
    return "\n".join(lines) + "\n"


def limits(results: Mapping) -> str:
    """What this does not show."""
    lines = ["## Limits", ""]
    made = results["meta"]["config"]
    if made["method"]["name"] == "vkd" and made.get("stage") != "audit":  # which judges what was made elsewhere
        lines.append(f"- {ASSUMPTIONS}")
    lines += [
        "- Not answering is not the same as not knowing: what these questions do not bring out, further "
        "training or other questions might.",
        "- The figures hold for these people, these questions and this model; the intervals say how much "
        "the number of questions leaves open, not how much another seed would change.",
    ]
    return "\n".join(lines) + "\n"


def config(results: Mapping) -> str:
    """The whole config, folded."""
    text = json.dumps(results["meta"]["config"], indent=2, ensure_ascii=False)
    return f"<details><summary>The whole config</summary>\n\n```json\n{text}\n```\n\n</details>\n"


def _change(before: Mapping, after: Mapping, part: str, kind: str) -> str:
    old, new = before[part][kind], after[part][kind]
    return (
        f"{_percent(old['accuracy'])} of {old['n']} questions right before, and "
        f"**{_percent(new['accuracy'])}** after ({_interval(new)})"
    )


def _cell(summary: Mapping) -> str:
    return f"{_percent(summary['accuracy'])} ({summary['correct']}/{summary['n']}), {_interval(summary)}"


def _interval(summary: Mapping) -> str:
    return f"{100 * summary['low']:.1f} to {100 * summary['high']:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
