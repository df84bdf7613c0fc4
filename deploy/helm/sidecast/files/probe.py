"""Asks the service for its health, by gRPC's own protocol over TLS: probe.py ADDRESS NAME CA [CERT KEY]."""

import sys
from pathlib import Path

import grpc

TIMEOUT_S = 4.0
# The answer has one field, whose value 1 is SERVING.
SERVING = b"\x08\x01"

address, name, *files = sys.argv[1:]
authority, cert, key = ([Path(file).read_bytes() for file in files] + [None, None])[:3]
credentials = grpc.ssl_channel_credentials(authority, key, cert)
# The certificate may be for the name alone under which clients come.
options = [("grpc.ssl_target_name_override", name), ("grpc.enable_http_proxy", 0)]
with grpc.secure_channel(address, credentials, options) as channel:
    try:
        answer = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        sys.exit(f"{address}: {error.code().name}: {error.details()}")
sys.exit(0 if answer == SERVING else f"{address}: not serving")
