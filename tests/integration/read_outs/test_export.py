"""Read-outs as checkpoints: what `sidecast export` writes, loads in transformers with the average's own values."""

from __future__ import annotations

import asyncio
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sidecast.checkpoints.vector_checkpoint import checkpoint_of_vector, require_finite
from sidecast.commands.__main__ import main
from sidecast.errors import ConfigError, SidecastError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.commands.export import receive
from sidecast.policies.read_outs import read_out_of
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import buffer_digest, vector_digest
from sidecast.protos.transport import RUN_SECRET_KEY
from sidecast.protos.version import PROTOCOL_VERSION
from sidecast.trainer.hook.run_file import RunFile
from sidecast.trainer.pipe.messages import Session
from tests.support.services.harness import RunningService, open_request

SECRET = "0123456789abcdef" * 2
OWN = ((RUN_SECRET_KEY, SECRET),)
TOKENS = torch.arange(12).reshape(2, 6)
STEPS = (10, 20, 30)


def llama(*, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def manifest_of(model: LlamaForCausalLM, is_trained: Callable[[str], bool] = lambda name: True) -> ModelManifest:
    aliases = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    config = json.loads(json.dumps(model.config.to_dict()))
    named = ((name, item.shape) for name, item in model.named_parameters() if is_trained(name))
    return ModelManifest.from_shapes(named, config, aliases)


def train(service: RunningService, manifest: ModelManifest, **changes: Any) -> list[torch.Tensor]:
    """Opens a run of one rank, and has it send a few states; returns them."""
    fields = {"world_size": 1, "protocol_version": PROTOCOL_VERSION, "read_outs": ["ema5", "mean@500"]} | changes
    request = open_request(manifest, **fields)
    request.manifest.config_json = json.dumps(dict(manifest.config))
    service.stub.Open(request, metadata=OWN)
    shards = [pb.Shard(parameter=i, start=0, stop=spec.numel) for i, spec in enumerate(manifest.parameters)]
    service.stub.Join(pb.JoinRequest(session_id="s1", upload_shards=shards, fetch_shards=shards), metadata=OWN)
    states = []
    for step in STEPS:
        generator = torch.Generator().manual_seed(step)
        states.append(0.1 * torch.randn(manifest.num_elements, generator=generator))
        data = states[-1].numpy().tobytes()
        key = pb.ChunkKey(session_id="s1", id=step)
        chunk = pb.Chunk(key=key, crc32=crc32(data), data=data)
        service.stub.Upload(iter([chunk]), metadata=OWN)
        digest = buffer_digest([(0, len(data), crc32(data))])
        commit = pb.CommitRequest(session_id="s1", step=step, num_bytes=len(data), digest=digest)
        service.stub.Commit(commit, metadata=OWN)
        service.call(averaged(service))
    return states


async def averaged(service: RunningService) -> None:
    (session,) = [session for session, _ in service.servicer.sessions.items()]
    while session.read_outs.step_in_progress is not None:
        await asyncio.sleep(0.001)


def average_of(states: list[torch.Tensor], begin_step: int = 0) -> torch.Tensor:
    read_out, before = read_out_of("ema5"), begin_step
    average = torch.zeros_like(states[0], dtype=torch.float64)
    for step, state in zip(STEPS, states, strict=True):
        average += read_out.share(begin_step, before, step) * (state - average)
        before = step
    return average


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[[RunningService], str]:
    def write(service: RunningService, **changes: Any) -> str:
        fields = {"session_id": "s1", "run_id": "run", "resumed": False, "resume_step": 0, "resume_epoch": 0}
        session = Session(**fields, run_secret=changes.get("secret", SECRET))
        RunFile(str(tmp_path / "run.json"), service.endpoint).write(session)
        return str(tmp_path / "run.json")

    return write


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_read_out_loads_in_transformers(
    tmp_path: Path, run_file: Any, capsys: pytest.CaptureFixture[str], tied: bool, dtype: str
) -> None:
    trained = llama(tied=tied)
    manifest = manifest_of(trained)
    with RunningService(tmp_path / "service") as service:
        expected_P = average_of(train(service, manifest)).float()
        out = tmp_path / "model"
        assert main(["export", run_file(service), "--read-out", "ema5", "--out", str(out), "--dtype", dtype]) == 0
    said = capsys.readouterr().out
    assert "read-out   ema5 of run run, step 30: 3 states since step 0" in said
    assert f"written    {out / 'model.safetensors'}" in said
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.dtype == getattr(torch, dtype)
    named = dict(loaded.named_parameters())
    expected = llama(tied=tied)
    for spec in manifest.parameters:
        start = manifest.offsets[spec.fqn]
        values = expected_P[start : start + spec.numel].view(spec.shape)
        dict(expected.named_parameters())[spec.fqn].data.copy_(values)
        tolerance = 1e-6 if dtype == "float32" else 1e-2
        torch.testing.assert_close(named[spec.fqn].float(), values, rtol=tolerance, atol=1e-6)
    if dtype == "float32":
        with torch.no_grad():
            losses = [model(input_ids=TOKENS, labels=TOKENS).loss for model in (loaded, expected)]
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)


