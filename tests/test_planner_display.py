"""What a plan says of itself: every number in the text, the table and the page is the plan's."""

from __future__ import annotations

import dataclasses
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import planner
from planner import Plan, PlannerError, units
from planner.view import bands, block, layers
from tests.made_plans import MB, made_plan, planned_gpt2, stack, value


@pytest.fixture(scope="module")
def gpt2() -> Plan:
    return planned_gpt2()


def shares(text: str) -> list[tuple[float, float]]:
    """(MB, %) of each line of the table of what is at the peak."""
    block = text.split("At the peak")[1].split("\n\n")[0]
    return [(float(a), float(b)) for a, b in re.findall(r"(\d+\.\d+) MB +(\d+\.\d+)%", block)]


# -- text -----------------------------------------------------------------------------------------


def test_summary_states_the_fields_of_the_plan(gpt2: Plan) -> None:
    text = gpt2.summary()
    figures = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    for name, count in (
        ("budget", gpt2.budget_bytes),
        ("predicted peak", gpt2.peak_bytes),
        ("nothing recomputed", gpt2.baseline_peak_bytes),
        ("proved floor", gpt2.floor_bytes),
    ):
        gb, gib = re.findall(r"([\d.]+) Gi?B", figures[name])
        assert float(gb) == pytest.approx(count / 10**9, rel=1e-3)
        assert float(gib) == pytest.approx(count / 2**30, rel=1e-3)
    assert gpt2.overhead > 0.01
    assert f"{100 * gpt2.overhead:.2f}% of step time" in figures["overhead"]
    assert f"{100 * gpt2.overhead_bound:.2f}% of step time" in figures["proved bound"]
    gap = f"gap {100 * gpt2.gap:.2f} points: {gpt2.status}" if gpt2.overhead_bound else "the gap is unknown"
    assert gap in figures["proved bound"]
    assert f"{100 * gpt2.recompute_flops / gpt2.step_flops:.2f}%" in figures["recomputed FLOPs"]
    for fact in (gpt2.model_name, gpt2.device, gpt2.torch_version, gpt2.peak_op):
        assert fact in text
    assert gpt2.cost_source in figures["costs"] and gpt2.solver in figures["solver"]
    assert len(text.splitlines()) <= 50 and max(map(len, text.splitlines())) <= 110


def test_the_parts_of_the_peak_add_up_to_it(gpt2: Plan) -> None:
    parts = shares(gpt2.summary())
    assert len(parts) >= 3
    assert sum(size for size, _ in parts) == pytest.approx(gpt2.peak_bytes / MB, abs=0.02 * len(parts))
    assert sum(share for _, share in parts) == pytest.approx(100, abs=0.1 * len(parts))


def test_the_rows_of_the_summary_add_up_to_the_plan(gpt2: Plan) -> None:
    rows = layers.rows_of(layers.layers_of(gpt2), 16)
    for decision, column in (("save", "kept"), ("recompute", "recomputed"), ("free", "freed")):
        want = sum(p.bytes for p in gpt2.placements if p.decision == decision)
        assert want > 0 and sum(getattr(row, f"{column}_bytes") for row in rows) == want
    total = next(line for line in gpt2.summary().splitlines() if line.startswith("  total"))
    kept = sum(p.bytes for p in gpt2.placements if p.decision == "save")
    assert f"{kept / MB:.2f} MB" in total
    assert all(row.name in gpt2.summary() for row in rows)


def test_recompute_seconds_count_each_call_once(gpt2: Plan) -> None:
    several = [p for p in gpt2.placements if p.op == "aten.native_layer_norm" and p.times_recomputed]
    assert len(several) >= 6  # three outputs each
    assert sum(layers.recompute_seconds(gpt2)) == pytest.approx(gpt2.recompute_s, rel=1e-9)


