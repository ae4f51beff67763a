"""Why a value is kept or recomputed, and what two plans differ in: every number simulated again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

import planner
from planner import Plan, PlannerError
from planner.options import Search
from planner.solving.priced import PricedStep, prepare
from planner.units import bytes_text, seconds_text
from planner.view.explain import Alternative, Explanation
from planner.view.layers import layers_of, recompute_seconds, rows_of
from tests import tiny
from tests.made_plans import made_plan, stack, value


@pytest.fixture(scope="module")
def step() -> PricedStep:
    model = tiny.seeded(tiny.gpt2)
    return prepare(model, tiny.gpt2_batch(), costs="roofline", optimizer=torch.optim.AdamW)


@pytest.fixture(scope="module")
def plan(step: PricedStep) -> Plan:
    low, high = step.floor_bytes, step.baseline.peak_bytes
    return step.plan_bytes((low + high) // 2, search=Search("greedy"))


@pytest.fixture(scope="module")
def roomy(step: PricedStep) -> Plan:
    return step.plan_bytes(2 * step.baseline.peak_bytes)


@pytest.fixture(scope="module")
def loaded(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(path)
    return planner.load(path)


def check(step: PricedStep, plan: Plan, a: Alternative) -> None:
    """The alternative is a schedule that runs, and its figures are the simulator's."""
    assert set(a.sequence) == set(plan.sequence)
    line = step.outline.judge(step.outline.steps(a.sequence))
    assert a.peak_bytes == line.peak_bytes and a.over_bytes == line.peak_bytes - plan.budget_bytes
    assert a.steps_over == (line.live_bytes > plan.budget_bytes).sum()
    assert a.peak_op == a.sequence[line.peak_step]
    assert a.recompute_s == pytest.approx(line.recompute_seconds, rel=1e-12)
    assert a.extra_s == pytest.approx(line.recompute_seconds - plan.recompute_s, abs=1e-12)


def test_every_value_is_explained_by_schedules_that_run(step: PricedStep, plan: Plan) -> None:
    seconds = recompute_seconds(plan)
    told = 0
    for p, spent_s in zip(plan.placements, seconds, strict=True):
        why = plan.explain(p.name)
        assert why.placements == (p,) and why.bytes == p.bytes and why.recompute_s == spent_s
        assert f"`{p.name}` ({p.op} in " in str(why) and bytes_text(p.bytes) in str(why)
        assert (why.if_kept is not None) == (p.decision == "recompute")
        if p.decision == "free":
            assert why.if_recomputed is None and "the backward never reads it" in str(why)
        for a in (why.if_kept, why.if_recomputed):
            if a is not None:
                check(step, plan, a)
                told += 1
        if why.if_kept is not None:
            assert why.if_kept.sequence.count(p.call) == 1 < plan.sequence.count(p.call)
            assert why.if_kept.extra_s <= -spent_s + 1e-12  # its own seconds, and what ran only for it
        if why.if_recomputed is not None:
            assert why.if_recomputed.sequence.count(p.call) == 2
        assert len(why.sentences) <= 3
    assert told > 20


def test_the_sentences_say_the_numbers(plan: Plan) -> None:
    whys = [plan.explain(p.name) for p in plan.placements if p.decision == "recompute"]
    why = next(why for why in whys if why.if_kept is not None and why.if_kept.over_bytes > 0)
    a = why.if_kept
    assert a is not None
    text = str(why)
    assert f"save {seconds_text(-a.extra_s)} ({-a.extra_s / plan.step_s:.2%} of the step)" in text
    assert f"{bytes_text(a.over_bytes)} over the budget of {bytes_text(plan.budget_bytes)}" in text
    assert f"at `{a.peak_op}` in " in text
    enough = re.search(r"A budget of ([\d.]+) GB has room", text)
    assert enough is not None
    assert a.peak_bytes <= float(enough[1]) * 1e9 <= a.peak_bytes + 1001
    kept = [plan.explain(p.name) for p in plan.placements if p.decision == "save"]
    lower = next(k for k in kept if k.if_recomputed and k.if_recomputed.peak_bytes < plan.peak_bytes)
    assert lower.if_recomputed is not None
    saved = plan.peak_bytes - lower.if_recomputed.peak_bytes
    assert f"take {seconds_text(lower.if_recomputed.extra_s)} (" in str(lower)
    assert f"lower the peak by {bytes_text(saved)}" in str(lower)
    fed = sum(p.bytes for p in plan.placements if p.decision == "recompute") / 1e6
    assert f"costs {seconds_text(plan.recompute_s / fed)} per MB on average" in str(lower)


