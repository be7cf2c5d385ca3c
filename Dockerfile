# syntax=docker/dockerfile:1
# Two images from one source: `gateway` has no torch, `worker` has it (TORCH=cuda or TORCH=cpu).
#   docker build --target gateway -t theriac-gateway .
#   docker build --target worker --build-arg TORCH=cpu -t theriac-worker .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS source
# One user id in both images: they share the volume under THERIAC_HOME.
RUN useradd --uid 10001 --create-home --home-dir /home/theriac theriac \
    && install -d -o theriac -g theriac -m 0700 /var/lib/theriac
WORKDIR /opt/theriac
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts scripts
COPY migrations migrations
COPY workers workers
COPY app app
ENV PATH=/opt/theriac/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 \
    THERIAC_HOME=/var/lib/theriac

FROM source AS gateway
RUN python scripts/setup.py --extras cluster \
    && python -c "import importlib.util as u; assert u.find_spec('torch') is None, 'the gateway has no torch'"
USER theriac
EXPOSE 8080
CMD ["theriac", "gateway"]

FROM source AS worker
ARG TORCH=cuda
ARG TORCH_CPU_INDEX=
RUN case "$TORCH" in \
      cuda) export ALLOW_CUDA=1 ;; \
      cpu) export ALLOW_CUDA=0 ;; \
      *) echo "TORCH is cuda or cpu, not '$TORCH'" >&2; exit 2 ;; \
    esac \
    && python scripts/setup.py --extras cluster,worker
USER theriac
CMD ["celery", "-A", "workers.celery_app", "worker", "-Q", "tuning", "-c", "1", "--without-gossip", "--without-mingle"]