def test_a_plan_from_a_file_looks_the_same(gpt2: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    dataclasses.replace(gpt2, known_minimum_bytes=gpt2.floor_bytes).save(path)
    loaded = planner.load(path)
    assert loaded.summary() == gpt2.summary()
    assert loaded._repr_html_() == gpt2._repr_html_()
    assert loaded.to_dataframe().equals(gpt2.to_dataframe())
    assert (
        block.block_graph(loaded, "transformer.h.1").nodes == block.block_graph(gpt2, "transformer.h.1").nodes
    )


def test_looking_never_solves() -> None:
    plan = made_plan(stack(3))
    with pytest.raises(PlannerError):
        _ = plan.minimum_peak_bytes
    assert plan.summary() and plan._repr_html_()
    plan.plot_memory()


def test_the_peak_names_the_module_of_a_forward_op() -> None:
    plan = made_plan(stack(2), peak_op="v1_1", peak_module="net.h.1.mlp")
    assert "At the peak, v1_1 in net.h.1.mlp:" in plan.summary()


@pytest.mark.parametrize(
    ("count", "text"),
    [(13_154_321, "13.15 MB"), (8_000_000_000, "8 GB"), (1_500, "1.5 kB"), (999, "999 B"), (0, "0 B")],
)
def test_bytes_in_the_unit_that_fits(count: int, text: str) -> None:
    assert units.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4e-5, "40 \u00b5s"), (0.0, "-")]
)
def test_seconds_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert units.seconds_text(seconds) == text


def test_a_shared_unit_does_not_call_a_little_nothing() -> None:
    unit = units.ByteUnit.of(20 * MB)
    assert (unit.text(1234), unit.text(0), unit.text(1_250_000_000)) == ("<0.01 MB", "-", "1,250.00 MB")


# -- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("net.h.2.mlp", "net.h.2"),
        ("net.h.2", "net.h.2"),
        ("net.embed.norm", "net.embed"),
        ("net", "net"),
        ("stages.0.1.conv", "stages.0.1"),
        ("stages.0.1.shortcut.0", "stages.0.1"),
        ("down.1.3", "down.1"),
        ("stem.0", "stem"),
        ("head", "head"),
        ("", layers.ROOT),
    ],
)
def test_the_layer_of_a_module(module: str, layer: str) -> None:
    others = ["net.h.0.mlp", "stages.0.0.conv", "down.0.3", "stem.1"]
    placements = [value(f"v{i}", path) for i, path in enumerate([*others, module])]
    assert made_plan(placements).to_dataframe()["layer"].iloc[-1] == layer


def test_a_model_of_few_layers_is_shown_by_its_modules() -> None:
    plan = made_plan([value(f"v{i}", str(i)) for i in range(6)])
    assert [layer.path for layer in layers.layers_of(plan)] == list("012345")


def test_alike_layers_fold_and_others_do_not() -> None:
    placements = stack(6)
    odd = next(i for i, p in enumerate(placements) if p.name == "v3_0")
    placements[odd] = dataclasses.replace(placements[odd], decision="recompute", times_recomputed=1)
    made = layers.layers_of(made_plan(placements))
    rows = layers.rows_of(made, 16)
    assert [row.name for row in rows] == ["net.embed", "net.h.[0-2,4-5]", "net.h.3", "head"]
    assert (rows[1].kept_bytes, rows[2].kept_bytes, rows[2].recomputed_bytes) == (5 * MB, 0, 2 * MB)
    assert [row.name for row in layers.rows_of(made, 3)] == ["net.embed", "net.h.[0-5]", "head"]
    assert [row.name for row in layers.depth_rows(made, 8)][1:4] == [f"net.h.{i}" for i in range(3)]


def test_what_does_not_fit_is_gathered_and_nothing_is_lost() -> None:
    placements = [value(f"v{i}", f"part{i}", size=MB * (1 + i % 7)) for i in range(50)]
    rows = layers.rows_of(layers.layers_of(made_plan(placements)), 10)
    assert len(rows) == 10 and rows[-1].name == "(41 smaller)" and not rows[-1].alike
    assert sum(row.total_bytes for row in rows) == sum(p.bytes for p in placements)
    assert min(row.total_bytes for row in rows[:-1]) >= max(
        v.bytes for x in rows[-1].layers for v in x.placements
    )


