"""What is read from HLO text, by hand: collectives, cycles, and refusals."""

import pytest

from vkd_jax.planner import hlo

LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %w = bf16[2,128]{1,0:T(2,128)(2,1)} get-tuple-element(%state), index=1
  %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%w), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %out = (s32[], bf16[8,128]{1,0}) tuple(%i, %all-gather.1)
}

%condition (state.1: (s32[], bf16[8,128])) -> pred[] {
  %state.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main.1 (p: bf16[8,128]) -> f32[64] {
  %p = bf16[8,128]{1,0} parameter(0)
  %loop = (s32[], bf16[8,128]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %all-reduce.7 = f32[64]{0:T(128)} all-reduce(%grads), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


def entry(*lines, more=""):
    return more + "ENTRY %main (p: f32[4]) -> f32[4] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def test_a_collective_in_a_loop_counts_in_each_iteration():
    gather, reduce = hlo.collectives(LOOP, 4)
    assert gather == hlo.Collective("all-gather", 8 * 128 * 2, 4, 32)
    assert gather.sent == 3 / 4 * 2048 * 32
    assert reduce == hlo.Collective("all-reduce", 256, 2, 1)
    assert reduce.sent == 2 * 1 / 2 * 256


def test_what_the_compiler_noted_goes_before_the_condition():
    noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"},"x":{}}')
    assert hlo.collectives(noted, 4)[0].times == 7


def test_cycles_are_those_of_every_iteration():
    """Two in each of 32 iterations, and three once; instructions without an estimate do not count."""
    marked = LOOP
    for opcode, count in (("all-gather(", 2), ("all-reduce(", 3)):
        line = next(line for line in LOOP.splitlines() if opcode in line)
        marked = marked.replace(line, line + f', backend_config={{"estimated_cycles":"{count}"}}')
    assert hlo.cycles(marked) == 2 * 32 + 3


def test_a_fusion_has_the_cycles_of_its_own_estimate():
    fused = '%f (p: f32[4]) -> f32[4] {\n  %n = f32[4] negate(%p), backend_config={"estimated_cycles":"5"}\n}\n'
    call = '%r = f32[4] fusion(%p), calls=%f, backend_config={"estimated_cycles":"7"}'
    assert hlo.cycles(entry(call, more=fused)) == 7


def test_loops_in_loops_multiply():
    outer = LOOP.replace("ENTRY %main.1", "%inner").replace("f32[64]{0:T(128)} all-reduce", "f32[64] add")
    call = '%l = (s32[]) while(%i), condition=%none, body=%inner, backend_config={"known_trip_count":{"n":"3"}}'
    (gather,) = hlo.collectives(entry(call, more=outer), 4)
    assert gather.times == 96


@pytest.mark.parametrize(
    ("line", "kind", "size", "group", "sent"),
    [
        ("f32[16]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%a", "reduce-scatter", 64, 4, 192),
        ("f32[16] all-to-all(%x), replica_groups={{0,1,2,3}}", "all-to-all", 64, 4, 48),
        ("s8[16] collective-permute(%x), source_target_pairs={{0,1}}", "collective-permute", 16, 8, 16),
        ("(f32[4], s8[4]) all-reduce(%x, %y), replica_groups={}, to_apply=%a", "all-reduce", 20, 8, 35),
        ("(s4[2,4]{1,0:T(8,128)}, s4[8,4]) all-gather-start(%x), replica_groups=[1,4]<=[4]", "all-gather", 16, 4, 12),
        ("((f32[1], s8[1]), (f32[8], s8[8])) all-gather-start(%x, %y)", "all-gather", 40, 8, 35),
        ("(s8[9], s8[9], u32[], u32[]) collective-permute-start(%x)", "collective-permute", 9, 8, 9),
    ],
)
def test_bytes_of_each_kind_by_hand(line, kind, size, group, sent):
    (collective,) = hlo.collectives(entry(f"%r = {line}"), 8)
    assert (collective.kind, collective.nbytes, collective.group, collective.sent) == (kind, size, group, sent)


def test_an_asynchronous_pair_counts_once():
    lines = (
        "%s = (f32[2], f32[8]) all-gather-start(%p), replica_groups=[1,4]<=[4]",
        "%d = f32[8] all-gather-done(%s)",
        "%a = ((f32[8]), f32[2]) async-start(%p), calls=%wrapped",
        "%b = f32[2] async-done(%a), calls=%wrapped",
    )
    wrapped = "%wrapped (p: f32[8]) -> f32[2] {\n  ROOT %r = f32[2] reduce-scatter(%p), replica_groups=[1,4]<=[4]\n}\n"
    assert [x.kind for x in hlo.collectives(entry(*lines, more=wrapped), 4)] == ["all-gather", "reduce-scatter"]


def test_a_fusion_that_keeps_its_own_part_is_a_reduce_scatter():
    fused = (
        "%all-reduce-scatter.2 (p: f32[8]) -> f32[2] {\n  %r = f32[8] all-reduce(%p), replica_groups=[1,4]<=[4]\n}\n"
    )
    (collective,) = hlo.collectives(
        entry("%f = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2", more=fused), 4
    )
    assert (collective.kind, collective.nbytes, collective.sent) == ("reduce-scatter", 8, 24)


def test_a_group_of_one_sends_nothing():
    assert hlo.collectives(entry("%r = f32[8] all-reduce(%p), replica_groups=[4,1]<=[4]"), 4) == []
    assert hlo.collectives(entry("%r = f32[8] all-reduce(%p), replica_groups={{0},{1}}"), 2) == []


def test_bytes_of_types():
    assert hlo.nbytes("(bf16[8,128]{1,0:T(8,128)(2,1)}, s4[3], pred[])") == 2048 + 2 + 1
    assert hlo.nbytes("f32[]") == 4
    types = "(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s4[3]{0:S(0)}, f32[2,2]{1,0:T(2,128)}, u32[]{:S(2)})"
    assert hlo.nbytes(types) == 2048 + 2 + 16 + 4


# ---- What the compiler refuses ----


@pytest.mark.parametrize(
    ("message", "needs", "sentence"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (15.93G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org",
            15.93 * 2**30,
            "the step requires 15.93 GiB of 15.75 GiB, 0.18 GiB too much",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G "
            "of 15.75G hbm. Exceeded hbm capacity by 4.35G.\n\nTotal hbm usage >= 20.35G:\n    reserved   258.00M\n"
            "    program          20.10G \n    arguments            0B \n",
            20.10 * 2**30,
            "the step requires 20.10 GiB of 15.75 GiB, 4.35 GiB too much",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.00T of 30.75G hbm.\n"
            "    program    1.00T\n    arguments    512.0G\n",
            1536 * 2**30,
            "the step requires 1536.00 GiB of 30.75 GiB, 1505.25 GiB too much",
        ),
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (15.75G) exceeds available HBM (15.75G)",
            15.75 * 2**30,
            "the step requires 15.75 GiB of 15.75 GiB, a few MiB too much",
        ),
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeVmemOom: Ran out of memory in memory space vmem. Used 33M of 16M",
            None,
            "Ran out of memory in memory space vmem. Used 33M of 16M",
        ),
        ("INTERNAL: Mosaic failed:\n  to compile", None, "Mosaic failed:"),
        ("", None, "the compiler gives no reason"),
    ],
)
def test_each_form_of_a_refusal_is_a_number_and_a_sentence(message, needs, sentence):
    refusal = hlo.Refusal.parse(message)
    assert refusal.required == (None if needs is None else pytest.approx(needs, abs=1))
    assert refusal.sentence == sentence


# ---- Chains ----

CHAIN = """
%start (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %p = bf16[2,8] parameter(0)
  %g1 = bf16[8,8] all-gather(%p), replica_groups=mesh['a'=4] {'a'}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %c1 = (bf16[2,8], bf16[8,8]) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (q: bf16[2,8], r: bf16[8,8], x: f32[16]) -> (f32[16], bf16[2,8], bf16[8,8]) {
  %q = bf16[2,8] parameter(0)
  %r = bf16[8,8] parameter(1)
  %x = f32[16] parameter(2)
  %y = f32[16] negate(%x)
  %g2 = bf16[8,8] all-gather(%q), replica_groups=mesh['a'=4] {'a'}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %t = (f32[16], bf16[2,8], bf16[8,8]) tuple(%y, %q, %r)
}

%end (s: bf16[2,8], u: bf16[8,8]) -> bf16[8,8] {
  %s = bf16[2,8] parameter(0)
  %u = bf16[8,8] parameter(1)
  %g3 = bf16[8,8] all-gather(%s), replica_groups=mesh['a'=4] {'a'}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %c3 = bf16[8,8] custom-call(%s, %u, %g3), custom_call_target="AsyncCollectiveDone"
}

"""


def test_a_collective_in_a_chain_of_fusions_counts_once():
    text = entry(
        "%w = bf16[2,8] parameter(0)",
        "%a = (bf16[2,8], bf16[8,8]) fusion(%w), kind=kCustom, calls=%start",
        "%b = bf16[2,8] get-tuple-element(%a), index=0",
        "%c = bf16[8,8] get-tuple-element(%a), index=1",
        "%v = f32[16] parameter(1)",
        "%d = (f32[16], bf16[2,8], bf16[8,8]) fusion(%b, %c, %v), kind=kOutput, calls=%goes_on",
        "%e = bf16[2,8] get-tuple-element(%d), index=1",
        "%f = bf16[8,8] get-tuple-element(%d), index=2",
        "ROOT %h = bf16[8,8] fusion(%e, %f), kind=kCustom, calls=%end",
        more=CHAIN,
    )
    (gather,) = hlo.collectives(text, 16)
    assert (gather.kind, gather.nbytes, gather.group, gather.times) == ("all-gather", 128, 4, 1)


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("mesh['a'=4,'b'=2,'c'=2] {'c'}", 2),
        ("mesh['a'=4,'b'=4] {'b','a'}", 16),
        ("mesh['a'=8,'b'=2] {'a':(2)4}", 4),
        ("[8,2]<=[16]", 2),
    ],
)
def test_groups_by_the_axes_of_a_mesh(groups, chips):
    text = entry(f"ROOT %r = f32[4] all-reduce(%p), replica_groups={groups}, to_apply=%add")
    assert hlo.collectives(text, 32)[0].group == chips
