"""Cached features of forgotten people, which later requests use instead of images.

A run with a section `request` writes two files into the folder features/ of its workdir:

    features.safetensors   hidden [m, p, c], the output of the last vision block that never trains, and target
                           [r, q, d], the output of the projector after the request; the first r images are copies of
                           those that unlearning trained on
    questions.jsonl        the questions with their answers, the size of the image, and, for those that later requests
                           train on, the cross-entropy of the answer after the request

No image and no name of a person is in these files, except for names in questions and answers. An image can be
reconstructed from `hidden` approximately, so the files are personal data: see docs/requests.md.
"""

import dataclasses
import functools
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.schema import RunConfig
from vkd_jax.data import augment
from vkd_jax.data.batching import padded_rows, rng
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import open_image
from vkd_jax.evaluation.cached_features import fit_tokens
from vkd_jax.methods import base, feature_targets, replay
from vkd_jax.methods.scope import frozen_blocks
from vkd_jax.models.base import bind
from vkd_jax.runtime import files, multihost, records
from vkd_jax.types import EvalSet, Example, Role, UserError, person_digest

FOLDER = "features"
FEATURES, QUESTIONS = f"{FOLDER}/features.safetensors", f"{FOLDER}/questions.jsonl"
EVAL_SETS = (
    EvalSet("earlier", Role.FORGET, "people of earlier requests", "earlier"),
    EvalSet("earlier_test", Role.FORGET_HOLDOUT, "people of earlier requests, other images", "earlier test"),
)
TRAINED = "earlier_trained"  # questions that later requests train on


def cached_block(method: Any, paths: Sequence[str], params: Mapping[str, Any], model_config: Any) -> int:
    """The number of the last vision block that neither the method nor its simulated attacker moves.

    Raises:
        UserError: all vision blocks train, or the rest of the model reads more than the output of that block.
    """
    adversary = method.adversary(params, model_config)
    moving = {*method.trainable(paths, model_config), *(adversary.paths if adversary else ())}
    if not (blocks := frozen_blocks(moving, model_config)):
        raise UserError(
            "method.blocks: all vision blocks train, so nothing of earlier people could be cached but their images. "
            f"Give 0 to {model_config.used_blocks - 1}, and train=visual or visual+lora."
        )
    if len(model_config.taps_before(blocks)) > 1:
        raise UserError(
            "requests are not supported for this model, whose language model also reads the outputs of earlier vision "
            f"blocks: {', '.join(model_config.taps_before(blocks))}. Use another family, or a larger method.blocks."
        )
    return blocks - 1


def write(job: Any, model: ModelBundle) -> None:
    """Caches what later requests need of the people whom this run has forgotten.

    Args:
        job: the run, a `runs.job.Job`.
        model: the unlearned model.
    """
    workdir, method = job.workdir, job.method
    if workdir.has(FEATURES) and workdir.has(QUESTIONS):
        return
    tap = f"{replay.HIDDEN}{cached_block(method, list(model.params), model.params, model.config)}"
    trained = model.encode(job.image_questions("forget"))
    augmented = augment.augment_set(trained, method.replay.copies, rng(job.config.seed, "replay"))
    taps = feature_targets.record_taps(model.graphdef, model.params, augmented.images, [tap, replay.TAP])
    ce = np.minimum(_cross_entropy(model, augmented), getattr(method, "cap", np.inf))
    asked = {s.name: _asked(job, s.role) for s in EVAL_SETS}
    images = {e.image_id: e for examples in asked.values() for e in examples}
    hidden, first = [taps[tap].values], len(augmented.images)
    if images:
        shown = model.encode(list(images.values()))
        values = feature_targets.record_taps(model.graphdef, model.params, shown.images, [tap])[tap].values
        length = max(hidden[0].shape[1], values.shape[1])
        hidden = [fit_tokens(list(x), length) for x in (*hidden, values)]
    rows = [
        _row(TRAINED, f"{e.id}#{i}", e, int(image)) | {"ce": float(value)}
        for i, (e, image, value) in enumerate(zip(augmented.examples, augmented.image_rows, ce, strict=True))
    ]
    numbers = {image_id: first + i for i, image_id in enumerate(images)}
    rows += [_row(name, e.id, e, numbers[e.image_id]) for name, examples in asked.items() for e in examples]
    arrays = {"hidden": np.concatenate(hidden), "target": taps[replay.TAP].values}
    block = tap.removeprefix(replay.HIDDEN)
    data = save({name: np.ascontiguousarray(x) for name, x in arrays.items()}, {"block": block})
    multihost.run_on_process_0(lambda: files.write_bytes(workdir.path / FEATURES, data) and None)
    workdir.add_record(FEATURES)
    workdir.write_lines(QUESTIONS, [row | {"block": int(block)} for row in rows])


def _asked(job: Any, role: Role) -> list[Example]:
    """The questions with an image of the benchmark's sets of a role."""
    names = [s.name for s in job.benchmark.EVAL_SETS if s.role is role]
    return [e for name in names for e in job.sets.get(name, ()) if e.image is not None]


def _row(name: str, row_id: str, example: Example, image: int) -> dict[str, Any]:
    fields = {key: value for key, value in example.fields.items() if key not in ("image", "image_id")}
    width, height = open_image(example.image).size
    fields |= {"id": row_id, "person": person_digest(example.person)}
    return {"set": name, "image": image, "size": [width, height], "example": fields}


