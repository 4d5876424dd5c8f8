# Jetson boards with JetPack 6:  docker build --file serve/hosting/docker/jetpack6.Dockerfile --tag omniport:jp6 .
# TensorRT is that of the board's own package index: L4T must be the board's (r36.4: JetPack 6.2).
FROM ubuntu:22.04 AS python
ARG L4T=r36.4
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Ubuntu and L4T keep no older version than the newest
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl gpg python3 python3-venv \
    && curl --fail --silent --show-error https://repo.download.nvidia.com/jetson/jetson-ota-public.asc \
    | gpg --dearmor --output /usr/share/keyrings/jetson.gpg \
    && echo "deb [signed-by=/usr/share/keyrings/jetson.gpg] https://repo.download.nvidia.com/jetson/common ${L4T} main" \
    > /etc/apt/sources.list.d/jetson.list \
    && apt-get update \
    && apt-get install --yes --no-install-recommends cuda-cudart-12-6 python3-libnvinfer \
    && apt-get purge --yes --auto-remove curl gpg \
    && rm -rf /var/lib/apt/lists/*
# the container runtime of JetPack mounts the driver's libraries
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all

FROM python AS build
WORKDIR /source
COPY . .
ARG EXTRAS=ort,live,serve
RUN python3 -m venv --system-site-packages /opt/omniport \
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