def test_a_configuration_may_be_given_and_nothing_is_overwritten(
    tmp_path: Path, run_file: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = llama(tied=False)
    manifest = manifest_of(trained)
    bare = ModelManifest(manifest.parameters, {}, manifest.aliases)
    trained.config.save_pretrained(tmp_path / "own")
    with RunningService(tmp_path / "service") as service:
        train(service, bare)
        arguments = ["export", run_file(service), "--read-out", "ema5", "--out", str(tmp_path / "model")]
        assert main(arguments) == 0
        assert "without config.json, which no loader does without: copy yours" in capsys.readouterr().out
        assert main([*arguments, "--config", str(tmp_path / "own")]) == 2
        assert "exists and is not empty; choose a new folder, or overwrite with --force" in capsys.readouterr().err
        assert main([*arguments, "--force", "--config", str(tmp_path / "own")]) == 0
        assert main([*arguments, "--force", "--config", str(tmp_path / "own" / "config.json")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "own", "run.json", "service"]


@pytest.mark.parametrize(
    ("is_trained", "change", "reason"),
    [
        (lambda name: "layers.0" not in name, {}, "the run does not train all of the model: .*layers.0.* and 6 more"),
        (lambda name: True, {"num_hidden_layers": 1}, "the configuration is of a model without .*layers.1"),
        (lambda name: True, {"vocab_size": 33}, r"'model.embed_tokens.weight' has shape \(32, 16\), and \(33, 16\) by"),
    ],
)
def test_a_model_that_would_not_be_whole_is_refused(
    tmp_path: Path,
    run_file: Any,
    capsys: pytest.CaptureFixture[str],
    is_trained: Any,
    change: dict[str, int],
    reason: str,
) -> None:
    manifest = manifest_of(llama(tied=False), is_trained)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**manifest.config, **change}))
    with RunningService(tmp_path / "service") as service:
        train(service, manifest)
        arguments = ["export", run_file(service), "--read-out", "ema5", "--out", str(tmp_path / "model")]
        assert main([*arguments, "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert re.search(reason, error), error
    assert not (tmp_path / "model").exists()


def test_refusals_are_one_line(tmp_path: Path, run_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["export", *arguments, "--out", str(tmp_path / "model")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    with RunningService(tmp_path / "service") as service:
        train(service, manifest_of(llama(tied=True)))
        path = run_file(service)
        assert " refuses: the read-out is 'ema9'; this run keeps: ema5, mean@500" in refused(path, "--read-out", "ema9")
        assert " refuses: the read-out mean@500 has seen no state yet" in refused(path, "--read-out", "mean@500")
        other = run_file(service, secret="another secret of the same length")
        assert " refuses: run run is protected; the call carries another secret" in refused(other, "--read-out", "ema5")
        (tmp_path / "torn.json").write_text('{"run_id": "run"}')
        assert "torn.json is neither what a job leaves at nowcaster.run_file nor" in refused(
            str(tmp_path / "torn.json"), "--read-out", "ema5"
        )
        assert "cannot be read: No such file" in refused(str(tmp_path / "none.json"), "--read-out", "ema5")
    assert "no service can be reached at" in refused(path, "--read-out", "ema5", "--timeout-s", "5")


def test_the_run_file_is_its_owners_alone(run_file: Any, tmp_path: Path) -> None:
    with RunningService(tmp_path / "service") as service:
        path = Path(run_file(service))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_run_file_in_a_folder_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nowcaster.run_file is '/nowhere/run.json'; allowed: a file in an existing"):
        RunFile("/nowhere/run.json", "127.0.0.1:1")


def parts(values: torch.Tensor, *, digest: int | None = None) -> list[pb.ReadOutPart]:
    data = values.numpy().tobytes()
    manifest = pb.Manifest(parameters=[pb.Parameter(fqn="w", shape=[len(values)])], config_json="{}")
    known = vector_digest(memoryview(data)) if digest is None else digest
    head = pb.ReadOutPart(description=pb.ReadOutDescription(digest=known, manifest=manifest))
    pieces = [(start, data[start : start + 8]) for start in range(0, len(data), 8)]
    return [head, *(pb.ReadOutPart(offset_bytes=a, crc32=crc32(piece), data=piece) for a, piece in pieces)]


def test_what_is_not_whole_is_not_written(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    with (tmp_path / "whole").open("w+b") as file:
        _, manifest = receive(parts(values), file)
    assert manifest.num_elements == 6
    assert (tmp_path / "whole").read_bytes() == values.numpy().tobytes()
    cut, swapped, altered = parts(values)[:-1], parts(values), parts(values)
    swapped[1], swapped[2] = swapped[2], swapped[1]
    altered[1].data = bytes(8 * [1])
    for sent, reason in (
        (cut, "16 of the read-out's 24 bytes arrived"),
        (swapped, "not as it was sent, from byte 0 on"),
        (altered, "not as it was sent, from byte 0 on"),
        (parts(values, digest=1), "is not the one that the service has averaged"),
    ):
        with (tmp_path / "torn").open("w+b") as file, pytest.raises(SidecastError, match=reason):
            receive(sent, file)


def test_a_dtype_that_does_not_reach_as_far_is_refused(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 1e5])
    (tmp_path / "vector").write_bytes(values.numpy().tobytes())
    manifest = ModelManifest.from_shapes([("w", (2,))])
    checkpoint = checkpoint_of_vector(tmp_path / "vector", manifest, None, {})
    require_finite(checkpoint, torch.bfloat16)
    with pytest.raises(ConfigError, match="tensor 'w' has values beyond the range of float16; use another dtype"):
        require_finite(checkpoint, torch.float16)
