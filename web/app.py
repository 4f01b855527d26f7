"""create_app(config): the parts put together."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import plotly
from flask import Flask, Response, send_from_directory
from flask.typing import ResponseReturnValue

from heapledger import __version__
from heapledger.web import errors, security, units
from heapledger.web.api import api
from heapledger.web.books import make_books
from heapledger.web.catalogue import Catalogue
from heapledger.web.config import Config
from heapledger.web.desk import Desk, Maker
from heapledger.web.pages import pages
from heapledger.web.rooms import EXTENSION, Rooms

PLOTLY_FOLDER = Path(str(files("plotly"))) / "package_data"

#: A day: names of static files carry the version, so that an upgrade is seen at once.
STATIC_MAX_AGE_S = 86_400

FILTERS = (
    units.format_bytes,
    units.exact_bytes,
    units.format_count,
    units.format_share,
    units.format_duration,
    units.format_date,
    units.iso_date,
    units.visible,
    units.shorten,
    units.short_path,
)


def create_app(config: Config, *, make: Maker = make_books) -> Flask:
    """The dashboard over `config.paths`. `make` analyses one process of a file."""
    app = Flask(__name__)
    app.config["SEND_FILE_MAX_AGE_DEFAULT"] = STATIC_MAX_AGE_S
    app.config["MAX_CONTENT_LENGTH"] = 0  # nothing is uploaded here
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    for function in FILTERS:
        app.add_template_filter(function)
    app.jinja_env.globals.update(version=__version__, plotly_version=plotly.__version__)
    desk = Desk(make, kept=config.kept_results, queue_limit=config.queue_limit, rest_s=config.rest_s)
    app.extensions[EXTENSION] = Rooms(config, Catalogue(config), desk)

    security.guard(app, config)
    errors.register(app)
    app.register_blueprint(pages)
    app.register_blueprint(api)
    add_plain_routes(app)
    return app


def add_plain_routes(app: Flask) -> None:
    def healthz() -> Response:
        """Alive: requests are answered."""
        return Response("ok\n", mimetype="text/plain")

    def plotly_js() -> ResponseReturnValue:
        """plotly.js as it lies in the installed plotly package: no network is needed."""
        return send_from_directory(PLOTLY_FOLDER, "plotly.min.js")

    app.add_url_rule("/healthz", view_func=healthz)
    app.add_url_rule("/static/plotly.min.js", view_func=plotly_js)
