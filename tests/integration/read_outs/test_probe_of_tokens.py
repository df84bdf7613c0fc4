"""Losses of a causal language model on the service's probe: those that an exported checkpoint has in transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from sidecast.commands.__main__ import main
from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.probing import causal_lm
from sidecast.nowcaster_service.probing.causal_lm import ROW_TOKENS, CausalLmLoss, causal_lm_of
from sidecast.nowcaster_service.probing.evaluation import ProbeAnswer, ProbeRequest, Probing
from sidecast.nowcaster_service.probing.source import read_source
from tests.contract.test_probe import probed
from tests.integration.read_outs.test_export import llama, manifest_of, run_file, train
from tests.support.services.calls import status
from tests.support.services.harness import FakeEngines, RunningService

__all__ = ["run_file"]

ROWS = np.random.default_rng(5).integers(0, 32, (6, 24))


def saved(folder: Path, tokens: np.ndarray = ROWS) -> str:
    path = folder / "probe.npy"
    np.save(path, tokens)
    return str(path)


def loss_of(model: Any, rows: np.ndarray = ROWS) -> float:
    """As transformers itself says it: the mean over rows of one length is the mean over all tokens."""
    tokens = torch.from_numpy(rows).long()
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_checkpoint_has_the_published_loss(
    tmp_path: Path, run_file: Callable[..., str], capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    manifest = manifest_of(llama(tied=tied))
    engines, probe = FakeEngines(), saved(tmp_path)
    engines.probing = Probing(read_source(probe, None), "cpu")
    with RunningService(tmp_path / "service", engines=engines, probe=probe) as service:
        train(service, manifest, keep_best=2)
        found = probed(service)
        assert (found.fault, [point.step for point in found.points][-1]) == ("", 30)
        published = dict(found.points[-1].losses)
        assert published.keys() == {"ema5", "raw"}
        assert published["ema5"] != published["raw"]
        for name, loss in published.items():
            out = tmp_path / name
            assert main(["export", run_file(service), "--read-out", name, "--out", str(out)]) == 0
            assert f"loss       {loss:.7g} on the service's probe" in capsys.readouterr().out
            assert loss_of(AutoModelForCausalLM.from_pretrained(out)) == pytest.approx(loss, abs=1e-5)
        lowest = min(loss for point in found.points for loss in point.losses.values())
        assert main(["export", run_file(service), "--best", "--out", str(tmp_path / "best")]) == 0
        assert f"loss       {lowest:.7g} on the service's probe" in capsys.readouterr().out
        assert loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "best")) == pytest.approx(lowest, abs=1e-5)
        assert main(["export", run_file(service), "--best", "3", "--out", str(tmp_path / "third")]) == 2
        assert "'best3'; this run keeps: ema5, mean@500, raw, best1, best2" in capsys.readouterr().err
        assert [item.HasField("probe_loss") for item in status(service).read_outs] == [True, False]


def evaluated(tmp_path: Path, manifest: ModelManifest, tokens: np.ndarray = ROWS) -> ProbeAnswer:
    generator = torch.Generator().manual_seed(1)
    vector_P = 0.1 * torch.randn(manifest.num_elements, generator=generator)
    (tmp_path / "vector").write_bytes(vector_P.numpy().tobytes())
    source = read_source(saved(tmp_path, tokens), None)
    request = ProbeRequest(manifest_json=manifest.to_json(), vector_path=tmp_path / "vector")
    return Probing(source, "cpu").evaluate(request)


def test_a_text_is_cut_into_rows_that_the_model_takes(tmp_path: Path) -> None:
    text = np.resize(ROWS.ravel(), 3 * 32 + 5)
    manifest = manifest_of(llama(tied=True))
    cut = evaluated(tmp_path, manifest, text)
    assert cut.loss == evaluated(tmp_path, manifest, text[: 3 * 32].reshape(3, 32)).loss
    source = read_source(saved(tmp_path, np.resize(ROWS, 3 * ROW_TOKENS)), None)
    loss = CausalLmLoss(source, "cpu")
    loss._model = llama(tied=True)
    loss._model.config.max_position_embeddings = 4 * ROW_TOKENS
    assert loss._rows().shape == (3, ROW_TOKENS)


def test_a_models_positions_are_found_under_whichever_name_it_has_for_them(tmp_path: Path) -> None:
    """GPT-2's file says n_positions; a row that is longer would end in an index that there is not."""
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    manifest = manifest_of(AutoModelForCausalLM.from_config(config))
    answer = evaluated(tmp_path, manifest, ROWS.reshape(-1))
    assert answer.refusal == ""
    assert math.isfinite(answer.loss)
    assert "the probe's rows have 24 tokens; the model takes 16" in evaluated(tmp_path, manifest).refusal


