"""The stages in order. Each leaves its result in the workdir, and a stage whose result is there is not run again."""

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from vkd_jax import convert, data, hub, methods, models, report, sharding, train
from vkd_jax.data import people, processing
from vkd_jax.evaluate import Answerer, evaluate, sample, summarise
from vkd_jax.methods.base import Context
from vkd_jax.models import quantize
from vkd_jax.types import Example, Params, UserError
from vkd_jax.workdir import Workdir

DTYPES = ("float32", "bfloat16", "float16")
TINY_LLAVA = Path(__file__).parent / "assets" / "tiny_llava"


def run(config: ml_collections.ConfigDict, path: str | Path) -> dict[str, Any]:
    """Runs or continues what `config.stage` names, and returns what stands in results.json."""
    if config.stage not in STAGES:
        raise UserError(f"config.stage={config.stage!r}: give one of {', '.join(sorted(STAGES))}.")
    stage, last = STAGES[config.stage]
    workdir = Workdir(path, config)
    if (workdir.path / last).exists():
        logging.info("%s is there: nothing is left to do", workdir.path / last)
    else:
        stage(workdir)
    return json.loads((workdir.path / "results.json").read_text())


def unlearn(workdir: Workdir) -> None:
    """data -> load -> evaluate before -> prepare -> unlearn -> export -> evaluate after -> report."""
    config, mesh, method = _checked(workdir.config)
    if set(method.losses()) != {"forget", "retain"}:
        raise UserError(f"method {config.method.name} does not unlearn; give another one, or --config.stage=finetune.")
    target = workdir.path / "unlearned"
    with workdir.stage("data"):
        folder = _snapshot(workdir, [name for name in people.CONFIGS if name != "ft_Data"])
        sets = data.benchmark(config.data.benchmark).read(folder, config.data.forget)
        asked = _asked(config, sets)
    source = hub.fetch(config.model.path or TINY_LLAVA)  # last: it may take an hour
    base = hub.fetch(config.model.base) if config.model.base else None
    if not (workdir.path / "results.json").exists():
        with workdir.stage("load"):
            model = Loaded.open(source, config, mesh, method)
        before = _evaluated(workdir, "vanilla", model, asked)
        if not target.exists():
            with workdir.stage("prepare"):
                context = Context(
                    graphdef=model.graphdef,
                    params=model.params,
                    base_params=model.same_kind(Loaded.open(base, config, mesh, method)).params if base else None,
                    model_config=model.config,
                    sets={name: model.encode(_pairs(sets[name])) for name in ("forget", "retain")},
                    seed=config.seed,
                )
                prepared = method.prepare(context)
            with workdir.stage("unlearn"):
                trained = _fit(workdir, model, method, prepared, mesh)
            with workdir.stage("export"):
                convert.export(trained, source, target, model.config)
        with workdir.stage("manifest"):
            manifest = convert.manifest(source, target)
            workdir.write("manifest.json", manifest)
        unlearned = Loaded.open(target, config, mesh, method)  # what is judged is what was written
        after = _evaluated(workdir, "unlearned", unlearned, asked)
        trainable = method.trainable(model.params, model.config)
        family, _ = convert.read_config(source)
        changed = [convert.find_slot(family, model.config, name).path for name in manifest["changed"]]
        results = {
            "meta": workdir.meta(),
            "models": {"vanilla": summarise(before), "unlearned": summarise(after)},
            "chance": _chance(asked),
            "text_logits_identical": _same_text_logits(model, unlearned, asked),
            "trainable": {
                "parameters": sum(math.prod(model.params[path].shape) for path in trainable),
                "of": sum(math.prod(value.shape) for value in model.params.values()),
            },
            "manifest": {
                "changed": len(manifest["changed"]),
                "tensors": len(manifest["tensors"]),
                "language_model_changed": sum(path.startswith("language_model/") for path in changed),
            },
        }
        workdir.write("results.json", results | {"timing": workdir.timing})
    with workdir.stage("report"):
        images = {e.image_id: e.image for part in asked.values() for e in part if e.image is not None}
        page = report.write(workdir.path, images)
    logging.info("the report: %s", page)


