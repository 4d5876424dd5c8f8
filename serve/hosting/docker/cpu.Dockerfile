# Any computer, amd64 or arm64:  docker build --file serve/hosting/docker/cpu.Dockerfile --tag omniport:cpu .
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
ARG EXTRAS=ort,live,serve
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python -m venv /opt/omniport \
    && /opt/omniport/bin/pip install --no-cache-dir "$(echo /wheels/omniport-*.whl)[${EXTRAS}]"

FROM python:3.12-slim
COPY --from=build /opt/omniport /opt/omniport
# the root is read-only, and the user has no home: what is cached goes where compose mounts a tmpfs
ENV PATH=/opt/omniport/bin:$PATH HOME=/tmp OMNIPORT_CACHE=/tmp/omniport
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m CMD \
    ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["omniport", "serve", "/bundle"]
CMD ["--host", "0.0.0.0", "--api-key-file", "/run/secrets/api-keys"]
