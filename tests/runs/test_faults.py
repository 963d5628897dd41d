"""Faults that were seen in other implementations, each with the tests that fail when it is put in here.

1. Mask keys that never match the parameters, so that the mask does nothing:
    methods/test_saliency.py::test_the_mask_has_exactly_the_keys_of_the_weights
    runs/test_faults.py::test_a_mask_of_other_keys_is_refused
2. "Frozen" towers that are not, since a string was compared with a boolean:
    methods/test_methods.py::test_the_visual_scope_contains_no_weight_of_the_language_model
    training/test_loop.py::test_vkd_changes_neither_the_language_model_nor_the_unused_block
    methods/test_baselines.py::test_training_changes_the_trainable_weights_and_no_others
    runs/test_faults.py::test_what_trains_is_a_name_and_no_truth_value
3. Labels that keep prompt or image tokens in the loss:
    data/test_processor.py::test_targets_are_the_answer_and_the_end_token
    methods/test_losses.py::test_answer_cross_entropy_counts_answer_tokens_only
4. Distillation applied to the wrong set:
    methods/test_methods.py::test_forget_targets_are_the_features_of_retain_images
    methods/test_methods.py::test_cached_targets_equal_the_features_of_the_teacher
5. NPO on a batch-mean loss:
    methods/test_baselines.py::test_npo_averages_over_rows_after_the_loss
    runs/test_faults.py::test_npo_of_vkd_is_taken_of_each_row
6. Perturbed losses averaged over the whole set instead of per item:
    evaluation/test_evaluate.py::test_truth_ratios_are_per_item
7. Captions generated without pixel values:
    evaluation/test_inference.py::test_generated_answers_depend_on_the_pixels
8. ROUGE of the wrong answers, because a loop reused a variable:
    evaluation/test_evaluate.py::test_open_answers_are_compared_with_their_true_answer
    evaluation/test_evaluate.py::test_each_prediction_is_judged_by_its_own_answer
9. A forget step's exceptions swallowed:
    runs/test_faults.py::test_what_fails_in_a_step_stops_the_run
    runs/test_faults.py::test_nothing_around_a_step_catches_everything
    training/test_stopping.py::test_a_loss_that_is_not_finite_stops_training_at_its_step
10. A learning-rate schedule stepped once per run:
    training/test_optimizer.py::test_the_learning_rate_of_each_step_equals_the_value_by_hand
    training/test_loop.py::test_the_learning_rate_follows_the_step
11. Max length 384 cutting LLaVA's 576 image tokens:
    data/test_processor.py::test_a_row_that_is_too_long_is_refused_and_never_truncated
    runs/test_faults.py::test_all_576_image_tokens_of_llava_fit
12. Few-shot prompts that make LLaVA emit garbage:
    runs/test_faults.py::test_no_config_shows_worked_examples_unless_asked
    evaluation/test_inference.py::test_a_worked_example_is_an_earlier_turn_of_the_conversation
13. A target model that had barely learned the people, so that nothing was there to forget:
    runs/test_pipeline.py::test_results_hold_both_models_with_counts
    runs/test_finetuning.py::test_one_command_goes_from_the_base_to_the_report
    reporting/test_report.py::test_report_compares_with_a_retain_only_model
"""

import ast
import dataclasses
import io
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vkd_jax import methods, registry
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config import defaults
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.processor import Processor, create_processor
from vkd_jax.methods import base, losses
from vkd_jax.methods.null_space import NullSpace
from vkd_jax.methods.vkd import VKD
from vkd_jax.models import llava
from vkd_jax.models.base import bind, split_model
from vkd_jax.runtime.mesh import make_mesh, replicated
from vkd_jax.training import loop, optimizer
from vkd_jax.types import Example, UserError

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "vkd_jax"
GUARD = re.compile(r"(\w+/test_\w+\.py)::(test_\w+)")


