"""In-batch losses in chunks: scores whose softmax is read along rows and columns; what metrics read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from planner.graph.chunks.region import NotInRows
from planner.measure.bits import StepRecord
from planner.measure.peaks import step_peak
from planner.measure.wide import errors_of
from planner.solving.priced import PricedStep
from tests.test_planner_chunk_loss import (
    SMALL,
    WORDS,
    Speaker,
    Weighted,
    assert_exact,
    causal,
    cross,
    flat,
    in_chunks,
    llama,
    tokens,
)
from tests.tiny import seeded

PAIRS = 40
Scored = Callable[[Tensor, Tensor], Any]


class Contrast(nn.Module):
    """A loss of the scores of all pairs, by a temperature that is learnt."""

    def __init__(self, loss: Scored, width: int = 16) -> None:
        super().__init__()
        self.encode, self.scale = nn.Linear(8, width), nn.Parameter(torch.tensor(2.6))
        self.loss = loss

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        a, b = (F.normalize(self.encode(x)) for x in (images, texts))
        return self.loss(self.scored(a, b), torch.arange(len(a)))

    def scored(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scale.exp() * (a @ b.t())


class Narrow(Contrast):
    """Scores of half precision."""

    def scored(self, a: Tensor, b: Tensor) -> Tensor:
        return 4 * (a.bfloat16() @ b.bfloat16().T)


class More(Contrast):
    """Further texts, that are nobody's."""

    def scored(self, a: Tensor, b: Tensor) -> Tensor:
        return 20 * (a @ torch.cat([b, b.flip(0) * 0.5]).T)


def pairs(count: int = PAIRS) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(count, 8, generator=random) for _ in range(2))
    return images, texts


def both(of: Scored) -> Scored:
    """A loss along rows and the same along columns."""
    return lambda s, y: (of(s, y) + of(s.t(), y)) / 2


def ways(**how: Any) -> Scored:
    return both(functools.partial(F.cross_entropy, **how))


def by_hand(s: Tensor, y: Tensor) -> Tensor:
    return (s.logsumexp(1) - s.diagonal()).mean() + (s.logsumexp(0) - s.diag()).mean()


def of_logs(s: Tensor, y: Tensor) -> Tensor:
    return -s.log_softmax(1).diag().mean() - s.log_softmax(0).diagonal().mean()


def of_shares(s: Tensor, y: Tensor) -> Tensor:
    return -s.softmax(1).diagonal().log().mean() - s.softmax(0).diagonal().log().mean()


def masked(s: Tensor, y: Tensor) -> Tensor:
    near = (y[:, None] - y[None, :]).abs() % 5 == 1
    return ways()(s.masked_fill(near, -torch.inf), y)


def some_ignored(s: Tensor, y: Tensor) -> Tensor:
    return ways()(s, torch.where(y % 3 == 0, -100, y.flip(0)))


def soft(s: Tensor, y: Tensor) -> Tensor:
    return ways()(s, 0.9 * torch.eye(len(y)) + 0.1 / len(y))


def weighted(s: Tensor, y: Tensor) -> Tensor:
    return ways(weight=torch.linspace(0.5, 2.0, len(y)))(s, y)


def each(s: Tensor, y: Tensor) -> Tensor:
    return both(lambda z, y: (F.cross_entropy(z, y, reduction="none") * (1 + y)).mean())(s, y)


