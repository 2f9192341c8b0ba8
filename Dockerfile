# One image for distrain's commands, for the head of a Ray cluster and for its workers.
# The wheels of torch and DALI bring CUDA along, so the base is plain Debian with
# Python; the host provides the NVIDIA driver. For x86-64.
#
#   docker build --tag distrain .
#   docker run --gpus all --ipc host --init -v /data/imagenet:/work/shards:ro -v /data/runs:/work/runs distrain \
#       train configs/alexnet-bn.yaml data.train=shards/train data.val=shards/val
#
# uid 1000 must be able to write to /data/runs, or choose another user with `--user`.
# For Kubernetes see cluster/kuberay.
#
# Without Docker, `python3.12 tests/docker.py` runs these steps in chroots and tests the
# result.

# A registry mirror to pull the base image from, with a trailing slash.
ARG MIRROR=""

# Pinned by its full version, not by its digest, which could not be looked up when this
# was written.
FROM ${MIRROR}python:3.12.13-slim-bookworm AS base
# Reasons for the less obvious parts:
# - wget: KubeRay's probes call it. Debian's security updates match the pinned version.
# - compileall: the standard library comes without byte code, and the user of the
#   container cannot write any.
# - /work/runs, /work/shards: an empty volume that Docker mounts on an existing folder
#   gets the folder's owner.
# - /etc/profile.d: KubeRay starts Ray in a login shell, which resets PATH.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends 'wget=1.21.*' \
    && rm -rf /var/lib/apt/lists/* \
    && python -m compileall -q -j 0 /usr/local/lib/python3.12 \
    && groupadd --gid 1000 distrain \
    && useradd --uid 1000 --gid 1000 --home-dir /tmp --no-create-home --shell /bin/bash distrain \
    && install --directory --owner 1000 --group 1000 /work /work/runs /work/shards \
    && ln --symbolic /opt/distrain/lib/python3.12/site-packages/distrain/recipes /work/configs \
    && echo "PATH=/opt/distrain/bin:\$PATH" > /etc/profile.d/distrain.sh
ENV PATH=/opt/distrain/bin:$PATH

FROM base AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_PYTHON=/opt/distrain
COPY cluster/constraints.txt cluster/
# Three layers, from gigabytes that rarely change to a megabyte that often does: CUDA,
# the other packages, distrain. pip resolves nothing, because constraints.txt lists
# every package. unchecked-hash: byte code is never compared with its source, which
# cannot change in the image.
RUN python -m venv --without-pip /opt/distrain \
    && grep -E '^(cuda|nvidia|torch|triton)' cluster/constraints.txt > cuda.txt \
    && grep -Ev '^(cuda|nvidia|torch|triton)' cluster/constraints.txt > others.txt \
    && pip install --no-deps --requirement cuda.txt \
    && pip install --no-deps --requirement others.txt --prefix /layers/others \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/distrain/lib /layers/others/lib
COPY LICENSE README.md pyproject.toml ./
# distrain/recipes is a link to configs.
COPY configs configs
COPY distrain distrain
# Without an index this fails if constraints.txt lacks a package that distrain or one of
# the extras requires.
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
# HOME: the root may be read-only and the uid arbitrary; /tmp is writable for all.
# video: DALI loads the decoders of the driver.
# NVIDIA_VISIBLE_DEVICES is left to the operator who starts the container.
ENV HOME=/tmp \
    LANG=C.UTF-8 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
# The settings of cluster/ray.env, which explains them.
ENV GRPC_ENABLE_FORK_SUPPORT=0 \
    RAY_AUTH_MODE=token \
    RAY_health_check_period_ms=1000 \
    RAY_health_check_timeout_ms=2000 \
    RAY_health_check_failure_threshold=3 \
    RAY_health_check_initial_delay_ms=2000
# The recipes have relative paths: /work has configs, shards and runs side by side.
WORKDIR /work
USER 1000:1000
# Ray's head, Ray's dashboard, Ray's metrics, distrain's metrics, Ray Client.
EXPOSE 6379 8265 8080 9477 10001
# In a Ray node, ask its agent, which requires no token: it checks that the head still
# counts the node as alive and, on the head, that the head answers. Any other command is
# healthy as long as it runs; its exit code says whether it succeeded. Kubernetes has
# its own probes.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["bash", "-c", "! grep -qsx raylet /proc/[0-9]*/comm || wget -qO- -t 1 -T 5 http://127.0.0.1:52365/api/healthz"]
ENTRYPOINT ["distrain"]
CMD ["--help"]
