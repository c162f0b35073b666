# docker build -t skewless .                          GPU or CPU: PyPI's torch carries CUDA, the host brings the driver
# docker build -t skewless --build-arg DEVICE=cpu .   CPU only, several GB smaller
# docker run -p 8080:8080 -p 7070:7070 -v "$PWD/model_store:/app/model_store:ro" skewless      (GPU: add --gpus all)
FROM python:3.11-slim

ARG DEVICE=cuda
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

# The project as an installed package: what it was built from does not stay.
COPY pyproject.toml source/
COPY README.md source/
COPY LICENSE source/
COPY config.properties source/
COPY handler source/handler
COPY archive source/archive
COPY skewless source/skewless
RUN pip install --no-cache-dir --no-deps ./source && mv source/config.properties . && rm -r source
# Inference and metrics are reachable from outside the container; the management API, which can load code, is not.
RUN sed -i -E 's|^(inference_address\|metrics_address)=http://127.0.0.1|\1=http://0.0.0.0|; s|^(grpc_inference_address)=.*|\1=0.0.0.0|' config.properties \
    && useradd --create-home skewless && mkdir -p state model_store && chown skewless state
USER skewless
EXPOSE 8080 8082 7070
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s \
    CMD ["skewless", "serve", "status", "--state-dir", "state"]
CMD ["skewless", "serve", "run", "--state-dir", "state", "--config", "config.properties"]
