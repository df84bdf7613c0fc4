# The nowcaster service: Ray and PyTorch Geometric, no DeepSpeed. From the top of the repository:
#   docker build --file deploy/service.Dockerfile --tag sidecast-service .
# Another base needs python3.11 with its venv module, and apt-get.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS dependencies
# For CUDA, give the index of its version, e.g. https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python3.11 -m venv /opt/sidecast
COPY constraints.txt .
# Without its dependencies, whose pinned versions only PyPI is sure to have; the next step brings them.
RUN /opt/sidecast/bin/pip install --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX" torch
COPY pyproject.toml .
# The requirements alone, so that a change of the code does not install them again.
RUN /opt/sidecast/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['service'], sep='\n')" > requirements.txt \
    && /opt/sidecast/bin/pip install --constraint constraints.txt --requirement requirements.txt

FROM dependencies AS package
# For the tile loops of NiNo; not in the image.
RUN apt-get update && apt-get install --yes --no-install-recommends g++
COPY . .
RUN /opt/sidecast/bin/pip wheel --no-deps --wheel-dir /dist .

FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home sidecast \
    && install --directory --owner sidecast --group sidecast \
        /etc/sidecast/service /etc/sidecast/client /var/lib/sidecast
COPY --from=dependencies /opt/sidecast /opt/sidecast
COPY --from=package /dist /dist
RUN /opt/sidecast/bin/pip install --no-cache-dir --no-deps /dist/*.whl && /opt/sidecast/bin/pip check
COPY deploy/make_certs.sh /usr/local/bin/make_certs.sh
# KubeRay starts Ray from a login shell, whose path is the system's.
RUN ln -s /opt/sidecast/bin/ray /usr/local/bin/ray

ENV PATH=/opt/sidecast/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER sidecast
WORKDIR /home/sidecast
EXPOSE 50051 9464
# Histories are memory-mapped files; a volume keeps them off the layered file system.
VOLUME /var/lib/sidecast
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["sidecast", "status", "127.0.0.1:50051", \
         "--tls-ca", "/etc/sidecast/client/ca.crt", "--token-file", "/etc/sidecast/client/token"]
ENTRYPOINT ["sidecast"]
CMD ["serve", "--host", "0.0.0.0", "--port", "50051", "--metrics-port", "9464", \
     "--tls-cert", "/etc/sidecast/service/tls.crt", "--tls-key", "/etc/sidecast/service/tls.key", \
     "--token-file", "/etc/sidecast/client/token", "--history-dir", "/var/lib/sidecast"]
