"""A language model as judge: prompts, scores, and the endpoint, which is a server of this process."""

import contextlib
import dataclasses
import http.server
import json
import socketserver
import threading
import types

import numpy as np
import pytest

from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.evaluation import judge, metrics
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.evaluation.metrics.summary import summarize
from vkd_jax.types import Example, Role, UserError


def record(prediction="a baker", **changes):
    fields = dict(task="generation", modality="vqa", set="forget", person="Zoë", question="What is {she}?")
    return {**fields, "answer": "a judge", "prediction": prediction, "correct": False, **changes}


RULES = {
    name: judge.Rule("{question}|{answer}|{prediction}", largest)
    for name, largest in [("generation", 10), ("mmvet", 1)]
}


def test_open_answers_and_mm_vet_are_graded_and_other_records_stay_as_they_are():
    script = types.SimpleNamespace(replies=lambda prompts: [judge.Reply(p.split("|")[2]) for p in prompts])
    cloze, choice = record(task="cloze"), record(task="classification", protocol="options")
    pope, mmvet = (record("1", task="suite", suite=name) for name in ("pope", "mmvet"))
    records = [record("7"), cloze, choice, pope, mmvet, record(None), record("none {at} all")]
    result = judge.judged(script, RULES, records)
    assert [r.get("judge") for r in result] == [0.7, None, None, None, 1.0, None, None]
    assert [r.get("judge_reply") for r in result] == ["7", None, None, None, "1", "", "none {at} all"]
    assert all(map(judge.is_judged, result)) and not judge.is_judged(records[0])
    assert result[1:4] == records[1:4] and "judge_reply" not in records[0]


def test_a_prompt_is_asked_once_and_never_again_after_it_was_saved():
    asked, saved = [], []

    def replies(prompts):
        asked.append(prompts)
        return [judge.Reply("7", 5, 1)] * len(prompts)

    script = types.SimpleNamespace(replies=replies)
    records = [record(text) for text in "abcab"]
    first = judge.judged(script, RULES, records, save=saved.append, chunk=2)
    assert [len(prompts) for prompts in asked] == [2, 1] and [len(replies) for replies in saved] == [2, 3]
    asked.clear()
    assert judge.judged(script, RULES, records, known=saved[0], chunk=2) == first
    assert [prompt.split("|")[2] for [prompt] in asked] == ["c"]
    asked.clear()
    assert judge.judged(script, RULES, records, known=json.loads(json.dumps(saved[1]))) == first and not asked


def test_the_scores_are_metrics_of_the_records_that_have_one():
    records = [record(judge=0.5), record(judge=1.0), record(judge_reply="no")]
    assert summarize(records, Role.FORGET).metrics["judge"].mean == 0.75
    assert metrics.get("judge").arrow(Role.FORGET) == "↓" and metrics.get("judge").arrow(Role.RETAIN) == "↑"
    assert "judge" not in summarize([record()], Role.FORGET).metrics
    suite = [record(task="suite", suite="mmvet", judge=0.25, group="1", category="", references=[])]
    assert metrics.get("mmvet_score").value(suite[0]) == 0.25 and metrics.get("mmvet_score").value(records[0]) is None


def test_the_judge_of_this_process_replies_to_each_prompt(tiny_model):
    replies = judge.LoadedJudge(Answerer(tiny_model, batch_size=2)).replies(["Who?", "What?", "Why?"])
    assert len(replies) == 3 and all(isinstance(reply.text, str) for reply in replies)


