from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sidecast.errors import ConfigError
from sidecast.trainer.job.config import DataConfig
from sidecast.trainer.job.corpus import load_corpus


def test_a_text_file_is_split_at_its_end(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(range(200)))
    corpus = load_corpus(DataConfig(corpus=str(file), sequence_length=4, validation_fraction=0.1))
    assert corpus.train_tokens.tolist() == list(range(180))
    assert corpus.validation_tokens.tolist() == list(range(180, 200))
    assert corpus.vocab_size == 256


def test_of_many_files_some_are_held_out_whole(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"{index:02}.txt").write_bytes(bytes([index]) * 10)
    corpus = load_corpus(DataConfig(corpus=str(tmp_path), sequence_length=4, validation_fraction=0.25))
    held_out, kept = set(corpus.validation_tokens.tolist()), set(corpus.train_tokens.tolist())
    assert len(held_out) == 10
    assert held_out.isdisjoint(kept)
    assert held_out | kept == set(range(40))


def test_the_digest_tells_corpora_apart(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"a" * 100)
    config = DataConfig(corpus=str(file), sequence_length=4)
    digest = load_corpus(config).digest
    assert load_corpus(config).digest == digest
    assert load_corpus(dataclasses.replace(config, validation_fraction=0.5)).digest != digest


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"", "empty"), (b"short text", "more than training.data.sequence_length, 64")],
)
def test_missing_empty_and_short_corpora_are_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as refusal:
        load_corpus(DataConfig(corpus=str(file)))
    assert str(file) in str(refusal.value)


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.data\.tokenizer .*nowhere.*'bytes'"):
        load_corpus(DataConfig(tokenizer=str(tmp_path / "nowhere")))


def test_a_tokenizer_directory_is_used(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "no": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("yes no " * 50)
    config = DataConfig(corpus=str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "tokenizer"), sequence_length=2)
    corpus = load_corpus(config)
    assert corpus.train_tokens[:4].tolist() == [1, 2, 1, 2]
    assert corpus.vocab_size == 3


def test_a_local_dataset_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"body": "abcdefgh"}\n{"body": "ijklmnop"}\n')
    config = DataConfig(
        corpus=f"hf:{tmp_path / 'data'}", text_column="body", sequence_length=2, validation_fraction=0.25
    )
    corpus = load_corpus(config)
    assert bytes(corpus.train_tokens.tolist() + corpus.validation_tokens.tolist()) == b"abcdefghijklmnop"
    with pytest.raises(ConfigError, match=r"text_column is 'text'.*body"):
        load_corpus(dataclasses.replace(config, text_column="text"))
