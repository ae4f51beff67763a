"""The demo's models: real steps, sizes that a budget bites on, and the published sizes."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from planner._compat import FakeTensorMode
from planner.checks import zoo
from planner.errors import PlannerError
from planner.measure import run_step, step_peak


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_demo_model_trains_and_is_mostly_activations(name: str) -> None:
    example = zoo.MODELS[name]()
    assert example.model.training and all(m.training for m in example.model.modules())
    parameters_bytes = sum(p.nbytes for p in example.model.parameters())
    above = step_peak(example.model, example.inputs, loss_fn=example.loss_fn, include_resident=False)
    assert above > 4 * parameters_bytes
    record = run_step(example.model, example.inputs, loss_fn=example.loss_fn)
    assert record.loss is not None and torch.isfinite(record.loss)
    assert len(record.gradients) == len(list(example.model.parameters()))
    assert example.name in str(example) and "M parameters" in str(example)


def test_building_leaves_the_random_state_alone_and_repeats_itself() -> None:
    state = torch.get_rng_state()
    first, second = zoo.gpt2_example(), zoo.gpt2_example()
    assert torch.equal(state, torch.get_rng_state())
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(value, second.inputs[key]) for key, value in first.inputs.items())


def test_the_cross_encoder_is_one() -> None:
    from sentence_transformers import CrossEncoder

    example = zoo.cross_encoder_example()
    assert isinstance(example.whole, CrossEncoder)
    assert example.whole[0].model is example.model
    assert set(example.inputs) == {"input_ids", "token_type_ids", "attention_mask"}
    lengths = example.inputs["attention_mask"].sum(1)
    assert lengths.max() == example.inputs["input_ids"].shape[1]  # no truncation, no spare padding
    assert len(set(lengths.tolist())) > 1
    example.whole.eval()
    with torch.no_grad():  # both: other kernels may run where gradients are wanted
        outputs = example.whole({**example.inputs})  # its own forward runs the planned model
        assert torch.equal(outputs["scores"].squeeze(), example.model(**example.inputs).logits.squeeze())


def test_dropout_is_on_where_the_family_has_it() -> None:
    for name in ("bert", "gpt2", "unet"):
        rates = [m.p for m in zoo.MODELS[name]().model.modules() if isinstance(m, nn.Dropout)]
        assert rates and all(rate > 0 for rate in rates)
    tower = zoo.internvl_example().model
    assert tower.config.text_config.attention_dropout > 0
    assert tower.config.vision_config.attention_dropout > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_examples_come_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    for make in (zoo.resnet_example, zoo.internvl_example, zoo.cross_encoder_example):
        example = make(dtype=dtype)
        assert {p.dtype for p in example.model.parameters()} == {dtype}
        floats = [t.dtype for t in example.inputs.values() if t.is_floating_point()]
        assert set(floats) <= {dtype}


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet", 25.6), ("gpt2", 124.4), ("unet", 31.0), ("internvl", 938.2)]
)
def test_large_models_have_the_published_sizes(name: str, millions: float) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):  # no memory
        example = zoo.MODELS[name](size="large")
    count = sum(p.numel() for p in example.model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PlannerError, match=r"needs transformers.*pip install 'rematplan\[hf\]'"):
        zoo.gpt2_example()
    assert isinstance(zoo.resnet_example().model, zoo.ResNet)  # needs nothing but torch
