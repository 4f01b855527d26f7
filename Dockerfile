# The dashboard over a folder of traces, mounted at /traces. Recording happens outside, where the programs run.
#
#   docker build -t heapledger .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL -v "$PWD/traces:/traces:ro" -p 127.0.0.1:8321:8321 heapledger

FROM python:3.11-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --wheel-dir /wheels . "gunicorn>=23"

FROM python:3.11-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-index --find-links /wheels heapledger gunicorn \
    && rm -rf /wheels \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin heapledger \
    && mkdir /traces
USER 10001:10001
# 0.0.0.0 is the container's own network; it is published on the host's loopback only (see docker-compose.yml).
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HEAPLEDGER_BIND=0.0.0.0:8321 \
    HEAPLEDGER_TRACES=/traces
EXPOSE 8321
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-m", "heapledger.web.health"]
CMD ["gunicorn", "--config", "python:heapledger.web.gunicorn_conf", "heapledger.web.wsgi:application()"]
