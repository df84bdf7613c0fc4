"""The farm's models are those of Hugging Face, for many parameter vectors at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sidecast.evaluation.models.gpt2 import Gpt2, Gpt2Config
from sidecast.evaluation.models.llama import Llama, LlamaConfig
from sidecast.evaluation.models.model import Model, views
from sidecast.evaluation.tasks import TASKS
from sidecast.graphs import build_topology
from tests.support.farm_runs import one_thread


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


LLAMA = LlamaConfig(vocab_size=50, width=24, hidden_width=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
GPT2 = Gpt2Config(vocab_size=50, width=24, num_layers=2, num_heads=3, max_positions=16)


def _reference(model: Model) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = dict(model.manifest.config)
    hf_config = transformers.AutoConfig.for_model(**config, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    return transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("model", [Llama(LLAMA), Gpt2(GPT2)], ids=["llama", "gpt2"])
def test_losses_and_gradients_equal_those_of_hugging_face(model: Model) -> None:
    reference = _reference(model).train(False)
    names = [name for name, _ in reference.named_parameters()]
    assert names == [spec.fqn for spec in model.manifest.parameters]
    generator = torch.Generator().manual_seed(1)
    tokens_BL, targets_BL = torch.randint(0, 50, (2, 3, 12), generator=generator)
    vectors_MP = torch.stack([model.initial(seed) for seed in (0, 1)])
    vectors_MP = vectors_MP + 0.05 * torch.randn(vectors_MP.shape, generator=generator)
    leaf_MP = vectors_MP.clone().requires_grad_()
    losses_M = model.losses(views(model, leaf_MP), tokens_BL, targets_BL)
    losses_M.sum().backward()
    for row, vector_P in enumerate(vectors_MP):
        torch.nn.utils.vector_to_parameters(vector_P, reference.parameters())
        reference.zero_grad()
        logits = reference(tokens_BL).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_BL.flatten())
        loss.backward()
        gradient_P = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()])
        torch.testing.assert_close(losses_M[row], loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaf_MP.grad[row], gradient_P, rtol=1e-4, atol=2e-6)


def test_weights_cover_the_parameter_vector_once() -> None:
    for task in TASKS.values():
        model = task.model.build()
        position = 0
        for weight in model.weights:
            assert weight.start == position
            position = weight.stop
        assert position == model.manifest.num_elements


def test_the_default_llama_is_the_one_that_was_measured() -> None:
    assert LlamaConfig().build().manifest.num_elements == 155_072


@pytest.mark.parametrize("name", ["python-bytes", "english-deep", "english-gpt2"])
def test_predictors_on_graphs_can_read_the_models(name: str) -> None:
    assert build_topology(TASKS[name].model.build().manifest, "symmetric").num_nodes > 0


def test_initial_weights_are_decided_by_the_seed() -> None:
    model = Llama(LLAMA)
    assert torch.equal(model.initial(3), model.initial(3))
    assert not torch.equal(model.initial(3), model.initial(4))
