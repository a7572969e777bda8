# syntax=docker/dockerfile:1
#
#   docker build -t proa .                                    CPU
#   docker build -t proa --build-arg TORCH_BUILD=cu130 .      CUDA 13.0 (run with --gpus all)
#   docker build -t proa-vllm --target vllm .                 on vLLM, for many GPUs; see docs/vllm.md
#   docker run -p 8000:8000 -e PROA_API_KEY=choose-one -v proa-models:/models -v proa-data:/data proa
#
# The container listens on all its interfaces, so it wants an API key.

# For an image that can be built again bit by bit, give one by digest: python@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS build
# Which torch to install: cpu, or a CUDA version of https://download.pytorch.org/whl (cu126, cu130).
ARG TORCH_BUILD=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH_BUILD}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
RUN python -m venv /opt/proa
WORKDIR /src
# torch alone first: this layer is large and changes only with its pin.
COPY pyproject.toml requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    torch="$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)" \
    && /opt/proa/bin/pip install --index-url "${TORCH_INDEX}" "${torch}"
COPY . ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/proa/bin/pip install --constraint requirements.lock .

FROM ${VLLM_IMAGE} AS vllm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 proa \
    && install --directory --owner=proa --group=proa /models /data
COPY . /src
# With the image's own torch and transformers, which are vLLM's.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install /src && rm -rf /src
ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/models/huggingface \
    PROA_CACHE_DIR=/models/proa \
    PROA_VOTES=/data/votes.sqlite3 \
    PROA_HOST=0.0.0.0 \
    PROA_PORT=8000 \
    PROA_BACKEND=vllm
USER proa
WORKDIR /home/proa
VOLUME /models /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start downloads and quantises the model.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['PROA_PORT']}/readyz\", timeout=2)"]
ENTRYPOINT ["proa"]
CMD ["serve"]

FROM ${PYTHON_IMAGE}
RUN useradd --create-home --uid 1000 proa \
    && install --directory --owner=proa --group=proa /models /data
COPY --from=build /opt/proa /opt/proa
ENV PATH=/opt/proa/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models/huggingface \
    PROA_CACHE_DIR=/models/proa \
    PROA_VOTES=/data/votes.sqlite3 \
    PROA_HOST=0.0.0.0 \
    PROA_PORT=8000
USER proa
WORKDIR /home/proa
VOLUME /models /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start downloads and quantises the model.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['PROA_PORT']}/readyz\", timeout=2)"]
ENTRYPOINT ["proa"]
CMD ["serve"]
