"""The loss in chunks of tokens: found by structure, right to float64, its peaks to the byte."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner.graph.chunks.chunked import Chunked
from planner.graph.chunks.region import NotInRows
from planner.options import Search
from planner.solving.priced import PricedStep, prepare
from tests.tiny import seeded

WORDS, WIDTH = 256, 16
SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Loss = Callable[[Tensor, Tensor], Tensor]


def tokens(rows: int = 2, length: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Ids and labels, of which some are ignored."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, length), generator=random)
    labels = ids.clone()
    labels[0, : length // 3] = -100
    return {"input_ids": ids, "labels": labels}


def causal(**more: Any) -> dict[str, Any]:
    return {**tokens(), "use_cache": False, **more}


def llama(**more: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, **more))


def frozen_head() -> nn.Module:
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    return model


def gpt2(words: int = WORDS) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=words, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config)


def gemma2() -> nn.Module:
    more = {"num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "eager"}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, **more, final_logit_softcapping=30.0))


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=WORDS, d_model=WIDTH, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpt2": (gpt2, causal()),
    "llama": (llama, causal()),
    "llama tied": (lambda: llama(tie_word_embeddings=True), causal()),
    "llama in bfloat16": (lambda: llama().bfloat16(), causal()),
    "llama, sum over all processes' labels": (llama, causal(num_items_in_batch=torch.tensor(77))),
    "llama, frozen head": (frozen_head, causal()),
    "llama, no label": (llama, causal(labels=torch.full((2, 24), -100))),
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)), tokens()),
    "gemma2": (gemma2, causal()),
    "t5": (t5, causal()),
}


class Speaker(nn.Module):
    """Logits (batch, sequence, words) and a loss of them."""

    def __init__(self, loss: Loss, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=bias)
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.head(torch.tanh(self.embed(input_ids))), labels)


def flat(loss: Callable[..., Tensor], **how: Any) -> Loss:
    return lambda z, y: loss(z.flatten(0, 1), y.flatten(), **how)


cross = functools.partial(flat, F.cross_entropy)


def with_z_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + 1e-2 * torch.logsumexp(z, -1).pow(2).mean()


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    seen = y != -100
    picked = torch.log_softmax(z, -1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return -(picked * seen).sum() / seen.sum()


def focal(z: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-each)).pow(2) * each).mean()


def soft(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, F.one_hot(y.clamp(min=0), WORDS).float() * 0.9 + 0.1 / WORDS)


def shifted(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, WORDS), y[..., 1:].contiguous().view(-1))


def capped(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((torch.tanh(z / 5.0) * 5.0).view(-1, WORDS).float(), y.view(-1))


def hidden_by(mask: bool) -> Loss:
    return lambda z, y: F.cross_entropy(
        z.flatten(0, 1).masked_fill(torch.arange(WORDS) > 250, -1e4), y.clamp(max=250).flatten()
    )


def over_second(turn: Loss | None = None, **how: Any) -> Loss:
    """A loss of ``(batch, words, sequence)``, as torch has it."""
    return lambda z, y: F.cross_entropy(z.transpose(1, 2) if turn is None else turn(z, y), y, **how)


LOSSES: dict[str, Loss] = {
    "mean": cross(),
    "sum": cross(reduction="sum"),
    "label smoothing": cross(label_smoothing=0.1),
    "ignored label 0": lambda z, y: F.cross_entropy(
        z.flatten(0, 1), y.clamp(min=0).flatten(), ignore_index=0
    ),
    "z-loss": flat(with_z_loss),
    "by hand": by_hand,
    "focal": flat(focal),
    "soft labels": flat(soft),
    "shifted": shifted,
    "capped": capped,
    "padded vocabulary": hidden_by(True),
    "second dim": over_second(),
    "second dim, sum": over_second(reduction="sum"),
    "second dim, smoothing": over_second(label_smoothing=0.1),
    "second dim, weights": over_second(weight=torch.linspace(0.5, 2.0, WORDS)),
    "second dim, permuted": over_second(lambda z, y: z.permute(0, 2, 1)),
    "second dim, capped": over_second(lambda z, y: torch.tanh(z.mT / 5.0) * 5.0),
    "second dim, each": lambda z, y: F.cross_entropy(z.mT, y, reduction="none").pow(2).mean(),
}


class Weighted(Speaker):
    """A loss with a weight for each word."""

    def __init__(self) -> None:
        super().__init__(cross())
        self.register_buffer("weight", torch.linspace(0.5, 2.0, WORDS))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.embed(input_ids)))
        return F.cross_entropy(z.flatten(0, 1), labels.flatten(), weight=self.weight, label_smoothing=0.05)


class Ranking(nn.Module):
    """A loss over the scores of all pairs of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(8, WIDTH)

    def forward(self, queries: Tensor, answers: Tensor) -> Tensor:
        a, b = (F.normalize(self.encode(x)) for x in (queries, answers))
        return F.cross_entropy(20 * a @ b.T, torch.arange(len(a)))