def test_a_reply_of_this_process_that_is_cut_off_has_no_score(tiny_model, monkeypatch):
    answerer = Answerer(tiny_model, batch_size=2)
    one, *_, zero = tiny_model.processor.tokenizer("1 0", add_special_tokens=False)["input_ids"]
    end = tiny_model.processor.eos_ids[0]
    monkeypatch.setattr(answerer, "_run", lambda *args: np.array([[one, zero], [one, end]]))
    cut, whole = judge.LoadedJudge(answerer).replies(["Who?", "What?"])
    assert whole.problem == "" and cut.problem == "cut off after 16 tokens"
    assert cut.text.startswith(whole.text) and answerer.generate(["Who?", "What?"]) == [cut.text, whole.text]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected an object"),
        ("{", "judge.json"),
        ('{"open": {}}', "unknown rule 'open'. Available: generation, mmvet"),
        ('{"mmvet": "{question}"}', "mmvet is the text '{question}'; write {\"prompt\": TEXT"),
        ('{"mmvet": {"prompt": "{question}{answer}{prediction}"}}', 'write {"prompt": TEXT'),
        ('{"mmvet": {"prompt": "{question} {answer}", "largest": 1}}', "mmvet.prompt lacks the slot {prediction}"),
        ('{"mmvet": {"prompt": "{question.x}{answer}{prediction}", "largest": 1}}', "unknown slot {question.x}"),
        ('{"mmvet": {"prompt": "{question}{answer}{prediction}", "largest": 0}}', "mmvet.largest is the number 0"),
        (
            '{"mmvet": {"prompt": "{question}{answer}{prediction}", "largest": 1e-300}}',
            "mmvet.largest is the number 1e-",
        ),
        ('{"mmvet": {"prompt": "{question}{answer}{prediction}", "largest": true}}', "mmvet.largest is the"),
        ('{"mmvet": {"prompt": "{question}{answer}{prediction}", "largest": "1"}}', "mmvet.largest is the text '1'"),
        (
            '{"mmvet": {"prompt": "{question:9}{answer}{prediction}", "largest": 1}}',
            "{question:9}, and a slot has its name",
        ),
        *(
            (f'{{"safeeraser/{name}": {{"prompt": "{{question}}{{prediction}}", "largest": 1}}}}', "names no category")
            for name in ("", " ", "Bolt ", "a  b", "bolt\u200b")
        ),
    ],
)
def test_wrong_prompts_are_refused_by_name(tmp_path, text, words):
    (tmp_path / "judge.json").write_text(text)
    with pytest.raises(UserError) as raised:
        judge.read_rules(tmp_path / "judge.json")
    assert words in str(raised.value) and "judge.json" in str(raised.value)


def test_a_rule_for_a_category_needs_questions_of_it():
    example = Example("a", "bolt", None, "", "What?", "A warning.", task="generation", rule=judge.SAFETY)
    other = dataclasses.replace(example, person="fire", rule="safeeraser_harmless")
    rules = RULES | {"safeeraser/fire": RULES["mmvet"]}
    judge.check_categories(RULES, [example])
    judge.check_categories(rules, [other])  # no question about an unsafe image: the rules are of other data
    judge.check_categories(rules, [example, dataclasses.replace(example, person="fire")])
    with pytest.raises(
        UserError, match="no question is of the category of the rule 'safeeraser/fire'. The data have b"
    ):
        judge.check_categories(rules, [example, other])


@pytest.mark.parametrize(("words", "warned"), [("Grade from 0 to 5.", True), ("Grade from 0 to 10.", False)])
def test_a_prompt_without_the_largest_number_is_a_warning(tmp_path, caplog, words, warned):
    rule = {"prompt": f"{words} {{question}}{{answer}}{{prediction}}", "largest": 10}
    (tmp_path / "judge.json").write_text(json.dumps({"generation": rule}))
    judge.read_rules(tmp_path / "judge.json")
    assert ("generation: its prompt lacks the largest number, 10" in caplog.text) == warned


def test_a_rule_that_a_file_lacks_is_this_packages(tmp_path):
    rule = {"prompt": "{question}{answer}{prediction}", "largest": 5}
    (tmp_path / "judge.json").write_text(json.dumps({"generation": rule}))
    rules = judge.read_rules(tmp_path / "judge.json")
    assert rules == judge.RULES | {"generation": judge.Rule(**rule)} and judge.read_rules("") is judge.RULES


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(judge="http://localhost/v1"), "judge_model: '' does not fit .* Name the model"),
        (dict(judge="tiny_llava", judge_model="x"), "judge_model: 'x' does not fit .* Leave it out"),
        (dict(judge_model="x"), "judge_model: 'x' does not fit"),
        (dict(judge_prompts="x.json"), "judge_prompts: there is no judge"),
    ],
)
def test_half_a_judge_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        EvalConfig(**fields)


# The endpoint.

