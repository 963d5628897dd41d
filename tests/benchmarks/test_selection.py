"""The people of a request in place of a benchmark's forget set."""

import dataclasses

import pytest

from vkd_jax import benchmarks
from vkd_jax.benchmarks.selection import select_people
from vkd_jax.config.request import RequestConfig
from vkd_jax.types import Example, UserError, person_digest

MLLMU = benchmarks.create("mllmu", {})
TRAINED = ("forget", "retain", "finetune_forget", "finetune_retain")


def example(name, person):
    return Example(f"{name}/{person}", person, b"image", f"{name}/{person}", "Who?", person or "a cat")


def sets_of(forget="ab", retain="cd", names=("forget", "test", "retain", "retain_test", "real")):
    people = dict(forget=forget, test=forget, retain=retain, retain_test=retain, real=[""])
    people |= dict(finetune_forget=forget, finetune_retain=retain)
    return {name: [example(name, person) for person in people[name]] for name in names}


def request(people, earlier=""):
    return RequestConfig(tuple(map(person_digest, people)), tuple(map(person_digest, earlier)))


def people_in(sets):
    return {name: "".join(e.person for e in examples) for name, examples in sets.items()}


def test_every_question_goes_where_its_person_belongs():
    selected = select_people(MLLMU, sets_of(), request("ac", "d"))
    assert people_in(selected) == {"forget": "ac", "test": "ac", "retain": "b", "retain_test": "b", "real": ""}
    assert [e.id for e in selected["forget"]] == ["forget/a", "retain/c"]
    assert len({e.id for e in selected["test"]}) == 2


def test_a_benchmark_that_trains_on_other_sets_than_it_asks_is_divided_twice():
    selected = select_people(benchmarks.create("clear", {}), sets_of(names=TRAINED), request("c"))
    assert people_in(selected) == dict(forget="c", retain="abd", finetune_forget="c", finetune_retain="abd")


def test_a_benchmark_without_a_set_keeps_none_of_its_questions():
    sets = sets_of(names=("forget", "test", "retain"))
    selected = select_people(benchmarks.create("folder", {}), sets, request("c"))
    assert people_in(selected) == {"forget": "c", "retain": "abd"}  # nobody has asked about other images of c


@pytest.mark.parametrize(
    ("name", "sets", "asked", "problem"),
    [
        ("mllmu", sets_of(), request("ae"), "1 of the 2 people of this request are not in the data"),
        ("mllmu", sets_of(), request("abcd"), "nobody would be retained: all 4 people"),
        ("mllmu", sets_of(), request("ab", "cd"), "nobody would be retained"),
        ("mllmu", sets_of(retain="bc"), request("a"), "in its forget and in its retain set (b)"),
        (
            "ppu",
            sets_of(names=("forget", "retain", "finetune_forget", "finetune_retain")),
            request("a"),
            "several sets",
        ),
        ("covubench", sets_of(names=("forget", "retain", "finetune_retain")), request("a"), "trains on other people"),
    ],
)
def test_requests_that_cannot_be_selected_are_refused(name, sets, asked, problem):
    with pytest.raises(UserError) as error:
        select_people(benchmarks.create(name, {}), sets, asked)
    assert problem in str(error.value)


def test_questions_about_nobody_are_retained():
    sets = sets_of()
    sets["retain"].append(dataclasses.replace(example("retain", ""), id="retain/street"))
    kept = [e.id for e in select_people(MLLMU, sets, request("c"))["retain"]]
    assert kept == ["forget/a", "forget/b", "retain/d", "retain/street"]


@pytest.mark.parametrize("field", ["people", "earlier"])
def test_people_are_given_by_digests(field):
    values = {"people": (person_digest("a"),), "earlier": ()}
    with pytest.raises(UserError, match=f"request.{field}: .*SHA-256"):
        RequestConfig(**values | {field: ("a",)})
