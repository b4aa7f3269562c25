#!/bin/sh
# Qwen/Qwen2.5-1.5B-Instruct gptq-int4-g128 on NVIDIA GeForce RTX 4060 8 GB
# sh start.sh            run the server here, in the foreground
# sh start.sh preflight  succeed when there is as much free memory as the plan needs
# sh start.sh key        make the API key if there is none, and say where it is
# sh start.sh health     succeed when the server answers
# sh start.sh ready      wait until it does
# sh start.sh container  run it with docker compose instead
# sh start.sh install    make a Python environment out of requirements.txt
# sh start.sh chat       run the front beside it: /chat, /metrics and the OpenAI API, on EDGEPACK_CHAT_HOST (as the
#                        server) and EDGEPACK_CHAT_PORT (8081)
# EDGEPACK_HOST (127.0.0.1), EDGEPACK_PORT (8080), EDGEPACK_STATE (folder of the key), EDGEPACK_VENV (the environment) and
# EDGEPACK_PYTHON (a program) change where it runs; EDGEPACK_FORCE=1 starts in too little memory all the same; nothing
# changes the flags that bound memory.
set -eu
umask 077

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
state=${EDGEPACK_STATE:-${STATE_DIRECTORY:-${XDG_STATE_HOME:-${HOME:-/root}/.local/state}/edgepack}}
key_file=${EDGEPACK_KEY_FILE:-$state/api-key}
host=${EDGEPACK_HOST:-127.0.0.1}
port=${EDGEPACK_PORT:-8080}
if [ "$(id -u)" -eq 0 ]; then venv=${EDGEPACK_VENV:-/opt/edgepack/venv}; else venv=${EDGEPACK_VENV:-$state/venv}; fi

die() {
    printf 'start.sh: %s\n' "$1" >&2
    exit 1
}

# What the plan needs at most, against what is free: before the load, not by the kernel in the middle of it.
preflight() {
    [ "${EDGEPACK_FORCE:-0}" = 1 ] && return
    available=$(awk '$1 == "MemAvailable:" { printf "%.0f", $2 * 1024 }' "${EDGEPACK_MEMINFO:-/proc/meminfo}")
    [ "${available:-0}" -ge 46137344 ] ||
        die "46137344 bytes of memory are needed and $available are available (EDGEPACK_FORCE=1 starts it all the same)"
    available=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits | awk 'NR == 1 { printf "%.0f", $1 * 1048576 }')
    [ "${available:-0}" -ge 1443889152 ] ||
        die "1443889152 bytes on the card are needed and ${available:-0} are free (EDGEPACK_FORCE=1 starts it all the same)"
}

make_key() {
    if [ -s "$key_file" ]; then return; fi
    mkdir -p -- "$(dirname -- "$key_file")"
    fresh=$(mktemp "$key_file.XXXXXX")
    od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n' >"$fresh"
    printf '\n' >>"$fresh"
    # A link, not a rename: of two first starts at once, one makes the key and both use it.
    if ! ln -- "$fresh" "$key_file"; then
        [ -s "$key_file" ] || die "cannot make $key_file"
    fi
    rm -f -- "$fresh"
}

# Whether the Python $1 has the modules that are named in $2.
has() {
    # shellcheck disable=SC2086
    PYTHONPATH=$here "$1" -c 'import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))' $2 2>/dev/null
}

# A Python that has the modules named in $1; $2 is how to get one.
find_python() {
    for python in ${EDGEPACK_PYTHON:+"$EDGEPACK_PYTHON"} "$venv/bin/python3" /opt/edgepack/venv/bin/python3 python3; do
        if has "$python" "$1"; then return; fi
        [ -z "${EDGEPACK_PYTHON:-}" ] || break
    done
    die "no Python with $1 (${2:-sh start.sh install, or EDGEPACK_PYTHON=PROGRAM})"
}

# edgepack_server lies beside this file; a bundle is not written into.
prepare_python() {
    cd -- "$here"
    PYTHONPATH=$here PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
    export PYTHONPATH PYTHONNOUSERSITE PYTHONDONTWRITEBYTECODE HF_HUB_OFFLINE
}

install_python() {
    umask 022  # the unit's user reads it
    python3 -m venv "$venv"
    "$venv/bin/python3" -m pip install --requirement "$here/requirements.txt"
}

healthy() {
    python3 -c 'import sys, urllib.request
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    direct.open(sys.argv[1], timeout=5)
except OSError as error:
    sys.exit("%s: %s" % (sys.argv[1], error))' "http://$host:$port/health"
}

