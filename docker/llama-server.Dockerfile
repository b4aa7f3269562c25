# llama-server from the source that edgepack's own toolchain compiles: for a CPU as it stands, for CUDA with the
# arguments in docker/bake.json. Which of the bases were verified, and where: docker/README.md.
ARG DEBIAN=docker.io/library/debian:bookworm-20260803-slim@sha256:abd67ffcfa541b485a3dff59865ab629aa048a6c613e639d36e7456b0b229241
ARG BUILD=${DEBIAN}
ARG RUNTIME=${DEBIAN}
ARG SNAPSHOT=20261120T000000Z

FROM ${DEBIAN} AS source
ARG SNAPSHOT
# pip asks the sdist's build backend for its metadata, so it checks the hash first, and the backend is locked too.
ARG SDIST_VERSION=0.3.36
ARG SDIST_SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
RUN --mount=type=bind,source=docker/apt-install.sh,target=/mnt/apt-install.sh \
    sh /mnt/apt-install.sh ca-certificates python3-venv
WORKDIR /work
COPY docker/requirements-build.txt .
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes \
        --requirement requirements-build.txt
RUN echo "llama-cpp-python==$SDIST_VERSION --hash=sha256:$SDIST_SHA256" >sdist.txt \
    && PATH="/opt/build/bin:$PATH" pip download --no-cache-dir --no-deps --no-binary llama-cpp-python \
        --no-build-isolation --require-hashes --requirement sdist.txt \
    && mkdir /src \
    && tar --extract --gzip --file "llama_cpp_python-$SDIST_VERSION.tar.gz" --directory /src --strip-components 3 \
        "llama_cpp_python-$SDIST_VERSION/vendor/llama.cpp"

# A folder with build/bin/llama-server can take this stage's place: --build-context build=FOLDER.
FROM ${BUILD} AS build
ARG SNAPSHOT
# Debian has no compiler in it, CUDA's development images have.
RUN --mount=type=bind,source=docker/apt-install.sh,target=/mnt/apt-install.sh \
    command -v g++ || sh /mnt/apt-install.sh g++
COPY --from=source /opt/build/bin/ninja /usr/local/bin/
COPY --from=source /opt/build/lib/python3.11/site-packages/cmake/data /opt/cmake
COPY --from=source /src /src
# Every option as edgepack.toolchain sets it, so that the planner's figures hold; then those of the device.
ARG COMMIT=0c1e57098
ARG OPTIONS=""
ARG JOBS=4
# hadolint ignore=SC2086
RUN if [ "$(uname -m)" = aarch64 ]; then set -- -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16; fi \
    && /opt/cmake/bin/cmake -G Ninja -S /src -B /build -Wno-dev \
        -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF \
        -DCMAKE_POSITION_INDEPENDENT_CODE=ON \
        -DGGML_NATIVE=OFF \
        -DGGML_OPENMP=OFF \
        -DGGML_CCACHE=OFF \
        -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_BUILD_UI=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF \
        -DLLAMA_BUILD_NUMBER=1 \
        -DLLAMA_BUILD_COMMIT="$COMMIT" \
        "$@" $OPTIONS \
    && /opt/cmake/bin/cmake --build /build --target llama-server llama-bench --parallel "$JOBS" \
    && strip /build/bin/llama-server /build/bin/llama-bench

# The programs alone, for edgepack.service (docker/README.md).
FROM scratch AS program
COPY --from=build /build/bin/llama-* /
USER 10001:10001
ENTRYPOINT ["/llama-server"]

FROM ${RUNTIME}
ARG SNAPSHOT
# curl asks for the server's health. Forward-compatibility libraries of CUDA are for the drivers of discrete cards; on a
# Jetson they would hide the driver that the container toolkit brings in.
RUN --mount=type=bind,source=docker/apt-install.sh,target=/mnt/apt-install.sh \
    { command -v curl || sh /mnt/apt-install.sh curl; } \
    && { [ "$(uname -m)" != aarch64 ] || rm -rf /usr/local/cuda/compat; } \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin edgepack
COPY --from=build /build/bin/llama-* /usr/local/bin/
# Nothing is written outside /tmp: run it with a read-only root.
ENV HOME=/tmp \
    CUDA_CACHE_PATH=/tmp/cuda-cache
USER 10001:10001
WORKDIR /bundle
EXPOSE 8080
HEALTHCHECK --interval=60s --timeout=5s --retries=3 --start-period=120s \
    CMD ["curl", "-fsS", "--noproxy", "127.0.0.1", "http://127.0.0.1:8080/health"]
ENTRYPOINT ["/usr/local/bin/llama-server"]
