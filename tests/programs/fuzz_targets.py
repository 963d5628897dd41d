"""What the property tests and the fuzzer call: readers of things that others wrote, as functions of bytes.

A target raises `UserError` for bytes that it refuses, and nothing else. `SEEDS` has good inputs of each, which are
changed to find new ones. The targets are fast, since they neither start a process nor compute anything with JAX.
"""

import atexit
import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vkd_jax.benchmarks.clear import Clear
from vkd_jax.benchmarks.folder import Folder
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.benchmarks.rows import Row
from vkd_jax.checkpoints import safetensors_files
from vkd_jax.config.schema import RunConfig
from vkd_jax.data.chat_template import ChatTemplate
from vkd_jax.runtime import json_files
from vkd_jax.types import UserError

TINY_LLAVA = Path(__file__).parents[2] / "vkd_jax" / "assets" / "tiny_llava"
SHARD = "model-00001-of-00001.safetensors"


@functools.cache
def folder(name: str) -> Path:
    """A folder for the files of a target, in memory if the machine has such a disk."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def framed(header: bytes, payload: int = 0) -> bytes:
    """A safetensors file with this header and so many bytes of tensors."""
    return len(header).to_bytes(8, "little") + header + b"\0" * payload


def safetensors_header(data: bytes) -> None:
    """Reads a safetensors file: the bytes as they are, or as its header if the first one is odd."""
    path = folder("safetensors") / "model.safetensors"
    if data[:1] and data[0] % 2:
        data = framed(data[2:], data[1] if len(data) > 1 else 0)
    path.write_bytes(data)
    for tensor in safetensors_files.read_header(path).values():
        assert 8 <= tensor.start <= tensor.stop <= len(data)
        target = np.empty(tensor.shape, tensor.dtype)
        tensor.copy_to([(tuple(slice(0, size) for size in tensor.shape), target)])


def index_file(data: bytes) -> None:
    """Opens a model folder with these bytes as its index."""
    path = folder("index")
    shard = path / SHARD
    if not shard.exists():
        header = {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate("ab")
        }
        shard.write_bytes(framed(json.dumps(header).encode(), 8))
    (path / safetensors_files.INDEX).write_bytes(data)
    checkpoint = safetensors_files.Checkpoint(path)
    assert all(file.resolve().parent == path.resolve() for file in checkpoint.files)


def metadata(data: bytes) -> None:
    """Reads a folder of images with these bytes as metadata.jsonl."""
    path = folder("metadata")
    if not (path / "a.png").exists():
        (path / "a.png").write_bytes(png())
    (path / "metadata.jsonl").write_bytes(data)
    for row in Folder(forget=str(path), retain="other").questions("forget"):
        for example in row:
            json.dumps(vars(example) | {"image": None}, ensure_ascii=False).encode()


@functools.cache
def png() -> bytes:
    """A small image file."""
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "PNG")
    return stream.getvalue()


class Rows:
    """A snapshot in memory: one row for each config, which `changes` changes in one of them."""

    def __init__(self, good: Mapping[str, Mapping[str, Any]], config: str, changes: Mapping[str, Any]):
        self.configs = tuple(good)
        self._rows = {name: dict(row) | (changes if name == config else {}) for name, row in good.items()}

    def has(self, config: str) -> bool:
        """Whether the snapshot has this config."""
        return config in self._rows

    def rows(self, config: str, columns: Any, either: Any = (), optional: Any = ()) -> Iterator[Row]:
        """As `parquet.Snapshot.rows`."""
        del columns, either, optional
        yield Row(self._rows[config], f"{config}.parquet, row 0", name=f"{config}/0", lenient=True)


def options(letter: str = "A") -> dict[str, Any]:
    """A question with options."""
    return {"Question": "Who?", "Options": {"A": "x", "B": "y"}, "Correct_Answer": letter}


def mllmu_row(row_id: Any) -> dict[str, Any]:
    """A row of MLLMU-Bench."""
    tasks = {"Image_Textual_Questions": [options()], "Pure_Text_Questions": [options("B")]}
    question = [{"Type": "Image_Textual", "Question": "What __?", "Ground_Truth": "x"}]
    row = {"ID": row_id, "image": {"bytes": png(), "path": "a.png"}, "Classification_Task": json.dumps(tasks)}
    return row | {"Generation_Task": json.dumps(question), "Mask_Task": question}


def clear_row(name: str, **more: Any) -> dict[str, Any]:
    """A row of CLEAR, with the columns of all its configs."""
    row = {"image": {"bytes": png(), "path": "a.png"}, "caption": f"{name} smiles.", "name": name}
    row |= {"paraphrased_caption": "A smile.", "perturbed_captions": ["x", "y"], "perturbed_names": '["p", "q"]'}
    return row | {"question": None, "answer": "x", "options": ["x", "y"]} | more


@functools.cache
def good_rows() -> tuple[tuple[type, dict[str, dict[str, Any]]], ...]:
    """The benchmarks, each with a good row of every config."""
    people = {"forget_10": "001", "retain_90": 2, "Test_Set": "001", "Retain_Set": "R1"}
    names = {"forget10": "Ann", "retain90": "Bob", "retain_perturbed": "Bob", "real_faces": "x", "real_world": "y"}
    names |= {"forget10_perturbed": "Ann"}
    clear = {config: clear_row(name) for config, name in names.items()}
    texts = {"forget10+tofu": "Ann", "retain90+tofu": "Bob"}
    clear |= {config: clear_row(name, question=f"Who is {name}?") for config, name in texts.items()}
    return (Mllmu, {config: mllmu_row(row_id) for config, row_id in people.items()}), (Clear, clear)


def parquet_row(data: bytes) -> None:
    """Reads a snapshot in which a column of a row has another value: four bytes choose both, and the rest is the value.

    The value is what JSON makes of it, or a text, or bytes if it is neither.
    """
    choice, rest = data[:4].ljust(4, b"\0"), data[4:]
    cls, good = good_rows()[choice[0] % 2]
    config = sorted(good)[choice[1] % len(good)]
    column = sorted(good[config])[choice[2] % len(good[config])]
    snapshot = Rows(good, config, {column: table_value(rest, as_json=bool(choice[3] % 2))})

    class InMemory(cls):
        def open_snapshot(self, part: str) -> Any:
            return contextlib.nullcontext(snapshot)

    with InMemory().rows("evaluation") as sets:
        for rows in sets.values():
            for row in rows:
                json.dumps([vars(example) | {"image": None} for example in row], ensure_ascii=False).encode()


def table_value(data: bytes, as_json: bool) -> Any:
    """A value that a table may hold."""
    try:
        text = data.decode()
        return json.loads(text) if as_json else text
    except (ValueError, RecursionError):
        return data


@functools.cache
def tokenizer() -> Any:
    """The tokenizer of tiny_llava."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(TINY_LLAVA), local_files_only=True)


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Ann"}]},
    {"role": "user", "content": [{"type": "text", "text": "And what is the job?"}]},
]


