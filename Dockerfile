# docker build -t skewless .                           for CPUs
# docker build -t skewless --build-arg DEVICE=cuda .   for GPUs, several GB larger; the host brings the driver
# docker build -t skewless-gateway --target gateway .  nginx in front of it
# docker run --read-only --tmpfs /tmp -v skewless-state:/app/state -v "$PWD/model_store:/app/model_store:ro" \
#     -p 127.0.0.1:8080:8080 -p 127.0.0.1:7070:7070 skewless                                    (GPU: add --gpus all)
FROM python:3.11.14-slim-bookworm AS build

ARG DEVICE=cpu
ENV VENV=/opt/venv
ENV PATH="$VENV/bin:$PATH"
WORKDIR /app
COPY requirements.txt .
# A CPU build of the same torch, torchaudio and torchvision has a higher local version ("+cpu") and is preferred.
RUN case "$DEVICE" in \
        cuda) ;; \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        *) echo "DEVICE is '$DEVICE', expected cpu or cuda" >&2; exit 2 ;; \
    esac; \
    python -m venv "$VENV" && pip install --no-cache-dir -r requirements.txt

# The project as an installed package.
COPY pyproject.toml source/
COPY README.md source/
COPY LICENSE source/
COPY config.properties source/
COPY handler source/handler
COPY archive source/archive
COPY skewless source/skewless
RUN pip install --no-cache-dir --no-deps ./source && mv source/config.properties .
# Inference and metrics are reachable from outside the container; the management API, which can load code, is not.
RUN sed -i -E 's|^(inference_address\|metrics_address)=http://127.0.0.1|\1=http://0.0.0.0|; s|^(grpc_inference_address)=.*|\1=0.0.0.0|' config.properties

FROM python:3.11.14-slim-bookworm AS runtime

# A number, so that Kubernetes can see that it is not root. Nothing else is writable: state/ is a volume, /tmp a tmpfs.
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home --shell /usr/sbin/nologin skewless \
    && mkdir -p /app/state /app/model_store && chown 10001:10001 /app/state
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY --from=build /opt/venv /opt/venv
VOLUME /app/state
USER 10001:10001

FROM runtime AS gateway

USER 0:0
# The nginx that the gateway is tested with is Debian 12's, with its security updates; so the base image pins it, not a number.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends nginx libnginx-mod-http-lua \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
EXPOSE 8090 7090
# It shares the server's process ids, network and state, as compose.yaml and deploy/kubernetes have it.
CMD ["skewless", "gateway", "run", "--host", "0.0.0.0", "--client-keys", "/run/secrets/client-keys", "--state-dir", "state/server"]

FROM runtime AS server

COPY --from=build /app/config.properties .
EXPOSE 8080 8082 7070
# A reference has its recorded probability. Docker knows one sort of check; Kubernetes' are in deploy/kubernetes.
HEALTHCHECK --interval=30s --timeout=20s --start-period=180s \
    CMD ["skewless", "serve", "health", "--state-dir", "state/server"]
# A folder below the volume's own: it has to belong to whoever serves, which a volume's need not.
CMD ["skewless", "serve", "run", "--state-dir", "state/server", "--config", "config.properties"]
