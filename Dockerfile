# docker build --target cpu  -t nybble:cpu  .
# docker build --target cuda -t nybble:cuda .
# docker run -p 8000:8000 -v nybble:/data -e NYBBLE_API_KEY=… nybble:cpu [MODEL] [flags]   (GPU: add --gpus all)
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS cpu-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/
RUN python -m venv /opt/nybble \
    && /opt/nybble/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt \
        --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple torch
COPY --from=wheel /wheels /wheels
RUN /opt/nybble/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt /wheels/*.whl

FROM python:${PYTHON}-slim AS cuda-packages
COPY constraints.txt /tmp/
COPY --from=wheel /wheels /wheels
# The wheels of torch bring CUDA along; the host needs only its driver.
RUN python -m venv /opt/nybble \
    && wheel="$(ls /wheels/*.whl)" \
    && /opt/nybble/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt "${wheel}[gpu]"

FROM python:${PYTHON}-slim AS base
LABEL org.opencontainers.image.title="nybble" \
      org.opencontainers.image.description="Quantizes a language model, serves it over HTTP, measures both" \
      org.opencontainers.image.licenses="Apache-2.0"
# PYTHONSAFEPATH keeps the working directory off the import path.
ENV PATH=/opt/nybble/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/data \
    HF_HOME=/data/huggingface \
    NYBBLE_CACHE_DIR=/data/nybble \
    NUMBA_CACHE_DIR=/data/numba \
    TRITON_CACHE_DIR=/data/triton \
    NYBBLE_HOST=0.0.0.0
# Group 0 may write, so that clusters which pick a user id of their own can run the image.
RUN useradd --uid 2000 --gid 0 --home-dir /data --no-create-home nybble \
    && mkdir -p /data/huggingface /data/nybble /data/numba /data/triton \
    && chown -R 2000:0 /data && chmod -R g=u /data
USER 2000:0
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=30m --retries=3 CMD ["nybble", "health"]
ENTRYPOINT ["nybble", "serve"]
CMD ["--host", "0.0.0.0"]

FROM base AS cuda
USER 0:0
# Triton compiles a small launcher for each kernel. Debian keeps only its newest versions, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 2000:0
COPY --from=cuda-packages /opt/nybble /opt/nybble

FROM base AS cpu
COPY --from=cpu-packages /opt/nybble /opt/nybble
