"""Collectives read from HLO text: bytes by hand, loops, fusions, asynchronous pairs, and a real program."""

import pytest

from vkd_jax import hlo

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


def test_a_collective_in_a_loop_counts_for_each_turn():
    gather, reduce = hlo.collectives(LOOP, 4)
    assert gather == hlo.Collective("all-gather", "bf16[8,128]", 8 * 128 * 2, 4, 32)
    assert gather.sent == 3 / 4 * 2048 * 32
    assert reduce == hlo.Collective("all-reduce", "f32[64]", 256, 2, 1)
    assert reduce.sent == 2 * 1 / 2 * 256


def test_what_the_compiler_noted_goes_before_the_condition():
    noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"},"x":{}}')
    assert hlo.collectives(noted, 4)[0].times == 7


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
    (found,) = hlo.collectives(entry(f"%r = {line}"), 8)
    assert (found.kind, found.nbytes, found.group, found.sent) == (kind, size, group, sent)


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
    (found,) = hlo.collectives(
        entry("%f = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2", more=fused), 4
    )
    assert (found.kind, found.nbytes, found.sent) == ("reduce-scatter", 8, 24)


def test_a_group_of_one_sends_nothing():
    assert hlo.collectives(entry("%r = f32[8] all-reduce(%p), replica_groups=[4,1]<=[4]"), 4) == []
    assert hlo.collectives(entry("%r = f32[8] all-reduce(%p), replica_groups={{0},{1}}"), 2) == []


def test_bytes_of_types():
    assert hlo.nbytes("(bf16[8,128]{1,0:T(8,128)(2,1)}, s4[3], pred[])") == 2048 + 2 + 1
    assert hlo.nbytes("f32[]") == 4
