# The Python that a bundle's own edgepack_server runs in; the server itself comes with the bundle, mounted at /bundle.
# RUNTIME is onnx-genai, onnx-genai-cuda, transformers, transformers-cuda or front. Which bases were verified, and where:
# docker/README.md.
ARG DEBIAN=docker.io/library/debian:bookworm-20260803-slim@sha256:abd67ffcfa541b485a3dff59865ab629aa048a6c613e639d36e7456b0b229241
ARG SNAPSHOT=20261120T000000Z

FROM ${DEBIAN} AS install
ARG SNAPSHOT
RUN --mount=type=bind,source=docker/apt-install.sh,target=/mnt/apt-install.sh \
    sh /mnt/apt-install.sh ca-certificates python3-venv
ARG RUNTIME=onnx-genai
# Where pip looks beside its index: PyTorch has its CPU builds elsewhere (docker/bake.json), a folder of wheels may be
# mounted. Whatever they give must have the hashes of the lock file.
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_FIND_LINKS=""
COPY docker/requirements-${RUNTIME}.txt /requirements.txt
# pip is not in what the device gets; byte code is, since the root is read-only there.
RUN python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/server \
    && /opt/pip/bin/pip --python /opt/server/bin/python install --no-cache-dir --no-deps --compile \
        --only-binary :all: --require-hashes --requirement /requirements.txt

FROM ${DEBIAN}
ARG SNAPSHOT
RUN --mount=type=bind,source=docker/apt-install.sh,target=/mnt/apt-install.sh \
    sh /mnt/apt-install.sh python3-minimal libpython3-stdlib \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin edgepack
COPY --from=install /opt/server /opt/server
# Nothing is written outside /tmp, and a user whom the image does not know (compose's user:) has a name all the same.
# The libraries are where the wheels of CUDA 13 put them; a CPU image has no such folder.
ENV PATH=/opt/server/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/bundle \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=edgepack \
    HF_HUB_OFFLINE=1 \
    LD_LIBRARY_PATH=/opt/server/lib/python3.11/site-packages/nvidia/cu13/lib:/opt/server/lib/python3.11/site-packages/nvidia/cudnn/lib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /bundle
EXPOSE 8080
HEALTHCHECK --interval=60s --timeout=5s --retries=3 --start-period=120s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["python3"]
CMD ["-m", "edgepack_server", "--help"]
