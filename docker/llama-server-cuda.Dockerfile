# llama-server with CUDA from the source the planner counts with; for Jetson Orin on JetPack 6 unless told otherwise.
# Not built by this project's tests: that needs the device or its base images, whose digests are unknown.
ARG DEVEL=nvcr.io/nvidia/l4t-jetpack:r36.4.0
ARG RUNTIME=nvcr.io/nvidia/l4t-jetpack:r36.4.0

FROM ${DEVEL} AS build
ARG COMMIT=0c1e57098bba43ac29e6e3b677cdceebdd22334f
ARG ARCHITECTURES=87
ARG NO_VMM=ON
ARG JOBS=4

RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ca-certificates cmake git \
    && rm -rf /var/lib/apt/lists/*

# A fetch by commit: git verifies that the content is what the commit says.
RUN git init --quiet /src \
    && git -C /src fetch --quiet --depth 1 https://github.com/ggml-org/llama.cpp "$COMMIT" \
    && git -C /src checkout --quiet --detach FETCH_HEAD \
    && test "$(git -C /src rev-parse HEAD)" = "$COMMIT"

RUN cmake -S /src -B /build \
        -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF \
        -DGGML_NATIVE=OFF \
        -DGGML_OPENMP=OFF \
        -DGGML_CUDA=ON \
        -DGGML_CUDA_NO_VMM="$NO_VMM" \
        -DCMAKE_CUDA_ARCHITECTURES="$ARCHITECTURES" \
        -DLLAMA_OPENSSL=OFF \
    && cmake --build /build --target llama-server llama-bench --parallel "$JOBS" \
    && strip /build/bin/llama-server /build/bin/llama-bench

# docker build --target program --output type=local,dest=/usr/local/bin: the programs alone, for systemd.
FROM scratch AS program
COPY --from=build /build/bin/llama-server /build/bin/llama-bench /

FROM ${RUNTIME}
# curl is the health check of the rendered compose file.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /build/bin/llama-server /build/bin/llama-bench /usr/local/bin/
USER 10001:10001
ENTRYPOINT ["/usr/local/bin/llama-server"]
