"""From results to what a template prints: one file a part of the page. Nothing here knows of requests or files."""
