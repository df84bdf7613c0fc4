from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.trainer.job.config import CausalLMConfig
from sidecast.trainer.job.models import build_model

SMALL = CausalLMConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def build(config: CausalLMConfig, *, vocab_size: int = 32, sequence_length: int = 8, seed: int = 0) -> torch.nn.Module:
    return build_model(config, vocab_size=vocab_size, sequence_length=sequence_length, seed=seed)


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (list(build(SMALL, seed=seed).parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_saved_model_is_continued_or_started_afresh(tmp_path: Path) -> None:
    saved = build(SMALL, seed=5)
    saved.save_pretrained(tmp_path / "model")
    loaded = build(CausalLMConfig(source=str(tmp_path / "model")))
    fresh = build(CausalLMConfig(source=str(tmp_path / "model"), from_scratch=True))
    from_file = build(CausalLMConfig(source=str(tmp_path / "model" / "config.json")))
    embedding = saved.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert not torch.equal(fresh.get_input_embeddings().weight, embedding)
    assert torch.equal(fresh.get_input_embeddings().weight, from_file.get_input_embeddings().weight)


def test_sources_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no .*config\.json.*model directory"):
        build(CausalLMConfig(source=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a model configuration"):
        build(CausalLMConfig(source=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not a model configuration"):
        build(CausalLMConfig(source=str(tmp_path)))


def test_a_model_too_small_for_the_corpus_is_refused(tmp_path: Path) -> None:
    build(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"vocabulary of 32.*at least 256"):
        build(CausalLMConfig(source=str(tmp_path)), vocab_size=256)
    with pytest.raises(ConfigError, match=r"sequence_length is 9.*at most 8"):
        build(CausalLMConfig(source=str(tmp_path)), sequence_length=9)