def test_the_same_weights_have_the_same_bits_of_loss_whatever_is_evaluated_between(tmp_path: Path) -> None:
    loss = CausalLmLoss(read_source(saved(tmp_path), None), "cpu")
    manifests = [manifest_of(llama(tied=tied)) for tied in (True, False)]
    vectors = [0.1 * torch.randn(item.num_elements) for item in manifests]
    losses = [loss(manifests[index], vectors[index]) for index in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def with_config(**changes: Any) -> ModelManifest:
    manifest = manifest_of(llama(tied=False))
    return ModelManifest(manifest.parameters, {**manifest.config, **changes}, manifest.aliases)


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (lambda: with_config(model_type="marsupial"), "transformers does not know the model_type='marsupial'"),
        (lambda: with_config(model_type="vit"), "cannot make a causal language model of model_type='vit'"),
        (lambda: with_config(hidden_size=17), "transformers cannot make a causal language model|has shape"),
        (lambda: with_config(num_hidden_layers=1), "the run's configuration has no parameter 'model.layers.1"),
        (lambda: with_config(num_hidden_layers=3), "the run does not train 'model.layers.2"),
        (lambda: with_config(num_hidden_layers=10**9), "'num_hidden_layers'=1000000000; the run has 21 parameters"),
        (lambda: with_config(vocab_size=33), r"has shape \(32, 16\), and \(33, 16\) by the run's configuration"),
        (lambda: with_config(max_position_embeddings=16), "the probe's rows have 24 tokens; the model takes 16"),
    ],
)
def test_a_model_that_cannot_be_evaluated_is_refused_by_name(
    tmp_path: Path, manifest: Callable[[], ModelManifest], reason: str
) -> None:
    answer = evaluated(tmp_path, manifest())
    assert answer.is_hopeless
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(answer.refusal)


def test_a_client_chooses_no_code_and_no_numbers(tmp_path: Path) -> None:
    """What a configuration says of code, kernels, and types has no effect on what is made of it."""
    plain = evaluated(tmp_path, with_config())
    told = with_config(
        auto_map={"AutoModelForCausalLM": "evil--modeling.Evil", "AutoConfig": "evil--modeling.Config"},
        quantization_config={"quant_method": "evil"},
        dtype="bfloat16",
        torch_dtype="float16",
        attn_implementation="evil/kernel",
        _attn_implementation="evil/kernel",
        _attn_implementation_internal="evil/kernel",
    )
    assert evaluated(tmp_path, told).loss == plain.loss
    assert plain.refusal == ""
    config = causal_lm_of(told).config
    assert not any(hasattr(config, name) for name in ("auto_map", "quantization_config"))


def test_a_model_of_too_many_modules_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "MAX_MODULES_PER_PARAMETER", 1)
    answer = evaluated(tmp_path, with_config())
    assert answer.is_hopeless
    assert "the model has more than 21 modules" in answer.refusal
    monkeypatch.undo()
    assert evaluated(tmp_path, with_config()).refusal == ""


def test_weights_that_are_not_finite_have_no_loss(tmp_path: Path) -> None:
    manifest = manifest_of(llama(tied=True))
    values = np.full(manifest.num_elements, np.nan, np.float32)
    (tmp_path / "vector").write_bytes(values.tobytes())
    probing = Probing(read_source(saved(tmp_path), None), "cpu")
    answer = probing.evaluate(ProbeRequest(manifest_json=manifest.to_json(), vector_path=tmp_path / "vector"))
    assert (answer.refusal, answer.is_hopeless) == ("the loss is nan", False)
    (tmp_path / "vector").write_bytes(values.tobytes()[4:])
    answer = probing.evaluate(ProbeRequest(manifest_json=manifest.to_json(), vector_path=tmp_path / "vector"))
    assert f"{manifest.num_elements} torch.float32 need" in answer.refusal


def test_a_text_is_read_with_its_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "probe.txt").write_text("a b b\nc a")
    source = read_source(str(tmp_path / "probe.txt"), tmp_path)
    assert source.is_text
    assert source.tokens_NT is not None
    assert source.tokens_NT.tolist() == [[0, 1, 1, 2, 0]]
    with pytest.raises(ConfigError, match=r"--probe-tokenizer .* has no tokenizer.json"):
        read_source(str(tmp_path / "probe.txt"), tmp_path / "none")


def test_json_says_the_losses_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines, probe = FakeEngines(), saved(tmp_path)
    engines.probing = Probing(read_source(probe, None), "cpu")
    with RunningService(tmp_path / "service", engines=engines, probe=probe) as service:
        train(service, manifest_of(llama(tied=True)))
        expected = probed(service).points[-1]
        assert main(["status", service.endpoint, "--json"]) == 0
    (session,) = json.loads(capsys.readouterr().out)["sessions"]
    assert session["probe"]["points"][-1] == {"step": "30", "losses": dict(expected.losses)}
    assert session["probe"]["best"] == min(expected.losses, key=lambda name: expected.losses[name])
