#!/bin/sh
# Writes the lock files of the images anew: every package of a requirements file, exact, with the hashes of its
# files for every platform. Run it where uv (a PyPI package) is, after changing a version; it needs a package index.
set -eu
cd "$(dirname "$0")/.."

# The newest versions as of this moment, so that two runs write the same; move it forward to take in fixes.
UV_EXCLUDE_NEWER=2026-11-26T00:00:00Z
export UV_EXCLUDE_NEWER

lock() {
    name=$1
    shift
    {
        echo "# Written by docker/lock.sh: what docker/*.Dockerfile installs, nothing that is not in here."
        uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate "$@"
    } >"docker/requirements-$name.txt"
}

server=edgepack/server/requirements
lock build docker/requirements-build.in --python-version 3.11
lock build-host pyproject.toml docker/requirements-build.in --extra build --python-version 3.11
lock front $server/front.txt --python-version 3.10
lock onnx-genai $server/onnx-genai.txt --python-version 3.11
lock onnx-genai-cuda $server/onnx-genai-cuda.txt --python-version 3.11

# With CUDA 13 as on PyPI, for x86-64 and for a Jetson with JetPack 7.
lock transformers-cuda $server/transformers.txt docker/requirements-transformers.in --python-version 3.11

# PyTorch's CPU builds are not on PyPI, where torch 2.13.0 brings 3 GB of CUDA for x86-64 and aarch64 alike; their
# index is named in the Dockerfile. The hashes are those of the wheels for the image's Python, 3.11.
excluded=$(mktemp)
trap 'rm -f "$excluded"' EXIT
echo "torch ; sys_platform == 'never'" >"$excluded"
lock transformers $server/transformers.txt docker/requirements-torch.in docker/requirements-transformers.in \
    --override "$excluded" --no-emit-package torch --python-version 3.11
cat >>docker/requirements-transformers.txt <<'PINS'
torch==2.13.0+cpu \
    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b \
    --hash=sha256:84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7
PINS

# On JetPack 6 torch, what it needs and the numpy that it was compiled with are those of NVIDIA's image (Python 3.12).
echo "numpy ; sys_platform == 'never'" >>"$excluded"
set -- torch numpy mpmath networkx setuptools sympy
for package in "$@"; do
    shift
    set -- "$@" --no-emit-package "$package"
done
lock transformers-l4t $server/transformers.txt --override "$excluded" "$@" --python-version 3.12
