# A DeepSpeed training job with the nowcasting hook: no Ray. From the top of the repository:
#   docker build --file deploy/trainer.Dockerfile --tag sidecast-trainer .
# Another base needs python3.11 with its headers and venv module, and apt-get.
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
print(*project['dependencies'], *project['optional-dependencies']['trainer'], sep='\n')" > requirements.txt \
    && /opt/sidecast/bin/pip install --constraint constraints.txt --requirement requirements.txt

FROM dependencies AS package
# For the tile loops of NiNo; not in the image.
RUN apt-get update && apt-get install --yes --no-install-recommends g++
COPY . .
RUN /opt/sidecast/bin/pip wheel --no-deps --wheel-dir /dist .

FROM ${BASE}
# DeepSpeed compiles an operator when it first runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home sidecast \
    && install --directory --owner sidecast --group sidecast /etc/sidecast/client /home/sidecast/runs
COPY --from=dependencies /opt/sidecast /opt/sidecast
COPY --from=package /dist /dist
RUN /opt/sidecast/bin/pip install --no-cache-dir --no-deps /dist/*.whl && /opt/sidecast/bin/pip check

ENV PATH=/opt/sidecast/bin:$PATH PYTHONUNBUFFERED=1
USER sidecast
WORKDIR /home/sidecast
# Prometheus ports of ranks 0 to 7 with nowcaster.metrics_port 9500.
EXPOSE 9500-9507
# A job that ends is no service: its health is its exit status, and it does not depend on the nowcaster's.
HEALTHCHECK NONE
CMD ["deepspeed", "--module", "sidecast.trainer.main", "--help"]
