"""Tests of chat templates: which file of a model folder counts, and prompts that are refused."""

import json
import shutil

import pytest

from vkd_jax.data import chat_template
from vkd_jax.data.processor import LLAVA_CHAT_TEMPLATE, Processor, create_processor
from vkd_jax.types import UserError

JINJA, JSON, PROCESSOR, TOKENIZER = (
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
)


def template(begin):
    """A template for texts and images whose prompts begin with `begin`."""
    return (
        begin + ": {% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    create_processor(folder, ["USER: Who? ASSISTANT: a sailor"] * 9, vocab_size=300, image_size=16, patch_size=8)
    return folder


@pytest.fixture
def load(folder, tmp_path, tiny_config):
    """Loads the processor of a folder with these templates, each in its file."""

    def load(**templates):
        copy = tmp_path / "model"
        shutil.copytree(folder, copy)
        (copy / JINJA).unlink()
        if "jinja" in templates:
            (copy / JINJA).write_text(templates["jinja"])
        if "json" in templates:
            (copy / JSON).write_text(json.dumps({"chat_template": templates["json"]}))
        for key, name in (("processor", PROCESSOR), ("tokenizer", TOKENIZER)):
            if key in templates:
                config = json.loads((copy / name).read_text())
                (copy / name).write_text(json.dumps(config | {"chat_template": templates[key]}))
        return Processor(copy, tiny_config)

    return load


TEXT_ONLY = "{% for m in messages %}Q: {{ m.content }} A:{% endfor %}"


@pytest.mark.parametrize(
    ("templates", "prompt"),
    [
        ({"json": template("json"), "tokenizer": TEXT_ONLY}, "json: Who?"),
        ({"jinja": template("jinja"), "tokenizer": TEXT_ONLY}, "jinja: Who?"),
        ({"processor": template("config"), "json": template("json"), "jinja": template("jinja")}, "config: Who?"),
        ({"json": template("json"), "jinja": template("jinja")}, "json: Who?"),
        ({"tokenizer": template("tokenizer")}, "tokenizer: Who?"),
        ({"json": {"default": template("named"), "tool_use": TEXT_ONLY}}, "named: Who?"),
        ({"tokenizer": [{"name": "default", "template": template("list")}]}, "list: Who?"),
        ({}, "USER: Who? ASSISTANT:"),
        ({"jinja": LLAVA_CHAT_TEMPLATE}, "USER: Who? ASSISTANT:"),
    ],
)
def test_the_template_of_the_processor_comes_first(load, templates, prompt):
    assert load(**templates).prompt("Who?", 0) == prompt


def test_templates_that_do_not_count_are_logged(load, caplog):
    with caplog.at_level("INFO", "absl"):
        load(json=template("json"), jinja=template("jinja"))
    assert f"{JSON} has the chat template that counts; {JINJA} has another" in caplog.text


CHAT_ML = template("<s>user") + "</s>\n"
TURN = "{% if add_generation_prompt %}ASSISTANT:{% endif %}"


@pytest.mark.parametrize(
    ("text", "announces"),
    [
        (LLAVA_CHAT_TEMPLATE, True),
        (template("[INST]") + " [/INST]", True),
        (CHAT_ML + TURN, True),
        (LLAVA_CHAT_TEMPLATE.replace(TURN, ""), False),
        (LLAVA_CHAT_TEMPLATE.replace("if add_generation_prompt", "if not add_generation_prompt"), False),
        (CHAT_ML, False),
        (template("Q"), False),
    ],
)
def test_a_template_that_announces_no_answer_is_a_warning(load, text, announces, caplog):
    assert "Who?" in load(jinja=text).prompt("Who?", 0)
    warning = f"{JINJA}: the chat template writes nothing after the question"
    assert caplog.text.count(warning) == (0 if announces else 1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TEXT_ONLY, "prints the list of texts and images in place of its items: it is for text alone"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", "prints the list of texts and images"),
        ("{% for m in messages %}{{ 'Q: ' + m.content }}{% endfor %}", "fails (TypeError: can only concatenate"),
        ("{% for m in messages %}{% if 'text' in m %}{{ m.text }}{% endif %}{% endfor %}", "renders an empty prompt"),
        ("", "renders an empty prompt"),
        (" \n", "renders an empty prompt"),
        ("USER: ASSISTANT:", "leaves the question out of the prompt"),
        ("{{ raise_exception('no images') }}", "fails (TemplateError: no images)"),
        ("{% for m in messages %}\n{% if %}", "fails in line 2 (TemplateSyntaxError: "),
        ("{{ messages[9].content }}", "fails (UndefinedError: "),
        ("{{ 1 / 0 }}", "fails (ZeroDivisionError: "),
        ("{{ 'x' * 2000000 }}", "renders a prompt of 2,000,000 characters"),
        ("{{ messages | nothing }}", "fails in line 1 (TemplateAssertionError: "),
        ("{{ [1, 2] | random }}", "it draws random numbers, so that the same question has another prompt each time"),
        ("{{ lipsum(1) }}{{ messages[0].content[-1].text }}", "it draws random numbers"),
        ("{{ strftime_now('%d %b %Y') }}", "it reads the clock with strftime_now('%d %b %Y')"),
        (template("A") + "{{ messages | map(attribute='a') }}", "prints an object with its address, which changes"),
        ("{{ ''.__class__.__mro__ }}", "fails (SecurityError: "),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "fails (RecursionError: "),
        ("{% for i in range(1000000000) %}{% endfor %}", "fails (OverflowError: "),
    ],
)
def test_a_template_that_renders_no_prompt_is_refused_with_what_to_do(load, text, problem):
    with pytest.raises(UserError) as raised:
        load(jinja=text)
    message = str(raised.value)
    assert problem in message and f"/model/{JINJA}: the chat template" in message and "\n" not in message
    assert message.endswith(
        f"write the template of the model's processor, which takes images, to {JINJA} in the model folder."
    )