def test_every_fault_has_a_guard_and_every_guard_exists():
    faults = re.split(r"^\d+\. ", __doc__, flags=re.MULTILINE)[1:]
    assert len(faults) == 13
    for fault in faults:
        guards = GUARD.findall(fault)
        assert guards and len(guards) == fault.count("::"), fault
        for file, name in guards:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_a_mask_of_other_keys_is_refused():
    """One that was looked up by name, with all of a weight where there is none, would do nothing."""
    params = {"visual/kernel": jnp.ones((2, 2)), "visual/bias": jnp.ones(2)}
    mask = {path: jnp.zeros(value.shape, bool) for path, value in params.items()}
    wrong = {f"params/{path}": value for path, value in mask.items()}
    fewer = {"visual/kernel": mask["visual/kernel"]}
    tx = optimizer.mask_updates()
    updates, _ = tx.update(params, tx.init(params), mask=mask)
    assert not any(np.any(value) for value in updates.values())
    for other in (wrong, fewer):
        with pytest.raises(ValueError, match=r"[Kk]ey"):
            tx.update(params, tx.init(params), mask=other)


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_what_trains_is_a_name_and_no_truth_value(name, tiny_model):
    """And whatever is called visual leaves the language model out."""
    for train_ in (True, False, "True", "False", "", None, 1):
        with pytest.raises(UserError, match=r"method\.train: .* is not allowed\. Give one of all, visual, lora"):
            methods.create(name, {"train": train_})
    paths = methods.create(name, {"train": "visual"}).trainable(tiny_model.params, tiny_model.config)
    assert paths and not [path for path in paths if path.startswith("language_model/")]


def test_npo_of_vkd_is_taken_of_each_row(tiny_model):
    """At the reference both are one number, so the rows stand at different distances from it."""
    answers = ("baker", "the pilot of an aeroplane", "nurse")
    batch = tiny_model.encode([Example(str(i), "", None, "", "Who?", x) for i, x in enumerate(answers)]).batch(
        np.arange(3)
    )
    gaps = np.array([-9.0, 0.0, 4.0], np.float32)  # log p - log p_ref
    method = VKD(forget="npo", beta=0.4, target="none", weight_forget_distill=0.0, mask_scope="none")

    @jax.jit
    def loss(params):
        model = bind(tiny_model.graphdef, params)
        log_prob = losses.sequence_log_prob(base.answer_logits(model, batch)[0], batch.targets, batch.target_mask)
        shifted = dataclasses.replace(batch, cached={"reference": log_prob - gaps})
        return method.losses()["forget"](model, shifted)[0]

    by_row = np.mean(2 / 0.4 * np.log1p(np.exp(0.4 * gaps)))
    of_mean = 2 / 0.4 * np.log1p(np.exp(0.4 * gaps.mean()))
    assert abs(by_row - of_mean) > 0.5
    np.testing.assert_allclose(loss(tiny_model.params), by_row, rtol=1e-4)


# A step that fails.