def chat_template(data: bytes) -> None:
    """Renders a conversation with the bytes as the template."""
    prompt = ChatTemplate(data.decode("utf-8", "replace"), "chat_template.jinja").render(tokenizer(), MESSAGES)
    assert "And what is the job?" in prompt


def config_override(data: bytes) -> None:
    """Sets fields of a config as a command line does, and writes it as config.json is written."""
    config = RunConfig().override(data.decode("utf-8", "surrogateescape"))
    values = json_files.parse_json(config.to_json(), "config.json")
    assert RunConfig.from_dict(values).to_json() == config.to_json()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "safetensors": safetensors_header,
    "index": index_file,
    "metadata": metadata,
    "parquet": parquet_row,
    "template": chat_template,
    "override": config_override,
}

ENTRY = b'{"a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}'
LINE = b'{"file_name": "a.png", "question": "Who?", "answer": "x", "options": ["x", "y"], "person": "Ann"}\n'
SEEDS: dict[str, tuple[bytes, ...]] = {
    "safetensors": (framed(ENTRY, 8), b"\x01\x08" + ENTRY, b"\x01\x00" + b'{"__metadata__": {"format": "pt"}}'),
    "index": (
        b'{"metadata": {}, "weight_map": {"a": "%s", "b": "%s"}}' % ((SHARD.encode(),) * 2),
        b'{"weight_map": 1}',
    ),
    "metadata": (
        LINE,
        LINE + b'{"question": "Who?", "answer": "y"}\n',
        b'{"file_name": "../a.png", "question": "?"}\n',
    ),
    "parquet": (
        b"\x00\x01\x00\x00" + json.dumps({"Pure_Text_Questions": [options()]}).encode(),
        b"\x00\x01\x01\x01" + b'[{"Type": "Pure_Text", "Question": "Who?", "Ground_Truth": "x"}]',
        b"\x00\x01\x02\x01" + b"93.0",
        b"\x01\x04\x07\x01" + b'["x", "y"]',
        b"\x01\x02\x09\x00" + b"['x', None]",
        b"\x00\x00\x04\x01" + b'{"bytes": null, "path": "x"}',
    ),
    "template": (
        (TINY_LLAVA / "chat_template.jinja").read_bytes(),
        b"{% for m in messages %}{{ m.content }}{% endfor %}",
        b"{{ raise_exception('no') }}{{ messages[-1]['content'][0]['text'] | trim }}",
        b"{% set x = namespace(y=1) %}{% macro z(a) %}{{ a + 1 }}{% endmacro %}{{ z(x.y) }}{{ eos_token }}",
    ),
    "override": (
        b"train.steps=3 train.learning_rate=1e-3 method.taps=('projector',)",
        b"method.mask_keep=None data.source=x eval.protocol=letter,options",
        b"train.batch_size.forget=8 attacks.relearn.shares=(0.1,1.0) mesh.fsdp=-1 model.create={'a':1}",
    ),
}


def accepts(target: Callable[[bytes], None], data: bytes) -> bool:
    """Whether a target accepts these bytes; anything but a `UserError` of a line that can be shown is raised."""
    try:
        target(data)
    except UserError as error:
        assert str(error).strip()
        return False
    return True