def in_chunks(model: nn.Module, batch: Any, chunks: int, **how: Any) -> PricedStep:
    step = prepare(model, batch, costs="roofline", search=Search(time_limit_s=0.3), **how)
    return step.in_chunks(chunks)


def assert_exact(step: PricedStep, *, ahead: bool | None = None, sums: int = 1) -> planner.Report:
    """The step with nothing recomputed: right to float64, its peak to the byte, its FLOPs as predicted.

    ``sums``  over the tokens that the loss is made of: an ulp for each.
    """
    made = step.plan_bytes(step.baseline_peak_bytes, Search("greedy", 0.3))
    report = made.verify()
    assert report.ok, str(report)
    assert report.peak_bytes == report.predicted_peak_bytes, str(report)
    assert report.recompute_flops == report.predicted_recompute_flops, str(report)
    if report.errors is not None and step.graph.outputs[0].meta["val"].dtype == torch.float32:
        assert report.errors.loss_ulps <= sums, str(report)
    if ahead is not None:
        assert {of.form for of in made.chunked} == {"ahead" if ahead else "behind"}
    return report


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_the_library(name: str) -> None:
    build, batch = FAMILIES[name]
    step = in_chunks(seeded(build), batch, 5)
    whole = step.unchunked
    (chunked,) = step.graph.chunked
    assert chunked.columns == WORDS and chunked.rows == 48 and chunked.is_made
    assert whole is not None and step.floor_bytes < whole.floor_bytes
    assert_exact(step, ahead=True)


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    step = in_chunks(seeded(lambda: Speaker(LOSSES[name])), tokens(), 3)
    whole = step.unchunked
    assert whole is not None
    largest = max(value.bytes for value in step.graph.values if value.producer is not None)
    assert largest < 48 * WORDS * 4 <= max(v.bytes for v in whole.graph.values if v.producer is not None)
    assert_exact(step, ahead=True)


def test_weights_of_words() -> None:
    assert_exact(in_chunks(seeded(Weighted), tokens(), 4))


def test_scores_within_a_batch() -> None:
    random = torch.Generator().manual_seed(0)
    batch = tuple(torch.randn(40, 8, generator=random) for _ in range(2))
    step = in_chunks(seeded(Ranking), batch, 4)
    assert [(of.rows, of.columns) for of in step.graph.chunked] == [(40, 40)]
    assert_exact(step, ahead=True)