# -- table ----------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_placement(gpt2: Plan) -> None:
    table = gpt2.to_dataframe()
    assert list(table.columns) == [
        "name", "module", "op", "bytes", "decision", "recompute_s", "times_recomputed",
        "made_at", "freed_at", "recomputed_at", "freed_again_at", "layer",
    ]  # fmt: skip
    for column in ("name", "module", "op", "bytes", "decision", "times_recomputed"):
        assert table[column].tolist() == [getattr(p, column) for p in gpt2.placements]
    for p, made, freed, again, freed_again in zip(
        gpt2.placements,
        *(table[name] for name in ("made_at", "freed_at", "recomputed_at", "freed_again_at")),
        strict=True,
    ):
        assert [gpt2.sequence[t] for t in (made, *again)] == [p.call] * (1 + p.times_recomputed)
        assert made <= freed and all(a <= b for a, b in zip(again, freed_again, strict=True))
        assert sorted([made, freed, *again, *freed_again]) == [t for span in p.spans for t in span]
    assert table["recompute_s"].sum() == pytest.approx(gpt2.recompute_s, rel=1e-9)
    assert (table.loc[table["decision"] != "recompute", "recompute_s"] == 0).all()
    assert set(table["layer"]) >= {f"transformer.h.{i}" for i in range(2)}


# -- HTML -----------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """Collects tags and text, and insists that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_is_static_and_says_what_the_summary_says(gpt2: Plan) -> None:
    page = _Tags(gpt2._repr_html_())
    text = " ".join(page.text)
    rows = layers.rows_of(layers.layers_of(gpt2), 40)
    assert page.seen.count("details") == len(rows) == page.seen.count("summary")
    assert page.seen.count("svg") == 1 and "script" not in page.seen and "link" not in page.seen
    assert not {name for name in page.attributes if name.startswith("on") or name in ("href", "src")}
    facts = [f"{gpt2.overhead:.2%}", units.gb_text(gpt2.budget_bytes), gpt2.peak_op, *(r.name for r in rows)]
    assert [fact for fact in facts if fact not in text] == []


def test_a_notebook_stores_the_summary_too(gpt2: Plan) -> None:
    """Viewers that show no HTML, and those that drop its style sheet, have all of it."""
    shown = gpt2._repr_mimebundle_()
    assert shown == {"text/html": gpt2._repr_html_(), "text/plain": gpt2.summary()}
    bare = _Tags(re.sub(r"<style>.*?</style>", "", shown["text/html"], flags=re.S))
    row = next(r for r in layers.rows_of(layers.layers_of(gpt2), 40) if r.kept_bytes and r.recomputed_bytes)
    kept = units.ByteUnit.of(gpt2.peak_bytes).text(row.kept_bytes)
    assert f"{row.name} kept {kept} recomputed " in "".join(bare.text)


def test_html_escapes_every_name() -> None:
    evil = "<script>alert('x')</script>"
    placements = [value(evil, f"{evil}.{i}.mlp", op=evil) for i in range(3)] + [value("b", evil, "recompute")]
    plan = made_plan(placements, model_name=evil, peak_op=evil, device=evil, solver=evil, cost_source=evil)
    page = _Tags(plan._repr_html_())
    assert "script" not in page.seen
    assert sum(evil in text for text in page.text) >= 6


def test_html_stays_small_for_ten_thousand_values() -> None:
    long = "a_rather_long_name_of_a_module"
    words = ("save", "recompute", "free")
    placements = [
        value(
            f"v{i}", f"{long}.{i // 100}.{long}.{long}_{i}", words[i % 3], size=1 + i, op=f"aten.{long}_{i}"
        )
        for i in range(10_000)
    ]
    text = made_plan(placements)._repr_html_()
    _Tags(text)
    assert len(text.encode()) < 300_000


def test_the_small_picture_keeps_the_peak() -> None:
    level = np.zeros(10_000)
    level[7_777] = 5
    at = bands.highest(level, 320)
    assert len(at) == 320 and 7_777 in at and (np.diff(at) > 0).all()
    assert bands.highest(level[:7], 320).tolist() == list(range(7))


def test_without_pandas_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PlannerError, match=r"pandas.*pip install 'rematplan\[notebooks\]'"):
        made_plan(stack(1)).to_dataframe()
