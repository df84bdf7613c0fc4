#!/bin/sh
# Starts the service as its image does, in the image, and asks for its health: by gRPC's own protocol, which load
# balancers and probes speak and needs no token, and by the command of the image's HEALTHCHECK.
set -eu

START_TIMEOUT_S=120

folder=$(mktemp -d)
service=
end() {
    [ -z "$service" ] || { kill "$service" && wait "$service"; } || true
    rm -rf "$folder"
}
trap end EXIT

make_certs.sh "$folder/service" "$folder/client" service >"$folder/certs.log" 2>&1
sidecast serve --host 0.0.0.0 --port 50051 --metrics-port 9464 \
    --tls-cert "$folder/service/tls.crt" --tls-key "$folder/service/tls.key" --token-file "$folder/client/token" \
    --history-dir /var/lib/sidecast --history-gib 1 >"$folder/log" 2>&1 &
service=$!

python - "$folder/client/ca.crt" "$START_TIMEOUT_S" <<'PYTHON' || { cat "$folder/log" >&2; exit 1; }
import sys

import grpc

with open(sys.argv[1], "rb") as file:
    trusted = grpc.ssl_channel_credentials(file.read())
with grpc.secure_channel("127.0.0.1:50051", trusted) as channel:
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    # The message has one field, whose value 1 is SERVING.
    answer = check(b"", timeout=float(sys.argv[2]), wait_for_ready=True)
    print("grpc.health.v1.Health/Check:", "SERVING" if answer == b"\x08\x01" else answer)
    sys.exit(answer != b"\x08\x01")
PYTHON
sidecast status 127.0.0.1:50051 --tls-ca "$folder/client/ca.crt" --token-file "$folder/client/token"
