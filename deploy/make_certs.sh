#!/bin/sh
# Makes what a service off loopback needs: a certificate of an authority of its own, and the shared secret.
# Does nothing while what is there is good for another month.
#
# usage: make_certs.sh SERVICE_DIR CLIENT_DIR NAME...
#   SERVICE_DIR  receives tls.crt and tls.key; only the service may see it
#   CLIENT_DIR   receives ca.crt and token, for the service and its clients
#   NAME         host names under which clients reach the service; localhost and 127.0.0.1 are always added
set -eu
umask 077

VALID_DAYS=365
RENEW_WITHIN_S=$((30 * 24 * 3600))

if [ $# -lt 3 ]; then
    sed -n 's/^# \{0,1\}//; 5,8p' "$0" >&2
    exit 2
fi
service_dir=$1
client_dir=$2
shift 2

alternatives="DNS:localhost,IP:127.0.0.1"
is_for_all_names=true
for name in "$@"; do
    alternatives="$alternatives,DNS:$name"
    openssl x509 -in "$service_dir/tls.crt" -noout -checkhost "$name" 2>/dev/null | grep -q "does match" ||
        is_for_all_names=false
done

if "$is_for_all_names" && [ -s "$client_dir/token" ] &&
    openssl verify -CAfile "$client_dir/ca.crt" "$service_dir/tls.crt" >/dev/null 2>&1 &&
    openssl x509 -in "$service_dir/tls.crt" -noout -checkend "$RENEW_WITHIN_S" >/dev/null; then
    echo "certificate and token are there already"
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days "$VALID_DAYS" \
    -subj "/CN=sidecast deployment" -addext "keyUsage=critical,keyCertSign" \
    -keyout "$work/ca.key" -out "$work/ca.crt"
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$1" \
    -keyout "$work/tls.key" -out "$work/tls.csr"
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$alternatives" >"$work/extensions"
openssl x509 -req -in "$work/tls.csr" -CA "$work/ca.crt" -CAkey "$work/ca.key" -CAcreateserial \
    -days "$VALID_DAYS" -extfile "$work/extensions" -out "$work/tls.crt"
openssl rand -hex 32 >"$work/token"

# The authority's key ends with this script: nobody can sign another certificate with it.
mkdir -p "$service_dir" "$client_dir"
install -m 0400 "$work/tls.key" "$service_dir/tls.key"
install -m 0444 "$work/tls.crt" "$service_dir/tls.crt"
install -m 0444 "$work/ca.crt" "$client_dir/ca.crt"
install -m 0440 "$work/token" "$client_dir/token"
echo "made a certificate for $alternatives, valid for $VALID_DAYS days, and a token"
