"""``sidecast export``: a read-out of a run as a checkpoint, while the run goes on."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from zlib import crc32

from sidecast.errors import ConfigError, SidecastError, one_line, printable
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.commands.connection import add_options, connected
from sidecast.nowcaster_service.config import ServiceConfig, read_file
from sidecast.nowcaster_service.vector_store import FP32_BYTES

if TYPE_CHECKING:
    from sidecast.protos import nowcast_pb2 as pb

DTYPES = ("bfloat16", "float16", "float32")

_DESCRIPTION = """\
Writes one of a run's read-outs as a Hugging Face model directory. The service has it: training is not touched, and does
not wait. RUN is a file with the run's id and secret, which the service asks for: what rank 0 leaves at the setting
run_file, or the sidecast_state.json of one of the run's checkpoints.
"""


@dataclass(frozen=True)
class RunAddress:
    """What a run file says; a checkpoint's has no endpoint, and empty text stands for it."""

    run_id: str
    run_secret: str
    endpoint: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a read-out of a running job as a checkpoint",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_file", type=Path, metavar="RUN", help="file of the job: nowcaster.run_file")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--read-out", metavar="NAME", help="one of nowcaster.read_outs, such as ema5, or raw")
    chosen.add_argument(
        "--best",
        type=int,
        nargs="?",
        const=1,
        metavar="RANK",
        help="one of nowcaster.keep_best, of whatever step: 1, the default, has the lowest loss on the service's probe",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--endpoint", metavar="HOST:PORT", help="of the service (default: as RUN says)")
    add_options(parser)
    parser.add_argument(
        "--config", type=Path, metavar="DIR_OR_JSON", help="the model's config.json, if not the one that the job has"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="for the transfer (default: %(default)g)")
    parser.add_argument("--force", action="store_true", help="overwrite files in the output folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetches the read-out, checks it, writes it and prints a summary.

    Returns:
        The exit status, 0.

    Raises:
        SidecastError: The service does not answer, or refuses.
        ConfigError: Something that the user gave cannot be used.
    """
    import torch

    from sidecast.checkpoints.checkpoint import read_json_object
    from sidecast.checkpoints.huggingface import CONFIG_FILE
    from sidecast.checkpoints.output import check_output, missing_config, write_nowcast
    from sidecast.checkpoints.vector_checkpoint import checkpoint_of_vector, require_finite

    check_output(args.out, [], args.force)
    address = read_run_file(args.run_file)
    config = None
    if args.config is not None:
        config = read_json_object(args.config / CONFIG_FILE if args.config.is_dir() else args.config)
    try:
        args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".sidecast-export-", dir=args.out.absolute().parent) as file:
            status, manifest = _fetch(address, args, file)
            metadata = {"sidecast_read_out": status.name, "sidecast_step": str(status.step)}
            checkpoint = checkpoint_of_vector(Path(file.name), manifest, config, metadata)
            dtype = getattr(torch, args.dtype)
            with torch.no_grad():
                require_finite(checkpoint, dtype)
                path = write_nowcast(checkpoint, lambda name: None, args.out, dtype=dtype)
    except OSError as error:
        raise ConfigError(f"cannot write the read-out: {one_line(error)}") from error
    missing = missing_config(checkpoint, None)
    lines = [
        f"read-out   {status.name} of run {address.run_id}, step {status.step}: {status.num_snapshots} states since "
        f"step {status.begin_step}",
        *([f"loss       {status.probe_loss:.7g} on the service's probe"] if status.HasField("probe_loss") else []),
        f"written    {path}",
        *([f"           without {missing}, which no loader does without: copy yours"] if missing else []),
    ]
    sys.stdout.write("\n".join(map(printable, lines)) + "\n")
    return 0


def read_run_file(path: Path) -> RunAddress:
    """Reads what rank 0 left.

    Raises:
        ConfigError: It cannot be read, or is something else.
    """
    text = read_file("RUN", path)
    try:
        content = json.loads(text)
        values = [content["run_id"], content["run_secret"], content.get("endpoint", "")]
        if not all(isinstance(value, str) and value.isascii() and value.isprintable() for value in values):
            raise TypeError("no texts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"RUN {path} is neither what a job leaves at nowcaster.run_file nor a checkpoint's state"
        ) from error
    return RunAddress(*values)


def _fetch(address: RunAddress, args: argparse.Namespace, file: IO[bytes]) -> tuple[pb.ReadOutStatus, ModelManifest]:
    from sidecast.protos import nowcast_pb2 as pb

    endpoint = args.endpoint or address.endpoint or f"{ServiceConfig.host}:{ServiceConfig.port}"
    name = args.read_out if args.best is None else f"best{args.best}"
    request = pb.ReadOutRequest(run_id=address.run_id, name=name)
    with connected(endpoint, args, address.run_secret) as service:
        parts = service.stub.ReadOut(request, timeout=args.timeout_s, metadata=service.metadata)
        return receive(parts, file)


def receive(parts: Iterable[Any], file: IO[bytes]) -> tuple[pb.ReadOutStatus, ModelManifest]:
    """Writes a read-out's values to a file, and sees that they are all there and what the service has.

    Args:
        parts: As the service sends them.
        file: New, open for reading and writing; what it holds is of use only once this returns.

    Returns:
        What the read-out is, and of which model.

    Raises:
        SidecastError: A part is missing, or another than was sent.
    """
    import mmap

    from sidecast.protos.codec import vector_digest

    stream = iter(parts)
    description = next(stream).description
    sent = description.manifest
    manifest = ModelManifest.from_shapes(
        ((item.fqn, item.shape) for item in sent.parameters), json.loads(sent.config_json), dict(sent.aliases)
    )
    num_bytes = 0
    for part in stream:
        if part.offset_bytes != num_bytes or crc32(part.data) != part.crc32:
            raise SidecastError(f"the read-out is not as it was sent, from byte {num_bytes} on; export it again")
        file.write(part.data)
        num_bytes += len(part.data)
    file.flush()
    expected_bytes = FP32_BYTES * manifest.num_elements
    if num_bytes != expected_bytes:
        raise SidecastError(f"{num_bytes} of the read-out's {expected_bytes} bytes arrived; export it again")
    with mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as vector:
        if vector_digest(vector) != description.digest:
            raise SidecastError("the read-out is not the one that the service has averaged; export it again")
    return description.status, manifest