class Line(nnx.Module):
    """y = w x."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones((1, 1)))


@dataclasses.dataclass(frozen=True)
class Broken:
    """A method whose forget loss cannot be computed; the retain loss can."""

    mask_scope: str = "none"
    breaks: bool = True
    cache_bytes: int = 0
    null_space: NullSpace = NullSpace()

    def trainable(self, paths, model_config):
        return list(paths)

    def teachers(self):
        return {}

    def adversary(self, params, model_config):
        return None

    def losses(self):
        def forget(model, batch):
            if self.breaks:
                raise RuntimeError("the forget loss is broken")
            return retain(model, batch)

        def retain(model, batch):
            return jnp.mean(batch.tokens * model.w[0, 0]), {}

        return {"forget": forget, "retain": retain}


class BrokenSet(EncodedSet):
    """Rows that cannot be read from the fourth batch on."""

    def batch(self, rows):
        if 3 in rows:
            raise OSError("the picture of row 3 cannot be read")
        return super().batch(rows)


def line_set(kind=EncodedSet):
    numbers = np.arange(4, dtype=np.int32)[:, None]
    return kind(
        examples=range(4), tokens=numbers, mask=numbers >= 0, target_positions=numbers, targets=numbers,
        target_mask=numbers >= 0, prompt_length=numbers[:, 0], image_rows=numbers[:, 0] - 9, images=None,
    )  # fmt: skip


@pytest.mark.parametrize("failure", ["loss", "data", "none"])
def test_what_fails_in_a_step_stops_the_run(failure):
    """Any exception, in the loss or in the data: training never continues on the retain set alone."""
    graphdef, params = split_model(Line())
    config = TrainConfig(steps=8, batch_size=dict(forget=1, retain=1))

    def fit():
        return loop.fit(
            ModelBundle(
                graphdef,
                jax.device_put(params, replicated(make_mesh())),
                types.SimpleNamespace(used_blocks=0),
                None,
                make_mesh(),
            ),
            Broken(breaks=failure == "loss"),
            base.Prepared({"forget": line_set(BrokenSet if failure == "data" else EncodedSet), "retain": line_set()}),
            config,
            seed=0,
            folder=None,
        )

    if failure == "none":
        assert fit()["w"] != params["w"]
        return
    error, message = (RuntimeError, "broken") if failure == "loss" else (OSError, "row 3")
    with pytest.raises(error, match=message):
        fit()


# Experiment trackers raise errors of any type, and a training goes on without them.
TOLERANT = {"metric_writer.py": 1}


def test_nothing_around_a_step_catches_everything():
    files = [PACKAGE / "data" / "sampler.py"]
    for room in ("training", "methods"):
        files += (PACKAGE / room).glob("*.py")
    assert len(files) > 15
    for file in files:
        tolerated = TOLERANT.get(file.name, 0)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = "everything" if node.type is None else ast.unparse(node.type)
                tolerated -= bool(re.search(r"everything|\b(Base)?Exception\b", caught))
                assert tolerated >= 0, f"{file.name}:{node.lineno}"
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not called.endswith("suppress"), f"{file.name}:{node.lineno}"


# LLaVA's prompts.


def test_all_576_image_tokens_of_llava_fit(tiny_model, tiny_config, tmp_path):
    """336 pixels in patches of 14 are 24 x 24 tokens, which a length of 384 would cut, and the answer behind them."""
    for _, fields in llava.PRESETS.values():
        assert fields["text_config"]["max_position_embeddings"] == 4096
    question, answer = "What does this person do?", "she is a baker"
    create_processor(tmp_path / "llava", [question, answer], vocab_size=400, image_size=336, patch_size=14)
    vision = dataclasses.replace(tiny_config.vision, image_size=336, patch_size=14)
    config = dataclasses.replace(
        tiny_config, vision=vision, text=dataclasses.replace(tiny_config.text, max_positions=4096)
    )
    processor = Processor(tmp_path / "llava", config)
    model = dataclasses.replace(tiny_model, config=config, processor=processor)
    picture = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 30, 40)).save(picture, "PNG")
    encoded = model.encode([Example("0", "", picture.getvalue(), "p", question, answer)])
    assert (encoded.tokens == processor.image_token_id).sum() == 576 == config.image_tokens(336, 336)
    tokens = encoded.tokens[0, encoded.prompt_length[0] : encoded.mask[0].sum()]
    assert processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer
    np.testing.assert_array_equal(encoded.targets[0][encoded.target_mask[0]], tokens)
    short = dataclasses.replace(model, config=dataclasses.replace(config, text=tiny_config.text))
    with pytest.raises(UserError, match=r"row 0 \(.*\) has \d+ tokens, but the model takes at most 128: shorten or"):
        short.encode(encoded.examples)


def test_no_config_shows_worked_examples_unless_asked(get_config):
    assert defaults.base().eval.shots == 0
    for file in sorted((TESTS.parent / "configs").glob("*.py")):
        if file.name != "plans.py":  # which asks nobody
            assert get_config(file.name).eval.shots == 0, file.name
