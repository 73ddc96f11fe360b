# One image for all parts: `api`, `writer`, `migrate`, and the operator's commands, `verify` and others (see compose.yaml).
# The Python is the version that CI tests; Dockerfile and .ci change together.

FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/coupon-svc
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lua ./lua
COPY sql ./sql
COPY coupon_svc ./coupon_svc
# Not editable: the scripts and the migrations go into the package with it.
RUN /opt/coupon-svc/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt .

FROM python:3.11-slim
LABEL org.opencontainers.image.title="coupon-svc" \
      org.opencontainers.image.description="Coupon Book Service: assign, lock and redeem coupon codes" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT"
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin coupon
COPY --from=build /opt/coupon-svc /opt/coupon-svc
ENV PATH=/opt/coupon-svc/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# In a container 127.0.0.1 is the container itself: nobody could reach the API there.
ENV COUPON_HOST=0.0.0.0
WORKDIR /
USER 10001
EXPOSE 8080
# The service itself is process 1: it ends in order on SIGTERM.
ENTRYPOINT ["coupon-svc"]
CMD ["--help"]