ADDRESSES = (
    *("http://", "http:///v1", "http://a b/v1", "http://localhost:70000/v1", "http://localhost:x/v1", "http://[::1/v1"),
    *(
        "https://localhost:0/v1",
        "http://h\u00f6st/v1",
        "http://localhost/v1?key=1",
        "http://localhost/v1#x",
        "http://:80",
        "ftp://localhost/v1",
        "file:///etc/passwd",
        "http://name:secret@localhost/v1",
        "http://a..b/v1",
        f"http://{'a' * 64}/v1",
    ),
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_cannot_be_asked_is_refused_before_anything_is(address):
    with pytest.raises(UserError, match=r"eval\.judge=.* it is no address of an endpoint; give http://HOST:PORT/v1"):
        judge.Endpoint(address, "grader")


@pytest.mark.parametrize("key", ["a b", "secret\n", "s\u00e9cret"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv(judge.KEY_VARIABLE, key)
    with pytest.raises(UserError, match=f"the key in {judge.KEY_VARIABLE} has characters") as raised:
        judge.Endpoint("http://localhost/v1", "grader")
    assert key not in str(raised.value)


def completion(text, **usage):
    choice = {"message": {"role": "assistant", "content": text, "refusal": None}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": usage, "model": "grader"})


@contextlib.contextmanager
def endpoint(*responses):
    """A server that gives these (status, headers, body) in turn, the last one for ever; yields its URL and requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            status, headers, text = responses[min(len(requests), len(responses)) - 1]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", requests
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(judge.time, "sleep", pauses.append)
    monkeypatch.delenv(judge.KEY_VARIABLE, raising=False)
    return pauses


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_request_is_one_of_chat_completions(monkeypatch, slash):
    with endpoint((200, {}, completion(" 7\n", prompt_tokens=30, completion_tokens=1))) as (url, requests):
        assert judge.Endpoint(url + slash, "grader").replies(["Grade Zoë."]) == [judge.Reply("7", 30, 1)]
        monkeypatch.setenv(judge.KEY_VARIABLE, "secret")
        judge.Endpoint(url, "grader").replies(["Grade."])
    (path, headers, body), (_, with_key, _) = requests
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body["model"] == "grader" and body["temperature"] == 0
    assert body["messages"] == [{"role": "user", "content": "Grade Zoë."}]
    assert with_key["Authorization"] == "Bearer secret"


def test_a_busy_endpoint_is_asked_again_after_growing_pauses(pauses):
    busy = (429, {"Retry-After": "9"}, "slow down"), (503, {}, "")
    with endpoint(*busy, (200, {}, completion("7"))) as (url, requests):
        assert judge.Endpoint(url, "grader").replies(["Grade."]) == [judge.Reply("7")]
    assert len(requests) == 3 and pauses == [9.0, 18.0]


FAILURES = {
    "refused": ((401, {}, "no key"), r"refused the request \(status 401: no key\)", 1),
    "unknown model": ((404, {}, '{"error": "no such model"}'), "refused the request .status 404", 1),
    **{
        f"redirected, {status}": (
            (status, {"Location": "http://127.0.0.1:9/v1"}, ""),
            "redirects to http://127.0.0.1:9/v1; give the address itself",
            1,
        )
        for status in (301, 302, 303, 307, 308)
    },
    "redirected nowhere": ((302, {}, ""), "redirects to nowhere", 1),
    "half a character": ((200, {}, '{"choices": [{"message": {"content": "7 \\ud800"}}]}'), "is not Unicode", 1),
    "NUL": ((200, {}, '{"choices": [{"message": {"content": "7\\u0000"}}]}'), "the character NUL", 1),
    "a list of contents": ((200, {}, '{"choices": [{"message": {"content": ["7"]}}]}'), "not a chat completion", 1),
    "a number as the content": ((200, {}, '{"choices": [{"message": {"content": 7}}]}'), "not a chat completion", 1),
    "null": ((200, {}, '{"choices": null}'), "not a chat completion", 1),
    "nothing": ((200, {}, ""), "not a chat completion", 1),
    "down": ((500, {}, "oops"), "did not answer in 6 attempts .status 500: oops", judge.ATTEMPTS),
    "not JSON": ((200, {}, "<html>"), "reply is not a chat completion: '<html>'", 1),
    "no choice": ((200, {}, '{"choices": []}'), "reply is not a chat completion", 1),
    "another shape": ((200, {}, "[]"), "reply is not a chat completion", 1),
    "tokens without an end": ((200, {}, completion("7", prompt_tokens=float("inf"))), "not a chat completion", 1),
    "an odd pause": ((503, {"Retry-After": "\u00b2"}, "oops"), "did not answer in 6 attempts", judge.ATTEMPTS),
    "deep": ((200, {}, "[" * 100_000), "reply is not a chat completion", 1),
    "content that is an object": ((200, {}, completion({"max": 10, "score": 2})), "not a chat completion", 1),
    "content that is a number": ((200, {}, completion(7)), "not a chat completion", 1),
    "content that is false": ((200, {}, completion(False)), "not a chat completion", 1),
    "parts of another type": ((200, {}, completion([{"type": "image_url", "text": "7"}])), "not a chat completion", 1),
    "parts that are texts": ((200, {}, completion(["7"])), "not a chat completion", 1),
    "parts with numbers": ((200, {}, completion([{"type": "text", "text": 7}])), "not a chat completion", 1),
}


TEXTS = {
    "parts": ([{"index": 0, "type": "text", "text": "Score:"}, {"type": "text", "text": " 7"}], "Score: 7"),
    "null": (None, ""),
    "no parts": ([], ""),
    "a surrogate pair": ("\U0001f600", "\U0001f600"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_the_content_is_a_text_or_texts(case):
    content, text = TEXTS[case]
    with endpoint((200, {}, completion(content))) as (url, _):
        (reply,) = judge.Endpoint(url, "grader").replies(["Grade."])
    assert reply.text == text and reply.text.encode().decode() == text


MESSAGE = {"role": "assistant", "content": "1"}
UNFINISHED = {
    **{
        f"finish_reason {reason}": ([{"message": MESSAGE, "finish_reason": reason}], f"(finish_reason {reason!r})")
        for reason in ("length", "content_filter", "tool_calls", "", None, False, 0, ["stop"])
    },
    "no finish_reason": ([{"message": MESSAGE}], "not finished (finish_reason None)"),
    "a refusal": ([{"message": MESSAGE | {"refusal": "I cannot."}, "finish_reason": "stop"}], "refused"),
    "an echo": ([{"message": MESSAGE | {"role": "user"}, "finish_reason": "stop"}], "not of the assistant, but of 'us"),
    "two choices": ([{"message": MESSAGE, "finish_reason": "stop"}] * 2, "2 replies to one request"),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_a_reply_that_is_not_whole_has_no_score(case):
    """A reply of "10" that is cut off after its first digit would be a score of 0.1."""
    choices, problem = UNFINISHED[case]
    saved = []
    with endpoint((200, {}, json.dumps({"choices": choices}))) as (url, _):
        [result] = judge.judged(judge.Endpoint(url, "grader"), RULES, [record()], save=saved.append)
    assert "judge" not in result and result["judge_reply"] == "1" and judge.is_judged(result)
    assert problem in saved[0][0]["problem"]
    known = [{key: value for key, value in saved[0][0].items() if key != "problem"}]  # a file of an older version
    assert judge.judged(None, RULES, [record()], known=known)[0]["judge"] == 0.1


@pytest.mark.parametrize(
    ("model", "warned"),
    [("grader", False), (None, False), ("grader-2024-08-06", False), ("grader-mini", True), ("tiny", True), (7, True)],
)
def test_a_reply_of_another_model_is_a_warning(caplog, model, warned):
    judge._check_model.cache_clear()
    body = json.loads(completion("7")) | {"model": model}
    with endpoint((200, {}, json.dumps(body))) as (url, _):
        assert judge.Endpoint(url, "grader").replies(["Grade.", "Grade again."]) == [judge.Reply("7")] * 2
    warnings = [line for line in caplog.messages if "the endpoint replies with the model" in line]
    assert len(warnings) == warned and all(f"{model}" in line and "'grader'" in line for line in warnings)


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_sentence_that_names_the_endpoint(monkeypatch, case):
    response, words, attempts = FAILURES[case]
    monkeypatch.setenv(judge.KEY_VARIABLE, "secret")
    with endpoint(response) as (url, requests):
        with pytest.raises(UserError, match=words) as raised:
            judge.Endpoint(url, "grader").replies(["Grade."])
    assert str(raised.value).startswith(f"eval.judge={url}") and len(raised.value.args[0]) < 400
    assert len(requests) == attempts and "secret" not in str(raised.value)


@pytest.mark.parametrize("counts", [-5, "many", None, [1], True, 1.5])
def test_tokens_that_are_no_count_are_not_known(counts):
    body = completion("7", prompt_tokens=counts, completion_tokens=2)
    assert judge._parsed(body.encode(), "grader") == judge.Reply("7", 0, 2)
    assert judge._parsed(json.dumps(json.loads(body) | {"usage": counts}).encode(), "grader") == judge.Reply("7")


@pytest.mark.parametrize("beginning", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"])
def test_a_reply_that_drips_in_ends(monkeypatch, beginning):
    """Each byte comes long before the timeout of the socket, and the whole would never come."""
    monkeypatch.setattr(judge, "TIMEOUT", 0.2)
    monkeypatch.setattr(judge, "ATTEMPTS", 2)
    stop = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(beginning)
            with contextlib.suppress(OSError):
                while not stop.wait(0.02):
                    self.request.sendall(b"x")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        with pytest.raises(UserError, match="did not answer in 2 attempts .no whole reply in 0.2 seconds"):
            judge.Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", "grader").replies(["Grade."])
        stop.set()
        server.shutdown()


def test_an_endpoint_that_is_not_there_is_one_sentence(pauses):
    with endpoint() as (url, _):
        pass
    with pytest.raises(UserError, match="did not answer in 6 attempts"):
        judge.Endpoint(url, "grader").replies(["Grade."])
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0]
