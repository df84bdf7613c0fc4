"""Generates the protobuf code from nowcast.proto, or checks that the committed code is current."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
GENERATED = ("nowcast_pb2.py", "nowcast_pb2.pyi", "nowcast_pb2_grpc.py")


def generate(into: Path) -> None:
    """Writes the generated files into a folder."""
    include = Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={HERE}",
            f"--proto_path={include}",
            f"--python_out={into}",
            f"--pyi_out={into}",
            f"--grpc_python_out={into}",
            "nowcast.proto",
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc ended with status {status}")
    stub = into / "nowcast_pb2_grpc.py"
    # protoc knows no package prefix for Python; the installed package is sidecast.protos.
    text = stub.read_text().replace("import nowcast_pb2 as", "from sidecast.protos import nowcast_pb2 as")
    stub.write_text(text)


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
