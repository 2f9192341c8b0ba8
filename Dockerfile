# distrain in a container: torch brings the CUDA runtime along as wheels, so a plain Python image is enough.
# Written to be built; it has not been built where it was written (no Docker there).
FROM python:3.12-slim
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
RUN useradd --create-home distrain
WORKDIR /opt/distrain
COPY pyproject.toml README.md LICENSE ./
COPY distrain distrain
RUN pip install '.[s3,gcs,azure,quickstart]'
COPY configs configs
USER distrain
WORKDIR /home/distrain
ENTRYPOINT ["distrain"]
CMD ["--help"]
