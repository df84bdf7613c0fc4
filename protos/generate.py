"""Generates the protobuf code from nowcast.proto and what it imports, or checks that the committed code is current."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
MESSAGES = ("nowcast", "nowcast_status")
GENERATED = (*(f"{name}_pb2.{kind}" for name in MESSAGES for kind in ("py", "pyi")), "nowcast_pb2_grpc.py")
# protoc knows no package prefix for Python; the installed package is sidecast.protos.
BARE_IMPORT = re.compile(rf"^(import|from) (?=(?:{'|'.join(MESSAGES)})_pb2\b)", re.MULTILINE)
PACKAGED = {"import": "from sidecast.protos import ", "from": "from sidecast.protos."}


def generate(into: Path) -> None:
    """Writes the generated files into a folder."""
    include = Path(grpc_tools.__file__).parent / "_proto"
    outputs = (
        (MESSAGES, (f"--python_out={into}", f"--pyi_out={into}")),
        # The other has no services.
        (MESSAGES[:1], (f"--grpc_python_out={into}",)),
    )
    for names, options in outputs:
        paths = [f"{name}.proto" for name in names]
        status = protoc.main(["protoc", f"--proto_path={HERE}", f"--proto_path={include}", *options, *paths])
        if status != 0:
            raise SystemExit(f"protoc ended with status {status}")
    for name in GENERATED:
        path = into / name
        path.write_text(BARE_IMPORT.sub(lambda found: PACKAGED[found[1]], path.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if the committed code is stale")
    if not parser.parse_args().check:
        generate(HERE)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = [name for name in GENERATED if (Path(folder) / name).read_bytes() != (HERE / name).read_bytes()]
    if stale:
        sys.stderr.write(f"generated code is stale: {', '.join(stale)}; run `make proto`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