class TwoHeads(nn.Module):
    """Two predictions from one state, each with a loss, and a penalty beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.next, self.after = nn.Linear(WIDTH, WORDS), nn.Linear(WIDTH, WORDS // 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        state = torch.tanh(self.embed(input_ids)).flatten(0, 1)
        second = labels.flatten().clamp(max=WORDS // 2 - 1)
        losses = (
            F.cross_entropy(self.next(state), labels.flatten()),
            F.cross_entropy(self.after(state), second),
        )
        return losses[0] + 0.5 * losses[1] + 1e-3 * state.pow(2).mean()


def test_several_losses_are_each_in_chunks() -> None:
    step = in_chunks(seeded(TwoHeads), tokens(), 4)
    assert sorted(of.head for of in step.graph.chunked) == ["after", "next"]
    assert_exact(step, ahead=True)


def test_half_precision_is_not_scaled_down_ahead() -> None:
    """An unscaled gradient of float16 underflows: it is made when the loss's own has come."""
    step = in_chunks(seeded(lambda: Speaker(capped, bias=False).half()), tokens(), 3)
    assert_exact(step, ahead=False)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(2, 9),
    chunks=st.integers(2, 7),
    ignored=st.floats(0, 1),
    smoothing=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["mean", "sum"]),
    bias=st.booleans(),
)
def test_any_sizes(
    rows: int, length: int, chunks: int, ignored: float, smoothing: float, reduction: str, bias: bool
) -> None:
    """The loss and each gradient lie as near to float64 as eager's, whatever is ignored and left over."""
    batch = tokens(rows, length)
    random = torch.Generator().manual_seed(chunks)
    hidden = torch.rand(rows, length, generator=random) < ignored
    batch["labels"] = torch.where(hidden, -100, batch["input_ids"])
    model = seeded(lambda: Speaker(cross(label_smoothing=smoothing, reduction=reduction), bias))
    if chunks > rows * length:
        with pytest.raises(NotInRows, match=f"{rows * length} chunks are the most"):
            in_chunks(model, batch, chunks)
        return
    # smoothed, it is a sum over the labels' words and one over all words
    assert_exact(in_chunks(model, batch, chunks), sums=1 if smoothing == 0 else 2)


def test_gradients_of_accumulated_steps_are_scaled() -> None:
    """A loss is divided before its backward, and gradients are added to those that are there."""
    model, batch = seeded(lambda: Speaker(cross())), tokens()
    plan = planner.plan(model, 1, batch, costs="roofline", chunk_loss=3, time_limit_s=0.3)

    def trained() -> dict[str, Tensor]:
        for share in (0.3, 0.7):
            (model(**batch) * share).backward()
        made = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return made

    eager = trained()
    plan.apply()
    ours = trained()
    plan.restore()
    assert eager.keys() == ours.keys()
    for name, gradient in eager.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_second_backward_finds_what_the_first_did() -> None:
    """The sum that is scaled in place is scaled once for each backward."""
    model, batch = seeded(lambda: Speaker(cross())), tokens()
    planner.plan(model, 1, batch, costs="roofline", chunk_loss=3, time_limit_s=0.3).apply()
    loss = model(**batch)
    first = torch.autograd.grad(loss * 2, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss * 2, list(model.parameters()))
    assert all(map(torch.equal, first, second))


def test_recomputed_and_at_the_least_peak() -> None:
    """Chunks are ordinary calls: what a tight plan drops and makes again has the same peaks and FLOPs."""
    step = dataclasses.replace(in_chunks(seeded(gpt2), causal(), 4), least_limit_s=0.5)
    report = step.least_plan().verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes
    assert report.recompute_flops == report.predicted_recompute_flops > 0


def test_logits_that_nobody_reads_are_not_made() -> None:
    model, batch = seeded(gpt2), causal()
    made = planner.plan(model, 1, batch, costs="roofline", chunk_loss=4, outputs="unread", time_limit_s=0.3)
    assert made.unread == ("output['logits']",) and not made.chunked[0].is_made
    report = made.verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes
    assert "outputs not made, since only the loss is read: output['logits']" in str(report)
    made.apply()
    output = model(**batch)
    output.loss.backward()
    for read in (lambda x: x.argmax(-1), torch.argmax, lambda x: x[0], lambda x: x * 2):
        with pytest.raises(
            planner.PlannerError, match=r"output\['logits'\] was not made.*'released' or 'held'"
        ):
            read(output.logits)
    assert not hasattr(output.logits, "shape") and "logits" in repr(output)