def capped(s: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(s, y) + F.cross_entropy(5 * torch.tanh(s.mT / 5), y)


def positives(s: Tensor, y: Tensor) -> Tensor:
    """As sentence-transformers writes it."""
    return -(s[torch.arange(len(y)), y] - s.logsumexp(1) / 2 - s.T.logsumexp(1) / 2).mean()


def sigmoids(s: Tensor, y: Tensor) -> Tensor:
    """SigLIP's, which is one of each row."""
    return -F.logsigmoid((2 * torch.eye(len(y)) - 1) * (s - 10)).sum(-1).mean()


LOSSES: dict[str, Scored] = {
    "cross entropy": ways(),
    "sum": ways(reduction="sum"),
    "label smoothing": ways(label_smoothing=0.1),
    "columns only": lambda s, y: F.cross_entropy(s.T, y),
    "others": lambda s, y: ways()(s, y.flip(0)),
    "weights": weighted,
    **{of.__name__: of for of in (by_hand, of_logs, of_shares, masked, some_ignored, soft, each)},
    **{of.__name__: of for of in (capped, positives, sigmoids)},
}


def assert_never_whole(step: PricedStep, elements: int) -> None:
    """No value that the step makes is as large as its scores."""
    made = [value.bytes for value in step.graph.values if value.producer is not None]
    assert max(made) < 4 * elements


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_scores(name: str) -> None:
    step = in_chunks(seeded(lambda: Contrast(LOSSES[name])), pairs(), 3)
    (chunked,) = step.graph.chunked
    assert (chunked.rows, chunked.columns) == (PAIRS, PAIRS)
    if name != "soft":  # whose labels are the model's own, and as large
        assert_never_whole(step, PAIRS * PAIRS)
    assert_exact(step, ahead=True, sums=3)


class Summed(Contrast):
    """Scores by ``einsum``, which makes a product of batches of one of it."""

    def scored(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scale.exp() * torch.einsum("nc,mc->nm", a, b)


class Queued(Contrast):
    """As MoCo: one positive beside negatives from a queue."""

    def __init__(self, loss: Scored) -> None:
        super().__init__(loss)
        self.register_buffer("queue", F.normalize(torch.randn(16, 200), dim=0))

    def scored(self, a: Tensor, b: Tensor) -> Tensor:
        queue = self.get_buffer("queue")
        positive = torch.einsum("nc,nc->n", a, b.detach())[:, None]
        return torch.cat([positive, torch.einsum("nc,ck->nk", a, queue)], 1) / 0.07


class Supervised(Contrast):
    """As SupCon: whatever is of the same kind is positive."""

    def scored(self, a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([a, b])
        s = z @ z.T / 0.1
        s = s - s.max(1, keepdim=True).values.detach()
        kind = torch.arange(len(z)) % 7
        others = 1 - torch.eye(len(z))
        same = (kind[:, None] == kind[None]).float() * others
        logs = s - (s.exp() * others).sum(1, keepdim=True).log()
        return -((same * logs).sum(1) / same.sum(1)).mean()


@pytest.mark.parametrize(
    ("make", "loss", "rows", "columns"),
    [
        (Summed, ways(), PAIRS, PAIRS),
        (Queued, lambda s, y: F.cross_entropy(s, torch.zeros_like(y)), PAIRS, 200),
        (Supervised, lambda s, y: s, 2 * PAIRS, 2 * PAIRS),
    ],
)
def test_ways_to_write_scores(make: type[Contrast], loss: Scored, rows: int, columns: int) -> None:
    step = in_chunks(seeded(lambda: make(loss)), pairs(), 4)
    assert [(of.rows, of.columns) for of in step.graph.chunked] == [(rows, columns)]
    assert_never_whole(step, rows * columns)
    assert_exact(step, ahead=True, sums=3)


class Taught(Speaker):
    """A teacher's logits beside a student's."""

    def __init__(self) -> None:
        super().__init__(cross())
        self.teacher = Speaker(lambda z, y: z).requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.embed(input_ids)))
        with torch.no_grad():
            taught = self.teacher(input_ids, labels)
        apart = F.kl_div((z / 2).log_softmax(-1), (taught / 2).softmax(-1), reduction="batchmean")
        return self.loss(z, labels) + apart


def test_a_teachers_logits_are_made_with_the_students() -> None:
    step = in_chunks(seeded(Taught), tokens(), 3)
    assert_never_whole(step, 48 * WORDS)
    assert_exact(step, ahead=True, sums=2)


@pytest.mark.parametrize("make", [Narrow, More])
def test_scores_of_other_kinds(make: type[Contrast]) -> None:
    along = (
        (lambda s, y: F.cross_entropy(s, y) + F.cross_entropy(s[:, : len(y)].T, y))
        if make is More
        else ways()
    )
    assert_exact(in_chunks(seeded(lambda: make(along)), pairs(), 4), ahead=True, sums=2)


def test_gradients_in_the_backward_where_two_losses_come() -> None:
    """The rows are gone through once in the forward, and once in the backward."""
    model = seeded(lambda: Contrast(lambda s, y: (F.cross_entropy(s, y), F.cross_entropy(s.T, y))))
    step = in_chunks(model, pairs(), 4)
    assert_never_whole(step, PAIRS * PAIRS)
    assert_exact(step, ahead=False)
    report = dataclasses.replace(step, least_limit_s=0.5).least_plan().verify()
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes
    assert report.recompute_flops == report.predicted_recompute_flops > 0


TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 2}
IMAGE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE |= {"image_size": 16, "patch_size": 8}