def test_ancestors_that_would_run_too_are_named(step: PricedStep, plan: Plan) -> None:
    """Keeping or remaking a value changes how often others run; they and no others are told of."""
    for p in plan.placements:
        why = plan.explain(p.name)
        for a in (why.if_kept, why.if_recomputed):
            if a is not None:
                differ = {n for n in set(plan.sequence) if plan.sequence.count(n) != a.sequence.count(n)}
                assert set(a.along) == differ - {p.call}
                for name in a.along[:3]:
                    assert f"`{name}`" in str(why)


def test_what_the_model_returns_is_no_choice(step: PricedStep, plan: Plan) -> None:
    held = [v.name for v in step.graph.values if v.kind == "output"]
    for p in plan.placements:
        if p.name in held:
            assert "the model returns it" in str(plan.explain(p.name))
            assert plan.explain(p.name).if_recomputed is None


def test_a_module_is_the_sum_of_its_values(step: PricedStep, plan: Plan) -> None:
    name = "transformer.h.0"
    why = plan.explain(name)
    inside = [p for p in plan.placements if p.module == name or p.module.startswith(name + ".")]
    assert why.placements == tuple(inside)
    assert (
        why.bytes == why.kept_bytes + why.recomputed_bytes + why.freed_bytes == sum(p.bytes for p in inside)
    )
    assert f"makes {len(inside)} values" in str(why) and bytes_text(why.bytes) in str(why)
    assert why.if_kept is not None and why.if_recomputed is not None
    check(step, plan, why.if_kept)
    check(step, plan, why.if_recomputed)
    assert why.if_kept.recompute_s < plan.recompute_s < why.if_recomputed.recompute_s
    for row in rows_of(layers_of(plan), 16):  # the names in the summary
        assert row.name in plan.summary()
        found = plan.explain(row.name).placements
        assert {p.name for of in row.layers for p in of.placements} <= {p.name for p in found}


def test_names_with_their_module_and_the_model_itself(plan: Plan) -> None:
    p = next(p for p in plan.placements if p.module)
    assert plan.explain(f"{p.module}.{p.name}").placements == (p,)
    assert all(not p.module for p in plan.explain("(model itself)").placements)


def test_the_end_of_a_path_will_do_where_it_means_one_thing(plan: Plan) -> None:
    for full in ("transformer.h.0", "transformer.h.1.mlp", "transformer.ln_f"):
        for part in (full.split(".", 1)[1], full):
            why = plan.explain(part)
            assert why.name == full and str(why) == str(plan.explain(full))
    p = next(p for p in plan.placements if p.module.startswith("transformer.h.1."))
    why = plan.explain(f"{p.module.removeprefix('transformer.h.')}.{p.name}")
    assert why.name == f"{p.module}.{p.name}" and why.placements == (p,)
    with pytest.raises(ValueError, match=r"no value or module .* called '\.0'"):
        plan.explain(".0")  # not at the edge of a name
    with pytest.raises(ValueError, match=r"no value or module .* called 'n_f'"):
        plan.explain("n_f")


def test_the_end_of_several_paths_lists_them() -> None:
    blocks = made_plan(stack(10))
    assert len(blocks.explain("h.7").placements) == 3
    assert blocks.explain("h.7.mlp.v7_1").placements == blocks.explain("v7_1").placements
    with pytest.raises(ValueError, match=r"^'mlp' is the end of 10 paths in this plan of Made: ") as told:
        blocks.explain("mlp")
    assert re.findall(r"[\w.]+\.mlp\b", str(told.value)) == [f"net.h.{i}.mlp" for i in range(8)]
    assert str(told.value).endswith(" and 2 more; write more of the one that is meant")
    with pytest.raises(ValueError, match=r": a\.x\.b, c\.x\.b; write more"):
        made_plan([value("one", "a.x.b"), value("two", "c.x.b")]).explain("x.b")
    # What is called so goes before what only ends so.
    same = made_plan([value("one", "b"), value("two", "a.b")])
    assert [p.name for p in same.explain("b").placements] == ["one"]


