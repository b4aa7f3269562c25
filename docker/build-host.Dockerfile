# A host that builds bundles. Not built by this project's tests; the base image's digest is unknown: not verified.
FROM docker.io/library/python:3.12-slim-bookworm

# The compilers of the toolchain (the second for bundles with a server for aarch64), the signer, the reader of bundles.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential g++-aarch64-linux-gnu openssh-client skopeo \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN pip install --no-cache-dir "/src[build]" && rm -rf /src

RUN useradd --create-home --shell /usr/sbin/nologin edgepack
USER edgepack
WORKDIR /home/edgepack
# Compiled once, into the image: about four minutes on two cores.
RUN edgepack toolchain install

ENTRYPOINT ["edgepack"]
CMD ["--help"]
