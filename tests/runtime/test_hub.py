"""Tests of models and data sets by name, with a local stand-in for the hub and all errors of its library."""

import errno
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from vkd_jax.runtime import hub
from vkd_jax.types import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.model": b"tokens",
    "chat_template.jinja": b"chat",
    "merges.txt": b"a b",
    "qwen.tiktoken": b"tokens",
    "README.md": b"read me",
    "LICENSE": b"free",
    "certificate.json": b"{}",
    "certificate.sig": b"{}",
}
DATA = {f"{config}/train-00000-of-00001.parquet": config.encode() for config in ("forget10", "forget10+tofu", "full")}
UNWANTED = {"pytorch_model.bin": b"code", "model.pt": b"code", "onnx/config.json": b"{}"}


class Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in for the hub with a public and a gated repository of each kind, for snapshot downloads only."""

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.requests.append(path)
        if path.startswith(("/api/models/org/gated/", "/api/datasets/org/gated/")):
            return self.answer(b"", 403, {"X-Error-Code": "GatedRepo"})
        for api, resolve, name, files in (
            ("/api/models", "", "org/name", FILES | UNWANTED),
            ("/api/datasets", "/datasets", "org/data", DATA | {"README.md": b"read me"}),
        ):
            if path.startswith((f"{api}/{name}/", f"{resolve}/{name}/")):
                return self.serve(path, f"{api}/{name}", f"{resolve}/{name}/resolve/{SHA}/", name, files)
        return self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def serve(self, path, api, resolve, repo, files):
        if path in (f"{api}/revision/{r}" for r in ("main", "v1", SHA)):
            return self.answer({"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in files]})
        if path == f"{api}/tree/{SHA}":
            oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
            return self.answer(
                [{"type": "file", "path": n, "size": len(data), "oid": oids[n]} for n, data in files.items()]
            )
        if (name := urllib.parse.unquote(path).removeprefix(resolve)) in files:
            headers = {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": SHA}
            return self.answer(files[name], headers=headers)
        return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})

    do_HEAD = do_GET

    def answer(self, content, status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache in offline mode."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def server(cache, monkeypatch):
    """A local hub that the library is configured to use; `requests` lists the paths of all requests."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


def refusal(name):
    with pytest.raises(UserError) as error:
        hub.fetch_model(name)
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    return text


def refused(name, reason, command):
    """Checks that the error is one sentence with the missing model, the reason, and what to do."""
    text = refusal(name)
    assert text.startswith(f"There is no model folder {name} here, and ")
    assert reason in text
    assert f"`{command} --local-dir DIR`" in text
    assert text.endswith("pass the folder, with config.json and safetensors in it, in its place.")


def test_a_folder_is_returned_as_it_is(cache, tmp_path):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    assert hub.fetch_model(folder) == folder
    assert hub.fetch_model(str(folder)) == folder
    assert hub.fetch_model("org/name") == Path("org/name")  # folders take precedence over the hub


def test_names_that_are_neither_a_folder_nor_an_id_are_errors(cache, tmp_path):
    for name in (tmp_path / "nowhere", "nowhere", "./a/b", "../a", "a/b/c", "org/", "org/ä", "org/name@"):
        assert refusal(name).startswith(f"There is no model folder {name}; pass one with config.json")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_bytes(b"")
    assert refusal("org/name") == "org/name is a file; pass the model folder that contains it."
    (tmp_path / "model.gguf").write_text("")
    assert "is a GGUF file, which is not read" in refusal(str(tmp_path / "model.gguf"))
    assert refusal("org/a..b").startswith("There is no model folder org/a..b here")


def test_models_are_fetched_without_pickles(server, cache):
    folder = hub.fetch_model("org/name")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
    assert not any(name in path for path in server.requests for name in UNWANTED)
    assert folder.is_relative_to(cache)
    assert hub.fetch_model("org/name@v1") == hub.fetch_model(f"org/name@{SHA}") == folder