def test_a_plan_with_room_recomputes_nothing(roomy: Plan) -> None:
    p = next(p for p in roomy.placements if p.decision == "save" and p.bytes > 1000)
    assert "The plan recomputes nothing" in str(roomy.explain(p.name))


def test_a_loaded_plan_explains_itself_alike(plan: Plan, loaded: Plan) -> None:
    for p in plan.placements[::7]:
        assert str(loaded.explain(p.name)) == str(plan.explain(p.name))


def test_a_file_without_its_step_says_what_it_can(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    plan.save(path)
    record = json.loads(path.read_text())
    del record["outline"]
    path.write_text(json.dumps(record))
    old = planner.load(path)
    p = next(p for p in old.placements if p.decision == "recompute")
    why = old.explain(p.name)
    assert why.if_kept is None and "is recomputed" in str(why) and "holds no graph" in str(why)
    with pytest.raises(PlannerError, match="holds no graph"):
        old.to_memory_snapshot(tmp_path / "s.pickle")
    assert not (tmp_path / "s.pickle").exists()


def test_unknown_names_are_told_what_is_near(plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"called 'transformer.h.0.mlq'; near it: transformer.h.0.mlp"):
        plan.explain("transformer.h.0.mlq")
    with pytest.raises(ValueError, match="called ''; there are "):
        plan.explain("")
    with pytest.raises(TypeError, match="name of a value or a module"):
        plan.explain(3)  # type: ignore[arg-type]


def test_an_explanation_prints_as_its_sentences(plan: Plan) -> None:
    why = plan.explain(plan.placements[0].name)
    assert isinstance(why, Explanation) and repr(why) == str(why) == "\n".join(why.sentences)


# -- diff -----------------------------------------------------------------------------------------


def test_a_diff_adds_up(plan: Plan, roomy: Plan) -> None:
    d = plan.diff(roomy)
    was, now = ({p.name: p for p in x.placements} for x in (plan, roomy))
    assert [c.name for c in d.changed] == [
        n for n in now if n not in was or was[n].decision != now[n].decision
    ] + [n for n in was if n not in now and was[n].decision != "free"]
    assert d.peak_bytes == roomy.peak_bytes - plan.peak_bytes > 0
    assert d.overhead == -plan.overhead and d.recompute_s == -plan.recompute_s
    kept = [sum(p.bytes for p in x.placements if p.decision == "save") for x in (plan, roomy)]
    assert d.kept_bytes == kept[1] - kept[0]
    assert sum(row.changed for row in d.layers) == len(d.changed)
    assert math.fsum(row.recompute_s for row in d.layers) == pytest.approx(-plan.recompute_s, rel=1e-9)
    text = str(d)
    assert bytes_text(plan.peak_bytes) in text and bytes_text(roomy.peak_bytes) in text
    assert f"{len(d.changed)} values decided otherwise" in text and "recomputed -> kept" in text
    frame = d.to_dataframe()
    assert list(frame["name"]) == [c.name for c in d.changed]
    assert frame["bytes"].sum() == sum(c.bytes for c in d.changed)
    back = roomy.diff(plan)
    assert back.kept_bytes == -d.kept_bytes and {c.name for c in back.changed} == {c.name for c in d.changed}


def test_a_plan_does_not_differ_from_itself(plan: Plan, loaded: Plan) -> None:
    d = plan.diff(loaded)
    assert not d.changed and not d.layers and not d.notes and not d.to_dataframe().size
    assert "0 values decided otherwise" in str(d)


def test_plans_of_other_models_and_other_sizes(plan: Plan) -> None:
    other = tiny.planned(tiny.seeded(tiny.blocks), (torch.zeros(4, 32),))
    with pytest.raises(PlannerError, match=r"different models: GPT2LMHeadModel with .* and Sequential"):
        plan.diff(other)
    larger = tiny.planned(tiny.seeded(tiny.blocks), (torch.zeros(8, 32),))
    assert "different steps" in str(other.diff(larger)) and not other.diff(larger).changed
    with pytest.raises(TypeError, match="two plans"):
        plan.diff("plan.json")  # type: ignore[arg-type]
