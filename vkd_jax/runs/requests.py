"""Sequential deletion requests: each is a run of the pipeline that starts from the model of the previous request.

    ledger (JSON lines)     who asked, what was run, hashes of the model before and after, figures; see `runs.ledger`
    WORKDIR/0001, 0002 ...  the workdir of each request's run, with the model and the cached features of its people
    WORKDIR/naive/0002 ...  a baseline: the same requests, each independent of the earlier ones
    WORKDIR/batch/0020      a baseline: one run that forgets the people of all requests
    WORKDIR/data            the data with its images, only while the command runs
    WORKDIR/requests.md     the page: accuracy of every model on everybody who asked so far, and on retained sets

A run that was interrupted resumes with the same command: the pipeline repeats no stage that is complete, and a request
is done when its line is in the ledger.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from vkd_jax.benchmarks.folder import Folder
from vkd_jax.benchmarks.names import name_key, plain_name
from vkd_jax.checkpoints import sources
from vkd_jax.checkpoints.bundle import read_family
from vkd_jax.checkpoints.safetensors_files import Checkpoint
from vkd_jax.config.request import RequestConfig
from vkd_jax.config.schema import RunConfig
from vkd_jax.messages import choices, listed
from vkd_jax.models import base
from vkd_jax.reporting import requests_page
from vkd_jax.results import RunResults
from vkd_jax.runs import features, inputs, pipeline
from vkd_jax.runs.ledger import OWNER, Ledger, Request, append, claim_workdir, hold, read_or_new
from vkd_jax.runs.workdir import check_links, decisive_fields, make_folder
from vkd_jax.runtime import json_files, locks, outputs, records, storage
from vkd_jax.runtime.dataclass_json import encode
from vkd_jax.types import UserError, located, person_digest

MARKS = ("[0-9][0-9][0-9][0-9]", requests_page.JSON, OWNER)  # of a folder of such runs, whose data is removed
BASELINES = ("naive", "batch")
WEIGHT = 1.0  # of the stream of earlier people, unless the config gives one


def add(path: Path, forget: str, test: str = "") -> Request:
    """Adds a request to a ledger.

    Args:
        path: the ledger.
        forget: a folder with images of the people to forget and a metadata.jsonl, or their IDs with commas.
        test: a folder with other images of them, or "".

    Raises:
        UserError: the request is empty, names somebody twice or again, or the folder is invalid.
    """
    known = read_or_new(path)  # before the data, which may take minutes
    is_folder = "://" in forget or os.path.isdir(forget)  # many IDs are too long for a name, which is no error here
    if is_folder:
        people = sorted(Folder(forget=forget, test=test).people_to_forget())
    elif test:
        raise UserError("--test: it belongs to a request by folder; IDs have their other images in the data.")
    elif "/" in forget:
        raise UserError(f"--forget: there is no folder {forget}.")
    elif os.path.splitext(forget)[1] and os.path.isfile(forget):
        raise UserError(f"--forget: {forget} is a file; pass a folder of images, or IDs with commas.")
    else:
        if problem := json_files.text_problem(forget):
            raise UserError(f"--forget: {forget[:40]!a} {problem}; correct it.")
        people = _named(forget)
    digests = [person_digest(person) for person in people]
    folders = [os.path.abspath(x) if x and "://" not in x else x for x in (forget * is_folder, test)]

    def line(ledger: Ledger) -> tuple[str, int, dict[str, Any]]:
        with located("--forget"):
            ledger.check_new(digests)
        fields = {"people": digests, "forget": folders[0], "test": folders[1]}
        return "add", len(ledger.requests) + 1, fields

    return append(path, line, known).requests[-1]


def _named(forget: str) -> list[str]:
    """The IDs of a text that separates them by commas.

    Raises:
        UserError: IDs are separated by semicolons, or two may be one person.
    """
    if ";" in forget:
        raise UserError(f"--forget: {forget[:40]!a} has a semicolon; separate IDs by commas.")
    people = [name for text in forget.split(",") if (name := plain_name(text))]
    names: dict[str, str] = {}
    for name in people:
        if (other := names.setdefault(name_key(name), name)) != name:
            raise UserError(
                f"--forget: {other!a:.40} and {name!a:.40} may be one person; give the ID of the data once."
            )
    return people


def withdraw(path: Path, number: int) -> None:
    """Withdraws a request that was not run, or whose run was interrupted; `purge` then deletes what the run left.

    Raises:
        UserError: there is no such request, or it was or is being run.
    """
    known = Ledger.read(path)
    known.get(number)
    with hold(path, "vkd requests withdraw"):
        append(path, lambda ledger: ("withdraw", ledger.get(number).number, {}), known)


def run(
    path: Path, config: RunConfig, workdir: Path, baselines: Sequence[str] = (), settings: str = "", command: str = ""
) -> dict[str, Any]:
    """Runs all pending requests of a ledger in order, and writes the page.

    Args:
        path: the ledger.
        config: the config of each run; its model is that of the first request.
        workdir: the folder of the runs.
        baselines: of `BASELINES`, what to run beside for comparison.
        settings: settings of the batch baseline beside those of the config, as `RunConfig.override` reads them.
        command: how the program was started, as the results name it.

    Returns:
        What the page shows; see `reporting.requests_page`.

    Raises:
        UserError: the ledger, the config, the data or a model is invalid, or another process uses the ledger.
        Diverged: training diverged.
        Stopped: SIGTERM or SIGINT arrived during training.
    """
    if "://" in str(workdir):
        raise UserError(f"--workdir={workdir}: the runs of requests need a folder of this machine.")
    besides = (path.name,) if path.parent.resolve() == workdir.resolve() else ()
    outputs.check_folder(workdir, "--workdir", MARKS, (locks.FILE, *besides))
    _check(config, baselines)
    if settings.strip() and "batch" not in baselines:
        raise UserError("--batch_settings: they are those of --baselines=batch, which is not given; pass both.")
    with located("--batch_settings"):
        fields = [text.partition("=")[0] for text in set(settings.split())]
        if twice := sorted(field for field in set(fields) if fields.count(field) > 1):
            raise UserError(f"{listed(twice)}: two values are given; keep one.")
        _check(config.override(settings), ())
    Ledger.read(path)
    with hold(path, command), storage.write_errors():
        ledger = Ledger.read(path)
        sequence = RequestRuns(ledger, config, workdir.absolute(), command)
        if all(request.withdrawn for request in ledger.requests):
            raise UserError(f"{path} has no request that was not withdrawn; add one with vkd requests add.")
        if not ledger.pending:
            sequence.check_settings(ledger)
        make_folder(workdir)
        check_links(workdir)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locks.hold(workdir.absolute(), command))
            claim_workdir(workdir, ledger)
            stack.enter_context(sequence.data())  # what it removes is this ledger's only now
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.absolute() / "cache"))
            for request in ledger.pending:
                sequence.run(request)
            collected = sequence.collect(baselines, settings)
            requests_page.write(workdir, collected)
    return collected


def _check(config: RunConfig, baselines: Sequence[str]) -> None:
    """Checks the fields of a config that requests depend on."""
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise UserError(f"--baselines: unknown {listed(unknown)}. Available: {choices(BASELINES)}.")
    if config.stage != "unlearn":
        raise config.model.error("path", f"stage={config.stage} does not start from a model. Use stage=unlearn.")
    if not config.model.path:
        known = f"the people of {config.data.benchmark.label}"
        raise config.model.error("path", f"the config names no model to start from. Give one that knows {known}.")
    if config.attacks.selected:
        raise config.attacks.error("names", "requests are not attacked. Attack the last model with stage=audit.")
    if not hasattr(config.method, "replay") or not config.method.losses():
        raise UserError("method.name: requests need a method that trains on a forget set, such as vkd.")


def _check_hash(folder: Path, digest: str, model: str) -> None:
    """Raises a `UserError` if the model of a folder is not the one that the ledger knows."""
    if model_digest({name: tensor.sha256() for name, tensor in Checkpoint(folder).tensors.items()}) != digest:
        raise UserError(f"{folder} is not {model}, by the hash in the ledger; restore it from a copy.")


def model_digest(digests: Mapping[str, str]) -> str:
    """The digest of a model: the SHA-256 of the JSON object {tensor: SHA-256 of its bytes} with sorted keys."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


