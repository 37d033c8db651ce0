# One image for the server and every client; docs/deploy.md has sizes and build times.
ARG PYTHON=3.11

# What is installed hangs on pyproject.toml's dependencies alone, not on the rest of that file.
FROM python:${PYTHON}-slim AS requirements
COPY pyproject.toml .
# torch and torchvision are the next stage's: which builds of them is the user's choice.
RUN python -c "import tomllib; \
    needed = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
    print(*(line for line in needed if not line.startswith('torch')), sep='\n')" > requirements.txt

FROM python:${PYTHON}-slim AS dependencies
RUN python -m venv /opt/fedkit
ENV PATH=/opt/fedkit/bin:$PATH
# Not --extra-index-url: an index that does not answer would silently give the CUDA build.
ARG TORCH="torch torchvision"
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} $TORCH
COPY --from=requirements requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt

FROM python:${PYTHON}-slim AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source

FROM python:${PYTHON}-slim
COPY --from=dependencies /opt/fedkit /opt/fedkit
ENV PATH=/opt/fedkit/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FEDKIT_DATA_ROOT=/data \
    FLWR_TELEMETRY_ENABLED=0 \
    MALLOC_ARENA_MAX=2 \
    OMP_NUM_THREADS=1 \
    HOME=/state
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps /wheel/*.whl
# A new volume takes over the mode of the folder that it is mounted on: any user id can write there.
RUN install -d -m 1777 /state /runs /certs /certs/authority /certs/server /certs/clients
COPY deploy/prepare.py /opt/fedkit/prepare.py
USER 1000:1000
WORKDIR /state
EXPOSE 8090
ENTRYPOINT ["fedkit"]
CMD ["--help"]
