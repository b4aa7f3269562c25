# The Python of transformers' edgepack_server on a Jetson with JetPack 6 (L4T r36). PyTorch is that of NVIDIA's image, since
# PyPI has none for its CUDA 12 and Orin's sm_87; what lies over it is locked. Which bases were verified: docker/README.md.
ARG BASE=nvcr.io/nvidia/pytorch:25.06-py3-igpu@sha256:05bb8855c5ab94a556653fe4f7206e922c8ec93fdb0c88a02c2e013e20cff1d2

FROM ${BASE}
COPY docker/requirements-transformers-l4t.txt /requirements.txt
# An environment before the image's own packages, of which it sees torch and numpy. NVIDIA's PIP_CONSTRAINT names versions
# for pip to stay with, and would refuse ours.
RUN python3 -m venv --without-pip --system-site-packages /opt/server \
    && PIP_CONSTRAINT="" python3 -m pip --python /opt/server/bin/python install --no-cache-dir --no-deps --compile \
        --only-binary :all: --ignore-installed --require-hashes --requirement /requirements.txt \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin edgepack
# The image's CUDA is newer than JetPack's driver. NVIDIA's entry point links these libraries into place when it starts,
# which a read-only root does not allow.
ENV PATH=/opt/server/bin:${PATH} \
    LD_LIBRARY_PATH=/usr/local/cuda/compat/lib.real:${LD_LIBRARY_PATH} \
    PYTHONPATH=/bundle \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=edgepack \
    HF_HUB_OFFLINE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /bundle
EXPOSE 8080
HEALTHCHECK --interval=60s --timeout=5s --retries=3 --start-period=120s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["python3"]
CMD ["-m", "edgepack_server", "--help"]