def test_fetched_models_are_available_offline(server, cache, monkeypatch):
    folder = hub.fetch_model("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(server.requests)
    assert hub.fetch_model("org/name") == folder
    refused("org/name@v1", "HF_HUB_OFFLINE is set", "hf download org/name --revision v1")
    (folder / "merges.txt").unlink()  # as after an interrupted download
    refused("org/name", "does not hold all of org/name", "hf download org/name")
    assert len(server.requests) == count


def test_gated_unknown_and_missing_revisions_are_explained(server):
    refused("org/gated", "accepted its terms", "hf download org/gated")
    refused("org/other", "the hub shows no model org/other", "hf download org/other")
    refused("org/name@v2", "org/name has no revision v2", "hf download org/name --revision v2")


def test_unreachable_hub_is_explained(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    refused("org/name", "the hub cannot be reached", "hf download org/name")


def snapshot(cache, *names):
    """A model in the cache, as an earlier download leaves it, with these files."""
    folder = cache / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(SHA)
    (folder / "snapshots" / SHA).mkdir(parents=True)
    for name in names:
        (folder / "snapshots" / SHA / name).write_bytes(FILES[name])
    return folder / "snapshots" / SHA


def test_cached_models_need_no_network(cache):
    folder = snapshot(cache, *FILES)
    assert hub.fetch_model("org/name") == hub.fetch_model(f"org/name@{SHA}") == folder


@pytest.mark.parametrize(
    ("present", "missing"),
    [(["config.json"], "lacks *.safetensors"), (["merges.txt"], "lacks config.json and *.safetensors")],
)
def test_incomplete_cache_is_an_error(cache, present, missing):
    snapshot(cache, *present)
    refused("org/name", missing, "hf download org/name")


def test_environment_variable_sets_the_cache(tmp_path):
    folder = snapshot(tmp_path / "elsewhere", *FILES)
    code = (
        "import sys; from vkd_jax.runtime import hub; assert 'huggingface_hub' not in sys.modules\n"
        "print(hub.fetch_model('org/name'))"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == str(folder), run.stderr


def every_error():
    """Yields each exception of the hub's library, and others that it passes on."""
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    for kind in [kind for kind in kinds if kind.__module__ == errors.__name__]:
        error = kind.__new__(kind)
        error.args = (f"{kind.__name__} of the hub\n\nand more",)
        yield error
    yield OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    yield TimeoutError()
    yield ConnectionError("the network is\n\ndown")


@pytest.mark.parametrize("error", list(every_error()), ids=lambda error: type(error).__name__)
def test_all_errors_are_one_sentence(error, cache, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    named = {
        errors.LocalEntryNotFoundError: "HF_HUB_OFFLINE is set",
        errors.GatedRepoError: "accepted its terms",
        errors.RepositoryNotFoundError: "the hub shows no model org/name",
        errors.RevisionNotFoundError: "org/name has no revision v1",
    }
    reason = next((text for kind, text in named.items() if isinstance(error, kind)), f"({type(error).__name__}: ")
    refused("org/name@v1", reason, "hf download org/name --revision v1")


def test_keyboard_interrupt_is_not_caught(cache, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch_model("org/name")


# ---- Data sets ----


def refused_data(name, configs, reason, command):
    with pytest.raises(UserError) as error:
        hub.fetch_dataset(name, [f"{config}/train-*.parquet" for config in configs])
    text = str(error.value)
    assert text.startswith(f"There is no data folder {name} here, and ") and "\n" not in text
    assert reason in text and f"`{command} --local-dir DIR`" in text
    assert text.endswith("pass the folder as --config.data.source=DIR.")


def test_forms_of_ids():
    assert hub.is_id("org/name") and hub.is_id("org/name@v1")
    assert not any(map(hub.is_id, ("", "name", "/org/name", "a/b/c", "org/", "gs://a/b")))


def test_only_requested_configs_are_fetched(server, cache):
    folder = hub.fetch_dataset("org/data", ["forget10/*.parquet", "forget10+tofu/*.parquet"], ["absent/*.json"])
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {name: data for name, data in DATA.items() if not name.startswith("full")}
    assert folder.is_relative_to(cache) and folder.name == SHA
    assert not any("full" in path or "README" in path for path in server.requests if "resolve" in path)
    assert hub.fetch_dataset(f"org/data@{SHA}", ["full/*.parquet"]) == folder


def test_fetched_configs_are_available_offline(server, monkeypatch):
    folder = hub.fetch_dataset("org/data", ["forget10/*.parquet"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch_dataset("org/data", ["forget10/*.parquet"]) == folder
    count = len(server.requests)
    refused_data("org/data", ["forget10", "full"], "", "hf download org/data --repo-type dataset")
    assert len(server.requests) == count


def test_unavailable_data_sets_are_explained(server, cache, monkeypatch):
    refused_data("org/gated", ["a"], "accepted its terms", "hf download org/gated --repo-type dataset")
    refused_data("org/other", ["a"], "shows no data set org/other", "hf download org/other --repo-type dataset")
    command = "hf download org/data --repo-type dataset --revision v2"
    refused_data("org/data@v2", ["a"], "org/data has no revision v2", command)
    refused_data("org/data", ["forget10", "b"], "lacks b/train-*.parquet", "hf download org/data --repo-type dataset")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "other"))
    refused_data("org/data", ["a"], "the hub cannot be reached", "hf download org/data --repo-type dataset")


@pytest.mark.parametrize("name", ["tiny_base", "tiny_llava", "tiny_retain_only"])
def test_shipped_models_are_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = hub.fetch_model(name)
    assert (folder / "model.safetensors").is_file()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert len(provenance["without"]) == (6 if name == "tiny_retain_only" else 0)
    assert "+changes" not in provenance["commit"]
    (tmp_path / name).mkdir()
    assert hub.fetch_model(name) == Path(name)  # a local folder takes precedence
    with pytest.raises(UserError, match="There is no model folder"):
        hub.fetch_model(f"../assets/{name}")


def test_a_hub_that_never_answers_is_not_waited_for(cache, monkeypatch):
    """Such as behind the login page of a network."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "SECONDS", 0.2)
        refused("org/name", "while the hub did not answer in 0 s; get it", "hf download org/name")
