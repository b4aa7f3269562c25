# A host that builds bundles: edgepack, its toolchain, a cross compiler, the signer and the reader of bundles.
# Which bases were verified, and where: docker/README.md.
ARG DEBIAN=docker.io/library/debian:bookworm-20260803-slim@sha256:abd67ffcfa541b485a3dff59865ab629aa048a6c613e639d36e7456b0b229241
ARG SNAPSHOT=20261120T000000Z

FROM ${DEBIAN} AS tools
ARG SNAPSHOT
# The second compiler is for bundles that carry a server for aarch64.
RUN --mount=type=bind,source=docker/apt-install.sh,target=/mnt/apt-install.sh \
    sh /mnt/apt-install.sh ca-certificates g++ g++-aarch64-linux-gnu openssh-client python3-venv skopeo
COPY docker/requirements-build-host.txt /requirements.txt
RUN python3 -m venv /opt/edgepack \
    && /opt/edgepack/bin/pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes \
        --requirement /requirements.txt
COPY . /src
RUN /opt/edgepack/bin/pip install --no-cache-dir --no-deps --no-build-isolation /src \
    && useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin edgepack
ENV PATH=/opt/edgepack/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
USER 10001:10001
WORKDIR /home/edgepack
ENTRYPOINT ["edgepack"]
CMD ["--help"]

FROM tools
# Compiled once, into the image: about four minutes on two cores.
RUN edgepack toolchain install
USER 10001:10001
