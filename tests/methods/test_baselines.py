"""The methods that VKD is compared with: values worked by hand, identities, and the weights that each one changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vkd_jax import methods, registry
from vkd_jax.checkpoints import hf
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.training import TrainConfig
from vkd_jax.methods import base, losses, saliency
from vkd_jax.methods.grad_ascent import GradAscent
from vkd_jax.methods.grad_diff import GradDiff
from vkd_jax.methods.idk import IDK, REFUSALS
from vkd_jax.methods.kl import KL
from vkd_jax.methods.mmunlearner import MMUnlearner
from vkd_jax.methods.npo import NPO
from vkd_jax.methods.rmu import RMU, median_norm
from vkd_jax.models import lora, quantize
from vkd_jax.models.base import bind
from vkd_jax.runtime.mesh import make_mesh, replicated
from vkd_jax.training import loop
from vkd_jax.types import UserError

ROWS = np.array([0, 1, 4])
CAP = 9.0  # above the cross-entropy of a model with random weights
BLOCKS = "language_model/blocks/"


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    """Five questions with an image and four text-only ones of each set, and a model with one vision block in use."""
    config = dataclasses.replace(tiny_model.config, vision=dataclasses.replace(tiny_model.config.vision, layers=2))
    graphdef, params = hf.init_params(config, 0)
    sharding = replicated(make_mesh())
    params = {path: jax.device_put(x, sharding) for path, x in params.items()}
    sets = {}
    for name, whole in tiny_sets.items():
        sets[name] = tiny_model.encode(whole.examples[:5])
        text_only = [dataclasses.replace(e, image=None, image_id="") for e in whole.examples[5:9]]
        sets[f"{name}_text"] = tiny_model.encode(text_only)
    return base.Context(graphdef, params, None, config, sets, seed=0, encode=tiny_model.encode)


@pytest.fixture(scope="module")
def adapted(context):
    """The context with adapters in the model."""
    params = lora.attach(context.params, rank=2, alpha=2.0, dropout=0.1, seed=0, sharding=replicated(make_mesh()))
    return dataclasses.replace(context, params=params)


def batch_of(context, method, prepared, stream, rows=ROWS):
    """A batch as a step reads it, with the outputs of the teacher."""
    batch, teachers = prepared.sets[stream].batch(rows), method.teachers()
    if stream not in teachers:
        return batch
    teach = jax.jit(lambda params, batch: teachers[stream](bind(context.graphdef, params), batch))
    return dataclasses.replace(batch, cached={**batch.cached, **teach(context.params, batch)})


def loss_of(context, method, stream, prepared, batch):
    batch = batch_of(context, method, prepared or method.prepare(context), stream) if batch is None else batch
    paths = method.trainable(context.params, context.model_config)

    def loss(trainable):
        return method.losses()[stream](bind(context.graphdef, {**context.params, **trainable}), batch)[0]

    return loss, {path: context.params[path] for path in paths}


def value(context, method, stream, prepared=None, batch=None):
    """The loss."""
    loss, trainable = loss_of(context, method, stream, prepared, batch)
    return jax.jit(loss)(trainable)


def gradients(context, method, stream, prepared=None, batch=None):
    """The loss and its gradients with respect to the trainable weights."""
    loss, trainable = loss_of(context, method, stream, prepared, batch)
    return jax.jit(jax.value_and_grad(loss))(trainable)


def assert_same(a, b, rtol=1e-5, atol=1e-7):
    np.testing.assert_allclose(a[0], b[0], rtol=rtol)
    assert a[1].keys() == b[1].keys()
    for path in a[1]:
        np.testing.assert_allclose(a[1][path], b[1][path], rtol=rtol, atol=atol, err_msg=path)


# Gradient ascent.


def test_gradient_ascent_equals_the_forget_loss_of_gradient_difference(context):
    ascent, difference = GradAscent(cap=CAP), GradDiff(cap=CAP)
    assert list(ascent.losses()) == ["forget"]
    result = gradients(context, ascent, "forget")
    assert any(np.any(g) for g in result[1].values())
    assert_same(result, gradients(context, difference, "forget"), rtol=0, atol=0)


def test_ascent_stops_at_the_cap_and_is_unbounded_with_an_infinite_cap(context):
    stopped, grads = gradients(context, GradAscent(cap=0.5, train="visual"), "forget")
    assert stopped == -0.5 and not any(np.any(g) for g in grads.values())
    unbounded = value(context, GradAscent(cap=float("inf")), "forget")
    ce = -value(context, GradDiff(weight_forget=2.0, cap=CAP), "forget") / 2
    assert 1 < ce < CAP
    np.testing.assert_allclose(unbounded, -ce, rtol=1e-6)


# KL minimization.


def test_kl_and_its_gradient_are_zero_at_the_vanilla_model(context):
    kl, grads = gradients(context, KL(weight_retain=0.0), "retain")
    np.testing.assert_allclose(kl, 0.0, atol=1e-6)
    assert max(float(jnp.abs(g).max()) for g in grads.values()) < 1e-5


def test_kl_away_from_the_vanilla_model_equals_the_value_by_hand(context):
    method = KL(weight_retain=2.0, weight_kl=3.0)
    prepared = method.prepare(context)
    batch = batch_of(context, method, prepared, "retain")
    path = "language_model/head/kernel"
    moved = dataclasses.replace(context, params={**context.params, path: context.params[path] * 9})
    logits_of = jax.jit(lambda params: base.answer_logits(bind(context.graphdef, params), batch)[0])
    logits, vanilla = logits_of(moved.params), logits_of(context.params)
    p, log_q = jax.nn.softmax(vanilla), jax.nn.log_softmax(logits)
    each = (p * (jnp.log(p) - log_q)).sum(-1)
    kl = np.mean([np.mean(row[mask]) for row, mask in zip(np.asarray(each), batch.target_mask, strict=True)])
    ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask).mean()
    assert kl > 0.01
    np.testing.assert_allclose(value(moved, method, "retain", batch=batch), 2 * ce + 3 * kl, rtol=1e-4)


@pytest.mark.parametrize("stream", ["forget", "retain"])
def test_kl_with_weight_kl_0_equals_gradient_difference(context, stream):
    fields = dict(weight_forget=0.5, weight_retain=2.0, cap=CAP)
    plain = KL(weight_kl=0.0, **fields)
    assert not plain.teachers()
    assert value(context, plain, stream) == value(context, GradDiff(**fields), stream)


# NPO.


def test_npo_at_the_reference_is_ascent_on_the_sequence_log_probability(context):
    method = NPO(beta=0.4)
    prepared = method.prepare(context)
    result = gradients(context, method, "forget", prepared)
    np.testing.assert_allclose(result[0], 2 / 0.4 * np.log(2), rtol=1e-5)
    batch = prepared.sets["forget"].batch(ROWS)

    def log_prob(trainable):
        logits, _ = base.answer_logits(bind(context.graphdef, {**context.params, **trainable}), batch)
        return jnp.mean(losses.sequence_log_prob(logits, batch.targets, batch.target_mask))

    want = jax.jit(jax.grad(log_prob))({path: context.params[path] for path in result[1]})
    assert_same(result, (result[0], want), rtol=1e-4)


def test_npo_averages_over_rows_after_the_loss(context):
    method = NPO(beta=0.4, train="visual", weight_forget=3.0)
    prepared = method.prepare(context)
    batch = prepared.sets["forget"].batch(ROWS)
    gaps = np.array([-9.0, 0.0, 4.0], np.float32)  # log p - log p_ref
    batch = dataclasses.replace(batch, cached={"reference": batch.cached["reference"] - gaps})
    by_row = np.mean(2 / 0.4 * np.log1p(np.exp(0.4 * gaps)))
    of_mean = 2 / 0.4 * np.log1p(np.exp(0.4 * gaps.mean()))
    assert abs(by_row - of_mean) > 0.5
    np.testing.assert_allclose(value(context, method, "forget", batch=batch), 3 * by_row, rtol=1e-4)


# Refusals.


def test_refusals_are_the_only_targets_and_questions_and_images_stay(context, tiny_model):
    prepared, forget = IDK().prepare(context), context.sets["forget"]
    refused, tokenizer = prepared.sets["forget"], tiny_model.processor.tokenizer
    assert prepared.sets["retain"] is context.sets["retain"]
    for row, example in enumerate(forget.examples):
        count, prompt = refused.target_mask[row].sum(), refused.prompt_length[row]
        targets = refused.targets[row, :count]
        answer = tokenizer.decode(targets[:-1]).strip()
        assert answer in REFUSALS and answer != example.answer and targets[-1] == tokenizer.eos_token_id
        assert prompt == forget.prompt_length[row]
        np.testing.assert_array_equal(refused.tokens[row, :prompt], forget.tokens[row, :prompt])
        # Each target is the token after its position, and the first position is the last token of the prompt.
        positions = refused.target_positions[row, :count]
        np.testing.assert_array_equal(positions, prompt - 1 + np.arange(count))
        np.testing.assert_array_equal(refused.tokens[row, positions + 1], targets)
        assert refused.mask[row].sum() == prompt + count
        assert tiny_model.processor.image_token_id not in targets
    a, b = refused.batch(ROWS), forget.batch(ROWS)
    jax.tree.map(np.testing.assert_array_equal, a.images, b.images)


def test_the_seed_determines_the_refusals(context):
    def drawn(seed):
        refused = IDK().prepare(dataclasses.replace(context, seed=seed)).sets["forget"]
        return [e.answer for e in refused.examples]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(REFUSALS)) == 12 and len(set(drawn(0))) > 1


def test_idk_descends_on_both_streams(context):
    prepared = IDK().prepare(context)
    refusals = base.Prepared({"retain": prepared.sets["forget"]})
    plain = GradDiff(weight_retain=2.0)
    fields = dict(weight_forget=2.0, weight_retain=2.0)
    assert value(context, IDK(**fields), "forget", prepared) == value(context, plain, "retain", refusals)
    assert value(context, IDK(**fields), "retain", prepared) == value(context, plain, "retain", prepared)


# Hidden states, and RMU.


@functools.partial(jax.jit, static_argnums=0)
def all_hidden(graphdef, params, key, batch):
    """The hidden states after block 1 and after block 2, computed block by block."""
    model = bind(graphdef, params, key)
    features = model.encode(batch.images)[0]
    x, positions, *_ = model.embed(batch.tokens, batch.mask, features)
    allowed = batch.mask[:, None, :] & jnp.tri(x.shape[1], dtype=bool)
    turned = model.language_model._rotary_tables(positions, x.shape[1])
    outputs = []
    for i in range(2):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], model.language_model.blocks)
        x, _ = block(x, turned, allowed, None, None)
        outputs.append(x)
    return outputs


def quantized(context):
    how = quantize.parse("int8")
    return {path: quantize.quantize_param(path, x, how) for path, x in context.params.items()}


def tuned(params):
    """Adapters as after training: B is not zero."""
    attached = lora.attach(params, rank=2, alpha=2.0, dropout=0.1, seed=0)
    return {path: x + 0.1 if path.endswith("/lora_b") else x for path, x in attached.items()}


@pytest.mark.parametrize("kind", ["plain", "int8 with adapters"])
def test_hidden_states_are_the_output_of_the_first_blocks(context, kind):
    params, key = (context.params, None) if kind == "plain" else (tuned(quantized(context)), jax.random.key(0))
    batch = context.sets["forget"].batch(ROWS)
    want = all_hidden(context.graphdef, params, key, batch)
    of_first = jax.jit(lambda n: base.hidden_states(bind(context.graphdef, params, key), batch, n), static_argnums=0)
    for layers in (1, 2):
        np.testing.assert_allclose(of_first(layers), want[layers - 1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(want[0], want[1], atol=1e-2)


@pytest.mark.parametrize(
    "model_type", ["gemma3", "qwen3_vl", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen2_vl", "qwen2_5_vl"))]
)
def test_the_head_turns_hidden_states_into_its_logits(family_folder, tiny_sets, model_type):
    model = ModelBundle.load_for(RMU(), family_folder(model_type), seed=0, dtype="float32", mesh=make_mesh())
    batch = model.encode(tiny_sets["forget"].examples[:2]).batch(np.arange(2))

    @jax.jit
    def both(params):
        bound = bind(model.graphdef, params)
        decoder = bound.language_model
        logits = decoder.logits(decoder.norm(base.hidden_states(bound, batch, model.config.text.layers)))
        return jnp.take_along_axis(logits, batch.target_positions[..., None], 1), base.answer_logits(bound, batch)[0]

    got, want = both(model.params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_forget_loss_of_rmu_equals_the_value_by_hand(context):
    method = RMU(layer=1, steering_coefficient=3.0)
    prepared = method.prepare(context)
    encoded = context.sets["forget"]
    hidden = np.asarray(all_hidden(context.graphdef, context.params, None, encoded.batch(np.arange(5)))[0])
    lengths = np.linalg.norm(hidden, axis=-1)[encoded.mask]
    np.testing.assert_allclose(median_norm(context, 1, batch_size=2), np.median(lengths), rtol=1e-5)
    target = prepared.sets["forget"].batch(ROWS).cached["target"]
    np.testing.assert_allclose(np.linalg.norm(target, axis=-1), 3 * np.median(lengths), rtol=1e-5)
    assert (target == target[0]).all() and (target >= 0).all()
    squares = np.square(hidden[ROWS] - target[:, None]).mean(-1)
    want = np.mean([row[mask].mean() for row, mask in zip(squares, encoded.mask[ROWS], strict=True)])
    loss, grads = gradients(context, method, "forget", prepared)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for path, gradient in grads.items():  # weights before the output of the first block, and no others
        if path.startswith(BLOCKS):
            assert np.any(gradient[0]) and not np.any(gradient[1]), path
        else:
            assert np.any(gradient), path
    other = RMU(layer=1, steering_coefficient=3.0).prepare(dataclasses.replace(context, seed=1))
    assert not np.allclose(other.sets["forget"].batch(ROWS).cached["target"], target)


def test_the_retain_loss_of_rmu_is_zero_at_the_vanilla_model(context):
    method = RMU(alpha=7.0)
    batch = batch_of(context, method, method.prepare(context), "retain")
    loss, grads = gradients(context, method, "retain", batch=batch)
    np.testing.assert_allclose(loss, 0.0, atol=1e-9)
    assert max(float(jnp.abs(g).max()) for g in grads.values()) < 1e-4
    apart = dataclasses.replace(batch, cached={"target": batch.cached["target"] + 2.0})
    np.testing.assert_allclose(value(context, method, "retain", batch=apart), 7 * 4.0, rtol=1e-4)


def test_rmu_computes_a_quarter_of_the_blocks_by_default():
    def layers(blocks):
        config = dataclasses.make_dataclass("Config", ["text"])(dataclasses.make_dataclass("T", ["layers"])(blocks))
        return RMU().layers(config)

    assert [layers(blocks) for blocks in (2, 4, 28, 32, 40)] == [1, 1, 7, 8, 10]


def test_rmu_does_not_train_the_final_norm_and_the_head(context):
    paths = set(RMU().trainable(context.params, context.model_config))
    everything = set(GradDiff().trainable(context.params, context.model_config))
    assert everything - paths == {"language_model/norm/scale", "language_model/head/kernel"}
    assert RMU().prepare(context).mask.keys() == paths


# MMUnlearner.


@pytest.fixture
def fisher_calls(monkeypatch):
    """The arguments and results of `saliency.fisher_information`: {set: (paths, rows, information)}."""
    calls, fisher = {}, saliency.fisher_information

    def spy(loss, trainable, frozen, samples, chunk):
        information = fisher(loss, trainable, frozen, samples, chunk)
        calls.update({name: (set(trainable), rows, information[name]) for name, (_, rows) in samples.items()})
        return information

    monkeypatch.setattr(saliency, "fisher_information", spy)
    return calls


def test_mmunlearner_masks_by_the_ratio_and_text_protects_the_language_model(context, fisher_calls):
    method = MMUnlearner(fisher_chunk=4)
    mask = method.prepare(context).mask
    paths = set(method.trainable(context.params, context.model_config))
    language = {path for path in paths if path.startswith("language_model/")}
    assert mask.keys() == paths  # a weight without a mask would not be masked
    assert {name: (on == paths, on == language, sorted(rows)) for name, (on, rows, _) in fisher_calls.items()} == {
        "forget": (True, False, [0, 1, 2, 3, 4]),
        "retain": (True, False, [0, 1, 2, 3, 4]),
        "forget_text": (False, True, [0, 1, 2, 3]),
        "retain_text": (False, True, [0, 1, 2, 3]),
    }
    forget, retain, *texts = (fisher_calls[name][2] for name in ("forget", "retain", "forget_text", "retain_text"))
    protected = 0
    for path in paths:
        preserve, selected = retain[path], np.asarray(forget[path] / (retain[path] + 1e-15)) >= 1
        if path in language:  # the mean over five questions with an image and eight without
            preserve = (5 * preserve + 4 * texts[0][path] + 4 * texts[1][path]) / 13
            protected += np.sum(selected != mask[path])
        ratio = np.asarray(forget[path] / (preserve + 1e-15))
        clear = np.abs(ratio - 1) > 1e-4  # the order of a sum changes its last digits
        assert mask[path].shape == ratio.shape and clear.mean() > 0.9
        np.testing.assert_array_equal(np.asarray(mask[path])[clear], (ratio >= 1)[clear], err_msg=path)
    assert protected > 100


def test_the_losses_of_mmunlearner_equal_those_of_gradient_difference(context):
    assert MMUnlearner.mask_scope == "forget"
    fields = dict(weight_forget=0.5, weight_retain=2.0, cap=CAP)
    for stream in ("forget", "retain"):
        method, prepared = MMUnlearner(**fields), base.Prepared(context.sets)
        assert value(context, method, stream, prepared) == value(context, GradDiff(**fields), stream)


@pytest.mark.slow
def test_mmunlearner_selects_only_matrix_b_of_adapters(adapted):
    image_sets = {name: adapted.sets[name] for name in ("forget", "retain")}
    mask = MMUnlearner(train="lora", fisher_chunk=4).prepare(dataclasses.replace(adapted, sets=image_sets)).mask
    assert mask.keys() == {path for path in adapted.params if path.endswith(("/lora_a", "/lora_b"))}
    for path, selected in mask.items():
        assert np.any(selected) == path.endswith("/lora_b"), path


# The weights that each method changes.

FIELDS = dict(
    vkd=dict(augment_forget=0, fisher_samples=4, fisher_chunk=4, cap=CAP),
    mmunlearner=dict(fisher_samples=4, fisher_chunk=4, cap=CAP),
    grad_ascent=dict(cap=CAP),
    grad_diff=dict(cap=CAP),
    kl=dict(cap=CAP),
)
TRAINED = [name for name in registry.METHODS if name not in ("finetune", "manu")]  # manu edits, and has its own tests

# The default suite trains once the methods with weights or masks of their own; VKD in test_text_stream.py.
DEFAULT_SCOPE = dict(mmunlearner="lora", rmu="all")
STEPS = [
    pytest.param(name, scope, marks=[] if DEFAULT_SCOPE.get(name) == scope else pytest.mark.slow)
    for name in TRAINED
    for scope in ("all", "visual", "lora")
]


@pytest.mark.parametrize(("name", "scope"), STEPS)
def test_training_changes_the_trainable_weights_and_no_others(context, adapted, name, scope):
    context = adapted if scope == "lora" else context
    before = {path: jax.tree.map(np.array, x) for path, x in context.params.items()}
    method = methods.create(name, dict(train=scope, **FIELDS.get(name, {})))
    prepared = method.prepare(context)
    config = TrainConfig(
        steps=2, batch_size=dict(forget=2, retain=2), learning_rate=0.01, warmup_steps=0, weight_decay=0.5,
        schedule="constant",
    )  # fmt: skip
    after = loop.fit(
        ModelBundle(context.graphdef, context.params, context.model_config, None, make_mesh()),
        method,
        prepared,
        config,
        seed=0,
        folder=None,
    )
    for path, value in context.params.items():  # the arguments are neither donated nor changed
        jax.tree.map(np.testing.assert_array_equal, value, before[path])
    assert after.keys() == set(method.trainable(context.params, context.model_config))
    changed = {path: np.asarray(value) != before[path] for path, value in after.items()}
    assert sum(x.sum() for x in changed.values()) > 100
    for path, x in changed.items():
        tower = path.split("/")[0]
        assert scope == "all" or (tower == "language_model") == (scope == "lora"), path
        if method.mask_scope == "both":
            assert not (x & ~np.broadcast_to(prepared.mask[path], x.shape)).any(), path
        if name == "rmu" and path.startswith(BLOCKS):  # only the first of two blocks is computed
            assert x[0].any() and not x[1].any(), path
    assert method.mask_scope == "none" or prepared.mask.keys() == after.keys()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("grad_ascent", dict(cap=0.0), r"method\.cap: 0\.0 is not allowed"),
        ("grad_diff", dict(cap=-1.0), r"method\.cap: -1\.0 is not allowed"),
        ("kl", dict(cap=float("nan")), r"method\.cap: nan is not allowed"),
        ("kl", dict(weight_kl=-1.0), r"method\.weight_kl: -1\.0 is not allowed"),
        ("idk", dict(weight_retain=float("inf")), r"method\.weight_retain: inf is not allowed"),
        ("npo", dict(beta=0.0), r"method\.beta: 0\.0 is not allowed"),
        ("rmu", dict(steering_coefficient=0.0), r"method\.steering_coefficient: 0\.0 is not allowed"),
        ("rmu", dict(alpha=-1.0), r"method\.alpha: -1\.0 is not allowed"),
        ("mmunlearner", dict(mask_threshold=0.0), r"method\.mask_threshold: 0\.0 is not allowed"),
        ("mmunlearner", dict(fisher_samples=0), r"method\.fisher_samples: 0 is not allowed"),
        ("mmunlearner", dict(train="text"), r"method\.train: 'text' is not allowed"),
    ],
)
def test_invalid_hyperparameters_are_refused(name, fields, message):
    with pytest.raises(UserError, match=message):
        methods.create(name, fields)


@pytest.mark.parametrize("layer", [0, 3])
def test_rmu_refuses_missing_blocks_before_it_computes_anything(context, layer):
    with pytest.raises(UserError, match=rf"method\.layer={layer}: the language model has blocks 1 to 2. Give one"):
        RMU(layer=layer).trainable(context.params, context.model_config)
