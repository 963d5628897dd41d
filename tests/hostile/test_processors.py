"""Image processors, tokenizers and chat templates that cannot be right."""

import pytest
from hostile_cases import Case, check, config, nested, with_files

from vkd_jax.data import image_sizes

TEXT_TEMPLATE = "{% for m in messages %}{{ 'Q: ' + m.content + ' A:' }}{% endfor %}"
PARTS = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
PART_TEMPLATE = "{% for part in messages %}{% if 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"


def processor(**fields):
    """Fields of the image processor are changed."""
    return with_files(
        processor_config__json=lambda values: values | {"image_processor": values["image_processor"] | fields}
    )


def joint_processor(**fields):
    """Fields by which transformers counts image tokens are changed."""
    return with_files(processor_config__json=lambda values: values | fields)


def template(text):
    return with_files(chat_template__jinja=text)


def token_added(values):
    """A tokenizer with a token for "Who" that the model does not know."""
    token = dict(id=5000, content="Who", single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    return values | {"added_tokens": [*values["added_tokens"], token]}


def deaf(values):
    """A tokenizer that deletes what is no special token."""
    return values | {"normalizer": {"type": "Replace", "pattern": {"Regex": "[A-Za-z ?:]+"}, "content": ""}}


def letterless(values):
    """A tokenizer that knows special tokens alone."""
    special = {token: number for token, number in values["model"]["vocab"].items() if token.startswith("<")}
    return values | {"model": values["model"] | {"vocab": special, "merges": []}}


def merged(share):
    """A tokenizer that has lost the other merges."""

    def change(values):
        merges = values["model"]["merges"]
        return values | {"model": values["model"] | {"merges": merges[: int(share * len(merges))]}}

    return change


def reordered(order):
    """A tokenizer whose merges are in another order."""

    def change(values):
        merges = list(order(values["model"]["merges"]))
        return values | {"model": values["model"] | {"merges": merges}}

    return change


def panicking(values):
    """A tokenizer whose normalizer has an error of its own."""
    return values | {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "ab"}}


def word_level(values):
    """A tokenizer that has words in place of merges, and none of those that are asked."""
    model = {"type": "WordLevel", "vocab": values["model"]["vocab"], "unk_token": "<unk>"}
    return values | {"model": model}


def doubled(values):
    """A tokenizer with two tokens of one id."""
    vocab = values["model"]["vocab"]
    first, second = [token for token, number in vocab.items() if number in (300, 301)]
    return values | {"model": values["model"] | {"vocab": vocab | {first: vocab[second]}}}


