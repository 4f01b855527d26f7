"""The application for a WSGI server, set up from the environment: how the container runs it.

    gunicorn --config python:heapledger.web.gunicorn_conf 'heapledger.web.wsgi:application()'

HEAPLEDGER_TRACES          files and folders to serve, separated by `:` (default: the current folder)
HEAPLEDGER_ALLOWED_HOSTS   names to answer besides the loopback ones, separated by `,`
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from flask import Flask

from heapledger.web.app import create_app
from heapledger.web.catalogue import check_paths
from heapledger.web.config import Config


def config_from(environment: Mapping[str, str]) -> Config:
    paths = tuple(Path(part).resolve() for part in environment.get("HEAPLEDGER_TRACES", ".").split(":") if part)
    names = environment.get("HEAPLEDGER_ALLOWED_HOSTS", "").lower().split(",")
    return Config(paths=paths, allowed_hosts=frozenset(name.strip() for name in names if name.strip()))


def application() -> Flask:
    config = config_from(os.environ)
    check_paths(config.paths)
    return create_app(config)