def clip() -> nn.Module:
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8))


def siglip() -> nn.Module:
    return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=IMAGE))


def seen_and_read(count: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (count, 4), generator=random)
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(count, 3, 16, 16, generator=random),
        "return_loss": True,
    }


@pytest.mark.parametrize("make", [clip, siglip])
def test_models_of_the_library(make: Callable[[], nn.Module]) -> None:
    step = in_chunks(seeded(make), seen_and_read(24), 3, outputs="unread")
    (chunked,) = step.graph.chunked
    assert (chunked.rows, chunked.columns, chunked.is_made) == (24, 24, False)
    assert_exact(step, ahead=True, sums=2)


def test_the_number_of_chunks_is_chosen_by_the_budget() -> None:
    """At twice the batch the whole loss takes four times as much, and the loss in chunks fits."""
    model, batch = seeded(lambda: Contrast(ways())), pairs(512)
    how: dict[str, Any] = {"costs": "roofline", "time_limit_s": 0.3}
    whole = planner.plan(model, 1, batch, **how)
    found = []
    for share in (0.5, 0.15):
        budget = whole.peak_bytes * share
        with pytest.raises(planner.InfeasibleBudgetError):
            planner.plan(model, budget / 1e9, batch, **how, chunk_loss=False)
        plan = planner.plan(model, budget / 1e9, batch, **how)
        report = plan.verify()
        assert report.ok and report.peak_bytes == report.predicted_peak_bytes <= budget
        found.append(plan.chunked[0].chunks)
    assert found[0] < found[1]


@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(2, 24),
    chunks=st.integers(2, 9),
    scale=st.sampled_from([0.0, 1.0, 4.6]),
    hidden=st.floats(0, 0.9),
)
def test_any_sizes_and_temperatures(count: int, chunks: int, scale: float, hidden: float) -> None:
    """The loss is within the bound that is stated, though nearly all of a column may be masked."""
    random = torch.Generator().manual_seed(count)
    off = (torch.rand(count, count, generator=random) < hidden) & ~torch.eye(count, dtype=torch.bool)

    def make() -> Contrast:
        made = Contrast(lambda s, y: ways()(s.masked_fill(off, -torch.inf), y))
        made.scale.data.fill_(scale)
        return made

    model, batch = seeded(make), pairs(count)
    if chunks > count:
        return
    step = in_chunks(model, batch, chunks)
    plan = step.plan_bytes(step.baseline_peak_bytes)
    eager = model(*batch).detach()
    plan.apply()
    ours = model(*batch).detach()
    plan.restore()
    unit = torch.finfo(torch.float32).eps / 2
    assert float((ours - eager).abs()) <= unit * (2 * count + 8 * chunks + 4 * float(eager.abs()))


def test_measured_beside_a_batch_that_nothing_else_fits() -> None:
    model, batch = seeded(lambda: Contrast(ways())), pairs(256)
    whole = step_peak(model, batch)
    plan = planner.plan(model, 1, batch, costs="roofline", chunk_loss=8, time_limit_s=0.3)
    plan.apply()
    assert step_peak(model, batch) == plan.peak_bytes < 0.3 * whole


def test_scores_read_at_both_places_at_once_are_refused() -> None:
    """A product of the scores and the same turned has to have all of both."""
    with pytest.raises(NotInRows, match=r"reads .*, float32\[40, 40\], .* each of its 40 rows by itself"):
        in_chunks(seeded(lambda: Contrast(lambda s, y: ways()(s * s.t(), y))), pairs(), 4)


