"""The farm's models are those of Hugging Face, for many parameter vectors at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sidecast.evaluation.gradients import AutogradGradients, Engine
from sidecast.evaluation.models.gpt2 import Gpt2, Gpt2Config
from sidecast.evaluation.models.llama import Llama, LlamaConfig
from sidecast.evaluation.models.model import Model, views
from sidecast.evaluation.native.llama_gradients import native_gradients
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


@pytest.fixture(scope="module")
def library_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled arithmetic is kept for all tests."""
    return tmp_path_factory.mktemp("native")


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=64, width=32, hidden_width=48, num_layers=2, num_heads=4, num_kv_heads=2),
        LlamaConfig(vocab_size=48, width=48, hidden_width=80, num_layers=1, num_heads=3, num_kv_heads=3, head_dim=32),
        LlamaConfig(vocab_size=256, width=16, hidden_width=112, num_layers=1, num_heads=2, num_kv_heads=1),
    ],
)
def test_compiled_arithmetic_is_as_exact_as_torchs(config: LlamaConfig, library_folder: Path) -> None:
    model = Llama(config)
    native = native_gradients(model, 32, library_folder)
    if native is None:
        pytest.skip("no compiler")
    torch_gradients = AutogradGradients(model, Engine())
    generator = torch.Generator().manual_seed(1)
    tokens_BL, targets_BL = torch.randint(0, config.vocab_size, (2, 3, 32), generator=generator)
    params_MP = torch.stack([model.initial(seed) for seed in (0, 1)])
    params_MP = params_MP + 0.1 * torch.randn(params_MP.shape, generator=generator)
    exact_MP = torch.empty_like(params_MP, dtype=torch.float64)
    exact_M = AutogradGradients(model, Engine())(params_MP.double(), tokens_BL, targets_BL, exact_MP)
    errors = []
    for gradients in (native, torch_gradients):
        grads_MP = torch.empty_like(params_MP)
        losses_M = gradients(params_MP, tokens_BL, targets_BL, grads_MP)
        torch.testing.assert_close(losses_M.double(), exact_M.double(), rtol=0, atol=2e-6)
        torch.testing.assert_close(gradients.losses(params_MP, tokens_BL, targets_BL), losses_M, rtol=0, atol=2e-6)
        errors.append(float((grads_MP - exact_MP).norm() / exact_MP.norm()))
    assert errors[0] < max(2 * errors[1], 1e-6)


def test_compiled_arithmetic_lets_what_is_not_finite_show(library_folder: Path) -> None:
    model = Llama(LlamaConfig(vocab_size=16, width=16, hidden_width=16, num_layers=1, num_heads=1, num_kv_heads=1))
    native = native_gradients(model, 16, library_folder)
    if native is None:
        pytest.skip("no compiler")
    params_MP = model.initial(0)[None]
    params_MP[0, -1] = math.nan
    tokens_BL = torch.zeros(1, 16, dtype=torch.int64)
    assert math.isnan(native.losses(params_MP, tokens_BL, tokens_BL).item())


def test_models_of_other_sizes_are_left_to_torch(tmp_path: Path) -> None:
    assert native_gradients(Llama(LLAMA), 16, tmp_path) is None
    assert native_gradients(Llama(LlamaConfig()), 24, tmp_path) is None
    assert native_gradients(Gpt2(GPT2), 16, tmp_path) is None


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