def finetune(workdir: Workdir) -> None:
    """data -> create or load -> train -> export -> evaluate."""
    config, mesh, method = _checked(workdir.config)
    if set(method.losses()) != {"image", "text"}:
        raise UserError(f"method {config.method.name} does not fine-tune; use configs/tiny.py:finetune.")
    name, without = ("retain_only", config.data.forget) if config.data.retain_only else ("vanilla", None)
    target = workdir.path / "finetuned"
    with workdir.stage("data"):
        folder = _snapshot(workdir, people.CONFIGS)
        benchmark = data.benchmark(config.data.benchmark)
        examples = benchmark.read_finetune(folder, without_forget=without)
        asked = _asked(config, benchmark.read(folder, config.data.forget))
    if not target.exists():
        with workdir.stage("load"):
            source = hub.fetch(config.model.path) if config.model.path else _create(workdir, examples)
            model = Loaded.open(source, config, mesh, method)
        with workdir.stage("prepare"):
            streams = {
                "image": model.encode([e for e in examples if e.image is not None]),
                "text": model.encode([e for e in examples if e.image is None]),
            }
            context = Context(model.graphdef, model.params, None, model.config, streams, config.seed)
            prepared = method.prepare(context)
        with workdir.stage("finetune"):
            trained = _fit(workdir, model, method, prepared, mesh)
        with workdir.stage("export"):
            convert.export(trained, source, target, model.config)
    answers = _evaluated(workdir, name, Loaded.open(target, config, mesh, method), asked)
    results = {"meta": workdir.meta(), "models": {name: summarise(answers)}, "chance": _chance(asked)}
    workdir.write("results.json", results | {"timing": workdir.timing})


STAGES = {"finetune": (finetune, "results.json"), "unlearn": (unlearn, "report.md")}  # and what each writes last


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model folder in memory."""

    graphdef: Any
    params: Params
    config: Any
    processor: processing.Processor

    @classmethod
    def open(
        cls, folder: Path, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, method: methods.Method
    ) -> "Loaded":
        """Reads the processor, then weights straight into their shards; what the method trains in float32."""
        family, hf_config = convert.read_config(folder)
        how = quantize.parse(config.model.quantize)
        processor = processing.Processor(folder, family.Config.from_hf(hf_config), max_pixels=config.model.max_pixels)
        graphdef, params, model_config = convert.load(
            folder,
            dtype=config.model.dtype,
            sharding=sharding.param_shardings(mesh, family.SHARDING),
            masters=method.trainable,
            transform=how and functools.partial(quantize.quantized, how=how),
            remat=config.model.remat,
        )
        quantize.refuse_trainable(params, method.trainable(params, model_config))
        return cls(graphdef, params, model_config, processor)

    def same_kind(self, other: "Loaded") -> "Loaded":
        """The other model, which must be of the same family and size."""
        if self.config != other.config:
            raise UserError("config.model.base is a model of another kind or size than config.model.path.")
        return other

    def encode(self, examples: Sequence[Example]) -> processing.EncodedSet:
        """Examples of one modality as arrays."""
        return processing.encode_set(
            self.processor,
            examples,
            max_length=self.config.text.max_positions,
        )

    def answerer(self, batch_size: int) -> Answerer:
        """This model, ready to be asked."""
        return Answerer(self.graphdef, self.params, self.config, self.processor, batch_size=batch_size)


def _checked(
    config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, jax.sharding.Mesh, methods.Method]:
    """The config with its mesh and method; what is wrong with it alone is said before anything is read."""
    fields = config.method.to_dict()
    mesh, method = sharding.make_mesh(**config.mesh), methods.create(fields.pop("name"), fields)
    if config.model.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.model.dtype!r}: give one of {', '.join(DTYPES)}.")
    for name in method.losses():
        train.batch_size(config.train, name, mesh)
    return config, mesh, method


def _snapshot(workdir: Workdir, configs: Sequence[str]) -> Path:
    """The folder of the benchmark's files; without one, the made-up people are written into the workdir."""
    config = workdir.config
    if config.data.folder:
        return Path(config.data.folder)
    folder = workdir.path / "data"
    people.write_snapshot(folder, [name for name in configs if not any((folder / name).glob("*.parquet"))])
    return folder