def test_gradients_asked_of_logits_beside_a_cut_loss_are_refused() -> None:
    """They are made whole for the caller; the loss is not computed from these any more."""
    model, batch = seeded(gpt2), causal()
    planner.plan(model, 1, batch, costs="roofline", chunk_loss=3, time_limit_s=0.3).apply()
    outputs = model(**batch)
    outputs.logits.retain_grad()
    with pytest.raises(planner.PlannerError, match=r"gradient of output\['logits'\] is asked for"):
        outputs.loss.backward()
    outputs = model(**batch)
    with pytest.raises(planner.PlannerError, match="by another output of the model"):
        torch.autograd.grad(outputs.loss, [outputs.logits], allow_unused=True)


def test_a_file_holds_how_the_loss_was_cut(tmp_path: Any) -> None:
    model, batch = seeded(gpt2), causal()
    for outputs in ("unread", "held"):
        made = planner.plan(
            model, 1, batch, costs="roofline", chunk_loss=3, outputs=outputs, time_limit_s=0.3
        )
        made.save(tmp_path / "plan.json")
        read = planner.load(tmp_path / "plan.json")
        assert read.chunked == made.chunked and read.unread == made.unread
        assert read.whole_step_s == made.whole_step_s and read.whole_peak_bytes == made.whole_peak_bytes
        assert "loss in chunks" in read.summary()
        assert read.verify(model, batch).ok
    text = (tmp_path / "plan.json").read_text().replace('"rows": 48', '"rows": "48"')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(planner.InvalidPlanFileError, match="'rows' of a loss in chunks"):
        planner.load(tmp_path / "plan.json")


def test_where_nothing_fits_without_it_is_done_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = seeded(lambda: gpt2(2048)), {**tokens(8, 24), "use_cache": False}
    how: dict[str, Any] = {"costs": "roofline", "time_limit_s": 0.3}
    whole = prepare(model, batch, costs="roofline", search=Search(time_limit_s=0.3), outputs="released")
    budget_gb = 0.8 * whole.floor_bytes / 1e9
    with caplog.at_level(logging.WARNING, "planner"):
        made = planner.plan(model, budget_gb, batch, **how)
    said = [r.getMessage() for r in caplog.records if r.name == "planner.solving.chunked"]
    assert len(said) == 1 and "with its loss whole" in said[0] and str(made.chunked[0]) in said[0]
    assert made.peak_bytes <= budget_gb * 1e9 and made.verify().ok
    assert not planner.plan(model, 1, batch, **how).chunked  # where all fits, every bit is eager's
    with pytest.raises(planner.InfeasibleBudgetError):
        planner.plan(model, budget_gb, batch, **how, chunk_loss=False)
    with pytest.raises(planner.InfeasibleBudgetError, match=r"with the loss in .* chunks") as refused:
        planner.plan(model, budget_gb / 8, batch, **how)
    assert refused.value.floor_bytes < whole.floor_bytes


