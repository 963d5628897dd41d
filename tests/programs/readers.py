"""Reads exports of all families with other versions of transformers, and prints a Markdown table of what each gets.

python tests/programs/readers.py PYTHON...

Each PYTHON is the interpreter of an environment with PyTorch and one version of transformers; PYTHON=FOLDER puts the
packages of a folder before those of the interpreter. A version reads a model if no tensor is missing or unexpected, and
if greedy decoding gives the tokens that this package gives. The models are the shipped LLaVA and small random ones.
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QUESTIONS = ("Who is this person?", "What does this person do for a living?")
NEW_TOKENS = 12
SINGLE_TOKEN = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")  # of an image, before 4.48


def read(folder: str) -> dict[str, Any]:
    """Loads and asks each model with the transformers of this interpreter, without this package."""
    import torch
    import transformers

    version, results = tuple(map(int, transformers.__version__.split(".")[:2])), {}
    for model_folder in sorted(Path(folder).iterdir()):
        asked = json.loads((model_folder / "prompts.json").read_text())
        if not hasattr(transformers, asked["architecture"]):
            continue
        model, info = getattr(transformers, asked["architecture"]).from_pretrained(
            str(model_folder), output_loading_info=True, torch_dtype=torch.float32
        )
        model.generation_config.update(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        model.generation_config.eos_token_id = None
        if version < (4, 52) and asked["architecture"] == "Gemma3ForConditionalGeneration":
            model.generation_config.cache_implementation = "hybrid"  # as in the published generation_config.json
        single = version < (4, 48) and asked["architecture"] in SINGLE_TOKEN
        accepted, answers = inspect.signature(model.forward).parameters, []
        for prompt in asked["prompts"]:
            ids = torch.tensor([prompt["short_ids" if single else "ids"]])
            kinds = (ids == asked["image_token"]).long()
            arrays = {name: torch.tensor(value) for name, value in prompt["arrays"].items()}
            inputs = {
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": kinds,
                "mm_token_type_ids": kinds,
                **arrays,
            }
            inputs = {name: value for name, value in inputs.items() if name in accepted}
            out = model.generate(input_ids=ids, **inputs)
            answers.append(out[0, ids.shape[1] :].tolist())
        counts = {kind: len(info[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
        results[model_folder.name] = {**counts, "same": answers == [p["answer"] for p in asked["prompts"]]}
    return {"version": transformers.__version__, "results": results}


def write_prompts(folder: Path) -> None:
    """Asks a model with this package, and writes the prompts and the tokens of the answers beside it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from PIL import Image

    from vkd_jax.checkpoints.bundle import ModelBundle
    from vkd_jax.checkpoints.hf import family_of
    from vkd_jax.models import generate
    from vkd_jax.models.base import bind

    bundle = ModelBundle.load(folder, dtype="float32")
    processor, config = bundle.processor, bundle.config
    prompts = []
    image = Image.radial_gradient("L").convert("RGB").resize((90, 60))
    pixels, image_id = processor.image(image), config.image_token_id
    options = dict(config.image_processor_options) | dict(do_convert_rgb=True, return_tensors="np")
    output = processor.image_processor(images=[image], **options)
    arrays = {name: np.asarray(x).tolist() for name, x in output.items()}
    features = jax.jit(lambda params, images: bind(bundle.graphdef, params).encode(images)[0])(
        bundle.params, config.pack([[pixels]])
    )

    @jax.jit
    def greedy(params: Any, tokens: Any, features: Any) -> Any:
        row = generate.Prompts(tokens, jnp.ones(tokens.shape, bool), features)
        model = bind(bundle.graphdef, params)
        return generate.greedy(model, row, max_new_tokens=NEW_TOKENS, eos_ids=(), pad_id=0)

    for question in QUESTIONS:
        ids, _ = processor.encode(question, None, [pixels])
        answer = greedy(bundle.params, jnp.asarray([ids]), features)[0].tolist()
        short_ids = [token for i, token in enumerate(ids) if (token, ids[i - 1]) != (image_id, image_id)]
        prompts.append({"ids": ids, "short_ids": short_ids, "arrays": arrays, "answer": answer})
    content = {"architecture": family_of(config).HF_ARCHITECTURE, "image_token": image_id, "prompts": prompts}
    (folder / "prompts.json").write_text(json.dumps(content))


def run(interpreter: str, folder: str) -> dict[str, Any]:
    """Runs `read` with another interpreter; {"version": the reason} if it fails."""
    python, _, packages = interpreter.partition("=")
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "USE_TF": "0", "USE_FLAX": "0"}
    if packages:
        environment["PYTHONPATH"] = packages
    process = subprocess.run([python, __file__, "--read", folder], capture_output=True, text=True, env=environment)
    if process.returncode:
        return {"version": f"{interpreter}: {process.stderr.strip().splitlines()[-1]}", "results": {}}
    return json.loads(process.stdout.splitlines()[-1])


def main(interpreters: list[str]) -> int:
    """Prints the table; returns 1 if a version does not read a model whose family it knows."""
    import family_folders

    from vkd_jax.checkpoints import export
    from vkd_jax.checkpoints.bundle import read_family
    from vkd_jax.models import MODELS
    from vkd_jax.runtime import hub

    rows, failures = [f"| transformers | {' | '.join(MODELS)} |", "| --- |" + " --- |" * len(MODELS)], 0
    with tempfile.TemporaryDirectory() as temporary:
        exports = Path(temporary) / "exports"
        exports.mkdir()
        for name in MODELS:
            is_shipped = name == "llava"
            source = (
                hub.fetch_model("tiny_llava") if is_shipped else family_folders.create(Path(temporary) / name, name)
            )
            export.export({}, source, exports / name, read_family(source)[1])
            write_prompts(exports / name)
        for interpreter in interpreters:
            result, row = run(interpreter, str(exports)), []
            for name in MODELS:
                found = result["results"].get(name)
                good = found and not found["missing"] and not found["unexpected"] and found["same"]
                failures += bool(found and not good)
                row.append("-" if found is None else "yes" if good else json.dumps(found))
            failures += not result["results"]
            rows.append(f"| {result['version']} | {' | '.join(row)} |")
            print(rows[-1], flush=True)
    print("\n".join(rows))
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        print(json.dumps(read(*sys.argv[2:])))
    else:
        sys.exit(main(sys.argv[1:]))
