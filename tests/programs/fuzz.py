"""fuzz.py TARGET [--runs=100000] [--seed=1] [--keep=FOLDER]: looks for bytes that a reader neither accepts nor refuses.

Atheris (pip install atheris, Python 3.11 on Linux) changes the inputs, guided by the branches of vkd_jax that they
reach; every other change replaces a value in the JSON of an input, which bytes seldom leave intact. The line on TARGET
has the number of runs, of accepted inputs and of seconds. Any exception but UserError ends the program with its
traceback, and the input is written to the folder of --keep.
"""

import argparse
import json
import logging
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris

MEMORY = 8 << 30  # bytes of address space: a text of a hostile size is a MemoryError, not the end of the machine
SECONDS = 60  # of one input

VALUES = [None, True, False, 0, -1, 1, 8, 2**31, 2**63, 10**30, 0.5, -0.0, float("nan"), float("inf"), 93.0]
VALUES += [
    "",
    " ",
    "..",
    "../a.png",
    "/",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "x" * 300,
    "[1]",
    "{}",
    "A",
    [],
    {},
    [1],
    {"a": 1},
]
WORDS = {  # what bytes are also made of
    "template": "{{ }} {% %} {# #} for in if else endif endfor set macro endmacro call filter messages m content role"
    " text type loop raise_exception namespace range | + ~ * ** / % [ ] ( ) . : 'x' 1 0 is not defined string join trim"
    " tojson __class__ __mro__ eos_token add_generation_prompt break continue generation strftime_now",
    "override": "seed stage model.create model.path train.steps train.learning_rate train.batch_size method.name"
    " train.batch_size.forget method.taps method.mask_keep data.benchmark data.cache eval.protocol attacks.names"
    " attacks.relearn.shares mesh.fsdp finetune.train.epochs compare = ( ) , ' { } None True nan inf 1e400 -1 0 1.5 []"
    " {} 'x' . lambda x:1 1j b'x'",
}

with atheris.instrument_imports(include=["vkd_jax"]):
    import fuzz_targets


def changed(data: bytes, most: int, seed: int) -> bytes:
    """Changes an input: a value in its JSON, or bytes as libFuzzer does."""
    rng = random.Random(seed)
    for start in (0, 2, 4) if rng.random() < 0.5 else ():
        try:
            new = data[:start] + spliced(data[start:], rng)
        except (ValueError, RecursionError):
            continue
        return new[:most]
    return atheris.Mutate(data, most)


def spliced(data: bytes, rng: random.Random) -> bytes:
    """JSON, or the first line of JSON Lines, in which one value or key is another one."""
    line, separator, rest = data.partition(b"\n")
    document = json.loads(line)
    parent, key, value = None, None, document
    while isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        parent, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = parent[key]
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.7:
        new = spliced(value.encode(), rng).decode()  # JSON within a text
    else:
        new = rng.choice(VALUES)
    if parent is None:
        document = new
    elif isinstance(parent, dict) and rng.random() < 0.2:
        parent[str(new)] = parent.pop(key)
    else:
        parent[key] = new
    return json.dumps(document).encode() + separator + rest


def main() -> None:
    """Runs the fuzzer; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=fuzz_targets.TARGETS)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", default=tempfile.gettempdir())
    args = parser.parse_args()
    logging.disable()  # readers warn about rows without a question
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    target, start, count, accepted = fuzz_targets.TARGETS[args.target], time.monotonic(), 0, 0

    def run(data: bytes) -> None:
        nonlocal count, accepted
        count, accepted = count + 1, accepted + fuzz_targets.accepts(target, data)
        if count == args.runs:
            print(f"{args.target}: {count} runs, {accepted} accepted, {time.monotonic() - start:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(fuzz_targets.SEEDS[args.target]):
            (Path(corpus) / str(number)).write_bytes(data)
        flags = [f"-runs={args.runs}", f"-seed={args.seed}", f"-timeout={SECONDS}", "-max_len=4096", "-verbosity=0"]
        if words := WORDS.get(args.target, "").split():
            dictionary = Path(corpus).with_suffix(".words")
            dictionary.write_text("".join(f'"{word}"\n' for word in words))
            flags.append(f"-dict={dictionary}")
        flags.append(f"-artifact_prefix={args.keep}/")
        atheris.Setup([sys.argv[0], *flags, corpus], run, custom_mutator=changed)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
