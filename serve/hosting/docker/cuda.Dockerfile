# A GPU of NVIDIA's, amd64:  docker build --file serve/hosting/docker/cuda.Dockerfile --tag omniport:cuda .
# ONNX Runtime brings CUDA's and cuDNN's libraries. --build-arg EXTRAS=ort-gpu,rtx,live,serve adds TensorRT-RTX.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS python
# Ubuntu keeps no older version than the newest
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
WORKDIR /source
COPY . .
ARG EXTRAS=ort-gpu,live,serve
RUN python3 -m venv /opt/omniport \
    && /opt/omniport/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && /opt/omniport/bin/pip install --no-cache-dir "$(echo /wheels/omniport-*.whl)[${EXTRAS}]"

FROM python
COPY --from=build /opt/omniport /opt/omniport
# the root is read-only, and the user has no home: what is cached goes where compose mounts a tmpfs
ENV PATH=/opt/omniport/bin:$PATH HOME=/tmp OMNIPORT_CACHE=/tmp/omniport
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m CMD \
    ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["omniport", "serve", "/bundle"]
CMD ["--host", "0.0.0.0", "--api-key-file", "/run/secrets/api-keys"]
