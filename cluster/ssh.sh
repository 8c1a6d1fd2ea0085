#!/bin/sh
# A cluster over SSH: the scheduler on the first host, workers on the others (name it twice for one there too).
#   cluster/ssh.sh HOST...
# Each host has daskllm under $DASK (its `dask` command) and the model, and is reached without a password. Ctrl-C
# ends all of it. With TLS=/path/to/certificates, made by certificates.sh and laid there on every host, each host
# shows its own certificate and only who has one of the same authority is let in. Without it, whoever reaches
# the scheduler's port can run code on all hosts (SECURITY.md).
set -eu
[ $# -ge 2 ] || { echo "usage: $0 SCHEDULER_HOST WORKER_HOST..." >&2; exit 2; }
dask=${DASK:-dask}
port=${PORT:-8786}
scheduler=$1
shift
# What is common to all, on the host $1.
options() {
    if [ -n "${TLS:-}" ]; then
        echo "--tls-ca-file $TLS/ca.pem --tls-cert $TLS/$1.pem --tls-key $TLS/$1-key.pem --protocol tls"
    fi
}
address="${TLS:+tls}"
address="${address:-tcp}://$scheduler:$port"
trap 'trap - INT TERM EXIT; kill 0' INT TERM EXIT
# -tt: what runs there ends with its connection.
ssh -tt "$scheduler" "$dask scheduler --host $scheduler --port $port \
    --dashboard-address 127.0.0.1:8787 --preload daskllm.dashboard $(options "$scheduler")" &
for host in "$@"; do
    # --nworkers 1: a worker has all cores of its host to itself. --memory-limit 0: daskllm sizes its memory.
    ssh -tt "$host" "$dask worker $address --nworkers 1 --nthreads 2 --memory-limit 0 --death-timeout 60 \
        $(options "$host")" &
done
echo "client: Client(\"$address\")"
wait
