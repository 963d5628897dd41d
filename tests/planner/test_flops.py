"""FLOPs of a step, by part and by pass, against values worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from planned import build_step

from vkd_jax.methods.worst_case import WorstCase
from vkd_jax.models.base import SCOPES
from vkd_jax.planner import flops, plan
from vkd_jax.planner.tpu_specs import TPUS
from vkd_jax.training.step import ATTACK, TEACHER

# The tiny language model, for one row of 16 tokens, five of them answers: products with weights in a block, and in the
# last block without rematerialization, which computes keys and values of all tokens and the rest at the answers only.
BLOCK = 2 * 16 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40)
LAST = 2 * 16 * (2 * 24 * 12) + 2 * 5 * (2 * 24 * 24 + 3 * 24 * 40)
DOWN = 2 * 16 * 24 * 40  # the last product of the MLP, whose output the backward pass does not need
ATTENTION = 4 * 16 * 16 * 24  # of a block
LAST_ATTENTION = 4 * 16 * 5 * 24
# Its vision tower: five patch slots (a class token and 2 x 2 patches), two of three blocks feed the projector.
PATCHES = 2 * 4 * (8 * 8 * 3 * 16)
VISION_BLOCK = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32)
VISION_ATTENTION = 4 * 5 * 5 * 16
PROJECTOR = 2 * 4 * (16 * 24 + 24 * 24)  # four image tokens
HEAD = 2 * 5 * 24 * 400
ROWS = 5


def count(step):
    return flops.count(step.traced.jaxpr, step.from_batch)


def counted(function, *inputs, from_batch):
    return flops.count(jax.make_jaxpr(function)(*inputs), from_batch)


def test_a_tiny_llava_by_hand(config):
    counts = count(build_step(config))
    vision = counts["vision_tower"]
    assert vision.forward == ROWS * (PATCHES + VISION_BLOCK + VISION_ATTENTION)
    assert vision.weight_gradients == ROWS * (PATCHES + VISION_BLOCK)
    assert vision.backward == ROWS * (VISION_BLOCK + 2 * VISION_ATTENTION)  # pixels have no gradient
    assert counts["projector"] == flops.Work(ROWS * PROJECTOR, ROWS * PROJECTOR, ROWS * PROJECTOR)
    text = counts["language_model"]
    assert text.forward == ROWS * (BLOCK + LAST + ATTENTION + LAST_ATTENTION)
    assert text.backward == ROWS * (BLOCK + LAST + 2 * (ATTENTION + LAST_ATTENTION))
    assert text.weight_gradients == text.recomputed == 0  # frozen
    assert counts["head"] == flops.Work(forward=ROWS * HEAD, backward=ROWS * HEAD)


def test_training_all_weights_by_hand(config):
    counts = count(build_step(config, "grad_diff", train="all"))
    assert counts["language_model"].weight_gradients == ROWS * (BLOCK + LAST)
    assert counts["vision_tower"].weight_gradients == ROWS * (PATCHES + VISION_BLOCK)
    assert counts["head"].weight_gradients == ROWS * HEAD


@pytest.mark.parametrize(
    ("remat", "recomputed"),
    [("", 0), ("dots", ATTENTION), ("full", 2 * (BLOCK - DOWN + ATTENTION))],  # of two blocks
)
def test_rematerialization_by_hand(config, remat, recomputed):
    config.model.remat = remat
    counts = count(build_step(config))
    assert counts["language_model"].recomputed == ROWS * recomputed
    assert sum(work.recomputed for work in counts.values()) >= ROWS * recomputed


@pytest.mark.parametrize("remat", ["", "full", pytest.param("dots", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "fields"),
    [("vkd", dict(blocks=1)), ("vkd", dict(blocks=0)), ("grad_diff", dict(train="lora", lora_rank=2)), ("rmu", {})],
)
def test_every_product_has_a_part(config, name, fields, remat):
    config.model.remat = remat
    assert set(count(build_step(config, name, **fields))) <= {*SCOPES, TEACHER}


@pytest.mark.parametrize("train", ["visual", "all"])
def test_every_product_of_qwen_has_a_part(get_config, family_folder, train):
    config = get_config("qwen2_vl.py")
    config.model.update(
        path=str(family_folder("qwen2_vl")), base="", remat="full", dtype="float32", quantize="", max_pixels=56 * 56
    )
    config.train.batch_size.update(forget=2, retain=2)
    counts = count(build_step(config, "grad_diff", quantized=False, train=train))
    assert set(counts) == set(SCOPES)
    assert (counts["language_model"].weight_gradients > 0) == (train == "all")


def test_products_of_integers_by_hand(config):
    """Forward and backward products of the blocks, and those that are computed again."""
    for remat in ("", "dots", "full"):
        config.model.update(quantize="w8a8", remat=remat)
        step = build_step(config)
        counts = count(step)
        both = 2 * BLOCK if remat else BLOCK + LAST
        again = 2 * (BLOCK - DOWN) if remat == "full" else 0
        assert counts["language_model"].integers == ROWS * (2 * both + again)
        assert sum(work.integers for work in counts.values()) == counts["language_model"].integers
    tpu, total = TPUS["v5e"], sum(work.total for work in counts.values())
    integers = counts["language_model"].integers
    seconds = plan.figures(step, tpu)["seconds"]["compute"]
    assert seconds == pytest.approx((total - integers) / 197e12 + integers / 394e12)


def test_a_teacher_is_a_part_of_its_own(config):
    """Its forward pass for the three retain rows, of which the products of its two blocks are of integers."""
    config.model.update(quantize="w8a8", remat="")
    counts = count(build_step(config, "kl", train="visual"))
    visual = PATCHES + VISION_BLOCK + VISION_ATTENTION + PROJECTOR
    language = BLOCK + LAST + ATTENTION + LAST_ATTENTION + HEAD
    assert counts[TEACHER] == flops.Work(forward=3 * (visual + language), integers=3 * (BLOCK + LAST))


def test_worst_case_forgetting_adds_its_attack_and_a_second_pass_over_the_forget_rows(config):
    """The attack has three forward and backward passes over the two forget rows; the retain rows have no more work."""
    plain = count(build_step(config, "grad_diff", train="visual"))
    worst = count(build_step(config, "grad_diff", train="visual", worst_case=WorstCase(radius=1e-3, steps=3)))
    visual = PATCHES + VISION_BLOCK + VISION_ATTENTION + PROJECTOR
    language = BLOCK + LAST + ATTENTION + LAST_ATTENTION + HEAD
    assert worst[ATTACK].forward == 3 * 2 * (visual + language)
    forget_row = sum(work.total for work in plain.values()) / ROWS
    assert worst[ATTACK].total == pytest.approx(3 * 2 * forget_row)
    assert sum(worst[name].total for name in plain) == pytest.approx((ROWS + 2) * forget_row)


# ---- Jaxprs by hand ----


def test_loop_bodies_are_multiplied_by_their_trip_count():
    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    assert counted(loop, jnp.ones((3, 3)), from_batch=[True])[flops.OTHER].total == 7 * 2 * 27


def test_a_loop_carries_what_depends_on_the_batch():
    """The product of the carried value becomes a weight gradient once the batch has entered the loop."""

    def loop(weight, x):
        def body(carry, _):
            with jax.named_scope("transpose(head)"):
                return (x, carry[0] @ x), None

        return jax.lax.scan(body, (weight, weight), length=2)[0]

    assert counted(loop, jnp.ones((3, 3)), jnp.ones((3, 3)), from_batch=[False, True]) == {
        "head": flops.Work(weight_gradients=2 * 2 * 27)
    }


def test_branches_take_the_inputs_behind_their_index():
    def branch(index, weight, x):
        with jax.named_scope("transpose(head)"):
            return jax.lax.cond(index > 0, lambda w, x: w @ x, lambda w, x: w + x, weight, x)

    shapes = jnp.ones((3, 3)), jnp.ones((3, 3))
    assert counted(branch, 1, *shapes, from_batch=[True, False, True]) == {"head": flops.Work(backward=2 * 27)}
