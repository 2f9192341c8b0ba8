# One image for a command, for Ray's head and for its workers. The wheels of torch and DALI bring CUDA along, so the
# base is a plain Debian with Python; the host brings the NVIDIA driver. For x86-64.
#
#   docker build --tag distrain .
#   docker run --gpus all --ipc host --init -v /data/imagenet:/work/shards:ro -v /data/runs:/work/runs distrain \
#       train configs/alexnet-bn.yaml data.train=shards/train data.val=shards/val
#
# /data/runs must let uid 1000 write; any other `--user` will do as well. On Kubernetes: cluster/kuberay.
# `python3.12 tests/docker.py` carries these steps out in a chroot, where there is no Docker, and tries the result.

# A mirror to take the base from, with a slash at its end.
ARG MIRROR=""

# Pinned by its full version; its digest could not be looked up where this was written.
FROM ${MIRROR}python:3.12.13-slim-bookworm AS base
# A login shell, in which KubeRay starts Ray, forgets PATH, so that it is in /etc/profile.d too. KubeRay's probes call
# wget (its version: Debian's security updates stay within it). The standard library comes without byte code, and who
# runs here may not write it. Folders that exist are the user's own where Docker puts an empty volume on them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends 'wget=1.21.*' \
    && rm -rf /var/lib/apt/lists/* \
    && python -m compileall -q -j 0 /usr/local/lib/python3.12 \
    && groupadd --gid 1000 distrain \
    && useradd --uid 1000 --gid 1000 --home-dir /tmp --no-create-home --shell /bin/bash distrain \
    && install --directory --owner 1000 --group 1000 /work /work/runs /work/shards \
    && ln --symbolic /opt/distrain/configs /work/configs \
    && echo "PATH=/opt/distrain/bin:\$PATH" > /etc/profile.d/distrain.sh
ENV PATH=/opt/distrain/bin:$PATH

FROM base AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_PYTHON=/opt/distrain
COPY cluster/constraints.txt cluster/
# Three layers, from gigabytes that hardly ever change to a megabyte that often does: CUDA, the other packages,
# distrain. Nothing is resolved here: constraints.txt has all of it. Byte code is never compared with its source.
RUN python -m venv --without-pip /opt/distrain \
    && grep -E '^(cuda|nvidia|torch|triton)' cluster/constraints.txt > cuda.txt \
    && grep -Ev '^(cuda|nvidia|torch|triton)' cluster/constraints.txt > others.txt \
    && pip install --no-deps --requirement cuda.txt \
    && pip install --no-deps --requirement others.txt --prefix /layers/others \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/distrain/lib /layers/others/lib
COPY LICENSE README.md pyproject.toml ./
COPY distrain distrain
# With no index to fetch from, this fails where constraints.txt lacks something that distrain or an extra asks for.
RUN PYTHONPATH=/layers/others/lib/python3.12/site-packages \
    pip install --no-index --no-build-isolation --constraint cluster/constraints.txt --prefix /layers/distrain \
    '.[s3,gcs,azure,jobs,gpu,trackers]' \
    && python -m compileall -q --invalidation-mode unchecked-hash /layers/distrain/lib

FROM base
LABEL org.opencontainers.image.title="distrain" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="python:3.12.13-slim-bookworm" \
      org.opencontainers.image.description="Data-parallel AlexNet training whose result does not depend on the cluster"
COPY --from=build /opt/distrain /opt/distrain
COPY --from=build /layers/others /opt/distrain
COPY --from=build /layers/distrain /opt/distrain
COPY configs /opt/distrain/configs
# The root may be read-only and the user anybody: /tmp is what all can write. video: DALI loads the driver's decoders.
# Which GPUs are there to be seen is for whoever starts the image to say.
ENV HOME=/tmp \
    LANG=C.UTF-8 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
# As in cluster/ray.env.
ENV GRPC_ENABLE_FORK_SUPPORT=0 \
    RAY_AUTH_MODE=token \
    RAY_health_check_period_ms=1000 \
    RAY_health_check_timeout_ms=2000 \
    RAY_health_check_failure_threshold=3 \
    RAY_health_check_initial_delay_ms=2000
# Relative paths of the recipes: shards and runs lie beside configs.
WORKDIR /work
USER 1000:1000
# Ray's head, Ray's dashboard, Ray's metrics, distrain's metrics, Ray's client.
EXPOSE 6379 8265 8080 9477 10001
# A Ray node asks its agent, which takes no token, whether the head still counts it in, and on the head whether that
# answers. Another command is well as long as it runs: its exit code says the rest. Kubernetes has its own probes.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["bash", "-c", "! grep -qsx raylet /proc/[0-9]*/comm || wget -qO- -t 1 -T 5 http://127.0.0.1:52365/api/healthz"]
ENTRYPOINT ["distrain"]
CMD ["--help"]
