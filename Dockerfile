# syntax=docker/dockerfile:1
# reslab on CUDA GPUs and CPUs, as a user without privileges: docs/install.md shows how to run it.
# PyTorch brings its own CUDA libraries, so the "base" image is enough.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

COPY --from=ghcr.io/astral-sh/uv:0.9.30 /uv /usr/local/bin/uv
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The Ubuntu image has a user "ubuntu" with id 1000, which most people have on their own machine.
WORKDIR /workspace
RUN uv venv --python /usr/bin/python3 /opt/venv && chown -R ubuntu:ubuntu /opt/venv /workspace
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH UV_LINK_MODE=copy
USER 1000:1000

# Dependencies in a separate layer, which a change of the source does not rebuild. EXTRAS: "" or "--extra dev" etc.
ARG EXTRAS=""
COPY --chown=ubuntu:ubuntu pyproject.toml constraints.txt ./
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/home/ubuntu/.cache/uv,uid=1000,gid=1000 \
    uv pip install --compile-bytecode -c constraints.txt -r pyproject.toml ${EXTRAS}

COPY --chown=ubuntu:ubuntu . .
RUN uv pip install --no-deps -e .

VOLUME ["/workspace/data", "/workspace/runs"]
CMD ["reslab", "--help"]