class RequestRuns:
    """The runs of the requests of a ledger.

    Args:
        ledger: the ledger.
        config: the config of each run.
        workdir: the folder of the runs.
        command: how the program was started.
    """

    def __init__(self, ledger: Ledger, config: RunConfig, workdir: Path, command: str):
        self.path, self.config, self.workdir, self.command = ledger.path, config, workdir, command
        self._head = ledger.head  # as it was when the command began

    def _ledger(self) -> Ledger:
        """The ledger as it is now, to which requests may have been added."""
        ledger = Ledger.read(self.path)
        ledger.check_continues(self._head)
        return ledger

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Context manager that removes the converted data with its images when the block ends, whatever happens."""
        try:
            yield
        finally:
            shutil.rmtree(self.workdir / "data", ignore_errors=True)

    def run(self, request: Request) -> None:
        """Runs a request, and appends its line to the ledger."""
        ledger = self._ledger()
        config, folder = self._config(ledger, request), self.workdir / f"{request.number:04d}"
        with located(f"request {request.number}"):
            self._check_start(ledger, config)
            logging.info("request %d: %d people ...", request.number, len(request.people))
            if str(folder) not in request.begun:  # so that purge finds it even if the run never ends
                make_folder(folder)  # purge refuses a ledger whose folders are not there
                append(self.path, lambda _: ("begin", request.number, {"run": str(folder)}), ledger)
            pipeline.execute(config, folder, self.command)
            append(self.path, lambda _: ("done", request.number, describe(folder, config)), ledger)

    def _config(self, ledger: Ledger, request: Request, naive_start: str = "") -> RunConfig:
        """The config of a request's run.

        Args:
            ledger: the ledger.
            request: the request.
            naive_start: the folder of the model that the baseline "naive" starts from, which has neither the stream of
                earlier people nor the first model as the teacher; "" for the run of the request itself.
        """
        earlier = [other for other in ledger.finished if other.number < request.number]
        last = earlier[-1].done["run"] if earlier else ""
        section = RequestConfig(
            people=request.people,
            earlier=tuple(person for other in earlier for person in other.people),
            features=tuple(str(Path(other.done["run"]) / features.FOLDER) for other in earlier if not other.purged),
            first=self.config.model.path if earlier and not naive_start else "",
        )
        benchmark = self.config.data.benchmark
        if request.forget:
            if not isinstance(benchmark, Folder):
                raise UserError(
                    f"request {request.number} has images in {request.forget}, which need benchmark=folder in --config."
                )
            benchmark = dataclasses.replace(benchmark, forget=request.forget, test=request.test)
        start = naive_start or (str(Path(last) / "unlearned") if last else self.config.model.path)
        return self._with(section, start, 0.0 if naive_start else None, benchmark)

    def _with(self, section: RequestConfig, start: str, weight: float | None, benchmark: Any) -> RunConfig:
        config, method = self.config, self.config.method
        weight = (method.replay.weight or WEIGHT) if weight is None else weight
        rows = dict(config.train.batch_size)
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, path=start, retain_only="", unlearned=""),
            data=dataclasses.replace(config.data, benchmark=benchmark, cache=config.data.cache or self._cache),
            method=dataclasses.replace(method, replay=dataclasses.replace(method.replay, weight=weight)),
            train=dataclasses.replace(config.train, batch_size={"earlier": rows.get("forget", 1), **rows}),
            request=section,
        )

    @property
    def _cache(self) -> str:
        return str(self.workdir / "data")

    def _check_start(self, ledger: Ledger, config: RunConfig) -> None:
        """Checks that the model to start from is the one that the last request left, and that its blocks can be cached.

        Raises:
            UserError: it is not, or all vision blocks train.
        """
        with located(f"--config.model.path={config.model.path}"):
            folder = sources.fetch_model(config.model.path)
        family, model_config = read_family(folder)
        _, shapes = base.abstract_model(lambda rngs: family.Model(model_config, rngs=rngs))
        features.cached_block(config.method, list(shapes), shapes, model_config)
        if ledger.finished:
            first, last = ledger.finished[0], ledger.finished[-1]
            _check_hash(folder, last.done["model_after"], f"the model that request {last.number} left")
            with located(f"--config.model.path={config.request.first}"):
                _check_hash(
                    sources.fetch_model(config.request.first),
                    first.done["model_before"],
                    f"the model that request {first.number} started from, which retained people are held to",
                )

    def check_settings(self, ledger: Ledger) -> None:
        """Checks that the last finished request was run with this config, since the page names it as that of all.

        Raises:
            UserError: another setting was used.
        """
        last = ledger.finished[-1]
        known = decisive_fields(last.done["config"])
        given = decisive_fields(json.loads(self._config(ledger, last).to_json()))
        own = ("data.cache", "request.features")  # of the workdir, and of what was not purged
        for name in sorted(known.keys() & given.keys() - {*own}):
            if known[name] != given[name]:
                field = "model.path" if name == "request.first" else name
                raise UserError(
                    f"--config.{field}: {given[name]!r:.60} is not the value that request {last.number} was run with, "
                    f"{known[name]!r:.60}, and no request is pending; leave it, or add a request."
                )

    def collect(self, baselines: Sequence[str], settings: str) -> dict[str, Any]:
        """Runs the baselines, and returns what the page shows."""
        ledger = self._ledger()
        rows = [_row(request.done, request.people) for request in ledger.finished]
        sequences: dict[str, Any] = {"requests": rows}
        if rows and baselines:
            if unfit := [r.number for r in ledger.finished if r.forget or r.purged]:
                raise UserError(
                    f"--baselines: request {unfit[0]} was made by a folder or purged, and its images are not kept."
                )
            if "naive" in baselines:
                sequences["naive"] = [rows[0], *self._naive(ledger)]
            if "batch" in baselines:
                sequences["batch"] = [self._batch(ledger, settings)]
        done = ledger.finished[0].done if rows else {}
        keys = ("commit", "versions", "time")
        meta = {"command": self.command, "ledger": ledger.head, **{key: done.get(key) for key in keys}}
        meta |= {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
        return {"meta": meta, "start": done.get("figures", {}).get("before", {}), "sequences": sequences}

    def _naive(self, ledger: Ledger) -> Iterator[dict[str, Any]]:
        """The requests after the first one as if nobody had asked before; the first one is the same."""
        start = str(Path(ledger.finished[0].done["run"]) / "unlearned")
        for request in ledger.finished[1:]:
            folder = self.workdir / "naive" / f"{request.number:04d}"
            config = self._config(ledger, request, naive_start=start)
            pipeline.execute(config, folder, self.command)
            start = str(folder / "unlearned")
            yield _row(describe(folder, config), request.people)

    def _batch(self, ledger: Ledger, settings: str) -> dict[str, Any]:
        """One run that forgets everybody at once."""
        people = tuple(person for request in ledger.finished for person in request.people)
        start, folder = self.config.model.path, self.workdir / "batch" / f"{len(ledger.finished):04d}"
        config = self._with(RequestConfig(people=people), start, 0.0, self.config.data.benchmark).override(settings)
        pipeline.execute(config, folder, self.command)
        return _row(describe(folder, config), people)


def describe(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The fields of a line of the kind "done", from the folder of a finished run."""
    results, manifest = RunResults.read(folder), json_files.read_json(folder / "manifest.json")
    before, after = (
        {name: entry[side] for name, entry in manifest["tensors"].items() if entry[side]}
        for side in ("before", "after")
    )
    figures = {
        "before": requests_page.figures(results, "vanilla"),
        "after": requests_page.figures(results, "unlearned"),
        "text_identical": results.text_logits_identical,
        "language_model_changed": results.manifest.language_model_changed,
        "seconds": round(sum(results.timing.values()), 1),
    }
    entries = records.read_or(folder / records.FILE, {}, "")
    return {
        "run": str(folder),
        "model_before": model_digest(before),
        "model_after": model_digest(after),
        "config": json.loads(config.to_json()),
        "figures": figures,
        "data": json_files.read_json(folder / inputs.FILE)["sets"],
        "features": {name: entries[name] for name in (features.FEATURES, features.QUESTIONS) if name in entries},
        "commit": results.meta.commit,
        "versions": encode(results.meta)["versions"],
    }