ready() {
    tries=0
    until healthy 2>/dev/null; do
        tries=$((tries + 1))
        # systemd waits for this command also when the server has died meanwhile, whose id it hands over.
        [ -z "${MAINPID:-}" ] || [ -d "/proc/$MAINPID" ] || die "the server ended before it answered"
        [ "$tries" -lt 360 ] || die "no answer from http://$host:$port/health within 360 s"
        sleep 1
    done
}

container() {
    command -v docker >/dev/null || die "docker is not installed"
    preflight
    make_key
    if [ "$(id -u)" -eq 0 ]; then
        EDGEPACK_UID=10001
        EDGEPACK_GID=10001
        chown "$EDGEPACK_UID:$EDGEPACK_GID" "$key_file"
    else
        EDGEPACK_UID=$(id -u)
        EDGEPACK_GID=$(id -g)
    fi
    EDGEPACK_KEY_FILE=$key_file
    export EDGEPACK_UID EDGEPACK_GID EDGEPACK_KEY_FILE
    EDGEPACK_GID_VIDEO=$(getent group video | cut -d: -f3)
    [ -n "$EDGEPACK_GID_VIDEO" ] || die 'there is no group video'
    export EDGEPACK_GID_VIDEO
    EDGEPACK_GID_RENDER=$(getent group render | cut -d: -f3)
    [ -n "$EDGEPACK_GID_RENDER" ] || die 'there is no group render'
    export EDGEPACK_GID_RENDER
    exec docker compose --file "$here/compose.yaml" up --detach
}

chat() {
    find_python 'fastapi uvicorn jinja2'
    make_key
    prepare_python
    exec "$python" -m edgepack_server --engine front --plan "$here/plan.json" \
        --upstream "http://$host:$port" --upstream-key-file "$key_file" \
        --alias Qwen/Qwen2.5-1.5B-Instruct \
        --ctx-size 8192 \
        --parallel 2 \
        --host "${EDGEPACK_CHAT_HOST:-$host}" --port "${EDGEPACK_CHAT_PORT:-8081}" \
        --api-key-file "$key_file"
}

case "${1:-run}" in
key)
    make_key
    if [ -n "${2:-}" ]; then chown "$2" "$key_file"; fi
    printf '%s\n' "$key_file"
    exit
    ;;
preflight)
    preflight
    exit
    ;;
health)
    healthy
    exit
    ;;
ready)
    ready
    exit
    ;;
container) container ;;
install)
    install_python
    exit
    ;;
chat) chat ;;
run) ;;
*) die "unknown command $1" ;;
esac

[ -f "$here/model/config.json" ] || [ -f "$here/model/genai_config.json" ] || die "$here/model is missing: unpack the whole bundle"
find_python vllm
preflight
make_key
prepare_python
export DO_NOT_TRACK=1
export HF_HUB_OFFLINE=1
export TRANSFORMERS_OFFLINE=1
export VLLM_DO_NOT_TRACK=1
export VLLM_NO_USAGE_STATS=1
# Empty it crashes a worker on a CPU, set it overrides the plan's bytes.
unset VLLM_CPU_KVCACHE_SPACE
export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-$state/vllm}"
# PyTorch's own place for what it compiles is in /tmp: who was there first could have it load other code.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$VLLM_CACHE_ROOT/inductor}"
# In the environment, for a command line can be read by everybody.
VLLM_API_KEY=$(cat -- "$key_file")
export VLLM_API_KEY
exec "$python" -m vllm.entrypoints.openai.api_server \
    --model "$here/model" \
    --served-model-name Qwen/Qwen2.5-1.5B-Instruct \
    --load-format safetensors \
    --dtype bfloat16 \
    --generation-config vllm \
    --max-model-len 4096 \
    --max-num-seqs 2 \
    --max-num-batched-tokens 512 \
    --max-num-queued-reqs 34 \
    --enable-chunked-prefill \
    --enable-prefix-caching \
    --block-size 16 \
    --kv-cache-dtype bfloat16 \
    --kv-cache-memory-bytes 235339776 \
    --gpu-memory-utilization 0.63 \
    --compilation-config.cudagraph_mode FULL_DECODE_ONLY \
    --cudagraph-capture-sizes 1 2 \
    --max-logprobs 40 \
    --enable-prompt-tokens-details \
    --no-enable-log-requests \
    --disable-uvicorn-access-log \
    --host "$host" --port "$port"