def test_where_no_plan_is_found_without_it_is_done_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between what is proved of the whole loss and what is found of it, more budget is never worse."""
    model, batch = seeded(gpt2), causal()
    found = PricedStep.plan_bytes

    def none_whole(self: PricedStep, budget_bytes: int, *args: Any, **more: Any) -> Any:
        if not self.graph.chunked:
            raise self.infeasible(10)
        return found(self, budget_bytes, *args, **more)

    monkeypatch.setattr(PricedStep, "plan_bytes", none_whole)
    how: dict[str, Any] = {"costs": "roofline", "time_limit_s": 0.3}
    assert planner.plan(model, 1, batch, **how).chunked
    with pytest.raises(planner.InfeasibleBudgetError):
        planner.plan(model, 1, batch, **how, chunk_loss=False)


def test_in_regions_it_is_said_what_one_graph_would_bring() -> None:
    model, batch = seeded(gpt2), {k: v for k, v in causal().items() if k != "use_cache"}
    with pytest.raises(planner.InfeasibleBudgetError, match=r"computed in chunks.* use_cache"):
        planner.plan(model, 1e-4, batch, costs="roofline", time_limit_s=0.3)


def test_the_number_of_chunks_is_chosen_by_the_budget() -> None:
    model, batch = seeded(lambda: Speaker(cross())), tokens(4, 64)
    how: dict[str, Any] = {"costs": "roofline", "time_limit_s": 0.3, "chunk_loss": True}
    wide = planner.plan(model, 1, batch, **how)
    tight = planner.plan(model, wide.peak_bytes * 0.6 / 1e9, batch, **how)
    assert 2 <= wide.chunked[0].chunks < tight.chunked[0].chunks
    assert tight.verify().ok


def test_trainers_switch_plans_chunks_at_each_size() -> None:
    model, batch = seeded(gpt2), causal()
    planner.enable(model, 1, costs="roofline", time_limit_s=0.3, chunk_loss=4, optimizer=None, now=True)
    for length in (24, 20, 18):
        cut = {k: v[:, :length] if isinstance(v, Tensor) else v for k, v in batch.items()}
        ours = model(**cut).loss
        ours.backward()
        mine = planner.plan_of(model)
        assert mine is not None and mine.chunked[0].rows == 2 * length and mine.chunked[0].chunks == 4
        model.zero_grad()
    planner.disable(model)


@pytest.mark.parametrize("chunk_loss", [1, 0, -2, 2.0, "yes", None])
def test_what_chunk_loss_may_be(chunk_loss: Any) -> None:
    for call in (planner.plan, planner.enable):
        with pytest.raises(ValueError, match="chunk_loss must be 'auto', True, False or a number"):
            call(seeded(gpt2), 1, chunk_loss=chunk_loss)  # type: ignore[operator]


def test_refusals_name_what_is_in_the_way() -> None:
    def turned(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.transpose(0, 1).flatten(0, 1), y.T.flatten())

    def plan(model: nn.Module, **how: Any) -> None:
        planner.plan(model, 1, tokens(), costs="roofline", chunk_loss=4, time_limit_s=0.3, **how)

    with pytest.raises(NotInRows, match=r"transpose .* reads .*, float32\[2, 24, 256\], .* 48 rows"):
        plan(seeded(lambda: Speaker(turned)))
    with pytest.raises(NotInRows, match=r"var .* does not work on each of its 48 rows"):
        plan(seeded(lambda: Speaker(lambda z, y: z.pow(2).var())))
    with pytest.raises(NotInRows, match="there is no loss to compute in chunks"):
        plan(seeded(lambda: Speaker(lambda z, y: z.pow(2).sum())))
    with pytest.raises(NotInRows, match="48 chunks are the most there can be"):
        planner.plan(seeded(gpt2), 1, causal(), costs="roofline", chunk_loss=49)
    with pytest.raises(NotInRows, match=r"put it into the module"):
        plan(seeded(lambda: Speaker(lambda z, y: z)), loss_fn=lambda z: z.logsumexp(-1).mean())
    with pytest.raises(NotInRows, match="dynamic asks for many"):
        plan(seeded(lambda: Speaker(cross())), dynamic=True)
    with pytest.raises(ValueError, match=r"chunk_loss is not for backend='inductor'.* backend='eager'"):
        plan(seeded(gpt2), backend="inductor")
    with pytest.raises(planner.PlannerError, match=r"captured piece by piece, .* capture is regions"):
        plan(seeded(gpt2), capture="regions")
    with pytest.raises(planner.PlannerError, match="reads only the loss"):
        planner.plan(seeded(lambda: nn.Linear(2, 2)), 1, (torch.ones(2, 2),), outputs="unread")


def test_whole_log_probabilities_that_are_read_are_refused() -> None:
    def both(z: Tensor, y: Tensor) -> Tensor:
        logs = torch.log_softmax(z.flatten(0, 1), -1)
        return F.nll_loss(logs, y.flatten()) + logs.cumsum(0).pow(2).mean()

    with pytest.raises(NotInRows, match=r"cumsum .* does not work on each of its 48 rows by itself"):
        in_chunks(seeded(lambda: Speaker(both)), tokens(), 4)


def test_a_chunk_prints_itself() -> None:
    made = Chunked("lm_head", 100, 512, 3, "ahead", True)
    assert str(made) == (
        "lm_head: 100 x 512 in 3 chunks of 34 rows, gradients in the forward, logits made whole"
    )