def _row(done: Mapping[str, Any], people: Sequence[str]) -> dict[str, Any]:
    return {"people": len(people), **{key: done["figures"][key] for key in done["figures"] if key != "before"}}


def shown(path: Path) -> str:
    """What a ledger says, and which data is held where, as lines of text."""
    ledger = Ledger.read(path)
    lines = [f"{path}: {len(ledger.requests)} requests in {ledger.lines} lines, last hash {ledger.head}"]
    for request in ledger.requests:
        people = f"{len(request.people)} {'person' if len(request.people) == 1 else 'people'}"
        state = "withdrawn" if request.withdrawn else "pending"
        if request.done:
            figures = request.done["figures"]["after"]
            state = f"done {request.done['time']}  {requests_page.sentence(figures)}"
        lines.append(f"{request.number:4}  {people:10}  added {request.time}  {state}")
    folders = [(request, folder) for request in ledger.requests for folder in request.folders]
    if not folders:
        return "\n".join([*lines, "Nothing is held of these people, since no request was run."])
    lines.append("Held of these people, to be deleted by vkd requests purge:")
    for request, folder in folders:
        size = sum(file.stat().st_size for file in (folder / features.FOLDER).glob("*"))
        held = f"{size / 2**20:.1f} MiB of features and questions in {folder / features.FOLDER}"
        answers = f"answers in {folder / 'answers'}" if (folder / "answers").is_dir() else ""
        lines.append(f"{request.number:4}  " + ("; ".join(filter(None, [held * bool(size), answers])) or "nothing"))
    return "\n".join(lines)
