"""What a run would compute, from all of its checks, without training anything or writing its folder."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from vkd_jax.checkpoints.bundle import read_family
from vkd_jax.config.schema import RunConfig
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.processor import Processor
from vkd_jax.methods import Method
from vkd_jax.planner import abstract_step, flops
from vkd_jax.planner.abstract_step import Lengths
from vkd_jax.runs import inputs, stages, workdir
from vkd_jax.runs.job import Job, check_models, describe_inputs
from vkd_jax.runtime import memory, storage
from vkd_jax.types import Example

CPU_ROWS, ACCELERATOR_ROWS = 1024, 8192  # of the matrices whose product is timed
PRODUCTS = 5
LONGEST = 64  # texts with the most characters, of which the one with the most tokens counts


@dataclasses.dataclass(frozen=True)
class Training:
    """A training of a run: its name, method and settings, the model that it starts from, and what it reads."""

    name: str
    method: Method
    train: TrainConfig
    source: Path
    examples: list[Example]


def describe(config: ml_collections.ConfigDict, path: str | Path, command: str) -> str:
    """Describes a run: its config, its data, and the memory and FLOPs of its training steps.

    Nothing is trained, and nothing is written into `path`. Models are downloaded, and a benchmark is converted in a
    temporary folder, or in `data.cache` if the config gives one.

    Args:
        config: a config of configs/.
        path: the folder that the run would write.
        command: how the program was started.

    Raises:
        UserError: the run would be refused before its first step; the message is the one of the run.
    """
    resolved = RunConfig.from_config_dict(config)
    with memory.exhausted(), storage.write_errors(), tempfile.TemporaryDirectory(prefix="vkd-dry-run-") as folder:
        resumes = workdir.check(path, resolved)
        job = Job.prepare(workdir.Workdir(Path(folder) / "run", resolved, command))
        models = check_models(job)
        described = describe_inputs(resolved, job.sets | job.held_out_set, models)
        if resumes:
            inputs.check(path, described)
        lines = [str(config).rstrip(), "", *_data(job, described), ""]
        for training in _trainings(job, models):
            lines += _step(job, training)
    state = f"{path} has results of this run: it would resume." if resumes else f"{path} has no results of this run."
    return "\n".join([*lines, state, "Nothing was trained or written there: leave out --dry_run to run it."])


def _data(job: Job, described: inputs.Inputs) -> Iterator[str]:
    """A table of the sets, with the number of questions that each model is asked."""
    yield f"{'set':18}{'questions':>10}{'images':>8}{'asked':>8}"
    for name, counts in described["sets"].items():
        asked = len(job.questions.get(name, ()))
        yield f"{name:18}{counts['questions']:>10,}{counts['images']:>8,}{asked or '-':>8}"


def _trainings(job: Job, models: dict[str, Path]) -> Iterator[Training]:
    """The trainings of a run, in order."""
    config = job.config
    examples = [e for name in stages.FINETUNE_SETS for e in job.sets.get(name, ())]
    source = models.get("path") or models.get("base")
    if source is None:
        return  # the run creates the model, which a dry run does not
    for name in config.workflow.finetunes:
        yield Training(f"fine-tuning of {name}", config.finetune.method, config.finetune.train, source, examples)
    if config.workflow.unlearns and job.method.losses():
        examples = [e for stream in ("forget", "retain") for e in job.image_questions(stream)]
        yield Training("unlearning", job.method, config.train, source, examples)


def _step(job: Job, training: Training) -> Iterator[str]:
    """Memory and FLOPs of a training step on the devices of this process.

    Raises:
        UserError: the step does not fit in their memory.
    """
    config = dataclasses.replace(
        job.config,
        method=training.method,
        train=training.train,
        model=dataclasses.replace(job.config.model, path=str(training.source)),
    )
    _, model_config = read_family(training.source)
    if not (hasattr(model_config.vision, "image_size") or config.model.max_pixels):
        yield f"{training.name}: memory is not estimated, because images differ in size; set model.max_pixels."
        return
    step = abstract_step.build(config, job.mesh, _lengths(training, model_config))
    devices = list(job.mesh.devices.flat)
    local = sum(device.process_index == jax.process_index() for device in devices)
    required, limit = memory.program_bytes(step.traced.lower().compile()), memory.device_bytes(devices)
    remedy = "decrease train.batch_size, increase train.microbatches, set model.remat, or shorten the texts"
    memory.check(required * local, limit, "training steps", remedy)
    work = sum(part.total for part in flops.count(step.traced.jaxpr, step.from_batch).values())
    trained = sum(x.size for x in jax.tree.leaves(step.state.params))
    available = f" of {limit / memory.GIB / max(local, 1):,.1f}" if limit else ""
    length = f"{training.train.steps:,} steps" if training.train.steps else f"{training.train.epochs:g} epochs"
    kind = devices[0].device_kind
    used = f"{required / memory.GIB:,.2f}{available} GiB on each of {len(devices)} x {kind}"
    yield from (
        f"{training.name}: {length}, {trained:,} trained parameters",
        f"  memory: {used}, with the longest texts",
        f"  compute: {work:.3g} FLOPs for each step",
        f"  time: {_least_time(work / len(devices), training.train.steps, _product_speed(config.model.dtype))}",
        "",
    )


def _least_time(work: float, steps: int, speed: float) -> str:
    """The time of `work` FLOPs for each step at `speed` FLOPs per second, which no step is faster than."""
    seconds = work / speed
    total = f", {steps * seconds:,.3g} s in all" if steps else ""
    return (
        f"at least {seconds:,.3g} s for each step{total}, at the {speed:.3g} FLOPs per second of a matrix product here"
    )


def _product_speed(dtype: str) -> float:
    """FLOPs per second of one device in a product of two large matrices: the best of several, after compilation."""
    device = jax.local_devices()[0]
    size = CPU_ROWS if device.platform == "cpu" else ACCELERATOR_ROWS
    matrix = jax.device_put(np.ones((size, size), jax.numpy.dtype(dtype)), device)
    product = jax.jit(jax.numpy.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _lengths(training: Training, model_config: Any) -> Lengths:
    """The tokens of the longest question with its answer, but for those of images, and of the longest answer."""
    processor = Processor(training.source, model_config)
    longest = sorted(training.examples, key=lambda e: len(e.question) + len(e.answer))[-LONGEST:]
    encoded = [processor.encode(example.question, example.answer) for example in longest]
    texts = [len(prompt) + len(answer) for prompt, answer in encoded]
    row = f"{longest[int(np.argmax(texts))].label}: the row"
    return Lengths(text=max(texts), answer=max(len(answer) for _, answer in encoded), row=row)