def _asked(config: ml_collections.ConfigDict, sets: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """What the evaluation asks: a seeded sample, the same for every model and method."""
    return {name: sample(part, config.eval.max_items, config.eval.seed, name) for name, part in sets.items()}


def _pairs(examples: Sequence[Example]) -> list[Example]:
    """The questions with a picture, each once: what unlearning trains on."""
    return list({(e.image_id, e.question): e for e in examples if e.image is not None}.values())


def _create(workdir: Workdir, examples: Sequence[Example]) -> Path:
    """A model folder with random weights, and a tokenizer made for the texts of `examples`."""
    from transformers import LlavaConfig

    folder, shape = workdir.path / "base", workdir.config.model.create.to_dict()
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=workdir.path) as temporary:
        new = Path(temporary) / "base"
        corpus = [f"USER: {e.question} ASSISTANT: {e.answer}" for e in examples]
        tokenizer = processing.create_processor(
            new,
            corpus,
            vocab_size=shape["vocab_size"],
            image_size=shape["vision"]["image_size"],
            patch_size=shape["vision"]["patch_size"],
        )
        ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        hf_config = LlavaConfig(
            vision_config=dict(model_type="clip_vision_model", **shape["vision"]),
            text_config=dict(
                model_type="llama",
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                **ids,
                **shape["text"],
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        _, params = convert.init(models.module_for("llava").Config.from_hf(hf_config), workdir.config.seed)
        convert.create(new, hf_config, params)
        new.rename(folder)
    return folder


def _fit(workdir: Workdir, model: Loaded, method: methods.Method, prepared: Any, mesh: jax.sharding.Mesh) -> Params:
    return train.fit(
        graphdef=model.graphdef,
        params=model.params,
        model_config=model.config,
        method=method,
        prepared=prepared,
        config=workdir.config.train,
        seed=workdir.config.seed,
        mesh=mesh,
        folder=workdir.path / "train",
    )


def _evaluated(workdir: Workdir, name: str, model: Loaded, asked: dict[str, list[Example]]) -> list[dict]:
    """The answers of a model, from answers/<name>.jsonl if they were given before."""
    path = workdir.path / "answers" / f"{name}.jsonl"
    if path.exists():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    options = workdir.config.eval
    with workdir.stage(f"evaluate {name}"):
        answers = evaluate(
            model.answerer(options.batch_size),
            asked,
            protocol=options.protocol,
            max_new_tokens=options.max_new_tokens,
        )
        workdir.write_text(f"answers/{name}.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers))
    for part, kinds in summarise(answers).items():
        logging.info(
            "%s %-11s  %s",
            name,
            part,
            "  ".join(f"{k} {v['accuracy']:.3f} (n={v['n']})" for k, v in sorted(kinds.items())),
        )
    return answers


def _chance(asked: dict[str, list[Example]]) -> float:
    """The accuracy of guessing among the options."""
    counts = [len(e.options) for part in asked.values() for e in part if e.options]
    return float(np.mean([1 / count for count in counts])) if counts else 0.0


def _same_text_logits(before: Loaded, after: Loaded, asked: dict[str, list[Example]]) -> bool:
    """Whether both models give the same bits for every option of every text-only question."""
    choices = [e for part in asked.values() for e in part if e.options]
    texts = [e for e in choices if e.image is None] or choices  # a question about a picture is a text without it
    scores = [
        model.answerer(64).score([e.question for e in texts], [e.options for e in texts]) for model in (before, after)
    ]
    return bool(np.array_equal(*scores))
