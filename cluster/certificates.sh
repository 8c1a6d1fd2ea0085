#!/bin/sh
# A certificate authority of the cluster's own, and a certificate for each host, client and user:
#   cluster/certificates.sh DIRECTORY NAME...
# A later call adds names and leaves the others as they are. ca.pem goes to everybody, NAME.pem and NAME-key.pem to
# their host alone, ca-key.pem nowhere: whoever has it can join the cluster.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 DIRECTORY NAME..." >&2; exit 2; }
directory=$1
shift
umask 077
mkdir -p "$directory"
cd "$directory"
if [ ! -e ca-key.pem ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=daskllm cluster" -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout ca-key.pem -out ca.pem 2>/dev/null
fi
for name in "$@"; do
    [ ! -e "$name.pem" ] || continue
    extensions=$(mktemp)
    printf 'basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=DNS:%s\n' "$name" \
        >"$extensions"
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$name" \
        -keyout "$name-key.pem" -out "$name.csr" 2>/dev/null
    openssl x509 -req -in "$name.csr" -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 825 \
        -extfile "$extensions" -out "$name.pem" 2>/dev/null
    rm -f "$extensions" "$name.csr"
    echo "$directory/$name.pem"
done