CASES = [
    # Image processors.
    Case("crop of another size", processor(crop_size={"height": 56, "width": 56}), ("crop_size", "48")),
    Case("image size that is a text", processor(size="large"), ("image_processor.size",)),
    Case("standard deviation 0", processor(image_std=[0.0, 0.0, 0.0]), ("image_std",)),
    Case("standard deviation that is an object", processor(image_std={"red": 1}), ("image_std", "red")),
    Case("factor of pixels 0", processor(rescale_factor=0), ("rescale_factor=0", "all alike")),
    Case("negative factor of pixels", processor(rescale_factor=-1 / 255), ("rescale_factor=-0.00392", "all alike")),
    *(
        Case(f"{name} of {value:g}", processor(**{name: values}), (name, "all alike"))
        for name, value, values in (
            ("image_mean", 1e30, [1e30] * 3),
            ("image_std", 1e30, [0.5, 0.5, 1e30]),
            ("image_std", 1e-9, [1e-9] * 3),
            ("rescale_factor", 1e-300, 1e-300),
            ("rescale_factor", 1e9, 1e9),
        )
    ),
    Case("edge shorter than the crop", processor(size={"shortest_edge": 1}), ("size.shortest_edge", "crop_size")),
    Case("mean of texts", processor(image_mean=["a", "b", "c"]), ("image_mean", "['a', 'b', 'c']")),
    Case(
        "factor of pixels that is a text",
        processor(rescale_factor="1/255"),
        ("image_processor.rescale_factor", "number"),
    ),
    Case("crop of a million pixels", processor(crop_size={"height": 10**6, "width": 10**6}), ("image processor",)),
    Case("edge of 10^5 pixels", processor(size={"shortest_edge": 10**5}), ("size.shortest_edge", "100000", "4,096")),
    Case("edge of a fraction", processor(size={"shortest_edge": 47.5}), ("size.shortest_edge", "47.5")),
    *(
        Case(f"{field} as {what}", processor(**{field: value}), ("processor_config.json", f"image_processor.{field}"))
        for field, what, value in (
            ("size", "an empty list", []),
            ("size", "a list of texts", ["48"]),
            ("crop_size", "a list of lists", [[48]]),
            ("size", "an empty object", {}),
            ("size", "true", True),
            ("crop_size", "a nested object", {"height": {}}),
            ("resample", "a text", "bicubic"),
            ("resample", "a list", []),
            ("resample", "a large number", 10**9),
            ("image_mean", "a short list", [0.5]),
            ("image_std", "true", True),
            ("rescale_factor", "true", True),
        )  # fmt: skip
    ),
    *(
        Case(f"{field} that is null", processor(**{field: None}), (f"{field} of the image processor is null", switch))
        for field, switch in image_sizes.NEEDED.items()
    ),
    *(
        Case(
            f"{field} {value!r} beside another model",
            joint_processor(**{field: value}),
            ("processor_config.json", field, "image tokens"),
        )
        for field, value in (
            ("patch_size", 6),
            ("patch_size", 12.0),
            ("num_additional_image_tokens", 0),
            ("num_additional_image_tokens", True),
            ("vision_feature_select_strategy", "full"),
        )
    ),
    Case("resizing that is a text", processor(do_resize="false"), ("do_resize", "'false'", "true or false")),
    Case("processor that is a list", with_files(processor_config__json=[1]), ("processor_config.json",)),
    Case("processor that is no JSON", with_files(processor_config__json="{"), ("processor",)),
    Case("no processor", with_files(processor_config__json=None), ("image processor",)),
    # Tokenizers.
    Case("no tokenizer", with_files(tokenizer__json=None), ("tokenizer",)),
    Case("empty tokenizer", with_files(tokenizer__json=""), ("tokenizer",)),
    Case("tokenizer that is a list", with_files(tokenizer__json=[]), ("tokenizer",)),
    Case("tokenizer without a model", with_files(tokenizer__json={"version": "1.0"}), ("tokenizer",)),
    Case("tokenizer that deletes texts", with_files(tokenizer__json=deaf), ("tokenizer", "different texts")),
    Case("tokenizer that panics", with_files(tokenizer__json=panicking), ("tokenizer",)),
    Case(
        "sentencepiece model alone",
        with_files(tokenizer__json=None, tokenizer__model=b"x"),
        ("tokenizer.model is not read", "tokenizer.json"),
    ),
    *(
        Case(f"merges that are {name}", with_files(tokenizer__json=change), ("tokenizer.json", "in another order"))
        for name, change in {"sorted": reordered(sorted), "reversed": reordered(reversed)}.items()
    ),
    Case("tokenizer of whole words", with_files(tokenizer__json=word_level), ("tokenizer.json", "as unknown")),
    Case("two tokens of one id", with_files(tokenizer__json=doubled), ("tokenizer.json", "are both the token")),
    *(
        Case(f"tokenizer with {share:.0%} of its merges", with_files(tokenizer__json=merged(share)), ("by no merge",))
        for share in (0, 0.5)
    ),
    Case("tokenizer without letters", with_files(tokenizer__json=letterless), ("tokenizer", "different texts")),
    Case("tokenizer config that is a list", with_files(tokenizer_config__json=[]), ("tokenizer",)),
    Case(
        "longest text that is a text",
        with_files(tokenizer_config__json=lambda values: values | {"model_max_length": "long"}),
        ("tokenizer", "str"),
    ),
    Case("ordinary token as the image token", config(image_token_index=300), ("image token 300", "texts are made of")),
    Case(
        "image token that ends answers",
        with_files(generation_config__json={"eos_token_id": [2, 4]}),
        ("image token 4", "ends or pads"),
    ),
    Case("token behind the embeddings", with_files(tokenizer__json=token_added), ("token", "1024", "tokenizer")),
    Case("tokenizer config nested deeply", with_files(tokenizer_config__json=nested(100_000)), ("tokenizer",)),
    Case(
        "end of sequence that is a text",
        with_files(generation_config__json={"eos_token_id": "</s>"}),
        ("eos_token_id",),
    ),
    Case(
        "end of sequence behind the vocabulary",
        with_files(generation_config__json={"eos_token_id": [10**9]}),
        ("eos_token_id",),
    ),
    Case(
        "end of sequence that is every token",
        with_files(generation_config__json={"eos_token_id": [*range(1024)]}),
        ("eos_token_id", "which texts are made of"),
    ),
    Case(
        "end of sequence that is a word",
        with_files(generation_config__json={"eos_token_id": [2, 300]}),
        ("generation_config.json", "eos_token_id 300 is", "which texts are made of"),
    ),
    *(
        Case(
            f"{name} that is a word",
            with_files(tokenizer_config__json=lambda values, name=name: values | {name: "USER"}),
            ("special token 'USER' is a word", "tokenizer_config.json"),
        )
        for name in ("eos_token", "bos_token", "pad_token")
    ),
    Case("generation config that is a list", with_files(generation_config__json=[]), ("generation_config.json",)),
    # Chat templates.
    Case("template that raises", template("{{ raise_exception('only users') }}"), ("template", "only users")),
    Case("template with an error", template("{% for m in messages %}"), ("template",)),
    Case("template that divides by zero", template("{{ 1 / 0 }}"), ("template",)),
    Case("template that joins texts", template(TEXT_TEMPLATE), ("template",)),
    Case("template that renders nothing", template(PART_TEMPLATE), ("template",)),
    Case(
        "template that shows a list", template("{% for m in messages %}Q: {{ m.content }}{% endfor %}"), ("template",)
    ),
    Case("template of an endless loop", template("{% for i in range(1000000000000) %}x{% endfor %}"), ("template",)),
    Case("template of 10^8 letters", template("{{ 'x' * 100000000 }}"), ("template", "100,000,000 characters")),
    Case("template of 10^10 letters", template("{{ 'x' * 10000000000 }}"), ("template", "MemoryError")),
    Case("template that centers a letter", template("{{ 'x'.center(1000000000000) }}"), ("template", "MemoryError")),
    Case("template of a power", template("{{ 9 ** 9 ** 9 }}{{ messages[0].content }}"), ("template", "a power")),
    Case("template of half a pair", template("{{ '\\ud800' }}" + PARTS), ("template", "half of a surrogate pair")),
    Case("template that reads attributes", template("{{ messages.__class__.__mro__ }}"), ("template",)),
    Case("template of an unknown filter", template("{{ messages | nothing }}"), ("template",)),
    Case("template that is no UTF-8", template(b"\xff\xfe"), ("chat_template.jinja is not UTF-8",)),
    Case(
        "settings with a byte order mark",
        with_files(tokenizer_config__json=b"\xef\xbb\xbf{}"),
        ("tokenizer_config.json begins with a byte order mark",),
    ),
    Case(
        "template that is a number",
        with_files(chat_template__jinja=None, chat_template__json={"chat_template": 3}),
        ("template",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_processor_is_refused(case, fork_server, tmp_path):
    check(case, fork_server, tmp_path)
