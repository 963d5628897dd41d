"""Reads an exported LLaVA with other versions of transformers, and prints a Markdown table of what each of them gets.

python tests/programs/readers.py PYTHON...

Each PYTHON is the interpreter of an environment with PyTorch and one version of transformers. A version reads a model
if no tensor is missing or unexpected, and if greedy decoding gives the tokens that this package gives.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QUESTIONS = ("Who is this person?", "What does this person do for a living?")


def read(folder: str, prompts: str) -> dict[str, Any]:
    """Loads and asks the model with the transformers of this interpreter, without this package."""
    import torch
    import transformers

    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    # Before 4.46 an image had one token in a prompt.
    key = "short_ids" if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 46) else "ids"
    answers = []
    for prompt in json.loads(Path(prompts).read_text()):
        ids, pixels = torch.tensor([prompt[key]]), torch.tensor([prompt["pixels"]])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=prompt["length"],
            do_sample=False,
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    counts = {kind: len(info[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    return {"version": transformers.__version__, **counts, "answers": answers}


def expected(folder: Path) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Asks the model with this package: the prompts, and the tokens of the answers."""
    from PIL import Image

    from vkd_jax import ask

    model = ask.load(folder)
    image = Image.radial_gradient("L").convert("RGB")
    pixels = model.processor.image(image)
    prompts, answers = [], []
    for question in QUESTIONS:
        ids, _ = model.processor.encode(question, None, [pixels])
        _, answer = model.processor.encode(question, ask.answer(model, question, image), [pixels])
        image_id = model.config.image_token_id
        short_ids = [token for i, token in enumerate(ids) if (token, ids[i - 1]) != (image_id, image_id)]
        prompts.append(
            {
                "ids": ids,
                "short_ids": short_ids,
                "pixels": pixels.transpose(2, 0, 1).tolist(),
                "length": len(answer),
            }
        )
        answers.append(answer)
    return prompts, answers


def main(interpreters: list[str]) -> int:
    """Prints the table; returns 1 if a version does not read the model."""
    from vkd_jax.checkpoints import export
    from vkd_jax.checkpoints.bundle import read_family
    from vkd_jax.runtime import hub

    rows, failures = ["| transformers | missing | unexpected | same tokens |", "| --- | --- | --- | --- |"], 0
    with tempfile.TemporaryDirectory() as temporary:
        source, folder = hub.fetch_model("tiny_llava"), Path(temporary) / "exported"
        export.export({}, source, folder, read_family(source)[1])
        prompts, answers = expected(folder)
        file = Path(temporary) / "prompts.json"
        file.write_text(json.dumps(prompts))
        for interpreter in interpreters:
            command = [interpreter, __file__, "--read", str(folder), str(file)]
            environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
            process = subprocess.run(command, capture_output=True, text=True, env=environment)
            if process.returncode:
                reason = process.stderr.strip().splitlines()[-1]
                rows.append(f"| {interpreter} | {reason} | | |")
                failures += 1
                continue
            result = json.loads(process.stdout.splitlines()[-1])
            same = result["answers"] == answers
            failures += bool(result["missing"] or result["unexpected"] or not same)
            row = (result["version"], result["missing"], result["unexpected"], "yes" if same else "no")
            rows.append(f"| {' | '.join(map(str, row))} |")
    print("\n".join(rows))
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        print(json.dumps(read(*sys.argv[2:])))
    else:
        sys.exit(main(sys.argv[1:]))
