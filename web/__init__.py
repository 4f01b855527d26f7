"""The room where traces are looked at: a Flask application over trace files.

    config.py      what may be served, and to whom       security.py   headers, Host check
    catalogue.py   files and folders → ids               desk.py       first analysis, in the background
    books.py       all that is known about one process   units.py      bytes, times and counts as text
    pages/         HTML, one file a page                 api/          JSON, one file a resource
    views/         numbers → what a template prints      templates/, static/
    app.py         create_app(config)                    server.py     `heapledger serve`      wsgi.py  gunicorn

A request walks app → pages or api → desk → books → views → templates. Templates hold no logic; figures are the same
ones that the command line prints, from the same functions.
"""