class Captioner(nn.Module):
    """A language model's loss, beside a small one of pairs, which stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.speak, self.encode = Speaker(cross()), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        a = self.encode(images)
        scores = a @ a.flip(0).t()
        return self.speak(input_ids, labels) + ways()(scores, torch.arange(len(images)))


def test_a_small_loss_of_pairs_beside_a_large_one_of_words() -> None:
    batch = {**tokens(), "images": pairs(8)[0]}
    step = in_chunks(seeded(Captioner), batch, 4)
    assert [of.head for of in step.graph.chunked] == ["speak.head"]
    assert_exact(step, sums=2)


def test_a_file_holds_a_loss_of_pairs(tmp_path: Path) -> None:
    model, batch = seeded(lambda: Contrast(ways())), pairs()
    planner.plan(model, 1, batch, costs="roofline", chunk_loss=3, solver="keep_all").save(tmp_path / "p.json")
    report = planner.load(tmp_path / "p.json").verify(model, batch)
    assert report.ok and report.peak_bytes == report.predicted_peak_bytes


def test_gradients_are_scaled_and_added() -> None:
    model, batch = seeded(lambda: Contrast(ways())), pairs()

    def trained() -> list[Tensor]:
        for share in (0.3, 0.7):
            (model(*batch) * share).backward()
        made = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return made

    eager = trained()
    planner.plan(model, 1, batch, costs="roofline", chunk_loss=3, time_limit_s=0.3).apply()
    for ours, theirs in zip(trained(), eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_gradient_below_a_rounding_of_the_largest_is_judged_by_that() -> None:
    """Of what is all rounding, one step may be three times as far as another, and neither is wrong."""

    def record(small: float, middle: float) -> StepRecord:
        gradients = {"a": torch.ones(4), "b": torch.full((4,), small), "c": torch.full((4,), middle)}
        return StepRecord({}, gradients, {}, {}, torch.ones(()), "Tensor")

    wide = record(1e-10, 1e-3)
    assert errors_of(record(2e-10, 1e-3), record(4e-10, 1e-3), wide, 64).share <= 1
    wrong = errors_of(record(2e-10, 1e-3), record(2e-10, 1.0001e-3), wide, 64)
    assert wrong.share > 2 and wrong.worst == "c"
    right = record(1.0001e-10, 1e-3)  # as small, and eager has it
    assert errors_of(right, record(2e-10, 1e-3), wide, 64).share > 2


# -- what else is read of logits, row by row ---------------------------------------------------------


def entropy(z: Tensor, y: Tensor) -> Tensor:
    logs = z.log_softmax(-1)
    return F.nll_loss(logs, y) + 0.01 * (logs.exp() * logs).mean()


def binary(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, F.one_hot(y.clamp(min=0), WORDS).float())


def normalized(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(10 * F.normalize(z, dim=-1), y) + 1e-3 * z.max(-1).values.pow(2).mean()


def written_out(z: Tensor, y: Tensor) -> Tensor:
    """Without one call that losses have."""
    seen = y != -100
    logs = z - z.exp().sum(-1, keepdim=True).log()
    return -(logs.gather(1, y.clamp(min=0)[:, None])[:, 0] * seen).sum() / seen.sum()


@pytest.mark.parametrize("loss", [entropy, binary, normalized, written_out])
def test_means_of_all_and_largest_scores(loss: Callable[..., Tensor]) -> None:
    assert_exact(in_chunks(seeded(lambda: Speaker(flat(loss))), tokens(), 3), sums=2)


class WithMetrics(Weighted):
    """What a training loop logs beside the loss."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        z = self.head(torch.tanh(self.embed(input_ids)))
        best = (z.topk(5, -1).indices == labels[..., None]).any(-1).float().mean()
        sure, picked = z.softmax(-1).max(-1)
        metrics = {"top5": best, "sure": sure.mean().detach(), "right": (picked == labels).float().mean()}
        return {"loss": F.cross_entropy(z.flatten(0, 1), labels.flatten(), weight=self.weight), **metrics}


def test_metrics_of_the_logits_are_made_with_them() -> None:
    step = in_chunks(seeded(WithMetrics), tokens(), 3)
    assert_never_whole(step, 48 * WORDS)
    assert_exact(step, sums=2)


def test_a_head_for_words_beside_one_for_sentences() -> None:
    model = seeded(lambda: hf.BertForPreTraining(hf.BertConfig(**SMALL)))
    step = in_chunks(model, {**tokens(), "next_sentence_label": torch.tensor([0, 1])}, 3)
    assert [of.head for of in step.graph.chunked] == ["cls.predictions.decoder"]
    assert_exact(step, ahead=True)


def test_the_refusal_names_what_is_behind_the_loss_and_not_the_largest_product() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, **batch: Any) -> Tensor:
            logits = self.model(**batch).logits
            return logits.cumsum(0).log_softmax(-1).mean()

    batch = {k: v for k, v in causal().items() if k != "labels"}
    with pytest.raises(NotInRows, match="cumsum"):
        in_chunks(seeded(Odd), batch, 4)
