# docker build -t skewless .                          GPU or CPU: PyPI's torch carries CUDA, the host brings the driver
# docker build -t skewless --build-arg DEVICE=cpu .   CPU only, several GB smaller
# docker run -p 8080:8080 -p 7070:7070 -v "$PWD/model_store:/app/model_store:ro" skewless      (GPU: add --gpus all)
FROM python:3.11-slim

ARG DEVICE=cuda
# A CPU build of the same torch, torchaudio and torchvision has a higher local version ("+cpu") and is preferred.
ENV VENV=/opt/venv
WORKDIR /app
COPY requirements.txt .
COPY scripts/environment.sh scripts/
RUN case "$DEVICE" in \
        cuda) ;; \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        *) echo "DEVICE is '$DEVICE', expected cpu or cuda" >&2; exit 2 ;; \
    esac; \
    PIP_NO_CACHE_DIR=1 sh -euc '. scripts/environment.sh'

COPY handler handler
COPY serving serving
COPY scripts scripts
COPY config.properties .
# Inference and metrics are reachable from outside the container; the management API, which can load code, is not.
RUN sed -i -E 's|^(inference_address\|metrics_address)=http://127.0.0.1|\1=http://0.0.0.0|; s|^(grpc_inference_address)=.*|\1=0.0.0.0|' config.properties \
    && useradd --create-home skewless && mkdir -p state model_store && chown skewless state
# librosa's compiled parts, where the user can read and write them: otherwise every container compiles them anew, 12 s.
ENV NUMBA_CACHE_DIR=/var/cache/numba
RUN mkdir -p "$NUMBA_CACHE_DIR" && /opt/venv/bin/python scripts/compile_features.py \
    && chown -R skewless "$NUMBA_CACHE_DIR"
USER skewless
EXPOSE 8080 8082 7070
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s \
    CMD ["/opt/venv/bin/python", "scripts/serve.py", "status", "--state-dir", "state"]
CMD ["/opt/venv/bin/python", "scripts/serve.py", "run", "--state-dir", "state"]