def test_an_empty_template_that_counts_first_is_to_be_removed(load):
    problem = r"chat_template\.json: the chat template renders an empty prompt; remove it from this file, which counts"
    with pytest.raises(UserError, match=problem):
        load(json="", jinja=template("A"))


@pytest.mark.parametrize(
    "body",
    [
        "{% for m in messages %}{{ m.content[-1].text if m.role == 'user' else 'nurse' }} {% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content[-1].text }} {% endif %}{% endfor %}",
        "{% for m in messages[-2:] %}{{ m.content[-1].text }} {% endfor %}",
        "{% for m in messages | reverse %}{{ m.content[-1].text }} {% endfor %}",
        "{% for m in messages %}{{ m.content[-1].text | upper if not loop.last else m.content[-1].text }} {% endfor %}",
    ],
    ids=["another answer", "no answers", "no first question", "reversed", "capitals"],
)
def test_a_template_keeps_earlier_questions_and_answers(load, body):
    processor = load(jinja="USER: " + body)
    processor.prompt("Where?", 0)
    with pytest.raises(UserError, match="changes, reorders or leaves out earlier questions or answers"):
        processor.prompt("Where?", 0, [("Who is it?", "a sailor", 0)])


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_refused(load, monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"the chat template fails .*\(TimeoutError: not finished in 0\.05 s\)"):
        load(jinja=LOOPS)


@pytest.mark.parametrize("value", [3, True, ["a"], {"tool_use": "a"}])
def test_a_template_that_is_not_a_text_is_refused(load, value):
    with pytest.raises(
        UserError, match=r"chat_template\.json: chat_template is .*, not a text or several with one named"
    ):
        load(json=value)


def test_a_question_may_look_like_a_list(load):
    question = "What is \"[{'type': 'text'}]\"?"
    assert question in load(json=template("json")).prompt(question, 0)


def test_a_prompt_of_one_token_is_refused(load, monkeypatch):
    processor = load(jinja=template("Q"))
    monkeypatch.setattr(processor, "prompt", lambda *_: "")  # only the beginning-of-sequence token is left
    with pytest.raises(UserError, match="a prompt of 1 tokens asks nothing"):
        processor.encode("Who?", "a sailor")