def _cross_entropy(model: ModelBundle, encoded: EncodedSet, batch_size: int = 32) -> np.ndarray:
    """The cross-entropy of each row's answer, in nats per token: float32 [n]."""

    @jax.jit
    def compute(params, batch):
        return base.cross_entropy(bind(model.graphdef, params), batch)

    rows = padded_rows(len(encoded), batch_size)
    return np.concatenate([multihost.gather(compute(model.params, encoded.batch(x))) for x in rows])[: len(encoded)]


def read_questions(folders: Iterable[str]) -> dict[str, list[Example]]:
    """The questions about the people of earlier requests, by set; in place of each image is a black one of its size.

    Args:
        folders: the folders features/ of these requests.

    Raises:
        UserError: a file is missing or damaged.
    """
    sets: dict[str, list[Example]] = {s.name: [] for s in EVAL_SETS}
    for name, example, _ in _questions(folders):
        if name in sets:
            sets[name].append(example)
    return {name: examples for name, examples in sets.items() if examples}


def _questions(folders: Iterable[str]) -> Iterator[tuple[str, Example, dict[str, Any]]]:
    """(set, question, line) of each line of questions.jsonl; equal images of one folder are one object."""
    for folder in map(Path, folders):
        digest, blank = _digest(folder), functools.cache(_blank)
        for line in records.read_lines(folder.parent, QUESTIONS):
            try:
                fields = {key: tuple(x) if isinstance(x, list) else x for key, x in line["example"].items()}
                image_id = f"{digest}/{line['image']}"
                fields |= {"id": f"{digest}/{fields['id']}"}
                example = Example(**fields, image=blank(line["image"], *line["size"]), image_id=image_id)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UserError(f"{folder.parent / QUESTIONS} was not written by this version of vkd_jax.") from error
            yield line["set"], example, line


def _digest(folder: Path) -> str:
    """The first digits of the SHA-256 of the features, which names of images and questions begin with."""
    records.check(folder.parent, FEATURES)
    entries = records.read_or(folder.parent / records.FILE, {}, "")
    return entries[FEATURES]["sha256"][:16]


def _blank(number: int, width: int, height: int) -> bytes:
    """A black image as PNG; a bytes object of its own for each number."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "png", compress_level=1)
    return stream.getvalue()


@dataclasses.dataclass(frozen=True)
class CachedFeatures:
    """The cached features of the people of earlier requests.

    Attributes:
        block: the vision block whose output is cached; -1 without features.
        hidden: that output, [p, c] for each image, by the name of the image.
        targets: the output of the projector after the person's request, [q, d] for each image that is trained on.
        trained: the questions that are trained on.
        cross_entropy: of the answers of these questions after the person's request, in nats per token.
    """

    block: int = -1
    hidden: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    trained: Sequence[Example] = ()
    cross_entropy: Sequence[float] = ()

    @classmethod
    def read(cls, config: RunConfig) -> "CachedFeatures":
        """Reads the features that a config names; none without a section `request`.

        Raises:
            UserError: a file is missing or damaged, or requests were cached at different blocks.
        """
        hidden, targets, trained, ce, blocks = {}, {}, [], [], {}
        for folder in config.request.features if config.request else ():
            try:
                arrays, digest = load_file(Path(folder).parent / FEATURES), _digest(Path(folder))
                hidden |= {f"{digest}/{i}": x for i, x in enumerate(arrays["hidden"])}
                targets |= {f"{digest}/{i}": x for i, x in enumerate(arrays["target"])}
            except (SafetensorError, KeyError, OSError) as error:
                file = Path(folder).parent / FEATURES
                raise UserError(f"{file} cannot be read ({error}); {records.AGAIN}.") from error
            for name, example, line in _questions([folder]):
                blocks.setdefault(line["block"], folder)
                if name == TRAINED:
                    trained.append(example)
                    ce.append(line["ce"])
        if len(blocks) > 1:
            raise UserError(
                f"method.blocks differs between requests: features are cached at the vision blocks {sorted(blocks)}. "
                "Keep one value for all requests of a ledger."
            )
        return cls(next(iter(blocks), -1), hidden, targets, trained, ce)

    def encoded(self, model: ModelBundle, buckets: int) -> EncodedSet:
        """The training set of the stream `replay.STREAM`, with all that its loss reads."""
        encoded = model.encode(self.trained, buckets)
        shapes = base.tap_shapes(base.Context(model.graphdef, model.params, None, model.config, {}, seed=0), encoded)
        names = list(dict.fromkeys(e.image_id for e in encoded.examples))  # in the order of `encoded.images`
        tap = f"{replay.HIDDEN}{self.block}"
        target = fit_tokens([self.targets[name] for name in names], shapes[replay.TAP].values.shape[1])
        scale = np.array([np.mean(np.square(self.targets[name], dtype=np.float32)) for name in names], np.float32)
        values = {"target": target, "scale": scale, "ce": np.array(self.cross_entropy, np.float32)}
        encoded = base.with_cache(encoded, replay.cache_spec(shapes), values)
        hidden = fit_tokens([self.hidden[name] for name in names], shapes[tap].values.shape[1])
        return dataclasses.replace(encoded, per_image={**encoded.per_image, tap: hidden})
