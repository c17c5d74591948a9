# The operator image. Docker and buildah build it alike; BASE lets a site bring its own base image.
ARG BASE=debian:trixie-slim
FROM ${BASE}

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv ca-certificates \
 && rm -rf /var/lib/apt/lists/*

# Dependencies have a layer of their own, so that a change of our code rebuilds only the last one.
# A site's own certificates, while it builds; not kept in the image.
ARG PIP_CERT
ARG SSL_CERT_FILE
COPY requirements/operator.txt /requirements/operator.txt
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --require-hashes -r /requirements/operator.txt \
 && rm -rf /requirements

COPY api/finetune_api /app/finetune_api
COPY operator/finetune_operator /app/finetune_operator

ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    LOGNAME=finetune-operator
# Kopf asks for a user name, and the number below has none in the image: LOGNAME answers.
USER 65532:65532
ENTRYPOINT ["python", "-m", "finetune_operator"]
